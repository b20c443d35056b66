"""gpt2.py: GPT-2's forward pass in numpy and float64, from the published formulas: learned positions, LayerNorm before
each branch (eps 1e-5), GELU with tanh, the embedding as head.
"""
import numpy as np


def make_weights(random, vocabulary, positions, channels, layers, scale):
    """Random parameters of every kind with the names of published GPT-2 files, in float32."""
    shapes = {"wte.weight": (vocabulary, channels), "wpe.weight": (positions, channels)}
    for layer in range(layers):
        for name, columns in (("attn.c_attn", 3), ("attn.c_proj", 1), ("mlp.c_fc", 4)):
            shapes[f"h.{layer}.{name}.weight"] = (channels, columns * channels)
            shapes[f"h.{layer}.{name}.bias"] = (columns * channels,)
        shapes[f"h.{layer}.mlp.c_proj.weight"] = (4 * channels, channels)
        shapes[f"h.{layer}.mlp.c_proj.bias"] = (channels,)
    norms = [f"h.{layer}.ln_{i}" for layer in range(layers) for i in (1, 2)] + ["ln_f"]
    shapes.update({f"{norm}.{kind}": (channels,) for norm in norms for kind in ("weight", "bias")})
    weights = {name: scale * random.standard_normal(shape) for name, shape in shapes.items()}
    for norm in norms:
        weights[f"{norm}.weight"] += 1
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def logits(weights, heads, tokens):
    """[T, V] of a sequence of T tokens. weights: arrays by the names of published GPT-2 files."""
    w = {name: np.asarray(weight, np.float64) for name, weight in weights.items()}
    length = len(tokens)

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    def attention(x, block):
        q, k, v = (part.reshape(length, heads, -1).swapaxes(0, 1)
                   for part in np.split(linear(x, block + "attn.c_attn"), 3, -1))
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        scores[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
        mixed = np.exp(log_softmax(scores)) @ v
        return linear(mixed.swapaxes(0, 1).reshape(length, -1), block + "attn.c_proj")

    def mlp(x, block):
        x = linear(x, block + "mlp.c_fc")
        return linear(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), block + "mlp.c_proj")

    x = w["wte.weight"][tokens] + w["wpe.weight"][:length]
    for layer in range(sum(name.endswith("ln_1.weight") for name in w)):
        block = f"h.{layer}."
        x = x + attention(norm(x, block + "ln_1"), block)
        x = x + mlp(norm(x, block + "ln_2"), block)
    return norm(x, "ln_f") @ w["wte.weight"].T


def ending_losses(weights, heads, context, ending):
    """-ln of the probability of each token of the ending after the context and the tokens before it."""
    rows = log_softmax(logits(weights, heads, [*context, *ending][:-1]))[len(context) - 1:]
    return -rows[np.arange(len(ending)), ending]
