"""CSV as tools write it: the same numbers with a header or without, and the place of what is no number."""

from __future__ import annotations

import csv
import io

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest

from fimo.orchestrator.sweep.csv import from_csv
from fimo.workers.errors import UsageError

VALUES = np.random.default_rng(0).normal(size=(7, 3)) * 10.0 ** np.arange(-12, 9).reshape(7, 3)


def matrix(data: bytes) -> np.ndarray:
    return np.stack([column.to_numpy() for column in from_csv(data, "x.csv").columns], axis=1)


def written(rows, header=None, delimiter=",", index=False) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    if header is not None:
        writer.writerow(["", *header] if index else header)
    writer.writerows([i, *row] if index else row for i, row in enumerate(rows))
    return text.getvalue().encode()


FORMS = {
    "plain": written(VALUES.tolist()),
    "named": written(VALUES.tolist(), ["a", "b", "c"]),
    "numbered": written(VALUES.tolist(), [0, 1, 2]),
    "numbered otherwise": written(VALUES.tolist(), [4, 7, 30]),
    "indexed": written(VALUES.tolist(), ["a", "b", "c"], index=True),
    "pandas": written(VALUES.tolist(), [0, 1, 2], index=True),
    "semicolons": written(VALUES.tolist(), delimiter=";"),
    "tabs": written(VALUES.tolist(), ["a", "b", "c"], delimiter="\t"),
    "byte order mark": b"\xef\xbb\xbf" + written(VALUES.tolist(), ["a", "b", "c"]),
    "blank lines": b"\n" + written(VALUES.tolist()).replace(b"\r\n", b"\n\n"),
    "blank lines and a header": b"\n" + written(VALUES.tolist(), ["a", "b", "c"]).replace(b"\r\n", b"\n\n"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_numbers_to_the_bit(form: str) -> None:
    np.testing.assert_array_equal(matrix(FORMS[form]), VALUES)


def test_arrow_s_and_numpy_s_own_files_are_read() -> None:
    sink, text = io.BytesIO(), io.StringIO()
    pacsv.write_csv(pa.table({"a": VALUES[:, 0], "b": VALUES[:, 1]}), sink)
    np.testing.assert_array_equal(matrix(sink.getvalue()), VALUES[:, :2])
    np.savetxt(text, VALUES, delimiter=",", fmt="%.18e")
    np.testing.assert_array_equal(matrix(text.getvalue().encode()), VALUES)


def test_of_the_long_form_the_columns_are_found_by_name() -> None:
    rows = [["cg", 0, 1, 0.5], ["cg", 2, 3, 1e-9]]
    table = from_csv(written(rows, ["estimator", "eval", "removal", "value"]), "x.csv")
    assert table.column_names == ["eval", "removal", "value"]
    assert table.to_pylist()[1] == {"eval": 2.0, "removal": 3.0, "value": 1e-9}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"1,2\n3,x\n", "line 2, column 2: 'x' is no finite number"),
        (b"a,b\n1,2\n3,\n", r"line 3, column 2 \(b\): '' is no finite number"),
        (b"a,b\n1,2\nnan,4\n", r"line 3, column 1 \(a\): 'nan'"),
        (b"a,b\n\n1,2\n\n3,NA\n", r"line 5, column 2 \(b\): 'NA'"),
        (b"1,2\n3,1.5.2\n", "line 2, column 2: '1.5.2'"),
        (b"1;2\n3;1,5\n", "line 2, column 2: '1,5'"),
        (b"1,2\n3\n", "line 2 has 1 cells, the first line 2"),
        (b"removal,eval,value\n0,1,high\n", r"column 3 \(value\): 'high'"),
        (b",0,1\n0,1.5,2.5\n10,3.5,4.5\n2,5.5,6.5\n", "rows 0, 10, 2, but a matrix is read by place"),
        (b"a,b\n", "no row"),
        (b"0,10,2\n1.5,2.5,3.5\n", "columns 0, 10, 2, but a matrix is read by place"),
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"\xff\xfe1,2", "UTF-8"),
    ],
)
def test_what_is_no_number_is_refused_with_its_place(data: bytes, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        from_csv(data, "x.csv")
    assert "\n" not in str(caught.value)
