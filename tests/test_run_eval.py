"""test_run_eval.py: what ./train_gpt2 eval prints beside the loss: bits per byte, and on HellaSwag's questions the
accuracies of tests/reference/gpt2.py, whatever the micro-batch.
"""
import json
import math
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from program import (ROOT, TINY, VOCABULARY, call, fail, language, metrics, succeed, validation_loss, with_defaults,
                     write_shard)

sys.path.insert(0, str(ROOT / "tests/reference"))

import gpt2  # noqa: E402

END_OF_TEXT = VOCABULARY - 1
HEADS, POSITIONS, CHANNELS = 3, 64, 24


def write_model(folder, vocabulary=VOCABULARY, seed=1):
    """A GPT-2 with random parameters of every kind into a folder as Hugging Face has it; returns the parameters."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    weights = gpt2.make_weights(np.random.default_rng(seed), vocabulary, POSITIONS, CHANNELS, 2, 0.3)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(
        {"vocab_size": vocabulary, "n_positions": POSITIONS, "n_embd": CHANNELS, "n_layer": 2, "n_head": HEADS}))
    save_file(weights, folder / "model.safetensors")
    return weights


def bits_per_byte(output):
    return re.search(r"^bits per byte   ([\d.]+) \((\d+) bytes\)$", output, re.MULTILINE)


# ---- bits per byte


def test_bits_per_byte_count_the_bytes_of_the_targets(tmp_path):
    write_model(tmp_path / "model")
    tokens = language(32 * 7 + 1, seed=3)
    tokens[[5, 40, 41]] = END_OF_TEXT
    shard = write_shard(tmp_path / "a.bin", tokens)
    for windows, batches in ((7, 0), (6, 2)):  # the last micro-batch of 3 has one sequence
        output = succeed("eval", "--model", tmp_path / "model", "--val-data", shard, "--seq-len", 32, "--micro-batch", 3,
                         "--threads", 1, "--eval-batches", batches)
        loss, count = validation_loss(output)
        targets = tokens[1 : windows * 32 + 1]
        text = int((targets != END_OF_TEXT).sum())
        assert count == len(targets) > text
        found = bits_per_byte(output)
        assert int(found[2]) == text
        assert float(found[1]) == pytest.approx(loss / math.log(2) * count / text, rel=1e-5)


def write_tokenizer(path, tokens):
    """llm.c's tokenizer.bin; the last token is end-of-text."""
    header = np.zeros(256, np.uint32)
    header[:4] = 20240328, 2, len(tokens), len(tokens) - 1
    path.write_bytes(header.tobytes() + b"".join(bytes([len(token)]) + token for token in tokens))


def test_bits_per_byte_of_longer_tokens(tmp_path):
    vocabulary = 300
    write_model(tmp_path / "model", vocabulary)
    tokens = np.random.default_rng(5).integers(0, vocabulary, 65)
    shard = write_shard(tmp_path / "data/a.bin", tokens, vocabulary)
    flags = ["eval", "--model", tmp_path / "model", "--val-data", shard, "--seq-len", 32, "--threads", 1]
    plain = succeed(*flags)
    assert not bits_per_byte(plain)  # no tokenizer is known
    words = [bytes([i % 256]) * (1 + i % 7) for i in range(vocabulary - 1)] + [b"<|endoftext|>"]
    expected = sum(len(words[token]) for token in tokens[1:] if token != vocabulary - 1)
    write_tokenizer(tmp_path / "data/tokenizer.bin", words)  # beside the shards
    found = bits_per_byte(succeed(*flags))
    assert int(found[2]) == expected
    assert float(found[1]) == pytest.approx(validation_loss(plain)[0] / math.log(2) * 64 / expected, rel=1e-5)
    # A tokenizer that lacks one of the tokens says nothing about their bytes.
    write_tokenizer(tmp_path / "data/tokenizer.bin", [b"" if i == tokens[7] else word for i, word in enumerate(words)])
    assert not bits_per_byte(succeed(*flags))
    # A broken one costs nothing but the bits, unless it was asked for.
    (tmp_path / "data/tokenizer.bin").write_bytes(b"broken")
    result = call(*flags)
    assert result.returncode == 0 and result.stdout == plain
    assert "no bits per byte: " in result.stderr and "tokenizer.bin" in result.stderr
    assert "tokenizer.bin" in fail(*flags, "--tokenizer", tmp_path / "data/tokenizer.bin", code=1)


