"""What t steps of the sweep's optimizer amount to, as a damping: P_t = (C + D/τ_t)⁻¹.

t steps of gradient descent with rate η leave a direction of curvature λ about as much undone as a damping of 1/(ηt)
does: f_t(λ) = (1 − (1 − ηλ)^t)/λ and 1/(λ + 1/(ηt)) are both ηt for ηtλ ≪ 1 and 1/λ for ηtλ ≫ 1. Exactly alike are
they at λ = 0, which fixes τ_t for every optimizer: the way that t of its steps go along a constant gradient of 1.

    SGD             τ_t by its own recursion, with momentum, dampening, Nesterov and weight decay; D = I
    Adam, AdamW     τ_t = ηt, shrunk by AdamW's decay; D = √v̂ + ε, the optimizer's own scale, with v̂ the mean squared
                    gradient of the sweep's batches at θᶠ

Clipping multiplies τ_t by the mean factor at θᶠ (and is seen by v̂ under Adam). Adam's own weight decay, which is added
to the gradient, is beside D/τ_t too small to count and left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import grad

from fimo.estimators.amounts import linear
from fimo.estimators.counts import Work
from fimo.estimators.declared.base import JSON
from fimo.estimators.operators.gradients import Layout
from fimo.estimators.operators.optimizers import Descent, clipped
from fimo.estimators.problem import Notes, Problem
from fimo.workers import batches
from fimo.workers.amounts import BASELINE, epoch_steps
from fimo.workers.forward import observe
from fimo.workers.randomness import kept, seed_all, step_seed
from fimo.workers.settings import FurtherTraining, Optimizer

BATCHES = 64
"""Batches at least that v̂ is the mean of, in whole epochs."""

ORDER = 2**32 - 5
"""Seed of the batch order that v̂ is taken over: none that a sweep would have."""


@dataclass(frozen=True)
class Shift:
    """What is added to a curvature C: the systems are (C + λD) x = v.

    Attributes:
        values: λ of each system, positive or 0.
        steps: the amounts that they are matched to; None = one λ for every amount.
        scale: D^(−1/2), float64 (P,), 0 where the loss does not depend on the parameter; None = D is I.
    """

    values: tuple[float, ...]
    steps: tuple[int, ...] | None = None
    scale: Tensor | None = None

    def note(self, notes: Notes) -> None:
        """Say which dampings there are."""
        values: list[JSON] = list(self.values)
        notes["damping"] = values if self.steps is not None else values[0]
        if self.steps is not None:
            notes["damping_steps"] = list(self.steps)


def matched(problem: Problem, settings: FurtherTraining, steps: Sequence[int]) -> Shift:
    """λ_t = 1/τ_t for every step, and the optimizer's scale."""
    optimizer, factor = settings.optimizer, 1.0
    scale: Tensor | None = None
    if not linear(optimizer):
        scale = inverse_scale(problem, settings).sqrt()
    elif settings.clip_norm is not None:
        factors = [float(g.norm() / raw.norm()) if raw.any() else 1.0 for g, raw in _batch_gradients(problem, settings)]
        factor = sum(factors) / len(factors)
    values = tuple(1 / (factor * tau) for tau in effective_rates(optimizer, steps))
    return Shift(values, tuple(steps), scale)


def effective_rates(optimizer: Optimizer, steps: Sequence[int]) -> list[float]:
    """τ_t for every step t: how far t steps go along a constant gradient of 1 (of D under Adam)."""
    found: dict[int, float] = {}
    if linear(optimizer):
        descent = Descent(optimizer, torch.zeros(1, dtype=torch.float64))
        for step in range(1, max(steps) + 1):
            descent.step(torch.full((1,), -1.0, dtype=torch.float64))
            found[step] = float(descent.x)
    else:
        decay = optimizer.lr * optimizer.weight_decay if optimizer.name == "adamw" else 0.0
        total = 0.0
        for step in range(1, max(steps) + 1):
            total = total * (1 - decay) + optimizer.lr
            found[step] = total
    return [found[step] for step in steps]


def inverse_scale(problem: Problem, settings: FurtherTraining) -> Tensor:
    """1/D = 1/(√v̂ + ε), float64 (P,); 0 where v̂ is 0, since nothing that is removed has a gradient there."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for gradient, _ in _batch_gradients(problem, settings):
        total, count = total + gradient.double().square(), count + 1
    root = (total / count).sqrt()
    return torch.where(root > 0, 1 / (root + settings.optimizer.eps), 0)


def _batch_gradients(problem: Problem, settings: FurtherTraining) -> Iterator[tuple[Tensor, Tensor]]:
    """(clipped, plain) gradients (P,) of whole epochs of batches at θᶠ, in the sweep's training mode.

    Whole epochs, so that every example that has a gradient in a parameter has it counted. In eval mode if the training
    forward writes to its buffers.
    """
    model, train, layout = problem.model, problem.train, Layout.of(problem.model.params)
    mode = "eval" if observe(model, train, settings).mutable else settings.mode
    plain = replace(settings, removal_mode="reweight")
    epoch = epoch_steps(len(train), BASELINE, plain)
    steps = epoch if epoch == 1 else epoch * math.ceil(BATCHES / epoch)
    row = layout.rows(model.params)
    with kept(model.device), model.mode(mode):
        schedule = batches.schedule(len(train), [BASELINE], plain, ORDER)
        for number, [block] in zip(range(1, steps + 1), schedule, strict=False):
            batch, weights = train.batch(block.indices), block.weights.to(model.device, model.dtype)
            seed_all(step_seed(ORDER, number, "batch"), model.device)

            def loss(at: Tensor, batch: object = batch, weights: Tensor = weights) -> Tensor:
                return (model.loss(layout.tensors(at), batch) * weights).sum()

            raw = grad(loss)(row).detach()
            yield clipped(raw, settings.clip_norm), raw


def of_scale(problem: Problem) -> Work:
    """The passes that a matched shift takes, counted: none under unclipped SGD."""
    settings = problem.further_training
    if settings is None or (linear(settings.optimizer) and settings.clip_norm is None):
        return Work()
    return Work(passes=float(max(len(problem.train), BATCHES * settings.batch_size)))


def spread(steps: Sequence[int], most: int) -> tuple[int, ...]:
    """At most ``most`` of the ascending steps, evenly in log t, the first and the last among them."""
    if len(steps) <= most:
        return tuple(steps)
    first, last = math.log(steps[0]), math.log(steps[-1])
    wanted = [first + (last - first) * place / (most - 1) for place in range(most)]

    def nearest(at: float) -> int:
        return min(steps, key=lambda step: abs(math.log(step) - at))

    return tuple(sorted({nearest(at) for at in wanted}))
