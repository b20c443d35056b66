#!/usr/bin/env python3
"""bench_pytorch.py B T STEPS: tokens per second of an AdamW step of GPT-2 124M in PyTorch, fp32, on all cores.

The model is transformers' GPT2LMHeadModel without dropout. Prints one number; the first step is not counted.
"""
import sys
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def main():
    batch, length, steps = (int(argument) for argument in sys.argv[1:4])
    torch.manual_seed(1)
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    model = GPT2LMHeadModel(config)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    times = []
    for _ in range(steps + 1):
        tokens = torch.randint(0, config.vocab_size, (batch, length))
        start = time.perf_counter()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    print(batch * length / sorted(times[1:])[len(times[1:]) // 2])


if __name__ == "__main__":
    main()
