"""Parquet that somebody else wrote, read only if what it says of itself, and what its pages say, fits into memory.

A few hundred bytes can stand for a gigabyte: values repeated by their encoding, pages of zeros. The footer's numbers
are what its writer put there, so the header of every page is read too, before any page is.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FREE, RATIO = 2**28, 1000
"""Bytes that any object may take in memory, and besides how many times its own size."""
# Fields by number, as parquet.thrift has them: of a file, a row group, a column, a page and what counts its values.
_ROWS, _GROUPS, _CHUNKS, _META = 3, 4, 1, 3
_LENGTH, _FIRST, _DICTIONARY = 7, 9, 11
_SIZE, _COMPRESSED, _VALUES = 2, 3, 1
_WITH_VALUES = (5, 7, 8)
_WIDTHS = {0: 1, 1: 4, 4: 4, 6: 4}
"""Bytes of a value by the number of its type, where it is not 8; a text has those of its place beside its own."""


class TooLargeError(ValueError):
    """It would take more memory than its reader grants."""


def read_parquet(data: bytes, most: int | None = None, columns: list[str] | None = None) -> pa.Table:
    """A table from Parquet bytes.

    Args:
        most: bytes that it may take in memory; None = ``FREE`` and ``RATIO`` times its own size.

    Raises:
        TooLargeError: it takes more; nothing of it was decoded.
        ValueError, OSError, pa.ArrowException: it is not Parquet.
    """
    most = FREE + RATIO * len(data) if most is None else most
    try:
        _check(data, most)
    except (AttributeError, TypeError, LookupError) as error:
        raise ValueError("its footer is none") from error
    file = pq.ParquetFile(pa.BufferReader(data))
    schema = file.schema_arrow
    lacking = sorted(set(columns or ()) - set(schema.names))
    if lacking or len(set(schema.names)) != len(schema.names):
        raise ValueError(f"it has no column '{lacking[0]}'" if lacking else "two of its columns have one name")
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    if texts:
        # As dictionaries: a text that stands in every row is held once until it is known how long all are.
        file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=texts)
    # Not pq.read_table, which takes twice as long for a small object and imports all of Arrow's data sets.
    table = file.read(columns=columns, use_threads=False)
    for place, name in enumerate(table.column_names):
        if name in texts:
            column = _texts(table.column(place), most)
            table = table.set_column(place, table.schema.field(place).with_type(pa.string()), column)
    return table


def read_about(data: bytes) -> dict[bytes, bytes]:
    """The metadata of Parquet bytes, from the footer alone; raises as ``read_parquet``."""
    return dict(pq.ParquetFile(pa.BufferReader(data)).schema_arrow.metadata or {})


def _texts(column: pa.ChunkedArray, most: int) -> pa.ChunkedArray:
    if not pa.types.is_dictionary(column.type):
        return column
    # Only now: it takes as long to import as all else here.
    import pyarrow.compute as pc

    total = 0
    for chunk in column.chunks:
        total += pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0
    if total > most:
        raise TooLargeError(f"its texts take {total:,} bytes, more than the {most:,} that it can need")
    return column.cast(pa.string())


def _check(data: bytes, most: int) -> None:
    # Parsed here: pyarrow's own access to a footer that was altered may end the process.
    if len(data) < 12 or data[-4:] != b"PAR1":
        raise ValueError("it is not Parquet")
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    about, _ = _struct(data, max(0, start))
    rows, held = _number(about.get(_ROWS)), 0
    chunks = [chunk.get(_META) for group in about.get(_GROUPS, []) for chunk in group.get(_CHUNKS, [])]
    if start < 0 or rows < 0 or not all(isinstance(chunk, dict) for chunk in chunks):
        raise ValueError("its footer is none")
    for chunk in chunks:
        values, size = _counted(data, chunk)
        held += max(size, _number(chunk.get(6)), _WIDTHS.get(chunk.get(1), 8) * max(values, _number(chunk.get(5))))
        if max(held, rows) > most:
            raise TooLargeError(f"it takes {max(held, rows):,} bytes or more, and can need {most:,}")


def _counted(data: bytes, chunk: dict[int, Any]) -> tuple[int, int]:
    """Values and uncompressed bytes of all pages of a column, as their headers have them."""
    place, values, size = min(_number(chunk[field]) for field in (_FIRST, _DICTIONARY) if field in chunk), 0, 0
    end = place + _number(chunk.get(_LENGTH))
    if not 0 <= place <= end <= len(data):
        raise ValueError("a column lies outside of it")
    while place < end:
        header, place = _struct(data, place)
        inner = [header[field] for field in _WITH_VALUES if field in header]
        counts = [_number(header.get(_SIZE)), _number(header.get(_COMPRESSED))]
        counts += [_number(one.get(_VALUES)) if isinstance(one, dict) else -1 for one in inner]
        if min(counts) < 0:
            raise ValueError("a page's header is none")
        size, place, values = size + counts[0], place + counts[1], values + sum(counts[2:])
    return values, size


def _number(value: Any) -> int:
    return value if isinstance(value, int) else -1


_PASSED = {1: 0, 2: 0, 3: 1, 7: 8}
"""Bytes of the kinds that nothing here is: truth values, a byte, a real number."""


# -- Thrift's compact protocol, as far as Parquet has it ------------------------------------------------------


def _struct(data: bytes, place: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """A struct's fields by number, and where it ends."""
    if depth > 16:
        raise ValueError("its footer is nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while head := data[place]:
        place += 1
        if step := head >> 4:
            number += step
        else:
            number, place = _integer(data, place)
        kind = head & 15
        # Most fields are numbers.
        fields[number], place = _integer(data, place) if 4 <= kind <= 6 else _value(data, place, kind, depth)
    return fields, place + 1


def _value(data: bytes, place: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (4, 5, 6):
        return _integer(data, place)
    if kind in (9, 10):
        return _several(data, place, depth)
    if kind == 12:
        return _struct(data, place, depth + 1)
    if kind == 8:
        length, place = _unsigned(data, place)
        return b"", place + length
    if kind not in _PASSED:
        raise ValueError("a field in it is none")
    return None, place + _PASSED[kind]


def _several(data: bytes, place: int, depth: int) -> tuple[list[Any], int]:
    head, place = data[place], place + 1
    count, kind, found = head >> 4, head & 15, list[Any]()
    if count == 15:
        count, place = _unsigned(data, place)
    if count > len(data) - place:
        raise ValueError("a list in it is longer than it")
    for _ in range(count):
        # Of truth values in a list each has a byte.
        one, place = _value(data, place, 3 if kind in (1, 2) else kind, depth)
        found.append(one)
    return found, place


def _unsigned(data: bytes, place: int) -> tuple[int, int]:
    # Most have one byte.
    if (value := data[place]) < 128:
        return value, place + 1
    value = 0
    for shift in range(0, 70, 7):
        byte, place = data[place], place + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number in it is none")


def _integer(data: bytes, place: int) -> tuple[int, int]:
    value, place = _unsigned(data, place)
    return (value >> 1) ^ -(value & 1), place
