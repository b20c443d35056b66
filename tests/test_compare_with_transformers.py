"""test_compare_with_transformers.py: the comparison itself, on the reference model written as a checkpoint."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parent
FIXTURES = TESTS / "fixtures"

pytest.importorskip("torch", "1.13.0a0", reason="PyTorch 1.13 or later is not installed (python3-torch)")
pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.numpy")


def compare(folder, logits):
    command = [sys.executable, str(TESTS / "compare_with_transformers.py"), str(folder), str(logits)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The reference model's initial parameters as a folder that transformers loads, and its stored logits."""
    folder = tmp_path_factory.mktemp("checkpoint")
    description = json.loads((FIXTURES / "gpt2_reference.json").read_text())
    stored = safetensors.load_file(str(FIXTURES / "gpt2_reference.safetensors"))
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "bos_token_id": 0, "eos_token_id": 0,
              **description["config"]}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name.removeprefix("initial."): t for name, t in stored.items() if name.startswith("initial.")}
    safetensors.save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    tokens = np.array(description["tokens"][0], dtype=np.int32)[:, :-1].copy()
    return folder, tokens, stored["logits"]


def test_equal_logits_pass(checkpoint, tmp_path):
    folder, tokens, logits = checkpoint
    safetensors.save_file({"tokens": tokens, "logits": logits}, str(tmp_path / "logits.safetensors"))
    result = compare(folder, tmp_path / "logits.safetensors")
    assert result.returncode == 0, result.stdout + result.stderr
    assert float(result.stdout.split()[-1]) < 1e-5


def test_different_logits_fail(checkpoint, tmp_path):
    folder, tokens, logits = checkpoint
    safetensors.save_file({"tokens": tokens, "logits": logits * 1.01}, str(tmp_path / "logits.safetensors"))
    result = compare(folder, tmp_path / "logits.safetensors")
    assert result.returncode == 1 and "relative error 1.0" in result.stdout


def test_a_missing_checkpoint_is_one_line(tmp_path):
    result = compare(tmp_path / "nothing", tmp_path / "logits.safetensors")
    assert result.returncode == 1 and "Traceback" not in result.stderr and result.stderr.count("\n") == 1
