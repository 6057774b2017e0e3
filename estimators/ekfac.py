"""EK-FAC influence: P = (G̃ + λI)⁻¹, G̃ the eigenvalue-corrected Kronecker-factored Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fimo.estimators.amounts import linear
from fimo.estimators.base import Hyperparameters, Layered
from fimo.estimators.counts import POSITIONS, Work, is_large
from fimo.estimators.declared import families
from fimo.estimators.declared import shipped as declared
from fimo.estimators.differentiable import estimating, flat_loss
from fimo.estimators.influence import Influence, Preconditioner
from fimo.estimators.matching import Shift
from fimo.estimators.operators.eigenbasis import Eigenbasis
from fimo.estimators.operators.gradients import Layout, unique
from fimo.estimators.operators.kronecker import EXACT, coverage, factorised
from fimo.estimators.operators.layers import layers_of
from fimo.estimators.operators.nystrom import Nystrom
from fimo.estimators.operators.output_functions import is_cross_entropy
from fimo.estimators.operators.parts import Gradients
from fimo.estimators.operators.products import Sides
from fimo.estimators.operators.pseudo_gradients import FEW
from fimo.estimators.operators.rotated import spectral_products
from fimo.estimators.operators.spaces import make_curvature, outputs_of
from fimo.estimators.problem import Notes, Problem

EIGEN = 10.0
"""Flops of an eigendecomposition, in units of the side's cube."""

MOST = 4096
"""Outputs an example up to which their Hessian is formed if the exact Fisher is asked for."""


@dataclass(frozen=True)
class Factored(families.Factored, Hyperparameters):
    """Base of the estimators on EK-FAC's factorisation; see ``kronecker`` for which layers it covers."""

    def unsuited(self, problem: Problem) -> str | None:
        """No trainable parameter is covered, or the Gauss-Newton matrix is 0."""
        if self.fisher == "exact" and (outputs := outputs_of(problem.model, problem.train)) > MOST:
            return (
                f"fisher exact takes the square of {outputs} outputs an example, more than {MOST}: use fisher sampled"
            )
        if coverage(problem.model) == 0:
            return "the model has no Linear, Conv2d, Conv1D or small trainable tensor to cover"
        return super().unsuited(problem) or flat_loss(problem)

    def work(self, problem: Problem) -> Work:
        """Two passes over 𝒟, the factors of every layer, and both sides' gradients in their eigenbasis."""
        model, n = problem.model, len(problem.train)
        outputs = outputs_of(model, problem.train)
        vectors = outputs if self.fisher == "exact" or (self.fisher == "auto" and outputs <= FEW) else self.samples
        with estimating(model):
            if vectors == outputs > 1 and is_cross_entropy(model, problem.train.batch([0])):
                vectors -= 1  # Softmax has a direction without curvature.
        layers, others = layers_of(model)
        sides = [layer.sides for layer in layers]
        small = [size for name in others if (size := model.params[name].numel()) <= EXACT]
        cubes = sum(a**3 + b**3 for a, b in sides) + sum(size**3 for size in small)
        squares = sum(a**2 + b**2 for a, b in sides)
        factors = Work(flops=EIGEN * cubes, bytes=32.0 * squares, factors=float(n * (1 + vectors)))
        if small and not is_large(model):
            factors = factors + Work(gradients=float(n * vectors))
        whole = sum(2.0 * a * b * (a + b) for a, b in sides)
        both = len(problem.evals) + len(unique(problem.removals))
        by_position = is_large(model) and not self.scaled(problem)
        turned = Work(inner=(2.0 * POSITIONS * squares if by_position else whole) * both)
        if self.scaled(problem):
            turned = turned + Work(inner=2 * n * whole * vectors)
        return super().work(problem) + factors + turned

    def scaled(self, problem: Problem) -> bool:
        """Whether gradients are scaled entry by entry, which leaves no outer products of them."""
        return False

    def eigenbasis(self, problem: Problem, notes: Notes, scale: Tensor | None = None) -> Eigenbasis:
        """The factorisation; ``notes`` says of which kind it is and what share of the parameters it covers."""
        basis = factorised(problem.model, problem.train, self.fisher, self.samples, self.seed, scale)
        notes.update(fisher=basis.fisher, left_out=basis.left_out, coverage=basis.coverage(problem.model))
        if basis.drawn:
            notes.update(sampled=basis.drawn, samples=self.samples)
        if basis.left_out:
            shown = ", ".join(basis.left_out[:8]) + (" …" if len(basis.left_out) > 8 else "")
            problem.say(f"warning: {self.name} leaves out {len(basis.left_out)} parameter tensors: {shown}")
        return basis


