"""flora.py: Flora, Adafactor, AdamW and SGD in plain numpy, float64, written from the formulas of the design.

An independent reference for the C++ optimizers: it follows the formulas literally (U is materialised, a transfer
decodes and encodes again) and shares no code or shortcuts with them. Between steps it keeps what they keep: weights and
state in fp32, bf16, or 8-bit codes with block scales.
"""
import math
from dataclasses import dataclass

import numpy as np

import philox

QUANT_BLOCK = 256


@dataclass
class Options:
    """flora/optimizers.h's OptimizerConfig with the same names and defaults; fractions are rounded to fp32 as there."""

    kind: str = "flora"  # flora, adafactor, adamw, sgd
    seed: int = 0
    beta1: float = 0.9
    weight_decay: float = 0.0
    state_dtype: str = "fp32"  # fp32, bf16, int8
    beta2: float = 0.95
    eps: float = 1e-8
    rank: int = 256
    kappa: int = 200
    decay_rate: float = -0.8
    eps1: float = 1e-30
    eps2: float = 1e-3
    clip: float = 1.0
    factored: bool = True
    scale_parameter: bool = False
    relative_step: bool = False
    warmup_init: bool = False
    compress_embeddings: bool = False
    projection: str = "cosine"  # gaussian, rademacher, cosine
    transfer: str = "reencode"  # reencode, unbiased, rescale, restart
    residual: bool = False
    half_life: int = 0
    tokens_per_step: int = 0

    def __post_init__(self):
        for field in ("beta1", "weight_decay", "beta2", "eps", "decay_rate", "eps1", "eps2", "clip"):
            setattr(self, field, float(np.float32(getattr(self, field))))


@dataclass
class Parameter:
    name: str
    rows: int
    cols: int
    matrix: bool = True
    decay: bool = True
    embedding: bool = False


# ---- storage of state between steps


def quantize_int8(x):
    """Signed square-root code map. x: any shape; returns (codes int8 flat, scales float32)."""
    exact, x, scales = _codes_before_rounding(x, lambda ratio: 127 * np.sqrt(ratio))
    return (np.sign(x) * np.rint(exact)).astype(np.int8), scales


def dequantize_int8(codes, scales):
    c = codes.astype(np.float64)
    return _block_scales(scales, codes.size) * np.sign(c) * (np.abs(c) / 127) ** 2


def quantize_uint8(x):
    """Unsigned fourth-root code map: a positive number never becomes zero."""
    exact, x, scales = _codes_before_rounding(x, lambda ratio: 255 * ratio**0.25)
    return np.where(x == 0, 0, np.maximum(1, np.rint(exact))).astype(np.uint8), scales


def dequantize_uint8(codes, scales):
    return _block_scales(scales, codes.size) * (codes.astype(np.float64) / 255) ** 4


def _block_scales(scales, count):
    return np.repeat(np.asarray(scales, dtype=np.float64), QUANT_BLOCK)[:count]


def tie_distance(x, dtype):
    """How far the code nearest to a rounding tie is from it. Small codes count as nearer: there an error of x that is
    small beside the block's scale moves the code most."""
    curve = (lambda ratio: 127 * np.sqrt(ratio)) if dtype == "int8" else (lambda ratio: 255 * ratio**0.25)
    exact, _, _ = _codes_before_rounding(x, curve)
    exact = exact[exact > 0.4]
    return float((np.abs(exact - np.floor(exact) - 0.5) * np.minimum(1, exact / 12)).min(initial=0.5))


def _codes_before_rounding(x, curve):
    x = np.asarray(x, dtype=np.float64).reshape(-1)
    scales = np.array(
        [np.abs(x[i : i + QUANT_BLOCK]).max() for i in range(0, x.size, QUANT_BLOCK)], dtype=np.float32
    )
    s = _block_scales(scales, x.size)
    ratio = np.minimum(1.0, np.divide(np.abs(x), s, out=np.zeros_like(x), where=s > 0))
    return curve(ratio), x, scales


