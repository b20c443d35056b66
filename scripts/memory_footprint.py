#!/usr/bin/env python3
"""memory_footprint.py: what a training step takes, planned beside measured, over a grid of techniques.

    scripts/memory_footprint.py                                    the grid on `small` (d12 on a GPU)
    scripts/memory_footprint.py --grid techniques --models d12     one technique added at a time, and its picture
    scripts/memory_footprint.py --models gpt3:c4096 --seq-len 1024 --micro-batch 1 --grid techniques --plan-only

Every row is planned first (`plan --json`); where that fits into the machine, a few steps follow, in a process that is
ended before it would write a checkpoint. They give the allocator's bytes (`device_bytes` of metrics.jsonl), which must
be those of the plan, and what the system says: on a CPU the peak resident set (the plan, the host's share of it, and a
constant for the program and oneDNN), on CUDA nvidia-smi's figure for the process (empty where it names none).
Combinations that the program refuses stay in the tables with its message.

Writes footprint.csv, footprint.md, footprint.png and footprint.svg (these two need matplotlib). The exit code is 1 when
a run failed or took other than what was planned, 2 when the call was wrong.
"""
import argparse
import csv
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_measurements import machine
from gpu_measurements.training import read_metrics, write_shard

ROOT = Path(__file__).resolve().parent.parent
GIB, MIB = 1 << 30, 1 << 20
SHARD_TOKENS = 1 << 18
FIGURE = "footprint"

CATEGORIES = ("weights", "optimizer state", "gradients", "activations", "workspace")
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#999999")
BEHIND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}  # a text's background
PLANNED = [f"{category.replace(' ', '_')}_bytes" for category in CATEGORIES]
COLUMNS = ["model", "parameters", "grid", "technique", "flags", "status", "message", *PLANNED, "planned_device_bytes",
           "planned_host_bytes", "allocated_bytes", "allocated_difference_percent", "process_bytes",
           "process_difference_percent"]

OPTIMIZERS = ("adamw", "adafactor", "sgd", "flora")
GRADIENTS = ("dense", "fused", "compressed")
RECOMPUTE = ("none", "block")
EIGHT_BIT = ["--weight-dtype", "int8", "--state-dtype", "int8"]
DTYPES = {"fp32": ["--dtype", "fp32"], "bf16": ["--dtype", "bf16"], "8-bit": ["--dtype", "bf16", *EIGHT_BIT]}
OFFLOAD = ("none", "weights,activations")

# Published figures for 7B models as the papers print them, in their "GB"; batch and sequence length are theirs.
PUBLISHED = (
    (102.2, "AdamW, checkpointing (arXiv 2306.09782)"),
    (15.3, "Q-GaLore (arXiv 2407.08296)"),
    (13.6, "LOMO (arXiv 2306.09782)"),
    (11.0, "Q-APOLLO-Mini (arXiv 2412.05270)"),
)


class FootprintError(Exception):
    """A message for the user, one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"memory_footprint: {message}\n")


def size_of(text):
    """Bytes of 24GiB, 500MiB or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|TiB)?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, as in 24GiB")
    return int(float(match[1]) * {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}[match[2]])


