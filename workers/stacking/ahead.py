"""The blocks of the steps to come, brought to the device many steps at a time.

A step whose indices come from the CPU makes the host wait for a copy, and the device for the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from fimo.workers.batches import Block

STEPS = 4096
"""Steps that are brought at a time, at most: an epoch or a run of most sweeps."""
BYTES = 2**26
"""Bytes of indices and weights after which no more are brought at a time."""

Step = Sequence[Block]


def placed(steps: Iterator[Step], device: torch.device) -> Iterator[Step]:
    """The same steps, their blocks' indices and weights on ``device``."""
    while group := _group(steps):
        tensors: dict[int, Tensor] = {}
        for block in (block for step in group for block in step):
            # By identity: the weights of a mean are one tensor for all steps.
            tensors.setdefault(id(block.indices), block.indices)
            tensors.setdefault(id(block.weights), block.weights)
        there = dict(zip(tensors, _sent(list(tensors.values()), device), strict=True))
        for step in group:
            yield [replace(b, indices=there[id(b.indices)], weights=there[id(b.weights)]) for b in step]


def _group(steps: Iterator[Step]) -> list[Step]:
    group, size = list[Step](), 0
    for step in islice(steps, STEPS):
        group.append(step)
        size += sum(8 * (block.indices.numel() + block.weights.numel()) for block in step)
        if size > BYTES:
            break
    return group


def _sent(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on the device: one copy for all of one dtype, which nobody waits for."""
    sent: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        some = [place for place, tensor in enumerate(tensors) if tensor.dtype is dtype]
        together = torch.cat([tensors[place].flatten() for place in some])
        if device.type == "cuda":
            together = together.pin_memory()
        parts = together.to(device, non_blocking=True).split([tensors[place].numel() for place in some])
        sent.update((place, part.view(tensors[place].shape)) for place, part in zip(some, parts, strict=True))
    return [sent[place] for place in range(len(tensors))]
