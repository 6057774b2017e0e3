"""Matched damping against dense inverses and the optimizer's own way, and many λ against each alone."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from fimo.estimators import parse
from fimo.estimators.matching import effective_rates, inverse_scale, spread
from fimo.estimators.operators import gradients
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.workload import Workload
from tests.estimators import problems

STEPS = (2, 7, 30)


def settings(clip_norm=None, steps=STEPS, batch_size=10, **optimizer):
    return FurtherTraining(
        Optimizer(**{"name": "sgd", "lr": 0.05, **optimizer}),
        batch_size,
        steps=steps[-1],
        removal_mode="reweight",
        evaluate=Evaluate(at_steps=tuple(steps)),
        precision="float64",
        clip_norm=clip_norm,
    )


def estimate(entry, problem):
    (estimator,) = parse(entry)
    return estimator.estimate(problem)


def dense(p, matrix, damping, scale=None):
    d = torch.ones(len(matrix), dtype=matrix.dtype) if scale is None else scale
    # Parameters that no loss depends on have neither curvature nor a gradient; any damping will do for them.
    inverse = torch.linalg.inv(matrix + damping * torch.diag(torch.where(d > 0, d, 1)))
    return problems.removal_sums(p) @ inverse @ problems.eval_gradients(p).T


def batch_square(p, batch_size=10):
    """E over batches of the squared entries of a batch's mean gradient, in expectation over orders."""
    each = problems.train_gradients(p)
    n = len(each)
    sizes = [batch_size] * (n // batch_size) + ([n % batch_size] if n % batch_size else [])
    mean, spread_ = each.mean(dim=0), each.var(dim=0, unbiased=False)
    return sum(mean**2 + spread_ / b * (n - b) / (n - 1) for b in sizes) / len(sizes)


# --- the way that an optimizer goes along a constant gradient of 1 --------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"name": "sgd", "lr": 0.1},
        {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"name": "sgd", "lr": 0.1, "momentum": 0.8, "dampening": 0.3},
        {"name": "sgd", "lr": 0.1, "weight_decay": 0.2},
        {"name": "adam", "lr": 0.01},
        {"name": "adamw", "lr": 0.01, "weight_decay": 0.5},
    ],
)
def test_the_effective_rate_is_torchs_own_way(options):
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options["name"]]
    given = {"weight_decay": 0.0, **{k: v for k, v in options.items() if k != "name"}}
    optimizer, way = kind([x], **given), []
    for _ in range(30):
        x.grad = torch.full_like(x, -1.0)
        optimizer.step()
        way.append(float(x.detach()))
    found = effective_rates(Optimizer(**options), STEPS)
    assert found == pytest.approx([way[s - 1] for s in STEPS], rel=1e-6)


def test_the_scale_is_the_root_of_a_batchs_mean_square():
    p = problems.classification(further_training=settings(name="adamw", lr=1e-3, eps=1e-6))
    found = inverse_scale(p, p.further_training)
    truth = batch_square(p).sqrt()
    assert bool(((found == 0) == (truth == 0)).all())
    used = truth > 1e-3 * truth.max()
    # 66 batches of a few that are nearly independent: a root mean square is known to about a tenth.
    ratio = found[used] * (truth[used] + 1e-6)
    assert float((ratio - 1).square().mean().sqrt()) < 0.2
    assert float(ratio.mean()) == pytest.approx(1, abs=0.08)


def test_clipping_shrinks_the_rate_and_is_seen_by_the_scale():
    loose, tight = (problems.regression(further_training=settings(clip_norm=c)) for c in (1e6, 1e-3))
    (cg,) = parse("cg")
    free, bound = cg.shift(loose).values, cg.shift(tight).values
    assert free == pytest.approx([1 / (0.05 * s) for s in STEPS], rel=1e-6)
    factors = {round(b / f, 6) for b, f in zip(bound, free, strict=True)}
    assert len(factors) == 1
    assert factors.pop() > 10
    adam = [
        inverse_scale(p, dataclasses.replace(p.further_training, optimizer=Optimizer("adam", 1e-3)))
        for p in (loose, tight)
    ]
    assert float(adam[1].max()) > 10 * float(adam[0].max())


def test_steps_are_spread_evenly_in_log_t_with_both_ends():
    every = tuple(range(1, 501))
    some = spread(every, 8)
    assert (some[0], some[-1], len(some)) == (1, 500, 8)
    logs = [math.log(s) for s in some]
    assert max(b - a for a, b in itertools.pairwise(logs)) < 1.5 * math.log(500) / 7
    assert spread((3, 9), 8) == (3, 9)
    assert spread((5,), 8) == (5,)


