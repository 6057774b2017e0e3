"""Estimators, and a shard, on a device that is not the CPU: nothing is left behind, and the bits are the same."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from torch import nn

from fimo.estimators import REGISTRY, Problem, parse
from fimo.workers import further_training, start
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.workload import Workload
from tests.estimators import problems
from tests.estimators.test_determined import SMALL, TRAINING
from tests.support import numbered_gpu
from tests.workers.problems import regression, sentences, settings

OPTIONS = {"ekfac": [{}, {"fisher": "sampled"}], "trak": [{}, {"projection": "sparse"}]}
CASES = [(name, options) for name in sorted(REGISTRY) for options in OPTIONS.get(name, [{}])]


def placed(workload: Workload, device: torch.device) -> tuple[FunctionalModel, Examples, Examples]:
    train, evals = (Examples(s, workload.collate, device, torch.float64) for s in (workload.train, workload.evals))
    return FunctionalModel(workload, device=device, dtype=torch.float64), train, evals


@pytest.mark.parametrize(("name", "options"), CASES)
def test_an_estimators_values_are_the_cpus(name: str, options: dict[str, object]) -> None:
    with mock.patch.object(problems, "problem", side_effect=problems.problem) as made:
        problems.classification()
    workload = made.call_args.args[0]
    chosen = dataclasses.replace(TRAINING, removal_mode="reweight")

    def values(device: torch.device) -> torch.Tensor:
        (estimator,) = parse({"name": name, **SMALL.get(name, {}), **options})
        given = Problem(*placed(workload, device), [[0], [1, 2, 3]], further_training=chosen, seeds=(0,))
        found: torch.Tensor = estimator.estimate(given).values
        return found

    with numbered_gpu.gpu() as device:
        there = values(device)
    assert type(there) is torch.Tensor
    assert torch.equal(there, values(torch.device("cpu")))


@pytest.mark.parametrize("mode", ["drop", "mask", "reweight"])
@pytest.mark.parametrize("workload", [regression, sentences, lambda: regression(middle=nn.Dropout(0.5))])
def test_a_shards_deltas_are_the_cpus(workload, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nesterov = Optimizer("sgd", 0.02, momentum=0.9, nesterov=True)
    chosen: FurtherTraining = settings(
        nesterov, removal_mode=mode, clip_norm=1.0, epochs=2, evaluate=Evaluate(every_epochs=1)
    )
    for module in (further_training, start):
        monkeypatch.setattr(module, "is_gpu", lambda _: True)

    def deltas(device: torch.device) -> torch.Tensor:
        began = start.start_from(*placed(workload(), device), chosen)
        return run_shard(began, [(3,), (4, 9), (17,)], 5, 3).deltas

    with numbered_gpu.gpu() as device:
        there = deltas(device)
    assert type(there) is torch.Tensor
    torch.testing.assert_close(there, deltas(torch.device("cpu")), rtol=1e-12, atol=1e-12)


def test_what_is_left_behind_is_seen() -> None:
    with numbered_gpu.gpu() as device:
        x = torch.ones(3).to(device)
        assert float((x * 2 + torch.tensor(1.0)).sum()) == 9
        assert x[torch.tensor([0, 2])].cpu().tolist() == [1, 1]
        with pytest.raises(numbered_gpu.MixedError):
            x + torch.ones(3)
