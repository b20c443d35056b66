#!/usr/bin/env python3
"""bench_pytorch_gpu.py: tokens per second of training GPT-2 in PyTorch, at its best: torch.compile, its fused attention
and fused AdamW, bf16; a peer for scripts/gpu_report.py.

    python3 scripts/bench_pytorch_gpu.py --layers 12 --channels 768 --heads 12 --micro-batch 16 --seq-len 1024 \\
        --tokens-per-step 16384,524288 --steps 10,2 --warmup 3,1

The model is GPT-2 without dropout, head tied, vocabulary padded to 128, as nanoGPT writes it. --precision bf16:
weights, gradients and AdamW's states are bf16 (what train_gpt2 does by default, without its stochastic rounding);
autocast: fp32 weights and states, matmuls and attention in bf16 (nanoGPT's way). A step is zeroed gradients,
micro-batches, clipping to norm 1, update. Prints one line of JSON for each number of tokens per step. Exit code 3: out
of memory. What a PyTorch lacks (torch.compile, fused attention before 2.0) is left out, and the line says so.
"""
import argparse
import contextlib
import json
import math
import statistics
import sys
import time
import traceback

import torch
import torch.nn as nn
import torch.nn.functional as F

from bench_pytorch import why

FUSED_ATTENTION = hasattr(F, "scaled_dot_product_attention")


class Block(nn.Module):
    def __init__(self, channels, heads, layers):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.projection = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        for linear in (self.qkv, self.projection, self.up, self.down):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        for linear in (self.projection, self.down):
            nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * layers))

    def attention(self, x):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in self.qkv(x).split(C, dim=2))
        if FUSED_ATTENTION:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(C // self.heads)
            future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            y = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        return self.projection(y.transpose(1, 2).reshape(B, T, C))

    def forward(self, x):
        x = x + self.attention(self.ln_1(x))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    def __init__(self, layers, channels, heads, positions, vocabulary):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, channels), nn.Embedding(positions, channels)
        self.blocks = nn.ModuleList(Block(channels, heads, layers) for _ in range(layers))
        self.ln_f = nn.LayerNorm(channels)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1))


def parse_arguments():
    parser = argparse.ArgumentParser(description="Tokens per second of training GPT-2 in PyTorch.")
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    for name in ("layers", "channels", "heads", "micro-batch", "seq-len"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--tokens-per-step", type=numbers, required=True, metavar="N[,N]")
    parser.add_argument("--steps", type=numbers, default=[10], metavar="N[,N]", help="counted, for each of these")
    parser.add_argument("--warmup", type=numbers, default=[3], metavar="N[,N]", help="not counted, before them")
    parser.add_argument("--precision", choices=("bf16", "autocast"), default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


class Stepper:
    """One training step, as users of PyTorch write it."""

    def __init__(self, arguments):
        self.cuda = arguments.device.startswith("cuda")
        self.device, self.shape = arguments.device, (arguments.micro_batch, arguments.seq_len)
        self.vocabulary = arguments.vocabulary
        padded = (arguments.vocabulary + 127) // 128 * 128
        torch.set_default_dtype(torch.float32)
        with torch.device(self.device) if hasattr(torch, "compile") else contextlib.nullcontext():
            model = Gpt2(arguments.layers, arguments.channels, arguments.heads, arguments.seq_len, padded)
        dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
        self.model = model.to(self.device, dtype)
        self.parameters = list(self.model.parameters())
        self.autocast = arguments.precision == "autocast"
        matrices = [p for p in self.parameters if p.dim() > 1]
        vectors = [p for p in self.parameters if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        fused = {"fused": True} if self.cuda else {}
        self.optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), eps=1e-8, **fused)
        host = torch.randint(0, self.vocabulary, (8, self.shape[0], self.shape[1] + 1))
        self.batches = host.pin_memory() if self.cuda else host
        self.position = 0
        self.forward, self.compiled, self.why_not_compiled = self.model, False, None
        if hasattr(torch, "compile") and not arguments.no_compile:
            self.compile()

    def compile(self):
        """Where PyTorch cannot compile, which the first step shows, steps stay eager."""
        try:
            self.forward = torch.compile(self.model)
            self.step(1)
            self.compiled = True
        except Exception as error:  # of many kinds
            if "out of memory" in str(error):
                raise
            self.forward, self.why_not_compiled = self.model, why(error)
            print(f"bench_pytorch_gpu: without torch.compile: {self.why_not_compiled}", file=sys.stderr)

    def batch(self):
        self.position = (self.position + 1) % len(self.batches)
        tokens = self.batches[self.position].to(self.device, non_blocking=True)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(self, micro_batches):
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(micro_batches):
            tokens, targets = self.batch()
            with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
                loss = self.forward(tokens, targets) / micro_batches
            loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.wait()
        return float(loss) * micro_batches

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()


def main():
    arguments = parse_arguments()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("bench_pytorch_gpu: PyTorch sees no GPU")
    torch.manual_seed(1)
    if hasattr(torch, "set_float32_matmul_precision"):
        torch.set_float32_matmul_precision("high")
    stepper = Stepper(arguments)
    if stepper.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # of steps, not of making the weights
    micro_tokens = arguments.micro_batch * arguments.seq_len
    for number, tokens in enumerate(arguments.tokens_per_step):
        if tokens % micro_tokens:
            sys.exit(f"bench_pytorch_gpu: {tokens} tokens per step are no multiple of {micro_tokens}")
        warmup = arguments.warmup[min(number, len(arguments.warmup) - 1)]
        times = []
        for _ in range(warmup + arguments.steps[min(number, len(arguments.steps) - 1)]):
            start = time.perf_counter()
            loss = stepper.step(tokens // micro_tokens)
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times[warmup:])
        print(json.dumps({
            "tokens_per_step": tokens, "micro_batch": arguments.micro_batch, "tokens_per_second": tokens / seconds,
            "step_seconds": seconds, "loss": loss, "precision": arguments.precision, "compiled": stepper.compiled,
            "why_not_compiled": stepper.why_not_compiled, "fused_attention": FUSED_ATTENTION,
            "torch": torch.__version__,
            "peak_bytes": torch.cuda.max_memory_allocated() if stepper.cuda else None,
            "parameters": sum(p.numel() for p in stepper.parameters),
        }), flush=True)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:  # of which torch.cuda.OutOfMemoryError is one
        if "out of memory" not in str(error):
            traceback.print_exc()
            sys.exit(f"bench_pytorch_gpu: {why(error)}")
        print("bench_pytorch_gpu: out of memory", file=sys.stderr)
        sys.exit(3)
