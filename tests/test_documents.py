"""test_documents.py: the documents that data/prepare.py finds in files of all shapes, and what it says of those that it
cannot read; most of it without a process for each.
"""
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")

DATA = Path(__file__).resolve().parent.parent / "data"
SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
sys.path.insert(0, str(DATA))

import compressed  # noqa: E402
import documents  # noqa: E402
import encoders  # noqa: E402
import errors  # noqa: E402
import json_documents  # noqa: E402
import parquet_documents  # noqa: E402
import prepare  # noqa: E402
import text_documents  # noqa: E402
from faults import Faults  # noqa: E402
from text_documents import Separator  # noqa: E402
from token_files import read_shard  # noqa: E402

TEXTS = ["naïve", "two\nlines", "日本"]
LINES = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS)


def read(path, **options):
    return [text for text, begins in documents.read_documents(str(path), **options)]


def file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


def parquet(path, column, **options):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, **options)
    return path


@pytest.mark.parametrize("name, content", [
    ("c4-train.00000-of-01024.json.gz", gzip.compress(LINES.encode())),
    ("a.json", LINES.encode()),
    ("a.json", LINES.replace("\n", "\r\n").encode("utf-8-sig")),
    ("a.json", json.dumps([{"text": text} for text in TEXTS]).encode()),
    ("a.json", json.dumps([{"text": text} for text in TEXTS], indent=1, ensure_ascii=False).encode("utf-16")),
    ("a.json", "\n".join(json.dumps({"text": text}, indent=1) for text in TEXTS).encode()),
    ("a.jsonl", LINES.encode("utf-16")),
    ("a.jsonl", LINES.encode("utf-16-le")),  # without a mark
    ("a.jsonl", LINES.encode("utf-32")),
    ("a.jsonl", (LINES + '{"text": null}\n').encode()),
    ("a.jsonl", LINES.replace("naïve", "na\\u00efve").encode()),
], ids=range(11))
def test_shapes_of_json(tmp_path, name, content):
    assert read(file(tmp_path, name, content)) == TEXTS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_encodings_of_text(tmp_path, encoding):
    text = "Grüße,\r\nworld\u2028\x85.\n"
    assert read(file(tmp_path, "a.txt", text.encode(encoding))) == [text]
    assert read(file(tmp_path, "a.txt.gz", gzip.compress(text.encode(encoding)))) == [text]


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary", "dictionary", "binary(3)"])
def test_kinds_of_parquet_columns(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    column = pyarrow.array([b"one", None, b"two", "ü!".encode()], pyarrow.binary())
    if kind == "dictionary":
        column = column.cast(pyarrow.string()).dictionary_encode()
    else:
        column = column.cast(pyarrow.binary(3) if kind == "binary(3)" else getattr(pyarrow, kind)())
    assert read(parquet(tmp_path / "a.parquet", column)) == ["one", "two", "ü!"]


def test_parquet_columns_of_views_and_of_nothing(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    for kind in ("string_view", "binary_view"):
        if hasattr(pyarrow, kind):  # which some versions read but do not write
            column = pyarrow.array(["one", None]).cast(getattr(pyarrow, kind)())
            assert list(parquet_documents._bytes_of(pyarrow, column)) == [b"one", b""]
    assert read(parquet(tmp_path / "a.parquet", pyarrow.array([None, None], pyarrow.null()))) == []


# name, content, what is said when the run stops there, the documents that remain with --on-error skip, what it says then
FAULTS = [
    ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n{"text": "\xff"}\n{"text": "y"}\n',
     ":2: not UTF-8 (byte 0xe9 at offset 13)", ["x", "y"], "skipped 2 lines: not UTF-8; the first is {path}:2"),
    ("a.jsonl.gz", gzip.compress(b"[" * 100_000 + b'\n{"text": "y"}\n'),
     ":1: not valid JSON (nested too deeply)", ["y"], "skipped 1 line: not valid JSON; the first is {path}:1"),
    ("a.jsonl", b'{"text": "y"}\n5\n', ":2: a JSON object is needed", ["y"],
     "skipped 1 line: a JSON object is needed; the first is {path}:2"),
    ("a.json", b'[{"text": "y"},\n{"text": 3},\n{"text" 4}]', ":2: field 'text' is a int, not a string", ["y"],
     "skipped 1 file: not valid JSON; the first is {path}:3"),
    ("a.json", b'[{"text": "y"},\n', ":2: truncated JSON", ["y"], "skipped 1 file: truncated JSON"),
    ("a.json", b"[" * 100_000, ":1: not valid JSON (nested too deeply)", [], "skipped 1 file: not valid JSON"),
    ("a.json", b'[{"text": "y"},\n\n{"text": "\xff"}]', ":3: not UTF-8", [], "skipped 1 file: not UTF-8"),
    ("a.json", b'{\n"id": 5}', ":1: no field 'text' (fields: id)", [], "skipped 1 object: no field 'text'"),
    ("a.txt", b"one<|endoftext|>\n\ncaf\xe9<|endoftext|>two", ": not UTF-8 (byte 0xe9 at offset 21) in line 3",
     ["one", "two"], "skipped 1 document: not UTF-8; the first is {path}:3"),
    ("a.txt", "x".encode("utf-16") + b"\0", ": not UTF-16-LE", [], "skipped 1 file: not UTF-16-LE"),
    ("a.jsonl", LINES.encode("utf-16")[:-1], ": not UTF-16-LE", TEXTS[:2], "skipped 1 file: not UTF-16-LE"),
    ("a.txt.gz", gzip.compress(b"x" * 99)[:-9], ": damaged or truncated gzip", [], "skipped 1 file: damaged"),
    ("a.parquet", b"PAR1 and no more", ": not a readable Parquet file", [], "skipped 1 file: not a readable Parquet file"),
]


@pytest.mark.parametrize("name, content, stops, remain, skips", FAULTS, ids=range(len(FAULTS)))
def test_faults_stop_or_are_counted(tmp_path, name, content, stops, remain, skips):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = file(tmp_path, name, content)
    with pytest.raises(errors.DataError) as stopped:
        read(path)
    assert str(stopped.value).startswith(f"{path}{stops}") and "--on-error skip" in str(stopped.value)
    faults = Faults(skip=True)
    assert read(path, faults=faults) == remain
    assert faults.summary()[-1].startswith(skips.format(path=path))


def test_bad_rows_of_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    bad = pyarrow.array([b"one", b"caf\xe9", b"two"], pyarrow.binary()).view(pyarrow.string())
    path = parquet(tmp_path / "a.parquet", bad)
    with pytest.raises(errors.DataError, match="a.parquet, row 2: not UTF-8 .byte 0xe9 at offset 3"):
        read(path)
    faults = Faults(skip=True)
    assert read(path, faults=faults) == ["one", "two"]
    assert faults.summary() == [f"skipped 1 row: not UTF-8; the first is {path}, row 2"]


@pytest.mark.parametrize("separator, content, expected", [
    ("\n\n", b"one\r\n\r\ntwo\n\nthree\n", ["one", "two", "three\n"]),
    ("<|endoftext|>", b"one\n<|endoftext|>\n\n  two\r\n<|endoftext|>\r\n", ["one", "  two"]),
    (None, b"one<|endoftext|>two", ["one", "two"]),
    ("=", b"==one=<|endoftext|>=", ["one", "<|endoftext|>"]),
    ("=", b"\none\n", ["\none\n"]),
])
def test_separators_and_the_line_ends_beside_them_are_left_out(tmp_path, monkeypatch, separator, content, expected):
    for block in (1 << 24, 64):
        monkeypatch.setattr(text_documents, "MAX_DOCUMENT_BYTES", block)
        given = Separator(separator) if separator else None
        assert read(file(tmp_path, "a.txt", content), separator=given) == expected


def test_blocks_do_not_change_the_documents(tmp_path, monkeypatch):
    texts = [f"{i} " + "words " * (i % 9) + "end" for i in range(300)]
    path = file(tmp_path, "a.txt", "\r\n<|end of|>\r\n".join(texts).encode())
    monkeypatch.setattr(text_documents, "MAX_DOCUMENT_BYTES", 100)
    separator = Separator("<|end of|>")
    assert read(path, separator=separator) == texts and separator.cuts == 299


def test_a_long_document_comes_in_parts(tmp_path, monkeypatch):
    text = "".join(random.Random(1).choices(["word ", "é\n", "  ", "x" * 50], k=2000))
    monkeypatch.setattr(text_documents, "MAX_DOCUMENT_BYTES", 1000)
    parts = list(documents.read_documents(str(file(tmp_path, "a.txt", text.encode()))))
    assert "".join(part for part, _ in parts) == text
    assert [begins for _, begins in parts] == [True] + [False] * (len(parts) - 1) and len(parts) > 10
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 300)
    batches = list(prepare.batches_of(iter([(text, True), ("next", True)]), 0))
    tokens = np.concatenate([prepare.encode_parts(encoders.ByteEncoder(), batch)[0] for batch in batches])
    assert bytes(tokens[tokens < 256].astype(np.uint8)).decode() == text + "next"
    assert np.flatnonzero(tokens == 256).tolist() == [0, len(text.encode()) + 1]
    for batch in batches[:-1]:
        assert sum(len(part) for part, _, _ in batch) < 600


