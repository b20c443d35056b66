"""test_learning_study.py: scripts/learning_study.py from shards to table, with a few tokens."""
import csv
import json
import subprocess
import sys

import pytest
from program import PROGRAM, ROOT, write_shard

np = pytest.importorskip("numpy")
sys.path.insert(0, str(ROOT / "scripts"))

import learning_study  # noqa: E402


def study(*arguments, code=0):
    finished = subprocess.run([sys.executable, ROOT / "scripts/learning_study.py", *map(str, arguments)], cwd=ROOT,
                              capture_output=True, text=True)
    assert finished.returncode == code, finished.stderr
    return finished.stdout if code == 0 else finished.stderr


@pytest.fixture
def bpe(tmp_path):
    """A vocabulary of GPT-2's kind: 256 bytes, 300 merges of what was there before, and end-of-text as token 50256."""
    folder = tmp_path / "bpe"
    folder.mkdir()
    numbers = np.random.default_rng(0)
    tokens, merges = [chr(0x100 + byte) for byte in range(256)], []
    while len(merges) < 300:
        left, right = numbers.choice(tokens, 2)
        if left + right not in tokens:
            merges.append((left, right))
            tokens.append(left + right)
    encoder = {token: number for number, token in enumerate(tokens)} | {"<|endoftext|>": 50256}
    (folder / "encoder.json").write_text(json.dumps(encoder))
    (folder / "vocab.bpe").write_text("#version\n" + "".join(f"{left} {right}\n" for left, right in merges))
    return folder, tokens


def test_a_smaller_vocabulary_spells_the_same_text(bpe):
    folder, tokens = bpe
    table = learning_study.short_tokens(folder, 300)
    assert table[50256] == [299]
    for token, text in enumerate(tokens):
        assert max(table[token]) < 299
        assert "".join(tokens[short] for short in table[token]) == text
        assert len(table[token]) == 1 or token >= 299


def test_from_shards_to_table(bpe, tmp_path):
    folder, tokens = bpe
    numbers = np.random.default_rng(1)
    for split in ("train", "val"):
        write_shard(tmp_path / f"text_{split}_000000.bin", numbers.integers(0, len(tokens), 6000), vocabulary=50257)
    data, table = tmp_path / "data", tmp_path / "runs.csv"
    study("data", "--shards", tmp_path / "text_*.bin", "--bpe", folder, "--vocabulary", 300, "--out", data)
    command = ["run", "--program", PROGRAM, "--data", data, "--csv", table, "--sizes", "1m", "--tokens", 3072,
               "--validation-tokens", 1024, "--seeds", 1, 2, "--out", tmp_path / "runs", "--settings", "adafactor no momentum"]
    study(*command)
    rows = list(csv.DictReader(open(table)))
    by_rate = {float(row["lr"]): float(row["validation_loss"]) for row in rows if row["seed"] == "1"}
    best = min(by_rate, key=by_rate.get)
    assert min(by_rate) < best < max(by_rate) or len(by_rate) == 10
    assert [float(row["lr"]) for row in rows if row["seed"] == "2"] == [best]
    assert len({row["validation_loss"] for row in rows}) == len(rows) and all(int(row["state_bytes"]) > 0 for row in rows)
    assert list((tmp_path / "runs").iterdir()) == [tmp_path / "runs/1m.json"]

    study(*command)  # all of it is known
    assert list(csv.DictReader(open(table))) == rows
    report = study("report", "--csv", table)
    assert f"| adafactor no momentum | {best:.4g}" in report and " +- " in report

    assert "no shards match" in study("data", "--shards", tmp_path / "no*.bin", "--bpe", folder, "--out", data, code=1)
    assert "has no runs" in study("report", "--csv", tmp_path / "none.csv", code=1)
