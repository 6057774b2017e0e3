"""CG, LiSSA and LiSSA-H against dense inverses; the training-side gradients of Proposition 1."""

from __future__ import annotations

import pytest
import torch

from fimo.estimators import parse
from fimo.estimators.operators import gradients
from fimo.workers.errors import DivergedError, UsageError
from tests.estimators import problems

KINDS = [problems.classification, problems.regression]


def estimate(entry, problem):
    (estimator,) = parse(entry)
    return estimator.estimate(problem)


def dense(p, matrix, damping):
    inverse = torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype))
    return problems.removal_sums(p) @ inverse @ problems.eval_gradients(p).T


def mean_square_entry(p):
    return float(problems.train_gradients(p).square().mean())


@pytest.fixture(params=["compressed", "matrix free"])
def way(request, monkeypatch):
    """Both ways of applying the Gauss-Newton matrix."""
    if request.param == "matrix free":
        monkeypatch.setattr(gradients, "HELD", 900)  # the Jacobian of 27 examples has more scalars


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"damping_scale": 1.0}, {"damping": 0.03}, {"damping_scale": 10.0}])
def test_cg_is_the_dense_gauss_newton_inverse(kind, options, way):
    p = kind()
    damping = options.get("damping", options.get("damping_scale", 0.0) * mean_square_entry(p))
    found = estimate({"name": "cg", "tolerance": 1e-10, **options}, p)
    truth = dense(p, problems.gauss_newton(p), damping)
    torch.testing.assert_close(found.values, truth, rtol=1e-6, atol=1e-9)
    assert found.notes["damping"] == pytest.approx(damping, rel=1e-10)
    (solve,) = found.notes["solves"]
    assert solve["converged"] == len(p.evals) == len(solve["iterations"])
    assert max(solve["relative_residual"]) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_cg_at_its_default_tolerance_is_close_and_right_in_scale(kind, way):
    p = kind()
    found = estimate({"name": "cg", "damping_scale": 1.0}, p).values
    truth = dense(p, problems.gauss_newton(p), mean_square_entry(p))
    assert problems.columns_cosine(found, truth).min() > 0.9999
    torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-3 * float(truth.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [60, 3000])
def test_cg_with_the_hessian_is_its_dense_inverse_even_where_it_is_indefinite(kind, steps):
    p = kind(steps=steps)
    matrix = problems.hessian(p)
    found = estimate({"name": "cg", "curvature": "hessian", "damping": 0.01}, p)
    truth = dense(p, matrix, 0.01)
    assert problems.columns_cosine(found.values, truth).min() > 0.9999
    torch.testing.assert_close(found.values, truth, rtol=1e-2, atol=1e-3 * float(truth.abs().max()))


def test_a_right_hand_side_converges_alone_as_in_company():
    p = problems.regression()
    entry = {"name": "cg", "damping_scale": 1.0}
    whole = estimate(entry, p).values
    for e in range(len(p.evals)):
        one = type(p.evals)({k: v[e : e + 1] for k, v in p.evals.tensors.items()}, dtype=torch.float64)
        alone = estimate(entry, type(p)(p.model, p.train, one, p.removals)).values
        torch.testing.assert_close(alone, whole[:, e : e + 1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "matrix"), [("lissa", problems.gauss_newton), ("lissa_h", problems.hessian)])
def test_lissa_over_everything_is_the_dense_inverse(kind, name, matrix, monkeypatch):
    if kind is problems.classification:
        monkeypatch.setattr(gradients, "HELD", 900)  # matrix-free; the other kind is compressed
    p = kind(steps=600)
    damping = 2.0
    found = estimate({"name": name, "damping": damping, "depth": 60, "batch_size": 27}, p)
    truth = dense(p, matrix(p), damping)
    assert problems.columns_cosine(found.values, truth).min() > 0.9999
    torch.testing.assert_close(found.values, truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))
    (trace,) = found.notes["trace"]
    assert trace[-1][2] < 1e-4 < trace[0][1]


@pytest.mark.parametrize("kind", KINDS)
def test_lissa_averages_to_the_dense_inverse_over_random_batches(kind):
    p = kind(steps=600)
    options = {"damping": 0.5, "depth": 100, "batch_size": 20, "repeats": 40}
    found = estimate({"name": "lissa", **options}, p).values
    truth = dense(p, problems.gauss_newton(p), 0.5)
    assert problems.columns_cosine(found, truth).min() > 0.99
    assert (found - truth).norm() / truth.norm() < 0.1