def positive(text):
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse_arguments(arguments=None):
    parser = Parser(description="Planned and measured memory of a training step over a grid of techniques.")
    parser.add_argument("--models", metavar="A,B", help="presets or config.json files (default: small, on a GPU d12)")
    parser.add_argument("--grid", choices=("full", "techniques"), default="full", help="techniques: one added at a "
                        "time; full: these and every combination of optimizer, gradients, recompute, dtype and offload")
    parser.add_argument("--seq-len", type=positive, default=256, help="tokens of a sequence (default: 256)")
    parser.add_argument("--micro-batch", type=positive, default=2, help="sequences of a micro-batch (default: 2)")
    parser.add_argument("--rank", default="64", help="of Flora and of compressed gradients (default: 64)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument("--steps", type=positive, default=2, help="of each measured run (default: 2)")
    parser.add_argument("--plan-only", action="store_true", help="run nothing")
    parser.add_argument("--measure", type=size_of, metavar="SIZE", help="run only what plans at most this, as in 4GiB "
                        "(default: what is free)")
    parser.add_argument("--limit-seconds", type=float, default=120.0, help="for each run (default: 120)")
    parser.add_argument("--vocabulary", type=positive, default=50257, help="of the tokens (default: 50257)")
    parser.add_argument("--out", type=Path, default=ROOT / "build/memory-footprint", metavar="DIR", help="of the "
                        "tables and the picture (default: build/memory-footprint)")
    parser.add_argument("--program", type=Path, default=Path(os.environ.get("TRAIN_GPT2", ROOT / "train_gpt2")),
                        help="(default: ./train_gpt2)")
    given = parser.parse_args(arguments)
    if not given.limit_seconds > 0:
        parser.error("--limit-seconds is a number above 0")
    if given.vocabulary > 65535:
        parser.error("--vocabulary: tokens are 16 bits, so at most 65535")
    return given


# ---- The rows

def optimizer_flags(optimizer, gradients, rank):
    flags = ["--optimizer", optimizer, "--gradients", gradients]
    if optimizer == "flora":
        return [*flags, "--rank", rank]
    return [*flags, "--accumulation-rank", rank] if gradients == "compressed" else flags


def combinations(rank):
    for optimizer, gradients, recompute, dtype, offload in itertools.product(
            OPTIMIZERS, GRADIENTS, RECOMPUTE, DTYPES, OFFLOAD):
        name = f"{optimizer}, {gradients}, recompute {recompute}, {dtype}, offload {offload}"
        yield name, [*DTYPES[dtype], *optimizer_flags(optimizer, gradients, rank), "--recompute", recompute,
                     "--offload", offload]


def rows_of(model, plan, arguments):
    """The ladder of techniques as the program's plan has it, then the combinations."""
    grids = {"techniques": [(row["name"], shlex.split(row["flags"])) for row in plan["techniques"]]}
    if arguments.grid == "full":
        grids["full"] = combinations(arguments.rank)
    for grid, entries in grids.items():
        for name, flags in entries:
            yield {**dict.fromkeys(COLUMNS, ""), "model": model, "parameters": plan["settings"]["parameters"],
                   "grid": grid, "technique": name,
                   "flags": shlex.join(flags)}


# ---- The program

class Program:
    def __init__(self, arguments, folder):
        self.arguments, self.folder, self.device = arguments, folder, arguments.device
        self.shard = folder / "random.bin"
        write_shard(self.shard, max(SHARD_TOKENS, 2 * arguments.seq_len * arguments.micro_batch), arguments.vocabulary)

    def command(self, model, flags):
        return [str(self.arguments.program.absolute()), "--model", model, "--device", self.device, "--data",
                str(self.shard), "--seq-len", str(self.arguments.seq_len), "--micro-batch",
                str(self.arguments.micro_batch), "--no-update-overlap", *flags]  # the least memory, not the fastest step

    def plan(self, model, flags):
        """The plan, or the message with which it is refused."""
        try:
            done = subprocess.run([*self.command(model, flags), "--plan", "--json"], cwd=ROOT, capture_output=True,
                                  text=True, stdin=subprocess.DEVNULL, timeout=self.arguments.limit_seconds)
        except OSError as error:
            raise FootprintError(f"{self.arguments.program}: {error.strerror or error}; make builds it") from None
        except subprocess.TimeoutExpired:
            return None, f"no plan within {self.arguments.limit_seconds:g} s"
        if done.returncode != 0:
            return None, last_line(done.stderr) or f"exit code {done.returncode}"
        try:
            return json.loads(done.stdout), ""
        except ValueError:
            raise FootprintError(f"{self.arguments.program} printed no plan") from None

    def run(self, model, flags):
        """(rows of metrics.jsonl, peak bytes of the process, message): the first steps of a run without an end."""
        out, errors, limit = self.folder / "run", self.folder / "errors", self.arguments.limit_seconds
        shutil.rmtree(out, ignore_errors=True)
        command = [*self.command(model, flags), "--out", str(out), "--steps", str(self.arguments.steps + 1000),
                   "--eval-every", "0", "--checkpoint-every", "0", "--log-every", "1", "--peak-tflops", "1",
                   "--no-autotune"]
        began, rows, driver, status, message = time.monotonic(), [], None, None, ""
        with open(errors, "w") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                       stderr=file)
        try:
            while len(rows) < self.arguments.steps and not message:
                time.sleep(0.02)
                rows = read_metrics(out)[1]
                if self.device == "cuda":
                    driver = max(driver or 0, driver_bytes(process.pid)) or None
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
                if ended:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    message = last_line(errors.read_text()) or f"ended with exit code {process.returncode}"
                elif time.monotonic() - began > limit:
                    message = f"no {self.arguments.steps} steps within {limit:g} s"
        finally:
            if process.returncode is None:
                os.kill(process.pid, signal.SIGKILL)  # process.kill() would wait for a process that has ended
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            shutil.rmtree(out, ignore_errors=True)
        return rows, driver if self.device == "cuda" else usage.ru_maxrss << 10, message


