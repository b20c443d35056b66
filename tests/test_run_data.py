"""test_run_data.py: what a run validates on, what an evaluation reads and at which length, data that is short or of
another vocabulary, and samples that stay within the tokenizer.
"""
import json
import shutil
import zlib

import numpy as np
import pytest
from program import TINY, VOCABULARY, call, fail, language, metrics, succeed, tensors, validation_loss, write_shard, write_state

FEW = [*TINY, "--optimizer", "adamw", "--steps", 2]


@pytest.fixture
def run(data, tmp_path):
    """run(shards, *flags): (stdout, warnings) of a run of two steps into tmp_path/run, which must succeed."""

    def start(shards, *flags):
        result = call("--data", shards, *FEW, "--out", tmp_path / "run", *flags)
        assert result.returncode == 0, result.stderr
        return result.stdout, result.stderr

    return start


@pytest.fixture
def evaluate(data):
    """evaluate(model, *flags): (loss, tokens, warnings) of ./train_gpt2 eval."""

    def start(model, *flags):
        result = call("eval", "--model", model, "--threads", 1, *flags)
        assert result.returncode == 0, result.stderr
        return *validation_loss(result.stdout), result.stderr

    return start


def validation_line(text):
    return [line for line in text.splitlines() if line.startswith("validation ")]


def test_a_run_validates_beside_its_data_or_says_why_not(run, tmp_path):
    shard = write_shard(tmp_path / "train_train_000000.bin", language(1000, 1))
    text, _ = run(shard)
    assert validation_line(text) == [f"validation  none: no file matches {tmp_path}/train_val_*.bin (--val-data names shards)"]
    assert "validation loss" not in text
    shutil.rmtree(tmp_path / "run")
    write_shard(tmp_path / "train_val_000000.bin", language(500, 2))
    text, _ = run(shard)
    assert validation_line(text) == [] and f"; validation {tmp_path}/train_val_*.bin" in text
    assert "step 2: validation loss" in text


def test_short_shards_are_left_out_with_a_warning(run, tmp_path):
    write_shard(tmp_path / "x_train_000000.bin", language(1000, 1))
    write_shard(tmp_path / "x_train_000001.bin", language(32, 1))
    write_shard(tmp_path / "x_val_000000.bin", language(32, 2))
    text, warnings = run(tmp_path / "x_train_*.bin")
    assert "warning" in warnings and "x_train_000001.bin: holds 32 tokens, 1 too few" in warnings
    assert ": 1 shard," in text
    (line,) = validation_line(text)
    assert "x_val_000000.bin: holds 32 tokens, 1 too few" in line
    shutil.rmtree(tmp_path / "run")
    write_shard(tmp_path / "x_val_000001.bin", language(33, 2))
    text, warnings = run(tmp_path / "x_train_*.bin", "--val-data", tmp_path / "x_val_*.bin")
    assert "validation loss" in text and "(32 tokens)" in text
    assert "x_val_000000.bin: holds 32 tokens, 1 too few" in warnings


def test_validation_of_another_vocabulary_is_found_before_the_first_step(data, tmp_path):
    shard = write_shard(tmp_path / "gpt2.bin", language(500, 1), vocabulary=50257)
    line = fail("--data", data / "text_train_*.bin", "--val-data", shard, *FEW, "--out", tmp_path / "run", code=2)
    assert "50257" in line and str(VOCABULARY) in line and not (tmp_path / "run").exists()
    tokens = language(500, 1)
    tokens[300] = 400
    shard = write_shard(tmp_path / "foreign.bin", tokens)
    line = fail("--data", data / "text_train_*.bin", "--val-data", shard, *FEW, "--out", tmp_path / "run", code=1)
    assert "foreign.bin: token 400" in line and not (tmp_path / "run").exists()