def test_a_run_says_bits_per_byte_where_it_validates(data, tmp_path):
    output = succeed("--data", data / "text_train_*.bin", *TINY, "--steps", 4, "--eval-every", 2, "--eval-batches", 3,
                     "--out", tmp_path / "run")
    targets = np.fromfile(data / "text_val_000000.bin", np.uint16, offset=1024)[1 : 3 * 2 * 32 + 1]
    text = int((targets != END_OF_TEXT).sum())
    assert text < len(targets)
    rows = {row["step"]: row for row in metrics(tmp_path / "run")[1]}
    assert [step for step, row in rows.items() if "val_bits_per_byte" in row] == [2, 4]
    for step in (2, 4):
        bits = rows[step]["val_bits_per_byte"]
        assert bits == pytest.approx(rows[step]["val_loss"] / math.log(2) * len(targets) / text, rel=1e-5)
        assert f"step {step}: validation loss {rows[step]['val_loss']:.4f} ({len(targets)} tokens), {bits:.4f} bits per byte" in output


# ---- HellaSwag

WORDS = "the a man woman dog caf\u00e9 \u65e5\u672c runs jumps and then over into water , . sits on it he she".split()


def questions(count=30, seed=2, longest=9):
    """Contexts and endings of random words; which ending is right is not said yet."""
    random = np.random.default_rng(seed)

    def words(most):
        return " ".join(random.choice(WORDS, random.integers(1, most + 1)))

    return [{"ind": i, "activity_label": "x", "ctx": words(longest)[:40], "endings": [f"{letter} {words(3)[:10]}" for letter in "abcd"]}
            for i in range(count)]


def prepare(tmp_path, examples, name="questions"):
    """data/hellaswag.py on the examples, in bytes; returns the file that it wrote."""
    source = tmp_path / f"{name}.jsonl"
    source.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, str(ROOT / "data/hellaswag.py"), "--input", str(source), "--out", str(tmp_path / name),
         "--tokenizer", "bytes"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return tmp_path / name / "hellaswag_val.bin"


def reference_choices(weights, examples, positions=POSITIONS):
    """For each question the endings of the lowest summed and of the lowest mean loss, by the reference, which reads the
    text and not the file. Also checked: no ending is so near to another that rounding could decide."""
    chosen = []
    for example in examples:
        losses = []
        for ending in example["endings"]:
            ending = list(f" {ending}".encode())
            context = list(example["ctx"].encode())
            context = context[max(0, len(context) + len(ending) - 1 - positions):]
            losses.append(gpt2.ending_losses(weights, HEADS, context, ending))
        for scores in ([x.sum() for x in losses], [x.mean() for x in losses]):
            first, second = sorted(scores)[:2]
            assert second - first > 1e-4, example
            chosen.append(int(np.argmin(scores)))
    return chosen[::2], chosen[1::2]


def accuracies(output):
    found = re.search(r"^accuracy             ([\d.]+) \+- [\d.]+ \((\d+) of (\d+) questions\)\n"
                      r"normalised accuracy  ([\d.]+) \+- [\d.]+ \((\d+) of (\d+) questions\)$", output, re.MULTILINE)
    assert found, output
    total = int(found[3])
    assert int(found[6]) == total
    assert float(found[1]) == round(int(found[2]) / total, 4) and float(found[4]) == round(int(found[5]) / total, 4)
    return int(found[2]), int(found[5]), total


def label(examples, labels):
    return [{**example, "label": int(right)} for example, right in zip(examples, labels)]


def check_against_reference(tmp_path, *flags, batches, count):
    """With the reference's choices as labels every question is answered right, by sum or by mean."""
    examples, weights = questions(count), write_model(tmp_path / "model")
    by_sum, by_mean = reference_choices(weights, examples)
    same = sum(a == b for a, b in zip(by_sum, by_mean))
    assert same < count - 3 and len(set(by_sum)) == len(set(by_mean)) == 4
    for name, labels, expected in (("sum", by_sum, (count, same)), ("mean", by_mean, (same, count)),
                                   ("neither", [min({0, 1, 2} - {a, b}) for a, b in zip(by_sum, by_mean)], (0, 0))):
        file = prepare(tmp_path, label(examples, labels), name)
        for batch in batches:
            output = succeed("eval", "--model", tmp_path / "model", "--hellaswag", file, "--micro-batch", batch,
                             "--seq-len", POSITIONS, "--threads", 1, *with_defaults(flags, ["--dtype", "fp32"]))
            assert accuracies(output) == (*expected, count), (name, batch)
            assert "validation loss" not in output


def test_accuracy_is_the_references_whatever_the_micro_batch(tmp_path):
    check_against_reference(tmp_path, "--device", "cpu", batches=(1, 3, 4, 7, 200), count=30)


@pytest.mark.cuda
def test_accuracy_on_cuda_is_the_references(tmp_path):
    check_against_reference(tmp_path, "--device", "cuda", "--dtype", "fp32", batches=(5,), count=12)


