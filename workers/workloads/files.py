"""Data as users have it: found or refused in one line, read into columns, split and standardised as in the paper.

Nothing is downloaded. A loader says where its data is to be had and what must be inside; a file that holds something
else (a part of the data, another version) is refused, because its numbers would be compared with the paper's.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fimo.workers.errors import UsageError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Source:
    """Where a data set is to be had, in words.

    Attributes:
        name: as in the paper.
        where: the public page and the file there.
        inside: what a reader expects to find.
    """

    name: str
    where: str
    inside: str

    def refuse(self, path: Path, wrong: str) -> UsageError:
        """The one line for a file that is missing or is not the data set's."""
        return UsageError(f"{self.name}: {path} {wrong}; get {self.where}; it holds {self.inside}")

    def missing(self, path: Path) -> UsageError:
        """The one line for a path at which there is nothing."""
        return self.refuse(path, f"is neither beside the spec nor in {Path.cwd()}")

    def check_rows(self, path: Path, rows: int, expected: int | None) -> None:
        """Refuse another number of rows than the data set's (UsageError); None expects any."""
        if expected is not None and rows != expected:
            raise self.refuse(path, f"has {rows:,} rows, not {expected:,} (rows: null takes any number)")


def extra(package: str, name: str) -> Any:
    """Import an optional package; refused in one line that names fimo's extra (UsageError)."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(f"this needs {package}, which is not installed: pip install 'fimo[{name}]'") from error


@dataclass(frozen=True)
class Table:
    """A table by column.

    Attributes:
        names: the header.
        rows: cells as they stand in the file (text from CSV); no row is empty.
    """

    source: Source
    path: Path
    names: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def column(self, name: str) -> list[Any]:
        """One column's cells; refused in one line if there is none (UsageError)."""
        if name not in self.names:
            raise self.source.refuse(self.path, f"has no column '{name}'")
        place = self.names.index(name)
        return [row[place] for row in self.rows]

    def numbers(self, names: Sequence[str]) -> Array:
        """Columns in the order given, float64 (rows, columns); a cell that is no finite number is refused."""
        columns = []
        for name in names:
            cells = self.column(name)
            try:
                columns.append(np.array([float(cell) for cell in cells]))
            except (TypeError, ValueError):
                line = next(i for i, cell in enumerate(cells) if not _is_number(cell))
                raise self.source.refuse(self.path, f"has no number in row {line}, column '{name}'") from None
        table = np.stack(columns, axis=1)
        if not np.isfinite(table).all():
            row, column = np.argwhere(~np.isfinite(table))[0]
            raise self.source.refuse(self.path, f"has no finite number in row {row}, column '{names[column]}'")
        return table


def read_table(path: Path, source: Source) -> Table:
    """A CSV with a header, or the first sheet of an ``.xlsx`` workbook. Rows and columns without content are left out.

    Raises:
        UsageError: the file is missing, is no such table, or needs a package that is not installed.
    """
    if not path.is_file():
        raise source.missing(path)
    try:
        lines = _sheet(path) if path.suffix == ".xlsx" else _csv(path)
    except UsageError:
        raise
    except Exception as error:  # openpyxl and zipfile raise what they like
        raise source.refuse(path, f"cannot be read ({type(error).__name__})") from error
    lines = [line for line in lines if any(not _empty(cell) for cell in line)]
    if not lines:
        raise source.refuse(path, "is empty")
    header = [str("" if cell is None else cell).strip() for cell in lines[0]]
    kept = [place for place, name in enumerate(header) if name]
    rows = tuple(tuple(line[place] if place < len(line) else None for place in kept) for line in lines[1:])
    return Table(source, path, tuple(header[place] for place in kept), rows)


def _csv(path: Path) -> list[tuple[Any, ...]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [tuple(line) for line in csv.reader(file)]


def _sheet(path: Path) -> list[tuple[Any, ...]]:
    book = extra("openpyxl", "excel").load_workbook(path, read_only=True, data_only=True)
    try:
        return [tuple(row) for row in book.worksheets[0].iter_rows(values_only=True)]
    finally:
        book.close()


def _empty(cell: Any) -> bool:
    return cell is None or str(cell).strip() == ""


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def split(rows: int, held_out: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers for training and for evaluation, in order.

    Equal to scikit-learn's ``train_test_split(test_size=held_out, random_state=0)``, which all of the paper's tables
    are split by.
    """
    order = np.random.RandomState(0).permutation(rows)
    evals = int(np.ceil(held_out * rows))
    return order[evals:], order[:evals]


def standardise(train: Array, evals: Array) -> tuple[Array, Array]:
    """Both by the mean and the standard deviation of ``train``'s columns, as ``StandardScaler``; constants stay 0."""
    mean, std = moments(train)
    return (train - mean) / std, (evals - mean) / std


def moments(train: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of each column; 1 in place of the latter for a column of one value."""
    mean, std = train.mean(axis=0), train.std(axis=0)
    # A column of one value has a deviation of rounding alone.
    return mean, np.where(std > 10 * np.finfo(np.float64).eps * np.abs(mean), std, 1.0)
