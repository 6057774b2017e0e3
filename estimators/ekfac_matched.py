"""Amount-matched influence: the preconditioner that t steps of SGD apply, instead of its limit of infinitely many.

On a quadratic with curvature C, t steps of gradient descent with rate η on −vᵀx + ½xᵀCx from 0 reach

    x_t = f_t(C) v,    f_t(λ) = (1 − (1 − ηλ)^t) / λ,

which is tη v for tηλ ≪ 1 (tη Grad-Dot) and C⁻¹v for tηλ ≫ 1 (the influence function). Hence â_t = ∇gᵀ f_t(C) ∇L_i,
n times the effect of a removal in the reweight mode to first order. Momentum, dampening, Nesterov and weight decay (a
shift of λ) are followed exactly by running the optimizer's own recursion on each eigenvalue. Source: Bae et al., If
influence functions are the answer (2022), section 3.2, and Training data attribution via approximate unrolling (2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from fimo.estimators.amounts import linear, recorded_steps, settings_of
from fimo.estimators.base import Estimate, Hyperparameters, Problem, estimating, finite
from fimo.estimators.cg import make_curvature
from fimo.estimators.ekfac import factorised
from fimo.estimators.influence import Notes
from fimo.estimators.operators.gradients import Layout, held_blocks, measure_gradients, removal_gradients
from fimo.estimators.operators.kronecker import Eigenbasis
from fimo.workers import batches
from fimo.workers.errors import DivergedError, UsageError
from fimo.workers.settings import FurtherTraining, Optimizer
from torch import Tensor


@dataclass(frozen=True)
class EKFACMatched(Hyperparameters):
    """Influence matched to the amount of further training, one estimate per recorded step; SGD alone.

    Attributes:
        form: ekfac: f_t on EK-FAC's eigenvalues; lissa: t steps of the recursion with the Gauss-Newton matrices of
            the sweep's own batches (seed ``seed``), without a factorisation.
        fisher, samples, seed: see ``EKFAC``; ``seed`` is the batch order's in the form lissa.

    Parameters that EK-FAC leaves out count as directions without curvature, f_t(0) = tη. An eigenvalue too large for
    the learning rate (the recursion would diverge on it, which further training does not do for long) gets 1/λ, its
    influence-function value; how many is in the notes.
    """

    name: ClassVar[str] = "ekfac_matched"

    form: Literal["ekfac", "lissa"] = "ekfac"
    fisher: Literal["auto", "exact", "sampled"] = "auto"
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        self.require(self.samples >= 1, "samples must be at least 1")

    def applies(self, problem: Problem) -> bool:
        """Whether further training is SGD, unclipped."""
        settings = problem.further_training
        return settings is not None and linear(settings.optimizer) and settings.clip_norm is None

    def estimate(self, problem: Problem) -> Estimate:
        """(steps, R, E).

        Raises:
            UsageError: no further-training section, another optimizer than SGD, or clipping.
            DivergedError: the form lissa grows without bound.
        """
        settings = settings_of(self, problem)
        self.require(linear(settings.optimizer), "follows SGD alone, not " + settings.optimizer.name)
        self.require(settings.clip_norm is None, "clipping is not linear; leave clip_norm out or use unrolled")
        steps, notes = recorded_steps(problem, settings), Notes()
        values = torch.zeros(len(steps), len(problem.removals), len(problem.evals), dtype=torch.float64)
        with estimating(problem.model):
            size = Layout.of(problem.model.params).size
            factored = self.form == "ekfac"
            # Of θᶠ alone: once, however many blocks of evaluation gradients there are.
            basis = factorised(problem, notes, self.fisher, self.samples, self.seed) if factored else None
            for columns in held_blocks(len(problem.evals), size):
                right = measure_gradients(problem.model, problem.evals, columns)
                into = values[:, :, columns.start : columns.stop]
                if basis is not None:
                    self._filtered(problem, settings, steps, right, into, notes, basis)
                else:
                    self._recursed(problem, settings, steps, right, into, notes)
        return Estimate(finite(values, self.name), steps, notes)

    def _filtered(
        self,
        problem: Problem,
        settings: FurtherTraining,
        steps: tuple[int, ...],
        right: Tensor,
        into: Tensor,
        notes: Notes,
        basis: Eigenbasis,
    ) -> None:
        filters, saturated = _filters(basis, settings.optimizer, steps)
        notes["saturated_eigenvalues"] = saturated
        outside = uncovered(basis, problem)
        rates = spectral_filter(torch.zeros(1, dtype=torch.float64), settings.optimizer, steps)[0]
        of_blocks = [block.coordinates(right) for block in basis.blocks]
        for which, rows in removal_gradients(problem):
            left = [block.coordinates(rows) for block in basis.blocks]
            beyond = (rows * outside) @ (right * outside).T
            for place in range(len(steps)):
                total = rates[place].to(beyond) * beyond
                for weights, a, b in zip(filters, left, of_blocks, strict=True):
                    total += (a * weights[place].to(a)) @ b.T
                into[place, which.start : which.stop] = total.double().cpu()

    def _recursed(
        self,
        problem: Problem,
        settings: FurtherTraining,
        steps: tuple[int, ...],
        right: Tensor,
        into: Tensor,
        notes: Notes,
    ) -> None:
        space = make_curvature(problem, "gauss_newton").around(right)
        state = Recursion(settings.optimizer, torch.zeros_like(space.start))
        lengths = space.start.norm(dim=1)
        place = 0
        for step, batch in enumerate(_orders(problem, settings, self.seed), start=1):
            state.step(space.apply(state.x, batch) - space.start)
            if step != steps[place]:
                continue
            grown = float((state.x.norm(dim=1) / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)).max())
            if not grown <= 100 * step * settings.optimizer.lr / (1 - settings.optimizer.momentum):
                raise DivergedError(
                    f"{self.name}: the recursion grows without bound by step {step}: the learning rate is too large "
                    "for the Gauss-Newton matrix of a batch; use form: ekfac"
                )
            rows = space.rows(state.x)
            for which, left in removal_gradients(problem):
                into[place, which.start : which.stop] = (left @ rows.T).double().cpu()
            place += 1
            if place == len(steps):
                break
        notes["seed"] = self.seed


class Recursion:
    """SGD as torch defines it, on rows x (k, d) from x = 0, given gradients."""

    def __init__(self, optimizer: Optimizer, x: Tensor) -> None:
        self.x, self._optimizer = x, optimizer
        self._momentum: Tensor | None = None

    def step(self, gradient: Tensor) -> None:
        """One step; weight decay is added to the gradient."""
        o = self._optimizer
        direction = gradient + o.weight_decay * self.x
        if o.momentum:
            was = self._momentum
            average = direction if was is None else o.momentum * was + (1 - o.dampening) * direction
            direction = direction + o.momentum * average if o.nesterov else average
            self._momentum = average
        self.x = self.x - o.lr * direction


def spectral_filter(values: Tensor, optimizer: Optimizer, steps: tuple[int, ...]) -> tuple[Tensor, int]:
    """f_t on eigenvalues (m,), float64 (steps, m), and how many eigenvalues were saturated at 1/λ."""
    shifted = values + optimizer.weight_decay
    state, found = Recursion(optimizer, torch.zeros_like(values)), []
    saturated = torch.zeros_like(values, dtype=torch.bool)
    for step in range(1, steps[-1] + 1):
        state.step(values * state.x - 1)
        # 1 − λx is the error still left; beyond its start of 1 the recursion diverges.
        saturated |= (1 - shifted * state.x).abs() > 1 + 1e-9
        if step in steps:
            found.append(torch.where(saturated, 1 / shifted, state.x))
    return torch.stack(found), int(saturated.sum())


def _filters(basis: Eigenbasis, optimizer: Optimizer, steps: tuple[int, ...]) -> tuple[list[Tensor], int]:
    pairs = [spectral_filter(block.values, optimizer, steps) for block in basis.blocks]
    return [weights for weights, _ in pairs], sum(count for _, count in pairs)


def uncovered(basis: Eigenbasis, problem: Problem) -> Tensor:
    """1 on the parameters that no block covers and 0 elsewhere, (P,) in the model's dtype."""
    slices = Layout.of(problem.model.params).slices
    mask = torch.zeros(sum(s.stop - s.start for s in slices.values()))
    for name in basis.left_out:
        mask[slices[name]] = 1
    return mask.to(problem.model.device, problem.model.dtype)


def _orders(problem: Problem, settings: FurtherTraining, seed: int) -> Iterator[list[int]]:
    for blocks in batches.schedule(len(problem.train), [batches.BASELINE], settings, seed):
        if len(blocks) != 1:
            raise UsageError("the baseline has one batch a step")
        yield blocks[0].indices.flatten().tolist()
