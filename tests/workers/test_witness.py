"""A witness is the sweep's cell in other rounding, and in nothing else: same order, same masks, same removal mode."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fimo.workers import witness as witnessing
from fimo.workers.settings import Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.start import Start
from fimo.workers.witness import MOVED, WIDE, train_witness, witness_start
from fimo.workers.workload import Workload
from tests.workers.problems import every_step, make, regression, settings
from tests.workers.test_against_definition import MODES

REMOVALS = [(3,), (17,), (4, 9)]


def effects(result) -> Tensor:
    return result.deltas[:-2] - result.deltas[-2]


def start_of(workload: Workload, **changes: object) -> Start:
    return make(workload, settings(**{"precision": "float32", **changes}))


def drawing(rate: float = 0.5) -> Workload:
    return regression(middle=nn.Dropout(rate))


def differences(workload: Workload, start: Start, replicas: int = 4) -> tuple[Tensor, Tensor, str]:
    """Effects of the sweep, how far the witnesses' are from them, and how these were trained."""
    witness = witness_start(workload, None, start)
    own = effects(run_shard(start, REMOVALS, 1, replicas))
    return own, effects(train_witness(witness, REMOVALS, 1, replicas)) - own, witness.how


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workload", [regression, drawing])
def test_a_float32_cell_s_witness_is_the_float64_sweep_s_cell(workload, mode: str) -> None:
    """With dropout too: the masks are those of the sweep."""
    problem = workload()
    start = start_of(problem, removal_mode=mode)
    own, difference, how = differences(problem, start)
    wide = effects(run_shard(start_of(problem, removal_mode=mode, precision="float64"), REMOVALS, 1, 2))
    assert how == WIDE
    assert 0 < difference.abs().max() < 1e-3 * own.abs().max()
    torch.testing.assert_close(own + difference, wide, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("replicas", [1, 4])
def test_a_float64_cell_s_witness_starts_a_unit_in_the_last_place_away(mode: str, replicas: int) -> None:
    problem = drawing()
    own, difference, how = differences(problem, start_of(problem, removal_mode=mode, precision="float64"), replicas)
    assert how == MOVED
    assert 0 < difference.abs().max() < 1e-11 * own.abs().max()


def test_a_model_that_draws_otherwise_in_float64_is_witnessed_in_float32() -> None:
    """Noise from ``torch.randn`` is another sequence in float64, and would pass for rounding of the size of effects."""

    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.3 * torch.randn_like(x) if self.training else x

    problem = regression(middle=Noise())
    start = start_of(problem)
    own, difference, how = differences(problem, start)
    assert how == MOVED
    assert 0 < difference.abs().max() < 1e-3 * own.abs().max()
    wide = witnessing._start(problem, None, start, torch.float64)
    otherwise = effects(run_shard(wide, REMOVALS, 1, 4)) - own
    assert otherwise.abs().max() > 0.1 * own.abs().max()


def test_the_effect_is_exactly_0_before_the_first_difference() -> None:
    problem = regression()
    for mode in ("drop", "mask"):
        own, difference, _ = differences(problem, start_of(problem, removal_mode=mode, evaluate=every_step(12)))
        still = own == 0
        assert still.any()
        assert not still.all()
        assert (difference[still] == 0).all()


def test_the_engine_and_what_is_trained_are_the_sweep_s() -> None:
    problem = regression()
    start = start_of(problem, trainable=("0.*",), optimizer=Optimizer("adamw", lr=0.01), removal_mode=None)
    start = start.using(replace(start.engine, stack=False, replay=False))
    witness = witness_start(problem, None, start)
    assert witness.start.engine == start.engine
    assert witness.start.graphs is None
    assert witness.start.settings == replace(start.settings, precision="float64")
    assert witness.start.model.params.keys() == start.model.params.keys()
    assert train_witness(witness, REMOVALS, 0, 8).replicas == 1


def test_the_baseline_s_row_stands_in_for_the_second() -> None:
    problem = regression()
    result = train_witness(witness_start(problem, None, start_of(problem)), REMOVALS, 0, 2)
    assert result.deltas.shape[0] == len(REMOVALS) + 2
    assert torch.equal(result.deltas[-1], result.deltas[-2])
    assert torch.equal(result.distances[-1], result.distances[-2])
    assert result.deltas.isfinite().all()
