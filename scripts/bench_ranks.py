#!/usr/bin/env python3
"""bench_ranks.py: the step of GPT-2 124M (2 x 512 tokens, fp32) on 2 ranks of one thread, as a share of the speed of one
process with two threads, for each kind of gradient; what a rank sends, and what of it was hidden behind computing. Both
take turns, the first step of a run is not counted. Needs two cores and no Python package."""
import argparse
import json
import os
import re
import statistics
import subprocess
import tempfile

from bench_steps import write_shard

KINDS = {
    "dense, AdamW": ["--optimizer", "adamw", "--gradients", "dense"],
    "fused, Flora of rank 256": ["--rank", "256"],
    "compressed to rank 256": ["--rank", "256", "--gradients", "compressed"],
}


def run(folder, name, flags, steps):
    out = os.path.join(folder, name)
    command = ["./train_gpt2", "--device", "cpu", "--model", "d12", "--data", os.path.join(folder, "bench.bin"), "--seq-len",
               "512", "--tokens-per-step", "1024", "--steps", str(steps), "--eval-every", "0", "--checkpoint-every", "0",
               "--peak-tflops", "1", "--out", out, *flags]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with open(os.path.join(out, "metrics.jsonl")) as file:
        times = [json.loads(line)["step_ms"] for line in file.readlines()[2:]]  # after the header and the first step
    subprocess.run(["rm", "-rf", out], check=True)
    sent = re.search(r"each sent ([\d.]+) MB a step, (\d+) ms a step on the way, of which (\d+) ms", printed)
    return times, sent.groups() if sent else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[1].split(".")[0].strip())
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    a = parser.parse_args()
    print(f"{'gradients':26s} {'1 x 2 threads':>14s} {'2 x 1 thread':>14s} {'speed':>6s} {'MB sent':>8s} {'on the way':>11s} "
          f"{'hidden':>7s}")
    with tempfile.TemporaryDirectory() as folder:
        write_shard(os.path.join(folder, "bench.bin"))
        for kind, flags in KINDS.items():
            one, two = [], []
            for _ in range(a.rounds):
                one += run(folder, "one", [*flags, "--micro-batch", "2", "--threads", "2"], a.steps)[0]
                times, sent = run(folder, "two", [*flags, "--micro-batch", "1", "--threads", "1", "--devices", "2"], a.steps)
                two += times
            megabytes, busy, waited = (float(x) for x in sent)
            print(f"{kind:26s} {statistics.median(one):11.0f} ms {statistics.median(two):11.0f} ms "
                  f"{statistics.median(one) / statistics.median(two):6.2f} {megabytes:8.0f} {busy:8.0f} ms "
                  f"{100 * max(0.0, 1 - waited / busy):6.0f}%", flush=True)


if __name__ == "__main__":
    main()
