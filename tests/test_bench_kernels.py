"""test_bench_kernels.py: bench/kernels.cpp and scripts/bench_torch_kernels.py at toy sizes: every operation is measured,
bytes and FLOPs are those worked out by hand here, and the two agree on names.

The program is the one beside the trainer that TRAIN_GPT2 names (linked against tests/cuda_on_cpu), else
build/bench/kernels.
"""
import importlib.util
import json
import re
import subprocess
import sys

import pytest
from program import PROGRAM, ROOT

BENCH = PROGRAM.parent / "bench_kernels"
if not BENCH.exists():
    BENCH = ROOT / "build/bench/kernels"
TORCH_BENCH = ROOT / "scripts/bench_torch_kernels.py"
TOY = ["--device", "cuda", "--models", "toy", "--seconds-per-operation", "0"]

needs_bench = pytest.mark.skipif(not BENCH.exists(), reason=f"{BENCH.name} is not built (make {BENCH})")
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")

# Every function of Backend from convert() on, and the two that move memory.
OPERATIONS = """
    copy fill convert accumulate scale sum_squares sum restore_norm gate_on_finite clip_scale increment fill_normal
    fill_constant embedding_forward embedding_backward layernorm_forward residual_layernorm_forward layernorm_backward
    matmul bias_backward gelu_forward gelu_backward attention_forward attention_backward attention_decode classifier
    classifier_gradient generate_projection factored_second_moment factored_squares factored_scales
    full_second_moment scale_rows_cols momentum_update scaled_momentum_update ema apply_update unfactored_update
    adamw_update sgd_update quantize dequantize quantize_weight dequantize_weight""".split()

KEYS = ["operation", "model", "shape", "milliseconds", "gigabytes", "tflop", "percent", "bound"]

# The toy: 64 tokens in sequences of 16, C = 128, heads of 64, V = 257 padded to 384, rank 16.
N, C, V, PADDED, RANK = 64, 128, 257, 384, 16

