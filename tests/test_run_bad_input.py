"""test_run_bad_input.py: every mistake in flags, data or models ends in one line that says what is wrong, with exit
code 2 (usage) or 1 (at run time), and writes nothing."""
import json
import os
import subprocess

import numpy as np
import pytest
from program import (PROGRAM, TINY, VOCABULARY, call, fail, language, listing, steps_saved, with_defaults,
                     write_shard)


@pytest.fixture
def refused(data, tmp_path):
    """refused(*flags, code=...): a tiny run with these flags must end so, before anything is written. Returns the
    line."""

    def check(*flags, code):
        before = listing(tmp_path)
        defaults = [*TINY, "--data", data / "text_train_*.bin", "--steps", 2, "--out", tmp_path / "run"]
        line = fail(*with_defaults(flags, defaults), code=code, cwd=tmp_path)
        assert listing(tmp_path) == before
        return line

    return check


USAGE = [
    (["--rank", 0], ["--rank"]),
    (["--rank", -5], ["--rank"]),
    (["--rank", "many"], ["--rank", "many"]),
    (["--rank", 2.5], ["--rank"]),
    (["--steps", 0], ["--steps"]),
    (["--lr", -1], ["--lr"]),
    (["--lr", 0], ["--lr"]),
    (["--lr", "nan"], ["--lr"]),
    (["--beta1", 1], ["--beta1"]),
    (["--micro-batch", 0], ["--micro-batch"]),
    (["--seq-len", 0], ["--seq-len"]),
    (["--temperature", -1], ["--temperature"]),
    (["--optimizer", "lion"], ["--optimizer", "lion", "flora"]),
    (["--recompute", "all"], ["--recompute", "block"]),
    (["--model", "gpt5"], ["gpt5", "d12", "tiny"]),
    (["--model", "no/such/directory"], ["no/such/directory"]),
    (["--model", "gpt3:c5140"], ["gpt3:c5120"]),
    (["--frobnicate"], ["--frobnicate", "--help"]),
    (["--rank"], ["--rank"]),
    (["surplus"], ["surplus"]),
    (["--optimizer", "adamw", "--rank", 8], ["--rank", "adamw"]),
    (["--optimizer", "sgd", "--kappa", 8], ["--kappa", "sgd"]),
    (["--beta2", 0.9], ["--beta2", "flora"]),
    (["--residual", "--projection", "gaussian"], ["--residual", "--projection gaussian"]),
    (["--compress-embeddings", "--embedding-momentum=false"], ["--compress-embeddings", "--embedding-momentum=false"]),
    (["--optimizer", "adamw", "--embedding-momentum"], ["--embedding-momentum", "adamw"]),
    (["--optimizer", "adafactor", "--residual"], ["--residual", "adafactor"]),
    (["--optimizer", "adamw", "--beta2", 0.9, "--half-life", 10**6], ["--beta2", "--half-life"]),
    (["--optimizer", "sgd", "--half-life", 10**6], ["--half-life", "sgd"]),
    (["--half-life", -1], ["--half-life"]),
    (["--gradients", "dense", "--accumulation-rank", 4], ["--accumulation-rank", "dense"]),
    (["--relative-step", "--lr", 1e-3], ["--lr", "--relative-step"]),
    (["--warmup-init"], ["--warmup-init", "--relative-step"]),
    (["--cooldown-steps", 5], ["--cooldown-steps", "cosine"]),
    (["--json"], ["--json", "--plan"]),
    (["--plan", "--resume", "x"], ["--plan", "--resume"]),
    (["--dtype", "fp32", "--master-weights", "fp32"], ["--master-weights", "fp32 weights"]),
    (["--tokens-per-step", 100], ["--tokens-per-step 100", "64"]),
    (["--device", "cuda"], ["--device cuda"]),
    (["--steps", 10**30], ["--steps"]),
    (["--micro-batch", 10**9, "--seq-len", 200], ["--micro-batch", "--seq-len"]),
    (["--resume", ""], ["--resume needs a value"]),
    (["--data", ""], ["--data needs a value"]),
    (["--data="], ["--data needs a value"]),
    (["--seed", 2**64], ["--seed", "out of range"]),
    (["--residual=2"], ["--residual", "true or false", "2"]),
    (["--profile=maybe"], ["--profile", "true or false", "maybe"]),
    (["--lr", 1e-46], ["--lr 1e-46", "0"]),
    (["--beta1", 0.99999999], ["--beta1", "1 in fp32"]),
    (["--threads", 100000], ["--threads", "1024"]),
    (["--learning_rates", 1], ["--learning_rates"]),
    (["--tokens_per_step", 1], ["did you mean --tokens-per-step?"]),
    (["--model", "two\nlines \x1b[31m"], ["two lines", "tiny"]),
    (["--optimizer", "x" * 5000], ["--optimizer", "flora"]),
]