# --- estimates ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["compressed", "matrix free"])
def way(request, monkeypatch):
    if request.param == "matrix free":
        monkeypatch.setattr(gradients, "LARGEST_RANK", 0)


@pytest.mark.parametrize("kind", [problems.classification, problems.regression])
def test_cg_is_the_dense_inverse_at_every_recorded_step(kind, way):
    p = kind(further_training=settings(momentum=0.5))
    found = estimate({"name": "cg", "tolerance": 1e-11}, p)
    rates = effective_rates(p.further_training.optimizer, STEPS)
    assert found.steps == STEPS
    assert found.notes["damping"] == pytest.approx([1 / r for r in rates])
    for values, rate in zip(found.values, rates, strict=True):
        torch.testing.assert_close(values, dense(p, problems.gauss_newton(p), 1 / rate), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kind", [problems.classification, problems.regression])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_under_adam_the_damping_is_in_the_optimizers_scale(kind, name, way):
    p = kind(further_training=settings(name=name, lr=1e-3, weight_decay=0.0))
    inverse = inverse_scale(p, p.further_training)
    scale = torch.where(inverse > 0, 1 / inverse, 0)
    found = estimate({"name": "cg", "tolerance": 1e-11}, p)
    for values, step in zip(found.values, STEPS, strict=True):
        truth = dense(p, problems.gauss_newton(p), 1 / (1e-3 * step), scale)
        torch.testing.assert_close(values, truth, rtol=1e-6, atol=1e-9 * float(truth.abs().max()))
    plain = estimate({"name": "grad_dot", "preconditioner": "optimizer"}, p).values
    truth = problems.removal_sums(p) * inverse @ problems.eval_gradients(p).T
    torch.testing.assert_close(plain, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", [{}, {"name": "adamw", "lr": 1e-3}])
def test_many_dampings_in_one_space_are_each_alone(optimizer, way):
    p = problems.classification(further_training=settings(**optimizer, steps=(1, 3, 10, 100, 1000)))
    together = estimate({"name": "cg", "tolerance": 1e-11}, p)
    for step, values in zip(together.steps, together.values, strict=True):
        alone = estimate({"name": "cg", "tolerance": 1e-11}, dataclasses.replace(p, at=(step,)))
        torch.testing.assert_close(alone.values[0], values, rtol=1e-6, atol=1e-9 * float(values.abs().max()))


@pytest.mark.parametrize("optimizer", [{}, {"name": "adamw", "lr": 1e-3}])
def test_preconditioned_solvers_give_the_same_values(optimizer, way):
    p = problems.regression(further_training=settings(**optimizer))
    plain = estimate({"name": "cg", "tolerance": 1e-11}, p)
    ready = estimate({"name": "cg", "tolerance": 1e-11, "preconditioner": "ekfac"}, p)
    torch.testing.assert_close(ready.values, plain.values, rtol=1e-6, atol=1e-9 * float(plain.values.abs().max()))
    most = max(max(s["iterations"]) for s in ready.notes["solves"])
    assert most <= max(plain.notes["solves"][0]["iterations"])
    lissa = estimate({"name": "lissa", "batch_size": 27, "preconditioner": "ekfac"}, p)
    truth = plain.values[[plain.steps.index(s) for s in lissa.steps]]
    torch.testing.assert_close(lissa.values, truth, rtol=1e-2, atol=1e-3 * float(truth.abs().max()))


def test_the_preconditioner_needs_fewer_iterations_where_the_damping_is_small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)).double()
    data = [{"x": torch.randn(k, 6).double(), "y": torch.randn(k).double()} for k in (120, 10)]
    p = problems.problem(Workload(model, *data, problems.scalar_outputs, problems.squared_error), [[0], [1], [5]])
    damping = 1e-4 * float(torch.linalg.eigvalsh(problems.gauss_newton(p))[-1])
    plain, ready = (estimate({"name": "cg", "damping": damping, "preconditioner": how}, p) for how in (None, "ekfac"))
    torch.testing.assert_close(ready.values, plain.values, rtol=1e-5, atol=1e-6 * float(plain.values.abs().max()))
    counts = [max(e.notes["solves"][0]["iterations"]) for e in (plain, ready)]
    assert 3 * counts[1] <= counts[0], counts