def last_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("train_gpt2: ") if lines else ""


def driver_bytes(pid):
    """What nvidia-smi says that the process uses; 0 where it does not say (another pid namespace, for one)."""
    table = machine.text_of("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
    found = re.findall(rf"^{pid}, *(\d+)$", table, re.M)
    return sum(map(int, found)) << 20


def host_free():
    match = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    return int(match[1]) << 10 if match else 0


def room(device, planned, host, limit):
    """An empty text where the run may be tried, else why not. Something stays free for the runtime's own needs."""
    if limit is not None and planned > limit:
        return f"plans {planned / GIB:.2f} GiB, above --measure"
    free = machine.memory_free() if device == "cuda" else host_free() - host
    if free is not None and planned > 0.9 * free:  # without nvidia-smi the program itself will say
        return f"plans {planned / GIB:.2f} GiB on the device, which has {free / GIB:.2f} GiB free"
    if host > 0.9 * host_free():
        return f"plans {host / GIB:.2f} GiB on the host, which has {host_free() / GIB:.2f} GiB free"
    return ""


def measure(program, row):
    """Fills the row in."""
    flags = shlex.split(row["flags"])
    plan, message = program.plan(row["model"], flags)
    if not plan:
        row.update(status="refused", message=message)
        return
    planned, host = plan["device_bytes"], plan["host_bytes"]
    row.update(status="planned", planned_device_bytes=planned, planned_host_bytes=host,
               **{column: plan["categories"][category] for column, category in zip(PLANNED, CATEGORIES)})
    if program.arguments.plan_only:
        return
    if message := room(program.device, planned, host, program.arguments.measure):
        row.update(status="too large", message=message)
        return
    steps, process, message = program.run(row["model"], flags)
    if message or not steps:
        row.update(status="failed", message=message)
        return
    allocated = steps[-1]["device_bytes"]
    row.update(status="measured", allocated_bytes=allocated,
               allocated_difference_percent=difference(allocated, planned))
    if process:
        expected = planned + (host if program.device == "cpu" else 0)
        row.update(process_bytes=process, process_difference_percent=difference(process, expected))


def difference(measured, planned):
    return round(100 * (measured - planned) / planned, 4)


def plan_of(program, model):
    """A plan of the model; complains where there is no such model, or the program refuses the flags of every row."""
    plan, message = program.plan(model, ["--rank", program.arguments.rank])
    if not plan:
        raise FootprintError(message)
    return plan


# ---- The tables and the picture

def gib(value, digits=3):
    return "" if value == "" else f"{int(value) / GIB:.{digits}f}"


def process_title(device):
    return "resident" if device == "cpu" else "driver"


def markdown(rows, device, command):
    on = machine.query_gpu("name") + ", " + machine.cpu_name() if device == "cuda" else machine.cpu_name()
    system = process_title(device)
    title = ["model", "technique", *CATEGORIES, "device, planned", "host, planned", "allocated", "difference",
             system, "difference"]
    compared = "device and host as planned" if device == "cpu" else "the device as planned"
    lines = ["# Memory footprint", "", f"Machine: {on.removeprefix(', ')}. Commit {machine.commit()}. Command:", "",
             f"    {command}", "",
             f"GiB. `allocated`: the device allocator's bytes in metrics.jsonl, `{system}`: "
             + ("the peak resident set of the process" if device == "cpu" else "nvidia-smi's figure for the process")
             + f", compared with {compared}; an empty cell was not measured. Flags of every row: footprint.csv.", "",
             "| " + " | ".join(title) + " |", "|" + " --- |" * len(title)]
    for row in rows:
        if row["status"] == "refused":
            continue
        cells = [row["model"], row["technique"], *(gib(row[column]) for column in PLANNED),
                 gib(row["planned_device_bytes"]), gib(row["planned_host_bytes"]), gib(row["allocated_bytes"]),
                 percent(row["allocated_difference_percent"]), gib(row["process_bytes"]),
                 percent(row["process_difference_percent"])]
        lines.append("| " + " | ".join(cells) + " |")
    beyond = [int(row["process_bytes"]) - int(row["planned_device_bytes"])
              - (int(row["planned_host_bytes"]) if device == "cpu" else 0)
              for row in rows if row["process_bytes"] != ""]
    if beyond:
        lines += ["", f"`{system}` less what is planned: {min(beyond) / MIB:.1f} to {max(beyond) / MIB:.1f} MiB."]
    for status, heading in (("refused", "Refused by the program"), ("too large", "Planned, not run"),
                            ("failed", "Failed")):
        chosen = [row for row in rows if row["status"] == status]
        if chosen:
            lines += ["", f"## {heading}", ""]
            lines += [f"* {row['model']}, {row['technique']} (`{row['flags']}`): {row['message']}" for row in chosen]
    return "\n".join(lines) + "\n"


def percent(value):
    return "" if value == "" else f"{float(value):+.2f}%"


def bars(rows, model):
    """(technique, GiB per category, GiB on the host) of the bars for one model; what was refused has none."""
    return [(row["technique"], [int(row[column]) / GIB for column in PLANNED], int(row["planned_host_bytes"]) / GIB)
            for row in rows
            if row["model"] == model and row["grid"] == "techniques" and row["planned_device_bytes"] != ""]


def draw(plt, rows, arguments):
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(len(models), 1, squeeze=False, figsize=(10, 1.2 + 4.2 * len(models)),
                                  layout="constrained")
    published = False
    for axes, model in zip(panels[:, 0], models):
        parameters = next(int(row["parameters"]) for row in rows if row["model"] == model)
        seven_billion = 6e9 <= parameters <= 8e9
        draw_bars(axes, bars(rows, model), at_least=PUBLISHED[0][0] if seven_billion else 0.0)
        if seven_billion:
            draw_published(axes)
            published = True
        axes.set_xlabel("GiB on the device, as planned")
        axes.set_title(f"{model} ({parameters / 1e6:,.0f}M parameters), {arguments.micro_batch} x {arguments.seq_len} "
                       "tokens, bf16", fontsize=11)
    if published:
        figure.supxlabel("Dashed: figures published for 7B models, as their papers print them (LOMO and its AdamW: "
                         "arXiv 2306.09782;\nQ-GaLore: 2407.08296; Q-APOLLO-Mini: 2412.05270); batches and sequence "
                         "lengths differ.", fontsize=8)
    return figure


def draw_bars(axes, drawn, at_least):
    """Stacked horizontal bars, the first one on top, each with its total."""
    ends = [0.0] * len(drawn)
    for number, (category, color) in enumerate(zip(CATEGORIES, COLORS)):
        widths = [parts[number] for _, parts, _ in drawn]
        axes.barh(range(len(drawn)), widths, left=ends, color=color, label=category)
        ends = [end + width for end, width in zip(ends, widths)]
    widest = max([at_least, *ends]) or 1.0
    for place, (end, (_, _, host)) in enumerate(zip(ends, drawn)):
        text = f"{end:.4g}" + (f" (host: {host:.3g})" if host > 0.01 * end else "")
        axes.text(end + 0.008 * widest, place, text, va="center", fontsize=9, bbox=BEHIND)
    axes.set_yticks(range(len(drawn)), [name for name, _, _ in drawn])
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * widest)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(0.88, 0.02), fontsize=9, frameon=False)


