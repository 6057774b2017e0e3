"""The space that a solver's vectors live in: P coordinates, or an exact compression to the rank of Gauss-Newton.

With n examples of o outputs each, G = Jᵀ S J has rank at most N = n·o. If N × P scalars may be held, J is factored
once, Jᵀ = B R with BᵀB = I. Then on v = B z + v⊥

    G v = B (R S Rᵀ) z + 0 · v⊥,

and a Krylov or Neumann iteration from v has the very same iterates in the min(N, P) + 1 coordinates (z, ‖v⊥‖), with
the ordinary inner product. An iteration then costs N² a right-hand side instead of passes through the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.func import hessian, jacrev, vjp, vmap

from fimo.estimators.operators import gradients
from fimo.estimators.operators.curvature import GaussNewton, Hessian, Operator
from fimo.estimators.operators.gradients import Layout, each_example, over_examples, single
from fimo.workers.examples import Batch, Examples
from fimo.workers.functional import FunctionalModel, Tensors

LARGEST = 4096
"""Rank up to which compressing pays."""


class Space(Protocol):
    """Coordinates (k, d) of k vectors, float64, and a curvature acting on them.

    Float64 because a small damping magnifies every rounding of a solver's by the condition number.
    """

    start: Tensor

    def apply(self, x: Tensor, indices: Sequence[int] | None = None) -> Tensor:
        """The curvature, as a mean over the examples at ``indices`` or all, on coordinates (k, d)."""
        ...

    def rows(self, x: Tensor) -> Tensor:
        """Coordinates (k, d) as rows (k, P), in the model's dtype."""
        ...


class Curvature(Protocol):
    """Makes spaces around given rows."""

    def around(self, rows: Tensor) -> Space:
        """A space whose ``start`` are the rows (k, P)."""
        ...


class Plain:
    """P coordinates: the rows themselves, in float64, and an operator on them in the model's dtype."""

    def __init__(self, operator: Operator, rows: Tensor) -> None:
        self._operator, self._dtype = operator, rows.dtype
        self.start = rows.double()

    def apply(self, x: Tensor, indices: Sequence[int] | None = None) -> Tensor:
        """See ``Space``."""
        return self._operator(x.to(self._dtype), indices).double()

    def rows(self, x: Tensor) -> Tensor:
        """See ``Space``."""
        return x.to(self._dtype)


class MatrixFree:
    """A curvature by passes through the model."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator

    def around(self, rows: Tensor) -> Space:
        """See ``Curvature``."""
        return Plain(self._operator, rows)


class Compressed:
    """The Gauss-Newton matrix of all training examples in an orthonormal basis of its range; see the module.

    The basis (P, r) is float64 too: one of float32 is orthonormal to 1e-7 alone, which a small damping magnifies.
    """

    def __init__(self, operator: GaussNewton) -> None:
        model, examples = operator.model, operator.examples
        jacobians, weights = [], []
        size = gradients.block_size(Layout.of(model.params).size * outputs_per_example(operator))
        for _, batch in examples.batches(size):
            rows, square = linearised(model, batch, model.params)
            jacobians.append(rows.double())
            weights.append(square)
        # (n, o, o): each example's ∂²ℓ/∂outputs².
        self.weights = torch.cat(weights).double()
        self.basis, triangle = torch.linalg.qr(torch.cat(jacobians).T)
        rank, (n, o) = len(triangle), self.weights.shape[:2]
        self.factor = triangle.reshape(rank, n, o)
        self.all = self._over(list(range(n)))

    def _over(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(R_I, S_I R_Iᵀ / |I|): their product is the matrix over the examples I."""
        here = self.factor[:, indices]
        weighted = torch.einsum("rno,nop->npr", here, self.weights[indices]) / len(indices)
        return here.flatten(1), weighted.flatten(0, 1)

    def around(self, rows: Tensor) -> Space:
        """See ``Curvature``."""
        return _CompressedSpace(self, rows)

    @property
    def matrix(self) -> Tensor:
        """R S Rᵀ over all examples (r, r)."""
        left, right = self.all
        return left @ right


