"""text_documents.py: the documents in plain text: a file is one, unless a separator cuts it."""
import codecs
import re

from faults import Fault
from json_documents import ADVICE

MAX_DOCUMENT_BYTES = 1 << 24  # a longer document comes in parts
END_OF_TEXT = "<|endoftext|>"
BOUNDARY = re.compile(r"\S(?=[ \n])")


class Separator:
    """Where plain text is cut into documents. The separator goes, and the line ends beside it; "\\n" finds "\\r\\n", too.

    cuts counts what it found.
    """

    def __init__(self, text=END_OF_TEXT):
        self.text, self.cuts = text, 0
        lines = text.replace("\r\n", "\n").split("\n")
        self._pattern = re.compile(r"\r?\n".join(re.escape(line) for line in lines))

    def pieces(self, text):
        """Yields (start, end, whether a separator follows) of what stands before, between and after the separators."""
        start = 0
        for found in self._pattern.finditer(text):
            self.cuts += 1
            yield start, found.start(), True
            start = found.end()
        yield start, len(text), False


def last_boundary(text, limit):
    """The last place, up to limit, before a space or line end that follows other text: no token of GPT-2's reaches across
    it. limit, where there is none in a million characters."""
    for reach in (1 << 12, 1 << 20):
        places = [found.end() for found in BOUNDARY.finditer(text, max(0, limit - reach), limit + 1)]
        if places:
            return places[-1]
    return limit


def text_documents(path, file, encoding, raw, separator, faults, advance):
    """Yields (text, whether a document begins with it)."""
    errors = "surrogateescape" if encoding == "utf-8" else "surrogatepass"  # an escape stands for a byte that is no UTF-8
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    buffer, offset, line = "", 0, 1  # what is still to be cut, and the bytes and the line before it
    begins, cut_before, ended = True, False, False
    while not ended:
        block = file.read(MAX_DOCUMENT_BYTES)
        ended = not block
        advance(raw.tell())
        try:
            buffer += decoder.decode(block, ended)
        except UnicodeDecodeError as error:
            raise Fault(f"not {encoding.upper()}", f" ({error.reason})") from None
        for start, end, cut_after in separator.pieces(buffer):
            if not cut_after and not ended:  # more of this document may follow
                end = start
                if len(buffer) - start >= MAX_DOCUMENT_BYTES:
                    end = last_boundary(buffer, len(buffer) - 2 * len(separator.text))  # none of a separator's beginning
            text = buffer[start:end]
            text = text.rstrip("\r\n") if cut_after else text
            text = text.lstrip("\r\n") if cut_before else text
            bad = _first_escape(text) if encoding == "utf-8" else None
            if bad is not None:
                _report(faults, path, buffer, buffer.index(bad, start), offset, line)
            elif text and not (begins and text.isspace()):
                yield text, begins
                begins = False
            if cut_after:
                begins = cut_before = True
            elif end > start:
                cut_before = False
        offset += len(buffer[:end].encode("utf-8", errors))
        line += buffer.count("\n", 0, end)
        buffer = buffer[end:]


def _first_escape(text):
    try:
        text.encode("utf-8")
        return None
    except UnicodeEncodeError as error:
        return text[error.start]


def _report(faults, path, buffer, at, offset, line):
    """buffer[at] stands for a byte that is no UTF-8; the buffer begins at this offset and in this line of the file."""
    def line_there():
        return line + buffer.count("\n", 0, at)

    if faults.skip:
        faults.met("document", "not UTF-8", lambda: f"{path}:{line_there()}")
    else:
        offset += len(buffer[:at].encode("utf-8", "surrogateescape"))
        byte = ord(buffer[at]) - 0xDC00
        detail = f" (byte 0x{byte:02x} at offset {offset}) in line {line_there()}{ADVICE}"
        faults.met("document", "not UTF-8", lambda: path, detail)
