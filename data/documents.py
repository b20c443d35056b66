"""documents.py: the documents in text, JSONL and Parquet files, one at a time and in a fixed order. A plain text file
is read whole; the other two are streamed.
"""
import contextlib
import glob
import gzip
import io
import json
import os
import zlib

from errors import DataError, UsageError

TEXT_EXTENSIONS = (".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex")
JSONL_EXTENSIONS = (".jsonl", ".ndjson")
PARQUET_EXTENSIONS = (".parquet",)
COMPRESSIONS = (".gz", ".zst")
KNOWN = "{}, {} (these also with .gz or .zst), .parquet".format(" ".join(TEXT_EXTENSIONS), " ".join(JSONL_EXTENSIONS))


def kind_of(path):
    """'text', 'jsonl' or 'parquet' by the file's name, None for a name that says none of them."""
    stem, extension = os.path.splitext(path.lower())
    if extension in PARQUET_EXTENSIONS:
        return "parquet"
    if extension in COMPRESSIONS:
        extension = os.path.splitext(stem)[1]
    return "text" if extension in TEXT_EXTENSIONS else "jsonl" if extension in JSONL_EXTENSIONS else None


def find_inputs(inputs):
    """The files named by paths, directories (searched to the bottom; files of other kinds are passed over) and globs.

    In the order given, sorted within each, without duplicates.
    """
    files = {}
    for given in inputs:
        if os.path.isdir(given):
            found = [os.path.join(at, name) for at, _, names in os.walk(given) for name in names]
            found = sorted(path for path in found if kind_of(path))
            if not found:
                raise DataError(f"{given}: no file in this directory has a known extension: {KNOWN}")
        else:
            found = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
            if not found:
                raise UsageError(f"{given}: no such file")
            found = [path for path in found if not os.path.isdir(path)] or found
            for path in found:
                if not kind_of(path):
                    raise UsageError(f"{path}: unknown extension '{os.path.splitext(path)[1]}'; known are {KNOWN}")
        files.update(dict.fromkeys(found))
    return list(files)


def read_documents(path, text_field="text", split_on=None, advance=lambda position: None):
    """Yields the non-empty documents of a file; calls advance() with the number of its bytes read so far.

    split_on cuts plain text after each occurrence of a separator. Lone surrogates become replacement characters.
    """
    if kind_of(path) == "parquet":
        documents = _parquet_documents(path, text_field, advance)
    else:
        documents = _stream_documents(path, text_field, split_on, advance)
    for text in documents:
        if text and not text.isspace():
            yield _valid_unicode(text)
    advance(os.path.getsize(path))


def _stream_documents(path, text_field, split_on, advance):
    try:
        with open(path, "rb") as raw, _decompressed(path, raw) as file:
            if kind_of(path) == "jsonl":
                yield from _jsonl_documents(path, raw, file, text_field, advance)
            else:
                yield from _split(_decode(path, file.read()), split_on)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged or truncated gzip data ({error})") from None


@contextlib.contextmanager
def _decompressed(path, raw):
    if path.lower().endswith(".gz"):
        with gzip.open(raw) as file:
            yield file
    elif path.lower().endswith(".zst"):
        yield io.BufferedReader(_ZstdStream(path, raw))
    else:
        yield raw


class _ZstdStream(io.RawIOBase):
    """Decompresses one or more zstd frames and, unlike zstandard's own reader, notices a file that ends inside one."""

    def __init__(self, path, raw):
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path}: reading .zst needs the package zstandard: .venv/bin/pip install zstandard") from None
        self._library, self._path, self._raw = zstandard, path, raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._compressed, self._plain, self._inside_frame = b"", b"", False

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self._plain:
            self._compressed = self._compressed or self._raw.read(1 << 17)
            if not self._compressed and self._inside_frame:
                raise DataError(f"{self._path}: truncated zstd data")
            if not self._compressed:
                return 0
            self._decompress()
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def _decompress(self):
        try:
            self._plain = self._frame.decompress(self._compressed)
        except self._library.ZstdError as error:
            raise DataError(f"{self._path}: damaged zstd data ({error})") from None
        self._inside_frame = not self._frame.eof
        self._compressed = b""
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = self._library.ZstdDecompressor().decompressobj()


def _decode(place, data):
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}); convert it, "
            "for instance with iconv -f latin1 -t utf8"
        ) from None


def _split(text, separator):
    start = 0
    while separator:
        found = text.find(separator, start)
        if found < 0:
            break
        yield text[start : found + len(separator)]
        start = found + len(separator)
    yield text[start:]


def _jsonl_documents(path, raw, file, text_field, advance):
    for number, line in enumerate(file, 1):
        place = f"{path}:{number}"
        advance(raw.tell())
        if not line.strip():
            continue
        try:
            record = json.loads(_decode(place, line))
        except ValueError as error:
            raise DataError(f"{place}: not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise DataError(f"{place}: a JSON object is needed, this is a {type(record).__name__}")
        if text_field not in record:
            fields = ", ".join(record) or "none"
            raise DataError(f"{place}: no field '{text_field}' (fields: {fields}); choose one with --text-field")
        if not isinstance(record[text_field], str):
            raise DataError(f"{place}: field '{text_field}' is a {type(record[text_field]).__name__}, not a string")
        yield record[text_field]


def _parquet_documents(path, text_field, advance):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs the package pyarrow: .venv/bin/pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            if text_field not in schema.names:
                fields = ", ".join(schema.names)
                raise DataError(f"{path}: no column '{text_field}' (columns: {fields}); choose one with --text-field")
            kind = schema.field(text_field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(f"{path}: column '{text_field}' is a {kind}, not a string")
            rows, size = 0, os.path.getsize(path)
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
                rows += batch.num_rows
                advance(size * rows // table.metadata.num_rows)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())[:150]})") from None


def _valid_unicode(text):
    """JSON may hold half of a surrogate pair, which no encoding of text can."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
