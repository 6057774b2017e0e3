"""TRAK (M = 1) against its formula, and its random projection."""

from __future__ import annotations

import pytest
import torch

from fimo.estimators import parse, trak
from fimo.estimators.operators import gradients
from fimo.estimators.operators.output_functions import is_cross_entropy, log_odds
from fimo.workers.errors import UsageError
from fimo.workers.workload import Workload
from tests.estimators import problems


def estimate(entry, problem):
    (estimator,) = parse(entry)
    return estimator.estimate(problem)


def features(p, classification):
    """Φ and Q by plain loops: f = log p/(1 − p) of the label, or the output; Q = ∂ℓ/∂f."""
    rows, weights = [], []
    for i in range(len(p.train)):
        batch = p.train.batch([i])
        params = problems.leaves(p.model)
        out = p.model.outputs(params, batch)[0]
        if classification:
            probability = out.softmax(dim=0)[batch["label"][0]]
            f, q = torch.log(probability / (1 - probability)), -(1 - probability)
        else:
            f, q = out, 2 * (out - batch["y"][0])
        found = torch.autograd.grad(f, list(params.values()), allow_unused=True)
        pairs = zip(found, params.values(), strict=True)
        rows.append(problems.flat([torch.zeros_like(t) if g is None else g for g, t in pairs]))
        weights.append(q.detach())
    return torch.stack(rows), torch.stack(weights)


@pytest.mark.parametrize("kind", [problems.classification, problems.regression])
def test_the_identity_as_projection_is_the_formula(kind):
    p = kind(n=150, removals=[[0], [5], [149], [1, 2, 3]])
    phi, q = features(p, kind is problems.classification)
    # Q_i φ_i (ΦᵀΦ)⁻¹ ∇g, group by group.
    sums = torch.stack([(phi[list(r)] * q[list(r), None]).sum(dim=0) for r in p.removals])
    truth = sums @ torch.linalg.pinv(phi.T @ phi, rtol=1e-10, hermitian=True) @ problems.eval_gradients(p).T
    found = estimate({"name": "trak", "projection": "identity"}, p)
    torch.testing.assert_close(found.values, truth, rtol=1e-6, atol=1e-9)
    assert 0 < found.notes["rank"] <= phi.shape[1]


@pytest.mark.parametrize("projection", ["rademacher", "gaussian"])
def test_a_random_projection_is_the_formula_with_its_matrix(projection, monkeypatch):
    p = problems.classification()
    monkeypatch.setattr(trak, "TILE", 16)
    phi, _ = features(p, classification=True)
    identity = torch.eye(phi.shape[1], dtype=torch.float64)
    s = trak.Projection(phi.shape[1], 12, projection, 7, p.model)(identity)
    assert abs(float((s @ s.T).diagonal().mean()) - 1) < 0.2
    assert abs(float(s.mean())) < 0.05
    projected = phi @ s
    inverse = s @ torch.linalg.inv(projected.T @ projected) @ s.T
    truth = problems.removal_sums(p) @ inverse @ problems.eval_gradients(p).T
    entry = {"name": "trak", "projection": projection, "dimension": 12, "seed": 7}
    torch.testing.assert_close(estimate(entry, p).values, truth, rtol=1e-7, atol=1e-10)


def test_drawing_the_projection_in_pieces_changes_nothing(monkeypatch):
    p = problems.classification()
    monkeypatch.setattr(trak, "TILE", 16)
    whole = estimate({"name": "trak", "dimension": 12}, p).values
    monkeypatch.setattr(gradients, "HELD", 1000)  # below 117 × 12: S is drawn again for every block
    monkeypatch.setattr(gradients, "BLOCK", 4)
    torch.testing.assert_close(estimate({"name": "trak", "dimension": 12}, p).values, whole, rtol=1e-9, atol=1e-12)


def test_seeds_differ():
    p = problems.classification()
    a, b = (estimate({"name": "trak", "dimension": 12, "seed": s}, p).values for s in (0, 1))
    assert not torch.allclose(a, b)


def test_a_saturated_label_still_has_a_feature():
    z = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)  # p = 1 in float32, where ∇ℓ is exactly 0
    (g,) = torch.autograd.grad(log_odds(z, torch.tensor([0])).sum(), z)
    torch.testing.assert_close(g, torch.tensor([[1.0, -0.5, -0.5]]))


def test_a_loss_that_is_not_cross_entropy_is_not_taken_for_it():
    def smoothed(outputs, batch):
        return torch.nn.functional.cross_entropy(outputs, batch["label"], reduction="none", label_smoothing=0.1)

    def scaled(outputs, batch):
        return 2 * problems.cross_entropy(outputs, batch)

    base = problems.classification()
    assert is_cross_entropy(base.model, base.train.batch(range(8)))
    (estimator,) = parse("trak")
    assert estimator.applies(base)
    for loss in (smoothed, scaled):
        torch.manual_seed(0)
        source = base.train.tensors
        workload = Workload(problems.Classifier(4, 6, 3).double(), source, source, problems.outputs_x, loss)
        p = problems.problem(workload, [[0]])
        assert not estimator.applies(p)
        with pytest.raises(UsageError, match="cross-entropy"):
            estimator.estimate(p)
