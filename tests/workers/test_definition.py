"""The definition against what it defines: closed forms, the equations, and loops written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fimo
from fimo.workers.definition import attribution, train_cell
from fimo.workers.errors import UsageError
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from tests.workers.problems import classification, every_step, regression, sentences, settings
from tests.workers.test_quadratic import RATE, STEPS, N, closed_form, quadratic


@pytest.mark.parametrize("mode", ["drop", "mask", "reweight"])
@pytest.mark.parametrize("removal", [(), (2,), (0, 5, 6)])
def test_a_cell_on_a_quadratic_is_the_geometric_series(mode: str, removal: tuple[int, ...]) -> None:
    chosen = settings(
        Optimizer("sgd", lr=RATE), batch_size=N, steps=STEPS, removal_mode=mode, evaluate=every_step(STEPS)
    )
    weights = torch.ones(N, dtype=torch.float64)
    weights[list(removal)] = 0
    weights /= N if mode == "reweight" else N - len(removal)
    cell = train_cell(quadratic(), chosen, removal, seed=3)
    torch.testing.assert_close(cell.deltas, closed_form(quadratic(), weights), rtol=0, atol=1e-10)
    moved = (cell.model.theta - quadratic().model.theta.double()).norm()
    torch.testing.assert_close(cell.distances[-1], moved.detach(), rtol=1e-12, atol=0)


def test_two_epochs_written_out() -> None:
    """Drop mode, batches of 5 of 22: the sampler's order carried on, later examples slide forward, the rest is kept."""
    workload, removed = classification(), 7
    chosen = settings(Optimizer("sgd", lr=0.1), removal_mode="drop", epochs=2, precision="float64")
    generator = torch.Generator().manual_seed(11)
    model = copy.deepcopy(workload.model).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in workload.evals.items()}
    g = lambda: workload.measure(workload.outputs(model, wide), wide).detach()  # noqa: E731
    before = g()
    for _ in range(2):
        sampler = torch.utils.data.RandomSampler(range(23), generator=generator)
        order = [i for i in sampler if i != removed]
        for begin in (0, 5, 10, 15, 20):
            rows = order[begin : begin + 5]
            optimizer.zero_grad()
            out = model(workload.train["x"][rows].double())
            nn.functional.cross_entropy(out, workload.train["label"][rows]).backward()
            optimizer.step()
    cell = train_cell(workload, chosen, (removed,), seed=11)
    assert cell.steps == (5, 10)
    torch.testing.assert_close(cell.deltas[-1], g() - before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("workload", [regression, classification, sentences])
def test_the_attribution_is_equations_13_and_17(workload, stacked: bool) -> None:
    chosen = settings(epochs=2, removal_mode="drop", evaluate=Evaluate(every_steps=3))
    removals, seeds = [(3,), (4, 9)], [0, 5, 6]
    got = attribution(workload(), chosen, removals, seeds, stacked=stacked)
    cells = {(r, s): train_cell(workload(), chosen, r, s).deltas for s in seeds for r in ((), *removals)}
    effects = torch.stack([torch.stack([cells[r, s] - cells[(), s] for r in removals]) for s in seeds])
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(got.effect, effects.mean(0), **close)
    torch.testing.assert_close(got.sem, effects.std(0) / 3**0.5, **close)
    torch.testing.assert_close(got.training_only, torch.stack([cells[(), s] for s in seeds]), **close)
    everyone = torch.stack([torch.stack([cells[r, s] for r in removals]) for s in seeds]).mean(0)
    torch.testing.assert_close(got.centred, everyone - everyone.mean(0), **close)


def test_float64_from_numpy_and_integer_labels_are_taken_as_they_come() -> None:
    workload = classification()
    for part in (workload.train, workload.evals):
        part["x"] = torch.from_numpy(part["x"].double().numpy())
    workload.model.double()
    for precision in ("float32", "float64"):
        got = attribution(workload, settings(precision=precision), [(3,)], [0], stacked=True)
        assert got.effect.dtype is torch.float64
        assert got.effect.abs().max() > 1e-4


def test_the_face_leads_here() -> None:
    assert fimo.attribution is attribution


def test_a_length_is_asked_for_and_adamw_decays_as_torch_s() -> None:
    with pytest.raises(UsageError, match="exactly one of epochs and steps"):
        FurtherTraining(Optimizer("sgd", lr=0.1), 5)
    assert Optimizer("adamw").weight_decay == 0.01
    assert Optimizer("adam").weight_decay == 0.0
    assert Optimizer("adamw", weight_decay=0.0).weight_decay == 0.0
    with pytest.raises(UsageError, match="sgd has no betas"):
        Optimizer("sgd", betas=(0.8, 0.9))


def test_a_removal_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="training index 23"):
        train_cell(regression(), settings(), (23,))
