"""documents.py: the documents in text, JSON and Parquet files, one at a time and in a fixed order. Every file is streamed:
memory is a few times MAX_DOCUMENT_BYTES and MAX_JSON_BYTES at most, whatever a file's size and compression.
"""
import codecs
import glob
import os

from errors import DataError, UsageError

from compressed import COMPRESSIONS, check_regular, open_plain
from faults import Fault, Faults
from json_documents import array_documents, is_array, line_documents
from parquet_documents import parquet_documents
from text_documents import Separator, text_documents

TEXT_EXTENSIONS = (".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex")
LINES_EXTENSIONS = (".jsonl", ".ndjson")
MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
         (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))  # UTF-32's begins as UTF-16's does
KNOWN = "{}, {} .json (these also with .gz or .zst), .parquet".format(" ".join(TEXT_EXTENSIONS), " ".join(LINES_EXTENSIONS))


def kind_of(path):
    """'text', 'lines', 'json' or 'parquet' by the file's name, None for a name that says none of them."""
    stem, extension = os.path.splitext(path.lower())
    if extension == ".parquet":
        return "parquet"
    if extension in COMPRESSIONS:
        extension = os.path.splitext(stem)[1]
    if extension == ".json":
        return "json"
    return "text" if extension in TEXT_EXTENSIONS else "lines" if extension in LINES_EXTENSIONS else None


def find_inputs(inputs):
    """The files named by paths, directories (searched to the bottom) and globs, in the order given, sorted within each,
    without duplicates. Of a directory, files of other kinds are passed over, and NAME.json, which is mostly about the
    data and not data itself, where there is anything else.
    """
    files = {}
    for given in inputs:
        if os.path.isdir(given):
            found = _search(given)
        else:
            found = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
            if not found:
                raise UsageError(f"{given}: no such file")
            found = [path for path in found if not os.path.isdir(path)] or found
            for path in found:
                try:
                    check_regular(path)
                except Fault as error:
                    raise UsageError(f"{path}: {error.what}{error.detail}") from None
                if not kind_of(path):
                    raise UsageError(f"{path}: unknown extension '{os.path.splitext(path)[1]}'; known are {KNOWN}")
        files.update(dict.fromkeys(found))
    return list(files)


def _search(directory):
    def fail(error):
        raise error

    found = [os.path.join(at, name) for at, _, names in os.walk(directory, onerror=fail) for name in names]
    found = sorted(path for path in found if kind_of(path))
    if not found:
        raise DataError(f"{directory}: no file in this directory has a known extension: {KNOWN}")
    return [path for path in found if not path.lower().endswith(".json")] or found


def read_documents(path, text_field="text", separator=None, faults=None, advance=lambda position: None):
    """Yields (text, True) for each non-empty document of a file; calls advance() with the number of its bytes read so
    far. A document of more than MAX_DOCUMENT_BYTES of plain text comes in parts, (text, False) from the second on.

    Lone surrogates become replacement characters. What cannot be read goes to faults.
    """
    faults = faults or Faults()
    try:
        check_regular(path)
        for text, begins in _documents(path, text_field, separator or Separator(), faults, advance):
            if text and not (begins and text.isspace()):
                yield _valid_unicode(text), begins
        advance(os.path.getsize(path))
    except DataError:
        raise
    except Fault as error:
        faults.met("file", error.what, lambda: path + error.place, error.detail)
    except UnicodeDecodeError as error:  # UTF-16 that ends in the middle
        faults.met("file", f"not {error.encoding.upper()}", lambda: path, f" ({error.reason})")
    except OSError as error:
        reason = error.strerror or str(error)
        faults.met("file", "cannot be read", lambda: path, f" ({reason})")
    except MemoryError:
        faults.met("file", "too large for the memory there is", lambda: path)
    except Exception as error:  # of the libraries below
        faults.met("file", "cannot be read", lambda: path, f" ({type(error).__name__}: {str(error)[:150]})")


def _documents(path, text_field, separator, faults, advance):
    kind = kind_of(path)
    if kind == "parquet":
        yield from ((text, True) for text in parquet_documents(path, text_field, faults, advance))
        return
    with open_plain(path) as (file, raw):
        start = file.peek(4096)
        encoding, mark = encoding_of(start)
        file.read(mark)
        if kind == "text":
            yield from text_documents(path, file, encoding, raw, separator, faults, advance)
            return
        array = kind == "json" and is_array(start[mark:].decode(encoding, "ignore"))
        read = array_documents if array else line_documents
        yield from ((text, True) for text in read(path, file, encoding, raw, text_field, faults, advance))


def encoding_of(start):
    """(encoding, length of the byte order mark) of a file that begins with these bytes: UTF-8 unless a mark, or a zero in
    every other of many bytes, says UTF-16 or UTF-32."""
    for mark, encoding in MARKS:
        if start.startswith(mark):
            return encoding, len(mark)
    zeros = [start[first:4096:2].count(0) for first in (0, 1)]
    if max(zeros) >= 2 and max(zeros) * 8 > len(start[:4096]) and min(zeros) == 0:
        return ("utf-16-be" if zeros[0] else "utf-16-le"), 0
    return "utf-8", 0


def _valid_unicode(text):
    """JSON may hold half of a surrogate pair, which no encoding of text can."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