@dataclass(frozen=True)
class EKFAC(declared.EKFAC, Factored, Influence):
    """EK-FAC (George et al. 2018; Grosse et al. 2023): (G̃ + λD)⁻¹ on its spectrum, for as many λ as there are.

    Parameters that EK-FAC leaves out count as directions without curvature, 1/λ, if the damping is matched; otherwise
    they have no part in the estimate.

    Cost: two passes over 𝒟 with as many backward passes an example as it has outputs or samples, one eigendecomposition
    of each factor, then O((in + out)·in·out) a layer and gradient.
    """

    by_layers: ClassVar[bool] = True

    def layered(self, problem: Problem, notes: Notes, both: Sides) -> Layered | None:
        """The same, layer by layer."""
        if self.training_gradient != "final":
            return None
        shift = self.shift(problem)
        basis = self.eigenbasis(problem, notes, shift.scale)
        shift.note(notes)
        filters = [[damped(block.values, value) for value in shift.values] for block in basis.blocks]
        outside = [1 / value if shift.steps is not None else 0.0 for value in shift.values]

        def value(left: Gradients, right: Gradients) -> Tensor:
            found = spectral_products(both.train, basis, (left, right), filters, outside, shift.scale)
            return found if shift.steps is not None else found[0]

        return Layered(value, shift.steps)

    def scaled(self, problem: Problem) -> bool:
        """Adam's and AdamW's own scale, if the damping is matched."""
        settings = problem.further_training
        return self.is_matched and settings is not None and not linear(settings.optimizer)

    def preconditioning(self, problem: Problem, notes: Notes) -> Preconditioner:
        """(G̃ + λD)⁻¹, 0 on parameters that are left out if λ is not matched."""
        shift = self.shift(problem)
        basis = self.eigenbasis(problem, notes, shift.scale)
        shift.note(notes)
        outside = uncovered(basis, problem) if shift.steps is not None else None

        def apply(rows: Tensor) -> Tensor:
            scaled = rows if shift.scale is None else rows * shift.scale.to(rows)
            solved = basis.apply_each(scaled, [partial(damped, damping=value) for value in shift.values])
            if outside is not None:
                solved += torch.stack([scaled * outside / value for value in shift.values])
            if shift.scale is not None:
                solved *= shift.scale.to(rows)
            return solved if shift.steps is not None else solved[0]

        return apply


def damped(values: Tensor, damping: float) -> Tensor:
    """1/(x + λ), and 0 where that is 0 (a parameter that the loss does not depend on, undamped)."""
    shifted = values + damping
    return torch.where(shifted > 0, 1 / shifted, 0)


def uncovered(basis: Eigenbasis, problem: Problem) -> Tensor:
    """1 on the parameters that no block covers and 0 elsewhere, (P,) in the model's dtype."""
    slices = Layout.of(problem.model.params).slices
    mask = torch.zeros(sum(s.stop - s.start for s in slices.values()))
    for name in basis.left_out:
        mask[slices[name]] = 1
    return mask.to(problem.model.device, problem.model.dtype)


def as_inverse(problem: Problem, shift: Shift, notes: Notes) -> Callable[[Tensor, float], Tensor]:
    """(rows (k, P), λ) ↦ M⁻¹ of them in the scaled space of ``shift``, for a solver; see ``operators.nystrom``."""
    model = problem.model
    basis = factorised(model, problem.train, "auto", 1, 0, shift.scale)
    empty = torch.zeros(0, Layout.of(model.params).size, dtype=model.dtype, device=model.device)
    space = make_curvature(model, problem.train, "gauss_newton", shift.scale).whole(empty)
    inverse = Nystrom(space, basis, model.dtype)
    notes.update(fisher=basis.fisher, left_out=basis.left_out, rank=len(inverse.values))
    return inverse.inverse
