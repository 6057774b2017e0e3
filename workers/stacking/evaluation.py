"""The evaluation examples as batches: in order, or sorted by length and cut, with the results put back in order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.workers.examples import Batch, Examples
from fimo.workers.stacking.trimming import Trimming


@dataclass(frozen=True)
class Evals:
    """Evaluation examples in blocks.

    Attributes:
        places: (m,), where the result of each example stands among those of all blocks; None = in order.
    """

    blocks: tuple[Batch, ...]
    places: Tensor | None = None

    def in_order(self, results: Tensor) -> Tensor:
        """Results (…, m) of the blocks, one after another, in the order of the examples."""
        return results if self.places is None else results[..., self.places.to(results.device)]


def in_blocks(evals: Examples, size: int, trimming: Trimming | None = None) -> Evals:
    """Blocks of at most ``size`` examples; sorted by length, each cut to its longest, if it is known how."""
    if trimming is None:
        return Evals(tuple(batch for _, batch in evals.batches(size)))
    order = torch.argsort(trimming.lengths, stable=True)
    blocks = [trimming.cut(evals.batch(some), trimming.longest(some)) for some in order.split(size)]
    return Evals(tuple(blocks), torch.argsort(order))
