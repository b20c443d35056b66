"""test_run_eight_bit.py: weights and states of 8 bits learn what bf16 learns, on real text (of ../shared/data/text).

The same seed, data and order of data; what differs is rounding. Whole curves, of more optimizers and seeds, are in
docs/performance.md.
"""
import subprocess
import sys

import pytest
from program import PROGRAM, ROOT, metrics, succeed

TEXT = ROOT.parent / "shared/data/text/tinyshakespeare.txt"
STEPS, LAST = 300, 20
FLAGS = ["--device", "cpu", "--model", "tiny", "--dtype", "bf16", "--seq-len", 64, "--micro-batch", 8, "--schedule",
         "cosine", "--optimizer", "flora", "--rank", 32, "--lr", 1e-3, "--steps", STEPS, "--eval-every", 0,
         "--checkpoint-every", 0, "--log-every", 100, "--threads", 2, "--peak-tflops", 0.2]


@pytest.mark.slow
def test_eight_bits_learn_what_bf16_learns(tmp_path):
    if not PROGRAM.exists():
        pytest.skip("./train_gpt2 is not built (make)")
    if not TEXT.exists():
        pytest.skip(f"{TEXT} is not there: no real text to learn from")
    subprocess.run([sys.executable, str(ROOT / "data/prepare.py"), str(TEXT), "--tokenizer", "bytes", "--out",
                    str(tmp_path / "data")], check=True, capture_output=True)

    def losses(name, *flags):
        """(mean of the first steps, of the last)"""
        succeed(*FLAGS, *flags, "--data", tmp_path / "data/*_train_*.bin", "--out", tmp_path / name)
        values = [line["loss"] for line in metrics(tmp_path / name)[1]]
        assert len(values) == STEPS
        return sum(values[:LAST]) / LAST, sum(values[-LAST:]) / LAST

    first, bf16 = losses("bf16")
    _, eight_bit = losses("eight-bit", "--weight-dtype", "int8", "--state-dtype", "int8")
    print(f"\nlast {LAST} steps: bf16 {bf16:.4f}, 8 bits {eight_bit:.4f}, ratio {eight_bit / bf16:.4f}")
    assert bf16 < 0.65 * first, "bf16 has learned something"
    assert eight_bit != bf16, "they are not the same run"
    assert abs(eight_bit / bf16 - 1) <= 0.02
