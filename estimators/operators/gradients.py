"""Per-example gradients of losses and measures, as rows of matrices over the flattened trainable parameters.

Invariant: no matrix held here has more than ``held`` scalars and no block of per-example gradients more than
``stream``, so that n × P gradients are never in memory at once. Rows are in the model's dtype and on its
device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils import _pytree as pytree

from fimo.workers.device import memory
from fimo.workers.examples import Batch
from fimo.workers.functional import Tensors
from fimo.workers.stacking.stacked import Stacked

STREAM = 2**25
"""Scalars in one block of per-example gradients on a CPU (128 MiB in float32)."""

HELD = 2**28
"""Scalars that an estimator may keep over a pass through the training examples on a CPU (1 GiB in float32).

What an estimator *is* (a rank, a kind of sketch) goes by this on every device: it must be the same wherever it runs.
"""

SHARE = 8
"""A GPU's memory holds so many times what an estimator keeps: both sides of a product, their copies and activations."""

LARGEST_RANK = 4096
"""Rank of a Gauss-Newton matrix up to which compressing it pays."""

BLOCK = 256
"""Examples in a block at most: activations grow with the block even if the model has few parameters."""


@dataclass(frozen=True)
class Layout:
    """How the trainable parameters lie in a row of P scalars, in the model's own order."""

    shapes: dict[str, torch.Size]

    @classmethod
    def of(cls, params: Tensors) -> Layout:
        """The layout of a dict of parameters."""
        return cls({name: tensor.shape for name, tensor in params.items()})

    @property
    def size(self) -> int:
        """P."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def slices(self) -> dict[str, slice]:
        """Where each parameter tensor lies."""
        slices, start = {}, 0
        for name, shape in self.shapes.items():
            slices[name] = slice(start, start + shape.numel())
            start += shape.numel()
        return slices

    def rows(self, tensors: Tensors) -> Tensor:
        """Tensors with leading dimensions (…, *shape) as rows (…, P)."""
        parts = []
        for name, shape in self.shapes.items():
            tensor = tensors[name]
            parts.append(tensor.reshape(*tensor.shape[: tensor.dim() - len(shape)], shape.numel()))
        return torch.cat(parts, dim=-1)

    def tensors(self, rows: Tensor) -> Tensors:
        """Rows (…, P) as tensors (…, *shape)."""
        lead = rows.shape[:-1]
        return {n: rows[..., s].reshape((*lead, *self.shapes[n])) for n, s in self.slices.items()}


def held(device: torch.device) -> int:
    """Scalars that an estimator may keep over a pass: more where a GPU has the memory, the same on GPUs of one type."""
    return max(HELD, memory(device) // (SHARE * torch.float32.itemsize))


def stream(device: torch.device) -> int:
    """Scalars in one block of per-example gradients."""
    return STREAM * (held(device) // HELD)


def block_size(scalars: int, device: torch.device) -> int:
    """How many examples of ``scalars`` scalars each make a block: at least 1, at most ``BLOCK``, on a CPU."""
    return max(1, min(BLOCK * (held(device) // HELD), stream(device) // max(1, scalars)))


In = TypeVar("In")
Out = TypeVar("Out")

PerExample = Callable[[Tensors, Batch], Tensor]
"""(parameters, batch of B) -> (B,): a loss or a measure."""


def single(function: PerExample) -> Callable[[Tensors, Batch], Tensor]:
    """``function`` for one example without its batch dimension, to be vmapped: scalar."""

    def of_one(params: Tensors, example: Batch) -> Tensor:
        batch = pytree.tree_map(lambda t: t.unsqueeze(0) if isinstance(t, Tensor) else t, example)
        return function(params, batch).squeeze(0)

    return of_one


def over_examples(batch: Batch) -> Batch:
    """vmap's ``in_dims`` for a batch: 0 for its tensors, None for whatever else it carries."""
    return pytree.tree_map(lambda t: 0 if isinstance(t, Tensor) else None, batch)


