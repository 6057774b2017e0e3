"""How many replicas a GPU is tried with: by a line through what the sizes so far took, never by failing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fimo.workers.stacking import size
from fimo.workers.stacking.size import measure_stack_size, most_that_fit
from tests.workers.problems import make, regression, settings

MIB = 2**20


@pytest.mark.parametrize(
    ("bytes_of", "memory", "most"),
    [
        ({}, 100 * MIB, 2048),
        ({1: 5 * MIB}, 100 * MIB, 2048),
        ({1: 5 * MIB, 2: 8 * MIB}, 0, 2048),
        # 2 MiB and 3 for each: 29 in 90% of 100.
        ({1: 5 * MIB, 2: 8 * MIB}, 100 * MIB, 29),
        # A stack of one does not vmap: the line goes through the last two.
        ({1: 1 * MIB, 2: 8 * MIB, 4: 14 * MIB}, 100 * MIB, 29),
        # What fitted fits.
        ({2: 50 * MIB, 4: 95 * MIB}, 100 * MIB, 4),
    ],
)
def test_what_fits_is_read_off_a_line(bytes_of: dict[int, int], memory: int, most: int) -> None:
    assert most_that_fit(bytes_of, memory) == most


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], tuple[int, list[int]]]:
    """Measure on a GPU of so many bytes, of which a replica takes 3 MiB and a stack 2, for so many cells."""

    def measure(memory: int, cells: int) -> tuple[int, list[int]]:
        sizes: list[int] = []

        def time_stack(_start: object, lanes: list[object], **_more: object) -> float:
            sizes.append(len(lanes))
            if (2 + 3 * len(lanes)) * MIB > memory:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return 1.0 / len(lanes)

        monkeypatch.setattr(size, "is_gpu", lambda _: True)
        monkeypatch.setattr(size, "room", lambda _: memory)
        monkeypatch.setattr(size, "peak_reserved", lambda _: (2 + 3 * sizes[-1]) * MIB)
        monkeypatch.setattr(size, "time_stack", time_stack)
        return measure_stack_size(make(regression(), settings()), cells)[0], sizes

    return measure


def test_the_largest_that_fits_is_tried_and_nothing_above_it(tried) -> None:
    assert tried(100 * MIB, 500) == (29, [1, 2, 4, 8, 12, 16, 24, 29])


def test_all_cells_at_once_if_they_fit(tried) -> None:
    assert tried(10_000 * MIB, 101) == (101, [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 101])
    assert tried(10_000 * MIB, 2020)[1][-3:] == [1024, 1536, 2020]
