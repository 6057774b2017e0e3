"""Derivatives on many kinds of layers: gradients, Hessian and Gauss-Newton products, compressed and not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fimo.estimators.differentiable import estimating
from fimo.estimators.operators import gradients, spaces
from fimo.estimators.operators.curvature import GaussNewton, Hessian
from fimo.estimators.operators.rows import loss_gradients
from fimo.estimators.operators.spaces import Compressed
from fimo.workers.workload import Workload
from tests.estimators import problems


class Of(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def image(*layers, flat=100):
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *layers, nn.Flatten(), nn.Linear(flat, 3))


def row(*layers):
    return nn.Sequential(nn.Linear(4, 6), *layers, nn.Linear(6, 3))


LAYERS = {
    "PReLU": lambda: row(nn.PReLU()),
    "PReLU by channel": lambda: image(nn.PReLU(4)),
    "GroupNorm": lambda: image(nn.GroupNorm(2, 4), nn.Tanh()),
    "InstanceNorm": lambda: image(nn.InstanceNorm2d(4, affine=True), nn.Tanh()),
    "BatchNorm": lambda: image(nn.BatchNorm2d(4), nn.Tanh()),
    "RMSNorm": lambda: row(nn.RMSNorm(6)),
    "channels last": lambda: image(nn.Tanh()).to(memory_format=torch.channels_last),
    "grouped": lambda: image(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Tanh()),
    "reflect": lambda: image(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Tanh()),
    "transposed": lambda: image(nn.ConvTranspose2d(4, 4, 3, padding=1), nn.Tanh()),
    "pooled": lambda: image(nn.Tanh(), nn.MaxPool2d(2), flat=16),
    "GLU": lambda: nn.Sequential(nn.Linear(4, 12), nn.GLU(), nn.Linear(6, 3)),
    "in place": lambda: row(nn.SiLU(inplace=True)),
    "softmax": lambda: row(nn.Softmax(dim=-1)),
    "normalised": lambda: row(Of(lambda x: F.normalize(x, dim=-1))),
    "sorted": lambda: row(Of(lambda x: x.sort(dim=-1)[0].tanh())),
}
IMAGES = {"PReLU by channel", "GroupNorm", "InstanceNorm", "BatchNorm", "channels last", "grouped", "reflect"}
IMAGES |= {"transposed", "pooled"}


def of_layer(name):
    torch.manual_seed(0)
    model, shape = LAYERS[name](), (2, 5, 5) if name in IMAGES else (4,)
    data = [{"x": torch.randn(n, *shape, dtype=torch.float64), "label": torch.randint(3, (n,))} for n in (23, 2)]
    return problems.problem(Workload(model.double(), *data, problems.outputs_x, problems.cross_entropy), [[0]])


@pytest.mark.parametrize("name", LAYERS)
def test_derivatives_are_those_of_plain_loops(name):
    p = of_layer(name)
    layout = gradients.Layout.of(p.model.params)
    v = torch.randn(1, layout.size, dtype=torch.float64)
    v /= v.norm()
    with p.model.mode("eval"):
        rows, matrix = problems.train_gradients(p), problems.gauss_newton(p)
        ends = []
        for step in (1e-5, -1e-5):
            moved = {n: t[0] for n, t in layout.tensors(step * v).items()}
            ends.append(problems.train_gradients(problems.problem_at(p, moved)).mean(dim=0))
    with estimating(p.model):
        found = torch.cat([block for _, block in loss_gradients(p.model, p.train)])
        torch.testing.assert_close(found, rows, rtol=1e-9, atol=1e-12)
        bent = Hessian(p.model, p.train)(v)[0]
        torch.testing.assert_close(bent, (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-8)
        operator = GaussNewton(p.model, p.train)
        torch.testing.assert_close(operator(v), v @ matrix, rtol=1e-8, atol=1e-11)
        space = Compressed(operator).around(v)
        torch.testing.assert_close(space.rows(space.apply(space.start)), v @ matrix, rtol=1e-8, atol=1e-11)


def test_a_jacobian_that_two_vmaps_have_wrong_is_taken_row_by_row(monkeypatch):
    p = of_layer("softmax")
    truth = problems.gauss_newton(p)
    plain = spaces.jacrev
    monkeypatch.setattr(spaces, "jacrev", lambda f: lambda at: {n: 1.3 * j for n, j in plain(f)(at).items()})
    with estimating(p.model):
        space = Compressed(GaussNewton(p.model, p.train)).around(torch.eye(len(truth), dtype=torch.float64))
        found = space.rows(space.apply(space.start))
    torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-11)