def each_example(
    function: Callable[[Batch], Out],
    batch: Batch,
    randomness: Literal["error", "same"] = "error",
    reseed: Callable[[], object] | None = None,
) -> Out:
    """``function`` of every example of a batch, stacked: vmapped, in halves if memory runs out; or one at a time if
    vmap refuses.

    It refuses a forward that decides on its data (transformers asks whether there is any padding) if examples decide
    differently, and operations that write in place or have no batching rule. A mistake of the workload's own is raised
    by the first example.

    Args:
        function: of one example, without its batch dimension; returns a pytree of tensors.
        randomness: "same" lets every example draw the same random numbers.
        reseed: called before each example, or half of them, that is taken by itself, to the same end.
    """
    count = next(len(t) for t in pytree.tree_leaves(batch) if isinstance(t, Tensor))
    try:
        with Stacked():
            stacked: Out = vmap(function, in_dims=(over_examples(batch),), randomness=randomness)(batch)
            return stacked
    except torch.OutOfMemoryError:
        if count == 1:
            raise
        short = True
    except RuntimeError:
        short = False  # vmap's refusals have no class of their own, nor a common message.
    if short:
        # A block is as large as its gradients allow; what a model computes on the way to them may be far more.
        halves = []
        for part in (slice(0, count // 2), slice(count // 2, count)):
            some = pytree.tree_map(lambda t, at=part: t[at] if isinstance(t, Tensor) else t, batch)
            if reseed is not None:
                reseed()
            halves.append(each_example(function, some, randomness, reseed))
        stacked = pytree.tree_map(lambda *leaves: torch.cat(leaves), *halves)
        return stacked
    results = []
    for position in range(count):
        example = pytree.tree_map(lambda t, at=position: t[at] if isinstance(t, Tensor) else t, batch)
        if reseed is not None:
            reseed()
        results.append(function(example))
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *results)
    return stacked


def per_example(
    function: PerExample, params: Tensors, batch: Batch, layout: Layout, along: Tensors | None = None
) -> Tensor:
    """Gradients of ``function`` for every example of a batch, rows (B, P): one forward and backward each.

    Args:
        along: a displacement d; the rows are then ∇f + ∇²f d, by forward over reverse. (Reverse over forward, the
            gradient of f + ∇fᵀd, is the same in exact arithmetic, but torch has it wrong on LayerNorm.)
    """
    slope = grad(single(function))

    def row(example: Batch) -> Tensor:
        if along is None:
            return layout.rows(slope(params, example))
        own, change = directional(lambda at: slope(at, example), params, along)
        return layout.rows(own) + layout.rows(change)

    return each_example(row, batch).detach()


def stacks(function: PerExample, params: Tensors, batch: Batch) -> bool:
    """Whether ``vmap`` takes a batch's examples together; see ``each_example``."""
    slope = grad(single(function))
    try:
        with Stacked():
            vmap(lambda example: slope(params, example), in_dims=(over_examples(batch),))(batch)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


def directional(function: Callable[[In], Out], at: In, tangents: In) -> tuple[Out, Out]:
    """(function(θ), its derivative at θ along ``tangents``), by forward-mode differentiation."""
    value, slope, *_ = jvp(function, (at,), (tangents,))
    return value, slope


def held_blocks(count: int, scalars: int, device: torch.device) -> list[range]:
    """``range(count)`` in blocks whose rows of ``scalars`` scalars are ``held``; most often one block."""
    size = max(1, held(device) // max(1, scalars))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def incidence(removals: Sequence[Sequence[int]], indices: Sequence[int]) -> Tensor:
    """M (removals, indices) with M[r, j] = how often the removal r lists ``indices[j]``, float64."""
    column = {index: position for position, index in enumerate(indices)}
    matrix = torch.zeros(len(removals), len(indices), dtype=torch.float64)
    for row, removal in enumerate(removals):
        for index in removal:
            matrix[row, column[index]] += 1
    return matrix


def unique(removals: Sequence[Sequence[int]]) -> list[int]:
    """The training indices that occur in any removal, ascending."""
    return sorted({index for removal in removals for index in removal})


def dot_products(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows (b, P) and (k, P): (b, k)."""
    return left @ right.T


def units(rows: Tensor) -> Tensor:
    """Rows (b, P) divided by their norms; a row of 0 stays."""
    norms = rows.double().norm(dim=1, keepdim=True)
    return torch.where(norms > 0, rows.double() / norms, 0).to(rows)