def test_too_much_of_too_little(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "BOMB_BYTES", 1 << 16)
    monkeypatch.setattr(compressed, "BOMB_RATIO", 100)
    for name, plain in (("a.txt.gz", b" " * 500_000), ("a.jsonl.gz", b'{"text": "abc"}\n' * 30_000)):
        with pytest.raises(errors.DataError, match=f"{name}: a decompression bomb: its .* bytes become more than"):
            read(file(tmp_path, name, gzip.compress(plain)))
    monkeypatch.setattr(json_documents, "MAX_JSON_BYTES", 1000)
    path = file(tmp_path, "a.jsonl", b'{"text": "' + b"x" * 5000 + b'"}\n{"text": "y"}\n')
    faults = Faults(skip=True)
    assert read(path, faults=faults) == ["y"]
    assert faults.summary()[0].endswith("a.jsonl:1")
    path = parquet(tmp_path / "b.parquet", ["x" * 5000] * 500, compression="zstd")
    with pytest.raises(errors.DataError, match="b.parquet: a decompression bomb"):
        read(path)
    monkeypatch.setattr(parquet_documents, "MAX_ROW_BYTES", 1000)
    with pytest.raises(errors.DataError, match="b.parquet, row 1: longer than"):
        read(path)


def zstd_frame(window_log, content):
    """One raw block in a frame that asks for a window of 2^window_log bytes (RFC 8878, 3.1.1)."""
    block = (len(content) << 3 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3]) + block + content


