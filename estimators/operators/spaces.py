"""The space that a solver's vectors live in: P coordinates, or an exact compression to the rank of Gauss-Newton.

With n examples of o outputs each, G = Jᵀ S J has rank at most N = n·o. If N × P scalars may be held, J is factored
once, Jᵀ = B R with BᵀB = I. Then on v = B z + v⊥

    G v = B (R S Rᵀ) z + 0 · v⊥,

and a Krylov or Neumann iteration from v has the very same iterates in the min(N, P) + 1 coordinates (z, ‖v⊥‖), with
the ordinary inner product. An iteration then costs N² a right-hand side instead of passes through the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.func import hessian, jacrev, vjp, vmap

from fimo.estimators.operators import gradients
from fimo.estimators.operators.curvature import GaussNewton, Hessian, Operator
from fimo.estimators.operators.gradients import Layout, each_example, over_examples, single
from fimo.workers.examples import Batch, Examples
from fimo.workers.functional import FunctionalModel, Tensors


class Space(Protocol):
    """Coordinates (k, d) of k vectors, float64, and a curvature acting on them.

    Float64 because a small damping magnifies every rounding of a solver's by the condition number.
    """

    start: Tensor

    def apply(self, x: Tensor, indices: Sequence[int] | None = None) -> Tensor:
        """The curvature, as a mean over the examples at ``indices`` or all, on coordinates (k, d)."""
        ...

    def rows(self, x: Tensor) -> Tensor:
        """Coordinates (…, k, d) as rows (…, k, P), in the model's dtype."""
        ...


class Curvature(Protocol):
    """Makes spaces around given rows.

    With a scale s the space is that of θ/s, in which the curvature is sCs; a solution x there is the row s·x. So
    (sCs + λI)⁻¹ between ``start`` and ``rows`` is (C + λ s⁻²)⁻¹ on rows.
    """

    def around(self, rows: Tensor) -> Space:
        """A space whose ``start`` are the rows (k, P)."""
        ...

    def whole(self, rows: Tensor) -> Space:
        """The same with a coordinate for every parameter."""
        ...


class Plain:
    """P coordinates: the rows themselves, in float64, and an operator on them in the model's dtype."""

    def __init__(self, operator: Operator, rows: Tensor, scale: Tensor | None) -> None:
        self._operator, self._dtype, self._scale = operator, rows.dtype, scale
        self.start = _scaled(rows.double(), scale)

    def apply(self, x: Tensor, indices: Sequence[int] | None = None) -> Tensor:
        """See ``Space``."""
        return _scaled(self._operator(_scaled(x, self._scale).to(self._dtype), indices).double(), self._scale)

    def rows(self, x: Tensor) -> Tensor:
        """See ``Space``."""
        return _scaled(x, self._scale).to(self._dtype)


def _scaled(rows: Tensor, scale: Tensor | None) -> Tensor:
    return rows if scale is None else rows * scale


class MatrixFree:
    """A curvature by passes through the model."""

    def __init__(self, operator: Operator, scale: Tensor | None = None) -> None:
        self._operator, self._scale = operator, scale

    def around(self, rows: Tensor) -> Space:
        """See ``Curvature``."""
        return Plain(self._operator, rows, self._scale)

    def whole(self, rows: Tensor) -> Space:
        """See ``Curvature``."""
        return self.around(rows)


