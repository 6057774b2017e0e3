"""All lanes of a step in one block, which is exact only for a forward that treats examples one by one.

A folded step is the same weighted sum of losses as ``fimo.workers.batches.schedule`` gives, arranged otherwise: the
examples that reweight subtracts ride in the batch, and drop's shorter batches are filled up with weight 0.
``fimo.workers.stacking.probe`` says for which forwards that may be done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fimo.workers import batches
from fimo.workers.batches import Block, Part, Removal
from fimo.workers.settings import FurtherTraining


def folded(n: int, lanes: Sequence[Removal], settings: FurtherTraining, seed: int) -> Iterator[list[Block]]:
    """One block of all lanes for every step, without end; arguments and errors as ``batches.schedule``."""
    for removal in set(lanes):
        batches.check(n, removal)
    if settings.removal_mode == "drop":
        return ([_filled(parts)] for parts in batches.dropped(n, lanes, settings, seed))
    if settings.removal_mode == "reweight" and any(lanes):
        return _appended(n, lanes, batches.whole(n, lanes, settings, seed))
    return batches.schedule(n, lanes, settings, seed)


def _appended(n: int, lanes: Sequence[Removal], whole: Iterator[list[Block]]) -> Iterator[list[Block]]:
    most = max(len(removal) for removal in lanes)
    padded = torch.tensor([[*removal, *[-1] * (most - len(removal))] for removal in lanes], dtype=torch.long)
    present = padded >= 0
    subtracted = present.to(torch.float64) * batches.removed_weight(n)
    weights: dict[int, torch.Tensor] = {}
    for (block,) in whole:
        size = len(block.indices)
        if size not in weights:
            weights[size] = torch.cat([block.weights.expand(len(lanes), -1), subtracted], dim=1)
        # Shorter removals are filled up with an example of the batch, of weight 0.
        appended = torch.where(present, padded, block.indices[0])
        indices = torch.cat([block.indices.expand(len(lanes), -1), appended], dim=1)
        yield [Block(block.lanes, indices, weights[size])]


def _filled(parts: Sequence[Part]) -> Block:
    """One block of all lanes; shorter batches are filled up with their own first example, of weight 0."""
    longest = max(indices.shape[1] for _, indices in parts)
    if all(indices.shape[1] == longest for _, indices in parts):
        return batches.joined(parts)
    count = sum(len(members) for members, _ in parts)
    filled, weights = torch.empty(count, longest, dtype=torch.long), torch.zeros(count, longest, dtype=torch.float64)
    for members, indices in parts:
        size = indices.shape[1]
        filled[members] = torch.cat([indices, indices[:, :1].expand(-1, longest - size)], dim=1)
        weights[members, :size] = 1.0 / size
    return Block(tuple(range(count)), filled, weights)
