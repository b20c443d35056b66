"""make_flora_fixture.py: writes tests/fixtures/flora_reference.json.gz from the numpy reference in flora.py.

Usage: .venv/bin/python tests/reference/make_flora_fixture.py. README.md beside this file describes the format.
"""
import gzip
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np

from flora import Optimizer, Options, Parameter, accumulate_compressed
from philox import fnv1a32, round_to_bf16

OUTPUT = Path(__file__).resolve().parent.parent / "fixtures" / "flora_reference.json.gz"


def uniform_input(name, count):
    """Numbers in [-1, 1), multiples of 2^-23: splitmix64 of (hash of the name, position)."""
    x = (np.arange(count, dtype=np.uint64) + np.uint64(fnv1a32(name) << 32)) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return ((x >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1).astype(np.float32)


def gradient_input(name, rows, cols, t):
    """Uniform numbers times 2^-((t + row) mod 3), so that rows and steps have different sizes."""
    exponent = (t + np.arange(rows)) % 3
    return uniform_input(name, rows * cols).reshape(rows, cols) * (2.0 ** -exponent[:, None]).astype(np.float32)


def numbers(array):
    """float32 values as the shortest JSON numbers that give them back."""
    return [float(np.format_float_positional(x, unique=True)) if 1e-4 < abs(x) < 1e6 else float(f"{x:.9g}")
            for x in np.asarray(array, dtype=np.float32).reshape(-1)]


def stored_state(optimizer):
    out = {}
    for what, stored in optimizer.state.items():
        entry = {"dtype": stored.dtype, "shape": list(stored.shape)}
        if stored.dtype in ("int8", "uint8"):
            entry["codes"] = [int(c) for c in stored.codes]
            entry["scales"] = numbers(stored.scales)
        else:
            entry["values"] = numbers(stored.value)
        out[what] = entry
    return out


def make_case(name, rows, cols, seed=7, **settings):
    """The case with the first seed, from `seed` on, whose result does not hang on the last bit: 8-bit codes are away from
    rounding ties."""
    while True:
        case, optimizer = run_case(name, rows, cols, seed, **settings)
        distance = min((stored.tie_distance for stored in optimizer.state.values()), default=0.5)
        if distance > 2e-4:
            return case
        seed += 1
        assert seed < 2000, name


def run_case(name, rows, cols, seed, steps=10, check_steps=None, lr=0.05, weight_dtype="fp32", master=False,
             decay=True, embedding=False, accumulation=None, **settings):
    """rows = 0 makes a 1-D parameter."""
    settings["seed"] = seed
    options = Options(**settings)
    parameter = Parameter("p." + name, max(rows, 1), cols, rows > 0, decay, embedding)
    shape = (parameter.rows, cols)
    inputs = f"{name}.s{seed}"
    weight = uniform_input(inputs + ".w", shape[0] * cols).reshape(shape)
    if weight_dtype == "bf16":
        weight = round_to_bf16(weight)
    optimizer = Optimizer(options, parameter, "fp32" if master else weight_dtype)
    expected = {}
    for t in range(1, steps + 1):
        if accumulation:
            parts = [gradient_input(f"{inputs}.g{t}.{i}", *shape, t) for i in range(accumulation["micro_batches"])]
            gradient = accumulate_compressed(
                parameter, parts, accumulation["rank"], accumulation["projection"], seed, t
            )
        else:
            gradient = gradient_input(f"{inputs}.g{t}", *shape, t)
        weight = optimizer.step(weight, gradient, t, lr)
        if t in (check_steps or (1, 2, steps)):
            expected[str(t)] = numbers(weight)
    case = {
        "name": name,
        "parameter": asdict(parameter),
        "options": asdict(options),
        "lr": float(np.float32(lr)),
        "steps": steps,
        "weight_dtype": weight_dtype,
        "master": master,
        "accumulation": accumulation,
        "compressed": optimizer.compressed,
        "weights": expected,
        "state": stored_state(optimizer),
    }
    return case, optimizer


def cases():
    compressed = dict(rank=4, kappa=3, projection="gaussian")
    for side, rows, cols in (("wide", 5, 12), ("tall", 12, 5), ("square", 7, 7)):
        for kind in ("gaussian", "rademacher", "cosine"):
            for transfer in ("reencode", "restart", "rescale", "unbiased"):
                rank = 3 if kind == "cosine" else 4
                yield make_case(f"{side}_{kind}_{transfer}", rows, cols, rank=rank, kappa=3, projection=kind,
                                transfer=transfer, check_steps=(10,) if transfer != "reencode" else (1, 3, 4, 10))
        for transfer in ("reencode", "restart", "rescale", "unbiased"):
            yield make_case(f"{side}_residual_{transfer}", rows, cols, rank=3, kappa=3, projection="cosine",
                            transfer=transfer, residual=True, check_steps=(1, 3, 4, 10))
    yield make_case("rank_equals_rows", 4, 13, **compressed)
    yield make_case("rank_above_rows", 3, 11, **compressed)
    yield make_case("kappa_one", 6, 11, rank=3, kappa=1, steps=6)
    yield make_case("kappa_never", 6, 11, rank=3, kappa=1000)
    yield make_case("ratio_four", 20, 5, **compressed)
    yield make_case("ratio_above_four", 21, 5, **compressed)
    yield make_case("embedding_compressed", 40, 6, embedding=True, compress_embeddings=True, **compressed)
    yield make_case("large_seed", 6, 11, rank=3, kappa=4, seed=0xDEADBEEFCAFE)
    yield make_case("no_momentum", 6, 11, beta1=0.0, **compressed)
    yield make_case("beta1_half", 11, 6, beta1=0.5, **compressed)
    yield make_case("weight_decay", 6, 11, weight_decay=0.1, **compressed)
    yield make_case("weight_decay_off_group", 6, 11, weight_decay=0.1, decay=False, **compressed)
    yield make_case("clipped", 11, 6, clip=0.1, **compressed)
    yield make_case("never_clipped", 11, 6, clip=0.0, beta1=0.0, **compressed)
    yield make_case("scale_parameter", 6, 11, scale_parameter=True, **compressed)
    yield make_case("relative_step", 6, 11, relative_step=True, scale_parameter=True, **compressed)
    yield make_case("warmup_init", 6, 11, relative_step=True, warmup_init=True, **compressed)
    yield make_case("decay_rate", 6, 11, decay_rate=-0.5, eps1=1e-3, **compressed)
    yield make_case("unfactored", 6, 11, factored=False, **compressed)
    yield make_case("vector", 0, 9, weight_decay=0.1, decay=False, **compressed)
    yield make_case("vector_scale_parameter", 0, 9, scale_parameter=True, clip=0.2, **compressed)
    yield make_case("adafactor", 6, 11, kind="adafactor", rank=0)
    yield make_case("adafactor_no_momentum", 11, 6, kind="adafactor", rank=0, beta1=0.0, scale_parameter=True)
    yield make_case("flora_large", 33, 70, rank=8, kappa=4, steps=5, check_steps=(5,))
    yield make_case("flora_half_life", 33, 70, rank=8, kappa=4, half_life=5000, tokens_per_step=1000)
    yield make_case("adafactor_half_life_unfactored", 6, 11, kind="adafactor", rank=0, factored=False, half_life=3000,
                    tokens_per_step=1000)
    yield make_case("residual_unclipped", 6, 11, rank=3, kappa=4, projection="cosine", residual=True, clip=0.0)
    # Ranks that a CPU has cosine transforms for instead of products.
    transformed = dict(rank=20, kappa=3, projection="cosine")
    for side, rows, cols in (("wide", 24, 30), ("tall", 30, 24)):
        yield make_case(f"transformed_{side}", rows, cols, check_steps=(4, 10), **transformed)
        for transfer in ("reencode", "restart", "rescale", "unbiased"):
            yield make_case(f"transformed_{side}_residual_{transfer}", rows, cols, residual=True, transfer=transfer,
                            check_steps=(10,), **transformed)
    yield make_case("adamw_half_life", 6, 11, kind="adamw", half_life=7_100_000, tokens_per_step=131072)
    yield make_case("adamw", 6, 11, kind="adamw", weight_decay=0.1)
    yield make_case("adamw_no_momentum", 6, 11, kind="adamw", beta1=0.0, beta2=0.999)
    yield make_case("adamw_vector", 0, 9, kind="adamw", weight_decay=0.1, decay=False)
    yield make_case("sgd", 6, 11, kind="sgd", beta1=0.0, weight_decay=0.1)
    yield make_case("sgd_momentum", 6, 11, kind="sgd", beta1=0.9)

    eight_bit = dict(state_dtype="int8", steps=6, check_steps=(6,))
    yield make_case("int8_wide", 33, 70, rank=8, kappa=1000, **eight_bit)
    yield make_case("int8_wide_transfer", 33, 70, rank=8, kappa=4, **eight_bit)
    yield make_case("int8_tall_transfer", 45, 30, rank=8, kappa=4, projection="cosine", transfer="rescale",
                    **eight_bit)
    yield make_case("int8_residual", 33, 70, rank=8, kappa=4, projection="cosine", residual=True, **eight_bit)
    yield make_case("int8_transformed", 30, 24, residual=True, **transformed, **eight_bit)
    yield make_case("int8_uncompressed", 20, 33, rank=64, **eight_bit)
    yield make_case("int8_unfactored", 20, 33, factored=False, **eight_bit)
    yield make_case("int8_adamw", 20, 33, kind="adamw", **eight_bit)
    yield make_case("int8_sgd", 20, 33, kind="sgd", **eight_bit)
    yield make_case("int8_vector", 0, 300, kind="adamw", **eight_bit)

    half = dict(weight_dtype="bf16", state_dtype="bf16", steps=5, check_steps=(5,))
    yield make_case("bf16_flora", 13, 20, rank=4, kappa=1000, **half)
    yield make_case("bf16_flora_transfer", 20, 13, rank=4, kappa=2, **half)
    yield make_case("bf16_residual", 20, 13, rank=4, kappa=2, projection="cosine", residual=True, **half)
    yield make_case("bf16_adamw", 13, 20, kind="adamw", **half)
    yield make_case("bf16_sgd", 13, 20, kind="sgd", beta1=0.0, **half)
    yield make_case("bf16_master", 13, 20, rank=4, kappa=1000, master=True, **half)

    plain = dict(kind="sgd", beta1=0.0, lr=0.02, steps=3, check_steps=(1, 3))
    for kind in ("gaussian", "rademacher", "cosine"):
        for side, rows, cols in (("wide", 6, 11), ("tall", 11, 6)):
            yield make_case(f"accumulated_{kind}_{side}", rows, cols,
                            accumulation={"micro_batches": 3, "rank": 4, "projection": kind}, **plain)
    for side, rows, cols in (("wide", 24, 30), ("tall", 30, 24)):
        yield make_case(f"accumulated_transformed_{side}", rows, cols,
                        accumulation={"micro_batches": 3, "rank": 20, "projection": "cosine"}, **plain)
    yield make_case("accumulated_uncompressed", 3, 20,
                    accumulation={"micro_batches": 3, "rank": 4, "projection": "gaussian"}, **plain)
    yield make_case("accumulated_flora", 6, 11, rank=3, kappa=2, steps=5, check_steps=(5,),
                    accumulation={"micro_batches": 2, "rank": 5, "projection": "gaussian"})


def main():
    all_cases = list(cases())
    assert len({c["name"] for c in all_cases}) == len(all_cases)
    for case in all_cases:
        assert all(math.isfinite(x) for values in case["weights"].values() for x in values), case["name"]
    text = json.dumps({"format": 1, "cases": all_cases}, separators=(",", ":"))
    OUTPUT.parent.mkdir(exist_ok=True)
    with open(OUTPUT, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:  # the same bytes every time
        file.write(text.encode())
    print(f"{OUTPUT.name}: {len(all_cases)} cases, {len(text)} bytes, {OUTPUT.stat().st_size} compressed")


if __name__ == "__main__":
    main()
