"""Grad-Dot, Grad-Cos and DataInf against double loops over plain autograd gradients."""

from __future__ import annotations

import pytest
import torch

from fimo.estimators import parse
from fimo.estimators.operators import gradients
from fimo.workers.examples import Examples
from tests.estimators import problems

KINDS = [problems.classification, problems.regression]


def estimate(entry, problem):
    (estimator,) = parse(entry)
    return estimator.estimate(problem)


@pytest.mark.parametrize("kind", KINDS)
def test_grad_dot_is_the_inner_product_of_plain_gradients(kind):
    p = kind()
    truth = problems.removal_sums(p) @ problems.eval_gradients(p).T
    torch.testing.assert_close(estimate("grad_dot", p).values, truth, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_grad_cos_sums_the_cosines_of_a_group_s_members(kind):
    p = kind()
    train, right = problems.train_gradients(p), problems.eval_gradients(p)
    cosines = (train @ right.T) / train.norm(dim=1)[:, None] / right.norm(dim=1)
    truth = torch.stack([cosines[list(removal)].sum(dim=0) for removal in p.removals])
    assert max(map(len, p.removals)) > 1
    torch.testing.assert_close(estimate("grad_cos", p).values, truth, rtol=1e-10, atol=1e-13)


def test_grad_cos_of_a_vanishing_gradient_is_zero_not_nan():
    p = problems.classification()
    for name in ("last.weight", "last.bias"):
        p.model.params[name] = p.model.params[name] * 0
    p.model.params["first.weight"][:] = 0  # the measure of each class is log 3, and nothing reaches first.*
    assert torch.isfinite(estimate("grad_cos", p).values).all()


def datainf_double_loop(p, damping=None, scale=0.1):
    """Σ_l v_lᵀ [1/n Σ_j (g_jl g_jlᵀ + λ_l I)⁻¹] r_l with every inverse taken densely."""
    train, left, right = problems.train_gradients(p), problems.removal_sums(p), problems.eval_gradients(p)
    values = torch.zeros(len(left), len(right), dtype=torch.float64)
    for s in problems.layer_slices(p):
        layer = scale * train[:, s].square().mean() if damping is None else torch.tensor(damping, dtype=torch.float64)
        if layer == 0:
            continue
        total = 0
        for g in train[:, s]:
            total = total + torch.linalg.inv(torch.outer(g, g) + layer * torch.eye(len(g), dtype=g.dtype))
        values += left[:, s] @ (total / len(train)) @ right[:, s].T
    return values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"damping_scale": 3.0}, {"damping": 0.02}])
def test_datainf_is_its_double_loop_of_dense_inverses(kind, options):
    p = kind()
    truth = datainf_double_loop(p, options.get("damping"), options.get("damping_scale", 0.1))
    torch.testing.assert_close(estimate({"name": "datainf", **options}, p).values, truth, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_datainf_is_the_same_where_memory_forces_two_passes(kind, monkeypatch):
    p = kind()
    monkeypatch.setattr(gradients, "HELD", 250)  # two evaluation gradients at a time
    values = estimate("datainf", p).values
    torch.testing.assert_close(values, datainf_double_loop(p), rtol=1e-8, atol=1e-10)


class Counted(Examples):
    """Examples that keep which indices were fetched."""

    fetched: list[int]

    def batch(self, indices):
        self.fetched = [*getattr(self, "fetched", []), *map(int, indices)]
        return super().batch(indices)


def counted(p):
    def again(examples):
        return Counted(examples.tensors, dtype=torch.float64)

    return type(p)(p.model, again(p.train), again(p.evals), p.removals)


class Backward(torch.autograd.Function):
    """The identity, counting the examples whose backward pass goes through it (vmap included)."""

    generate_vmap_rule = False
    examples = 0

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return CountBackward.apply(g)

    @staticmethod
    def vmap(info, in_dims, x):
        return Backward.apply(x), in_dims[0]


class CountBackward(torch.autograd.Function):
    generate_vmap_rule = False

    @staticmethod
    def forward(g):
        Backward.examples += len(g)
        return g.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, g):
        assert in_dims[0] == 0
        Backward.examples += info.batch_size * g.shape[1]
        return g.clone(), 0


@pytest.mark.parametrize(("entry", "training"), [("grad_dot", 7), ("grad_cos", 7), ("datainf", 27)], ids=str)
def test_no_gradient_is_computed_twice(entry, training):
    p = counted(problems.classification())
    whole = p.model.outputs
    p.model.outputs = lambda *arguments: Backward.apply(whole(*arguments))
    estimate(entry, p)  # sees, once and for all, that vmap takes these examples together
    Backward.examples, p.train.fetched, p.evals.fetched = 0, [], []
    estimate(entry, p)
    assert Backward.examples == training + len(p.evals)
    assert sorted(p.evals.fetched) == list(range(6))
    assert len(p.train.fetched) == len(set(p.train.fetched)) == training


@pytest.mark.parametrize("entry", ["grad_dot", "grad_cos", "datainf"])
def test_the_block_size_changes_nothing_beyond_rounding(entry, monkeypatch):
    p = problems.regression()
    found = []
    for size in (1, 5, 64):
        monkeypatch.setattr(gradients, "BLOCK", size)
        found.append(estimate(entry, p).values)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-13)
