"""Shards of several seeds in one stack have the numbers of each alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fimo.workers import shard
from fimo.workers.amounts import Removal
from fimo.workers.definition import train_cell
from fimo.workers.errors import UsageError
from fimo.workers.further_training import further_train
from fimo.workers.settings import Evaluate, Optimizer
from fimo.workers.shard import run_shard, run_shards
from fimo.workers.start import Engine
from fimo.workers.workload import Workload
from tests.support.recorded import Counted, record
from tests.workers.problems import classification, make, regression, sentences, settings

SHARDS: list[tuple[list[Removal], int]] = [([(3,), (4, 9), (22,)], 5), ([(3,), (4, 9), (22,)], 6), ([(0,)], 11)]
ADAMW = Optimizer("adamw", lr=0.01, weight_decay=0.1)
SGD = Optimizer("sgd", lr=0.02, momentum=0.9)


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
    for got, (removals, seed) in zip(run_shards(start, SHARDS, replicas), SHARDS, strict=True):
        assert (got.seed, got.replicas) == (seed, replicas)
        assert got.deltas.shape == (len(removals) + 2, 2, len(start.at_final))
        for row, removal in enumerate([*removals, (), ()]):
            plain = train_cell(workload(), chosen, removal, seed)
            torch.testing.assert_close(got.deltas[row], plain.deltas, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(got.distances[row], plain.distances, rtol=1e-9, atol=1e-10)


def test_a_step_of_several_seeds_is_launched_with_the_same_numbers() -> None:
    start = make(regression(), settings(SGD, removal_mode="reweight", epochs=9, evaluate=Evaluate(every_epochs=1)))
    start, Counted.launched = replace(start, graphs=None), 0
    launched, run = (run_shards(replace(start, captures=r), SHARDS, 64) for r in (record, None))
    assert Counted.launched > 20
    for got, expected in zip(launched, run, strict=True):
        torch.testing.assert_close(got.deltas, expected.deltas, rtol=1e-12, atol=1e-12)


def test_a_forward_that_draws_is_trained_seed_by_seed() -> None:
    chosen = settings(SGD, removal_mode="drop", precision="float32")
    start = make(regression(middle=nn.Dropout(0.5)), chosen)
    together = run_shards(start, SHARDS, 4)
    for got, (removals, seed) in zip(together, SHARDS, strict=True):
        assert torch.equal(got.deltas, run_shard(start, removals, seed, 4).deltas)
    with pytest.raises(UsageError, match="several seeds"):
        further_train(start, [(), ()], [1, 2])


@pytest.mark.parametrize(("fit", "first"), [(4, [10, 8, 4, 4]), (2, [10, 8, 4, 2])])
def test_stacks_of_several_seeds_halve_when_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch, fit: int, first: list[int]
) -> None:
    start, right, sizes = make(regression(), settings(removal_mode="drop")), further_train, list[int]()

    def bounded(start, lanes, *more, **options):
        sizes.append(len(lanes))
        if len(lanes) > fit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return right(start, lanes, *more, **options)

    expected = run_shards(start, SHARDS, 64)
    monkeypatch.setattr(shard, "further_train", bounded)
    got = run_shards(start, SHARDS, 16)
    assert sizes[:4] == first
    assert {result.replicas for result in got} == {fit}
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.deltas, other.deltas, rtol=1e-10, atol=1e-10)


def test_the_second_baselines_are_of_another_stack_size(monkeypatch: pytest.MonkeyPatch) -> None:
    start, right, sizes = make(regression(), settings(removal_mode="drop")), further_train, list[int]()

    def counted(start, lanes, *more, **options):
        sizes.append(len(lanes))
        return right(start, lanes, *more, **options)

    monkeypatch.setattr(shard, "further_train", counted)
    run_shards(start, [([(3,)], 5), ([(3,)], 6), ([(3,)], 7)], 3)
    assert sizes == [3, 3, 2, 1]
