"""json_documents.py: the documents in JSON: one object a line, or the objects of an array (or one after another), whatever
their layout.
"""
import codecs
import io
import json
import re

from faults import Fault

MAX_JSON_BYTES = 1 << 26  # of a line, or of an object of an array
CHUNK_BYTES = 1 << 20
BETWEEN_VALUES = re.compile(r"[ \t\r\n,]*")
ADVICE = "; convert it, for instance with iconv -f latin1 -t utf8"


def is_array(start):
    """Whether a .json file that starts so is read as values with white space anywhere, not as an object a line."""
    line, newline, _ = start.lstrip().partition("\n")
    return line.startswith("[") or (newline and line.startswith("{") and not line.rstrip().endswith("}"))


def line_documents(path, file, encoding, raw, text_field, faults, advance):
    """The texts in a stream of lines that hold an object each; raw: the file below, for its position."""
    if encoding != "utf-8":
        file = io.TextIOWrapper(file, encoding, "surrogatepass", newline="\n")
    number = 0

    def place():
        return f"{path}:{number}"

    while line := file.readline(MAX_JSON_BYTES + 1):
        number += 1
        if number % 1024 == 0:
            advance(raw.tell())
        if len(line) > MAX_JSON_BYTES:
            faults.met("line", f"longer than {MAX_JSON_BYTES >> 20} MiB", place)
            while line and line[-1:] not in (b"\n", "\n"):
                line = file.readline(MAX_JSON_BYTES)
        elif line.strip():
            try:
                yield _text(_parse(line), text_field)
            except Fault as fault:
                faults.met("line", fault.what, place, fault.detail)


_decode = json.JSONDecoder().decode  # what json.loads() calls in the end


def _parse(line):
    try:
        return _decode(line if isinstance(line, str) else line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Fault("not UTF-8", f" (byte 0x{line[error.start]:02x} at offset {error.start}){ADVICE}") from None
    except RecursionError:
        raise Fault("not valid JSON", " (nested too deeply)") from None
    except ValueError as error:
        raise Fault("not valid JSON", f" ({error})") from None


def _text(record, text_field):
    """The text of an object, "" for null."""
    if not isinstance(record, dict):
        raise Fault("a JSON object is needed", f", this is a {type(record).__name__}")
    if text_field not in record:
        names = list(record)
        fields = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or "none"
        raise Fault(f"no field '{text_field}'", f" (fields: {fields}); choose one with --text-field")
    text = record[text_field]
    if text is not None and not isinstance(text, str):
        raise Fault(f"field '{text_field}' is a {type(text).__name__}", ", not a string")
    return text or ""


def array_documents(path, file, encoding, raw, text_field, faults, advance):
    """The texts in the objects of an array; an error in JSON's syntax ends the file, as nobody knows where to go on."""
    for record, line in _values(file, encoding):
        advance(raw.tell())
        try:
            yield _text(record, text_field)
        except Fault as fault:
            faults.met("object", fault.what, lambda: f"{path}:{line}", fault.detail)


def _values(file, encoding):
    """Yields (value, the line it begins in), with two values or CHUNK_BYTES in memory."""
    decoder, scanner = codecs.getincrementaldecoder(encoding)(), json.JSONDecoder()
    buffer, position, line, ended = "", 0, 1, False
    array = None  # None: not begun, True: inside, False: over, or there is none

    def fill(size):
        nonlocal buffer, position, ended
        block = file.read(size)
        ended = not block
        try:
            buffer = buffer[position:] + decoder.decode(block, ended)
        except UnicodeDecodeError as error:
            at = line + buffer.count("\n", position) + error.object.count(b"\n", 0, error.start)
            raise Fault(f"not {encoding.upper()}", f" ({error.reason}){ADVICE}", f":{at}") from None
        position = 0

    while True:
        between = BETWEEN_VALUES.match(buffer, position).end()
        line += buffer.count("\n", position, between)
        position = between
        if position == len(buffer):
            if ended:
                break
            fill(CHUNK_BYTES)
        elif buffer[position] == ("[" if array is None else "]" if array else ""):
            array, position = array is None, position + 1
        else:
            array = array or False
            try:
                value, end = scanner.raw_decode(buffer, position)
            except RecursionError:
                raise Fault("not valid JSON", " (nested too deeply)", f":{line}") from None
            except ValueError as error:
                length = len(buffer) - position
                if ended or length > MAX_JSON_BYTES:
                    at = line + buffer.count("\n", position, getattr(error, "pos", position))
                    raise Fault("not valid JSON", f" ({getattr(error, 'msg', error)})", f":{at}") from None
                fill(max(length, CHUNK_BYTES))
                continue
            if end == len(buffer) and not ended:  # a number may go on
                fill(CHUNK_BYTES)
                continue
            yield value, line
            line += buffer.count("\n", position, end)
            position = end
    if array:
        raise Fault("truncated JSON", " (the array does not end)", f":{line}")
