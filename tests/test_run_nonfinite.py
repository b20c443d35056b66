"""test_run_nonfinite.py: a loss that is not finite stops a run, or is skipped where that was asked for."""
import json
import shutil

import numpy as np
import pytest
from program import TINY, call, fail, language, metrics, steps_saved, succeed, tensors, write_shard

safetensors = pytest.importorskip("safetensors.numpy")


NO_CHECKSUMS = shutil.ignore_patterns("trainer_state.json")  # a checkpoint that was changed is no checkpoint
LARGE = 3e38  # finite, as a checkpoint's numbers must be


@pytest.fixture
def poisoned(train, tmp_path):
    """A model directory whose loss is not finite, from one weight of this value: NaN, infinite, or LARGE."""
    first = train("first", "--rank", 16, steps=2) / "latest"

    def poison(value):
        folder = tmp_path / f"model_{value}"
        shutil.copytree(first, folder, ignore=NO_CHECKSUMS)
        weights = safetensors.load_file(folder / "model.safetensors")
        weights["transformer.h.1.mlp.c_fc.bias"][3] = value
        weights["transformer.h.1.mlp.c_proj.weight"][3] = 100  # so that a value near the largest overflows
        safetensors.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return poison


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("flags", [["--rank", 16], ["--optimizer", "adamw"]])
def test_the_run_stops_and_says_where(data, tmp_path, poisoned, value, flags):
    line = fail("--data", data / "text_train_*.bin", *TINY[2:], "--model", poisoned(value), "--steps", 5, *flags,
                "--out", tmp_path / "run", code=1)
    assert "step 1:" in line and "not finite" in line and "none yet" in line
    assert steps_saved(tmp_path / "run") == []


def test_the_last_good_checkpoint_is_named(train, data, tmp_path):
    """A learning rate beyond reason: the first steps are finite, then the weights overflow."""
    flags = ["--optimizer", "sgd", "--lr", 1e30, "--warmup-steps", 8, "--clip-norm", 0, "--checkpoint-every", 1]
    line = fail("--data", data / "text_train_*.bin", *TINY, "--steps", 40, *flags, "--out", tmp_path / "run", code=1)
    saved = steps_saved(tmp_path / "run")
    assert saved and f"step_{saved[-1]:08}" in line and f"step {saved[-1] + 1}:" in line
    for step in saved:  # what was saved is finite
        weights = safetensors.load_file(tmp_path / f"run/step_{step:08}/model.safetensors")
        assert all(np.isfinite(tensor).all() for tensor in weights.values())


@pytest.mark.parametrize("flags", [["--rank", 16], ["--optimizer", "adamw"], ["--optimizer", "sgd", "--beta1", 0.9],
                                   ["--rank", 16, "--gradients", "compressed", "--tokens-per-step", 128]])
def test_skipping_leaves_weights_and_state_alone(data, tmp_path, poisoned, flags):
    model = poisoned(LARGE)
    text = succeed("--data", data / "text_train_*.bin", *TINY[2:], "--model", model, "--steps", 4, *flags,
                   "--skip-nonfinite", "--out", tmp_path / "run")
    assert "skipped" in text.splitlines()[-1] + text.splitlines()[-2] and "4 updates" in text
    _, steps = metrics(tmp_path / "run")
    assert [line["skipped"] for line in steps] == [1, 2, 3, 4]
    assert all(line["loss"] is None for line in steps)
    before, after = (safetensors.load_file(folder / "model.safetensors") for folder in (model, tmp_path / "run/latest"))
    assert before.keys() == after.keys()
    assert [name for name in before if before[name].tobytes() != after[name].tobytes()] == []
    state = safetensors.load_file(tmp_path / "run/latest/optimizer.safetensors")
    assert all(not tensor.any() for tensor in state.values()), "the optimizer's state changed"


def test_finite_runs_do_not_notice(train):
    a, b = train("a", "--rank", 16), train("b", "--rank", 16, "--skip-nonfinite")
    assert tensors(a / "latest") == tensors(b / "latest")
    assert not any("skipped" in line for line in metrics(b)[1])


def test_the_count_survives_a_resume(data, tmp_path, poisoned):
    succeed("--data", data / "text_train_*.bin", *TINY[2:], "--model", poisoned(LARGE), "--steps", 2, "--rank", 16,
            "--skip-nonfinite", "--out", tmp_path / "run")
    result = call("--resume", tmp_path / "run", "--steps", 3)
    assert result.returncode == 0 and metrics(tmp_path / "run")[1][-1]["skipped"] == 3