def test_every_window_counts_once_whatever_the_micro_batch(train, evaluate, tmp_path):
    """Three shards of 7, 2 and 4 windows; the mean over all 13 is that of each one alone."""
    checkpoint = train("run", "--optimizer", "adamw", steps=10) / "latest"
    for index, count in enumerate((7 * 32 + 1, 2 * 32 + 31, 4 * 32 + 8)):
        write_shard(tmp_path / f"v_val_{index}.bin", language(count, index + 5))
    flags = ["--val-data", tmp_path / "v_val_*.bin", "--seq-len", 32, "--micro-batch"]
    losses = {size: evaluate(checkpoint, *flags, size) for size in (1, 2, 3, 5, 13, 16)}
    assert {tokens for _, tokens, _ in losses.values()} == {13 * 32}
    assert [loss for loss, _, _ in losses.values()] == pytest.approx([losses[1][0]] * 6, abs=2e-6)
    parts = [evaluate(checkpoint, "--val-data", tmp_path / f"v_val_{index}.bin", "--seq-len", 32) for index in range(3)]
    assert [tokens for _, tokens, _ in parts] == [7 * 32, 2 * 32, 4 * 32]
    assert losses[3][0] == pytest.approx(sum(loss * tokens for loss, tokens, _ in parts) / (13 * 32), abs=2e-6)
    assert evaluate(checkpoint, *flags, 3, "--eval-batches", 2)[1] == 6 * 32
    assert evaluate(checkpoint, *flags, 3, "--eval-batches", 0)[1] == 13 * 32


def test_the_validation_of_a_run_does_not_depend_on_its_micro_batch(train):
    flags = ["--optimizer", "adamw", "--lr", 1e-30, "--eval-every", 2]
    losses = [metrics(train(f"b{size}", *flags, "--micro-batch", size, steps=2))[1][-1]["val_loss"] for size in (1, 3, 8)]
    assert losses == pytest.approx([losses[0]] * 3, abs=2e-6)


def test_eval_reads_the_runs_own_shards_or_asks(data, train, evaluate, tmp_path):
    run = train("run", "--optimizer", "adamw", "--eval-every", 12)
    loss, tokens, _ = evaluate(run / "latest")
    assert tokens == 1999 // 32 * 32  # all of text_val at the length of training
    assert loss == pytest.approx(metrics(run)[1][-1]["val_loss"], abs=2e-6)  # 62 windows are less than the 80 of a run
    assert loss == evaluate(run / "latest", "--val-data", data / "text_val_*.bin")[0]
    (run / "latest/trainer_state.json").unlink()
    line = fail("eval", "--model", run / "latest", code=2, cwd=tmp_path)
    assert "--val-data" in line and not (tmp_path / "data").exists()


