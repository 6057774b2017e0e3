"""EK-FAC influence: P = (G̃ + λI)⁻¹, G̃ the eigenvalue-corrected Kronecker-factored Gauss-Newton matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fimo.estimators.base import Hyperparameters, Notes, Problem, flat_loss
from fimo.estimators.influence import Influence, Preconditioner
from fimo.estimators.operators.eigenbasis import Eigenbasis
from fimo.estimators.operators.kronecker import coverage, factorised


@dataclass(frozen=True)
class Factored(Hyperparameters):
    """Base of the estimators on EK-FAC's factorisation; see ``kronecker`` for which layers it covers.

    Attributes:
        fisher: exact (a backward pass for every output), sampled (labels drawn from the model), or auto: exact for
            few outputs; which one was used is in the notes.
        samples: draws an example if sampled.
        seed: of the draws.
    """

    fisher: Literal["auto", "exact", "sampled"] = "auto"
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.samples >= 1, "samples must be at least 1")

    def unsuited(self, problem: Problem) -> str | None:
        """No trainable parameter is covered, or the Gauss-Newton matrix is 0."""
        if coverage(problem.model) == 0:
            return "the model has no Linear, Conv2d, Conv1D or small trainable tensor to cover"
        return super().unsuited(problem) or flat_loss(problem)

    def eigenbasis(self, problem: Problem, notes: Notes) -> Eigenbasis:
        """The factorisation; ``notes`` says of which kind it is and what share of the parameters it covers."""
        basis = factorised(problem.model, problem.train, self.fisher, self.samples, self.seed)
        notes.update(fisher=basis.fisher, left_out=basis.left_out, coverage=basis.coverage(problem.model))
        if basis.left_out:
            shown = ", ".join(basis.left_out[:8]) + (" …" if len(basis.left_out) > 8 else "")
            problem.say(f"warning: {self.name} leaves out {len(basis.left_out)} parameter tensors: {shown}")
        return basis


@dataclass(frozen=True)
class EKFAC(Factored, Influence):
    """EK-FAC (George et al. 2018; Grosse et al. 2023).

    Cost: two passes over 𝒟 with as many backward passes an example as it has outputs or samples, one eigendecomposition
    of each factor, then O((in + out)·in·out) a layer and gradient.
    """

    name: ClassVar[str] = "ekfac"

    def preconditioner(self, problem: Problem, notes: Notes) -> Preconditioner:
        """(G̃ + λI)⁻¹, 0 on parameters that are left out."""
        damping = self.resolve_damping(problem)
        basis = self.eigenbasis(problem, notes)
        notes["damping"] = damping

        def apply(rows: Tensor) -> Tensor:
            return basis.apply(rows, lambda values: inverse(values + damping))

        return apply


def inverse(values: Tensor) -> Tensor:
    """1/x, and 0 where x is 0 (a parameter that the loss does not depend on, undamped)."""
    return torch.where(values > 0, 1 / values, 0)
