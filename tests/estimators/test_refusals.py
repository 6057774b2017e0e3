"""An estimator that means nothing for a problem says why, and is not run in silence as something else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fimo.estimators import DEFAULTS, REGISTRY, defaults, left_out, parse
from fimo.workers.errors import UsageError
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.workload import Workload
from tests.estimators import problems

SETTINGS = FurtherTraining(Optimizer("sgd", 0.05), 10, steps=2, evaluate=Evaluate(at_steps=(2,)), precision="float64")
FLAT = ["cg", "ekfac", "ekfac_matched", "lissa", "lissa_matched"]


def of(outputs, loss, model=None):
    base = problems.classification()
    torch.manual_seed(0)
    model = problems.Classifier(4, 6, 3).double() if model is None else model
    workload = Workload(model, base.train.tensors, base.evals.tensors, outputs, loss)
    return problems.problem(workload, [[0], [5]], further_training=SETTINGS, seeds=(0,))


def outputs_that_are_the_loss():
    return of(
        lambda model, batch: F.cross_entropy(model(batch["x"]), batch["label"], reduction="none"),
        lambda outputs, batch: outputs,
    )


@pytest.mark.parametrize("name", FLAT)
def test_outputs_that_already_are_the_loss_leave_nothing_to_precondition_with(name):
    p = outputs_that_are_the_loss()
    (estimator,) = parse(name)
    assert not estimator.applies(p)
    assert "predictions" in estimator.refuses(p)
    with pytest.raises(UsageError, match="no curvature in the outputs") as error:
        estimator.estimate(p)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_the_others_still_apply_and_the_default_set_says_why_those_do_not():
    p = outputs_that_are_the_loss()
    assert [e.name for e in defaults(p)] == [n for n in DEFAULTS if n not in FLAT]
    assert [name for name, _ in left_out(p)] == [n for n in DEFAULTS if n in FLAT]
    assert all("\n" not in reason for _, reason in left_out(p))
    assert parse({"name": "cg", "curvature": "hessian"})[0].applies(p)


@pytest.mark.parametrize("kind", [problems.classification, problems.regression])
def test_a_curved_loss_applies(kind):
    p = kind(further_training=SETTINGS, seeds=(0,))
    assert [e.name for e in defaults(p)] == list(DEFAULTS)
    assert left_out(p) == []


def test_a_loss_that_is_curved_for_the_last_example_alone_applies():
    def loss(outputs, batch):
        straight = outputs.squeeze(-1) - batch["y"]
        return torch.where(batch["curved"] > 0, straight**2, straight.abs())

    base = problems.regression()
    data = [{**e.tensors, "curved": torch.zeros(len(e), dtype=torch.float64)} for e in (base.train, base.evals)]
    data[0]["curved"][-1] = 1
    for curved in (True, False):
        if not curved:
            data[0]["curved"][-1] = 0
        torch.manual_seed(0)
        model = nn.Linear(3, 1).double()
        p = problems.problem(Workload(model, *data, problems.outputs_x, loss), [[0]])
        assert parse({"name": "cg", "damping": 0.1})[0].applies(p) == curved


def test_a_model_that_cannot_be_differentiated_leaves_no_default():
    model = nn.Linear(4, 3).double()
    p = of(lambda m, batch: checkpoint(m, batch["x"], use_reentrant=False), problems.cross_entropy, model)
    p = dataclasses.replace(p, further_training=SETTINGS, seeds=(0,))
    assert defaults(p) == []
    assert [name for name, _ in left_out(p)] == list(DEFAULTS)
    assert all("checkpoint" in reason for _, reason in left_out(p))


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_a_refusal_is_the_error_of_a_named_estimator(name):
    p = dataclasses.replace(outputs_that_are_the_loss(), further_training=None, seeds=())
    (estimator,) = parse({"name": name, **({"depth": 5, "scale": 20} if name == "lissa_h" else {})})
    reason = estimator.refuses(p)
    if reason is None:
        assert estimator.estimate(p).values.isfinite().all()
    else:
        with pytest.raises(UsageError) as error:
            estimator.estimate(p)
        assert reason in str(error.value)