class Compressed:
    """The Gauss-Newton matrix of all training examples in an orthonormal basis of its range; see the module.

    The basis (P, r) is float64 too: one of float32 is orthonormal to 1e-7 alone, which a small damping magnifies.
    """

    def __init__(self, operator: GaussNewton, scale: Tensor | None = None) -> None:
        model, examples = operator.model, operator.examples
        jacobians, weights = [], []
        size = gradients.block_size(Layout.of(model.params).size * outputs_of(model, examples), model.device)
        for _, batch in examples.batches(size):
            rows, square = linearised(model, batch, model.params)
            jacobians.append(_scaled(rows.double(), scale))
            weights.append(square)
        # (n, o, o): each example's ∂²ℓ/∂outputs².
        self.weights, self.scale = torch.cat(weights).double(), scale
        self.basis, triangle = torch.linalg.qr(torch.cat(jacobians).T)
        rank, (n, o) = len(triangle), self.weights.shape[:2]
        self.factor = triangle.reshape(rank, n, o)
        self.all = self.over(list(range(n)))

    def over(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(R_I, S_I R_Iᵀ / |I|): their product is the matrix over the examples I."""
        here = self.factor[:, indices]
        weighted = torch.einsum("rno,nop->npr", here, self.weights[indices]) / len(indices)
        return here.flatten(1), weighted.flatten(0, 1)

    def around(self, rows: Tensor) -> Space:
        """See ``Curvature``."""
        return _CompressedSpace(self, rows)

    def whole(self, rows: Tensor) -> Space:
        """See ``Curvature``."""
        return _WholeSpace(self, rows)

    @cached_property
    def jacobian(self) -> Tensor:
        """J itself (n, o, P), for products over few examples with a coordinate for every parameter."""
        rows: Tensor = self.factor.flatten(1).T @ self.basis.T
        return rows.reshape(*self.weights.shape[:2], -1)

    @property
    def matrix(self) -> Tensor:
        """R S Rᵀ over all examples (r, r)."""
        left, right = self.all
        return left @ right


class _WholeSpace:
    """P coordinates, and the products of a compressed curvature."""

    def __init__(self, curvature: Compressed, rows: Tensor) -> None:
        self._curvature, self._dtype = curvature, rows.dtype
        self.start, self._matrix = _scaled(rows.double(), curvature.scale), curvature.matrix

    def apply(self, x: Tensor, indices: Sequence[int] | None = None) -> Tensor:
        basis = self._curvature.basis
        if indices is None:
            whole: Tensor = x @ basis @ self._matrix @ basis.T
            return whole
        some = self._curvature.jacobian[indices]
        along = (x @ some.flatten(0, 1).T).reshape(len(x), *some.shape[:2])
        weighted = torch.einsum("kno,nop->knp", along, self._curvature.weights[indices]) / len(indices)
        image: Tensor = weighted.flatten(1) @ some.flatten(0, 1)
        return image

    def rows(self, x: Tensor) -> Tensor:
        return _scaled(x, self._curvature.scale).to(self._dtype)


class _CompressedSpace:
    def __init__(self, curvature: Compressed, rows: Tensor) -> None:
        wide, self._dtype = _scaled(rows.double(), curvature.scale), rows.dtype
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
            left, right = self._curvature.over(indices)
            inside = (x[:, :-1] @ left) @ right
        return torch.cat([inside, torch.zeros_like(x[:, -1:])], dim=1)

    def rows(self, x: Tensor) -> Tensor:
        restored: Tensor = x[..., :-1] @ self._curvature.basis.T + x[..., -1:] * self._outside
        return _scaled(restored, self._curvature.scale).to(self._dtype)


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


def outputs_of(model: FunctionalModel, examples: Examples) -> int:
    """o: how many scalars the model puts out for one example."""
    return model.outputs(model.params, examples.batch([0])).numel()


def make_curvature(
    model: FunctionalModel,
    examples: Examples,
    kind: Literal["gauss_newton", "hessian"],
    scale: Tensor | None = None,
) -> Curvature:
    """The curvature of the mean loss; Gauss-Newton compressed if its Jacobian may be held and its rank is moderate.

    Args:
        scale: float64 (P,), see ``Curvature``; None = 1.
    """
    if kind == "hessian":
        return MatrixFree(Hessian(model, examples), scale)
    operator = GaussNewton(model, examples)
    rank = len(examples) * outputs_of(model, examples)
    size = Layout.of(model.params).size
    scalars = rank * size * (torch.float64.itemsize // model.dtype.itemsize)
    held = scalars <= gradients.HELD and min(rank, size) <= gradients.LARGEST_RANK
    return Compressed(operator, scale) if held else MatrixFree(operator, scale)
