"""What every estimator and the gold standard must agree on: signs, and the limits where they are one number."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from fimo.estimators import DEFAULTS, REGISTRY, defaults, parse
from fimo.workers.further_training import further_train
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.start import start_from
from fimo.workers.workload import Workload
from tests.estimators import problems


def gold_standard(p, seed=0):
    """Effects (T, R, E) of the sweep's own loop."""
    whole = start_from(p.model, p.train, p.evals, p.further_training)
    deltas = further_train(whole, [(), *(tuple(r) for r in p.removals)], seed).deltas
    return (deltas[1:] - deltas[:1]).transpose(0, 1)


def training(steps, batch_size=10, mode="reweight", **optimizer):
    settings = {"name": "sgd", "lr": 0.05, **optimizer}
    return FurtherTraining(
        Optimizer(**settings),
        batch_size,
        steps=steps,
        removal_mode=mode,
        evaluate=Evaluate(at_steps=(steps,)),
        precision="float64",
    )


def planted():
    """Training example 0 is evaluation example 0 itself, training example 1 the same input with a wrong label."""
    base = problems.classification(n=27, steps=200)
    x, label = base.train.tensors["x"].clone(), base.train.tensors["label"].clone()
    probe = base.evals.tensors
    with torch.no_grad():
        right = probe["label"][0]
    x[0] = x[1] = probe["x"][0]
    label[0], label[1] = right, (right + 1) % 3
    torch.manual_seed(5)
    workload = Workload(
        problems.Classifier(4, 6, 3).double(),
        {"x": x, "label": label},
        probe,
        problems.outputs_x,
        problems.cross_entropy,
    )
    problems.train_a_little(workload, 100)
    return problems.problem(workload, [[0], [1]], further_training=training(10), seeds=(0, 1))


SMALL = {"lissa": {"depth": 50}, "lissa_h": {"depth": 20, "scale": 20}, "trak": {"dimension": 12}}


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_a_planted_duplicate_is_helpful_and_a_mislabelled_one_harmful(name):
    p = planted()
    (estimator,) = parse({"name": name, **SMALL.get(name, {})})
    values = estimator.estimate(p).values
    helpful, harmful = values[..., 0, 0].flatten(), values[..., 1, 0].flatten()
    assert (helpful > 0).all()
    assert (harmful < 0).all()


@pytest.mark.parametrize("mode", ["reweight", "mask", "drop"])
def test_the_gold_standard_has_the_same_signs(mode):
    p = planted()
    p = dataclasses.replace(p, further_training=training(20, mode=mode))
    effects = sum(gold_standard(p, seed) for seed in range(3))
    assert effects[-1, 0, 0] > 0
    assert effects[-1, 1, 0] < 0


def test_one_small_step_of_reweight_is_grad_dot_times_the_rate_over_n():
    p = problems.classification(further_training=training(1, lr=1e-5))
    (estimator,) = parse("grad_dot")
    expected = estimator.estimate(p).values * 1e-5 / len(p.train)
    torch.testing.assert_close(gold_standard(p)[0], expected, rtol=1e-3, atol=1e-12)


def linear_at_the_optimum(n, decay):
    """Ridge regression at its minimum: the loss is quadratic and θᶠ stationary, weight decay included."""
    torch.manual_seed(6)
    x, truth = torch.randn(n, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    y = x @ truth + 0.5 * torch.randn(n, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        gram = 2 * x.T @ x / n + decay * torch.eye(4, dtype=torch.float64)
        model.weight[:] = torch.linalg.solve(gram, 2 * x.T @ y / n)
    evals = {"x": torch.randn(5, 4, dtype=torch.float64), "y": torch.randn(5, dtype=torch.float64)}
    workload = Workload(model, {"x": x, "y": y}, evals, problems.scalar_outputs, problems.squared_error)
    settings = training(60, batch_size=n, lr=0.1, weight_decay=decay)
    return problems.problem(workload, [[i] for i in range(6)], further_training=settings, seeds=(0,))


@pytest.mark.parametrize("name", ["cg", "lissa", "lissa_matched", "unrolled"])
def test_many_steps_on_a_damped_quadratic_are_the_influence_function(name):
    n, decay = 400, 0.3
    p = linear_at_the_optimum(n, decay)
    options = {"cg": {"damping": decay}, "lissa": {"damping": decay, "depth": 500, "batch_size": n}}
    (estimator,) = parse({"name": name, **options.get(name, {})})
    values = estimator.estimate(p).values
    values = values if values.dim() == 2 else values[-1]
    scale = 1 if name == "unrolled" else 1 / n
    gold = gold_standard(p)[-1]
    assert problems.columns_cosine(values, gold).min() > 0.9999
    assert (values * scale - gold).norm() < 0.02 * gold.norm()


def test_the_defaults_are_those_that_apply():
    p = planted()
    assert [e.name for e in defaults(p)] == list(DEFAULTS)
    without = dataclasses.replace(p, further_training=None)
    assert [e.name for e in defaults(without)] == ["grad_dot", "grad_cos", "datainf", "trak"]
    adam = dataclasses.replace(p, further_training=training(6, name="adamw"))
    shown = [(e.name, e.params().get("preconditioner")) for e in defaults(adam)]
    assert shown[:2] == [("grad_dot", None), ("grad_dot", "optimizer")]
    assert "ekfac_matched" not in dict(shown)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_evaluation_examples_in_blocks_concatenate_to_the_whole(name):
    p = problems.classification(n=27, further_training=training(3), seeds=(0,))
    (estimator,) = parse({"name": name, **SMALL.get(name, {})})
    whole = estimator.estimate(p).values
    parts = []
    for some in (slice(0, 1), slice(1, 6)):
        evals = type(p.evals)({k: v[some] for k, v in p.evals.tensors.items()}, dtype=torch.float64)
        parts.append(estimator.estimate(dataclasses.replace(p, evals=evals)).values)
    scale = float(whole.abs().max())
    torch.testing.assert_close(torch.cat(parts, dim=-1), whole, rtol=1e-5, atol=1e-7 * scale)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_float32_models_are_worked_in_float32_and_estimated_in_float64(name):
    p64 = problems.classification(n=27, further_training=training(3), seeds=(0,))
    workload = Workload(
        p64.model.module, p64.train.tensors, p64.evals.tensors, problems.outputs_x, problems.cross_entropy
    )
    for n, parameter in workload.model.named_parameters():
        parameter.requires_grad_(n in p64.model.params)
    p32 = problems.problem(workload, p64.removals, dtype=torch.float32, further_training=training(3), seeds=(0,))
    (estimator,) = parse({"name": name, **SMALL.get(name, {})})
    wide, narrow = estimator.estimate(p64).values, estimator.estimate(p32).values
    assert narrow.dtype == torch.float64
    assert (narrow - wide).norm() < 5e-3 * wide.norm()
