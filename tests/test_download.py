"""test_download.py: the scripts that download data, against a server on the loopback that can break off, refuse, and
answer with part of a file.
"""
import base64
import hashlib
import http.server
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))

from download import download  # noqa: E402
from errors import DataError  # noqa: E402
from token_files import read_shard  # noqa: E402


class Server(http.server.ThreadingHTTPServer):
    """Serves self.files (path: bytes), keeps the Range headers it was sent, and obeys the attributes below."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.ranges = {}, []
        self.raw = {}  # path: the bytes of a whole answer, after which the connection closes
        self.tag = None  # the ETag of the files
        self.break_after = None  # bytes of a body after which the connection closes
        self.honour_ranges = True
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path in self.server.raw:
            self.wfile.write(self.server.raw[self.path])
            self.close_connection = True
            return
        body = self.server.files.get(self.path)
        if body is None:
            return self.send_error(404)
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        same = self.headers.get("If-Range") in (None, self.server.tag)
        first = int(re.match(r"bytes=(\d+)-$", asked)[1]) if asked and self.server.honour_ranges and same else 0
        if first and first >= len(body):
            return self.send_error(416)
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        if self.server.tag:
            self.send_header("ETag", self.server.tag)
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        self.wfile.write(body[first:][: self.server.break_after])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as instance:
        thread = threading.Thread(target=instance.serve_forever, args=[0.01], daemon=True)  # seconds until it sees its end
        thread.start()
        yield instance
        instance.shutdown()
        thread.join()


def run(script, *arguments):
    command = [sys.executable, str(DATA / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def fails(code, script, *arguments):
    result = run(script, *arguments)
    assert result.returncode == code, (result.returncode, result.stderr)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith(f"{script}: "), result.stderr
    return result.stderr


def test_resumes_where_it_was_cut(server, tmp_path):
    body = bytes(range(256)) * 20_000
    server.files["/f"] = body
    server.break_after = 3_000_000
    with pytest.raises(DataError, match="3000000 of 5120000 bytes; run again"):
        download(server.url + "/f", str(tmp_path / "f"))
    assert not (tmp_path / "f").exists()
    server.break_after = None
    download(server.url + "/f", str(tmp_path / "f"))
    assert (tmp_path / "f").read_bytes() == body
    assert server.ranges == [None, "bytes=3000000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    download(server.url + "/f", str(tmp_path / "f"))
    assert len(server.ranges) == 2, "a complete file is not asked for again"


@pytest.mark.parametrize("left", [b"xyz", b"x" * 99])
def test_starts_over_when_the_server_cannot_go_on(server, tmp_path, left):
    server.files["/f"] = b"the whole file"
    server.honour_ranges = len(left) > 14  # 99 bytes: 416, more than the file has
    (tmp_path / "f.part").write_bytes(left)
    download(server.url + "/f", str(tmp_path / "f"))
    assert (tmp_path / "f").read_bytes() == b"the whole file"


def test_another_file_is_not_joined_to_the_first(server, tmp_path):
    """The server has a new file of the same length, with another tag or with none."""
    for tags in (('"a"', '"b"'), (None, None)):
        server.files["/f"], server.tag, server.break_after = b"1" * 5000, tags[0], 3000
        with pytest.raises(DataError, match="3000 of 5000 bytes"):
            download(server.url + "/f", str(tmp_path / "f"))
        server.files["/f"], server.tag, server.break_after = b"2" * (5000 if tags[1] else 5001), tags[1], None
        download(server.url + "/f", str(tmp_path / "f"))
        assert set((tmp_path / "f").read_bytes()) == set(b"2")
        assert [path.name for path in tmp_path.iterdir()] == ["f"]
        (tmp_path / "f").unlink()


BODY = bytes(range(256)) * 20
SHA256 = hashlib.sha256(BODY).hexdigest()


def answer(*headers, body=BODY, status="200 OK"):
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "Connection: close", "", ""]).encode() + body


def chunks(*parts):
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


@pytest.mark.parametrize("reply, message", [
    (answer("Transfer-Encoding: chunked", body=chunks(BODY[:2000]) + b"7d0\r\n" + BODY[2000:2500]), "the connection closed after"),
    (answer("Transfer-Encoding: chunked", body=chunks(BODY[:2000])), "closed after 2000 bytes"),
    (b"HTTP/1.0 200 OK\r\n\r\n" + BODY[:2000], "neither how long the file is nor its checksum"),
    (answer(f'ETag: "{SHA256}"', body=BODY[:2000]), "does not have the sha256 checksum"),
    (answer("Content-Length: 9000"), "closed after 5120 of 9000 bytes"),
    (answer("Content-Length: many"), "Content-Length is not a number: 'many'"),
    (answer("Content-Length: -1"), "Content-Length is not a number: '-1'"),
    (answer("Content-Length: 5120", f'ETag: "{SHA256[::-1]}"'), "does not have the sha256 checksum"),
    (answer("Content-Length: 5120", "Content-MD5: " + base64.b64encode(bytes(16)).decode()), "the md5 checksum 0000"),
    (answer("Content-Length: 5120", "Digest: sha-256=" + base64.b64encode(bytes(32)).decode()), "the sha256 checksum 0000"),
    (answer("Content-Length: 5120", "Content-Range: bytes 0-5119/6000", status="206 Partial Content"), "with a part"),
    (answer("Location: /f", status="302 Found"), "cannot be reached|answers 302"),
    (b"nonsense\r\n", "cannot be reached"),
], ids=range(13))
def test_answers_that_are_not_the_file(server, tmp_path, reply, message):
    server.raw["/f"] = reply
    with pytest.raises(DataError, match=message):
        download(server.url + "/f", str(tmp_path / "f"))
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("reply", [
    answer("Transfer-Encoding: chunked", body=chunks(BODY[:2000], BODY[2000:]) + b"0\r\n\r\n"),
    answer(f'ETag: "{SHA256}"'),  # no length, but a checksum
    answer("Content-Length: 5120", "Repr-Digest: sha-256=:" + base64.b64encode(bytes.fromhex(SHA256)).decode() + ":"),
    answer("Content-Length: 5120", 'ETag: "not-a-checksum"'),
], ids=["chunked", "tag", "digest", "length"])
def test_answers_that_are_the_file(server, tmp_path, reply):
    server.raw["/f"] = reply
    download(server.url + "/f", str(tmp_path / "f"))
    assert (tmp_path / "f").read_bytes() == BODY and [path.name for path in tmp_path.iterdir()] == ["f"]


def test_what_hugging_face_says_before_it_redirects(server, tmp_path):
    server.files["/stored"] = BODY
    for headers, message in (((f'X-Linked-Etag: "{SHA256}"', "X-Linked-Size: 5120"), None),
                             ((f'X-Linked-Etag: "{"0" * 64}"',), "does not have the sha256 checksum 000"),
                             (("X-Linked-Size: 5121",), "the server says 5120 bytes and 5121 bytes")):
        server.raw["/f"] = answer("Location: /stored", *headers, status="302 Found", body=b"")
        (tmp_path / "f").unlink(missing_ok=True)
        if message:
            with pytest.raises(DataError, match=message):
                download(server.url + "/f", str(tmp_path / "f"))
        else:
            download(server.url + "/f", str(tmp_path / "f"))
        assert (tmp_path / "f").exists() == (message is None)


def test_a_checksum_that_the_caller_knows(server, tmp_path):
    server.files["/f"] = BODY
    with pytest.raises(DataError, match="checksum 1234"):
        download(server.url + "/f", str(tmp_path / "f"), sha256="1234")
    assert not list(tmp_path.iterdir())
    download(server.url + "/f", str(tmp_path / "f"), sha256=SHA256)


@pytest.mark.parametrize("url", ["", "no-scheme", "http://[::1", "http://host:port/f", "http://\u2028/f", "http://a b\n/"])
def test_bad_urls_are_one_line(tmp_path, url):
    with pytest.raises(DataError, match="cannot be reached"):
        download(url, str(tmp_path / "f"))


def test_refusals_are_one_line(server, tmp_path):
    server.files["/empty"] = b""
    with pytest.raises(DataError, match="answers 404"):
        download(server.url + "/absent", str(tmp_path / "f"))
    with pytest.raises(DataError, match="empty file"):
        download(server.url + "/empty", str(tmp_path / "f"))
    with pytest.raises(DataError, match="cannot be reached"):
        download("http://127.0.0.1:1/f", str(tmp_path / "f"))
    with pytest.raises(DataError, match="cannot be reached"):
        download((tmp_path / "absent").as_uri(), str(tmp_path / "f"))
    assert not list(tmp_path.iterdir())


def test_tinyshakespeare_bytes(server, tmp_path):
    text = "First Citizen:\nBefore we proceed\n\nAll:\nSpeak, speak.\n\n" * 40
    server.files["/input.txt"] = text.encode()
    result = run("tinyshakespeare.py", "--url", server.url + "/input.txt", "--out", tmp_path, "--tokenizer", "bytes")
    assert result.returncode == 0, result.stderr
    paths = [tmp_path / f"tinyshakespeare_{split}_000000.bin" for split in ("val", "train")]
    tokens = np.concatenate([read_shard(path)[0] for path in paths])
    assert bytes(tokens[tokens != 256].astype(np.uint8)).decode() == text
    assert (tokens == 256).sum() == 80
    assert tokens[0] == 256
    assert "answers 404" in fails(1, "tinyshakespeare.py", "--url", server.url + "/x", "--out", tmp_path / "2")


def test_fineweb_from_parquet(server, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    listing = [{"path": "sample/10BT/README.md"}]
    for index in (1, 0):
        path = f"sample/10BT/00{index}_00000.parquet"
        sink = pyarrow.BufferOutputStream()
        texts = [f"page {page} of file {index}" for page in range(300)]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink)
        server.files[f"/datasets/HuggingFaceFW/fineweb/resolve/main/{path}"] = sink.getvalue().to_pybytes()
        listing.append({"path": path})
    server.files["/api/datasets/HuggingFaceFW/fineweb/tree/main/sample/10BT"] = json.dumps(listing).encode()
    arguments = ("--url", server.url + "/", "--out", tmp_path, "--tokenizer", "bytes", "--val-fraction", "0.1")
    result = run("fineweb.py", *arguments, "--shards", "2")
    assert result.returncode == 0, result.stderr
    train, validation = (read_shard(tmp_path / f"fineweb_{split}_000000.bin")[0] for split in ("train", "val"))
    assert (train == 256).sum() + (validation == 256).sum() == 600
    assert bytes(train[1:15].astype(np.uint8)).startswith(b"page ")
    assert "the sample has 2 Parquet files" in fails(2, "fineweb.py", *arguments, "--shards", "3")
    assert "answers 404" in fails(1, "fineweb.py", *arguments, "--version", "100B")
    server.files["/api/datasets/HuggingFaceFW/fineweb/tree/main/sample/10BT"] = b"<html>"
    assert "not a listing" in fails(1, "fineweb.py", *arguments)


def test_fineweb_pretokenized(server, tmp_path):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 4
    shard = header.tobytes() + np.array([50256, 1, 2, 3], "<u2").tobytes()
    base = "/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"):
        server.files[base + name] = shard
    arguments = ("--pretokenized", "--url", server.url, "--out", tmp_path, "--vocab-dir", tmp_path)
    result = run("fineweb.py", *arguments, "--shards", "2")
    assert result.returncode == 0, result.stderr
    assert "8 train tokens in 2 shards" in result.stderr
    assert "no tokenizer.bin for sampling" in result.stderr
    assert read_shard(tmp_path / "fineweb_train_000002.bin")[0].tolist() == [50256, 1, 2, 3]
    assert "103 training shards" in fails(2, "fineweb.py", *arguments, "--shards", "104")
    server.files[base + "fineweb_train_000003.bin"] = shard[:-2]
    assert "remove it and run again" in fails(1, "fineweb.py", *arguments, "--shards", "3")


def test_no_network_is_one_line(tmp_path):
    line = fails(1, "fineweb.py", "--url", "http://127.0.0.1:1", "--out", tmp_path, "--tokenizer", "bytes")
    assert "check the network" in line
    assert "--shards" in fails(2, "fineweb.py", "--shards", "0", "--out", tmp_path)
