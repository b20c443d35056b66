"""export_metrics.py: metrics.jsonl to TensorBoard or Weights & Biases.

    .venv/bin/python scripts/export_metrics.py tensorboard out/metrics.jsonl --logdir runs/flora
    .venv/bin/python scripts/export_metrics.py wandb out/metrics.jsonl --project train_gpt2
"""
import argparse

from metrics_file import MetricsError, read_metrics, run_script

KEYS = ("loss", "val_loss", "lr", "grad_norm", "step_ms", "tokens_per_second", "mfu", "device_bytes", "tokens")


def parse_arguments():
    parser = argparse.ArgumentParser(description="Exports metrics.jsonl files.")
    targets = parser.add_subparsers(dest="target", required=True)
    for name, text in (("tensorboard", "event files for TensorBoard"), ("wandb", "a Weights & Biases run")):
        target = targets.add_parser(name, help=text)
        target.add_argument("runs", nargs="+", metavar="[LABEL=]PATH", help="a metrics.jsonl or its folder")
        if name == "tensorboard":
            target.add_argument("--logdir", default="runs", help="one folder per run is made here (default: runs)")
        else:
            target.add_argument("--project", default="train_gpt2", help="project (default: train_gpt2)")
            target.add_argument("--offline", action="store_true", help="write the run here, send nothing")
    return parser.parse_args()


def summary_writer():
    """The class of whichever TensorBoard writer is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise MetricsError(
                "no TensorBoard writer; install one into .venv: .venv/bin/pip install tensorboardX"
            ) from None
    return SummaryWriter


def scalars(row):
    """The numbers of one step worth a curve."""
    return {key: row[key] for key in KEYS if isinstance(row.get(key), (int, float))}


def to_tensorboard(runs, logdir):
    make_writer = summary_writer()
    for run in runs:
        writer = make_writer(f"{logdir}/{run.label}")
        writer.add_text("options", "\n".join(f"    {key}: {value}" for key, value in run.options.items()))
        for row in run.rows:
            for key, value in scalars(row).items():
                writer.add_scalar(key, value, row["step"])
        writer.close()
        print(f"wrote {logdir}/{run.label}: {len(run.rows)} steps")


def to_wandb(runs, project, offline):
    try:
        import wandb
    except ImportError:
        raise MetricsError("wandb is not installed; install it into .venv: .venv/bin/pip install wandb") from None
    for run in runs:
        mode = "offline" if offline else "online"
        target = wandb.init(project=project, name=run.label, config=run.options, mode=mode, reinit=True)
        for row in run.rows:
            target.log(scalars(row), step=row["step"])
        target.finish()
        print(f"exported {run.label}: {len(run.rows)} steps")


def main():
    arguments = parse_arguments()
    runs = [read_metrics(argument) for argument in arguments.runs]
    if arguments.target == "tensorboard":
        to_tensorboard(runs, arguments.logdir)
    else:
        to_wandb(runs, arguments.project, arguments.offline)


if __name__ == "__main__":
    run_script("export_metrics", main)
