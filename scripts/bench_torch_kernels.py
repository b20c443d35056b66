#!/usr/bin/env python3
"""bench_torch_kernels.py: PyTorch's kernels for the operations of bench/kernels.cpp, under the same names and shapes.

One JSON object a line: first {"device", "torch", "copy_gb_per_second", "matmul_tflops"}, then for each operation
{"operation", "model", "shape", "milliseconds", "gigabytes", "tflop", "percent", "bound"}, as build/bench/kernels writes
them; bytes and FLOPs are those that PyTorch's own dtypes need. Inputs are random and taken from several sets in turn, so
that none is in the L2 cache; on a GPU a CUDA graph of many calls is replayed between two events (plain calls where
PyTorch cannot record an operation), and the median counts. What this PyTorch lacks is skipped and named on stderr.
Needs nothing but PyTorch.

    python3 scripts/bench_torch_kernels.py --json torch.jsonl
    python3 scripts/bench_torch_kernels.py --toy --device cpu
"""
import argparse
import contextlib
import json
import statistics
import sys
import time

try:
    import torch
except ImportError as error:
    sys.exit(f"bench_torch_kernels: PyTorch is needed: {error}")

from torch_kernel_cases import FP32, MODELS, Cases, Inputs, size

MEASUREMENT_SECONDS = 20e-3
MOST_SETS, MOST_CALLS_IN_GRAPH = 128, 256


class Timer:
    """Seconds of work on a device: CUDA events on a GPU, the clock elsewhere."""

    def __init__(self, device):
        self.device = device
        if device == "cuda":
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def seconds(self, work):
        if self.device != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        torch.cuda.synchronize()
        self.events[0].record()
        work()
        self.events[1].record()
        torch.cuda.synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1e3