def test_a_model_is_used_at_the_length_it_was_trained_at(train, evaluate, data):
    checkpoint = train("run", "--optimizer", "adamw") / "latest"
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["n_positions"] == 256 and config["trained_positions"] == 32
    flags = ["--val-data", data / "text_val_*.bin"]
    loss, _, warnings = evaluate(checkpoint, *flags)
    assert warnings == "" and loss == evaluate(checkpoint, *flags, "--seq-len", 32)[0]
    longer, _, warnings = evaluate(checkpoint, *flags, "--seq-len", 64)
    assert longer != loss and "--seq-len 64 is longer than the 32 tokens" in warnings
    call_generate = ["generate", "--model", checkpoint, "--prompt", "ab" * 40, "--sample-tokens", 8, "--threads", 1]
    text = succeed(*call_generate)
    assert text == succeed(*call_generate, "--seq-len", 32)
    assert "warning" in call(*call_generate, "--seq-len", 64).stderr
    # Trained on at another length it is used at the longest, and an older checkpoint has it in trainer_state.json.
    again = train("again", "--model", checkpoint, "--seq-len", 16, "--optimizer", "adamw") / "latest"
    assert json.loads((again / "config.json").read_text())["trained_positions"] == 32
    del config["trained_positions"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    changed = (checkpoint / "config.json").read_bytes()
    state["files"]["config.json"] = {"bytes": len(changed), "crc32": zlib.crc32(changed)}
    write_state(checkpoint / "trainer_state.json", state)
    assert evaluate(checkpoint, *flags)[0] == loss


def test_data_of_another_tokenizer_is_a_warning(data, train, evaluate, tmp_path):
    gpt2 = write_shard(tmp_path / "gpt2_train_0.bin", language(500, 1), vocabulary=1000)
    checkpoint = train("run", "--data", gpt2, "--optimizer", "adamw", steps=1) / "latest"
    warnings = evaluate(checkpoint, "--val-data", data / "text_val_*.bin")[2]
    assert "257 tokens, the model one of 1000" in warnings
    assert evaluate(checkpoint, "--val-data", gpt2)[2] == ""
    result = call("--data", data / "text_train_*.bin", *FEW, "--model", checkpoint, "--out", tmp_path / "more")
    assert "257 tokens, the model one of 1000" in result.stderr
    line = fail("eval", "--model", train("bytes", "--optimizer", "adamw", steps=1) / "latest", "--val-data", gpt2, code=2)
    assert "1000 tokens" in line and "257" in line


def test_headerless_data_takes_its_vocabulary_from_the_model_or_a_flag(run, evaluate, tmp_path):
    (np.arange(2000) * 7 % 65).astype(np.uint16).tofile(tmp_path / "train.bin")
    (np.arange(500) * 7 % 65).astype(np.uint16).tofile(tmp_path / "val.bin")
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04")
    text, warnings = run(tmp_path / "train.bin", "--data-format", "nanogpt", "--vocab-size", 65, "--sample-every", 2,
                         "--sample-tokens", 5)
    assert "vocabulary 65," in text and "validation loss" in text and "meta.pkl" not in warnings
    sample = text.split("sample at step 2\n")[1].splitlines()[0].split()
    assert sample and all(0 <= int(token) < 65 for token in sample)
    config = tmp_path / "run/latest/config.json"
    assert json.loads(config.read_text())["vocab_size"] == 65
    assert evaluate(tmp_path / "run/latest")[1] == 499 // 32 * 32  # its format is the run's, too

    shutil.copy(config, tmp_path / "c65.json")
    shutil.rmtree(tmp_path / "run")
    assert "vocabulary 65," in run(tmp_path / "train.bin", "--data-format", "nanogpt", "--model", tmp_path / "c65.json")[0]
    shutil.rmtree(tmp_path / "run")
    text, warnings = run(tmp_path / "train.bin", "--data-format", "nanogpt")
    assert "vocabulary 50257," in text and "meta.pkl is not opened" in warnings and "--vocab-size" in warnings


def test_vocab_size_beside_what_shards_declare(run, data, tmp_path):
    text, _ = run(data / "text_train_*.bin", "--vocab-size", 384)
    assert "vocabulary 384," in text
    line = fail("--data", data / "text_train_*.bin", *FEW, "--vocab-size", 65, "--out", tmp_path / "b", code=2)
    assert "65" in line and "257" in line


def tokenizer_file(path, tokens, end_of_text):
    header = np.zeros(256, np.int32)
    header[:4] = 20240328, 2, len(tokens), end_of_text
    path.write_bytes(header.tobytes() + b"".join(bytes([len(token)]) + token for token in tokens))
    return path


def test_what_the_tokenizer_does_not_have_is_not_sampled(run, data, tmp_path):
    """A vocabulary padded from 257 to 4000 rows: at random nearly every sample would be outside."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"<|endoftext|>"]
    tokenizer = tokenizer_file(tmp_path / "tokenizer.bin", tokens, 256)
    shard = write_shard(tmp_path / "t_train_0.bin", language(500, 1), vocabulary=4000)
    text, _ = run(shard, "--sample-every", 1, "--top-k", 0, "--sample-tokens", 20, "--prompt", "hello")
    assert text.count("\nhello") == 3 and "checkpoint: " in text
    checkpoint = tmp_path / "run/latest"
    assert tensors(checkpoint, "tokenizer.bin") == tokenizer.read_bytes()
    assert json.loads((checkpoint / "config.json").read_text())["eos_token_id"] == 256  # the tokenizer's, not 3999
    sample = ["generate", "--model", checkpoint, "--top-k", 0, "--sample-tokens", 20, "--prompt", "hello"]
    assert succeed(*sample).startswith("hello")
    # The tokenizer.bin of the folder one happens to be in is not the model's.
    (tmp_path / "elsewhere").mkdir()
    tokenizer_file(tmp_path / "elsewhere/tokenizer.bin", [b"h", b"e"], 1)
    assert succeed(*sample, cwd=tmp_path / "elsewhere") == succeed(*sample)


def test_weights_that_are_not_finite(train, data):
    checkpoint = train("run", "--optimizer", "adamw", steps=1) / "latest"
    path = checkpoint / "model.safetensors"
    whole = bytearray(path.read_bytes())
    header = int.from_bytes(whole[:8], "little")
    start, _ = json.loads(whole[8: 8 + header])["transformer.ln_f.bias"]["data_offsets"]
    whole[8 + header + start: 8 + header + start + 4] = np.float32("nan").tobytes()
    path.write_bytes(whole)
    (checkpoint / "trainer_state.json").unlink()  # which would know that they were changed
    flags = ["--model", checkpoint, "--threads", 1]
    assert "not finite" in fail("eval", *flags, "--val-data", data / "text_val_*.bin", code=1)
    assert "not finite" in fail("generate", *flags, code=1)
