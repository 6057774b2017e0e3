"""Batches cut to their longest example, which is exact where padding is masked.

The workload names the tensor that masks its padding; whatever has a dimension as long as that mask is cut with it. Not
trusted unseen: ``fimo.workers.stacking.probe`` compares losses and gradients with and without.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fimo.workers.examples import Batch, Examples


@dataclass(frozen=True)
class Trimming:
    """Where examples end.

    Attributes:
        lengths: tokens of each example up to its last one, int64 (n,), on the CPU.
        full: tokens of an example with its padding.
    """

    lengths: Tensor
    full: int

    def longest(self, indices: Tensor) -> int:
        """The longest of the examples at ``indices``, of any shape."""
        return int(self.lengths[indices].max())

    def cut(self, batch: Batch, length: int, leading: int = 1) -> Batch:
        """The first ``length`` tokens of every example; ``leading`` dimensions run over replicas and examples."""
        if length >= self.full:
            return batch

        def one(tensor: object) -> object:
            if not isinstance(tensor, Tensor):
                return tensor
            for dim in range(leading, tensor.dim()):
                if tensor.shape[dim] == self.full:
                    tensor = tensor.narrow(dim, 0, length)
            return tensor

        return pytree.tree_map(one, batch)


def trimming(examples: Examples, mask: str | None) -> Trimming | None:
    """How examples kept as tensors can be cut; None if there is no such mask, or padding is not at the end.

    Args:
        mask: the name of a tensor (n, tokens), not 0 where a token is.
    """
    tensors = examples.tensors
    present = tensors.get(mask) if isinstance(tensors, dict) and mask is not None else None
    if not isinstance(present, Tensor) or present.dim() != 2:
        return None
    present = present.cpu() != 0
    lengths = present.sum(dim=1)
    full = present.shape[1]
    at_the_end = torch.equal(present, torch.arange(full) < lengths[:, None])
    if not at_the_end or int(lengths.min()) < 1 or int(lengths.min()) == full:
        return None
    return Trimming(lengths, full)
