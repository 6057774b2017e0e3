"""Several shards trained in the same stacks: of several seeds, where one would leave a GPU idle, or learning rates.

A replica's numbers are those of its own stack to rounding. A stack of several seeds holds whole shards, each baseline
beside its removals, so that whoever knows which they were can train a cell again in the stack that it was part of.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from fimo.workers.amounts import BASELINE, Removal
from fimo.workers.device import forget_peak, peak
from fimo.workers.errors import FimoError
from fimo.workers.further_training import Deltas, further_train
from fimo.workers.shard import ShardResult, copy_before_first_difference, out_of_memory, release, run_shard
from fimo.workers.stacking.forking import stacks_of
from fimo.workers.start import Start

Shards: TypeAlias = Sequence[tuple[Sequence[Removal], int]]
"""(removals, seed) of each."""


@dataclass(frozen=True)
class _Lane:
    """A replica: what it removes, its seed, and its learning rate if that is not the settings'."""

    removal: Removal
    seed: int
    rate: float | None = None


def run_shards(
    start: Start, shards: Shards, replicas: int, wanted: Collection[int] | None = None
) -> Iterator[tuple[range, list[ShardResult]]]:
    """``run_shard`` of several (removals, seed): as many of them in one stack as it holds, whole ones.

    One seed's replicas may be too few to keep a GPU busy. ``seconds`` is an even share of the stack's. A stack that
    memory does not hold is cut into smaller ones. A stack of several is not forked.

    Args:
        wanted: places of the shards whose results are wanted: a stack of others alone is not trained. None = all.

    Yields:
        Places of the shards that were trained in one stack, and their results; of one alone, which may have taken
        several stacks, where no two fit in one, or the forward draws.
    """
    first = 0
    while first < len(shards):
        count = first_stack(start, shards[first:], replicas)
        places, some = range(first, first + count), shards[first : first + count]
        if wanted is None or not set(wanted).isdisjoint(places):
            try:
                done = _together(start, some) if count > 1 else [run_shard(start, *some[0], replicas)]
            except FimoError:
                raise
            except Exception as error:
                if count == 1 or not out_of_memory(error):
                    raise
                replicas = sum(len(removals) + 1 for removals, _ in some) // 2
                release()
                continue
            yield places, [replace(result, replicas=replicas) for result in done] if count > 1 else done
        first = places.stop