def test_lissa_is_its_plain_recursion_over_the_same_batches(way):
    p = problems.regression()
    options = {"damping": 0.1, "depth": 50, "batch_size": 10, "scale": 20.0, "seed": 5}
    per_example = []
    for i in range(len(p.train)):
        j = problems.jacobian(p, i)
        per_example.append(j.T @ problems.output_hessian(p, i) @ j)
    v = problems.eval_gradients(p).T
    u, generator = torch.zeros_like(v), torch.Generator().manual_seed(5)
    for _ in range(50):
        batch = torch.randperm(27, generator=generator)[:10].tolist()
        matrix = sum(per_example[i] for i in batch) / 10
        u = u + (v - matrix @ u - 0.1 * u) / 20.0
    truth = problems.removal_sums(p) @ u
    torch.testing.assert_close(estimate({"name": "lissa", **options}, p).values, truth, rtol=1e-9, atol=1e-12)


def test_lissa_that_grows_is_an_error_and_leaves_the_model_alone():
    p = problems.classification()
    before = {n: t.clone() for n, t in p.model.params.items()}
    p.model.module.train()
    for name in ("lissa", "lissa_h"):
        with pytest.raises(DivergedError, match="raise damping or scale"):
            estimate({"name": name, "damping_scale": 1.0, "scale": 0.01}, p)
    assert all(torch.equal(t, before[n]) for n, t in p.model.params.items())
    assert p.model.module.training


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "cg", "damping_scale": 1.0},
        {"name": "cg", "curvature": "hessian", "damping": 1.0},
        {"name": "lissa", "damping_scale": 1.0, "depth": 100, "scale": 20},
        {"name": "lissa_h", "depth": 8, "damping": 0.1, "scale": 20},
    ],
    ids=["cg", "cg of the Hessian", "lissa", "lissa_h"],
)
def test_the_block_size_changes_nothing_beyond_rounding(entry, monkeypatch):
    p = problems.regression()
    found = []
    for size in (10, 64):
        monkeypatch.setattr(gradients, "BLOCK", size)
        found.append(estimate(entry, p).values)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-7 * float(found[0].abs().max()))


# --- Proposition 1 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cg", "datainf"])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("side", ["corrected", "further"])
def test_training_gradients_of_the_generalised_influence_function(name, own, side):
    p = problems.classification(removals=[[0], [5], [26], [1, 2, 3]])
    inverse = preconditioner(p, name)
    if own:
        moved = -inverse @ problems.train_gradients(p).mean(dim=0)
    else:
        moved = 0.1 * torch.randn(len(inverse), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layout = gradients.Layout.of(p.model.params)
    step = None if own else 12
    if not own:
        p = problems.classification(removals=p.removals, displacement={12: layout.tensors(moved)})

    if side == "further":
        there = problems.problem_at(p, layout.tensors(moved))
        left = problems.removal_sums(there)
    else:
        left = problems.removal_sums(p) + torch.stack([problems.hessian_of(p, r) @ moved for r in p.removals])
    truth = left @ inverse @ problems.eval_gradients(p).T
    options = {"damping": 0.05, "training_gradient": side, "displacement_step": step}
    if name == "cg":
        options["tolerance"] = 1e-11
    found = estimate({"name": name, **options}, p).values
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-9)


def preconditioner(p, name, damping=0.05):
    matrix = problems.gauss_newton(p)
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    if name == "cg":
        return torch.linalg.inv(matrix + damping * identity)
    inverse, train = torch.zeros_like(matrix), problems.train_gradients(p)
    for s in problems.layer_slices(p):
        for g in train[:, s]:
            inverse[s, s] += torch.linalg.inv(torch.outer(g, g) + damping * identity[s, s]) / len(train)
    return inverse


def test_a_step_without_a_kept_displacement_names_those_that_are():
    entry = {"name": "cg", "damping": 0.1, "training_gradient": "further", "displacement_step": 9}
    p = problems.regression(displacement={8: {}, 16: {}})
    with pytest.raises(UsageError, match=r"step 9 \(kept: 8, 16\)"):
        estimate(entry, p)