@pytest.mark.parametrize("optimizer", [{}, {"name": "adamw", "lr": 1e-3}])
def test_lissa_over_everything_tends_to_the_dense_inverse(optimizer, way):
    p = problems.classification(further_training=settings(**optimizer))
    inverse = inverse_scale(p, p.further_training) if optimizer else None
    scale = None if inverse is None else torch.where(inverse > 0, 1 / inverse, 0)
    found = estimate({"name": "lissa", "batch_size": 27}, p)
    rates = effective_rates(p.further_training.optimizer, found.steps)
    for values, rate in zip(found.values, rates, strict=True):
        truth = dense(p, problems.gauss_newton(p), 1 / rate, scale)
        torch.testing.assert_close(values, truth, rtol=1e-2, atol=2e-3 * float(truth.abs().max()))


def test_lissa_solves_eight_steps_at_most():
    p = problems.regression(further_training=settings(steps=tuple(range(1, 31))))
    assert estimate({"name": "lissa", "depth": 40}, p).steps == spread(range(1, 31), 8)
    assert len(estimate("cg", p).steps) == 30


def test_ekfac_evaluates_its_spectrum_and_is_exact_for_one_layer_and_one_datum():
    torch.manual_seed(1)
    data = {"x": torch.randn(1, 4, dtype=torch.float64), "label": torch.randint(3, (1,))}
    p = problems.problem(
        Workload(nn.Linear(4, 3).double(), data, data, problems.outputs_x, problems.cross_entropy),
        [[0]],
        further_training=settings(batch_size=1),
    )
    found = estimate("ekfac", p)
    for values, step in zip(found.values, STEPS, strict=True):
        truth = dense(p, problems.gauss_newton(p), 1 / (0.05 * step))
        torch.testing.assert_close(values, truth, rtol=1e-8, atol=1e-10)


def test_ekfac_under_adam_is_grad_dot_in_the_optimizers_scale_for_few_steps_and_closer_beyond():
    p = problems.regression(
        n=120,
        removals=[[i] for i in range(30)],
        further_training=settings(name="adamw", lr=1e-3, steps=(1, 2000), weight_decay=0.0),
    )
    found = estimate("ekfac", p)
    straight = estimate({"name": "grad_dot", "preconditioner": "optimizer"}, p).values
    assert float(problems.columns_cosine(found.values[0], straight).min()) > 0.999
    truth = estimate({"name": "cg"}, p).values[1]
    assert float(problems.columns_cosine(found.values[1], truth).mean()) > float(
        problems.columns_cosine(straight, truth).mean()
    )


def test_what_ekfac_leaves_out_counts_as_without_curvature(monkeypatch):
    from fimo.estimators.operators import kronecker

    monkeypatch.setattr(kronecker, "EXACT", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 1)).double()
    data = {"x": torch.randn(9, 3, dtype=torch.float64), "y": torch.randn(9, dtype=torch.float64)}
    p = problems.problem(
        Workload(model, data, data, problems.scalar_outputs, problems.squared_error),
        [[0], [4]],
        further_training=settings(batch_size=4),
    )
    matrix = problems.gauss_newton(p)
    matrix[:6], matrix[:, :6] = 0, 0
    found, rest = estimate("ekfac", p).values, {}
    for values, step in zip(found, STEPS, strict=True):
        rest[step] = dense(p, matrix, 1 / (0.05 * step))
        assert float(problems.columns_cosine(values, rest[step]).min()) > 0.98


@pytest.mark.parametrize("side", ["corrected", "further"])
def test_each_amount_has_a_displacement_of_its_own(side):
    p = problems.classification(further_training=settings(), removals=[[0], [1, 2, 3]])
    found = estimate({"name": "cg", "training_gradient": side}, p)
    assert found.steps == STEPS
    for values, step in zip(found.values, STEPS, strict=True):
        alone = estimate({"name": "cg", "training_gradient": side, "damping": 1 / (0.05 * step)}, p).values
        torch.testing.assert_close(values, alone, rtol=1e-6, atol=1e-9)


def test_without_further_training_there_is_nothing_to_match():
    p = problems.classification()
    for name in ("cg", "ekfac", "lissa", "lissa_h"):
        assert "needs the further_training section; or give damping" in parse(name)[0].refuses(p)
    sgd = dataclasses.replace(p, further_training=settings())
    assert "sgd has no scale" in parse({"name": "grad_dot", "preconditioner": "optimizer"})[0].refuses(sgd)