@pytest.mark.parametrize("flags, words", USAGE, ids=[" ".join(map(str, flags)) for flags, _ in USAGE])
def test_wrong_flags(refused, flags, words):
    line = refused(*flags, code=2)
    assert all(word in line for word in words), line


def test_an_empty_flag_is_not_a_crash(refused):
    refused("--steps", "", code=2)
    refused("--optimizer", "", code=2)


def test_more_memory_than_there_is(refused):
    message = refused("--micro-batch", 10**7, code=1)
    assert "the plan is" in message and "are free; with --micro-batch" in message


def test_a_rank_above_every_matrix_is_a_warning(data, tmp_path):
    result = call("--data", data / "text_train_*.bin", *TINY, "--steps", 1, "--rank", 500, "--out", tmp_path / "run")
    assert result.returncode == 0
    assert "warning" in result.stderr and "nothing is compressed" in result.stderr and "500" in result.stderr


def test_no_shards_match(refused, tmp_path):
    assert "no shards match" in refused("--data", tmp_path / "none_*.bin", code=1)
    assert "none_*.bin" in refused("--data", tmp_path / "none_*.bin", code=1)
    assert "no shards match" in refused("--val-data", tmp_path / "none_*.bin", code=1)


def test_damaged_shards(refused, tmp_path):
    good = write_shard(tmp_path / "good.bin", language(1000, 1)).read_bytes()
    cases = {
        "truncated.bin": (good[:-100], "truncated"),
        "header.bin": (good[:500], "truncated"),
        "magic.bin": (b"\x01" + good[1:], "magic"),
        "empty.bin": (b"", "empty"),
        "text.bin": (b"It was the best of times, it was the worst of times", "text"),
        "long.bin": (good + b"more", "2028" if len(good) == 2024 else str(len(good) + 4)),
    }
    for name, (contents, word) in cases.items():
        (tmp_path / name).write_bytes(contents)
        line = refused("--data", tmp_path / name, code=1)
        assert name in line and word in line, line


def test_data_that_does_not_fit(refused, data, tmp_path):
    short = write_shard(tmp_path / "short.bin", language(20, 1))
    assert "short.bin" in refused("--data", short, code=1)
    write_shard(tmp_path / "gpt2.bin", language(2000, 1), vocabulary=50257)
    mixed = f"{data / 'text_train_*.bin'},{tmp_path / 'gpt2.bin'}"
    assert "vocabulary" in refused("--data", mixed, code=1)


def test_a_token_outside_the_vocabulary(data, tmp_path):
    """Met at once or in the middle of a run; then the checkpoints made until then stay."""
    tokens = language(2000, 1)
    tokens[7::20] = 300
    everywhere = write_shard(tmp_path / "wide.bin", tokens)
    line = fail("--data", everywhere, *TINY, "--rank", 16, "--steps", 2, "--out", tmp_path / "a", code=1)
    assert "wide.bin" in line and "300" in line and str(VOCABULARY) in line
    assert steps_saved(tmp_path / "a") == []

    tokens = language(3000, 1)
    tokens[1500] = 260
    shard = write_shard(tmp_path / "late.bin", tokens)
    line = fail("--data", shard, *TINY, "--rank", 16, "--steps", 200, "--checkpoint-every", 1, "--out",
                tmp_path / "run", code=1)
    assert "260" in line and "late.bin" in line
    for checkpoint in (tmp_path / "run").glob("step_*"):
        assert (checkpoint / "trainer_state.json").exists()


CONFIG = {"model_type": "gpt2", "vocab_size": 300, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}

