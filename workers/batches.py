"""Which examples each replica trains on at each step, and with which weights: further training, as data.

The batch order is torch's ``RandomSampler`` under the seed, carried on over the epochs, batched in order, the
ragged last batch kept. Removal modes change nothing but the indices and weights given here:

* **drop** takes the removed indices out of the epoch's permutation and re-batches, so later examples slide forward;
* **mask** keeps every batch and takes the removed indices out of the mean of the batch they are in;
* **reweight** keeps every batch whole; the loop adds ``removed_weight`` · Σ_{i∈removal} ℓ_i to every step's loss.

This module knows nothing of models: it is arithmetic on indices. The definition, the stacks and the estimators that
follow a trajectory read it. ``fimo.workers.stacking.folding`` makes one block of a step's blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from fimo.workers.amounts import Removal
from fimo.workers.errors import UsageError
from fimo.workers.settings import FurtherTraining


def removed_weight(n: int, settings: FurtherTraining) -> float:
    """What a removed example's loss is multiplied by in every step of reweight mode: −w/n, with n = |𝒟|."""
    return -settings.removal_weight / n


@dataclass(frozen=True)
class Block:
    """Replicas that take this step on batches of one size.

    Attributes:
        lanes: the replicas' places in the stack.
        indices: training indices, (b,) if all lanes share the batch, else (len(lanes), b).
        weights: what each example's loss is multiplied by, float64, (b,) or (len(lanes), b).
        rows: places (b,) of the examples in the forwards of the definition, whose random numbers they get: in the
            step's batch, and beyond it among the removed; None = those of a batch of its own.
        sizes: examples in those two forwards.
        length: the examples are cut to it; None = left as they are.
    """

    lanes: tuple[int, ...]
    indices: Tensor
    weights: Tensor
    rows: Tensor | None = None
    sizes: tuple[int, int] = (0, 0)
    length: int | None = None


def orders(n: int, seed: int) -> Iterator[Tensor]:
    """The epochs' permutations of ``range(n)``, int64 (n,): exactly what a seeded ``RandomSampler`` yields."""
    sampler = RandomSampler(range(n), generator=torch.Generator().manual_seed(seed))
    while True:
        # Iterate the sampler to its end rather than imitate it: it also draws a permutation for its empty remainder.
        yield torch.from_numpy(np.fromiter(sampler, dtype=np.int64))


def first_difference(n: int, removal: Removal, settings: FurtherTraining, seed: int) -> int | None:
    """The first step whose loss differs from the baseline's, None = never.

    Before it the cell *is* the baseline, so its results are the baseline's by definition and its effect exactly 0.
    """
    if not removal:
        return None
    if settings.removal_mode == "reweight":
        return 1
    first = int(_places(n, seed)[list(removal)].min())
    return first // settings.batch_size + 1


@lru_cache(maxsize=2)
def _places(n: int, seed: int) -> Tensor:
    """Where each example is in the first epoch, int64 (n,): every cell of a shard asks for it."""
    return torch.argsort(next(orders(n, seed)))


def schedule(
    n: int, lanes: Sequence[Removal], settings: FurtherTraining, seed: int, mixes: bool = False
) -> Iterator[list[Block]]:
    """The blocks of every step, without end; stop when the last evaluation is done.

    Args:
        n: the number of training examples |𝒟|.
        lanes: the replicas' removals, in the order of the stack.
        mixes: the model's training forward mixes the examples of a batch (batch norm), so that a masked example must
            leave the batch rather than get weight 0.

    Raises:
        UsageError: a removal is not a set of training indices, or leaves nothing to train on.
    """
    for removal in set(lanes):
        check(n, removal)
    if settings.removal_mode is None and any(lanes):
        raise UsageError("the removal mode is not settled: see FurtherTraining.settled")
    if settings.removal_mode == "drop":
        return (joined_by_size(parts) for parts in dropped(n, lanes, settings, seed))
    if settings.removal_mode == "mask" and any(lanes):
        return _masked(n, lanes, settings, seed, mixes)
    return whole(n, lanes, settings, seed)


def check(n: int, removal: Removal) -> None:
    """Refuse indices that are not distinct training indices, or that are all of them (UsageError)."""
    if len(set(removal)) != len(removal):
        raise UsageError(f"a removal names a training index twice: {sorted(removal)[:10]}")
    outside = [i for i in removal if not 0 <= i < n]
    if outside:
        raise UsageError(f"a removal names training index {outside[0]}, but the indices run from 0 to {n - 1}")
    if len(removal) == n:
        raise UsageError("a removal leaves no training example")


