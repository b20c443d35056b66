"""test_run_bad_checkpoint.py: a checkpoint that is damaged, not whole, or of another run is refused in one line, and
left as it is."""
import json
import shutil

import pytest
from program import call, fail, language, listing, write_shard


@pytest.fixture
def run(train):
    return train("run", "--rank", 16, "--checkpoint-every", 6)


@pytest.fixture
def refused(run, tmp_path):
    """refused(*flags, code=1): resuming from step 6 must end so and write nothing. Returns the line."""

    def check(*flags, code=1, argument=run / "step_00000006"):
        before = listing(tmp_path)
        line = fail("--resume", argument, "--out", tmp_path / "branch", *flags, code=code)
        assert listing(tmp_path) == before
        return line

    return check


FILES = ["model.safetensors", "optimizer.safetensors", "config.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(run, refused, name):
    (run / "step_00000006" / name).unlink()
    line = refused()
    assert name in line and "missing" in line


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file(run, refused, name):
    path = run / "step_00000006" / name
    path.write_bytes(path.read_bytes()[:-1])
    line = refused()
    assert name in line and "damaged" in line


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 1.0])
def test_one_bit_flipped(run, refused, name, place):
    path = run / "step_00000006" / name
    contents = bytearray(path.read_bytes())
    contents[int(place * (len(contents) - 1))] ^= 0x10
    path.write_bytes(contents)
    line = refused()
    assert name in line and "checksum" in line


STATES = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "not JSON": lambda text: "step 6\n",
    "a list": lambda text: "[]",
    "no step": lambda text: text.replace('"step"', '"stop"'),
    "step of words": lambda text: text.replace('"step": 6', '"step": "six"'),
    "another format": lambda text: text.replace('"format": 1', '"format": 99'),
    "options of another type": lambda text: text.replace('"rank": 16', '"rank": "16"'),
    "options that cannot be": lambda text: text.replace('"rank": 16', '"rank": -16'),
    "an unknown optimizer": lambda text: text.replace('"optimizer": "flora"', '"optimizer": "lion"'),
    "another position's seed": lambda text: text.replace('"seed": 1337,\n    "fingerprint"',
                                                         '"seed": 7,\n    "fingerprint"'),
}


@pytest.mark.parametrize("damage", STATES)
def test_a_damaged_trainer_state(run, refused, damage, tmp_path):
    path = run / "step_00000006" / "trainer_state.json"
    before = path.read_text()
    after = STATES[damage](before)
    assert after != before
    path.write_text(after)
    code = call("--resume", run / "step_00000006", "--out", tmp_path / "branch").returncode
    assert code in (1, 2)
    line = refused(code=code)
    assert "::" not in line  # a library's message


def test_no_checkpoint_there(run, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no checkpoint" in refused(argument=tmp_path / "empty")
    assert "absent" in refused(argument=tmp_path / "absent")
    assert "metrics.jsonl" in refused(argument=run / "metrics.jsonl")


@pytest.mark.parametrize("flags, words", [
    (["--model", "mini"], ["--model", "mini", "tiny"]),
    (["--rank", 8], ["--rank 8", "16"]),
    (["--optimizer", "adamw"], ["--optimizer", "flora"]),
    (["--dtype", "bf16"], ["--dtype", "fp32"]),
    (["--seq-len", 16], ["--seq-len 16", "32"]),
    (["--seed", 2], ["--seed 2", "1337"]),
    (["--kappa", 10], ["--kappa 10", "1000"]),
    (["--head-chunk", 32], ["--head-chunk 32", "64"]),
    (["--gradients", "dense"], ["--gradients", "fused"]),
], ids=lambda value: " ".join(map(str, value)))
def test_what_must_not_change(refused, flags, words):
    line = refused(*flags, code=2)
    assert all(word in line for word in words), line
    assert "cannot change" in line


def test_giving_the_same_again_is_no_contradiction(run, tmp_path):
    result = call("--resume", run / "step_00000006", "--rank", 16, "--model", "tiny", "--seed", 1337, "--out",
                  tmp_path / "b")
    assert result.returncode == 0, result.stderr


def test_other_data(refused, tmp_path):
    other = write_shard(tmp_path / "other_train_0.bin", language(20000, seed=9))
    assert "shards" in refused("--data", other, code=1)


def test_files_of_another_checkpoint(run, refused):
    shutil.copy(run / "step_00000012/model.safetensors", run / "step_00000006/model.safetensors")
    assert "model.safetensors" in refused()


def test_the_wrong_state_with_the_right_checksum(train, run, refused):
    """An optimizer.safetensors of another rank, listed correctly: the shapes give it away."""
    other = train("other", "--rank", 8, "--checkpoint-every", 6)
    state = json.loads((run / "step_00000006/trainer_state.json").read_text())
    theirs = json.loads((other / "step_00000006/trainer_state.json").read_text())
    state["files"]["optimizer.safetensors"] = theirs["files"]["optimizer.safetensors"]
    (run / "step_00000006/trainer_state.json").write_text(json.dumps(state))
    shutil.copy(other / "step_00000006/optimizer.safetensors", run / "step_00000006/optimizer.safetensors")
    assert "momentum" in refused()


def test_the_good_checkpoint_beside_a_damaged_one(run, tmp_path):
    (run / "step_00000012/model.safetensors").write_bytes(b"")
    fail("--resume", run, "--steps", 14, code=1)
    result = call("--resume", run / "step_00000006", "--out", tmp_path / "b")
    assert result.returncode == 0, result.stderr
