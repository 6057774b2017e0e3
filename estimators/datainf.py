"""DataInf: the mean over the training examples of each layer's rank-one inverses, by Sherman-Morrison.

With g_l a layer's slice of ∇ℓ (a layer is one parameter tensor) and n training examples,

    P v = [ 1/n Σ_j (g_jl g_jlᵀ + λ_l I)⁻¹ v_l ]_l,    (g gᵀ + λI)⁻¹ v = 1/λ ( v − g (gᵀv) / (λ + ‖g‖²) ).

Source: Kwon et al., DataInf (ICLR 2024), eq. 5. λ_l = damping_scale × the mean over all of 𝒟 of the mean
squared entry of the layer's gradient. λ_l is known only after the last example, hence two ways to the same number. If
the inner products of every example with every evaluation and removal gradient fit in memory, they are kept and each
gradient is computed once. Otherwise a first pass takes λ_l and a second one applies P. A large model's gradients are
kept layer by layer, where many fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor

from fimo.estimators.base import Layered, finite
from fimo.estimators.counts import Work, of_products
from fimo.estimators.declared import shipped as declared
from fimo.estimators.differentiable import estimating
from fimo.estimators.influence import Influence, Preconditioner
from fimo.estimators.operators import gradients
from fimo.estimators.operators.gradients import Layout, incidence, unique
from fimo.estimators.operators.parts import Gradients, tiles
from fimo.estimators.operators.products import Sides, mean_squares, sides, square_norms
from fimo.estimators.operators.rows import loss_gradients, mean_square, measure_gradients
from fimo.estimators.problem import Estimate, Notes, Problem

Rows = Iterator[tuple[list[int], Tensor]]


@dataclass(frozen=True)
class DataInf(declared.DataInf, Influence):
    """DataInf with layer-wise damping; see the module.

    Cost: n + E backward passes and O(n(R + E)P) multiplications in one pass; 2n + R + E backward passes in
        two.
    """

    by_layers: ClassVar[bool] = True

    def estimate(self, problem: Problem) -> Estimate:
        """(R, E)."""
        if self.training_gradient != "final" or kept_scalars(problem) > gradients.held(problem.model.device):
            return super().estimate(problem)
        with estimating(problem.model):
            layers = sides(problem.model, problem.train, problem.evals, problem.removals)
        if layers is not None:
            return super().estimate(problem)
        with estimating(problem.model):
            values, damping = self._in_one_pass(problem)
        return Estimate(finite(values, self.name), notes=_damping_note(problem, damping))

    def layered(self, problem: Problem, notes: Notes, both: Sides) -> Layered | None:
        """The same, layer by layer; None if the removed examples' gradients do not fit, for each block of them passes
        over all of 𝒟.
        """
        if self.training_gradient != "final" or not both.train.fits(len(unique(problem.removals))):
            return None
        known: list[Tensor] = []

        def value(left: Gradients, right: Gradients) -> Tensor:
            every = partial(_every_layered, both, left)
            if not known and _products(problem, left, right) > gradients.held(problem.model.device) // 4:
                known.append(self._layer_damping(mean_squares(every(), both.like)))
            found, damping = self._expanded(every(), left, right, both.like, known[0] if known else None)
            known[:] = [damping]
            notes.update(_damping_note(problem, damping))
            return found

        return Layered(value)

    def _expanded(
        self, every: Iterator[Gradients], left: Gradients, right: Gradients, like: Tensor, damping: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(lᵀPr (b, k), λ_l): the products with every training example are kept if λ_l is not known yet."""
        names, n = list(left.shapes), 0
        products: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in names]
        total = torch.zeros(len(left), len(right), dtype=torch.float64, device=like.device)
        inner = [torch.zeros_like(total) for _ in names]
        for block in every:
            n += len(block)
            for place, name in enumerate(names):
                with_l, with_r = (total.new_zeros(len(block), len(side)) for side in (left, right))
                norms = total.new_zeros(len(block))
                first = not products[place]
                for _, (g, a, b) in tiles(name, block, left, right, like=like):
                    with_l += g @ a.T
                    with_r += g @ b.T
                    norms += square_norms(g)
                    if first:
                        inner[place] += a @ b.T
                products[place].append((with_l, with_r, norms))
                if damping is not None:
                    weights = 1 / (damping[place] + norms)
                    total -= (with_l * weights[:, None]).T @ with_r / damping[place]
                    products[place] = [(with_l[:0], with_r[:0], norms[:0])]
        if damping is not None:
            total /= n
            return total + sum(i / d for i, d in zip(inner, damping, strict=True)), damping
        sizes = [rows * columns for rows, columns in left.shapes.values()]
        norms_of = [torch.cat([norms for _, _, norms in some]) for some in products]
        damping = self._layer_damping(torch.stack([v.mean() / s for v, s in zip(norms_of, sizes, strict=True)]))
        for some, norms, own, layer in zip(products, norms_of, inner, damping, strict=True):
            with_l, with_r = (torch.cat([pair[side] for pair in some]) for side in (0, 1))
            total += (own - (with_l / (n * (layer + norms))[:, None]).T @ with_r) / layer
        return total, damping

    def work(self, problem: Problem) -> Work:
        """A second pass of gradients where one is not enough, and every training gradient with every row."""
        rows = len(problem.evals) + len(unique(problem.removals))
        n = len(problem.train)
        return super().work(problem) + Work(gradients=float(n)) + of_products(problem.model, n, rows)

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


def _every_layered(both: Sides, known: Gradients) -> Iterator[Gradients]:
    """∇ℓ_j for all of 𝒟, those that are known first."""
    have = set(known.indices)
    yield known
    yield from both.train.gradients(
        [j for j in range(len(both.train.examples)) if j not in have], gradients.held(both.train.model.device) // 4
    )


def _products(problem: Problem, left: Gradients, right: Gradients) -> int:
    return len(problem.train) * (len(left) + len(right) + 1) * len(left.shapes)


def _damping_note(problem: Problem, damping: Tensor) -> Notes:
    return {"layer_damping": dict(zip(problem.model.params, damping.tolist(), strict=True))}
