"""Shards of several seeds in one stack have the numbers of each alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import nn

from fimo.workers import joined, shard
from fimo.workers.amounts import Removal
from fimo.workers.definition import train_cell
from fimo.workers.errors import UsageError
from fimo.workers.further_training import further_train
from fimo.workers.joined import joint_sizes, run_shards, train_again
from fimo.workers.settings import Evaluate, Optimizer
from fimo.workers.shard import ShardResult, run_shard
from fimo.workers.start import Engine
from fimo.workers.workload import Workload
from tests.support.recorded import Counted, record
from tests.workers.problems import classification, make, regression, sentences, settings

SHARDS: list[tuple[list[Removal], int]] = [([(3,), (4, 9), (22,)], 5), ([(3,), (4, 9), (22,)], 6), ([(0,)], 11)]
ADAMW = Optimizer("adamw", lr=0.01, weight_decay=0.1)
SGD = Optimizer("sgd", lr=0.02, momentum=0.9)


def all_of(stacks: Iterable[tuple[range, list[ShardResult]]]) -> list[ShardResult]:
    return [result for _, results in stacks for result in results]


def normed() -> Workload:
    torch.manual_seed(0)
    return classification(model=nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))


@pytest.mark.parametrize(
    ("workload", "optimizer", "mode", "replicas", "fold"),
    [
        (classification, SGD, "drop", 4, True),
        (classification, ADAMW, "mask", 64, True),
        (regression, ADAMW, "reweight", 64, True),
        (regression, SGD, "reweight", 7, False),
        (regression, SGD, "drop", 3, False),
        (normed, SGD, "mask", 64, True),
        (sentences, SGD, "reweight", 5, True),
        (lambda: regression(n=26), ADAMW, "drop", 64, True),
    ],
)
def test_shards_together_are_each_as_by_the_definition(workload, optimizer, mode, replicas, fold) -> None:
    chosen = settings(optimizer, removal_mode=mode, epochs=2, evaluate=Evaluate(every_epochs=1), clip_norm=0.5)
    start = make(workload(), chosen).using(Engine(fold=fold))
    for got, (removals, seed) in zip(all_of(run_shards(start, SHARDS, replicas)), SHARDS, strict=True):
        assert (got.seed, got.replicas) == (seed, replicas)
        assert got.deltas.shape == (len(removals) + 2, 2, len(start.at_final))
        for row, removal in enumerate([*removals, (), ()]):
            plain = train_cell(workload(), chosen, removal, seed)
            torch.testing.assert_close(got.deltas[row], plain.deltas, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(got.distances[row], plain.distances, rtol=1e-9, atol=1e-10)


def test_a_step_of_several_seeds_is_launched_with_the_same_numbers() -> None:
    start = make(regression(), settings(SGD, removal_mode="reweight", epochs=9, evaluate=Evaluate(every_epochs=1)))
    start, Counted.launched = replace(start, graphs=None), 0
    launched, run = (all_of(run_shards(replace(start, captures=r), SHARDS, 64)) for r in (record, None))
    assert Counted.launched > 20
    for got, expected in zip(launched, run, strict=True):
        torch.testing.assert_close(got.deltas, expected.deltas, rtol=1e-12, atol=1e-12)


def test_a_forward_that_draws_is_trained_seed_by_seed() -> None:
    chosen = settings(SGD, removal_mode="drop", precision="float32")
    start = make(regression(middle=nn.Dropout(0.5)), chosen)
    together = all_of(run_shards(start, SHARDS, 4))
    for got, (removals, seed) in zip(together, SHARDS, strict=True):
        assert torch.equal(got.deltas, run_shard(start, removals, seed, 4).deltas)
    with pytest.raises(UsageError, match="several seeds"):
        further_train(start, [(), ()], [1, 2])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the stacks of several shards, as they are trained."""
    right, sizes = further_train, list[int]()

    def counted(start, lanes, *more, **options):
        sizes.append(len(lanes))
        return right(start, lanes, *more, **options)

    monkeypatch.setattr(joined, "further_train", counted)
    return sizes


