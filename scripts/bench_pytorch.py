#!/usr/bin/env python3
"""bench_pytorch.py: tokens per second of an AdamW step of GPT-2 124M in PyTorch of today on a CPU, the best of its ways.

The model is transformers' GPT2LMHeadModel without dropout. In fp32: eager and torch.compile. In bf16: autocast over fp32
weights, and bf16 weights, each eager and compiled. Prints a line of JSON: tokens per second by way, and the versions. A way
that fails is left out, and said on stderr. The median of the steps after the first two counts.

Without --python it makes a virtual environment for itself in build/pytorch (torch, transformers and numpy from PyPI: several
GB), once.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OWN = os.path.join(ROOT, "build", "pytorch")
WAYS = {"fp32": ["eager", "compiled"],
        "bf16": ["autocast eager", "autocast compiled", "weights eager", "weights compiled"]}


def own_python():
    """The Python of build/pytorch, which is made where it is missing."""
    python = os.path.join(OWN, "bin", "python")
    if not os.path.exists(os.path.join(OWN, ".installed")):
        print(f"bench_pytorch: installing PyTorch of today into {os.path.relpath(OWN)} (several GB)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", OWN], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "torch", "transformers", "numpy"], check=True)
        open(os.path.join(OWN, ".installed"), "w").close()
    return python


def rate(way, dtype, batch, length, steps):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
    model.train()
    if "weights" in way:
        model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    forward = torch.compile(model) if "compiled" in way else model
    times = []
    for _ in range(steps + 2):
        tokens = torch.randint(0, model.config.vocab_size, (batch, length))
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled="autocast" in way):
            loss = forward(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    return batch * length / sorted(times[2:])[steps // 2]


def why(error):
    """What went wrong, in a line: what torch.compile's own exceptions wrap, and of a compiler's output the error."""
    error = getattr(error, "inner_exception", error)
    text = f"{type(error).__name__}: {error}"
    compiler = re.search(r"^\S+: (?:fatal )?error: (.*)", text, re.M)
    return (compiler[1] if compiler else text.splitlines()[0])[:200]


def measure(arguments):
    import torch
    import transformers

    torch.set_num_threads(arguments.threads)
    rates = {}
    for way in WAYS[arguments.dtype]:
        if arguments.eager and "compiled" in way:
            continue
        try:
            rates[way] = rate(way, arguments.dtype, arguments.batch, arguments.length, arguments.steps)
        except Exception as error:  # what PyTorch raises where it cannot compile is of many kinds
            print(f"bench_pytorch: {arguments.dtype} {way}: {why(error)}", file=sys.stderr)
    print(json.dumps({"rates": rates, "torch": torch.__version__, "transformers": transformers.__version__}))


def main():
    parser = argparse.ArgumentParser(description="Tokens per second of GPT-2 124M in PyTorch on a CPU.")
    parser.add_argument("batch", type=int, help="sequences of a step")
    parser.add_argument("length", type=int, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=4, help="steps that count (default: 4)")
    parser.add_argument("--dtype", choices=WAYS, default="fp32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--eager", action="store_true", help="without torch.compile, which takes minutes to begin")
    parser.add_argument("--python", help="a Python that has torch and transformers; default: one of its own, built once")
    arguments = parser.parse_args()
    if os.environ.get("BENCH_PYTORCH_INSIDE"):
        measure(arguments)
        return
    command = [arguments.python or own_python(), os.path.abspath(__file__), *sys.argv[1:]]
    sys.exit(subprocess.run(command, env={**os.environ, "BENCH_PYTORCH_INSIDE": "1"}).returncode)


if __name__ == "__main__":
    main()
