"""download.py: fetches a file over HTTP(S) or file://, resuming where an earlier attempt stopped. The file appears
under its name only when it is complete.
"""
import http.client
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

from errors import DataError

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30


def open_url(url, first_byte=0):
    """Opens a URL, asking for the bytes from first_byte on; throws DataError naming the URL and the cause."""
    request = urllib.request.Request(url, headers={"User-Agent": "train_gpt2"})
    if first_byte:
        request.add_header("Range", f"bytes={first_byte}-")
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing after first_byte: complete, or another file
            return None
        raise DataError(f"{url}: the server answers {error.code} {error.reason}") from None
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(
            f"{url}: cannot be reached ({reason}); check the network, or give a mirror with --url"
        ) from None


def download(url, path, sha256=None):
    """Fetches url to path unless the file is there already; returns path.

    Received bytes are kept in path.part; a later call goes on from there if the server allows it. Throws DataError when
    the server cannot be reached, refuses, or closes the connection early.
    """
    if os.path.exists(path):
        return path
    part = path + ".part"
    have = os.path.getsize(part) if os.path.exists(part) else 0
    response = open_url(url, have)
    if response is None or (have and _start_of(response) != have):
        if response is not None:
            response.close()
        have, response = 0, open_url(url)
    if response is None:
        raise DataError(f"{url}: the server answers 416 to a request for the whole file")
    with response, open(part, "ab" if have else "wb") as file:
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        have = _receive(url, response, file, have, total)
    if total is not None and have != total:
        raise DataError(f"{url}: the connection closed after {have} of {total} bytes; run again to go on from there")
    if have == 0:
        os.remove(part)
        raise DataError(f"{url}: the server sent an empty file")
    os.replace(part, path)
    return path


def _start_of(response):
    """The position at which the server's answer begins, from 'Content-Range: bytes FIRST-LAST/TOTAL'."""
    content_range = response.headers.get("Content-Range", "")
    if getattr(response, "status", None) != 206 or not content_range.startswith("bytes "):
        return 0
    return int(content_range[len("bytes ") :].split("-")[0])


def _receive(url, response, file, have, total):
    name = os.path.basename(urllib.parse.urlsplit(url).path)
    shown, start, first = 0.0, time.monotonic(), have
    while True:
        try:
            chunk = response.read(CHUNK_BYTES)
        except http.client.IncompleteRead as error:
            chunk = error.partial
        except (http.client.HTTPException, OSError) as error:
            raise DataError(f"{url}: the connection broke after {have} bytes ({error}); run again to go on") from None
        if not chunk:
            break
        file.write(chunk)
        have += len(chunk)
        now = time.monotonic()
        if sys.stderr.isatty() and now - shown > 0.2:
            shown = now
            part = f" of {total / 1e6:.0f} MB ({100 * have / total:.0f}%)" if total else " MB"
            rate = (have - first) / max(now - start, 1e-9) / 1e6
            print(f"\r{name}: {have / 1e6:.0f}{part}, {rate:.1f} MB/s ", end="", file=sys.stderr)
    if shown:
        print(file=sys.stderr)
    return have
