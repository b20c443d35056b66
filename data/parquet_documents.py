"""parquet_documents.py: the documents in Parquet: the rows of a column of strings, or of bytes that are UTF-8."""
import os

from errors import DataError

from compressed import check_expansion
from faults import Fault
from json_documents import ADVICE

ROWS_AT_ONCE = 16  # few, as a row may be megabytes
MAX_ROW_BYTES = 1 << 26


def parquet_documents(path, text_field, faults, advance):
    """The texts of a column, "" for null."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs the package pyarrow: .venv/bin/pip install pyarrow") from None
    try:
        yield from _rows(pyarrow, path, text_field, faults, advance)
    except (DataError, Fault, MemoryError):
        raise
    except Exception as error:  # Arrow's own, and what its files of other makers lead to
        raise Fault("not a readable Parquet file", f" ({' '.join(str(error).split())[:150]})") from None


def _rows(pyarrow, path, text_field, faults, advance):
    row, plain, size = 0, 0, os.path.getsize(path)

    def place():
        return f"{path}, row {row}"

    with pyarrow.parquet.ParquetFile(path) as table:
        _check_column(pyarrow, table, text_field)
        for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=[text_field]):
            for data in _bytes_of(pyarrow, batch.column(0)):
                row += 1
                plain += len(data)
                if len(data) > MAX_ROW_BYTES:
                    faults.met("row", f"longer than {MAX_ROW_BYTES >> 20} MiB", place)
                    continue
                try:
                    yield data.decode("utf-8")
                except UnicodeDecodeError as error:
                    detail = f" (byte 0x{data[error.start]:02x} at offset {error.start}){ADVICE}"
                    faults.met("row", "not UTF-8", place, detail)
            check_expansion(plain, size)
            advance(size * row // table.metadata.num_rows)


def _check_column(pyarrow, table, text_field):
    schema = table.schema_arrow
    if text_field not in schema.names:
        fields = ", ".join(schema.names[:20]) + (", ..." if len(schema.names) > 20 else "")
        raise Fault(f"no column '{text_field}'", f" (columns: {fields}); choose one with --text-field")
    kind = schema.field(text_field).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary", "null")
    if not any(getattr(pyarrow.types, "is_" + name, lambda _: False)(kind) for name in names):
        raise Fault(f"column '{text_field}' is a {kind}", ", not a string")
    for group in range(table.metadata.num_row_groups):
        for index in range(table.metadata.num_columns):
            column = table.metadata.row_group(group).column(index)
            if column.path_in_schema == text_field:
                check_expansion(column.total_uncompressed_size, column.total_compressed_size)


def _bytes_of(pyarrow, array):
    """The rows as bytes, b"" for null; unchecked, so that a bad row does not hide the others."""
    if pyarrow.types.is_dictionary(array.type):  # its long strings stay where they are, once
        words = [word or b"" for word in array.dictionary.cast(pyarrow.large_binary()).to_pylist()]
        return (b"" if index is None else words[index] for index in array.indices.to_pylist())
    if pyarrow.types.is_fixed_size_binary(array.type):
        array = array.cast(pyarrow.binary())
    return (data or b"" for data in array.cast(pyarrow.large_binary()).to_pylist())
