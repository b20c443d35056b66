"""test_reference.py: the independent references themselves, against published numbers and against each other."""
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "reference"))

import flora  # noqa: E402
import gpt2  # noqa: E402
import make_flora_fixture  # noqa: E402
import philox  # noqa: E402


@pytest.mark.parametrize(
    "counter, key, expected",
    [  # Random123's known-answer file
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert tuple(int(w) for w in philox.philox4x32(counter, key)) == expected


def test_splitmix_and_fnv_known_answers():
    assert philox.splitmix64(0) == 0xE220A8397B1DCDAF
    assert philox.fnv1a32("") == 0x811C9DC5
    assert philox.fnv1a32("foobar") == 0xBF9CF968


@pytest.mark.parametrize("draw", ["normals", "signs", "uniforms"])
def test_numbers_depend_on_position_only(draw):
    stream = philox.Stream(3, philox.PROJECTION, "h.0.attn.c_attn.weight", 5)
    whole = getattr(stream, draw)(1000)
    assert (getattr(stream, draw)(300, first=517) == whole[517:817]).all()
    other = getattr(philox.Stream(3, philox.PROJECTION, "h.0.attn.c_attn.weight", 6), draw)(1000)
    assert (other != whole).any()


def test_distributions():
    stream = philox.Stream(11, philox.INIT, "wte.weight", 0)
    count = 200_000
    normals = stream.normals(count).astype(np.float64)
    assert abs(normals.mean()) < 0.01 and abs(normals.std() - 1) < 0.01 and abs((normals**3).mean()) < 0.03
    assert abs(stream.signs(count).mean()) < 0.01
    uniforms = stream.uniforms(count)
    assert uniforms.min() >= 0 and uniforms.max() < 1 and abs(uniforms.mean() - 0.5) < 0.005
    rounded = stream.round_stochastically(np.full(count, 1.001, dtype=np.float32))
    assert set(np.unique(rounded)) == {np.float32(1), np.float32(1 + 2**-7)}
    assert abs(rounded.mean(dtype=np.float64) - 1.001) < 1e-4


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_quantization_error_and_range(scale):
    x = np.random.default_rng(0).standard_normal(700) * scale
    codes, scales = flora.quantize_int8(x)
    assert codes.min() >= -127 and scales.size == 3
    assert np.abs(flora.dequantize_int8(codes, scales) - x).max() < 0.008 * np.abs(x).max()
    codes, scales = flora.quantize_uint8(x * x)
    assert codes.min() >= 1  # nothing positive becomes zero
    again, _ = flora.quantize_uint8(flora.dequantize_uint8(codes, scales))
    assert (again == codes).all()


@pytest.mark.parametrize("rank, dimension", [(1, 1), (4, 12), (12, 13), (17, 70)])
def test_cosine_projections_have_orthonormal_rows(rank, dimension):
    p = flora.projection("cosine", rank, dimension, 1, philox.PROJECTION, "w", 0)
    assert np.allclose(p @ p.T, np.eye(rank), atol=1e-12)


def test_cosine_projections_hold_every_direction_as_often():
    """E[P^T P] = r/d I: neither the order of frequencies nor the signs prefer a column."""
    total = sum(p.T @ p for p in (flora.projection("cosine", 3, 7, 0, philox.PROJECTION, "w", i) for i in range(4000)))
    assert np.abs(total / 4000 - 3 / 7 * np.eye(7)).max() < 0.03


@pytest.mark.parametrize("residual", [False, True])
def test_flora_with_full_rank_cosine_projection_is_adafactor(residual):
    """Encoding loses nothing when r = min(n, m) and P is orthogonal, whatever kappa does, and leaves no residual."""
    parameter = flora.Parameter("w", 5, 12)
    options = dict(seed=1, weight_decay=0.1)
    settings = flora.Options(rank=5, kappa=2, projection="cosine", residual=residual, **options)
    compressed, full = flora.Optimizer(settings, parameter), flora.Optimizer(flora.Options(kind="adafactor", **options), parameter)
    assert compressed.compressed and not full.compressed
    a = b = make_flora_fixture.uniform_input("w", 60).reshape(5, 12)
    for t in range(1, 8):
        g = make_flora_fixture.gradient_input(f"g{t}", 5, 12, t)
        a, b = compressed.step(a, g, t, 0.1), full.step(b, g, t, 0.1)
    assert np.abs(a - b).max() < 1e-6


def test_reencoding_is_unbiased_over_projections():
    u = make_flora_fixture.uniform_input("u", 60).reshape(5, 12).astype(np.float64)
    total = 0
    for index in range(4000):
        p = flora.projection("gaussian", 3, 5, 0, philox.PROJECTION, "w", index)
        total = total + flora.up(flora.down(u, p), p, u.shape)
    assert np.linalg.norm(total / 4000 - u) / np.linalg.norm(u) < 0.05


def test_adamw_matches_torch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (python3-torch)")
    parameter = flora.Parameter("w", 6, 11)
    optimizer = flora.Optimizer(flora.Options(kind="adamw", weight_decay=0.1), parameter)
    w = make_flora_fixture.uniform_input("w", 66).reshape(6, 11)
    tensor = torch.nn.Parameter(torch.tensor(w, dtype=torch.float64))
    reference = torch.optim.AdamW([tensor], lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for t in range(1, 6):
        g = make_flora_fixture.gradient_input(f"g{t}", 6, 11, t)
        w = optimizer.step(w, g, t, 0.05)
        tensor.grad = torch.tensor(g, dtype=torch.float64)
        reference.step()
    assert np.abs(tensor.detach().numpy() - w).max() < 1e-6


def test_the_stored_fixture_is_what_the_reference_gives():
    with gzip.open(make_flora_fixture.OUTPUT, "rt") as file:
        stored = {c["name"]: c for c in json.load(file)["cases"]}
    made = {c["name"]: c for c in make_flora_fixture.cases()}
    assert stored.keys() == made.keys()
    for name, case in made.items():
        assert stored[name]["options"] == case["options"]
        for t, values in case["weights"].items():
            # another numpy or BLAS may round a last bit, in bf16 cases a whole bf16 unit
            tolerance = 1e-2 if case["weight_dtype"] == "bf16" else 1e-6
            assert np.allclose(stored[name]["weights"][t], values, rtol=tolerance, atol=1e-6), name


def test_gpt2_is_pytorchs():
    """Against the logits that PyTorch gave in float64 and stored in fp32."""
    load_file = pytest.importorskip("safetensors.numpy").load_file
    tensors = load_file(ROOT / "tests/fixtures/gpt2_reference.safetensors")
    settings = json.loads((ROOT / "tests/fixtures/gpt2_reference.json").read_text())
    weights = {name.removeprefix("initial."): w for name, w in tensors.items() if name.startswith("initial.")}
    sequences = np.array(settings["tokens"][0])
    ours = np.stack([gpt2.logits(weights, settings["config"]["n_head"], row[:-1]) for row in sequences])
    assert np.linalg.norm(ours - tensors["logits"]) < 1e-6 * np.linalg.norm(ours)
    losses = [gpt2.ending_losses(weights, settings["config"]["n_head"], row[:1], row[1:]) for row in sequences]
    assert np.mean(losses) == pytest.approx(settings["losses"][0], rel=1e-6)