def draw_published(axes):
    axes.set_ylim(axes.get_ylim()[0], -3.0)  # room for the names, above the bars
    for number, (value, name) in enumerate(PUBLISHED):
        left = value > 0.5 * axes.get_xlim()[1]
        axes.axvline(value, color="black", linestyle="--", linewidth=0.9, alpha=0.7)
        axes.annotate(f"{name}: {value:g} GB", (value, -2.7 + 0.55 * number), xytext=(-4 if left else 4, 0),
                      textcoords="offset points", ha="right" if left else "left", va="center", fontsize=8,
                      bbox=BEHIND)


def write_pictures(rows, arguments):
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed (scripts/setup.sh demo installs it into .venv)")
        return
    plt.rcParams["svg.hashsalt"] = FIGURE  # the same picture gives the same bytes
    figure = draw(plt, rows, arguments)
    figure.savefig(arguments.out / f"{FIGURE}.png", dpi=130)
    figure.savefig(arguments.out / f"{FIGURE}.svg", metadata={"Date": None})


def report(row):
    size = f"{int(row['planned_device_bytes']) / GIB:8.3f} GiB" if row["planned_device_bytes"] != "" else " " * 12
    print(f"{row['model']:<12s} {size}  {row['status']:<9s} {row['technique']}"
          + (f": {row['message']}" if row["message"] else ""), flush=True)


