#!/usr/bin/env python3
"""bench_llmc.py: tokens per second of an AdamW step of GPT-2 124M in llm.c's train_gpt2.c on a CPU, fp32.

Takes a checkout of llm.c and compiles its program in a copy, with the flags of its Makefile and OpenMP; nothing but the sizes
of the batch is changed in it. Random weights and random tokens. Prints a line of JSON: tokens per second. The median of the
steps after the first counts.
"""
import argparse
import array
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

FLAGS = ["-Ofast", "-march=native", "-Wno-unused-result", "-Wno-ignored-pragmas", "-Wno-unknown-attributes", "-fopenmp", "-DOMP"]
POSITIONS, VOCABULARY, PADDED, LAYERS, HEADS, CHANNELS = 1024, 50257, 50304, 12, 12, 768
STEP = re.compile(r"^step \d+: train loss \S+ \(took ([\d.]+) ms\)")


def compiler():
    return os.environ.get("CC", "gcc")


def build(checkout, folder, batch, length):
    source_path = os.path.join(checkout, "train_gpt2.c")
    if not os.path.exists(source_path):
        sys.exit(f"bench_llmc: {checkout} is no checkout of llm.c: it has no train_gpt2.c")
    with open(source_path) as file:
        source = file.read()
    for before, after in (("int B = 4;", f"int B = {batch};"), ("int T = 64;", f"int T = {length};")):
        if source.count(before) != 1:
            sys.exit(f"bench_llmc: train_gpt2.c has changed: '{before}' is not in it once")
        source = source.replace(before, after)
    shutil.copytree(os.path.join(checkout, "llmc"), os.path.join(folder, "llmc"))
    with open(os.path.join(folder, "train_gpt2.c"), "w") as file:
        file.write(source)
    subprocess.run([compiler(), *FLAGS, "train_gpt2.c", "-lm", "-o", "train_gpt2"], cwd=folder, check=True)


def write_header(file, *words):
    array.array("i", [*words, *[0] * (256 - len(words))]).tofile(file)


def write_inputs(folder):
    """gpt2_124M.bin and the tokens, where llm.c looks for them."""
    numbers = random.Random(7)
    parameters = (PADDED + POSITIONS) * CHANNELS + LAYERS * (12 * CHANNELS + 13) * CHANNELS + 2 * CHANNELS
    block = array.array("f", (numbers.gauss(0, 0.02) for _ in range(1 << 18)))
    with open(os.path.join(folder, "gpt2_124M.bin"), "wb") as file:
        write_header(file, 20240326, 3, POSITIONS, VOCABULARY, LAYERS, HEADS, CHANNELS, PADDED)
        for begin in range(0, parameters, len(block)):
            block[:parameters - begin].tofile(file)
    data = os.path.join(folder, "dev", "data", "tinyshakespeare")
    os.makedirs(data)
    tokens = array.array("H", (numbers.randrange(VOCABULARY) for _ in range(100_000)))
    for name in ("train", "val"):
        with open(os.path.join(data, f"tiny_shakespeare_{name}.bin"), "wb") as file:
            write_header(file, 20240520, 1, len(tokens))
            tokens.tofile(file)


def step_seconds(folder, threads, steps):
    """Of the first `steps` steps; then the program, which would go on, is ended."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    seconds = []
    with subprocess.Popen(["stdbuf", "-oL", "./train_gpt2"], cwd=folder, env=environment, stdout=subprocess.PIPE,
                          errors="replace", text=True) as process:
        for line in process.stdout:
            if match := STEP.match(line):
                seconds.append(float(match.group(1)) / 1e3)
            if len(seconds) == steps:
                break
        process.kill()
    if len(seconds) < steps:
        sys.exit(f"bench_llmc: llm.c ended after {len(seconds)} steps")
    return seconds


def main():
    parser = argparse.ArgumentParser(description="Tokens per second of llm.c's train_gpt2.c on a CPU.")
    parser.add_argument("checkout", help="a checkout of llm.c")
    parser.add_argument("batch", type=int)
    parser.add_argument("length", type=int)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--steps", type=int, default=6, help="2 to 41 steps, the first not counted (default: 6)")
    arguments = parser.parse_args()
    if not 2 <= arguments.steps <= 41:
        parser.error("--steps takes 2 to 41: llm.c ends after 41")
    missing = [tool for tool in (compiler(), "stdbuf") if not shutil.which(tool)]
    if missing:
        sys.exit(f"bench_llmc: {missing[0]} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        build(arguments.checkout, folder, arguments.batch, arguments.length)
        write_inputs(folder)
        seconds = statistics.median(step_seconds(folder, arguments.threads, arguments.steps)[1:])
    print(json.dumps({"tokens_per_second": arguments.batch * arguments.length / seconds}))


if __name__ == "__main__":
    main()
