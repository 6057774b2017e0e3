"""EK-FAC influence: P = (G̃ + λI)⁻¹, G̃ the eigenvalue-corrected Kronecker-factored Gauss-Newton matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from fimo.estimators.base import Problem
from fimo.estimators.influence import Influence, Notes, Preconditioner
from fimo.estimators.operators.kronecker import Eigenbasis, eigenbasis
from fimo.estimators.operators.pseudo_gradients import PseudoGradients
from fimo.workers.errors import UsageError
from torch import Tensor


@dataclass(frozen=True)
class EKFAC(Influence):
    """EK-FAC (George et al. 2018; Grosse et al. 2023); see ``kronecker`` for which layers it covers.

    Attributes:
        fisher: exact (a backward pass for every output), sampled (labels drawn from the model), or auto: exact for
            few outputs; what was used is in the notes.
        samples: draws an example where sampled.
        seed: of the draws.

    Cost: two passes over 𝒟 with as many backward passes an example as it has outputs or samples, one
    eigendecomposition of each factor, then O((in + out)·in·out) a layer and gradient.
    """

    name: ClassVar[str] = "ekfac"

    fisher: Literal["auto", "exact", "sampled"] = "auto"
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.samples >= 1, "samples must be at least 1")

    def preconditioner(self, problem: Problem, notes: Notes) -> Preconditioner:
        """(G̃ + λI)⁻¹, 0 on parameters that are left out."""
        damping = self.resolve_damping(problem)
        basis = self.eigenbasis(problem, notes)
        notes["damping"] = damping

        def apply(rows: Tensor) -> Tensor:
            return basis.apply(rows, lambda values: inverse(values + damping))

        return apply

    def eigenbasis(self, problem: Problem, notes: Notes) -> Eigenbasis:
        """The factorisation, with what it is and leaves out in ``notes``.

        Raises:
            UsageError: no trainable parameter is covered.
        """
        return factorised(problem, notes, self.fisher, self.samples, self.seed)


def inverse(values: Tensor) -> Tensor:
    """1/x, and 0 where x is 0 (a parameter that the loss does not depend on, undamped)."""
    return torch.where(values > 0, 1 / values, 0)


def factorised(
    problem: Problem, notes: Notes, fisher: Literal["auto", "exact", "sampled"], samples: int, seed: int
) -> Eigenbasis:
    """See ``EKFAC.eigenbasis``."""
    sources = []

    def draw(batch: object) -> PseudoGradients:
        sources.append(PseudoGradients(problem.model, batch, fisher, samples, seed))
        return sources[-1]

    basis = eigenbasis(problem, draw)
    if not basis.blocks:
        raise UsageError("estimator ekfac: the model has no Linear, Conv2d or small trainable tensor to cover")
    notes["fisher"] = sources[0].fisher
    notes["left_out"] = basis.left_out
    if basis.left_out:
        shown = ", ".join(basis.left_out[:8]) + (" …" if len(basis.left_out) > 8 else "")
        problem.say(f"warning: ekfac leaves out {len(basis.left_out)} parameter tensors: {shown}")
    return basis
