"""Amount-matched influence on EK-FAC's eigenvalues: the preconditioner that t steps of SGD apply.

On a quadratic with curvature C, t steps of gradient descent with rate η on −vᵀx + ½xᵀCx from 0 reach

    x_t = f_t(C) v,    f_t(λ) = (1 − (1 − ηλ)^t) / λ,

which is tη v for tηλ ≪ 1 (tη Grad-Dot) and C⁻¹v for tηλ ≫ 1 (the influence function). Hence â_t = ∇gᵀ f_t(C) ∇L_i,
n times the effect of a removal in the reweight mode to first order. Momentum, dampening, Nesterov and weight decay (a
shift of λ) are followed exactly: the optimizer's own recursion runs on each eigenvalue. Source: Bae et al., If
influence functions are the answer (2022), section 3.2, and Training data attribution via approximate unrolling (2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fimo.estimators.amounts import SGDMatched
from fimo.estimators.base import Layered, Pair, Pairing
from fimo.estimators.declared import shipped as declared
from fimo.estimators.ekfac import Factored, uncovered
from fimo.estimators.operators.eigenbasis import Eigenbasis
from fimo.estimators.operators.gradients import dot_products
from fimo.estimators.operators.optimizers import Descent
from fimo.estimators.operators.products import Sides
from fimo.estimators.operators.rotated import spectral_products
from fimo.estimators.problem import Notes, Problem
from fimo.workers.settings import Optimizer


@dataclass(frozen=True)
class EKFACMatched(declared.EKFACMatched, Factored, SGDMatched):
    """f_t on EK-FAC's eigenvalues, one estimate per recorded step; SGD alone.

    Parameters that EK-FAC leaves out count as directions without curvature, f_t(0) = tη. An eigenvalue too large for
    the learning rate gets 1/λ, its influence-function value, because the recursion would diverge on it, which further
    training does not do for long; how many there are is in the notes.
    """

    by_layers: ClassVar[bool] = True

    def layered(self, problem: Problem, notes: Notes, both: Sides) -> Layered:
        """The same, layer by layer."""
        settings, steps = self.followed(problem)
        basis = self.eigenbasis(problem, notes)
        filters, notes["saturated_eigenvalues"] = _filters(basis, settings.optimizer, steps)
        rates = spectral_filter(torch.zeros(1, dtype=torch.float64), settings.optimizer, steps)[0].flatten().tolist()
        each = [list(weights) for weights in filters]
        return Layered(lambda left, right: spectral_products(both.train, basis, (left, right), each, rates), steps)

    def pairing(self, problem: Problem, notes: Notes) -> Pairing:
        """(steps, b, k), in EK-FAC's coordinates."""
        settings, steps = self.followed(problem)
        # Of θᶠ alone: once, however many blocks of evaluation gradients there are.
        basis = self.eigenbasis(problem, notes)
        filters, saturated = _filters(basis, settings.optimizer, steps)
        notes["saturated_eigenvalues"] = saturated
        outside = uncovered(basis, problem)
        rates = spectral_filter(torch.zeros(1, dtype=torch.float64), settings.optimizer, steps)[0]

        def against(right: Tensor) -> Pair:
            of_blocks = [block.coordinates(right) for block in basis.blocks]

            def pair(left: Tensor) -> Tensor:
                coordinates = [block.coordinates(left) for block in basis.blocks]
                beyond = dot_products(left * outside, right * outside)
                of_steps = []
                for place in range(len(steps)):
                    total = rates[place].to(beyond) * beyond
                    for weights, a, b in zip(filters, coordinates, of_blocks, strict=True):
                        total += dot_products(a * weights[place].to(a), b)
                    of_steps.append(total)
                return torch.stack(of_steps)

            return pair

        return Pairing(against, steps=steps)


def spectral_filter(values: Tensor, optimizer: Optimizer, steps: tuple[int, ...]) -> tuple[Tensor, int]:
    """f_t on eigenvalues (m,), float64 (steps, m), and how many eigenvalues were saturated at 1/λ."""
    shifted = values + optimizer.weight_decay
    descent, of_steps = Descent(optimizer, torch.zeros_like(values)), []
    saturated = torch.zeros_like(values, dtype=torch.bool)
    for step in range(1, steps[-1] + 1):
        descent.step(values * descent.x - 1)
        # 1 − λx is the error still left; beyond its start of 1 the recursion diverges.
        saturated |= (1 - shifted * descent.x).abs() > 1 + 1e-9
        if step in steps:
            of_steps.append(torch.where(saturated, 1 / shifted, descent.x))
    return torch.stack(of_steps), int(saturated.sum())


def _filters(basis: Eigenbasis, optimizer: Optimizer, steps: tuple[int, ...]) -> tuple[list[Tensor], int]:
    pairs = [spectral_filter(block.values, optimizer, steps) for block in basis.blocks]
    return [weights for weights, _ in pairs], sum(count for _, count in pairs)
