"""The steps of several seeds as one: each replica has its own batch, and a GPU more to do at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fimo.workers.batches import Block

Step = Sequence[Block]


def joined(schedules: Sequence[tuple[Sequence[int], Iterator[Step]]]) -> Iterator[Step]:
    """The blocks of all schedules step by step, those of one size as one block.

    Args:
        schedules: places in the stack, and the steps of the replicas there, which count from 0. Places ascend from
            schedule to schedule, and no forward draws: each seed would draw otherwise.
    """
    known: dict[tuple[int, ...], tuple[Sequence[Tensor], Tensor]] = {}

    def weights(blocks: Sequence[Block]) -> Tensor:
        own = [block.weights for block in blocks]
        if all(w is own[0] for w in own) and own[0].dim() == 1:
            return own[0]
        key = tuple(map(id, own))
        if key not in known:
            if len(known) > 8:
                known.clear()
            # Keep what they are made of too: an id is of a tensor that lives.
            known[key] = own, torch.cat([_each(block, block.weights) for block in blocks])
        return known[key][1]

    while True:
        alike: dict[object, list[Block]] = {}
        for places, steps in schedules:
            for block in next(steps):
                lanes = tuple(places[lane] for lane in block.lanes)
                # Apart by what they stand for: the removed of a batch may be as many as the batch.
                alike.setdefault((block.indices.shape[-1], block.sizes), []).append(replace(block, lanes=lanes))
        yield [
            replace(
                blocks[0],
                lanes=tuple(lane for block in blocks for lane in block.lanes),
                indices=torch.cat([_each(block, block.indices) for block in blocks]),
                weights=weights(blocks),
            )
            for blocks in alike.values()
        ]


def _each(block: Block, tensor: Tensor) -> Tensor:
    """A tensor of the block for each of its lanes, (len(lanes), b)."""
    return tensor.expand(len(block.lanes), -1) if tensor.dim() == 1 else tensor
