"""plot_metrics.py: one or several metrics.jsonl files as a PNG: loss, validation loss and, below, the learning rate.

    .venv/bin/python scripts/plot_metrics.py out/metrics.jsonl -o loss.png
    .venv/bin/python scripts/plot_metrics.py flora=out/flora adamw=out/adamw -o compare.png --x tokens
"""
import argparse
import os

from metrics_file import MetricsError, read_metrics, run_script


def parse_arguments():
    parser = argparse.ArgumentParser(description="Plots metrics.jsonl files.")
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]PATH", help="a metrics.jsonl or the folder that holds one")
    parser.add_argument("-o", "--output", default="metrics.png", help="PNG to write, or .svg or .pdf (default: metrics.png)")
    parser.add_argument("--x", choices=("step", "tokens"), default="step", help="horizontal axis (default: step)")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="mean of N steps of loss (default: 1, none)")
    parser.add_argument("--title", default="", help="above the plot")
    return parser.parse_args()


def smoothed(values, width):
    """Mean over the last `width` values; fewer at the start."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / (i + 1 - max(0, i + 1 - width)) for i in range(len(values))]


def column(rows, x, y):
    """The points of the rows that have both."""
    points = [(row[x], row[y]) for row in rows if row.get(x) is not None and row.get(y) is not None]
    return [p[0] for p in points], [p[1] for p in points]


def draw(plt, runs, arguments):
    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, figsize=(9, 6.5), gridspec_kw={"height_ratios": [3, 1]}, layout="constrained"
    )
    for number, run in enumerate(runs):
        color = f"C{number % 10}"
        x, loss = column(run.rows, arguments.x, "loss")
        top.plot(x, smoothed(loss, max(1, arguments.smooth)), color=color, linewidth=1.2, label=run.label)
        x, loss = column(run.rows, arguments.x, "val_loss")
        if x:
            top.plot(x, loss, "o", color=color, markersize=5, markeredgecolor="white", label=f"{run.label}, validation")
        bottom.plot(*column(run.rows, arguments.x, "lr"), color=color, linewidth=1.2)
    top.set_ylabel("loss (nats per token)")
    top.set_title(arguments.title)
    top.legend(frameon=False)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("tokens" if arguments.x == "tokens" else "optimizer step")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(arguments.output, dpi=130, format=picture_format(arguments.output, figure))


def picture_format(path, figure):
    """By the suffix; PNG without one."""
    suffix = os.path.splitext(path)[1].lower()
    known = figure.canvas.get_supported_filetypes()
    if suffix[1:] not in known and suffix:
        raise MetricsError(f"{path}: no format for a picture is named '{suffix}'; use .png, .svg or .pdf", exit_code=2)
    return suffix[1:] or "png"


def main():
    arguments = parse_arguments()
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise MetricsError("matplotlib is not installed; scripts/setup.sh demo installs it into .venv") from None
    runs = [read_metrics(argument) for argument in arguments.runs]
    try:
        draw(plt, runs, arguments)
    except OSError as error:
        raise MetricsError(f"{arguments.output}: cannot be written ({error.strerror or error})") from None
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run_script("plot_metrics", main)
