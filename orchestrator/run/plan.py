"""The shards of a sweep: how large they are, how many seeds share a stack, and which are still to be computed.

Arithmetic on values, no I/O. Cells are matched by what they are (seed and removed indices), so raising seeds or adding
removals finds the old parts, and resuming is: list and subtract.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fimo.orchestrator.run.work import Shard
from fimo.orchestrator.spec.limits import FEWEST, MOST_NUMBERS
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.workers.amounts import steps_recorded
from fimo.workers.settings import FurtherTraining

SHARD_WORK = 4e12
"""Trained scalars × steps that one part may hold before its shard is cut smaller: about an hour and a half of BERT."""
SMALLEST, LARGEST = FEWEST, 100
FULL = 512
"""Replicas in one stack that fill a GPU with a small model: so many seeds are trained together."""
STACK_NUMBERS = 2**28
"""Deltas of such a stack, at most: 2 GiB."""
EACH = 5
"""Tasks that every place should have: with one each a thousand GPUs are busy for three tenths of the time, with five
for two thirds (``benchmarks/fleet.py``)."""


@dataclass(frozen=True)
class Plan:
    """What a sweep consists of and what is missing of it.

    Attributes:
        cells: removals × seeds, without the baselines.
        done: cells that parts hold already.
        shards: what is to be computed, lowest seeds first.
        steps: the recorded steps.
        part_bytes: uncompressed bytes of the rows of all parts of the whole sweep.
    """

    cells: int
    done: int
    shards: tuple[Shard, ...]
    steps: tuple[int, ...]
    part_bytes: int

    @property
    def missing(self) -> int:
        """Cells still to be computed."""
        return self.cells - self.done


def shard_size(scalars: int, steps: int) -> int:
    """Removals in one part: up to 100, fewer if a cell is dear, so that an interruption loses little.

    Args:
        scalars: trainable scalars of the model.
        steps: optimizer steps of one cell.
    """
    return int(min(LARGEST, max(SMALLEST, SHARD_WORK // max(1, scalars * steps))))


def size_of_shards(manifest: Manifest) -> int:
    """Removals in one part: as the spec says, or by the cost of a cell."""
    asked = manifest.spec.resources.shard
    if asked != "auto":
        return asked
    fit = MOST_NUMBERS // (len(manifest.steps) * manifest.evals) - 2
    return max(1, min(fit, shard_size(manifest.scalars, manifest.steps[-1])))


def seeds_together(manifest: Manifest, removals: int) -> int:
    """Seeds whose shards are trained in the same stacks: as the spec says, or so many that they fill a GPU.

    Told by the spec, and not by the cluster at hand: which cells share a stack decides how they round.

    Args:
        removals: of the sweep.
    """
    resources, each = manifest.spec.resources, max(1, min(size_of_shards(manifest), removals))
    if resources.together != "auto":
        return resources.together
    # No dearer than a shard may be, and its deltas stay on the device until it is done.
    dear = int(SHARD_WORK // max(1, manifest.scalars * manifest.steps[-1])) // each
    held = STACK_NUMBERS // (len(manifest.steps) * manifest.evals * (each + 1))
    # Seeds that come in rounds come so many at a time.
    round_of = manifest.spec.seeds.min if manifest.spec.seeds.until_reliability is not None else FULL
    return max(1, min(FULL // (each + 1), dear, held, round_of)) if resources.gpus else 1


def make_plan(
    removals: Sequence[NamedRemoval],
    seeds: Iterable[int],
    done: Mapping[int, set[tuple[int, ...]]],
    settings: FurtherTraining,
    n: int,
    evals: int,
    size: int,
) -> Plan:
    """Subtract what is done from the grid and cut the rest into shards of one seed and at most ``size`` removals.

    Args:
        done: seed -> the removals (as index tuples) that its parts hold.
    """
    shards: list[Shard] = []
    finished = 0
    every = list(seeds)
    for seed in sorted(every):
        have = done.get(seed, set())
        missing = [r for r in removals if r.indices not in have]
        finished += len(removals) - len(missing)
        # Removals of equal indices are one cell.
        once = list({r.indices: r for r in reversed(missing)}.values())[::-1]
        shards += [Shard(seed, tuple(once[i : i + size])) for i in range(0, len(once), size)]
    steps = tuple(steps_recorded(n, settings))
    rows = len(every) * (len(removals) + 2 * -(-len(removals) // size)) * len(steps)
    return Plan(len(removals) * len(every), finished, tuple(shards), steps, rows * (8 * evals + 24))


def trained_cells(manifest: Manifest, removals: int) -> int:
    """Cells that the shards of a whole sweep train: removals, a baseline and a second one of every shard."""
    return manifest.spec.seeds.count * (removals + 2 * -(-removals // size_of_shards(manifest)))