CONFIGS = [
    ({"n_head": 3}, 1, ["n_head", "n_embd"]),
    ({"n_head": 0}, 1, ["n_head"]),
    ({"n_layer": -1}, 1, ["n_layer"]),
    ({"n_embd": "wide"}, 1, ["n_embd"]),
    ({"vocab_size": None}, 1, ["vocab_size"]),
    ({"model_type": "llama"}, 1, ["llama"]),
    ({"activation_function": "relu"}, 1, ["relu"]),
    ({"activation_function": None}, 1, ["activation_function"]),
    ({"layer_norm_epsilon": "small"}, 1, ["layer_norm_epsilon"]),
    ({"tie_word_embeddings": "yes"}, 1, ["tie_word_embeddings"]),
    ({"n_inner": 99}, 1, ["n_inner"]),
    ({"n_embd": 2**62}, 1, ["n_embd", "131072"]),
    ({"vocab_size": 2**62}, 1, ["vocab_size"]),
    ({"n_layer": 10**5}, 1, ["n_layer", "1024"]),
    ({"n_positions": 2**64 - 1}, 1, ["n_positions"]),
    ({"vocab_size": 100}, 2, ["257", "100"]),
    ({}, 2, ["--seq-len 32", "16"]),
]


@pytest.mark.parametrize("changes, code, words", CONFIGS, ids=[str(changes) for changes, _, _ in CONFIGS])
def test_configurations_that_cannot_be_used(refused, tmp_path, changes, code, words):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    line = refused("--model", tmp_path / "config.json", code=code)
    assert all(word in line for word in words), line


def test_a_batch_whose_sizes_would_overflow(refused, tmp_path):
    widest = {**CONFIG, "n_embd": 2**17, "n_layer": 1024, "n_positions": 2**20}
    (tmp_path / "widest.json").write_text(json.dumps(widest))
    flags = ["--model", tmp_path / "widest.json", "--seq-len", 2**20, "--micro-batch", 1000]
    assert "1024 layers" in refused(*flags, code=2)


def test_files_that_are_not_models(refused, tmp_path):
    (tmp_path / "bad.json").write_text('{"n_head": ')
    assert "bad.json" in refused("--model", tmp_path / "bad.json", code=1)
    (tmp_path / "list.json").write_text("[1, 2]")
    assert "list.json" in refused("--model", tmp_path / "list.json", code=1)
    (tmp_path / "folder").mkdir()
    assert "config.json" in refused("--model", tmp_path / "folder", code=1)
    (tmp_path / "short.bin").write_bytes(b"abc")
    assert "short.bin" in refused("--model", tmp_path / "short.bin", code=1)
    header = np.zeros(256, np.int32)
    header[:8] = 20240326, 3, 32, 257, 2, 2, 32, 384
    (tmp_path / "cut.bin").write_bytes(header.tobytes() + b"\0" * 1000)
    assert "truncated" in refused("--model", tmp_path / "cut.bin", code=1)
    header[7] = 2**31 - 1
    (tmp_path / "padded.bin").write_bytes(header.tobytes())
    assert "truncated" in refused("--model", tmp_path / "padded.bin", code=1)
    header[1] = 7
    (tmp_path / "version.bin").write_bytes(header.tobytes())
    assert "version 7" in refused("--model", tmp_path / "version.bin", code=1)


def test_configuration_files(refused, tmp_path):
    (tmp_path / "unknown.toml").write_text("rank = 8\nfrobnicate = 3\n")
    assert "frobnicate" in refused("--config", tmp_path / "unknown.toml", code=2)
    (tmp_path / "value.toml").write_text('rank = "many"\n')
    assert "rank" in refused("--config", tmp_path / "value.toml", code=2)
    assert "absent.toml" in refused("--config", tmp_path / "absent.toml", code=2)
    (tmp_path / "crash.toml").write_text("rank = [a#b\n")
    assert "crash.toml:1: 'rank'" in refused("--config", tmp_path / "crash.toml", code=2)
    (tmp_path / "list.toml").write_text('data = ["two/a.bin", "two/b.bin"]\n')
    assert "not a list" in refused("--config", tmp_path / "list.toml", code=2)