# Bytes and FLOPs by hand; bf16 has 2 bytes.
COUNTS = {
    ("matmul qkv forward", "64x384x128 bf16"): (2 * (N * C + C * 3 * C + N * 3 * C), 2 * N * 3 * C * C),
    ("matmul fc input_gradient", "64x128x512 bf16"): (2 * (N * 4 * C + C * 4 * C + N * C), 2 * N * 4 * C * C),
    ("matmul fc weight_gradient_accumulated", "128x512x64 bf16"):
        (2 * (N * C + N * 4 * C) + 2 * 4 * C * 4 * C, 2 * N * 4 * C * C),
    ("matmul head weight_gradient", "384x128x16 bf16"): (2 * 16 * (384 + C) + 2 * 4 * 384 * C, 2 * 16 * 384 * C),
    # Two products of T (T + 1) / 2 pairs of positions, 2 FLOPs per pair and channel; backward five.
    ("attention_forward", "B2 T32 NH2 HD64 bf16"): (2 * (N * 3 * C + N * C), 2 * 2 * 2 * (32 * 33 // 2) * C),
    ("attention_backward", "B2 T32 NH2 HD64 bf16"): (2 * (2 * N * 3 * C + 2 * N * C), 5 * 2 * 2 * (32 * 33 // 2) * C),
    ("attention_forward", "B4 T16 NH1 HD128 bf16"): (2 * (N * 3 * C + N * C), 2 * 2 * 4 * (16 * 17 // 2) * C),
    # One query and one row of the result; keys and values of 32 tokens.
    ("attention_decode", "T32 NH2 HD64 bf16"): (2 * (2 * 32 * C + 2 * C), 2 * 2 * 32 * C),
    ("layernorm_forward", "64x128 bf16"): (2 * 2 * N * C, 0),
    ("residual_layernorm_forward", "64x128 bf16"): (4 * 2 * N * C, 0),
    ("layernorm_backward", "64x128 bf16"): (4 * 2 * N * C, 0),
    ("gelu_backward", "64x512 bf16"): (3 * 2 * N * 4 * C, 0),
    ("bias_backward", "64x384 bf16"): (2 * N * 3 * C, 0),
    ("classifier loss", "16x384 bf16"): (2 * 16 * PADDED, 0),
    ("classifier loss_and_gradient", "16x384 bf16"): (2 * 2 * 16 * PADDED, 0),
    ("classifier_gradient", "16x384 bf16"): (2 * 2 * 16 * PADDED, 0),
    ("copy", "64x128 bf16"): (2 * 2 * N * C, 0),
    ("fill", "64x128 bf16"): (2 * N * C, 0),
    ("convert to_bf16", "64x128 fp32"): (6 * N * C, 0),
    ("accumulate fp32", "128x512 bf16"): ((2 + 2 * 4) * 4 * C * C, 0),
    ("apply_update", "128x512 bf16"): ((2 + 2 * 2) * 4 * C * C, 0),
    ("apply_update", "257x128 bf16"): ((4 + 2 * 2) * V * C, 0),
    # Weight and both moments read and written, the gradient read.
    ("adamw_update bf16", "128x512 bf16"): ((2 * 2 + 2 * 2 + 2 * 4 + 2) * 4 * C * C, 0),
    ("adamw_update int8", "128x512 bf16"): ((2 * 2 + 2 * 1 + 2 * 1 + 2) * 4 * C * C, 0),
    ("adamw_update master", "128x512 bf16"): ((2 * 2 + 2 * 4 + 2 * 4 + 2 * 4 + 2) * 4 * C * C, 0),
    ("factored_second_moment", "128x512 bf16"): (2 * 4 * C * C, 4 * 4 * C * C),
    ("ema bf16", "16x512 bf16"): ((2 * 2 + 4) * RANK * 4 * C, 0),
    ("quantize int8", "128x512 bf16"): ((4 + 1) * 4 * C * C, 0),
    ("quantize_weight", "128x512 bf16"): ((4 + 1) * 4 * C * C, 0),
    ("factored_squares", "128x512 bf16"): (2 * 4 * C * C, 4 * 4 * C * C),
    ("generate_projection gaussian", "16x128 bf16"): (2 * RANK * C, 0),
    ("gate_on_finite", "1 fp32"): (0, 0),
}


def bench(*arguments):
    return subprocess.run([str(BENCH), *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          stdin=subprocess.DEVNULL)


def lines(text):
    header, *rows = map(json.loads, text.splitlines())
    assert header["device"] and header["copy_gb_per_second"] > 0 and header["matmul_tflops"] > 0
    return header, rows


def key(row):
    return row["operation"], row["shape"]


def check_rows(header, rows):
    assert len({key(row) for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == KEYS and row["model"] == "toy"
        assert row["milliseconds"] > 0, row
        memory = row["gigabytes"] / header["copy_gb_per_second"]
        compute = row["tflop"] / header["matmul_tflops"]
        if row["bound"] == "launch":
            assert row["percent"] is None and memory == compute == 0
            continue
        assert row["bound"] == ("memory" if memory >= compute else "compute")
        assert row["percent"] == pytest.approx(1e5 * max(memory, compute) / row["milliseconds"])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Header and rows of one whole run."""
    path = tmp_path_factory.mktemp("bench") / "kernels.jsonl"
    result = bench(*TOY, "--json", path)
    assert result.returncode == 0 and result.stdout == "", result.stderr
    header, rows = lines(path.read_text())
    assert len(result.stderr.splitlines()) == len(rows) + 2  # the table with its two lines of heading
    return header, rows


@pytest.mark.cuda
@needs_bench
def test_every_operation_is_measured(toy):
    header, rows = toy
    check_rows(header, rows)
    assert {row["operation"].split()[0] for row in rows} == set(OPERATIONS)


@pytest.mark.cuda
@needs_bench
def test_bytes_and_flops(toy):
    _, rows = toy
    measured = {key(row): (row["gigabytes"] * 1e9, row["tflop"] * 1e12) for row in rows}
    for name, counts in COUNTS.items():
        assert measured[name] == pytest.approx(counts), name


def test_the_list_of_operations_is_complete():
    text = (ROOT / "kernels/backend.h").read_text()
    declared = re.findall(r"virtual void (\w+)\([^;]*\) = 0;", text[text.index("// ---- elementwise"):])
    assert set(declared) == set(OPERATIONS) - {"copy", "fill"}


@pytest.mark.cuda
@needs_bench
def test_filter_and_table():
    result = bench(*TOY, "--filter", "gelu_")
    assert result.returncode == 0
    _, rows = lines(result.stdout)
    assert [row["operation"] for row in rows] == ["gelu_forward", "gelu_backward"]
    result = bench(*TOY, "--filter", "toy attention_forward B2", "--table")
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.count("attention_forward") == 2


@pytest.mark.cuda
@needs_bench
def test_several_sets_and_measurements():
    """With a working set, a batch is several calls on several sets, and a refreshed operation runs once on each."""
    result = bench(*TOY[:-1], 0.05, "--working-set-mb", 1, "--filter", "64x128 bf16")
    assert result.returncode == 0
    check_rows(*lines(result.stdout))


@pytest.mark.cuda
@needs_bench
def test_time_limit():
    result = bench(*TOY, "--time-limit", 1e-6)
    assert result.returncode == 0
    _, (last,) = lines(result.stdout)
    assert list(last) == ["skipped", "failed"] and last["failed"] == []
    assert {row["operation"].split()[0] for row in last["skipped"]} == set(OPERATIONS)
    skipped = [line for line in result.stderr.splitlines() if "skipped by the time limit: toy " in line]
    assert len(skipped) == len(last["skipped"])


@pytest.mark.cuda
@needs_bench
def test_an_operation_that_fails(monkeypatch):
    if "cuda_on_cpu" not in str(BENCH):
        pytest.skip("simulated by tests/cuda_on_cpu only")
    monkeypatch.setenv("CUDA_ON_CPU_FAIL_LAUNCH", "attention_delta")
    result = bench(*TOY, "--filter", "attention_backward")
    assert result.returncode == 1 and "illegal memory access" in result.stderr
    _, rows = lines(result.stdout)
    assert rows[-1]["failed"][0]["operation"] == "attention_backward" and rows[-1]["failed"][0]["error"]


@pytest.mark.cuda
@needs_bench
@pytest.mark.parametrize("flags, message", [
    (["--models", "gpt5"], 'no model "gpt5"'),
    (["--device", "tpu"], "--device"),
    (["--seconds-per-operation", "-1"], "--seconds-per-operation"),
    (["--time-limit", "soon"], "--time-limit"),
    (["--frobnicate"], "--frobnicate"),
    (["--models", "toy", "--filter", "no such thing"], "no operation"),
    (["--models", "toy", "--filter", "clip", "--json", "/no/such/folder/file"], "/no/such/folder/file"),
])
def test_bad_flags(flags, message):
    result = bench(*flags)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("bench_kernels: ") and message in line


@pytest.mark.cuda
@needs_bench
def test_no_gpu(monkeypatch):
    if "cuda_on_cpu" not in str(BENCH):
        pytest.skip("simulated by tests/cuda_on_cpu only")
    monkeypatch.setenv("CUDA_ON_CPU_DEVICES", "0")
    result = bench(*TOY)
    assert result.returncode == 2 and "no NVIDIA GPU was found" in result.stderr


@pytest.mark.cuda
@needs_bench
@needs_torch
def test_torch(toy, tmp_path):
    """PyTorch's rows have the names of ours; what this PyTorch lacks is named."""
    path = tmp_path / "torch.jsonl"
    result = subprocess.run([sys.executable, str(TORCH_BENCH), "--toy", "--device", "cpu", "--seconds-per-operation",
                             "0", "--json", str(path)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    header, rows = lines(path.read_text())
    check_rows(header, rows)
    ours = {key(row): row for row in toy[1]}
    assert {key(row) for row in rows} <= set(ours)
    found = {row["operation"].split()[0] for row in rows}
    found |= set(re.findall(r"^bench_torch_kernels: skipped: toy (\w+)", result.stderr, re.MULTILINE))
    assert found >= {"matmul", "attention_forward", "attention_backward", "layernorm_forward", "gelu_forward",
                     "classifier", "embedding_forward", "adamw_update", "sgd_update"}
    for row in rows:  # the same work is counted
        assert row["tflop"] == pytest.approx(ours[key(row)]["tflop"]) or row["tflop"] == 0
