#!/usr/bin/env python3
"""bench_steps.py: training steps of GPT-2 124M in fp32 as ratios of what this machine can do, and of PyTorch where it is.

For every configuration: tokens/s, model FLOPs per second (6 N + 6 L C T per token) as a share of the largest sgemm rate
measured by the same process, and the time of a step relative to AdamW's. Random tokens; the first steps are not counted.
Runs take turns so that a slow minute of the machine meets all of them. Needs no Python package (PyTorch is optional).
"""
import argparse
import array
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile

CONFIGURATIONS = [
    # name, B, T, flags
    ("adamw 4x64", 4, 64, ["--optimizer", "adamw"]),
    ("adamw 2x512", 2, 512, ["--optimizer", "adamw"]),
    ("flora r64 fused 2x512", 2, 512, ["--optimizer", "flora", "--rank", "64", "--gradients", "fused"]),
    ("flora r256 fused 2x512", 2, 512, ["--optimizer", "flora", "--rank", "256", "--gradients", "fused"]),
]


def write_shard(path, tokens=200_000, vocabulary=50257):
    numbers = random.Random(7)
    header = array.array("i", [20240520, 1, tokens, vocabulary] + [0] * 252)
    with open(path, "wb") as file:
        header.tofile(file)
        array.array("H", (numbers.randrange(vocabulary) for _ in range(tokens))).tofile(file)


def run_steps(folder, number, batch, length, flags, steps, profile):
    out = os.path.join(folder, f"run{number}")
    command = ["./train_gpt2", "--model", "d12", "--dtype", "fp32", "--data", os.path.join(folder, "bench.bin"),
               "--micro-batch", str(batch), "--seq-len", str(length), "--steps", str(steps), "--eval-every", "0",
               "--checkpoint-every", "0", "--keep-checkpoints", "1", "--log-every", "1000", "--out", out, *flags]
    if profile:
        command.append("--profile")
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        sys.exit(f"bench_steps: {' '.join(command)} failed: {finished.stderr.strip()}")
    with open(os.path.join(out, "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    subprocess.run(["rm", "-rf", out], check=True)
    measured = lines[2:]  # the header and the first step, which touches memory for the first time
    table = finished.stdout[finished.stdout.find("operation"):] if profile else ""
    return {
        "seconds": statistics.median(row["step_ms"] for row in measured) / 1e3,
        "mfu": statistics.median(row["mfu"] for row in measured),
        "peak": lines[0]["peak_flops"],
        "profile": table,
    }


def pytorch_rate(python, batch, length, steps):
    """Tokens per second of the same step in PyTorch, or None where it cannot be imported."""
    finished = subprocess.run([python, "scripts/bench_pytorch.py", str(batch), str(length), str(steps)],
                              capture_output=True, text=True)
    return float(finished.stdout.split()[-1]) if finished.returncode == 0 else None


def main():
    parser = argparse.ArgumentParser(description="Training steps of GPT-2 124M, as ratios.")
    parser.add_argument("--steps", type=int, default=6, help="steps of a run, the first not counted (default: 6)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each configuration (default: 2)")
    parser.add_argument("--python", default=".venv/bin/python", help="Python that has PyTorch")
    parser.add_argument("--profile", action="store_true", help="print the profile of each configuration")
    arguments = parser.parse_args()
    best = {}
    with tempfile.TemporaryDirectory() as folder:
        write_shard(os.path.join(folder, "bench.bin"))
        for _ in range(arguments.rounds):
            for number, (name, batch, length, flags) in enumerate(CONFIGURATIONS):
                result = run_steps(folder, number, batch, length, flags, arguments.steps, arguments.profile)
                if name not in best or result["seconds"] < best[name]["seconds"]:
                    best[name] = result
    print(f"{'configuration':24s} {'tokens/s':>9s} {'s/step':>8s} {'sgemm GFLOP/s':>14s} {'MFU':>7s} {'/ adamw':>8s}"
          f" {'/ PyTorch':>10s}")
    pytorch = {}
    for name, batch, length, _ in CONFIGURATIONS:
        if (batch, length) not in pytorch:
            pytorch[batch, length] = pytorch_rate(arguments.python, batch, length, 4)
        result = best[name]
        rate = batch * length / result["seconds"]
        relative = result["seconds"] / best["adamw 4x64" if length == 64 else "adamw 2x512"]["seconds"]
        peer = f"{rate / pytorch[batch, length]:10.2f}" if pytorch[batch, length] else "         -"
        print(f"{name:24s} {rate:9.1f} {result['seconds']:8.3f} {result['peak'] / 1e9:14.0f} {result['mfu']:7.1%}"
              f" {relative:8.3f} {peer}")
    if arguments.profile:
        for name, result in best.items():
            print(f"\n{name}\n{result['profile']}")


if __name__ == "__main__":
    main()
