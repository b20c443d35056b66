"""compressed.py: files as streams of bytes, through gzip or zstd where their names say so. Memory stays bounded: a few
megabytes, and for zstd the window that the file asks for.
"""
import contextlib
import gzip
import io
import os
import stat
import zlib

from errors import DataError
from faults import Fault

COMPRESSIONS = (".gz", ".zst")
ZSTD_WINDOW_BYTES = 1 << 31  # zstd --long=31, the most there is
BUFFER_BYTES = 1 << 17
ZSTD_STEP_BYTES = 1 << 10  # compressed bytes at a time: they become 32 MB at most
BOMB_BYTES, BOMB_RATIO = 1 << 28, 1000


def check_regular(path):
    """Fault for a directory, a FIFO or a device, which would be read for ever or not at all."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise Fault("not a regular file", f" but {kinds.get(stat.S_IFMT(mode), 'a device')}")


def check_expansion(plain, compressed):
    """Fault where so few bytes become so many that they cannot be text: repetition without end."""
    if plain > BOMB_BYTES and plain > BOMB_RATIO * compressed:
        raise Fault("a decompression bomb", f": its {compressed:,} bytes become more than {plain >> 20:,} MiB")


@contextlib.contextmanager
def open_plain(path):
    """Yields (file, raw): a buffered stream of the file's plain bytes, and the file itself, for its position."""
    with open(path, "rb") as raw:
        try:
            if path.lower().endswith(".gz"):
                with gzip.open(raw) as file:
                    yield io.BufferedReader(_Measured(path, file), BUFFER_BYTES), raw
            elif path.lower().endswith(".zst"):
                yield io.BufferedReader(_Measured(path, _ZstdStream(path, raw)), BUFFER_BYTES), raw
            else:
                yield raw, raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Fault("damaged or truncated gzip data", f" ({error})") from None


class _Measured(io.RawIOBase):
    """Passes bytes on and notices when a small file becomes too many."""

    def __init__(self, path, source):
        self._source, self._compressed, self._plain = source, os.path.getsize(path), 0

    def readable(self):
        return True

    def readinto(self, buffer):
        """Fills the buffer unless the file ends before, so that peek() shows as much as there is."""
        count = 0
        while count < len(buffer):
            read = self._source.readinto(memoryview(buffer)[count:])
            if not read:
                break
            count += read
        self._plain += count
        check_expansion(self._plain, self._compressed)
        return count


class _ZstdStream(io.RawIOBase):
    """Decompresses one or more zstd frames and, unlike zstandard's own reader, notices a file that ends inside one."""

    def __init__(self, path, raw):
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path}: reading .zst needs the package zstandard: .venv/bin/pip install zstandard") from None
        self._library, self._raw = zstandard, raw
        self._frame, self._inside_frame = self._new_frame(), False
        self._compressed = self._plain = memoryview(b"")

    def _new_frame(self):
        return self._library.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self._plain:
            self._compressed = self._compressed or memoryview(self._raw.read(BUFFER_BYTES))
            if not self._compressed and self._inside_frame:
                raise Fault("truncated zstd data")
            if not self._compressed:
                return 0
            self._decompress()
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def _decompress(self):
        step = self._compressed[:ZSTD_STEP_BYTES]
        try:
            self._plain = memoryview(self._frame.decompress(step))
        except self._library.ZstdError as error:
            raise _zstd_fault(str(error)) from None
        self._inside_frame = not self._frame.eof
        used = len(step) - len(self._frame.unused_data)
        self._compressed = self._compressed[used:]
        if self._frame.eof:
            self._frame = self._new_frame()


def _zstd_fault(message):
    if "too much memory" in message:
        return Fault("a zstd window above 2 GiB", ", the most that is read; compress it again with --long=31 or less")
    if "memory" in message.lower() or "Allocation" in message:
        return Fault("too little memory for the file's zstd window", f" ({message})")
    if "ictionary" in message:
        return Fault("zstd data that needs a dictionary", f" ({message}); decompress it with zstd -D")
    return Fault("damaged zstd data", f" ({message})")
