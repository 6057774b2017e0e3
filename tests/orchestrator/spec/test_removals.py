from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import pytest

from fimo.orchestrator.spec.removals import number_removals
from fimo.orchestrator.spec.spec import RemovalsSection
from fimo.orchestrator.tables.attributed import removals_table
from fimo.workers.errors import UsageError


def no_file(name: str) -> bytes:
    raise AssertionError(name)


def no_column(name: str):
    raise AssertionError(name)


def number(spec: dict, n: int = 30, read=no_file, column=no_column):
    return number_removals(RemovalsSection.model_validate(spec), n, read, column)


def indices(spec: dict, n: int = 30, read=no_file) -> list[tuple[int, ...]]:
    return [r.indices for r in number(spec, n, read)]


def test_every_count_is_the_paper_s_range():
    assert indices({"every": 9, "count": 100}, 927) == [(i,) for i in range(0, 900, 9)]
    assert indices({"every": 9}, 30) == [(0,), (9,), (18,), (27,)]


def test_all_and_indices_and_groups_keep_spec_order():
    assert indices({"all": True}, 4) == [(0,), (1,), (2,), (3,)]
    assert indices({"indices": [5, 2]}) == [(5,), (2,)]
    named = number({"groups": {"b": [4, 1], "a": [], "c": [2]}})
    assert [(r.number, r.name, r.indices) for r in named] == [(0, "b", (1, 4)), (1, "a", ()), (2, "c", (2,))]


def test_a_larger_random_draw_keeps_the_smaller_one_s():
    small, large = indices({"random": 5, "seed": 3}), indices({"random": 9, "seed": 3})
    assert large[:5] == small
    assert len(set(large)) == 9
    assert indices({"random": 5, "seed": 4}) != small


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("r.txt", b"3\n4, 5  # a pair\n\n7\n"),
        ("r.json", b"[3, [4, 5], 7]"),
        ("r.yaml", b"- 3\n- [4, 5]\n- 7\n"),
    ],
)
def test_removals_from_files_of_each_kind(name, data):
    assert indices({"from": name}, read=lambda _: data) == [(3,), (4, 5), (7,)]


def test_removals_from_a_pulled_table():
    table = removals_table(number({"groups": {"x": [1, 2], "y": [3]}}))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    named = number({"from": "removals.parquet"}, read=lambda _: sink.getvalue())
    assert [(r.name, r.indices) for r in named] == [("x", (1, 2)), ("y", (3,))]


def test_random_groups_are_numpy_s_draws_without_replacement_and_a_larger_count_keeps_the_smaller_one_s():
    named = number({"fraction": 0.05, "count": 4, "seed": 7}, 100)
    generator = np.random.default_rng(7)
    drawn = [tuple(sorted(generator.choice(100, size=5, replace=False).tolist())) for _ in range(4)]
    assert [(r.name, r.indices) for r in named] == [(f"random-{i}", d) for i, d in enumerate(drawn)]
    assert number({"fraction": 0.05, "count": 9, "seed": 7}, 100)[:4] == named
    assert number({"fraction": 0.05, "count": 4, "seed": 8}, 100) != named
    assert number({"fraction": 0.05, "count": 4}, 100) == number({"fraction": 0.05, "count": 4, "seed": 0}, 100)


@pytest.mark.parametrize(
    ("values", "groups"),
    [
        (np.array([3, -1, 3, 0, 0], dtype=np.int64), [("k=-1", (1,)), ("k=0", (3, 4)), ("k=3", (0, 2))]),
        (np.array([3, 250, 3, 250, 3], dtype=np.uint8), [("k=3", (0, 2, 4)), ("k=250", (1, 3))]),
        (np.array([True, False, True, True, True]), [("k=false", (1,)), ("k=true", (0, 2, 3, 4))]),
        (np.array([0.1, 2.0, 0.1, np.nan, np.nan], np.float32), [("k=0.1", (0, 2)), ("k=2", (1,)), ("k=nan", (3, 4))]),
    ],
)
def test_a_group_for_each_value_of_a_column_in_the_order_of_the_values(values, groups):
    assert [(r.name, r.indices) for r in number({"by": "k"}, 5, column=lambda _: values)] == groups


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros(30), "one value alone"),
        (np.arange(30), "30 values in 30 training examples"),
        (np.repeat(np.arange(101) / 7, 2), "101 values in 202 training examples"),
        (np.repeat(np.arange(1001), 2), "1001 values in 2002"),
    ],
)
def test_a_column_that_is_no_grouping_is_refused_in_one_line(values, said):
    with pytest.raises(UsageError, match=said) as caught:
        number({"by": "k"}, len(values), column=lambda _: values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"fraction": 0.01, "count": 2}, "is 0 of them: give a larger"),
        ({"fraction": 0.99, "count": 2}, "is 30 of them: a removal must leave some"),
        ({"indices": [30]}, "there are 30"),
        ({"every": 9, "count": 100}, "names training example 36"),
        ({"groups": {"a": [1, 1]}}, "twice"),
        ({"indices": [1, 4, 1]}, "names training example 1 twice"),
        ({"groups": {"a": list(range(30))}}, "leaves no training example"),
        ({"random": 31}, "31 of 30"),
    ],
)
def test_a_removal_outside_the_training_set_is_refused(spec, said):
    with pytest.raises(UsageError, match=said):
        indices(spec)


@pytest.mark.parametrize("data", [b"PAR1 torn", b"\xff\xfe\x00", b"three", b"1.5"])
def test_a_foreign_removals_file_is_refused_in_one_line(data):
    with pytest.raises(UsageError) as caught:
        indices({"from": "file"}, read=lambda _: data)
    assert "\n" not in str(caught.value)