def measure(case, arguments, timer):
    """Seconds of one call, its bytes and its FLOPs."""
    sets, calls = [], []

    def add_set():
        sets.append(Inputs(arguments.device))
        calls.append(case.prepare(sets[-1]))

    add_set()
    each = max(1, size(sets[0].tensors))
    for _ in range(max(2, min(MOST_SETS, -(-(arguments.working_set_mb << 20) // each))) - 1):
        add_set()
    kept = [None] * len(calls)

    def once():
        for i, call in enumerate(calls):
            kept[i] = call.run()

    once()
    estimate = timer.seconds(once)
    target = min(MEASUREMENT_SECONDS, arguments.seconds_per_operation)
    rounds = max(1, min(10_000, int(target / max(estimate, 1e-7))))
    work, repeats = once, rounds
    if arguments.device == "cuda":
        recorded = min(rounds, max(1, MOST_CALLS_IN_GRAPH // len(calls)))
        try:
            graph = torch.cuda.CUDAGraph()
            # Results live until their set's next turn, so that they do not all land in the same, cached memory.
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                for _ in range(recorded):
                    once()
            work, repeats = graph.replay, -(-rounds // recorded)
            rounds = recorded * repeats
        except Exception as error:
            torch.cuda.synchronize()
            print(f"bench_torch_kernels: not recorded as a graph: {' '.join(case[:3])}: {first_line(error)}",
                  file=sys.stderr)

    def batch():
        for _ in range(repeats):
            work()

    batch()
    times = []
    while len(times) < 3 or (sum(times) < arguments.seconds_per_operation and len(times) < 100):
        times.append(timer.seconds(batch))
    return statistics.median(times) / (rounds * len(calls)), size(calls[0].tensors), calls[0].flops


def first_line(error):
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def measure_peaks(arguments, timer):
    """Bytes read and written per second by a large copy, FLOP/s of a large bf16 matmul."""
    def best(work, count):
        work()
        return statistics.median(timer.seconds(work) for _ in range(count))

    inputs = Inputs(arguments.device)
    large = arguments.device == "cuda"
    n = (1 << 30 if large else 1 << 23) // 4
    x, y = inputs.normal(n, dtype=FP32), inputs.normal(n, dtype=FP32)
    copy = 2 * size([x]) / best(lambda: y.copy_(x), 7)
    side = 8192 if large else 256
    a, b, out = (inputs.normal(side, side) for _ in range(3))
    return copy, 2 * side**3 / best(lambda: torch.mm(a, b, out=out), 7)


def arguments_of(argv):
    parser = argparse.ArgumentParser(description="PyTorch's kernels at the shapes of build/bench/kernels.")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--models", default="124M,1558M", help="of 124M, 1558M and toy (default: 124M,1558M)")
    parser.add_argument("--toy", action="store_true", help="the same as --models toy --working-set-mb 0")
    parser.add_argument("--filter", default="", help='only operations with this text in "MODEL OPERATION SHAPE"')
    parser.add_argument("--seconds-per-operation", type=float, default=0.2)
    parser.add_argument("--time-limit", type=float, default=0, help="seconds after which no operation is started; 0: none")
    parser.add_argument("--working-set-mb", type=int, default=256, help="size of all sets of inputs together")
    parser.add_argument("--json", default="", help="write the JSON lines to this file instead of stdout")
    arguments = parser.parse_args(argv)
    if arguments.toy:
        arguments.models, arguments.working_set_mb = "toy", 0
    if unknown := [name for name in arguments.models.split(",") if name not in MODELS]:
        parser.error(f"no model {unknown[0]!r}; there are {', '.join(MODELS)}")
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU")
    return arguments


def main(argv=None):
    began = time.monotonic()
    arguments = arguments_of(argv)
    torch.manual_seed(1)
    cases = [case for name in arguments.models.split(",") for case in Cases(MODELS[name]).all()
             if arguments.filter in f"{case.model} {case.operation} {case.shape}"]
    if not cases:
        sys.exit(f"bench_torch_kernels: no operation has {arguments.filter!r} in its name")
    timer = Timer(arguments.device)
    with contextlib.ExitStack() as stack:
        if arguments.device == "cuda":  # graphs are recorded on a stream that is not the default one, all runs on it
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
        file = stack.enter_context(open(arguments.json, "w")) if arguments.json else sys.stdout

        def write(line):
            print(json.dumps(line), file=file, flush=True)

        copy, matmul = measure_peaks(arguments, timer)
        device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
        write({"device": device, "torch": torch.__version__, "copy_gb_per_second": copy / 1e9,
               "matmul_tflops": matmul / 1e12})
        print(f"{device}, PyTorch {torch.__version__}: copies {copy / 1e9:.4g} GB/s, bf16 matmul {matmul / 1e12:.4g}"
              " TFLOP/s", file=sys.stderr)
        for case in cases:
            name = f"{case.model} {case.operation} {case.shape}"
            if arguments.time_limit and time.monotonic() - began > arguments.time_limit:
                print(f"bench_torch_kernels: skipped by the time limit: {name}", file=sys.stderr)
                continue
            try:
                if arguments.device == "cuda":
                    torch.cuda.empty_cache()
                seconds, moved, flops = measure(case, arguments, timer)
            except Exception as error:  # whatever this version of PyTorch has against it, the others go on
                print(f"bench_torch_kernels: skipped: {name}: {first_line(error)}", file=sys.stderr)
                continue
            memory, compute = moved / copy, flops / matmul
            percent = 100 * max(memory, compute) / seconds
            write({"operation": case.operation, "model": case.model, "shape": case.shape,
                   "milliseconds": seconds * 1e3, "gigabytes": moved / 1e9, "tflop": flops / 1e12, "percent": percent,
                   "bound": "memory" if memory >= compute else "compute"})
            print(f"{case.model:6s} {case.operation:40s} {case.shape:32s} {seconds * 1e3:10.4f} ms {percent:6.1f}%",
                  file=sys.stderr)


if __name__ == "__main__":
    main()
