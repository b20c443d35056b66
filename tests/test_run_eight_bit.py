"""test_run_eight_bit.py: weights and states of 8 bits learn what bf16 learns, on real text (of ../shared/data/text).

The same seed, data and order of data; what differs is rounding. Whole curves, of more optimizers and seeds, are in
docs/performance.md.
"""
import subprocess
import sys

import pytest
from program import PROGRAM, ROOT, metrics, succeed

TEXT = ROOT.parent / "shared/data/text/tinyshakespeare.txt"
STEPS, LAST = 150, 20
FLAGS = ["--device", "cpu", "--model", "tiny", "--dtype", "bf16", "--seq-len", 64, "--micro-batch", 8, "--schedule",
         "cosine", "--optimizer", "flora", "--rank", 32, "--lr", 1e-3, "--steps", STEPS, "--eval-every", 0,
         "--checkpoint-every", 0, "--log-every", 100, "--threads", 2, "--peak-tflops", 0.2]
RUNS = {
    "bf16": [],
    "8-bit weights": ["--weight-dtype", "int8"],
    "8-bit states": ["--state-dtype", "int8"],
    "both": ["--weight-dtype", "int8", "--state-dtype", "int8"],
}


@pytest.mark.slow
def test_eight_bits_learn_what_bf16_learns(tmp_path):
    if not PROGRAM.exists():
        pytest.skip("./train_gpt2 is not built (make)")
    if not TEXT.exists():
        pytest.skip(f"{TEXT} is not there: no real text to learn from")
    subprocess.run([sys.executable, str(ROOT / "data/prepare.py"), str(TEXT), "--tokenizer", "bytes", "--out",
                    str(tmp_path / "data")], check=True, capture_output=True)

    curves = {}
    for name, flags in RUNS.items():
        succeed(*FLAGS, *flags, "--data", tmp_path / "data/*_train_*.bin", "--out", tmp_path / name)
        curves[name] = [line["loss"] for line in metrics(tmp_path / name)[1]]
        assert len(curves[name]) == STEPS
        means = [sum(curves[name][t - 10:t]) / 10 for t in range(20, STEPS + 1, 40)]
        print(f"\n{name}, every 40 steps:", *(f"{mean:.3f}" for mean in means), end="")
    first = sum(curves["bf16"][:LAST]) / LAST
    last = {name: sum(curve[-LAST:]) / LAST for name, curve in curves.items()}
    print(f"\nlast {LAST} steps:", *(f"{name} {mean / last['bf16']:.4f} of bf16's," for name, mean in last.items()))
    assert last["bf16"] < 0.65 * first, "bf16 has learned something"
    for name, mean in last.items():
        assert name == "bf16" or mean != last["bf16"], "they are not the same run"
        assert abs(mean / last["bf16"] - 1) <= 0.02, name
