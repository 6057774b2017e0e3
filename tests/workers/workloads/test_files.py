"""Tables are read as users have them, split and standardised as scikit-learn does, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fimo.workers.errors import UsageError
from fimo.workers.workloads.files import Source, extra, read_table, split, standardise

SOURCE = Source("Things", "things.csv from the page of things", "two columns a and b")


def refused(path: Path, *columns: str) -> str:
    with pytest.raises(UsageError) as caught:
        read_table(path, SOURCE).numbers(columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("rows", [10, 691, 768, 1030])
@pytest.mark.parametrize("held_out", [0.1, 0.25])
def test_the_split_is_scikit_learns(rows: int, held_out: float) -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    expected = selection.train_test_split(np.arange(rows), test_size=held_out, random_state=0)
    for got, wanted in zip(split(rows, held_out), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_standardising_is_scikit_learns_of_a_constant_column_too() -> None:
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    table = np.random.default_rng(0).normal(size=(40, 4)) * [1, 100, 0, 1] + [0, 5, 0.1, 1e6]
    scaler = preprocessing.StandardScaler().fit(table[:30])
    for got, part in zip(standardise(table[:30], table[30:]), (table[:30], table[30:]), strict=True):
        np.testing.assert_allclose(got, scaler.transform(part), rtol=0, atol=1e-9)


def test_a_csv_is_read_with_its_empty_rows_and_columns_left_out(tmp_path: Path) -> None:
    path = tmp_path / "things.csv"
    path.write_text("\ufeffa, b,c,,\r\n1,2,x,,\r\n3,4,y,,\r\n,,,,\r\n\r\n", encoding="utf-8")
    table = read_table(path, SOURCE)
    assert table.names == ("a", "b", "c")
    assert table.numbers(["b", "a"]).tolist() == [[2, 1], [4, 3]]
    assert table.column("c") == ["x", "y"]


def test_a_workbook_is_read_like_its_csv(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book, path = openpyxl.Workbook(), tmp_path / "things.xlsx"
    for row in (["a", "b", None], [1, 2.5, None], [3, 4, None], [None, None, None]):
        book.active.append(row)
    book.save(path)
    assert read_table(path, SOURCE).numbers(["a", "b"]).tolist() == [[1, 2.5], [3, 4]]
    path.write_bytes(b"no workbook")
    assert "things.xlsx cannot be read (BadZipFile)" in refused(path, "a")


def test_what_is_missing_or_else_is_one_line_that_says_where_to_get_it(tmp_path: Path) -> None:
    path = tmp_path / "things.csv"
    assert "things.csv from the page of things; it holds two columns a and b" in refused(path)
    for text, said in (
        ("", "is empty"),
        ("a,c\n1,2\n", "no column 'b'"),
        ("a,b\n1,2\n1,two\n", "no number in row 1, column 'b'"),
        ("a,b\n1,\n", "no number in row 0, column 'b'"),
        ("a,b\n1\n", "no number in row 0, column 'b'"),
        ("a,b\nnan,2\n", "no finite number in row 0, column 'a'"),
    ):
        path.write_text(text)
        assert said in refused(path, "a", "b")
    path.write_bytes(b"\xff\xfe\x00a")
    assert "cannot be read (UnicodeDecodeError)" in refused(path, "a")


def test_another_number_of_rows_is_refused_unless_any_is_asked_for(tmp_path: Path) -> None:
    SOURCE.check_rows(tmp_path, 5, None)
    SOURCE.check_rows(tmp_path, 5, 5)
    with pytest.raises(UsageError, match=r"has 5 rows, not 1,000 \(rows: null"):
        SOURCE.check_rows(tmp_path, 5, 1000)


def test_a_package_that_is_not_there_is_one_line_that_names_the_extra() -> None:
    with pytest.raises(UsageError, match=r"pip install 'fimo\[excel\]'"):
        extra("no_such_package", "excel")
