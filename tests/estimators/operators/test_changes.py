"""Changes carried along a trajectory: exact where the loss's gradient is linear, and told where they grow."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from fimo.estimators.operators.growth import Growth
from fimo.workers.errors import DivergedError
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.workload import Workload
from tests.estimators import problems
from tests.estimators.test_unrolled import OPTIMIZERS, estimate, gold_standard, settings_for
from tests.support.covering import covering


class Place(nn.Module):
    """A model that is a point, w."""

    def __init__(self, at) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(at, dtype=torch.float64))

    def forward(self, x):
        return self.w.expand(len(x), -1)


def quadratic(settings, curvature=(0.3, 1.0, 2.0, 4.0), removals=((0,), (5,), (1, 2)), **options):
    """ℓ_j = ½ (w − x_j)ᵀ A (w − x_j), one A for all, g linear: in mask and drop q_s has no curvature, all is exact."""
    torch.manual_seed(1)
    own = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    a = own @ torch.diag(torch.tensor(curvature, dtype=torch.float64)) @ own.T
    train = {"x": torch.randn(27, 4, dtype=torch.float64)}
    evals = {"x": torch.randn(6, 4, dtype=torch.float64)}

    def loss(outputs, batch):
        return 0.5 * ((outputs - batch["x"]) @ a * (outputs - batch["x"])).sum(dim=1)

    def measure(outputs, batch):
        return (outputs * batch["x"]).sum(dim=1)

    workload = Workload(Place([0.3, -0.2, 0.5, 0.1]), train, evals, problems.outputs_x, loss, measure)
    return problems.problem(workload, [list(r) for r in removals], further_training=settings, **options)


EXACT = {
    **OPTIMIZERS,
    "adam plain": Optimizer("adam", 0.01),
    "amsgrad": Optimizer("adam", 0.01, betas=(0.6, 0.7), eps=1e-3, amsgrad=True),
    "adamw plain": Optimizer("adamw", 0.01, weight_decay=0),
}


@pytest.mark.parametrize(("optimizer", "mode", "clip"), covering(EXACT, ["mask", "drop"], [None, 1.0]))
def test_where_the_gradient_is_linear_it_is_two_runs_of_torchs_own_optimizer(optimizer, mode, clip):
    evaluate = Evaluate(at_steps=(1, 2, 5, 14))
    settings = FurtherTraining(
        EXACT[optimizer], 10, removal_mode=mode, steps=14, evaluate=evaluate, clip_norm=clip, precision="float64"
    )
    p = quadratic(settings, seeds=(3,))
    truth, found = gold_standard(p, 3), estimate(p)
    assert found.steps == (1, 2, 5, 14)
    assert truth.abs().max() > 1e-4
    torch.testing.assert_close(found.values, truth, rtol=1e-10, atol=1e-12)


def test_small_changes_of_a_float32_model_are_not_lost_in_its_parameters():
    """A change of 1e-8 of parameters of about 1, whose float32 spacing is 6e-8."""
    values = []
    for precision in ("float32", "float64"):
        settings = dataclasses.replace(settings_for("adam"), optimizer=Optimizer("adam", 1e-6), precision=precision)
        base = problems.classification(dtype=getattr(torch, precision), further_training=settings, seeds=(3,))
        values.append(estimate(base).values[-1])
    assert (values[0] - values[1]).norm() < 0.01 * values[1].norm()


def growing(direction="auto", at=(1, 2, 10, 40), **options):
    """SGD at 0.6 where 2/sharpness is 0.5."""
    settings = FurtherTraining(
        Optimizer("sgd", 0.6),
        27,
        removal_mode="reweight",
        steps=40,
        evaluate=Evaluate(at_steps=at),
        precision="float64",
    )
    said = []
    p = quadratic(settings, seeds=(3, 4), progress=said.append, **options)
    return estimate(p, direction=direction), said, gold_standard(p, 3)


@pytest.mark.parametrize("direction", ["forward", "adjoint"])
def test_beyond_two_over_sharpness_it_ends_where_changes_begin_to_grow_and_says_so(direction):
    found, said, truth = growing(direction)
    assert found.steps in {(1, 2), (1, 2, 10)}
    (warning,) = {line for line in said if line.startswith("warning: unrolled: from step ")}
    assert found.notes["warning"] == warning
    assert str(found.steps[-1]) in warning
    kept = truth[: len(found.steps)]
    assert (found.values - kept).norm() < 0.1 * kept.norm()
    with pytest.raises(DivergedError, match=r"from step \d+ on .*step 40 is the first recorded: lower") as raised:
        growing(direction, at=(40,))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("direction", ["forward", "adjoint"])
def test_just_within_two_over_sharpness_nothing_is_cut(direction):
    found, said, _ = growing(direction, curvature=(0.3, 1.0, 2.0, 3.2))
    assert found.steps == (1, 2, 10, 40)
    assert not any("warning" in line for line in said)
    assert "warning" not in found.notes


def test_a_change_that_is_not_finite_has_grown():
    growth = Growth(2, 0.0, together=False)
    growth.take(1, torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]))
    assert growth.onset is None
    growth.take(2, torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 1.0]))
    assert growth.onset == 2


def test_growth_with_one_block_of_removals_ends_all(monkeypatch):
    whole, _, _ = growing()
    monkeypatch.setattr("fimo.estimators.operators.gradients.HELD", 4 * 6)
    single, _, _ = growing()
    steps = min(len(whole.steps), len(single.steps))
    assert steps >= 2
    torch.testing.assert_close(single.values[:steps], whole.values[:steps])


def test_breast_cancer_under_adamw_on_seeds_that_are_not_the_sweeps():
    """At full size: see CHANGELOG; how close it can come falls with how long the final model was trained."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    x = torch.from_numpy((x - x.mean(0)) / x.std(0))
    data = [{"x": x[a:b], "label": torch.from_numpy(y)[a:b]} for a, b in ((0, 450), (450, 470))]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 2)).double()
    workload = Workload(model, *data, problems.outputs_x, problems.cross_entropy)
    problems.train_a_little(workload, 20)
    settings = FurtherTraining(
        Optimizer("adamw", 5e-4),
        50,
        removal_mode="reweight",
        steps=60,
        evaluate=Evaluate(at_steps=(15, 60)),
        precision="float64",
    )
    p = problems.problem(workload, [[i] for i in range(0, 450, 45)], further_training=settings, seeds=(2, 3))
    truth = (gold_standard(p, 0) + gold_standard(p, 1)) / 2
    found = estimate(p).values
    cosines = [float(problems.columns_cosine(a, b).mean()) for a, b in zip(found, truth, strict=True)]
    assert cosines[0] > 0.97
    assert cosines[1] > 0.92  # two seeds of truth agree with two others at 0.946


def test_under_adam_a_single_jump_does_not_end_the_estimate_and_a_runaway_does():
    growth = Growth(2, 0.0, together=True)
    for number, changes in enumerate(
        ([1.0, 1.0], [1.5, 1.5], [9.0, 1.0], [1.0, 1.0], [8.0, 8.0], [80.0, 80.0]), start=1
    ):
        growth.take(number, torch.tensor(changes), torch.tensor([1.0, 1.0]))
        assert growth.onset == (None if number < 6 else 5)