def whole(n: int, lanes: Sequence[Removal], settings: FurtherTraining, seed: int) -> Iterator[list[Block]]:
    """Every lane on the same whole batches."""
    every = tuple(range(len(lanes)))
    for order in orders(n, seed):
        for indices in order.split(settings.batch_size):
            yield [Block(every, indices, mean_weights(len(indices)))]


def _masked(
    n: int, lanes: Sequence[Removal], settings: FurtherTraining, seed: int, mixes: bool
) -> Iterator[list[Block]]:
    removed = torch.zeros(len(lanes), n, dtype=torch.bool)
    for lane, removal in enumerate(lanes):
        removed[lane, list(removal)] = True
    for order in orders(n, seed):
        for indices in order.split(settings.batch_size):
            stays = ~removed[:, indices]
            if mixes:
                yield _by_size([indices[row] for row in stays])
            else:
                # Give a batch of which nothing stays the loss 0: weights of 0, not 0/0.
                weights = stays / stays.sum(dim=1, keepdim=True).clamp(min=1).to(torch.float64)
                yield [Block(tuple(range(len(lanes))), indices, weights)]


def _by_size(batches: Sequence[Tensor]) -> list[Block]:
    """One block for each batch size among the lanes' own ``batches``; lanes without examples are in none."""
    sizes: dict[int, list[int]] = {}
    for lane, indices in enumerate(batches):
        if len(indices):
            sizes.setdefault(len(indices), []).append(lane)
    return [
        Block(tuple(lanes), torch.stack([batches[i] for i in lanes]), mean_weights(size))
        for size, lanes in sizes.items()
    ]


@lru_cache(maxsize=256)
def mean_weights(size: int) -> Tensor:
    """The weights (size,) of a mean, float64."""
    return torch.full((size,), 1.0 / size, dtype=torch.float64)


Part = tuple[tuple[int, ...], Tensor]
"""Lanes, and the training indices (len(lanes), b) that each takes."""


def dropped(n: int, lanes: Sequence[Removal], settings: FurtherTraining, seed: int) -> Iterator[list[Part]]:
    """Drop mode's batches of every step: lanes whose epochs are equally long share one matrix of permutations."""
    groups: dict[int, list[int]] = {}
    for lane, removal in enumerate(lanes):
        groups.setdefault(n - len(removal), []).append(lane)
    streams = [
        (tuple(members), _dropped_group(n, [lanes[i] for i in members], settings, seed)) for members in groups.values()
    ]
    while True:
        yield [(members, next(stream)) for members, stream in streams]


def joined_by_size(parts: Sequence[Part]) -> list[Block]:
    """One block for each batch size."""
    sizes: dict[int, list[Part]] = {}
    for members, indices in parts:
        sizes.setdefault(indices.shape[1], []).append((members, indices))
    return [joined(alike) for alike in sizes.values()]


def joined(parts: Sequence[Part]) -> Block:
    """One block of parts of one batch size, in the order of the stack."""
    if len(parts) == 1:
        return Block(parts[0][0], parts[0][1], mean_weights(parts[0][1].shape[1]))
    lanes, order = _in_order(tuple(members for members, _ in parts))
    indices = torch.cat([indices for _, indices in parts])[order]
    return Block(lanes, indices, mean_weights(indices.shape[1]))


@lru_cache(maxsize=256)
def _in_order(parts: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], Tensor]:
    """The lanes of all parts as they stand in the stack, and their places part after part."""
    lanes = torch.tensor([lane for members in parts for lane in members])
    order = torch.argsort(lanes)
    return tuple(lanes[order].tolist()), order


def _dropped_group(n: int, lanes: Sequence[Removal], settings: FurtherTraining, seed: int) -> Iterator[Tensor]:
    """Index matrices (len(lanes), b) of lanes whose removals are equally large."""
    removed = torch.zeros(len(lanes), n, dtype=torch.bool)
    for lane, removal in enumerate(lanes):
        removed[lane, list(removal)] = True
    for order in orders(n, seed):
        stays = ~removed[:, order]
        kept = order.expand(len(lanes), n)[stays].view(len(lanes), -1)
        yield from kept.split(settings.batch_size, dim=1)
