"""The examples that are read, as batches: in order, or sorted by length and cut, with the results put back in order.

Evaluation examples are held as batches. Training examples may be very many, and are fetched anew each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fimo.workers.examples import Batch, Examples
from fimo.workers.stacking.trimming import Trimming


@dataclass(frozen=True)
class Evals:
    """Examples that are read, in blocks.

    Attributes:
        places: (m,), where the result of each example stands among those of all blocks, on the examples' device; None =
            in order.
    """

    blocks: Sequence[Batch]
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
    return Evals(tuple(blocks), torch.argsort(order).to(evals.device))


class Fetched(Sequence[Batch]):
    """Blocks that are fetched when they are asked for: of examples at ``blocks``, cut if it is known how."""

    def __init__(self, examples: Examples, blocks: Sequence[Tensor], trimming: Trimming | None) -> None:
        self._examples, self._blocks, self._trimming = examples, blocks, trimming

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, number: Any) -> Any:
        some = self._blocks[number]
        batch = self._examples.batch(some)
        return batch if self._trimming is None else self._trimming.cut(batch, self._trimming.longest(some))


def fetched(examples: Examples, indices: Sequence[int], size: int, trimming: Trimming | None = None) -> Evals:
    """The examples at ``indices`` in blocks of at most ``size``, of which none is held; sorted as ``in_blocks`` does.

    Results ``in_order`` are in the order of ``indices``.
    """
    chosen = torch.tensor(list(indices), dtype=torch.long)
    if trimming is None:
        return Evals(Fetched(examples, chosen.split(size), None))
    order = torch.argsort(trimming.lengths[chosen], stable=True)
    return Evals(Fetched(examples, chosen[order].split(size), trimming), torch.argsort(order))
