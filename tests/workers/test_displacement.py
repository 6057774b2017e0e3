"""Δθ̂(𝒟) against a loop of torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import RandomSampler

from fimo.workers.displacement import mean_displacement
from fimo.workers.errors import UsageError
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.settings import FurtherTraining, Optimizer
from fimo.workers.start import start_from
from tests.support.own.flowers import flowers


def test_the_mean_displacement_is_that_of_plain_baselines():
    workload = flowers()
    settings = FurtherTraining(Optimizer("sgd", 0.1, momentum=0.9), 5, epochs=2, precision="float64")
    model = FunctionalModel(workload, dtype=torch.float64)
    train = Examples(workload.train, dtype=torch.float64)
    means = mean_displacement(
        start_from(model, train, Examples(workload.evals, dtype=torch.float64), settings), [3, 4], [2, 7]
    )

    expected = {step: {n: torch.zeros_like(p) for n, p in model.params.items()} for step in (2, 7)}
    for seed in (3, 4):
        net = copy.deepcopy(workload.model).double()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        sampler = RandomSampler(range(23), generator=torch.Generator().manual_seed(seed))
        batches = [b for _ in range(2) for b in torch.tensor(list(sampler)).split(5)]
        for step, rows in enumerate(batches, start=1):
            batch = {k: v[rows].double() if v.is_floating_point() else v[rows] for k, v in workload.train.items()}
            optimizer.zero_grad()
            workload.loss(workload.outputs(net, batch), batch).mean().backward()
            optimizer.step()
            if step in expected:
                for n, p in net.named_parameters():
                    expected[step][n] += (p.detach() - model.params[n]) / 2
    for step, displacement in expected.items():
        for n, value in displacement.items():
            torch.testing.assert_close(means[step][n], value, rtol=1e-10, atol=1e-12)


def test_a_step_beyond_the_sweep_is_refused():
    workload = flowers()
    settings = FurtherTraining(Optimizer("sgd", 0.1), 5, epochs=1)
    given = start_from(FunctionalModel(workload), Examples(workload.train), Examples(workload.evals), settings)
    with pytest.raises(UsageError, match="beyond"):
        mean_displacement(given, [0], [99])