def test_an_untied_head_waits_for_the_loss(train, data, tmp_path):
    """Its gradient is complete before the loss is known; under fused updates it must not be updated before."""
    config = tmp_path / "untied.json"
    config.write_text(json.dumps({"vocab_size": 257, "n_positions": 64, "n_embd": 64, "n_layer": 1, "n_head": 2,
                                  "tie_word_embeddings": False}))
    model = train("first", "--rank", 16, "--model", config, steps=2) / "latest"
    weights = safetensors.load_file(model / "model.safetensors")
    weights["transformer.wpe.weight"][0, :2] = LARGE  # the sum for the mean overflows
    safetensors.save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (model / "trainer_state.json").unlink()
    succeed("--data", data / "text_train_*.bin", *TINY[2:], "--model", model, "--steps", 2, "--rank", 16,
            "--gradients", "fused", "--skip-nonfinite", "--out", tmp_path / "run")
    after = safetensors.load_file(tmp_path / "run/latest/model.safetensors")
    assert [name for name in weights if weights[name].tobytes() != after[name].tobytes()] == []


def test_skipping_ends_after_some_in_a_row(data, tmp_path, poisoned):
    flags = ["--data", data / "text_train_*.bin", *TINY[2:], "--model", poisoned(LARGE), "--steps", 50, "--rank", 16,
             "--checkpoint-every", 1, "--skip-nonfinite"]
    line = fail(*flags, "--out", tmp_path / "a", code=1)
    assert "step 5:" in line and "last 5 (--max-skips)" in line and "none yet" in line
    assert "step 2:" in fail(*flags, "--max-skips", 2, "--out", tmp_path / "b", code=1)
    assert steps_saved(tmp_path / "a") == steps_saved(tmp_path / "b") == []
    assert "--skip-nonfinite" in fail("--max-skips", 2, code=2)


def test_weights_that_are_not_finite_are_never_a_checkpoint(data, tmp_path, poisoned):
    line = fail("--data", data / "text_train_*.bin", *TINY[2:], "--model", poisoned(np.nan), "--steps", 2, "--rank", 16,
                "--skip-nonfinite", "--out", tmp_path / "run", code=1)
    assert "step 2: no checkpoint is written: transformer.h.1.mlp.c_fc.bias is not finite" in line
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl"]


def test_no_checkpoint_at_a_skipped_step(tmp_path):
    """One window of twenty has a token whose embedding makes the loss overflow, and is met once per epoch."""
    tokens = language(20 * 32 + 1, seed=1)
    tokens[100] = 5
    write_shard(tmp_path / "data/text_train_0.bin", tokens)
    config = tmp_path / "untied.json"
    config.write_text(json.dumps({"vocab_size": 257, "n_positions": 64, "n_embd": 64, "n_layer": 1, "n_head": 2,
                                  "tie_word_embeddings": False}))
    flags = ["--data", tmp_path / "data/text_train_*.bin", *TINY[2:], "--optimizer", "adamw", "--checkpoint-every", 1]
    succeed(*flags, "--model", config, "--lr", 1e-8, "--steps", 1, "--out", tmp_path / "first")
    model = tmp_path / "first/latest"
    weights = safetensors.load_file(model / "model.safetensors")
    weights["transformer.wte.weight"][5, :2] = LARGE
    (tmp_path / "model").mkdir()
    safetensors.save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "model/config.json").write_text((model / "config.json").read_text())
    flags += ["--model", tmp_path / "model", "--skip-nonfinite"]
    succeed(*flags, "--steps", 21, "--keep-checkpoints", 0, "--out", tmp_path / "run")
    skipped = [line["step"] for line in metrics(tmp_path / "run")[1] if line["loss"] is None]
    assert len(skipped) == 2
    assert steps_saved(tmp_path / "run") == [step for step in range(1, 22) if step not in skipped]
    # What was due is written at the next step that learns; at the end of a run nothing older is removed for it.
    succeed(*flags, "--steps", skipped[1], "--checkpoint-every", skipped[0], "--keep-checkpoints", 1, "--out",
            tmp_path / "rare")
    assert steps_saved(tmp_path / "rare") == [skipped[0] + 1, skipped[1]]


def test_a_transfer_that_can_blow_up_is_warned_of_and_is_no_default(data, tmp_path):
    def transfer(*flags):
        out = tmp_path / "-".join(map(str, flags))
        result = call("--data", data / "text_train_*.bin", *TINY, "--steps", 1, *flags, "--out", out)
        assert result.returncode == 0
        saved = json.loads((out / "latest/trainer_state.json").read_text())["options"]["transfer"]
        return saved, result.stderr

    gaussian = ("--projection", "gaussian")
    assert transfer("--rank", 4, "--kappa", 3, *gaussian) == ("rescale", "")
    assert transfer("--rank", 4, "--kappa", 1000, *gaussian) == ("reencode", "")
    assert transfer("--rank", 4, "--kappa", 3, "--projection", "cosine") == ("reencode", "")
    saved, warning = transfer("--rank", 4, "--kappa", 3, *gaussian, "--transfer", "reencode")
    assert saved == "reencode"
    assert warning.startswith("train_gpt2: warning: --transfer reencode") and "without bound" in warning
    assert len(warning.splitlines()) == 1
    saved, warning = transfer("--rank", 4, "--kappa", 3, "--projection", "cosine", "--transfer", "unbiased")
    assert saved == "unbiased" and "warning: --transfer unbiased" in warning
