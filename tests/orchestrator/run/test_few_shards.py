"""A large cluster with few shards is told what to do before it waits for its slowest node."""

from __future__ import annotations

import pytest

from fimo.orchestrator.run.owed import few_shards
from fimo.orchestrator.run.work import EstimateTask, Shard
from fimo.orchestrator.spec.removals import NamedRemoval


def shards(count: int, size: int) -> list[Shard]:
    removals = tuple(NamedRemoval(i, str(i), (i,)) for i in range(size))
    return [Shard(seed, removals) for seed in range(count)]


def test_few_shards_a_place_are_told_with_the_size_that_makes_five():
    line = few_shards(shards(1000, 100), 1000)
    assert line.startswith(
        "1000 shards for 1000 places: at the end they wait for the slowest; `resources: {shard: 20}`"
    )


@pytest.mark.parametrize(
    ("tasks", "slots"),
    [
        (shards(5000, 20), 1000),
        (shards(3, 100), 2),
        (shards(20, 1), 1000),
        ([], 1000),
        ([EstimateTask("cg", "{}", (), 0, 5, True, None)], 1000),
    ],
    ids=["enough", "a small machine", "no smaller ones", "nothing", "no shards"],
)
def test_nothing_is_told_where_nothing_can_be_done(tasks, slots):
    assert few_shards(tasks, slots) is None
