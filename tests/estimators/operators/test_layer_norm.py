"""Second derivatives on LayerNorm, all forward over reverse: torch's reverse over forward is off there by percents."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from fimo.estimators import parse
from fimo.estimators.differentiable import estimating
from fimo.estimators.operators.curvature import GaussNewton, Hessian
from fimo.estimators.operators.trajectory import Trajectory
from fimo.workers.settings import Optimizer
from fimo.workers.workload import Workload
from tests.estimators import problems
from tests.estimators.test_unrolled import gold_standard, settings_for


def normed(**options):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    data = [{"x": torch.randn(n, 4, dtype=torch.float64), "label": torch.randint(3, (n,))} for n in (27, 6)]
    workload = Workload(model.double(), *data, problems.outputs_x, problems.cross_entropy)
    problems.train_a_little(workload, 20)
    return problems.problem(workload, [[0], [5], [26], [1, 2, 3]], **options)


@pytest.mark.parametrize("own", [True, False], ids=["own solve", "a sweep's displacement"])
def test_the_corrected_training_gradient_is_the_dense_hessians(own):
    p = normed()
    matrix = problems.gauss_newton(p)
    inverse = torch.linalg.inv(matrix + 0.05 * torch.eye(len(matrix), dtype=matrix.dtype))
    moved = -inverse @ problems.train_gradients(p).mean(dim=0)
    entry = {"name": "cg", "damping": 0.05, "tolerance": 1e-12, "training_gradient": "corrected"}
    if not own:
        moved = 0.1 * torch.randn(len(matrix), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        entry["displacement_step"] = 3
        with estimating(p.model):
            layout = GaussNewton(p.model, p.train).layout
        p = normed(displacement={3: layout.tensors(moved)})
    left = problems.removal_sums(p) + torch.stack([problems.hessian_of(p, r) @ moved for r in p.removals])
    truth = left @ inverse @ problems.eval_gradients(p).T
    torch.testing.assert_close(parse(entry)[0].estimate(p).values, truth, rtol=1e-7, atol=1e-10)


def test_curvature_products_are_dense_products():
    p = normed()
    rows = problems.eval_gradients(p)
    with estimating(p.model):
        for operator, truth in ((Hessian, problems.hessian(p)), (GaussNewton, problems.gauss_newton(p))):
            torch.testing.assert_close(operator(p.model, p.train)(rows), rows @ truth, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("mode", ["reweight", "mask", "drop"])
def test_a_steps_derivatives_are_dense_products(mode):
    p = normed(further_training=settings_for("sgd", mode), seeds=(3,))
    path = Trajectory(p.model, p.train, p.further_training, p.removals, 3)
    point, rows = path.start(), problems.eval_gradients(p)
    with estimating(p.model):
        step = next(iter(path.steps()))
        found = path.curve(point, step, rows)
        changes, along = path.change_gradients(point, step), path.change_along(point, step, rows)
    # The step's loss is a mean over its batch: a problem whose training examples are that batch has its Hessian.
    batch = type(p.train)(step.batch, dtype=torch.float64)
    truth = problems.hessian(type(p)(p.model, batch, p.evals, p.removals))
    torch.testing.assert_close(found, rows @ truth, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(along, changes @ rows.T, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("direction", ["forward", "adjoint"])
def test_unrolled_is_the_first_order_of_the_gold_standard(direction):
    settings = dataclasses.replace(settings_for("sgd"), batch_size=27, optimizer=Optimizer("sgd", 0.01))
    p = normed(further_training=settings, seeds=(3,))
    values = parse({"name": "unrolled", "direction": direction})[0].estimate(p).values
    truth = gold_standard(p, 3)
    assert (values - truth).norm() < 0.06 * truth.norm()
