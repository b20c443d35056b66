#!/usr/bin/env python3
"""bench_steps.py: training steps of GPT-2 124M on a CPU as ratios of what this machine can do, and of PyTorch of today.

For every configuration, in fp32 and in bf16: tokens/s, model FLOPs per second (6 N + 6 L C T per token) as a share of the
largest rate of products measured by the same process, the time of a step relative to AdamW's of the same dtype and to that of
the same configuration in fp32, and tokens/s relative to PyTorch's best way of the same dtype (scripts/bench_pytorch.py,
which installs PyTorch for itself: several GB; --pytorch none leaves it out), and with --llmc tokens/s of AdamW in fp32 relative
to llm.c (scripts/bench_llmc.py). Random tokens; the first steps are not counted.
Runs, those of llm.c among them, take turns so that a slow minute of the machine meets all of them; PyTorch comes at the end.
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
    ("flora r256 fused 4x64", 4, 64, ["--optimizer", "flora", "--rank", "256", "--gradients", "fused"]),
    ("flora r64 fused 2x512", 2, 512, ["--optimizer", "flora", "--rank", "64", "--gradients", "fused"]),
    ("flora r256 fused 2x512", 2, 512, ["--optimizer", "flora", "--rank", "256", "--gradients", "fused"]),
]

DTYPES = ["fp32", "bf16"]


def write_shard(path, tokens=200_000, vocabulary=50257):
    numbers = random.Random(7)
    header = array.array("i", [20240520, 1, tokens, vocabulary] + [0] * 252)
    with open(path, "wb") as file:
        header.tofile(file)
        array.array("H", (numbers.randrange(vocabulary) for _ in range(tokens))).tofile(file)


def run_steps(folder, dtype, batch, length, flags, steps, threads, profile):
    out = os.path.join(folder, "run")
    command = ["./train_gpt2", "--device", "cpu", "--threads", str(threads), "--model", "d12", "--dtype", dtype,
               "--data", os.path.join(folder, "bench.bin"),
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
        "device": next(line for line in finished.stdout.splitlines() if line.startswith("device")),
    }


def pytorch_rates(python, dtype, batch, length, threads, compiled):
    """Tokens per second of the same step in PyTorch by way, and its version; ({}, "") where it cannot be had."""
    command = [sys.executable, "scripts/bench_pytorch.py", str(batch), str(length), "--dtype", dtype, "--threads", str(threads),
               *(["--python", python] if python else []), *([] if compiled else ["--eager"])]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode != 0:
        return {}, ""
    answer = json.loads(finished.stdout.splitlines()[-1])
    return answer["rates"], answer["torch"]


def llmc_rate(checkout, batch, length, threads, steps):
    """Tokens per second of the same step in llm.c."""
    command = [sys.executable, "scripts/bench_llmc.py", checkout, str(batch), str(length), "--threads", str(threads), "--steps",
               str(steps)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode != 0:
        sys.exit(finished.returncode)
    return json.loads(finished.stdout)["tokens_per_second"]


def main():
    parser = argparse.ArgumentParser(description="Training steps of GPT-2 124M, as ratios.")
    parser.add_argument("--steps", type=int, default=6, help="steps of a run, the first not counted (default: 6)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each configuration (default: 2)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pytorch", default="", help="a Python that has torch and transformers (default: one of "
                        "build/pytorch, which is installed), or none")
    parser.add_argument("--compile", action="store_true", help="PyTorch's torch.compile, too: minutes more")
    parser.add_argument("--llmc", default="", metavar="PATH", help="a checkout of llm.c to measure beside")
    parser.add_argument("--filter", default="", help="only configurations whose names hold this text, and AdamW's")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="fp32, bf16 or both (default)")
    parser.add_argument("--profile", action="store_true", help="print the profile of each configuration")
    arguments = parser.parse_args()
    dtypes = arguments.dtypes.split(",")
    if not set(dtypes) <= set(DTYPES):
        parser.error(f"--dtypes takes {' and '.join(DTYPES)}")
    if arguments.llmc and not os.path.exists(os.path.join(arguments.llmc, "train_gpt2.c")):
        parser.error(f"--llmc: {arguments.llmc} is no checkout of llm.c: it has no train_gpt2.c")
    lengths = {row[2] for row in CONFIGURATIONS if arguments.filter in row[0]}
    configurations = [row for row in CONFIGURATIONS
                      if arguments.filter in row[0] or (row[0].startswith("adamw") and row[2] in lengths)]
    if not configurations:
        parser.error("--filter matches none of: " + ", ".join(row[0] for row in CONFIGURATIONS))
    best, llmc, pytorch, version = {}, {}, {}, ""
    with tempfile.TemporaryDirectory() as folder:
        write_shard(os.path.join(folder, "bench.bin"))
        for _ in range(arguments.rounds):
            for name, batch, length, flags in configurations:
                for dtype in dtypes:
                    result = run_steps(folder, dtype, batch, length, flags, arguments.steps, arguments.threads,
                                       arguments.profile)
                    if (name, dtype) not in best or result["seconds"] < best[name, dtype]["seconds"]:
                        best[name, dtype] = result
                if arguments.llmc and "fp32" in dtypes and flags == ["--optimizer", "adamw"]:
                    rate = llmc_rate(arguments.llmc, batch, length, arguments.threads, arguments.steps)
                    llmc[name] = max(llmc.get(name, 0), rate)
    for _, batch, length, _ in configurations:
        for dtype in dtypes:
            if arguments.pytorch != "none" and (batch, length, dtype) not in pytorch:
                rates, found = pytorch_rates(arguments.pytorch, dtype, batch, length, arguments.threads, arguments.compile)
                pytorch[batch, length, dtype], version = rates, found or version
    print(f"{next(iter(best.values()))['device']}\nPyTorch {version or 'not measured'}")
    print(f"{'configuration':23s} {'dtype':5s} {'tokens/s':>8s} {'s/step':>7s} {'GFLOP/s':>8s} {'MFU':>6s} {'/ adamw':>8s} "
          f"{'/ ' + dtypes[0]:>7s} {'/ PyTorch':>9s}  PyTorch's best, tokens/s")
    for (name, dtype), result in best.items():
        batch, length = next(row[1:3] for row in CONFIGURATIONS if row[0] == name)
        rate = batch * length / result["seconds"]
        adamw = best["adamw 4x64" if length == 64 else "adamw 2x512", dtype]["seconds"]
        rates = pytorch.get((batch, length, dtype))
        way = max(rates, key=rates.get) if rates else ""
        print(f"{name:23s} {dtype:5s} {rate:8.1f} {result['seconds']:7.3f} {result['peak'] / 1e9:8.0f} {result['mfu']:6.1%} "
              f"{result['seconds'] / adamw:8.3f} {best[name, dtypes[0]]['seconds'] / result['seconds']:7.2f} "
              + (f"{rate / rates[way]:9.2f}  {way} {rates[way]:.1f}" if rates else f"{'-':>9s}"))
    for name, rate in llmc.items():
        batch, length = next(row[1:3] for row in CONFIGURATIONS if row[0] == name)
        ours = batch * length / best[name, "fp32"]["seconds"]
        print(f"llm.c, {name}, fp32: {rate:.1f} tokens/s; this trainer / llm.c: {ours / rate:.2f}")
    if arguments.profile:
        for (name, dtype), result in best.items():
            print(f"\n{name}, {dtype}\n{result['profile']}")


if __name__ == "__main__":
    main()
