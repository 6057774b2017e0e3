"""CSV that another tool has written: a matrix of numbers, or a row for each removal and evaluation example.

With a header or without. One is told by a cell that is no number, by its cells counting 0, 1, 2 …, as pandas writes
them, or by whole numbers, no two alike, above a row without any. A column without a name before the others is
pandas' index, and no score.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.csv as pacsv

from fimo.orchestrator.sweep.layouts import refuse_disorder
from fimo.workers.errors import UsageError

LONG = ("removal", "eval", "value")
"""Columns of the long form; ``step`` may be another."""


def from_csv(data: bytes, name: str, known: Sequence[int] = ()) -> pa.Table:
    """The numbers of a CSV file called ``name``: float64 columns in order, of the long form ``LONG`` and step alone.

    Args:
        known: see ``refuse_disorder``.

    Raises:
        UsageError: no text, no row, rows of different lengths, a cell that is no finite number: where it is; or rows or
            columns whose numbers are out of order.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"'{name}' is not UTF-8 text") from error
    line, _, rest = text.lstrip("\r\n").partition("\n")
    if not line.strip():
        raise UsageError(f"'{name}' is empty")
    # A comma last: beside semicolons it is a decimal one, which is refused where it stands.
    delimiter = next((mark for mark in ("\t", ";") if mark in line), ",")
    cells = [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))]
    headed = _is_header(cells, next(csv.reader([rest.lstrip("\r\n").partition("\n")[0]], delimiter=delimiter), []))
    if headed and not rest.strip():
        raise UsageError(f"'{name}' has no row of numbers")
    wanted = [place for place, cell in enumerate(cells) if cell in (*LONG, "step")] if headed else []
    long = headed and set(LONG) <= set(cells)
    indexed = headed and not long and not cells[0]
    if not long:
        wanted = list(range(int(indexed), len(cells)))
    places = range(len(cells))
    columns = [str(place) for place in places]
    try:
        table = pacsv.read_csv(
            io.BytesIO((rest if headed else text).encode()),
            read_options=pacsv.ReadOptions(column_names=columns),
            parse_options=pacsv.ParseOptions(delimiter=delimiter),
            convert_options=pacsv.ConvertOptions(
                include_columns=[*columns[: int(indexed)], *(columns[place] for place in wanted)],
                column_types={columns[place]: pa.float64() if place in wanted else pa.string() for place in places},
            ),
        )
    except pa.ArrowInvalid as error:
        _refuse_cell(text, name, delimiter, headed, wanted)
        raise UsageError(f"'{name}' is not a CSV of numbers") from error
    if indexed:
        refuse_disorder(table.column(0).to_pylist(), "rows", name, known)
        table = table.remove_column(0)
    if headed and not long:
        refuse_disorder([cells[place] for place in wanted], "columns", name, known)
    if any(column.null_count for column in table.columns):
        _refuse_cell(text, name, delimiter, headed, wanted)
    return table.rename_columns([cells[place] for place in wanted]) if long else table


def _is_header(cells: list[str], after: list[str]) -> bool:
    if not all(map(_is_number, cells)):
        return True
    counted = [str(place) for place in range(len(cells))]
    whole = all(cell.isdecimal() for cell in cells) and len(set(cells)) == len(cells)
    apart = whole and bool(after) and all(_is_number(cell) and not cell.strip().isdecimal() for cell in after)
    return len(cells) > 1 and (cells == counted or apart)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _refuse_cell(text: str, name: str, delimiter: str, headed: bool, wanted: list[int]) -> None:
    """Refuse the first cell that is no number, by its place as an editor counts: lines and columns from 1."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    rows = ((reader.line_num, row) for row in reader if any(cell.strip() for cell in row))
    _, first = next(rows) if headed else (0, None)
    for line, row in rows:
        first = first or row
        if len(row) != len(first):
            raise UsageError(f"'{name}' line {line} has {len(row)} cells, the first line {len(first)}")
        for place in wanted:
            if not _is_number(row[place]) or not math.isfinite(float(row[place])):
                called = f" ({first[place].strip()})" if headed and first[place].strip() else ""
                raise UsageError(
                    f"'{name}' line {line}, column {place + 1}{called}: {row[place].strip()[:40]!r} is no finite number"
                )
