#!/usr/bin/env python3
"""rank_efficiency.py: what several GPUs should reach, on paper, from bytes and FLOPs.

    scripts/rank_efficiency.py [--ranks 8] [--tokens 16384] [--micro-batches 1] [--tflops 400] [--rank 256]

Prints, for each model, kind of gradients and link, the share of a step that is computing: 1 is R times the speed of one
GPU. A ring sends 2 (R - 1) / R of the bytes of a sum. The gradients of the blocks travel beside the backward pass of the
last micro-batch; what takes longer than it, and the embedding's, which is complete at its end, is waited for. Latency,
memory traffic and the update are left out."""
import argparse

# name: layers, channels, vocabulary, positions, sequence length
MODELS = {"124M": (12, 768, 50257, 1024), "1.5B": (48, 1600, 50257, 1024), "6.7B": (32, 4096, 50257, 2048)}
LINKS = {"NVLink, 450 GB/s": 450e9, "PCIe 4, 25 GB/s": 25e9, "100 Gb/s": 12.5e9}  # bytes a second, one direction
LARGEST_RATIO = 4  # flora/projection.cpp, is_compressed(): flatter matrices travel whole


def gradient_bytes(model, kind, rank):
    """Bytes that are summed a step, bf16 gradients: of the blocks, and of what is complete at the end only."""
    layers, width, vocabulary, positions = MODELS[model]
    matrices = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    blocks = 2 * layers * 13 * width
    for rows, cols in matrices:
        if kind == "compressed" and rank < min(rows, cols):
            blocks += layers * 4 * rank * (max(rows, cols))
        else:
            blocks += layers * 2 * rows * cols
    end = 2 * 2 * width + 4 * vocabulary * width
    compressed = kind == "compressed" and positions <= LARGEST_RATIO * width and width <= LARGEST_RATIO * positions
    end += 4 * rank * max(positions, width) if compressed and rank < min(positions, width) else 2 * positions * width
    return blocks, end


def efficiency(model, kind, link, a):
    layers, width, vocabulary, positions = MODELS[model]
    parameters = 12 * layers * width**2 + vocabulary * width
    forward = a.tokens * (2 * parameters + 2 * layers * width * positions) / (a.tflops * 1e12)
    blocks, end = (2 * (a.ranks - 1) / a.ranks * b / LINKS[link] for b in gradient_bytes(model, kind, a.rank))
    computing = a.micro_batches * 3 * forward
    # The last gradient to be complete has no backward pass left to hide behind.
    waiting = max(0.0, blocks - 2 * forward * (1 - 1 / layers)) + end
    return computing / (computing + waiting)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16384, help="of a micro-batch of one rank")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step, of one rank")
    parser.add_argument("--tflops", type=float, default=400, help="that one GPU reaches")
    parser.add_argument("--rank", type=int, default=256, help="of compressed gradients")
    a = parser.parse_args()
    print(f"{a.ranks} GPUs at {a.tflops:g} TFLOP/s, {a.micro_batches} x {a.tokens} tokens each a step:\n")
    print("| model | gradients | GB summed a step | " + " | ".join(LINKS) + " |")
    print("| --- | --- | --- |" + " --- |" * len(LINKS))
    for model in MODELS:
        for kind in ("dense, fused", "compressed"):
            total = sum(gradient_bytes(model, kind, a.rank)) / 1e9
            cells = " | ".join(f"{efficiency(model, kind, link, a):.2f}" for link in LINKS)
            print(f"| {model} | {kind} | {total:.2f} | {cells} |")


if __name__ == "__main__":
    main()
