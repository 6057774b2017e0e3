"""EK-FAC against dense blocks of the Gauss-Newton matrix, where it is exact, and against K-FAC, where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fimo.estimators import parse
from fimo.workers.workload import Workload
from tests.estimators import problems
from tests.estimators.operators.test_kronecker import basis_of, matrix_of


def estimate(entry, problem):
    (estimator,) = parse(entry)
    return estimator.estimate(problem)


def one_layer(n, classes=3, features=4):
    torch.manual_seed(1)
    data = {"x": torch.randn(n, features, dtype=torch.float64), "label": torch.randint(classes, (n,))}
    model = nn.Linear(features, classes).double()
    return problems.problem(Workload(model, data, data, problems.outputs_x, problems.cross_entropy), [[0]])


def test_one_linear_layer_with_one_datum_is_exact():
    p = one_layer(1)
    torch.testing.assert_close(matrix_of(p, basis_of(p)), problems.gauss_newton(p), rtol=1e-9, atol=1e-12)
    truth = problems.removal_sums(p) @ torch.linalg.inv(
        problems.gauss_newton(p) + 0.01 * torch.eye(15, dtype=torch.float64)
    )
    found = estimate({"name": "ekfac", "damping": 0.01}, p).values
    torch.testing.assert_close(found, truth @ problems.eval_gradients(p).T, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [problems.classification, problems.regression])
def test_it_is_closer_to_gauss_newton_than_kfac_and_grad_dot(kind):
    p = kind(n=120, removals=[[i] for i in range(40)], steps=400)
    damping = float(problems.train_gradients(p).square().mean())
    identity = torch.eye(len(problems.gauss_newton(p)), dtype=torch.float64)
    left, right = problems.removal_sums(p), problems.eval_gradients(p)
    truth = left @ torch.linalg.inv(problems.gauss_newton(p) + damping * identity) @ right.T
    kfac = matrix_of(p, basis_of(p, corrected=False))
    plain = left @ torch.linalg.inv(kfac + damping * identity) @ right.T
    corrected = estimate({"name": "ekfac", "damping": damping}, p).values
    grad_dot = estimate("grad_dot", p).values
    scores = [float(problems.columns_cosine(x, truth).mean()) for x in (corrected, plain, grad_dot)]
    assert scores[0] > scores[2]
    if kind is problems.classification:  # K-FAC may be lucky in a cosine, never in the norm below
        assert scores[0] > scores[1]
    assert (matrix_of(p, basis_of(p)) - problems.gauss_newton(p)).norm() < (kfac - problems.gauss_newton(p)).norm()


class Convolutional(nn.Module):
    """Convolution, a layer norm (dense), an embedding (left out), a layer used twice, an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(600, 2)
        self.conv = nn.Conv2d(1, 2, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(8)
        self.twice = nn.Linear(8, 8)
        self.unused = nn.Linear(3, 2)
        self.last = nn.Linear(8, 3, bias=False)

    def forward(self, batch):
        x = self.conv(batch["image"]).relu_().flatten(1)
        x = self.norm(x + self.embedding(batch["token"]).repeat(1, 4))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.last(x)


def convolutional(n=17):
    torch.manual_seed(2)
    data = {
        "image": torch.randn(n, 1, 4, 4, dtype=torch.float64),
        "token": torch.randint(600, (n,)),
        "label": torch.randint(3, (n,)),
    }
    workload = Workload(Convolutional().double(), data, data, lambda m, b: m(b), problems.cross_entropy)
    return problems.problem(workload, [[0], [3]])


def test_convolutions_shared_layers_norms_and_what_is_left_out():
    p = convolutional()
    lines = []
    p = type(p)(p.model, p.train, p.evals, p.removals, progress=lines.append)
    found = estimate({"name": "ekfac", "damping_scale": 1.0}, p)
    assert found.notes["left_out"] == ["embedding.weight"]
    assert lines == ["warning: ekfac leaves out 1 parameter tensors: embedding.weight"]
    g, basis = problems.gauss_newton(p), basis_of(p)
    identity = torch.eye(len(g), dtype=torch.float64)
    for block in basis.blocks:
        vectors = block.coordinates(identity)
        moments = (vectors.T @ g @ vectors).diagonal()
        torch.testing.assert_close(block.values, moments, rtol=1e-8, atol=1e-11)
    norm = list(p.model.params).index("norm.weight")
    where = problems.layer_slices(p)[norm]
    torch.testing.assert_close(matrix_of(p, basis)[where, where], g[where, where], rtol=1e-8, atol=1e-11)


def test_tied_weights_are_not_taken_for_a_kronecker_product():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(40, 40), nn.Linear(40, 40)
            self.b.weight = self.a.weight
            self.last = nn.Linear(40, 3)

        def forward(self, x):
            return self.last(torch.tanh(self.b(torch.tanh(self.a(x)))))

    torch.manual_seed(0)
    data = {"x": torch.randn(9, 40, dtype=torch.float64), "label": torch.randint(3, (9,))}
    p = problems.problem(Workload(Tied().double(), data, data, problems.outputs_x, problems.cross_entropy), [[0]])
    assert estimate({"name": "ekfac", "damping": 0.1}, p).notes["left_out"] == ["a.weight"]


def test_hooks_and_mode_are_gone_after_an_error():
    p = problems.classification()
    broken = p.model.loss_of_outputs
    p.model.loss_of_outputs = None
    p.model.module.train()
    with pytest.raises(TypeError):
        estimate({"name": "ekfac", "damping": 1.0}, p)
    p.model.loss_of_outputs = broken
    assert all(not m._forward_hooks for m in p.model.module.modules())
    assert p.model.module.training