class Stored:
    """A moment as it lies in memory between steps."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype = shape, dtype
        self.tie_distance = 0.5  # the smallest so far, of 8-bit states
        self.set(np.zeros(shape))

    def set(self, value):
        if self.dtype in ("int8", "uint8"):
            self.tie_distance = min(self.tie_distance, tie_distance(value, self.dtype))
        if self.dtype == "int8":
            self.codes, self.scales = quantize_int8(value)
        elif self.dtype == "uint8":
            self.codes, self.scales = quantize_uint8(value)
        else:
            value = np.asarray(value, dtype=np.float64).astype(np.float32)
            self.value = philox.round_to_bf16(value) if self.dtype == "bf16" else value

    def get(self):
        if self.dtype == "int8":
            return dequantize_int8(self.codes, self.scales).reshape(self.shape)
        if self.dtype == "uint8":
            return dequantize_uint8(self.codes, self.scales).reshape(self.shape)
        return self.value.astype(np.float64)


# ---- projections


def projection(kind, rank, dimension, seed, purpose, name, index):
    """P [rank, dimension], float64."""
    stream = philox.Stream(seed, purpose, name, index)
    if kind == "rademacher":
        return stream.signs(rank * dimension).reshape(rank, dimension).astype(np.float64) / math.sqrt(rank)
    if kind == "cosine":
        return cosine_rows(stream, rank, dimension)
    p = stream.normals(rank * dimension).reshape(rank, dimension).astype(np.float64)
    return p / math.sqrt(rank)


def cosine_rows(stream, rank, dimension):
    """Rows of the orthonormal DCT-II matrix in a random order, with a random sign for each column."""
    keys = [int(word) for word in stream.block(2**64 - 1)]
    half_bits = 0
    while 4**half_bits < dimension:
        half_bits += 1

    def permuted(k):
        left, right = divmod(k, 2**half_bits)
        for key in keys:
            x = (right + key) % 2**32
            x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
            x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
            x ^= x >> 16
            left, right = right, left ^ x % 2**half_bits
        k = left * 2**half_bits + right
        return k if k < dimension else permuted(k)

    f = np.array([permuted(k) for k in range(rank)], dtype=np.float64)[:, None]
    j = np.arange(dimension)[None, :]
    amplitude = np.where(f == 0, math.sqrt(1 / dimension), math.sqrt(2 / dimension))
    signs = stream.signs(dimension)[None, :]
    return signs * amplitude * np.cos(np.pi * f * (2 * j + 1) / (2 * dimension))


def down(u, p):
    """[n, m] to its compressed form: P U when n < m, else U Q with Q = P^T."""
    return p @ u if u.shape[0] < u.shape[1] else u @ p.T


def up(m, p, shape):
    return p.T @ m if shape[0] < shape[1] else m @ p


def is_compressed(parameter, rank, compress_embeddings):
    small, large = sorted((parameter.rows, parameter.cols))
    return parameter.matrix and 0 < rank <= small and (compress_embeddings or large <= 4 * small)


def rms(x):
    return math.sqrt(np.mean(x * x))


# ---- optimizers


class Optimizer:
    """State of one parameter; step() applies one update."""

    def __init__(self, options, parameter, weight_dtype="fp32"):
        self.options, self.parameter, self.weight_dtype = options, parameter, weight_dtype
        o, p = options, parameter
        shape = (p.rows, p.cols)
        # 1-D parameters and factored statistics stay fp32 under int8.
        momentum_dtype = "fp32" if o.state_dtype == "int8" and not p.matrix else o.state_dtype
        second_dtype = "uint8" if o.state_dtype == "int8" and p.matrix else "fp32"
        adafactor = o.kind in ("flora", "adafactor")
        self.factored = adafactor and o.factored and p.matrix
        self.compressed = (
            o.kind == "flora" and self.factored and o.beta1 > 0 and is_compressed(p, o.rank, o.compress_embeddings)
        )
        self.state = {}
        if o.beta1 > 0:
            if self.compressed:
                momentum_shape = (o.rank, p.cols) if p.rows < p.cols else (p.rows, o.rank)
            else:
                momentum_shape = shape
            self.state["momentum"] = Stored(momentum_shape, momentum_dtype)
        if self.factored:
            self.state["row"] = Stored((p.rows,), "fp32")
            self.state["col"] = Stored((p.cols,), "fp32")
        elif o.kind != "sgd":
            self.state["second_moment"] = Stored(shape, second_dtype)

    def step(self, weight, gradient, t, lr):
        """weight, gradient: float32 [rows, cols]; returns the weight after step t (float32)."""
        w, g = weight.astype(np.float64), gradient.astype(np.float64)
        decay = self.options.weight_decay if self.parameter.decay else 0.0
        lr = float(np.float32(lr))
        update = {"flora": self._adafactor, "adafactor": self._adafactor, "adamw": self._adamw, "sgd": self._sgd}
        w = update[self.options.kind](w, g, t, lr, decay).astype(np.float32)
        if self.weight_dtype == "bf16":
            stream = philox.Stream(self.options.seed, philox.WEIGHT_ROUNDING, self.parameter.name, t)
            w = stream.round_stochastically(w)
        return w

    def _adafactor(self, w, g, t, lr, decay):
        o = self.options
        u = self._normalised(g, min(1 - t**o.decay_rate, self._half_life_decay() or 1))
        if o.beta1 == 0:
            d = u
        elif not self.compressed:
            d = o.beta1 * self.state["momentum"].get() + (1 - o.beta1) * u
            self.state["momentum"].set(d)
        else:
            d = self._compressed_momentum(u, t)
        if o.clip > 0:
            d = d / max(1.0, rms(d) / o.clip)
        if o.relative_step:
            lr = min(1e-6 * t if o.warmup_init else 1e-2, 1 / math.sqrt(t))
        if o.scale_parameter:
            lr = lr * max(o.eps2, rms(w))
        return w - lr * (decay * w + d)

    def _half_life_decay(self):
        """Decay of a second moment in a step, a fraction in fp32, or None where steps alone count."""
        o = self.options
        return float(np.float32(0.5 ** (o.tokens_per_step / o.half_life))) if o.half_life else None

    def _normalised(self, g, beta2):
        """U: the gradient over the root of its second moment."""
        squares = g * g + self.options.eps1
        if not self.factored:
            v = beta2 * self.state["second_moment"].get() + (1 - beta2) * squares
            self.state["second_moment"].set(v)
            return g / np.sqrt(v)
        r = beta2 * self.state["row"].get() + (1 - beta2) * squares.mean(axis=1)
        c = beta2 * self.state["col"].get() + (1 - beta2) * squares.mean(axis=0)
        self.state["row"].set(r)
        self.state["col"].set(c)
        return g / np.sqrt(r / r.mean())[:, None] / np.sqrt(c)[None, :]

    def _compressed_momentum(self, u, t):
        """D; moves the stored momentum to the next projection where that is due and adds U to it."""
        o = self.options
        stored = self.state["momentum"]
        m = stored.get()
        p = self._projection((t - 1) // o.kappa)
        d = (1 - o.beta1) * u + o.beta1 * up(m, p, u.shape)
        if t % o.kappa == 0:
            p_next = self._projection(t // o.kappa)
            moved = down(up(m, p, u.shape), p_next)
            if o.transfer == "restart":
                moved = np.zeros_like(m)
            elif o.transfer == "unbiased" and o.projection == "cosine":
                moved = moved * (min(u.shape) / o.rank)
            elif o.transfer == "rescale":
                before, after = np.sqrt((m * m).sum()), np.sqrt((moved * moved).sum())
                moved = moved * (before / after if after > 0 else 1.0)
            stored.set(moved)  # M <- ... is an assignment: it has the precision of M
            m, p = stored.get(), p_next
        compressed = down(u, p)
        new = o.beta1 * m + (1 - o.beta1) * compressed
        stored.set(new)
        # With residual: momentum where the projection looks, U itself elsewhere.
        return u + up(new - compressed, p, u.shape) if o.residual else d

    def _projection(self, index):
        o, p = self.options, self.parameter
        return projection(o.projection, o.rank, min(p.rows, p.cols), o.seed, philox.PROJECTION, p.name, index)

    def _adamw(self, w, g, t, lr, decay):
        o = self.options
        m = g
        if o.beta1 > 0:
            m = o.beta1 * self.state["momentum"].get() + (1 - o.beta1) * g
            self.state["momentum"].set(m)
        beta2 = self._half_life_decay() or o.beta2
        v = beta2 * self.state["second_moment"].get() + (1 - beta2) * g * g
        self.state["second_moment"].set(v)
        m_hat = m / (1 - o.beta1**t)
        v_hat = v / (1 - beta2**t)
        return w - lr * (m_hat / (np.sqrt(v_hat) + o.eps) + decay * w)

    def _sgd(self, w, g, t, lr, decay):
        o = self.options
        if o.beta1 > 0:
            g = o.beta1 * self.state["momentum"].get() + g
            self.state["momentum"].set(g)
        return w - lr * (decay * w + g)


def accumulate_compressed(parameter, gradients, rank, kind, seed, t, compress_embeddings=False):
    """The gradient that compressed accumulation hands to the optimizer at step t: the micro-batches' gradients are summed in
    a projection of their own, new at every optimizer step, and decoded once."""
    if not is_compressed(parameter, rank, compress_embeddings):
        return sum(g.astype(np.float64) for g in gradients)
    dimension = min(parameter.rows, parameter.cols)
    p = projection(kind, rank, dimension, seed, philox.ACCUMULATION_PROJECTION, parameter.name, t)
    total = sum(down(g.astype(np.float64), p) for g in gradients)
    unbiased = dimension / rank if kind == "cosine" else 1
    return unbiased * up(total, p, (parameter.rows, parameter.cols))
