"""test_prepare.py: data/prepare.py as a user runs it: what goes in comes out of the shards again, whatever the format
and the number of workers, and every bad input ends with one line and an exit code.
"""
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")

DATA = Path(__file__).resolve().parent.parent / "data"
SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
sys.path.insert(0, str(DATA))

from token_files import ShardWriter, read_shard  # noqa: E402

END_OF_TEXT = 256  # of the byte tokenizer


def run(*arguments, script="prepare.py"):
    command = [sys.executable, str(DATA / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def prepare(tmp_path, *arguments, tokenizer="bytes"):
    """Runs it into tmp_path/out and returns that folder."""
    result = run(*arguments, "--out", tmp_path / "out", "--tokenizer", tokenizer)
    assert result.returncode == 0, result.stderr
    return tmp_path / "out"


def fails(code, *arguments, script="prepare.py"):
    """Runs it, expects failure with one line on stderr, and returns the line."""
    result = run(*arguments, script=script)
    assert result.returncode == code, (result.returncode, result.stderr)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith(f"{script}: "), result.stderr
    return result.stderr


def tokens_of(folder, split):
    shards = [read_shard(path) for path in sorted(folder.glob(f"*_{split}_*.bin"))]
    assert all(vocabulary == 257 for _, vocabulary in shards)
    return np.concatenate([tokens for tokens, _ in shards]) if shards else np.zeros(0, np.uint16)


def documents_of(folder, split):
    tokens = tokens_of(folder, split)
    starts = [*np.flatnonzero(tokens == END_OF_TEXT), len(tokens)]
    assert starts[0] == 0, "a split must begin with end-of-text"
    return [bytes(tokens[a + 1 : b].astype(np.uint8)).decode() for a, b in zip(starts, starts[1:])]


def stories(count, seed=0):
    rng = random.Random(seed)
    words = ["café", "the", "日本", "and", "🙂", "of", "river"]
    return [f"{i}: " + " ".join(rng.choices(words, k=rng.randint(1, 60))) for i in range(count)]


def write_jsonl(path, texts, field="text"):
    lines = "".join(json.dumps({"id": i, field: text}) + "\n\n" for i, text in enumerate(texts))
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def test_every_document_is_in_exactly_one_split(tmp_path):
    texts = stories(400)
    path = write_jsonl(tmp_path / "stories.jsonl", texts)
    out = prepare(tmp_path, path, "--val-fraction", "0.1")
    train, validation = documents_of(out, "train"), documents_of(out, "val")
    assert sorted(train + validation) == sorted(texts)
    assert [text for text in texts if text in set(train)] == train, "the order is kept"
    assert 15 < len(validation) < 80
    assert sorted(file.name for file in out.iterdir()) == [
        "stories_train_000000.bin", "stories_val_000000.bin", "tokenizer.bin",
    ]


def test_the_split_depends_on_the_text_alone(tmp_path):
    texts = stories(200)
    first = prepare(tmp_path / "1", write_jsonl(tmp_path / "a.jsonl", texts), "--val-fraction", "0.1")
    second = prepare(tmp_path / "2", write_jsonl(tmp_path / "b.jsonl", texts[::-1]), "--val-fraction", "0.1")
    assert documents_of(first, "val") == documents_of(second, "val")[::-1]


def test_workers_do_not_change_a_byte(tmp_path):
    texts = ["x" * 40_000 + text for text in stories(100)]  # four batches
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    results = []
    for workers in (1, 3):
        out = prepare(tmp_path / str(workers), path, "--workers", workers, "--shard-tokens", "1_000_000")
        results.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert results[0] == results[1]
    assert len(results[0]) > 4


def test_shards_hold_as_many_tokens_as_asked(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghi" * 1111)  # 9,999 bytes and the end-of-text token
    out = prepare(tmp_path, tmp_path / "a.txt", "--shard-tokens", "3000", "--val-fraction", "0")
    lengths = [len(read_shard(path)[0]) for path in sorted(out.glob("a_train_*.bin"))]
    assert lengths == [3000, 3000, 3000, 1000]
    assert not list(out.glob("a_val_*"))
    out = prepare(tmp_path, tmp_path / "a.txt", "--shard-tokens", "3300", "--val-fraction", "0")
    lengths = [len(read_shard(path)[0]) for path in sorted(out.glob("a_train_*.bin"))]
    assert lengths == [3300, 3300, 3400], "a last shard of 100 joins the one before; older files are gone"


def test_one_document_is_cut_so_that_both_splits_have_some(tmp_path):
    text = "".join(stories(50))
    (tmp_path / "a.txt").write_text(text)
    for fraction in ("0.1", "0.999"):  # 0.999: the hash would hold it out
        out = prepare(tmp_path, tmp_path / "a.txt", "--val-fraction", fraction)
        train, validation = tokens_of(out, "train"), tokens_of(out, "val")
        assert validation[0] == END_OF_TEXT
        assert bytes(np.concatenate([train[1:], validation[1:]]).astype(np.uint8)).decode() == text


def test_text_files_directories_globs_and_separators(tmp_path):
    folder = tmp_path / "in put"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\n\n\n\nthree")  # with a byte order mark
    (folder / "deep" / "a.md").write_text("four")
    (folder / "deep" / "z.txt.gz").write_bytes(gzip.compress("fünf".encode()))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "empty.txt").write_text(" \n")
    out = prepare(tmp_path, folder, "--val-fraction", "0")
    assert documents_of(out, "train") == ["one\n\ntwo\n\n\n\nthree", "four", "fünf"]
    assert list(out.glob("in_put_train_*"))
    out = prepare(tmp_path / "2", folder, "--val-fraction", "0", "--split-on", r"\n\n", "--name", "n")
    assert documents_of(out, "train")[:3] == ["one", "two", "three"]
    out = prepare(tmp_path / "2", folder / "*" / "*.md", folder / "b.txt", folder / "deep/a.md", "--name", "n",
                  "--val-fraction", "0")
    assert documents_of(out, "train") == ["four", "one\n\ntwo\n\n\n\nthree"]


def test_jsonl_gz_and_another_field(tmp_path):
    texts = stories(5) + ["", "half a pair: \ud83d"]
    out = prepare(tmp_path, write_jsonl(tmp_path / "a.jsonl.gz", texts, "body"), "--text-field", "body",
                  "--val-fraction", "0")
    assert documents_of(out, "train") == texts[:5] + ["half a pair: \ufffd"]
    assert list(out.glob("a_train_*"))


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    plain = write_jsonl(tmp_path / "plain.jsonl", stories(5000)).read_bytes()
    half = plain.index(b"\n", len(plain) // 2) + 1
    frames = [zstandard.compress(part) for part in (plain[:half], plain[half:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert documents_of(prepare(tmp_path, tmp_path / "a.jsonl.zst", "--val-fraction", "0"), "train") == stories(5000)
    (tmp_path / "cut.txt.zst").write_bytes(frames[0][:-20])
    assert "truncated zstd" in fails(1, tmp_path / "cut.txt.zst", "--out", tmp_path / "o", "--tokenizer", "bytes")
    (tmp_path / "bad.txt.zst").write_bytes(b"not zstd at all")
    assert "damaged zstd" in fails(1, tmp_path / "bad.txt.zst", "--out", tmp_path / "o", "--tokenizer", "bytes")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    texts = stories(3000)
    table = pyarrow.table({"text": texts + [None], "n": list(range(3001))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    assert documents_of(prepare(tmp_path, tmp_path / "a.parquet", "--val-fraction", "0"), "train") == texts
    arguments = (tmp_path / "a.parquet", "--out", tmp_path / "o", "--tokenizer", "bytes")
    assert "no column 'body' (columns: text, n)" in fails(1, *arguments, "--text-field", "body")
    assert "column 'n' is a int64" in fails(1, *arguments, "--text-field", "n")
    (tmp_path / "b.parquet").write_text("no Parquet")
    assert "b.parquet: not a readable Parquet file" in fails(1, tmp_path / "b.parquet", "--out", tmp_path / "o",
                                                             "--tokenizer", "bytes")


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2: not valid JSON"),
    ("a.jsonl", b'{"text": "x"}\n\n{"body": "x", "id": 1}\n', "a.jsonl:3: no field 'text' (fields: body, id)"),
    ("a.jsonl", b"[1]\n", "a.jsonl:1: a JSON object is needed, this is a list"),
    ("a.jsonl", b'{"text": 5}\n', "a.jsonl:1: field 'text' is a int"),
    ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:1: not UTF-8"),
    ("a.txt", b"caf\xe9", "a.txt: not UTF-8 (byte 0xe9 at offset 3)"),
    ("a.txt", b"", "no text in"),
    ("a.txt", b" \n", "no text in"),
    ("a.jsonl", b"\n", "no text in"),
    ("a.txt.gz", b"not gzip", "damaged or truncated gzip"),
    ("a.txt.gz", gzip.compress(b"x" * 999)[:-9], "damaged or truncated gzip"),
])
def test_bad_content(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in fails(1, tmp_path / name, "--out", tmp_path / "out", "--tokenizer", "bytes")
    assert not list((tmp_path / "out").iterdir()), "something was left behind"


def test_an_error_after_many_batches_stops_the_workers_and_leaves_nothing(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 300_000 for _ in range(40)])
    with path.open("a") as file:
        file.write("{\n")
    assert "a.jsonl:81: not valid JSON" in fails(1, path, "--out", tmp_path / "out", "--tokenizer", "bytes",
                                                 "--workers", "2")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("arguments, message", [
    (["{dir}/absent.txt"], "absent.txt: no such file"),
    (["{dir}/*.csv"], "no such file"),
    (["{dir}/a.pdf"], "a.pdf: unknown extension '.pdf'"),
    (["{dir}/a.txt", "--val-fraction", "1"], "--val-fraction"),
    (["{dir}/a.txt", "--val-fraction", "x"], "--val-fraction"),
    (["{dir}/a.txt", "--shard-tokens", "0"], "--shard-tokens"),
    (["{dir}/a.txt", "--workers", "0"], "--workers"),
    (["{dir}/a.txt", "--name", "a/b"], "--name"),
    (["{dir}/a.txt", "--tokenizer", "bert"], "--tokenizer"),
    (["{dir}/a.txt", "--split-on", ""], "--split-on needs a value"),
    (["{dir}/a.txt", "--vocab-dir", ""], "--vocab-dir needs a value"),
    ([""], "a name is empty"),
    (["{dir}/a.txt", "--tokenizer", "bytes", "--vocab-dir", "{dir}"], "--vocab-dir"),
    ([], "input"),
])
def test_bad_command_line(tmp_path, arguments, message):
    for name in ("a.pdf", "a.txt"):
        (tmp_path / name).write_text("text")
    filled = [argument.format(dir=tmp_path) for argument in arguments]
    if "--tokenizer" not in filled:
        filled += ["--tokenizer", "bytes"]
    assert message in fails(2, *filled, "--out", tmp_path / "out")


def test_other_failures(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("text")
    assert "no file in this directory" in fails(1, tmp_path / "empty", "--out", tmp_path / "out")
    assert "a.txt" in fails(1, tmp_path / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / "a.txt" / "out")
    pytest.importorskip("tiktoken")
    line = fails(2, tmp_path / "a.txt", "--out", tmp_path / "out", "--vocab-dir", tmp_path)
    assert "--vocab-dir needs GPT-2's encoder.json" in line
    for content in ("{}", "[", "[1]", '{"a": "b"}', '{"\u4000": 1}'):
        (tmp_path / "encoder.json").write_text(content)
        line = fails(1, tmp_path / "a.txt", "--out", tmp_path / "out", "--vocab-dir", tmp_path)
        assert "encoder.json: not GPT-2's vocabulary" in line


def test_byte_tokenizer_file(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    content = (prepare(tmp_path, tmp_path / "a.txt") / "tokenizer.bin").read_bytes()
    assert np.frombuffer(content[:16], "<i4").tolist() == [20240328, 2, 257, 256]
    expected = b"".join(bytes([1, byte]) for byte in range(256)) + b"\x0d<|endoftext|>"
    assert content[1024:] == expected


def test_shard_writer_takes_a_tail_across_a_lone_token(tmp_path):
    with ShardWriter(str(tmp_path), 257, 10) as writer:
        writer.append(np.arange(21, dtype=np.uint16))
        assert writer.take_tail(3).tolist() == [18, 19, 20]
        assert writer.total == 18
        assert len(writer.commit("a", "train")) == 2
    assert len(list(tmp_path.iterdir())) == 2


# ---- with GPT-2's vocabulary, where the shared data is at hand


@pytest.fixture
def gpt2():
    pytest.importorskip("tiktoken")
    if not (SHARED / "gpt2" / "encoder.json").exists():
        pytest.skip("no shared data beside the repository: GPT-2's tokenizer is not tested")
    return SHARED / "gpt2"


def test_tinyshakespeare_is_the_same_as_llm_c_s(tmp_path, gpt2):
    url = (SHARED / "text" / "tinyshakespeare.txt").as_uri()
    result = run("--url", url, "--out", tmp_path, "--vocab-dir", gpt2, script="tinyshakespeare.py")
    assert result.returncode == 0, result.stderr
    for split in ("train", "val"):
        ours, vocabulary = read_shard(tmp_path / f"tinyshakespeare_{split}_000000.bin")
        theirs, _ = read_shard(SHARED / "shards" / f"tinyshakespeare_{split}.bin")
        assert vocabulary == 50257
        assert np.array_equal(ours, theirs)


def test_gpt2_encoding_of_the_corpus(tmp_path, gpt2):
    """text/corpus_val.txt may hold the documents in another form than the shard, so they are taken from the shard."""
    theirs, _ = read_shard(SHARED / "shards" / "corpus_val_000000.bin")
    from encoders import Gpt2Encoder

    encoder = Gpt2Encoder(str(gpt2))
    vocabulary = encoder.token_bytes()
    starts = [*np.flatnonzero(theirs == encoder.end_of_text), len(theirs)]
    texts = [b"".join(vocabulary[t] for t in theirs[a + 1 : b]).decode() for a, b in zip(starts, starts[1:])]
    path = write_jsonl(tmp_path / "corpus.jsonl", texts)
    result = run(path, "--out", tmp_path, "--vocab-dir", gpt2, "--val-fraction", "0", "--workers", "2")
    assert result.returncode == 0, result.stderr
    ours, _ = read_shard(tmp_path / "corpus_train_000000.bin")
    assert np.array_equal(ours, theirs)
    header = np.fromfile(tmp_path / "tokenizer.bin", "<i4", 4).tolist()
    assert header == [20240328, 2, 50257, 50256]
