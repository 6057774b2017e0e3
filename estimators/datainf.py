"""DataInf: the mean over the training examples of each layer's rank-one inverses, by Sherman-Morrison.

With g_l a layer's slice of ∇ℓ (a layer is one parameter tensor) and n training examples,

    P v = [ 1/n Σ_j (g_jl g_jlᵀ + λ_l I)⁻¹ v_l ]_l,    (g gᵀ + λI)⁻¹ v = 1/λ ( v − g (gᵀv) / (λ + ‖g‖²) ).

Source: Kwon et al., DataInf (ICLR 2024), eq. 5. λ_l = damping_scale × the mean over all of 𝒟 of the mean
squared entry of the layer's gradient. λ_l is known only after the last example, hence two ways to the same number. If
the inner products of every example with every evaluation and removal gradient fit in memory, they are kept and each
gradient is computed once. Otherwise a first pass takes λ_l and a second one applies P.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor

from fimo.estimators.base import Estimate, Notes, Problem, estimating, finite
from fimo.estimators.counts import Work
from fimo.estimators.influence import Influence, Preconditioner
from fimo.estimators.operators import gradients
from fimo.estimators.operators.gradients import (
    Layout,
    incidence,
    loss_gradients,
    mean_square,
    measure_gradients,
    unique,
)

Rows = Iterator[tuple[list[int], Tensor]]


@dataclass(frozen=True)
class DataInf(Influence):
    """DataInf with layer-wise damping; see the module.

    Cost: n + E backward passes and O(n(R + E)P) multiplications in one pass; 2n + R + E backward passes in
        two.
    """

    name: ClassVar[str] = "datainf"
    default_scale: ClassVar[float] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.damping != 0 and self.damping_scale != 0, "the damping must be positive")

    def estimate(self, problem: Problem) -> Estimate:
        """(R, E)."""
        if self.training_gradient != "final" or kept_scalars(problem) > gradients.HELD:
            return super().estimate(problem)
        with estimating(problem.model):
            values, damping = self._in_one_pass(problem)
        return Estimate(finite(values, self.name), notes=_damping_note(problem, damping))

    def work(self, problem: Problem) -> Work:
        """A second pass of gradients where one is not enough, and every training gradient with every row."""
        rows, size = len(problem.evals) + len(problem.removals), Layout.of(problem.model.params).size
        n = float(len(problem.train))
        return super().work(problem) + Work(gradients=n, flops=2 * n * rows * size)

    def preconditioning(self, problem: Problem, notes: Notes) -> Preconditioner:
        """P by a pass over 𝒟 for λ_l, and one more for each call."""
        model, slices = problem.model, list(Layout.of(problem.model.params).slices.values())
        damping = self._layer_damping(mean_square(model, problem.train))
        notes.update(_damping_note(problem, damping))

        def apply(rows: Tensor) -> Tensor:
            result = rows.clone()
            for _, block in loss_gradients(model, problem.train):
                for layer, of_layer in zip(damping.tolist(), slices, strict=True):
                    g = block[:, of_layer]
                    weights = 1 / (len(problem.train) * (layer + g.square().sum(dim=1)))
                    result[:, of_layer] -= (rows[:, of_layer] @ g.T * weights) @ g
            for layer, of_layer in zip(damping.tolist(), slices, strict=True):
                result[:, of_layer] /= layer
            return result

        return apply

    def _layer_damping(self, squares: Tensor) -> Tensor:
        """λ_l from each layer's mean squared gradient entry, float64 (layers,)."""
        if isinstance(self.damping, int | float):
            return torch.full_like(squares, self.damping)
        assert self.damping_scale is not None
        # A layer whose gradients are all zero contributes nothing, whatever its λ.
        return torch.where(squares > 0, self.damping_scale * squares, 1)

    def _in_one_pass(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """(values (R, E), λ_l): vᵀPr expanded into inner products, so that λ_l enters last."""
        model, slices = problem.model, Layout.of(problem.model.params).slices.values()
        v = measure_gradients(model, problem.evals)
        removed = unique(problem.removals)
        parts = [rows for _, rows in loss_gradients(model, problem.train, removed)]
        own = torch.cat(parts) if parts else v[:0]
        r = incidence(problem.removals, removed).to(own) @ own

        products: list[tuple[list[Tensor], ...]] = [([], [], []) for _ in slices]
        for _, block in _every_gradient(problem, removed, own):
            for (with_v, with_r, norms), s in zip(products, slices, strict=True):
                g = block[:, s]
                with_v.append((g @ v[:, s].T).double())
                with_r.append((g @ r[:, s].T).double())
                norms.append(g.double().square().sum(dim=1))

        n, square_norms = len(problem.train), [torch.cat(norms) for _, _, norms in products]
        sizes = [s.stop - s.start for s in slices]
        squares = torch.stack([norm.mean() / size for norm, size in zip(square_norms, sizes, strict=True)])
        damping = self._layer_damping(squares)
        values = torch.zeros(len(r), len(v), dtype=torch.float64, device=v.device)
        for (with_v, with_r, _), norm, s, layer in zip(products, square_norms, slices, damping, strict=True):
            weights = 1 / (n * (layer + norm))
            inner = (r[:, s] @ v[:, s].T).double()
            values += (inner - (torch.cat(with_r) * weights[:, None]).T @ torch.cat(with_v)) / layer
        return values, damping


def kept_scalars(problem: Problem) -> int:
    """What one pass keeps: evaluation and removal gradients, and every example's products with them."""
    layout, removed = Layout.of(problem.model.params), len(unique(problem.removals))
    rows = len(problem.evals) + len(problem.removals)
    return (rows + removed) * layout.size + 2 * len(problem.train) * (rows + 1) * len(layout.shapes)


def _every_gradient(problem: Problem, known: list[int], rows: Tensor) -> Rows:
    """∇ℓ_j for all of 𝒟 in blocks, those at ``known`` taken from ``rows``."""
    have = set(known)
    others = [j for j in range(len(problem.train)) if j not in have]
    return chain([(known, rows)], loss_gradients(problem.model, problem.train, others))


def _damping_note(problem: Problem, damping: Tensor) -> Notes:
    return {"layer_damping": dict(zip(problem.model.params, damping.tolist(), strict=True))}
