"""Replicas of several learning rates in one stack: each against the definition at its own rate, and its own stack."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fimo.workers.definition import train_cell
from fimo.workers.further_training import further_train
from fimo.workers.joined import run_rates
from fimo.workers.settings import FurtherTraining
from fimo.workers.shard import run_shard
from tests.workers.problems import classification, every_step, make, regression, settings
from tests.workers.test_against_definition import OPTIMIZERS

RATES = (0.05, 0.02, 0.0005)
CELLS = [(), (3,), (4, 9, 20)]


def at(chosen: FurtherTraining, rate: float) -> FurtherTraining:
    return replace(chosen, optimizer=replace(chosen.optimizer, lr=rate))


@pytest.mark.parametrize(
    ("optimizer", "mode"), [*((name, "drop") for name in OPTIMIZERS), ("sgd", "mask"), ("adamw", "reweight")]
)
def test_every_rate_is_torchs_own_optimizer_s(optimizer: str, mode: str) -> None:
    """Rates lie side by side, and come again apart from their equals; 12 steps over ragged batches."""
    workload, chosen = regression(), settings(OPTIMIZERS[optimizer], removal_mode=mode, steps=12)
    chosen = replace(chosen, evaluate=every_step(12))
    lanes = [(rate, cell) for rate in RATES for cell in CELLS] + [(RATES[0], (17,))]
    rates, cells = zip(*lanes, strict=True)
    got = further_train(make(workload, chosen), cells, 5, rates=rates)
    for lane, (rate, cell) in enumerate(lanes):
        own = train_cell(workload, at(chosen, rate), cell, 5)
        assert own.deltas.abs().max() > 1e-5
        torch.testing.assert_close(got.deltas[lane], own.deltas, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(got.distances[lane], own.distances, rtol=1e-11, atol=1e-11)


def test_clipping_and_integer_labels_are_each_replica_s_own() -> None:
    workload, chosen = classification(), settings(OPTIMIZERS["adamw"], clip_norm=0.5, removal_mode="mask")
    got = further_train(make(workload, chosen), [(), (3,), (), (3,)], 5, rates=[0.01, 0.01, 0.1, 0.1])
    for lane, (rate, cell) in enumerate([(0.01, ()), (0.01, (3,)), (0.1, ()), (0.1, (3,))]):
        own = train_cell(workload, at(chosen, rate), cell, 5)
        torch.testing.assert_close(got.deltas[lane], own.deltas, rtol=1e-11, atol=1e-11)


def test_one_rate_for_all_is_the_plain_stack_bit_for_bit() -> None:
    start = make(regression(), settings(OPTIMIZERS["adam"], precision="float32"))
    plain = further_train(start, CELLS, 5)
    rated = further_train(start, CELLS, 5, rates=[0.01] * 3)
    assert torch.equal(plain.deltas, rated.deltas)
    assert torch.equal(plain.distances, rated.distances)


@pytest.mark.parametrize(("mode", "replicas"), [("drop", 1), ("drop", 5), ("reweight", 100)])
def test_a_shard_of_several_rates_is_one_shard_of_each(mode: str, replicas: int) -> None:
    """Order of rows, second baselines, and effects that are exactly 0 before a removal's first batch."""
    workload, chosen = (
        regression(),
        settings(OPTIMIZERS["momentum"], removal_mode=mode, steps=12, evaluate=every_step(12)),
    )
    removals = [(3,), (17,), (4, 9, 20)]
    together = run_rates(make(workload, chosen), removals, 5, replicas, RATES)
    for rate, got in zip(RATES, together, strict=True):
        alone = run_shard(make(workload, at(chosen, rate)), removals, 5, replicas)
        assert (got.seed, got.steps, got.scale) == (alone.seed, alone.steps, alone.scale)
        torch.testing.assert_close(got.deltas, alone.deltas, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(got.distances, alone.distances, rtol=1e-11, atol=1e-11)
        zero = (alone.deltas[:3] == alone.deltas[3]).all(dim=2)
        assert torch.equal(zero, (got.deltas[:3] == got.deltas[3]).all(dim=2))
        assert got.seconds > 0
