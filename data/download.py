"""download.py: fetches a file over HTTP(S) or file://, resuming where an earlier attempt stopped. The file appears
under its name only when it is complete: of the length, and with the checksum, that the server names.
"""
import base64
import hashlib
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

from errors import DataError, names_the_file

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30
MAX_LISTING_BYTES = 1 << 26


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps what Hugging Face says about a file before it sends us on to where it is stored."""

    def __init__(self):
        self.linked = {}

    def redirect_request(self, request, file, code, message, headers, url):
        self.linked.update({name: headers[name] for name in ("X-Linked-Etag", "X-Linked-Size") if headers[name]})
        return super().redirect_request(request, file, code, message, headers, url)


def _open(url, headers):
    """The answer to a request, with the headers of redirections as .linked; None where the server says that nothing is
    left (416)."""
    redirects = _Redirects()
    try:
        quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        request = urllib.request.Request(quoted, headers={"User-Agent": "train_gpt2", "Accept-Encoding": "identity", **headers})
        response = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing after the first byte asked for: complete, or another file
            return None
        raise DataError(f"{url}: the server answers {error.code} {error.reason}") from None
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"{url}: cannot be reached ({reason}); check the network, or give a mirror with --url") from None
    response.linked = redirects.linked
    return response


def read_url(url):
    """The whole answer, of a few megabytes, as bytes."""
    response = _open(url, {})
    if response is None:
        raise DataError(f"{url}: the server answers 416 to a request for the whole file")
    with response:
        try:
            body = response.read(MAX_LISTING_BYTES + 1)
            cut = len(body) < (_length(url, response) or 0) or response.read(1)
        except (http.client.HTTPException, OSError):
            cut = True
    if cut:
        raise DataError(f"{url}: the answer breaks off or does not end; run again")
    return body


def download(url, path, sha256=None):
    """Fetches url to path unless the file is there already; returns path.

    Received bytes are kept in path.part, and in path.part.state what is known of the file they are of; a later call goes
    on from there if the server still has that file. Throws DataError when the server cannot be reached, refuses, or
    closes the connection early, and when the length or the checksum (sha256, or the server's) is not that of the file.
    """
    if os.path.isfile(path):
        return path
    part = path + ".part"
    have, state = _left_by_earlier(url, part)
    response = _open(url, _from(have, state)) if have else _open(url, {})
    if have and (response is None or not _goes_on(response, have, state)):
        if response is not None and getattr(response, "status", None) == 206:
            response.close()
            response = None
        have, state, response = 0, {}, response or _open(url, {})
    if response is None:
        raise DataError(f"{url}: the server answers 416 to a request for the whole file")
    with response:
        total, checksum = _expected(url, response, have, state, sha256)
        _keep_state(part, {"url": url, "total": total, "validator": _validator(response) or state.get("validator")})
        have, ended = _receive(url, response, part, have, total)
    if not ended or (total is not None and have != total):
        of = f" of {total}" if total is not None else ""
        raise DataError(f"{url}: the connection closed after {have}{of} bytes; run again to go on from there")
    _check(url, part, have, checksum)
    os.replace(part, path)
    _remove(part + ".state")
    return path


def _left_by_earlier(url, part):
    """(bytes that are there, what is known of the file): nothing without that knowledge, or of another URL."""
    try:
        with open(part + ".state", encoding="utf-8") as file:
            state = json.load(file)
        if state["url"] == url and isinstance(state["total"], (int, type(None))):
            return os.path.getsize(part), {"total": state["total"], "validator": state["validator"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0, {}


def _keep_state(part, state):
    with open(part + ".state", "w", encoding="utf-8") as file:
        json.dump(state, file)


def _remove(path):
    if os.path.exists(path):
        os.remove(path)


def _validator(response):
    """What If-Range can ask for: a strong ETag, else the time of the last change; None without either."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _from(first_byte, state):
    headers = {"Range": f"bytes={first_byte}-"}
    if state["validator"]:
        headers["If-Range"] = state["validator"]
    return headers


def _goes_on(response, have, state):
    """Whether an answer is the rest of the file of which `have` bytes are here."""
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if getattr(response, "status", None) != 206 or not found or int(found[1]) != have:
        return False
    if found[3] != "*" and (int(found[2]) + 1 != int(found[3]) or state["total"] not in (None, int(found[3]))):
        return False
    return not state["validator"] or _validator(response) in (None, state["validator"])


def _length(url, response):
    text = response.headers.get("Content-Length")
    if text is not None and not re.fullmatch(r"[0-9]{1,18}", text.strip()):
        raise DataError(f"{url}: the server's Content-Length is not a number: {text[:40]!r}")
    return None if text is None else int(text)


def _expected(url, response, have, state, sha256):
    """(bytes of the whole file or None, (algorithm, digest) or None) by what the caller and the server say."""
    if not have and getattr(response, "status", None) == 206:
        raise DataError(f"{url}: the server answers a request for the whole file with a part")
    length = _length(url, response)
    total = state.get("total") if have and length is None else None if length is None else have + length
    linked = response.linked.get("X-Linked-Size", "")
    if linked.isdecimal():
        if total not in (None, int(linked)):
            raise DataError(f"{url}: the server says {total} bytes and {linked} bytes; run again, or give a mirror with --url")
        total = int(linked)
    checksum = ("sha256", sha256) if sha256 else _server_checksum(response, whole=not have)
    chunked = "chunked" in response.headers.get("Transfer-Encoding", "").lower()
    if total is None and checksum is None and not chunked:
        raise DataError(f"{url}: the server says neither how long the file is nor its checksum, so a cut file would look like "
                        "a whole one; give a mirror with --url")
    return total, checksum


def _server_checksum(response, whole):
    """(algorithm, hexadecimal digest) of the file in the headers: Hugging Face's tag of a large file, or a digest."""
    for tag in (response.linked.get("X-Linked-Etag"), response.headers.get("ETag")):
        if tag and re.fullmatch(r'"?[0-9a-f]{64}"?', tag):
            return "sha256", tag.strip('"')
    digests = ",".join(response.headers.get(name, "") for name in ("Repr-Digest", "Digest"))
    found = [("sha256", 32, text) for text in re.findall(r"(?i)\bsha-256=:?([A-Za-z0-9+/=]+)", digests)]
    if whole and response.headers.get("Content-MD5"):  # in a part of a file it is the part's
        found.append(("md5", 16, response.headers["Content-MD5"]))
    for algorithm, size, text in found:
        try:
            digest = base64.b64decode(text, validate=True)
        except ValueError:
            continue
        if len(digest) == size:
            return algorithm, digest.hex()
    return None


def _check(url, part, have, checksum):
    """Removes what was received and throws where it is not the file."""
    digest = hashlib.new(checksum[0]) if checksum else None
    if have and digest:
        with open(part, "rb") as file:
            while block := file.read(CHUNK_BYTES):
                digest.update(block)
    if not have or (digest and digest.hexdigest() != checksum[1].lower()):
        _remove(part)
        _remove(part + ".state")
        what = f"the file does not have the {checksum[0]} checksum {checksum[1]}; run again" if have else (
            "the server sent an empty file")
        raise DataError(f"{url}: {what}")


def _receive(url, response, part, have, total):
    """Adds the answer to the file; returns (its bytes, whether the answer ended as it should)."""
    name = os.path.basename(urllib.parse.urlsplit(url).path)
    shown, start, first, ended = 0.0, time.monotonic(), have, False
    with names_the_file(part), open(part, "ab" if have else "wb") as file:
        while not ended:
            try:
                chunk = response.read(CHUNK_BYTES)
                ended = not chunk
            except http.client.IncompleteRead as error:
                file.write(error.partial)
                have += len(error.partial)
                break
            except (http.client.HTTPException, OSError, ValueError) as error:
                raise DataError(f"{url}: the connection broke after {have} bytes ({error}); run again to go on") from None
            file.write(chunk)
            have += len(chunk)
            now = time.monotonic()
            if sys.stderr.isatty() and now - shown > 0.2:
                shown = now
                share = f" of {total / 1e6:.0f} MB ({100 * have / total:.0f}%)" if total else " MB"
                rate = (have - first) / max(now - start, 1e-9) / 1e6
                print(f"\r{name}: {have / 1e6:.0f}{share}, {rate:.1f} MB/s ", end="", file=sys.stderr)
    if shown:
        print(file=sys.stderr)
    return have, ended