def test_contexts_that_are_too_long_lose_their_front(tmp_path):
    examples, weights = questions(20, seed=8), write_model(tmp_path / "model")
    by_sum, by_mean = reference_choices(weights, examples, positions=28)
    whole, _ = reference_choices(weights, examples)
    cut = sum(len(e["ctx"].encode()) + max(len(x.encode()) for x in e["endings"]) > 28 for e in examples)
    assert 0 < cut < 20 and by_sum != whole  # the front matters
    file = prepare(tmp_path, label(examples, by_sum))
    flags = ["eval", "--model", tmp_path / "model", "--hellaswag", file, "--micro-batch", 4, "--threads", 1,
             "--dtype", "fp32"]
    result = call(*flags, "--seq-len", 28)
    assert accuracies(result.stdout) == (20, sum(a == b for a, b in zip(by_sum, by_mean)), 20)
    assert f"warning: the contexts of {cut} of 20 questions are longer than --seq-len 28 leaves room for" in result.stderr
    assert "has an ending of" in fail(*flags, "--seq-len", 6, code=1)


def test_a_limit_takes_the_first_questions(tmp_path):
    examples, weights = questions(10), write_model(tmp_path / "model")
    by_sum, _ = reference_choices(weights, examples)
    labels = [*by_sum[:6], *((right + 1) % 4 for right in by_sum[6:])]
    file = prepare(tmp_path, label(examples, labels))
    flags = ["eval", "--model", tmp_path / "model", "--hellaswag", file, "--threads", 1, "--micro-batch", 8]
    assert accuracies(succeed(*flags))[::2] == (6, 10)
    assert accuracies(succeed(*flags, "--eval-batches", 3))[::2] == (6, 6)
    assert accuracies(succeed(*flags, "--eval-batches", 4))[::2] == (6, 8)
    assert accuracies(succeed(*flags, "--micro-batch", 2, "--eval-batches", 1))[::2] == (1, 1)


def test_questions_and_shards_together(data, tmp_path):
    write_model(tmp_path / "model")
    file = prepare(tmp_path, label(questions(5), [0, 1, 2, 3, 0]))
    output = succeed("eval", "--model", tmp_path / "model", "--hellaswag", file, "--val-data", data / "text_val_*.bin",
                     "--seq-len", 32, "--threads", 1)
    assert validation_loss(output) and bits_per_byte(output) and accuracies(output)[2] == 5


def words_of(file):
    """The file's header and its words, for a test to damage."""
    content = file.read_bytes()
    return list(struct.unpack("<256i", content[:1024])), list(np.frombuffer(content, np.uint16, offset=1024))


@pytest.mark.parametrize("what, message", [
    ("cut", "question 1 is cut off"), ("long", "6 bytes follow the last of its 2 questions"),
    ("magic", "not a file of questions (its first word is 7, expected 20240522); data/hellaswag.py makes one"),
    ("shard", "is a token shard: --val-data takes it"), ("version", "version 2 of the format is unknown"),
    ("none", "the header says 0 questions"), ("label", "question 0 has no ending that is right"),
    ("token", "question 0 holds token 400, but the vocabulary has 257"), ("number", "question 1 has another number"),
    ("vocabulary", "the data's vocabulary (50257 tokens) is larger than the model's (257)"),
    ("empty", "not a file of questions"), ("header", "truncated: the header needs 1024 bytes, the file has 100"),
])
def test_a_damaged_file_is_one_line(tmp_path, what, message):
    write_model(tmp_path / "model")
    file = prepare(tmp_path, label(questions(2), [0, 1]))
    header, words = words_of(file)
    second = words[1] // 2
    assert header[:3] == [20240522, 1, 2] and header[3] == 2 * max(second, len(words) - second) and header[4] == 257
    for name, at, value in (("magic", 0, 7), ("shard", 0, 20240520), ("version", 1, 2), ("none", 2, 0), ("vocabulary", 4, 0)):
        if what == name:
            header[at] = value
    for name, at, value in (("label", 3, 4), ("token", 6, 400), ("number", second + 2, 0)):
        if what == name:
            words[at] = value
    words = words[:-1] if what == "cut" else [*words, 1, 2, 3] if what == "long" else words
    content = struct.pack("<256i", *header) + np.array(words, np.uint16).tobytes()
    file.write_bytes(content[: {"empty": 0, "header": 100}.get(what, len(content))])
    line = fail("eval", "--model", tmp_path / "model", "--hellaswag", file, "--threads", 1,
                code=2 if what == "vocabulary" else 1)
    assert message in line and (what == "vocabulary" or str(file) in line)


def test_wrong_calls(data, tmp_path):
    assert "no such file" in fail("eval", "--model", "tiny", "--hellaswag", tmp_path / "none", code=1).lower()
    assert "--hellaswag is for eval" in fail("--data", data / "text_train_*.bin", *TINY, "--hellaswag", "x", code=2)
    file = prepare(tmp_path, label(questions(1), [0]))
    assert "it a file of questions? eval --hellaswag takes it" in fail("--data", file, *TINY, code=1)