def first_stack(start: Start, shards: Shards, replicas: int) -> int:
    """How many of the shards make the first stack: such that all stacks are of like size; 1 is trained by itself."""
    most = max(1, replicas // (1 + max(len(removals) for removals, _ in shards))) if start.joins else 1
    stacks = -(-len(shards) // most)
    return -(-len(shards) // stacks)


def cut(start: Start, shards: Shards, replicas: int) -> Iterator[Shards]:
    """The shards stack by stack, as ``run_shards`` trains them while memory lasts."""
    while shards:
        count = first_stack(start, shards, replicas)
        yield shards[:count]
        shards = shards[count:]


def joint_sizes(start: Start, removals: Sequence[int], seeds: int, replicas: int) -> list[int]:
    """The sizes of the stacks of several shards that so many seeds come to, largest first.

    Args:
        removals: of the shards of one seed, by number.
    """
    sizes = set[int]()
    for count in removals:
        shards: Shards = [((BASELINE,) * count, seed) for seed in range(seeds)]
        sizes |= {len(some) * (count + 1) for some in cut(start, shards, replicas) if len(some) > 1}
    return sorted(sizes, reverse=True)


def _together(start: Start, shards: Shards) -> list[ShardResult]:
    started = time.monotonic()
    forget_peak(start.model.device)
    groups = [(removals, _lanes(removals, seed)) for removals, seed in shards]
    results = _of_groups(start, groups, sum(len(lanes) for _, lanes in groups))
    spent, taken = (time.monotonic() - started) / len(shards), peak(start.model.device)
    return [replace(result, seconds=spent, peak_bytes=taken) for result in results]


def _lanes(removals: Sequence[Removal], seed: int) -> list[_Lane]:
    """A shard's replicas, the baseline's first."""
    return [_Lane(cell, seed) for cell in (BASELINE, *removals)]


def run_rates(
    start: Start, removals: Sequence[Removal], seed: int, replicas: int, rates: Sequence[float]
) -> list[ShardResult]:
    """``run_shard`` at several learning rates, all in the same stacks: one result for each rate.

    A replica's numbers are those of its own stack to rounding. ``seconds`` is an even share of the whole's, and peak
    memory is not measured. Nothing is forked, and memory that runs out is the caller's to handle.

    Args:
        rates: in place of the settings' learning rate, each once.
    """
    started, cells = time.monotonic(), [BASELINE, *removals]
    groups = [(removals, [_Lane(cell, seed, rate) for cell in cells]) for rate in rates]
    results = _of_groups(start, groups, replicas if start.engine.stack else 1)
    spent = (time.monotonic() - started) / len(rates)
    return [replace(result, seconds=spent) for result in results]


_Group = tuple[Sequence[Removal], Sequence[_Lane]]
"""What makes one result: removals, and their lanes, the baseline's first."""


def _of_groups(start: Start, groups: Sequence[_Group], size: int) -> list[ShardResult]:
    every = [lane for _, lanes in groups for lane in lanes]
    done = [_trained(start, every[i : i + size]) for i in range(0, len(every), size)]
    deltas, distances = (torch.cat([getattr(one, name) for one in done]) for name in ("deltas", "distances"))
    scale, results, first = float(start.at_final.square().mean().sqrt()), list[ShardResult](), 0
    floors = _floors(start, [lanes[0] for _, lanes in groups], size)
    for (removals, lanes), floor in zip(groups, floors, strict=True):
        rows = slice(first, first + len(lanes))
        first = rows.stop
        moved, far = _in_order(deltas[rows], floor.deltas), _in_order(distances[rows], floor.distances)
        seed = lanes[0].seed
        copy_before_first_difference(start, removals, seed, moved, far)
        results.append(ShardResult(seed, floor.steps, moved, far, size, 0.0, 0, scale, start.at_final))
    return results


def _floors(start: Start, baselines: Sequence[_Lane], size: int) -> list[Deltas]:
    """Each group's second baseline, as in ``run_shard`` in a stack of another size than the first's."""
    if len({lane.seed for lane in baselines}) == 1:
        alone = 2 if start.engine.stack and (size == 1 or start.abreast) else 1
        return [_second(start, [lane] * alone) for lane in baselines]
    # Those of several seeds make a smaller stack of their own: each has removals beside it in the first.
    every = _second(start, baselines)
    rows = zip(every.deltas, every.distances, strict=True)
    return [replace(every, deltas=delta[None], distances=distance[None]) for delta, distance in rows]


def _second(start: Start, lanes: Sequence[_Lane]) -> Deltas:
    """Second baselines, by ``vmap``; abreast as the first ones if it refuses the model, or does not fit in memory."""
    try:
        return _trained(start.by_vmap, lanes)
    except FimoError:
        raise
    except Exception:
        if not start.abreast:
            raise
    release()
    return _trained(start, lanes)


def _in_order(rows: Tensor, second: Tensor) -> Tensor:
    """The baseline first, to the order of a ``ShardResult``."""
    return torch.cat([rows[1:], rows[:1], second[-1:]])


def _trained(start: Start, lanes: Sequence[_Lane]) -> Deltas:
    rates = [lane.rate for lane in lanes if lane.rate is not None]
    seeds = [lane.seed for lane in lanes]
    return further_train(start, [lane.removal for lane in lanes], seeds, rates=rates or None)


def train_again(start: Start, shards: Shards, which: int, row: int, replicas: int) -> tuple[Tensor, Tensor]:
    """A cell and its baseline once more, each in the very stack that it was part of.

    Args:
        shards: those that were trained in one stack (see ``run_shards``), or one that was trained by itself.
        which: the cell's; ``row``: its removal's.
        replicas: the stack size of a shard by itself.

    Returns:
        The deltas of both, float64 (T, m).
    """
    removals, seed = shards[which]
    every = [lane for removals, seed in shards for lane in _lanes(removals, seed)]
    stacks = [tuple(range(len(every)))]
    baseline = sum(1 + len(before) for before, _ in shards[:which])
    if len(shards) == 1:
        cells, size = [lane.removal for lane in every], replicas if start.engine.stack else 1
        stacks = [stack.places for stack in stacks_of(start, cells, range(len(cells)), seed, size)]
    wanted, found = (baseline + 1 + row, baseline), dict[int, tuple[Tensor, Tensor]]()
    for stack in stacks:
        if set(wanted).intersection(stack):
            done = _trained(start, [every[place] for place in stack])
            found |= dict(zip(stack, zip(done.deltas, done.distances, strict=True), strict=True))
    deltas, distances = (torch.stack([found[place][i] for place in wanted]) for i in (0, 1))
    copy_before_first_difference(start, [removals[row]], seed, deltas, distances)
    return deltas[0], deltas[1]