EACH: list[tuple[list[Removal], int]] = [([(3,)], seed) for seed in range(7)]


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (64, [14, 7]),
        (8, [8, 4, 6, 3]),
        (5, [4, 2, 4, 2, 4, 2]),
        (3, []),
        (1, []),
    ],
)
def test_a_stack_holds_whole_shards_and_all_stacks_are_of_like_size(trained, size: int, sizes: list[int]) -> None:
    start = make(regression(), settings(removal_mode="drop"))
    assert [result.seed for result in all_of(run_shards(start, EACH, size))] == list(range(7))
    assert trained == sizes, "each stack, and its second baselines in a stack of another size"


def test_a_stack_of_which_nothing_is_wanted_is_not_trained(trained) -> None:
    start = make(regression(), settings(removal_mode="drop"))
    every = all_of(run_shards(start, EACH, 8))
    trained.clear()
    [(places, results)] = run_shards(start, EACH, 8, wanted={5})
    assert places == range(4, 7)
    assert trained == [6, 3], "the others of its stack are trained with it"
    assert all(torch.equal(one.deltas, every[place].deltas) for place, one in zip(places, results, strict=True))


@pytest.mark.parametrize(
    ("fit", "sizes"),
    [(14, [14, 7]), (8, [14, 6, 3, 4, 2, 4, 2]), (4, [14, 6, 1])],
    ids=["it fits", "half fits", "no two fit"],
)
def test_a_stack_that_memory_does_not_hold_is_cut_and_what_is_done_stays_done(
    monkeypatch: pytest.MonkeyPatch, fit: int, sizes: list[int]
) -> None:
    start, right, met = make(regression(), settings(removal_mode="drop")), further_train, list[int]()

    def bounded(start, lanes, *more, **options):
        met.append(len(lanes))
        if len(lanes) > fit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return right(start, lanes, *more, **options)

    expected = all_of(run_shards(start, EACH, 64))
    monkeypatch.setattr(joined, "further_train", bounded)
    monkeypatch.setattr(shard, "further_train", bounded)
    got = all_of(run_shards(start, EACH, 64))
    assert met[: len(sizes)] == sizes
    assert [result.seed for result in got] == list(range(7))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.deltas, other.deltas, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("removals", "seeds", "replicas", "sizes"),
    [
        ([3], 7, 64, [28]),
        ([3], 7, 16, [16, 12]),
        ([10], 46, 128, [110, 99]),
        ([100, 3], 5, 64, [20]),  # the last shards of a seed alone fit together
        ([100], 5, 64, []),
        ([3], 1, 64, []),
    ],
)
def test_the_sizes_that_are_proven_are_those_that_are_trained(removals, seeds, replicas, sizes) -> None:
    start = make(regression(), settings(removal_mode="drop"))
    assert joint_sizes(start, removals, seeds, replicas) == sizes


@pytest.mark.parametrize(
    ("mode", "size", "together"),
    [
        *((mode, 64, True) for mode in ("drop", "mask", "reweight")),
        *(("drop", 3, False), ("mask", 2, False), ("reweight", 1, False)),
        *(
            pytest.param(mode, size, False, marks=pytest.mark.slow)
            for mode, size in [("drop", 2), ("drop", 1), ("mask", 3), ("mask", 1), ("reweight", 3), ("reweight", 2)]
        ),
    ],
)
def test_a_cell_is_trained_again_bit_for_bit_in_the_stack_that_it_was_part_of(mode, size, together) -> None:
    chosen = settings(SGD, removal_mode=mode, precision="float32", epochs=2, evaluate=Evaluate(every_steps=1))
    start = make(regression(), chosen)
    shards: list[tuple[list[Removal], int]] = [([(3,), (4, 9), (22,), (0,)], 5), ([(1,), (17,)], 6), ([(3,)], 6)]
    for which, result in enumerate(all_of(run_shards(start, shards, size))):
        own = (shards, which) if together else ([shards[which]], 0)
        for row in range(len(shards[which][0])):
            cell, baseline = train_again(start, *own, row, size)
            assert torch.equal(cell, result.deltas[row])
            assert torch.equal(baseline, result.deltas[-2])
