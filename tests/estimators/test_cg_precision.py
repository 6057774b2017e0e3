"""CG on a float32 model at a small damping gives the exact answer, or a warning that names the residual."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from fimo.estimators import parse
from fimo.estimators.operators import gradients
from fimo.workers.workload import Workload
from tests.estimators import problems


def network(dtype, classes):
    torch.manual_seed(0)
    outputs = 3 if classes else 1
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, outputs)).double()
    data = [
        {
            "x": torch.randn(n, 6, dtype=torch.float64),
            "label": torch.randint(3, (n,)),
            "y": torch.randn(n, dtype=torch.float64),
        }
        for n in (35, 6)
    ]
    functions = (
        (problems.outputs_x, problems.cross_entropy) if classes else (problems.scalar_outputs, problems.squared_error)
    )
    workload = Workload(model, *data, *functions)
    problems.train_a_little(workload, 60)
    return problems.problem(workload, [[i] for i in range(20)], dtype=dtype)


@pytest.fixture(scope="module", params=[True, False], ids=["classification", "regression"])
def exact(request):
    """The dense float64 answer as a function of the damping, times the largest eigenvalue."""
    p = network(torch.float64, request.param)
    values, vectors = torch.linalg.eigh(problems.gauss_newton(p))
    left, right = problems.removal_sums(p) @ vectors, problems.eval_gradients(p) @ vectors
    largest = float(values[-1])
    return request.param, largest, lambda damping: left / (values.clamp(min=0) + damping) @ right.T


def solve(classes, **options):
    lines = []
    p = dataclasses.replace(network(torch.float32, classes), progress=lines.append)
    found = parse({"name": "cg", **options})[0].estimate(p)
    return found, [line for line in lines if line.startswith("warning")]


@pytest.mark.parametrize("way", ["compressed", "matrix free"])
@pytest.mark.parametrize("relative", [1e-6, 1e-8, 1e-10])
def test_a_float32_model_is_solved_or_the_reader_is_warned(exact, relative, way, monkeypatch):
    if way == "matrix free":
        monkeypatch.setattr(gradients, "HELD", 5000)
    monkeypatch.setattr(gradients, "BLOCK", 16)
    classes, largest, truth = exact
    damping = relative * largest
    found, warnings = solve(classes, damping=damping, max_iterations=1500 if way == "compressed" else 250)
    worst = float(problems.columns_cosine(found.values, truth(damping)).min())
    assert worst > 0.99 or warnings
    assert bool(warnings) == ("warning" in found.notes)
    assert len(warnings) <= 1
    assert all("residual" in line and "\n" not in line for line in warnings)
    if way == "compressed" and relative == 1e-6:
        assert worst > 0.9999


def test_float64_is_solved_in_silence(exact):
    classes, largest, truth = exact
    p = network(torch.float64, classes)
    lines = []
    entry = {"name": "cg", "damping": 1e-6 * largest, "max_iterations": 3000}
    found = parse(entry)[0].estimate(dataclasses.replace(p, progress=lines.append))
    assert problems.columns_cosine(found.values, truth(1e-6 * largest)).min() > 0.99999
    assert not any("warning" in line for line in lines)
    assert "warning" not in found.notes


def test_too_few_iterations_are_a_warning_and_a_residual_that_is_true(exact):
    classes, largest, _ = exact
    found, warnings = solve(classes, damping=1e-4 * largest, max_iterations=3)
    assert "max_iterations" in warnings[0]
    assert max(found.notes["solves"][0]["relative_residual"]) > 1e-5
