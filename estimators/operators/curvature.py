"""Curvature of the training loss as linear operators on rows (k, P), without ever forming a matrix.

Invariant: an operator over indices I is the *mean* of the examples' curvatures over I. The blocks that it is computed
in do not matter; a ragged last one weighs by its size. (The inverse of a mean is not the mean of inverses.) All k
right-hand sides share one pass over the examples. Solvers add the damping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.func import grad, vjp

from fimo.estimators.operators import gradients
from fimo.estimators.operators.gradients import Layout, directional, each_example
from fimo.workers.examples import Batch, Examples
from fimo.workers.functional import FunctionalModel, Tensors

PASS = 64
"""Examples that go through the model at once: with k tangents their activations are k-fold."""


OUTPUTS = 4
"""Tensors of the outputs' size that a product holds for each row."""


class Operator(Protocol):
    """A symmetric matrix, the mean over training examples, as what it does to rows."""

    model: FunctionalModel
    examples: Examples

    def __call__(self, rows: Tensor, indices: Sequence[int] | None = None) -> Tensor:
        """Rows (k, P) -> rows (k, P), over the examples at ``indices`` or all."""
        ...


class _Mean:
    """Means of a product over examples; a subclass gives the product with one batch's summed curvature."""

    def __init__(self, model: FunctionalModel, examples: Examples) -> None:
        self.model, self.examples, self.layout = model, examples, Layout.of(model.params)
        with torch.no_grad():
            self._outputs = model.outputs(model.params, examples.batch([0])).numel()

    def __call__(self, rows: Tensor, indices: Sequence[int] | None = None) -> Tensor:
        count = len(self.examples) if indices is None else len(indices)
        # A language model's outputs, with those that are differentiated again, are more than its parameters.
        outputs = OUTPUTS * self._outputs
        some = max(1, min(PASS, gradients.BLOCK, gradients.STREAM // outputs))
        together = max(1, gradients.stream(self.model.device) // max(self.layout.size, some * outputs))
        total = torch.zeros_like(rows)
        for _, batch in self.examples.batches(some, indices):
            product = self.product(batch)
            for start in range(0, len(rows), together):
                along = self.layout.tensors(rows[start : start + together])
                total[start : start + together] += self.layout.rows(each_example(product, along)).detach()
        return total / count

    def product(self, batch: Batch) -> Callable[[Tensors], Tensors]:
        """v -> (Σ of the batch's curvatures) v for one v."""
        raise NotImplementedError


class GaussNewton(_Mean):
    """G = mean_i J_iᵀ H_i J_i, J the Jacobian of the outputs, H_i the Hessian of ℓ_i in the outputs.

    For losses that are convex in the outputs G is positive semidefinite; for cross-entropy and squared error
    it is the Fisher matrix (Schraudolph 2002; Martens 2020). Cost of a product: about four passes an example
    and row.
    """

    def product(self, batch: Batch) -> Callable[[Tensors], Tensors]:
        """v -> Σ_i J_iᵀ H_i J_i v."""
        model = self.model

        def outputs(params: Tensors) -> Tensor:
            return model.outputs(params, batch)

        def slope(out: Tensor) -> Tensor:
            return grad(lambda o: model.loss_of_outputs(o, batch).sum())(out)  # type: ignore[no-any-return]

        out, pull_back, *_ = vjp(outputs, model.params)

        def apply(v: Tensors) -> Tensors:
            along = directional(outputs, model.params, v)[1]
            image: Tensors = pull_back(directional(slope, out, along)[1])[0]
            return image

        return apply


class Hessian(_Mean):
    """H = mean_i ∇²ℓ_i, by forward over reverse (Pearlmutter 1994). Indefinite away from a minimum."""

    def product(self, batch: Batch) -> Callable[[Tensors], Tensors]:
        """v -> Σ_i ∇²ℓ_i v."""
        model = self.model
        slope = grad(lambda params: model.loss(params, batch).sum())

        def apply(v: Tensors) -> Tensors:
            along: Tensors = directional(slope, model.params, v)[1]
            return along

        return apply
