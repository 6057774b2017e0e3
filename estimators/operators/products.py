"""Inner products of both sides' gradients, layer by layer: what estimators of large models are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.estimators.operators.by_layer import Layerwise
from fimo.estimators.operators.gradients import Layout, incidence, unique
from fimo.estimators.operators.layerwise import layerwise
from fimo.estimators.operators.parts import Gradients, tiles
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel, Tensors


@dataclass(frozen=True)
class Sides:
    """The ways to the gradients of both sides of a problem.

    Attributes:
        train, evals: of the losses, and of the measures.
        removals: training indices of each.
        like: a tensor of the model's dtype and device.
    """

    train: Layerwise
    evals: Layerwise
    removals: Sequence[Sequence[int]]
    like: Tensor

    def blocks(self) -> Iterator[tuple[Gradients, Gradients]]:
        """(removed training examples, evaluation examples) in as few pairs as memory allows.

        An evaluation example is differentiated once, a training example once for every block of those.
        """
        for right in self.evals.gradients(range(len(self.evals.examples))):
            for left in self.train.gradients(unique(self.removals)):
                yield left, right

    def values(self, value: Callable[[Gradients, Gradients], Tensor], steps: int | None = None) -> Tensor:
        """Σ over a removal's examples of ``value`` (…, b, k) with evaluation examples, float64 ([steps,] R, E)."""
        lead = () if steps is None else (steps,)
        total = torch.zeros(*lead, len(self.removals), len(self.evals.examples), dtype=torch.float64)
        for left, right in self.blocks():
            here = set(left.indices)
            inside = [[i for i in removal if i in here] for removal in self.removals]
            total[..., right.indices] += incidence(inside, left.indices) @ value(left, right).double().cpu()
        return total


def sides(
    model: FunctionalModel,
    train: Examples,
    evals: Examples,
    removals: Sequence[Sequence[int]],
    params: Tensors | None = None,
) -> Sides | None:
    """Both ways, if there are any; None = the model is small, or is not proven to be understood.

    Args:
        params: where the training side's gradients are taken; None = θᶠ, where the evaluation side's are.
    """
    left = layerwise(model, model.loss, train, params)
    right = layerwise(model, model.measure, evals, wide=True) if left is not None else None
    if left is None or right is None:
        return None
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    return Sides(left, right, removals, like)


def dot_products(left: Gradients, right: Gradients, like: Tensor, weights: Tensor | None = None) -> Tensor:
    """Inner products (b, k), float64, with a weight for every parameter, (P,), or none."""
    slices = Layout({n: torch.Size(s) for n, s in left.shapes.items()}).slices
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=like.device)
    for name in left.shapes:
        for of, (a, b) in tiles(name, left, right, like=like):
            total += a @ (b if weights is None else b * of(weights[slices[name]]).to(b)).T
    return total


def cosines(left: Gradients, right: Gradients, like: Tensor) -> Tensor:
    """Cosines (b, k), float64; 0 with a gradient of norm 0."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=like.device)
    squares = [torch.zeros(len(some), dtype=torch.float64, device=like.device) for some in (left, right)]
    for name in left.shapes:
        for _, pair in tiles(name, left, right, like=like):
            total += pair[0] @ pair[1].T
            for side, rows in enumerate(pair):
                squares[side] += square_norms(rows)
    norms = torch.outer(squares[0].sqrt(), squares[1].sqrt())
    return torch.where(norms > 0, total / norms, 0)


def square_norms(rows: Tensor) -> Tensor:
    """‖row‖² (b,), float64, of a tile in the rows' own dtype: their sums over tiles are float64."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.double().square()


def mean_squares(every: Iterator[Gradients], like: Tensor) -> Tensor:
    """As ``gradients.mean_square``."""
    total, n = torch.zeros((), dtype=torch.float64, device=like.device), 0
    for block in every:
        n += len(block)
        of_layers = []
        for name, (rows, columns) in block.shapes.items():
            square = total.new_zeros(())
            for _, (g,) in tiles(name, block, like=like):
                square += square_norms(g).sum()
            of_layers.append(square / (rows * columns))
        total = total + torch.stack(of_layers)
    return total / n
