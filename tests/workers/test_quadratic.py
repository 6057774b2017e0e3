"""A quadratic loss with full batches: θ_t is a geometric series, so every delta has a closed form.

ℓ_i(θ) = ½ θᵀA_iθ − b_iᵀθ. One step of gradient descent on Σ_i w_i ℓ_i is θ ← θ − η(Aθ − b) with A = Σ w_i A_i and
b = Σ w_i b_i, hence θ_t = θ* + (I − ηA)ᵗ (θ₀ − θ*) with θ* = A⁻¹b. The weights are 1/n with the example; without it
1/(n−k) in drop and mask mode, and 1/n − 1/n = 0 for the removed in reweight mode.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fimo.workers.further_training import further_train
from fimo.workers.settings import Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.workload import Workload
from tests.workers.problems import every_step, make, settings

N, D, STEPS, RATE = 9, 4, 25, 0.1


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(-1, 1, D))


def half_square(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    quadratic = torch.einsum("bi,bij,bj->b", outputs, batch["A"], outputs)
    return quadratic / 2 - (batch["b"] * outputs).sum(1)


def quadratic() -> Workload:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(N + 3, D, D, generator=generator, dtype=torch.float64)
    a = root @ root.mT / D + 0.1 * torch.eye(D)
    b = torch.randn(N + 3, D, generator=generator, dtype=torch.float64)
    return Workload(
        Point(),
        {"A": a[:N], "b": b[:N]},
        {"A": a[N:], "b": b[N:]},
        outputs=lambda model, batch: model.theta.expand(len(batch["b"]), D),
        loss=half_square,
    )


def closed_form(workload: Workload, weights: Tensor) -> Tensor:
    """Deltas (STEPS, m)."""
    a = torch.einsum("n,nij->ij", weights, workload.train["A"])
    b = weights @ workload.train["b"]
    start = workload.model.theta.detach().double()
    fixed_point = torch.linalg.solve(a, b)
    shrink = torch.eye(D, dtype=torch.float64) - RATE * a
    g = lambda theta: half_square(theta.expand(3, D), workload.evals)  # noqa: E731
    points = [fixed_point + torch.linalg.matrix_power(shrink, t) @ (start - fixed_point) for t in range(1, STEPS + 1)]
    return torch.stack([g(p) - g(start) for p in points])


@pytest.mark.parametrize("mode", ["drop", "mask", "reweight"])
def test_every_steps_delta_is_the_geometric_series(mode: str) -> None:
    workload = quadratic()
    chosen = settings(
        Optimizer("sgd", lr=RATE), batch_size=N, steps=STEPS, removal_mode=mode, evaluate=every_step(STEPS)
    )
    removals = [(2,), (8,), (0, 5, 6)]
    shard = run_shard(make(workload, chosen), removals, seed=3, replicas=3)
    assert shard.steps == tuple(range(1, STEPS + 1))
    for row, removal in enumerate([*removals, (), ()]):
        weights = torch.ones(N, dtype=torch.float64)
        weights[list(removal)] = 0
        weights /= N if mode == "reweight" else N - len(removal)
        torch.testing.assert_close(shard.deltas[row], closed_form(workload, weights), rtol=0, atol=1e-10)


def test_removing_a_helpful_example_raises_the_loss() -> None:
    """The sign: if an example pulls θ towards the evaluation example's optimum, it is helpful: effect > 0."""
    eye = torch.eye(D, dtype=torch.float64)
    there = 10 * torch.ones(1, D, dtype=torch.float64)
    train = {"A": eye.expand(3, D, D), "b": torch.cat([there, -there, torch.zeros(1, D, dtype=torch.float64)])}
    workload = Workload(Point(), train, {"A": eye[None], "b": there}, quadratic().outputs, half_square)
    for mode in ("drop", "mask", "reweight"):
        chosen = settings(Optimizer("sgd", lr=RATE), batch_size=3, steps=2, removal_mode=mode)
        deltas = further_train(make(workload, chosen), [(), (0,), (1,)], 0).deltas[:, -1, 0]
        assert deltas[1] - deltas[0] > 1 > -1 > deltas[2] - deltas[0]
