from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fimo.orchestrator.run.plan import make_plan, shard_size
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.workers.settings import FurtherTraining, Optimizer

SETTINGS = FurtherTraining(Optimizer("sgd", 0.1), 5, epochs=2)


def loo(count: int) -> list[NamedRemoval]:
    return [NamedRemoval(i, str(i), (i,)) for i in range(count)]


@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(1, 7),
    st.sets(st.tuples(st.integers(0, 4), st.integers(0, 11)), max_size=40),
)
def test_every_missing_cell_is_planned_exactly_once_and_no_done_one(removals, seeds, size, finished):
    done: dict[int, set[tuple[int, ...]]] = {}
    for seed, index in finished:
        done.setdefault(seed, set()).add((index,))
    found = make_plan(loo(removals), range(seeds), done, SETTINGS, 23, 7, size)
    planned = [(s.seed, r.indices) for s in found.shards for r in s.removals]
    grid = {(seed, (i,)) for seed in range(seeds) for i in range(removals)}
    there = {(seed, (i,)) for seed, i in finished}
    assert len(planned) == len(set(planned))
    assert set(planned) == grid - there
    assert found.done == len(grid & there)
    assert all(len(s.removals) <= size for s in found.shards)
    assert [s.seed for s in found.shards] == sorted(s.seed for s in found.shards)


@given(st.integers(1, 12), st.integers(1, 5), st.data())
def test_what_is_missing_after_lost_parts_is_cut_into_the_same_parts(removals, size, data):
    whole = make_plan(loo(removals), [0], {}, SETTINGS, 23, 7, size).shards
    kept = data.draw(st.sets(st.sampled_from(range(len(whole)))))
    done = {0: {r.indices for k in kept for r in whole[k].removals}}
    again = make_plan(loo(removals), [0], done, SETTINGS, 23, 7, size).shards
    assert list(again) == [s for k, s in enumerate(whole) if k not in kept]


def test_removals_of_equal_indices_are_one_cell():
    twins = [NamedRemoval(0, "a", (3,)), NamedRemoval(1, "b", (3,)), NamedRemoval(2, "c", (4,))]
    [shard] = make_plan(twins, [0], {}, SETTINGS, 23, 7, 10).shards
    assert [r.indices for r in shard.removals] == [(3,), (4,)]


def test_shards_are_smaller_where_a_cell_is_dear():
    assert shard_size(17_793, 4000) == 100
    assert shard_size(110_000_000, 2105) == 17
    assert shard_size(10**10, 10**5) == 8
