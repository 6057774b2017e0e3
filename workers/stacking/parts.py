"""A block of examples of different lengths as parts of similar length: little of what is computed is padding.

The parts' weighted losses add up to the block's, as do their gradients. Where to cut is a function of the lengths, the
model's size and the kind of device alone, so that a run can be repeated bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fimo.workers.batches import Block
from fimo.workers.stacking.products import gains
from fimo.workers.stacking.trimming import Trimming

MOST = 8
"""Parts of a block."""


def part_cost(parameters: int, device: torch.device) -> float:
    """What one more part costs, in tokens: launching it, and reading each weight and adding up its gradient once more.

    Measured as orders of magnitude: 3 ms of Python, 1e11 (CPU, twice that by oneDNN) and 2e13 (CUDA) operations a
    second, of which a token needs 6 a parameter, and 16 bytes a parameter at 1e10 and 1e12 bytes a second.
    """
    speed, bandwidth = (2e13, 1e12) if device.type == "cuda" else (2e11 if gains() else 1e11, 1e10)
    token = 6 * parameters / speed
    return (3e-3 + 16 * parameters / bandwidth) / token


def in_parts(blocks: Sequence[Block], trimming: Trimming | None, cost: float) -> list[Block]:
    """Each block cut into parts, shortest first; the blocks themselves if nothing is known of lengths."""
    if trimming is None:
        return list(blocks)
    return [part for block in blocks for part in _cut(block, trimming, cost)]


def _cut(block: Block, trimming: Trimming, cost: float) -> list[Block]:
    each = own = trimming.lengths[block.indices]
    own_batches = block.indices.dim() == 2 and len(block.lanes) > 1
    if own_batches:
        # Leave all replicas some padding: a forward that asks whether there is any gets one answer.
        each = (each + 1).clamp(max=trimming.full)
    # The lanes' examples of one place go together.
    lengths = each.amax(dim=0) if each.dim() == 2 else each
    order = torch.argsort(lengths, stable=True)
    ascending = lengths[order].tolist()
    parts, begin = [], 0
    for end in _ends(ascending, cost):
        columns = order[begin:end].sort().values
        part, begin = _columns(block, columns, int(ascending[end - 1])), end
        parts += _by_padding(part, own[:, columns] == trimming.full) if own_batches else [part]
    return parts


def _by_padding(part: Block, full: Tensor) -> list[Block]:
    """Apart the replicas, if there are any, all of whose examples are too long to have been left any padding.

    Args:
        full: (replicas, examples), whether an example has none.
    """
    without = full.all(dim=1)
    if bool(without.all()) or not bool(without.any()):
        return [part]
    return [_lanes(part, chosen.nonzero().flatten()) for chosen in (without, ~without)]


def _lanes(block: Block, places: Tensor) -> Block:
    weights = block.weights[places] if block.weights.dim() == 2 else block.weights
    lanes = tuple(block.lanes[i] for i in places.tolist())
    return replace(block, lanes=lanes, indices=block.indices[places], weights=weights)


def _columns(block: Block, columns: Tensor, length: int) -> Block:
    return replace(
        block,
        indices=block.indices[..., columns],
        weights=block.weights[..., columns],
        rows=None if block.rows is None else block.rows[columns],
        length=length,
    )


def _ends(ascending: Sequence[int], cost: float) -> list[int]:
    """Where the parts of sorted lengths end: the least Σ count · longest + cost · parts, of at most ``MOST`` parts."""
    count = len(ascending)
    if count * ascending[-1] - sum(ascending) <= cost:
        return [count]
    # Cut only where the length changes: equal lengths belong together.
    places = [0, *(i for i in range(1, count) if ascending[i - 1] < ascending[i]), count]
    last = len(places) - 1
    best = [0.0] + [float("inf")] * last
    origins: list[list[int]] = []
    totals: list[float] = []
    for _ in range(min(MOST, last)):
        now, came = [float("inf")] * (last + 1), [0] * (last + 1)
        for end in range(1, last + 1):
            longest, stop = ascending[places[end] - 1], places[end]
            now[end], came[end] = min((best[b] + (stop - places[b]) * longest + cost, b) for b in range(end))
        best = now
        origins.append(came)
        totals.append(now[last])
    ends, end = [], last
    for came in reversed(origins[: totals.index(min(totals)) + 1]):
        ends.append(places[end])
        end = came[end]
    return ends[::-1]