def test_long_zstd_windows_are_read_and_longer_ones_are_not_called_damaged(tmp_path):
    pytest.importorskip("zstandard")
    assert read(file(tmp_path, "a.jsonl.zst", zstd_frame(31, LINES.encode()))) == TEXTS
    with pytest.raises(errors.DataError, match="a zstd window above 2 GiB") as refused:
        read(file(tmp_path, "b.jsonl.zst", zstd_frame(32, LINES.encode())))
    assert "damaged" not in str(refused.value)


def test_zstd_is_read_in_linear_time(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    plain = b'{"text": "%d"}\n' * 3_000_000
    path = file(tmp_path, "a.jsonl.zst", zstandard.compress(plain) + zstandard.compress(b"x") * 1000)
    start, size = time.process_time(), 0
    with compressed.open_plain(str(path)) as (stream, _):
        while chunk := stream.read(8192):
            size += len(chunk)
    assert size == len(plain) + 1000
    assert time.process_time() - start < 20, "a fraction of a second, but minutes if it copies what is left each time"


def test_what_is_no_file_is_said_and_not_read(tmp_path):
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name, kind in (("fifo.txt", "a FIFO"), ("zero.jsonl", "a device")):
        with pytest.raises(errors.UsageError, match=f"{name}: not a regular file but {kind}"):
            documents.find_inputs([str(tmp_path / name)])
    (tmp_path / "gone.md").symlink_to("nowhere")
    (tmp_path / "text.txt").write_text("text")
    faults = Faults(skip=True)
    found = documents.find_inputs([str(tmp_path)])
    assert [text for path in found for text in read(path, faults=faults)] == ["text"]
    assert len(faults.summary()) == 2 and "fifo.txt" in faults.summary()[0] and "gone.md" in faults.summary()[1]


def test_json_beside_data_is_about_the_data(tmp_path):
    file(tmp_path, "dataset_infos.json", b"{}")
    file(tmp_path, "a.json.gz", gzip.compress(LINES.encode()))
    assert documents.find_inputs([str(tmp_path)]) == [str(tmp_path / "a.json.gz")]
    (tmp_path / "a.json.gz").unlink()
    assert documents.find_inputs([str(tmp_path)]) == [str(tmp_path / "dataset_infos.json")]


# ---- the whole command


def run(capfd, tmp_path, *arguments):
    """prepare.py's main() into tmp_path/out; returns what it said."""
    assert prepare.main([*map(str, arguments), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]) == 0
    return capfd.readouterr().err


def counts(tmp_path):
    return {split: sum(len(read_shard(path)[0]) for path in (tmp_path / "out").glob(f"*_{split}_*.bin"))
            for split in ("train", "val")}


def test_small_texts_validate_on_a_window_or_on_nothing(capfd, tmp_path):
    path = file(tmp_path, "a.txt", b"It was the best of times. " * 100)  # 2,601 tokens
    assert "the last 257 tokens validate" in run(capfd, tmp_path, path)
    assert counts(tmp_path) == {"train": 2601 - 257, "val": 258}  # and an end-of-text token before them
    path.write_bytes(path.read_bytes() * 5)
    assert "the last 1,025 tokens validate" in run(capfd, tmp_path, path)
    path.write_bytes(b"It was the worst of times. " * 30)
    assert "no validation data: of 811 tokens none are held out" in run(capfd, tmp_path, path)
    assert counts(tmp_path) == {"train": 811, "val": 0}, "nor does the validation shard of an earlier run remain"
    lines = "".join(json.dumps({"text": f"{number}: short"}) + "\n" for number in range(300))
    run(capfd, tmp_path, file(tmp_path, "a.jsonl", lines.encode()))  # the few that are held out are not 257 tokens
    assert counts(tmp_path)["val"] in (257, 258)


def test_what_is_said_of_separators(capfd, tmp_path):
    path = file(tmp_path, "a.txt", b"one<|endoftext|>two three")
    assert "plain text is cut at each of its 1 <|endoftext|>, which are left out" in run(capfd, tmp_path, path)
    said = run(capfd, tmp_path, path, "--split-on", r"\n\n")
    assert r"--split-on '\n\n' cut nothing: every text file is one document" in said
    assert f"<|endoftext|> stands in the text of documents (1, the first of them in {path})" in said
    path = file(tmp_path, "a.jsonl", b'{"text": "some text"}\n{\n')
    said = run(capfd, tmp_path, path, "--split-on", "x", "--on-error", "skip")
    assert "it is for plain text, and no input is" in said
    assert f"skipped 1 line: not valid JSON; the first is {path}:2\n" in said


def test_workers_do_not_change_a_long_text(tmp_path):
    path = file(tmp_path, "a.txt", b"some words, " * 300_000)
    shards = []
    for workers in ("1", "3"):
        prepare.main([str(path), "--out", str(tmp_path / workers), "--tokenizer", "bytes", "--workers", workers])
        shards.append([shard.read_bytes() for shard in sorted((tmp_path / workers).iterdir())])
    assert shards[0] == shards[1] and len(shards[0]) == 3


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_leaves_no_temporary_shards(tmp_path, number, code):
    with open(tmp_path / "a.txt", "wb") as sparse:
        sparse.truncate(1 << 30)
    out = tmp_path / "out"
    command = [sys.executable, str(DATA / "prepare.py"), str(tmp_path / "a.txt"), "--out", str(out), "--tokenizer", "bytes",
               "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not out.exists() or not list(out.iterdir()):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, number)  # as a terminal does, the workers included
    _, said = process.communicate(timeout=60)
    assert process.returncode == code and said.count("\n") == 1 and said.startswith("prepare.py: ")
    assert list(out.iterdir()) == []


def test_a_full_disk_leaves_no_temporary_shards(tmp_path):
    """A file may not grow beyond 1 KiB: the write fails when the buffer is written at the end."""
    path = file(tmp_path, "a.txt", b"some text " * 300)
    command = ["sh", "-c", 'ulimit -f 2; exec "$@"', "sh", sys.executable, str(DATA / "prepare.py"), str(path), "--out",
               str(tmp_path / "out"), "--tokenizer", "bytes", "--val-fraction", "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "cannot be written (File too large)" in result.stderr
    assert not [path for path in (tmp_path / "out").iterdir() if path.name != "tokenizer.bin"]


@pytest.mark.parametrize("raised, code, message", [
    (RecursionError("too deep"), 1, "RecursionError: too deep"),
    (MemoryError(), 1, "too little memory"),
    (OSError(28, "No space left on device", "/some/file"), 1, "/some/file: No space left on device"),
    (ValueError("two\nlines"), 1, "ValueError: two lines"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (errors.UsageError("wrong"), 2, "wrong"),
])
def test_whatever_happens_ends_with_one_line(capsys, raised, code, message):
    def main(_):
        raise raised

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        assert errors.run_main(main, []) == code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


# ---- long runs of characters


def naive_merge(piece, ranks):
    parts = [piece[at : at + 1] for at in range(len(piece))]
    while True:
        pairs = [(ranks[a + b], at) for at, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_merging_takes_the_pair_of_the_lowest_rank_first():
    rng = random.Random(3)
    ranks = {bytes([byte]): byte for byte in range(256)}
    for rank in range(256, 330):  # some tokens can come about in several ways
        a, b = rng.sample(sorted(token for token in ranks if set(token) <= set(b"abc")), 2)
        ranks.setdefault(a + b, rank)
    for _ in range(200):
        piece = bytes(rng.choices(b"abc", k=rng.randint(0, 60)))
        assert encoders.merge_bytes(piece, ranks) == naive_merge(piece, ranks)


def test_long_runs_have_tiktoken_s_tokens(monkeypatch):
    pytest.importorskip("tiktoken")
    if not (SHARED / "gpt2" / "encoder.json").exists():
        pytest.skip("no shared data beside the repository: GPT-2's tokenizer is not tested")
    encoder = encoders.Gpt2Encoder(str(SHARED / "gpt2"))
    assert len(encoder.encode("a" * 1_000_000)) == 250_000  # tiktoken needs minutes
    assert len(encoder.encode("x" + " " * 1_000_000 + "x")) == 1_000_001  # and its stack overflows
    monkeypatch.setattr(encoders, "LONG_PIECE", 8)
    rng = random.Random(1)
    runs = ["a", " ", "\n", "=", "é", "日", "1", "'s", "\u00a0", "\x1c", "🙂", "the", "\t", "\r\n"]
    for _ in range(300):
        text = "".join(rng.choice(runs) * rng.choice([1, 1, 2, 9, 60]) for _ in range(12))
        assert encoder.encode(text).tolist() == encoder._encoding.encode_ordinary(text)
