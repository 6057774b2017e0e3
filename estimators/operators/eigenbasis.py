"""The blocks of a block-diagonal curvature in their eigenbases, and functions of the whole: f(G̃) on rows.

How a block's eigenvectors and eigenvalues are found is ``fimo.estimators.operators.kronecker``'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from fimo.workers.functional import FunctionalModel


class Block(Protocol):
    """A diagonal block of the curvature in its eigenbasis."""

    values: Tensor
    """Eigenvalues, float64 (m,)."""

    def coordinates(self, rows: Tensor) -> Tensor:
        """Rows (k, P) -> (k, m), in the eigenbasis."""
        ...

    def restore(self, coordinates: Tensor, into: Tensor) -> None:
        """Write (k, m) back into the block's place in rows (k, P)."""
        ...


@dataclass
class LayerBlock:
    """A Linear, Conv2d or Conv1D: weight (out, …), of Conv1D (in, out), and, if it is trainable, bias (out,)."""

    module: nn.Module
    weight: slice
    bias: slice | None
    out: int
    transposed: bool
    values: Tensor = field(init=False)
    left: Tensor = field(init=False)
    right: Tensor = field(init=False)

    def weight_of(self) -> Tensor:
        """The module's own weight, for its shape, dtype and device."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def sides(self) -> tuple[int, int]:
        """How many outputs, and inputs with the bias, the weight connects."""
        return self.out, self.weight_of().numel() // self.out + (self.bias is not None)

    def inputs(self, x: Tensor) -> Tensor:
        """The layer's input as rows that meet its weight, (B, T, in [+ 1])."""
        if isinstance(self.module, nn.Conv2d):
            m = self.module
            assert not isinstance(m.padding, str)
            unfolded = nn.functional.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride)
            a = unfolded.transpose(1, 2)
        else:
            a = self._positions(x)
        return a if self.bias is None else torch.cat([a, torch.ones_like(a[..., :1])], dim=2)

    def outputs(self, g: Tensor) -> Tensor:
        """A gradient at the layer's output as (B, T, out)."""
        if isinstance(self.module, nn.Conv2d):
            return g.flatten(2).transpose(1, 2)
        return self._positions(g)

    @staticmethod
    def _positions(x: Tensor) -> Tensor:
        # Not −1: an expert may be sent no rows at all.
        return x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])

    def matrix(self, rows: Tensor) -> Tensor:
        """The layer's part of rows (k, P) as (k, out, in [+ 1])."""
        matrix = rows[:, self.weight]
        if self.transposed:
            matrix = matrix.reshape(len(rows), -1, self.out).transpose(1, 2)
        else:
            matrix = matrix.reshape(len(rows), self.out, -1)
        return matrix if self.bias is None else torch.cat([matrix, rows[:, self.bias, None]], dim=2)

    def coordinates(self, rows: Tensor) -> Tensor:
        """See ``Block``."""
        return (self.left.T @ self.matrix(rows) @ self.right).flatten(1)

    def restore(self, coordinates: Tensor, into: Tensor) -> None:
        """See ``Block``."""
        matrix = self.left @ coordinates.reshape(len(coordinates), self.out, -1) @ self.right.T
        if self.bias is not None:
            into[:, self.bias] = matrix[:, :, -1]
            matrix = matrix[:, :, :-1]
        into[:, self.weight] = (matrix.transpose(1, 2) if self.transposed else matrix).flatten(1)


@dataclass
class DenseBlock:
    """A small tensor with its exact block."""

    where: slice
    values: Tensor
    vectors: Tensor

    def coordinates(self, rows: Tensor) -> Tensor:
        """See ``Block``."""
        return rows[:, self.where] @ self.vectors

    def restore(self, coordinates: Tensor, into: Tensor) -> None:
        """See ``Block``."""
        into[:, self.where] = coordinates @ self.vectors.T


@dataclass(frozen=True)
class Eigenbasis:
    """The whole approximation.

    Attributes:
        blocks: its diagonal blocks.
        left_out: names of the parameters that no block covers.
        fisher: exact or sampled, whichever the pseudo-gradients were.
        drawn: what was sampled, for a reader; empty if nothing was.
    """

    blocks: list[Block]
    left_out: list[str]
    fisher: str
    drawn: str = ""

    def coverage(self, model: FunctionalModel) -> float:
        """The share of trainable scalars that a block covers."""
        return share_covered(model, self.left_out)

    def apply(self, rows: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """f(G̃) on rows (k, P), f given on eigenvalues; 0 for parameters that are left out."""
        return self.apply_each(rows, [function])[0]

    def apply_each(self, rows: Tensor, functions: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """Several functions of G̃ on rows (k, P): (functions, k, P); 0 for parameters that are left out."""
        results = rows.new_zeros(len(functions), *rows.shape)
        for block in self.blocks:
            coordinates = block.coordinates(rows)
            for result, function in zip(results, functions, strict=True):
                block.restore(coordinates * function(block.values).to(rows), result)
        return results


def share_covered(model: FunctionalModel, left_out: list[str]) -> float:
    """The share of trainable scalars that lie in none of the tensors ``left_out``."""
    sizes = {name: tensor.numel() for name, tensor in model.params.items()}
    return 1 - sum(sizes[name] for name in left_out) / sum(sizes.values())