def chosen_device(program, arguments):
    """Of --device auto: cuda where there is a GPU and the program can plan for it."""
    if arguments.device != "auto":
        return arguments.device
    program.device = "cuda"
    return "cuda" if machine.query_gpu("name") and program.plan("tiny", [])[0] else "cpu"


def footprint(arguments, folder):
    program = Program(arguments, folder)
    program.device = chosen_device(program, arguments)
    models = arguments.models.split(",") if arguments.models else ["d12" if program.device == "cuda" else "small"]
    models = [str(Path(model).absolute()) if "/" in model or model.endswith(".json") else model
              for model in models if model]
    plans = {model: plan_of(program, model) for model in models}  # complains before anything is written
    rows = []
    with open(arguments.out / f"{FIGURE}.csv", "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for model, plan in plans.items():
            for row in rows_of(model, plan, arguments):
                measure(program, row)
                table.writerow(row)
                file.flush()
                rows.append(row)
                report(row)
    command = shlex.join(["scripts/memory_footprint.py", *sys.argv[1:]])
    (arguments.out / f"{FIGURE}.md").write_text(markdown(rows, program.device, command))
    write_pictures(rows, arguments)
    print(f"wrote {arguments.out}/{FIGURE}.csv, .md and what could be drawn: {len(rows)} rows")
    wrong = [row for row in rows if row["allocated_difference_percent"] not in ("", 0)]
    for row in wrong:
        print(f"memory_footprint: {row['model']}, {row['technique']}: {row['planned_device_bytes']} bytes planned, "
              f"{row['allocated_bytes']} allocated", file=sys.stderr)
    return 1 if wrong or any(row["status"] == "failed" for row in rows) else 0


def main():
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended, too
    try:
        arguments.out = arguments.out.absolute()
        arguments.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=arguments.out, prefix="data-") as folder:
            return footprint(arguments, Path(folder))
    except OSError as error:
        raise FootprintError(f"{error.filename or arguments.out}: {error.strerror or error}") from None
    except KeyboardInterrupt:
        print("memory_footprint: interrupted; footprint.csv has the rows up to here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FootprintError as problem:
        print(f"memory_footprint: {problem}", file=sys.stderr)
        sys.exit(2)