def test_pipes_devices_and_folders_are_no_files(refused, tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "zero.bin").symlink_to("/dev/zero")
    for path, code in (("pipe.json", 2), ("folder.json", 1), ("zero.bin", 2), ("/dev/random", 2)):
        assert str(path) in refused("--model", tmp_path / path, code=code)
    for path in ("pipe.json", "folder.json", "zero.bin"):
        assert "a file is needed" in refused("--config", tmp_path / path, code=2)
    for path in ("pipe.json", "zero.bin"):
        assert "a file is needed" in refused("--tokenizer", tmp_path / path, code=1)
    assert "folder.json/tokenizer.json: cannot be read" in refused("--tokenizer", tmp_path / "folder.json", code=1)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").symlink_to("/dev/zero")
    assert "is a device" in refused("--model", tmp_path / "model", code=1)


def test_deep_json(refused, tmp_path):
    deep = "[" * 80000 + "]" * 80000
    (tmp_path / "deep.json").write_text(json.dumps(CONFIG)[:-1] + f', "n_inner": {deep}}}')
    assert "deeper" in refused("--model", tmp_path / "deep.json", code=1)


def test_what_cannot_be_printed_is_a_failure():
    with open("/dev/full", "w") as full:
        for flags in (["--help"], ["plan", "--model", "tiny", "--json"], ["plan", "--model", "tiny"]):
            result = subprocess.run([str(PROGRAM), *flags], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
            assert result.returncode == 1 and result.stderr.startswith("train_gpt2: standard output cannot be written: ")


def test_weights_that_are_not_numbers_have_no_loss(train, data, tmp_path):
    run = train("run", steps=1)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((run / "latest/config.json").read_bytes())
    weights = bytearray((run / "latest/model.safetensors").read_bytes())
    weights[-4096:] = np.full(1024, np.nan, np.float32).tobytes()
    (broken / "model.safetensors").write_bytes(weights)
    line = fail("eval", "--model", broken, "--val-data", data / "text_val_*.bin", "--seq-len", 32, code=1)
    assert "not finite" in line


def test_subcommands_need_a_model_with_weights(data, tmp_path):
    for subcommand in ("generate", "eval"):
        assert "--model" in fail(subcommand, code=2, cwd=tmp_path)
        assert "no weights" in fail(subcommand, "--model", "tiny", "--val-data", data / "text_val_*.bin", code=2)
        assert "nowhere" in fail(subcommand, "--model", "nowhere", "--val-data", data / "text_val_*.bin", code=2)
    assert list(tmp_path.glob("*.json*")) == []


def test_output_that_cannot_be_written(refused):
    assert "/dev/null/x" in refused("--out", "/dev/null/x", code=1)


@pytest.fixture
def small_disk(tmp_path):
    """mount(bytes, options): a file system of its own at tmp_path/disk. Skips where mounting is not allowed."""
    point = tmp_path / "disk"
    point.mkdir()

    def mount(size, *options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(point)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            pytest.skip(f"cannot mount a small file system: {result.stderr.strip()}")
        return point

    yield mount
    subprocess.run(["umount", str(point)], capture_output=True)


def test_a_full_disk(data, small_disk):
    """Room for one checkpoint of 2.1 MB, not for two: the first one stays whole and can be resumed elsewhere."""
    disk = small_disk("3m")
    line = fail("--data", data / "text_train_*.bin", *TINY, "--dtype", "fp32", "--rank", 16, "--steps", 6,
                "--checkpoint-every", 3, "--eval-every", 0, "--out", disk / "run", code=1)
    assert "No space left" in line and str(disk) in line
    assert [path.name for path in disk.glob("run/step_*")] == ["step_00000003"]
    assert not list(disk.glob("run/.tmp*"))
    elsewhere = disk.parent / "elsewhere"
    result = call("--resume", disk / "run", "--out", elsewhere)
    assert result.returncode == 0 and (elsewhere / "latest/model.safetensors").exists()


def test_a_disk_that_cannot_be_written(data, small_disk):
    disk = small_disk("1m", "ro")
    line = fail("--data", data / "text_train_*.bin", *TINY, "--steps", 1, "--out", disk / "run", code=1)
    assert "Read-only file system" in line
