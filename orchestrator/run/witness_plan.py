"""The witnesses of a sweep: how many there are and of what, by what they cost beside it. Arithmetic, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

from fimo.orchestrator.run.plan import trained_cells
from fimo.orchestrator.run.work import WitnessTask
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.sweep.manifest import Manifest

CHEAP_WITNESSES = 2e10
"""Scalars × examples trained that a seed's witnesses may take whatever their share: seconds."""
PER_SEED, MOVED, MOST_WITNESSES, WITNESS_SHARE = 4, 6, 16, 0.05
"""Of a seed's removals, how many have witnesses at most, and how many are trained moved.

Seeds with witnesses at most, if the spec does not say how many witnesses; and their share of a sweep's cost.
"""


def count_witnesses(manifest: Manifest) -> int:
    """How many witnesses there are in all: as the spec says, as far as there are cells, or by what the sweep costs.

    By cost, a seed has one, beside ``MOVED`` moved cells, and as many of the first seeds have it as their share pays
    for; the first has it whatever that is.
    """
    asked, spec = manifest.spec.resources.witnesses, manifest.spec
    removals = len({r.indices for r in manifest.removals})
    if asked != "auto":
        return min(asked, min(PER_SEED, removals) * spec.seeds.count)
    each = _witness_cells(manifest, 1, 1, min(MOVED, removals))
    paid = int(WITNESS_SHARE * trained_cells(manifest, removals) / each)
    return min(max(1, paid), MOST_WITNESSES, spec.seeds.count)


def _moved(manifest: Manifest, removals: int) -> int:
    """Moved cells beside a seed's witnesses: two at least, and all where they are cheap: few are a guess."""
    trained = manifest.scalars * manifest.steps[-1] * manifest.spec.further_training.batch_size
    cheap = trained * _witness_cells(manifest, 1, 1, MOVED) <= CHEAP_WITNESSES
    if cheap or manifest.spec.resources.witnesses != "auto":
        return min(MOVED, removals)
    budget = WITNESS_SHARE * trained_cells(manifest, removals)
    paid = [c for c in range(2, MOVED + 1) if _witness_cells(manifest, 1, 1, c) <= budget]
    return min(max(paid, default=2), removals)


def _witness_cells(manifest: Manifest, count: int, seeds: int, moved: int) -> float:
    """Cells of the sweep that ``count`` witnesses of ``seeds`` seeds cost as much as, with their baselines.

    float64 takes twice as long as float32 where it is computed as fast as the machine can; small stacks are slower a
    cell than those of a shard.
    """
    slow = 1.5
    times = slow if manifest.spec.further_training.precision == "float64" else 2 * slow
    return times * (count + seeds) + slow * seeds * (moved + 1)


def witness_share(manifest: Manifest) -> float:
    """What the witnesses take, as a share of what the sweep's cells do, as planned."""
    tasks, removals = witness_tasks(manifest), len({r.indices for r in manifest.removals})
    count, moved = sum(len(t.removals) for t in tasks), len(tasks[0].moved) if tasks else 0
    return _witness_cells(manifest, count, len(tasks), moved) / max(1, trained_cells(manifest, removals))


def witness_tasks(manifest: Manifest) -> tuple[WitnessTask, ...]:
    """The witnesses of a whole sweep: of the same removals, spread over all, in as many of the first seeds as it takes.

    The same in every seed, so that what of the difference is common to the seeds can be told.
    """
    count, once = count_witnesses(manifest), dict[tuple[int, ...], NamedRemoval]()
    for removal in manifest.removals:
        once.setdefault(removal.indices, removal)
    every = list(once.values())
    chosen = spread_evenly(every, 1 if manifest.spec.resources.witnesses == "auto" else min(PER_SEED, len(every)))
    moved = tuple(spread_evenly(every, _moved(manifest, len(every))))
    tasks, seed = list[WitnessTask](), manifest.spec.seeds.first
    while count > 0:
        own = spread_evenly(chosen, min(count, len(chosen)))
        tasks.append(WitnessTask(seed, tuple(own), moved))
        count, seed = count - len(own), seed + 1
    return tuple(tasks)


def spread_evenly(removals: Sequence[NamedRemoval], count: int) -> list[NamedRemoval]:
    """``count`` of the removals at even distances, in their order."""
    return [removals[(2 * place + 1) * len(removals) // (2 * count)] for place in range(count)]
