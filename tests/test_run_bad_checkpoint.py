"""test_run_bad_checkpoint.py: a checkpoint that is damaged, not whole, or of another run is refused in one line, and
left as it is."""
import json
import re
import shutil

import pytest
from program import call, fail, language, listing, same_state, write_shard, write_state


@pytest.fixture
def run(train):
    return train("run", "--rank", 16, "--dtype", "fp32", "--checkpoint-every", 6)


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


def changed(state, *keys, to):
    """The state with what is found under these keys replaced."""
    if keys:
        return {**state, keys[0]: changed(state[keys[0]], *keys[1:], to=to)}
    return to


TEXTS = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "not JSON": lambda text: "step 6\n",
    "a list": lambda text: "[]",
    "another learning rate": lambda text: re.sub(r'"lr": [0-9.]+', '"lr": 0.4005', text),
    "another format": lambda text: text.replace('"format": 2', '"format": 99'),
    "spaces": lambda text: text.replace("\n  ", "\n"),
}

# With the right checksum.
STATES = {
    "no step": lambda state: {key: value for key, value in state.items() if key != "step"},
    "step of words": lambda state: changed(state, "step", to="six"),
    "no files": lambda state: changed(state, "files", to={}),
    "options of another type": lambda state: changed(state, "options", "rank", to="16"),
    "options that cannot be": lambda state: changed(state, "options", "rank", to=-16),
    "an unknown option": lambda state: changed(state, "options", to={**state["options"], "ranl": 16}),
    "an unknown optimizer": lambda state: changed(state, "options", "optimizer", to="lion"),
    "another position's seed": lambda state: changed(state, "data_position", "seed", to=7),
}


@pytest.mark.parametrize("damage", [*TEXTS, *STATES])
def test_a_damaged_trainer_state(run, refused, damage, tmp_path):
    path = run / "step_00000006" / "trainer_state.json"
    before = path.read_text()
    if damage in TEXTS:
        path.write_text(TEXTS[damage](before))
    else:
        write_state(path, STATES[damage](json.loads(before)))
    assert path.read_text() != before
    code = call("--resume", run / "step_00000006", "--out", tmp_path / "branch").returncode
    assert code in (1, 2)
    line = refused(code=code)
    assert "::" not in line  # a library's message


def test_a_state_of_the_first_format_is_read_and_said(run, tmp_path):
    path = run / "step_00000006/trainer_state.json"
    state = json.loads(path.read_text())
    write_state(path, state)
    assert call("--resume", run / "step_00000006", "--out", tmp_path / "sealed").stderr == ""
    path.write_text(json.dumps(changed({k: v for k, v in state.items() if k != "crc32"}, "format", to=1)))
    result = call("--resume", run / "step_00000006", "--out", tmp_path / "b")
    assert result.returncode == 0 and same_state(run, tmp_path / "b")
    (line,) = result.stderr.splitlines()
    assert "warning" in line and "step_00000006" in line and "no checksum" in line


def test_options_that_are_missing_are_said(run, tmp_path):
    path = run / "step_00000006/trainer_state.json"
    state = json.loads(path.read_text())
    write_state(path, changed(state, "options", to={k: v for k, v in state["options"].items() if k != "lr"}))
    odd = run.rename(run.with_name("two\nlines"))  # a warning is one line, too
    result = call("--resume", odd / "step_00000006", "--out", tmp_path / "b")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 0 and "warning" in line and "two lines" in line and "--lr" in line


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "trainer_state.json"])
def test_a_model_from_a_damaged_checkpoint(run, data, name, tmp_path):
    """Where the checksums lie beside the weights, they are used; without trainer_state.json it is any model."""
    model = run / "latest"
    contents = bytearray((model / name).read_bytes())
    contents[-3] ^= 1
    (model / name).write_bytes(contents)
    uses = [["eval", "--val-data", data / "text_val_*.bin"], ["generate", "--sample-tokens", 2],
            ["--data", data / "text_train_*.bin", "--steps", 1, "--out", tmp_path / "new"]]
    for use in uses:
        line = fail(*use, "--model", model, code=1)
        assert name in line and ("checksum" in line or "damaged" in line)
    if name == "config.json":
        assert name in fail("plan", "--model", model, code=1)
    (model / "trainer_state.json").unlink()
    if name == "model.safetensors":
        assert all(call(*use, "--model", model).returncode == 0 for use in uses)


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
    (["--kappa", 10], ["--kappa 10", "200"]),
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
    write_state(run / "step_00000006/trainer_state.json", state)
    shutil.copy(other / "step_00000006/optimizer.safetensors", run / "step_00000006/optimizer.safetensors")
    assert "momentum" in refused()


def test_the_good_checkpoint_beside_a_damaged_one(run, tmp_path):
    (run / "step_00000012/model.safetensors").write_bytes(b"")
    line = fail("--resume", run, "--steps", 14, code=1)
    assert "step_00000012/model.safetensors" in line and f"--resume {run / 'step_00000006'} " in line
    result = call("--resume", run / "step_00000006", "--out", tmp_path / "b")
    assert result.returncode == 0, result.stderr
