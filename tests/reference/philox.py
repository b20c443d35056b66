"""philox.py: the random numbers of docs/numerics.md, written again in numpy as an independent reference.

Every function takes the element positions it is asked about, so any value can be had alone; none keeps state.
"""
import numpy as np

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15

INIT, PROJECTION, ACCUMULATION_PROJECTION, WEIGHT_ROUNDING, GRADIENT_ROUNDING, DATA_ORDER, SAMPLING = range(1, 8)


def philox4x32(counter, key):
    """Ten rounds of Philox4x32. counter: [..., 4] uint32; key: two ints. Returns [..., 4] uint32."""
    x0, x1, x2, x3 = np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0)
    k0, k1 = int(key[0]), int(key[1])
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    for _ in range(10):
        a = x0 * np.uint64(0xD2511F53)
        b = x2 * np.uint64(0xCD9E8D57)
        x0, x1, x2, x3 = (b >> shift) ^ x1 ^ np.uint64(k0), b & low, (a >> shift) ^ x3 ^ np.uint64(k1), a & low
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=-1).astype(np.uint32)


def splitmix64(x):
    """One output of splitmix64 for a Python int."""
    z = (x + GOLDEN) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def fnv1a32(name):
    """32-bit FNV-1a of a name's bytes."""
    value = 2166136261
    for byte in name.encode():
        value = ((value ^ byte) * 16777619) & 0xFFFFFFFF
    return value


class Stream:
    """The numbers named by (run seed, purpose, tensor name, step)."""

    def __init__(self, seed, purpose, name, step):
        key = splitmix64((seed + purpose * GOLDEN) & MASK64)
        self.key = (key & 0xFFFFFFFF, key >> 32)
        self.tensor = fnv1a32(name)
        self.step = step

    def block(self, index):
        """The four words of each block: [..., 4] uint32."""
        index = np.asarray(index, dtype=np.uint64)
        counter = np.empty(index.shape + (4,), dtype=np.uint64)
        counter[..., 0] = index & np.uint64(0xFFFFFFFF)
        counter[..., 1] = index >> np.uint64(32)
        counter[..., 2] = self.tensor
        counter[..., 3] = self.step
        return philox4x32(counter, self.key)

    def word(self, index, per_block, word):
        """Word `word` of block index / per_block, elementwise."""
        words = self.block(np.asarray(index) // per_block)
        return np.take_along_axis(words, np.asarray(word)[..., None].astype(np.int64), axis=-1)[..., 0]

    def normals(self, count, first=0):
        """Standard normals of the elements first .. first + count - 1, in float64, rounded to float32."""
        index = np.arange(first, first + count)
        words = self.block(index // 4).astype(np.float64)
        pair = (index % 4) // 2
        a = np.take_along_axis(words, (2 * pair)[:, None], axis=1)[:, 0]
        b = np.take_along_axis(words, (2 * pair + 1)[:, None], axis=1)[:, 0]
        u = (np.floor(a / 256) + 1) * 2.0**-24
        radius = np.sqrt(-2 * np.log(u))
        angle = 2 * np.pi * np.floor(b / 256) * 2.0**-24
        return np.where(index % 2 == 0, radius * np.cos(angle), radius * np.sin(angle)).astype(np.float32)

    def signs(self, count, first=0):
        """+1 or -1, float32."""
        index = np.arange(first, first + count)
        bits = self.word(index, 128, index % 128 // 32) >> (index % 32).astype(np.uint32) & np.uint32(1)
        return np.where(bits == 1, 1.0, -1.0).astype(np.float32)

    def uniforms(self, count, first=0):
        """Numbers in [0, 1), multiples of 2^-24, exact in float32."""
        index = np.arange(first, first + count)
        return ((self.word(index, 4, index % 4) >> np.uint32(8)) * 2.0**-24).astype(np.float32)

    def round_stochastically(self, values, first=0):
        """float32 values rounded to bf16, returned as float32 of the same shape."""
        values = np.asarray(values, dtype=np.float32)
        index = np.arange(first, first + values.size)
        words = self.word(index, 8, index % 8 // 2)
        z = np.where(index % 2 == 0, words & np.uint32(0xFFFF), words >> np.uint32(16)).astype(np.uint64)
        bits = values.reshape(-1).view(np.uint32).astype(np.uint64)
        rounded = (((bits + z) >> np.uint64(16)) << np.uint64(16)).astype(np.uint32).view(np.float32)
        finite = np.isfinite(values.reshape(-1))
        return np.where(finite, rounded, round_to_bf16(values.reshape(-1))).reshape(values.shape)


def round_to_bf16(values):
    """float32 to bf16, nearest, ties to even, returned as float32. NaN stays NaN."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    rounded = np.where(np.isnan(values), (bits | np.uint64(0x400000)) >> np.uint64(16), rounded)
    return (rounded << np.uint64(16)).astype(np.uint32).view(np.float32)