class _CompressedSpace:
    def __init__(self, curvature: Compressed, rows: Tensor) -> None:
        wide, self._dtype = rows.double(), rows.dtype
        inside = wide @ curvature.basis
        self._outside = wide - inside @ curvature.basis.T
        length = self._outside.norm(dim=1, keepdim=True)
        self._outside /= length.clamp_min(torch.finfo(rows.dtype).tiny)
        self._curvature, self._matrix = curvature, curvature.matrix
        self.start = torch.cat([inside, length], dim=1)

    def apply(self, x: Tensor, indices: Sequence[int] | None = None) -> Tensor:
        if indices is None:
            inside = x[:, :-1] @ self._matrix
        else:
            left, right = self._curvature._over(indices)
            inside = (x[:, :-1] @ left) @ right
        return torch.cat([inside, torch.zeros_like(x[:, -1:])], dim=1)

    def rows(self, x: Tensor) -> Tensor:
        restored: Tensor = x[:, :-1] @ self._curvature.basis.T + x[:, -1:] * self._outside
        return restored.to(self._dtype)


def linearised(model: FunctionalModel, batch: Batch, params: Tensors) -> tuple[Tensor, Tensor]:
    """The outputs' Jacobian in ``params`` (all of them or some), and the loss's Hessian in the outputs.

    Returns:
        (J (B·o, p), ∂²ℓ/∂outputs² (B, o, o)).
    """

    def jacobian_of(example: Batch) -> Tensors:
        def outputs(some: Tensors) -> Tensor:
            return single(model.outputs)({**model.params, **some}, example).flatten()

        jacobian: Tensors = jacrev(outputs)(params)
        return jacobian

    layout = Layout.of(params)
    rows = layout.rows(each_example(jacobian_of, batch)).flatten(0, 1).detach()
    if not _sound(model, batch, params, rows):
        rows = _row_by_row(model, batch, params)
    return rows, output_hessians(model, model.outputs(model.params, batch), batch)


def _pull_back(model: FunctionalModel, batch: Batch, params: Tensors) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The batch's outputs, and s ↦ Jᵀs (p,) for s of their shape, by plain reverse mode."""
    layout = Layout.of(params)
    outputs, pull, *_ = vjp(lambda some: model.outputs({**model.params, **some}, batch), params)
    return outputs, lambda s: layout.rows(pull(s)[0]).detach()


def _sound(model: FunctionalModel, batch: Batch, params: Tensors, rows: Tensor) -> bool:
    """Whether a Jacobian is the one that plain reverse mode sees, along one random vector.

    Two nested vmaps are taken for a Jacobian, and torch has backward passes that are wrong under two (PReLU's, by 30%).
    """
    outputs, pull = _pull_back(model, batch, params)
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    truth = pull(s)
    return float((s.flatten() @ rows - truth).norm()) <= 1e-3 * float(truth.norm())


def _row_by_row(model: FunctionalModel, batch: Batch, params: Tensors) -> Tensor:
    """The Jacobian (B·o, p), a backward pass for every output of every example."""
    outputs, pull = _pull_back(model, batch, params)
    units = torch.eye(outputs.numel(), dtype=outputs.dtype, device=outputs.device)
    return torch.stack([pull(unit.reshape(outputs.shape)) for unit in units])


def output_hessians(model: FunctionalModel, outputs: Tensor, batch: Batch) -> Tensor:
    """∂²ℓ/∂outputs² of every example, its outputs flattened: (B, o, o)."""

    def square(out: Tensor, example: Batch) -> Tensor:
        def loss(one: Tensor) -> Tensor:
            return single(lambda _, batch: model.loss_of_outputs(one[None], batch))({}, example)

        flat: Tensor = hessian(loss)(out)
        return flat.reshape(out.numel(), out.numel())

    squares: Tensor = vmap(square, in_dims=(0, over_examples(batch)))(outputs.detach(), batch)
    return squares.detach()


def outputs_per_example(operator: Operator) -> int:
    """o: how many scalars the model puts out for one example."""
    batch = operator.examples.batch([0])
    return operator.model.outputs(operator.model.params, batch).numel()


def make_curvature(model: FunctionalModel, examples: Examples, kind: Literal["gauss_newton", "hessian"]) -> Curvature:
    """The curvature of the mean loss; Gauss-Newton compressed if its Jacobian may be held and its rank is moderate."""
    if kind == "hessian":
        return MatrixFree(Hessian(model, examples))
    operator = GaussNewton(model, examples)
    rank = len(examples) * outputs_per_example(operator)
    size = Layout.of(model.params).size
    scalars = rank * size * (torch.float64.itemsize // model.dtype.itemsize)
    held = scalars <= gradients.HELD and min(rank, size) <= LARGEST
    return Compressed(operator) if held else MatrixFree(operator)
