"""make_gpt2_fixture.py: writes tests/fixtures/gpt2_reference.{safetensors,json}: a small GPT-2 by PyTorch, in float64.

Usage: .venv/bin/python tests/reference/make_gpt2_fixture.py. README.md beside this file describes both files. The
initial parameters are rounded to float32 first, so that the reference and what is compared with it start alike.
"""
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import GPT2Config, GPT2LMHeadModel

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
CONFIG = dict(vocab_size=67, n_positions=16, n_embd=24, n_layer=2, n_head=3)
ADAMW = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
STEPS, BATCH, SEQUENCE = 10, 3, 13


def make_model(dtype):
    """The model with random parameters of every kind, biases and LayerNorms included, from a fixed seed."""
    config = GPT2Config(
        **CONFIG, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_new",
        attn_implementation="eager", bos_token_id=0, eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    random = np.random.default_rng(1)
    for name, parameter in sorted(model.named_parameters()):
        values = random.standard_normal(tuple(parameter.shape)) * 0.15
        if name.endswith("weight") and ".ln_" in name:
            values += 1  # LayerNorm scales
        parameter.data = torch.from_numpy(values.astype(np.float32)).to(dtype)
    model.tie_weights()
    return model.to(dtype).train()


def parameters(model):
    """Names as in the published gpt2 files: without "transformer.", the tied head left out."""
    return {name.removeprefix("transformer."): p for name, p in model.named_parameters()}


def train(model, tokens):
    """Ten AdamW steps. Returns losses, the gradients of the first step and the logits of the first batch."""
    named = parameters(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in named.values() if p.dim() == 2], "weight_decay": ADAMW["weight_decay"]},
            {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=ADAMW["lr"], betas=ADAMW["betas"], eps=ADAMW["eps"],
    )
    losses, gradients, first_logits = [], {}, None
    for batch in torch.from_numpy(tokens):
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, CONFIG["vocab_size"]), batch[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        if not losses:
            gradients = {name: p.grad.clone() for name, p in named.items()}
            first_logits = logits.detach().clone()
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients, first_logits


def as_float32(tensor):
    return np.ascontiguousarray(tensor.detach().numpy().astype(np.float32))


def main():
    torch.set_num_threads(1)
    tokens = np.random.default_rng(2).integers(0, CONFIG["vocab_size"], (STEPS, BATCH, SEQUENCE + 1))
    model = make_model(torch.float64)
    tensors = {f"initial.{name}": as_float32(p) for name, p in parameters(model).items()}
    losses, gradients, logits = train(model, tokens)
    tensors |= {f"gradient.{name}": as_float32(g) for name, g in gradients.items()}
    tensors |= {f"final.{name}": as_float32(p) for name, p in parameters(model).items()}
    tensors["logits"] = as_float32(logits)
    FIXTURES.mkdir(exist_ok=True)
    save_file(tensors, str(FIXTURES / "gpt2_reference.safetensors"))
    description = {
        "config": {**CONFIG, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tied": True},
        "adamw": {"lr": ADAMW["lr"], "beta1": ADAMW["betas"][0], "beta2": ADAMW["betas"][1], "eps": ADAMW["eps"],
                  "weight_decay": ADAMW["weight_decay"], "decay_1d": False},
        "batch": BATCH,
        "sequence": SEQUENCE,
        "losses": losses,
        "tokens": tokens.tolist(),
    }
    (FIXTURES / "gpt2_reference.json").write_text(json.dumps(description, separators=(",", ":")) + "\n")

    # How far fp32 arithmetic alone strays from this reference: what a tolerance must allow.
    single = make_model(torch.float32)
    single_losses, single_gradients, single_logits = train(single, tokens)

    def error(a, b):
        return float((a.double() - b.double()).norm() / b.double().norm())

    print("losses", " ".join(f"{x:.4f}" for x in losses))
    loss_error = max(abs(a - b) for a, b in zip(single_losses, losses))
    print(f"fp32: losses {loss_error:.1e}, logits {error(single_logits, logits):.1e}")
    for what, a, b in (
        ("gradient", single_gradients, gradients),
        ("final", {k: p.detach() for k, p in parameters(single).items()}, parameters(model)),
    ):
        worst = sorted(((error(a[name], b[name].detach()), name) for name in b), reverse=True)[:3]
        print(f"fp32: {what}, worst: " + ", ".join(f"{name} {e:.1e}" for e, name in worst))
    for path in sorted(FIXTURES.iterdir()):
        print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
