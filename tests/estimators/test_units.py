"""What a value is of an effect, as every estimator says it, against further training itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fimo import Workload, estimators
from fimo.workers.definition import attribution
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer

N, LR, STEPS = 24, 0.002, 20
SCALES = {
    "n times an effect": float(N),
    "n / (learning rate * step) times an effect": N / (LR * STEPS),
    "an effect, in units of g": 1.0,
}


def problem() -> tuple[estimators.Problem, torch.Tensor]:
    """Full batches of a linear model near its optimum: to first order every model of training holds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N + 5, 3, generator=generator, dtype=torch.float64) * 0.2
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.1 * torch.randn(
        N + 5, generator=generator, dtype=torch.float64
    )
    model = nn.Linear(3, 1).double()
    with torch.no_grad():
        solution = torch.linalg.lstsq(torch.cat([x[:N], torch.ones(N, 1)], 1), y[:N, None]).solution
        model.weight.copy_(solution[:3].T)
        model.bias.copy_(solution[3])
    workload = Workload(
        model,
        {"x": x[:N], "y": y[:N]},
        {"x": x[N:], "y": y[N:]},
        lambda m, b: m(b["x"]).squeeze(-1),
        lambda out, b: (out - b["y"]) ** 2,
    )
    settings = FurtherTraining(
        Optimizer("sgd", lr=LR),
        N,
        steps=STEPS,
        evaluate=Evaluate(at_steps=(STEPS,)),
        precision="float64",
        removal_mode="reweight",
    )
    removals = [(i,) for i in range(0, N, 3)]
    effect = attribution(workload, settings, removals, [0]).effect[:, -1]
    functional = FunctionalModel(workload, dtype=torch.float64)
    train, evals = (Examples(of, dtype=torch.float64) for of in (workload.train, workload.evals))
    return estimators.Problem(functional, train, evals, removals, settings, seeds=[0]), torch.as_tensor(effect)


@pytest.mark.parametrize("name", [n for n, kind in estimators.REGISTRY.items() if kind.units in SCALES])
def test_a_value_is_what_its_units_say(name: str) -> None:
    given, effect = problem()
    entry = {"name": name, "damping": 1 / (LR * STEPS)} if name == "datainf" else name
    [estimator] = estimators.parse(entry)
    values = estimator.estimate(given).values
    values = values[-1] if values.dim() == 3 else values
    slope = float((values * effect).sum() / effect.square().sum())
    assert slope == pytest.approx(SCALES[estimator.units], rel=0.15)


def test_every_estimator_says_its_units() -> None:
    others = {kind.units for kind in estimators.REGISTRY.values()} - set(SCALES)
    assert others == {"a cosine: of no scale", "of no known scale"}
