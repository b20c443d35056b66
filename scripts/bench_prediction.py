#!/usr/bin/env python3
"""bench_prediction.py: what --memory-budget predicts for a step, beside what the step then takes.

    .venv/bin/python scripts/bench_prediction.py [--steps N] [-- flags of ./train_gpt2 for every run]

Runs a small model at several settings, each after measuring the device's rates, and prints a table:
predicted, median and fastest step in ms, and the difference to the median.
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent.parent / "train_gpt2"

WHOLE = ["--micro-batch", "4", "--head-chunk", "512", "--gradient-blocks", "whole", "--offload", "none"]
NONE = [*WHOLE, "--recompute", "none"]
ONE = ["--micro-batch", "1", "--head-chunk", "256", "--gradient-blocks", "whole", "--offload", "none", "--recompute",
       "none"]
SETTINGS = {
    "recompute none": NONE,
    "recompute attention": [*WHOLE, "--recompute", "attention"],
    "recompute block": [*WHOLE, "--recompute", "block"],
    "1 x 256": ONE,
    "gradient blocks all": [*NONE, "--gradient-blocks", "all"],
    "offload activations,weights": [*NONE, "--offload", "activations,weights"],
    "8-bit weights and states": [*NONE, "--weight-dtype", "int8", "--state-dtype", "int8"],
    "AdamW, dense": [*NONE, "--optimizer", "adamw"],
    "bf16": [*NONE, "--dtype", "bf16"],
    "4 micro-batches of 1 x 256": [*ONE, "--tokens-per-step", "1024"],
    "8 x 128": [*NONE, "--micro-batch", "8", "--seq-len", "128"],
}


def measure(flags, steps, folder):
    """(predicted, [step, ...]) in ms."""
    out = Path(folder) / "run"
    command = [PROGRAM, "--model", "small", "--steps", steps, "--eval-every", 0, "--checkpoint-every", 0, "--peak-tflops",
               0.25, "--memory-budget", "8GiB", "--out", out, *flags]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr.strip())
    predicted = float(re.search(r"^chosen .* predicted ([0-9.e+-]+) ms", result.stdout, re.M)[1])
    lines = (out / "metrics.jsonl").read_text().splitlines()[1:]
    return predicted, [json.loads(line)["step_ms"] for line in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("flags", nargs="*", help="for every run, after --")
    arguments = parser.parse_args()
    print("| setting | predicted, ms | median, ms | best, ms | difference to the median |\n| --- | --- | --- | --- | --- |")
    for name, flags in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            predicted, steps = measure([*flags, *arguments.flags], arguments.steps, folder)
        median = statistics.median(steps)
        print(f"| {name} | {predicted:.0f} | {median:.0f} | {min(steps):.0f} | {predicted / median - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
