"""The sparse projection against its own matrix, and the matrix against what a projection promises."""

from __future__ import annotations

import pytest
import torch

from fimo.estimators.operators import sketch
from fimo.estimators.operators.hashes import uniforms
from fimo.estimators.operators.sketch import Sketch


def matrix(size, dimension, seed):
    return Sketch(size, dimension, seed, torch.zeros(1, dtype=torch.float64)).project(
        torch.eye(size, dtype=torch.float64)
    )


@pytest.mark.parametrize(("size", "dimension"), [(1, 4), (29, 7), (64, 8), (130, 5)])
def test_a_row_has_one_sign_whose_column_moves_on_by_one_each_turn(size, dimension, monkeypatch):
    monkeypatch.setattr(sketch, "STRETCH", 13)
    s = matrix(size, dimension, 3)
    places = torch.arange(size)
    assert torch.equal(s.abs().argmax(dim=1), (places + places // dimension) % dimension)
    assert torch.equal((s != 0).sum(dim=1), torch.ones(size, dtype=torch.long))
    assert torch.equal(s.abs().sum(dim=1), torch.ones(size, dtype=torch.float64))
    monkeypatch.setattr(sketch, "STRETCH", 2**20)
    assert torch.equal(s, matrix(size, dimension, 3))


def test_inner_products_are_kept_in_the_mean_and_vary_as_a_dense_projection_s():
    generator = torch.Generator().manual_seed(0)
    size, dimension = 384 * 6, 64
    # All of it in one input of a layer of width 384, as transformers' outliers are.
    x, y = torch.zeros(2, 6, 384, dtype=torch.float64)
    x[:, 5], y[:, 5] = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    x, y = (x + 0.01 * torch.randn(6, 384, generator=generator, dtype=torch.float64)).flatten(), y.flatten()
    like = torch.zeros(1, dtype=torch.float64)
    found = torch.stack(
        [Sketch(size, dimension, s, like).project(torch.stack([x, y])).prod(dim=0).sum() for s in range(300)]
    )
    spread = float((x.norm() * y.norm()) ** 2 / dimension) ** 0.5
    assert abs(float(found.mean() - x @ y)) < 4 * 2 * spread / 300**0.5
    assert float(found.std()) < 2 * spread


def test_back_is_the_transpose():
    s = Sketch(37, 5, 1, torch.zeros(1, dtype=torch.float64))
    assert torch.equal(s.back(torch.eye(5, dtype=torch.float64)), matrix(37, 5, 1).T)


def test_uniforms_are_uniform_and_no_example_s_depend_on_others():
    u = uniforms(3, range(200), 0, 500)
    assert abs(float(u.mean()) - 0.5) < 0.005
    assert abs(float(u.var()) * 12 - 1) < 0.02
    for lag in (u[:, 1:] * u[:, :-1], u[1:] * u[:-1]):
        assert abs(float(lag.mean()) - 0.25) < 0.005
    assert torch.equal(uniforms(3, [7, 2], 0, 9), u[[7, 2], :9])
    assert not torch.equal(uniforms(3, [7], 1, 9), u[[7], :9])
    assert not torch.equal(uniforms(4, [7], 0, 9), u[[7], :9])
