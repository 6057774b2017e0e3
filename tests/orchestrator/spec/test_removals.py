from __future__ import annotations

import io

import pyarrow.parquet as pq
import pytest

from fimo.orchestrator.spec.removals import number_removals
from fimo.orchestrator.spec.spec import RemovalsSection
from fimo.orchestrator.tables.reduce import removals_table
from fimo.workers.errors import UsageError


def no_file(name: str) -> bytes:
    raise AssertionError(name)


def indices(spec: dict, n: int = 30, read=no_file) -> list[tuple[int, ...]]:
    return [r.indices for r in number_removals(RemovalsSection.model_validate(spec), n, read)]


def test_every_count_is_the_paper_s_range():
    assert indices({"every": 9, "count": 100}, 927) == [(i,) for i in range(0, 900, 9)]
    assert indices({"every": 9}, 30) == [(0,), (9,), (18,), (27,)]


def test_all_and_indices_and_groups_keep_spec_order():
    assert indices({"all": True}, 4) == [(0,), (1,), (2,), (3,)]
    assert indices({"indices": [5, 2]}) == [(5,), (2,)]
    named = number_removals(RemovalsSection.model_validate({"groups": {"b": [4, 1], "a": [], "c": [2]}}), 30, no_file)
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
    table = removals_table(
        number_removals(RemovalsSection.model_validate({"groups": {"x": [1, 2], "y": [3]}}), 30, no_file)
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    named = number_removals(RemovalsSection.model_validate({"from": "removals.parquet"}), 30, lambda _: sink.getvalue())
    assert [(r.name, r.indices) for r in named] == [("x", (1, 2)), ("y", (3,))]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"indices": [30]}, "there are 30"),
        ({"every": 9, "count": 100}, "names training example 36"),
        ({"groups": {"a": [1, 1]}}, "twice"),
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
