"""export_metrics.py: runs (metrics.jsonl) as files of TensorBoard, CSV or JSON, or into Weights & Biases and Trackio.

    .venv/bin/python scripts/export_metrics.py tensorboard runs/a runs/b --out exported   # tensorboard --logdir exported
    .venv/bin/python scripts/export_metrics.py wandb runs/a --project gpt2 --offline      # wandb sync wandb/offline-run-*
    .venv/bin/python scripts/export_metrics.py trackio runs/a runs/b --project gpt2       # trackio show --project gpt2
    .venv/bin/python scripts/export_metrics.py csv first=runs/a second=runs/b --out exported

Every number of a step is exported under its name in metrics.jsonl, NaN where it was not finite; the configuration and the
samples go along as text (not into CSV). A run that was resumed is one run, one that is exported again replaces its files.
"""
import argparse
import csv
import importlib
import json
import logging
import math
from pathlib import Path

from metrics_file import MetricsError, read_metrics, run_script

FILES = {"tensorboard": "event files, for TensorBoard", "csv": "a table, for spreadsheets and pandas",
         "json": "configuration, steps and samples in one file"}
SERVICES = {"wandb": "a Weights & Biases run", "trackio": "a Trackio run"}
SUFFIX = ".train_gpt2"  # of event files, so that a second export finds those of the first


def parse_arguments():
    parser = argparse.ArgumentParser(description="Exports metrics.jsonl files.")
    targets = parser.add_subparsers(dest="target", required=True, metavar="{" + ",".join([*FILES, *SERVICES]) + "}")
    for name, text in {**FILES, **SERVICES}.items():
        target = targets.add_parser(name, help=text, description=f"Exports runs: {text}.")
        target.add_argument("runs", nargs="+", metavar="[LABEL=]PATH", help="a metrics.jsonl or its folder")
        if name in FILES:
            target.add_argument("--out", default="exported", metavar="DIR",
                                help="where a folder or file of each run's label is made (default: %(default)s)")
        else:
            target.add_argument("--project", default="train_gpt2", help="default: %(default)s")
    targets.choices["wandb"].add_argument("--offline", action="store_true", help="write the run here, send nothing")
    return parser.parse_args()


def package(name):
    """The module of that name, or one line about how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MetricsError(f"{name} is not installed; install it: .venv/bin/pip install {name}") from None


def configuration(run):
    """What the first line of the file holds, options beside version, device and so on."""
    options = run.options.get("options")
    rest = {key: value for key, value in run.options.items() if key != "options"}
    return {**rest, **options} if isinstance(options, dict) else run.options


def numbers(row):
    """The numbers of a step, NaN where one was not finite."""
    return {key: math.nan if value is None else value for key, value in row.items() if key != "step"}


def history(run):
    """Yields (step, numbers, sample or None) for every step that has any of both."""
    rows = {row["step"]: numbers(row) for row in run.rows}
    for step in sorted({*rows, *run.samples}):
        yield step, rows.get(step, {}), run.samples.get(step)


def to_tensorboard(run, out):
    """Times are such that TensorBoard's relative axis shows the time spent in steps, and the last one is the file's."""
    make_writer = package("tensorboardX").SummaryWriter
    logging.getLogger("tensorboardX").setLevel(logging.ERROR)  # it warns of every NaN
    folder = out / run.label
    before = list(folder.glob(f"events.out.tfevents.*{SUFFIX}"))
    time = run.written - sum(row.get("step_ms") or 0 for row in run.rows) / 1e3
    for path in before:
        path.unlink()
    writer = make_writer(str(folder), filename_suffix=SUFFIX)
    table = "".join("| {} | {} |\n".format(key, json.dumps(value).replace("|", "\\|")) for key, value in configuration(run).items())
    writer.add_text("configuration", f"| option | value |\n| --- | --- |\n{table}", 0, walltime=time)
    for step, values, sample in history(run):
        time += (values.get("step_ms") or 0) / 1e3
        for key, value in values.items():
            writer.add_scalar(key, value, step, walltime=time)
        if sample is not None:
            indented = "".join(f"    {line}\n" for line in sample.split("\n"))  # Markdown's way to leave text as it is
            writer.add_text("sample", indented, step, walltime=time)
    writer.close()
    return folder


def to_csv(run, out):
    path = out / f"{run.label}.csv"
    columns = dict.fromkeys(key for row in run.rows for key in ("step", *row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({"step": row["step"], **numbers(row)} for row in run.rows)
    return path


def to_json(run, out):
    path = out / f"{run.label}.json"
    samples = [{"step": step, "sample": text} for step, text in run.samples.items()]
    whole = {"name": run.label, "config": configuration(run), "history": run.rows, "samples": samples}
    path.write_text(json.dumps(whole, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return path


def to_service(module, run, project, **settings):
    """wandb and trackio, which has the same functions."""
    target = module.init(project=project, name=run.label, config=configuration(run), **settings)
    for step, values, sample in history(run):
        target.log({**values, **({} if sample is None else {"sample": sample})}, step=step)
    target.finish()


def check_labels(runs):
    labels = [run.label for run in runs]
    for label in labels:
        if "/" in label or label in ("", ".", ".."):
            raise MetricsError(f"'{label}' cannot name a file: give another label with LABEL=PATH", exit_code=2)
        if labels.count(label) > 1:
            raise MetricsError(f"two runs are called '{label}': name them with LABEL=PATH", exit_code=2)


def main():
    arguments = parse_arguments()
    runs = [read_metrics(argument) for argument in arguments.runs]
    check_labels(runs)
    if arguments.target in FILES:
        out = Path(arguments.out)
        write = {"tensorboard": to_tensorboard, "csv": to_csv, "json": to_json}[arguments.target]
        try:
            out.mkdir(parents=True, exist_ok=True)
            for run in runs:
                print(f"wrote {write(run, out)}: {len(run.rows)} steps")
        except OSError as error:
            raise MetricsError(f"{error.filename or out}: cannot be written ({error.strerror or error})") from None
        return
    module = package(arguments.target)
    settings = {"mode": "offline"} if getattr(arguments, "offline", False) else {}
    for run in runs:
        to_service(module, run, arguments.project, **settings)
        print(f"exported {run.label} to the project {arguments.project}: {len(run.rows)} steps")


if __name__ == "__main__":
    run_script("export_metrics", main)
