"""All lanes of a step in one block, which is exact only for a forward that treats examples one by one.

A folded step is the same weighted sum of losses as ``fimo.workers.batches.schedule`` gives, arranged otherwise: the
examples that reweight subtracts ride in the batch, and drop's shorter batches are filled up with weight 0.
``fimo.workers.stacking.probe`` says for which forwards that may be done, ``fimo.workers.stacking.parts`` cuts a block
by the lengths of its examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fimo.workers import batches
from fimo.workers.amounts import Removal
from fimo.workers.batches import Block, Part
from fimo.workers.settings import FurtherTraining


def folded(
    n: int, lanes: Sequence[Removal], settings: FurtherTraining, seed: int, random: bool = False, apart: bool = False
) -> Iterator[list[Block]]:
    """As few blocks as can be for every step, without end; arguments and errors as ``batches.schedule``.

    Args:
        random: the forward draws dropout masks, which must be those of the definition's own batches: none is filled up.
        apart: keep removed examples out of a batch that the lanes share: what is frozen is then computed once.
    """
    for removal in set(lanes):
        batches.check(n, removal)
    if settings.removal_mode == "drop":
        if not random:
            return ([_filled(parts)] for parts in batches.dropped(n, lanes, settings, seed))
        return (
            [_in_place(block) for block in batches.joined_by_size(parts)]
            for parts in batches.dropped(n, lanes, settings, seed)
        )
    if settings.removal_mode == "reweight" and any(lanes):
        whole, weight = batches.whole(n, lanes, settings, seed), batches.removed_weight(n, settings)
        sizes = {len(removal) for removal in lanes if removal}
        if apart or (random and len(sizes) > 1):
            return _beside(weight, lanes, whole)
        return _appended(weight, lanes, whole)
    return ([_in_place(block) for block in blocks] for blocks in batches.schedule(n, lanes, settings, seed))


def _in_place(block: Block) -> Block:
    count = block.indices.shape[-1]
    return replace(block, rows=torch.arange(count), sizes=(count, 0))


def _appended(weight: float, lanes: Sequence[Removal], whole: Iterator[list[Block]]) -> Iterator[list[Block]]:
    most = max(len(removal) for removal in lanes)
    padded = torch.tensor([[*removal, *[-1] * (most - len(removal))] for removal in lanes], dtype=torch.long)
    present = padded >= 0
    subtracted = present.to(torch.float64) * weight
    weights: dict[int, Tensor] = {}
    for (block,) in whole:
        size = len(block.indices)
        if size not in weights:
            weights[size] = torch.cat([block.weights.expand(len(lanes), -1), subtracted], dim=1)
        # Shorter removals are filled up with an example of the batch, of weight 0.
        appended = torch.where(present, padded, block.indices[0])
        indices = torch.cat([block.indices.expand(len(lanes), -1), appended], dim=1)
        yield [Block(block.lanes, indices, weights[size], torch.arange(size + most), (size, most))]


def _beside(weight: float, lanes: Sequence[Removal], whole: Iterator[list[Block]]) -> Iterator[list[Block]]:
    """The batch that all lanes share, and the removed examples of the lanes that remove equally many."""
    sizes: dict[int, list[int]] = {}
    for lane, removal in enumerate(lanes):
        if removal:
            sizes.setdefault(len(removal), []).append(lane)
    removed = [
        (tuple(own), torch.tensor([lanes[i] for i in own]), torch.full((size,), weight, dtype=torch.float64))
        for size, own in sizes.items()
    ]
    for (block,) in whole:
        batch = _in_place(block)
        count = len(block.indices)
        yield [
            batch,
            *(
                Block(own, indices, weights, torch.arange(count, count + len(weights)), (count, len(weights)))
                for own, indices, weights in removed
            ),
        ]


def _filled(parts: Sequence[Part]) -> Block:
    """One block of all lanes; shorter batches are filled up with their own first example, of weight 0."""
    longest = max(indices.shape[1] for _, indices in parts)
    if all(indices.shape[1] == longest for _, indices in parts):
        return batches.joined(parts)
    count = sum(len(members) for members, _ in parts)
    filled, weights = torch.empty(count, longest, dtype=torch.long), torch.zeros(count, longest, dtype=torch.float64)
    for members, indices in parts:
        size = indices.shape[1]
        filled[list(members)] = torch.cat([indices, indices[:, :1].expand(-1, longest - size)], dim=1)
        weights[list(members), :size] = 1.0 / size
    return Block(tuple(range(count)), filled, weights)
