"""The tasks of a sweep, and which shards are still to be computed: arithmetic on values, no I/O.

Cells are matched by what they are (seed and removed indices), so raising seeds or adding removals finds the old
parts, and resuming is: list and subtract.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

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
CHEAP_WITNESSES = 2e10
"""Scalars × examples trained that a seed's witnesses may take whatever their share: seconds."""
PER_SEED, MOVED, MOST_WITNESSES, WITNESS_SHARE = 4, 6, 16, 0.05
"""Of a seed's removals, how many have witnesses at most, and how many are trained moved.

Seeds with witnesses at most, if the spec does not say how many witnesses; and their share of a sweep's cost.
"""


@dataclass(frozen=True)
class Shard:
    """Removals of one seed, trained with their baseline and committed as one part."""

    seed: int
    removals: tuple[NamedRemoval, ...]


@dataclass(frozen=True)
class EstimateTask:
    """One estimator's values for some removals and a block of evaluation examples, or one seed's share of them.

    Attributes:
        params: canonical JSON of the hyper-parameters.
        first, count: the block's evaluation examples are ``first`` to ``first + count − 1``.
        whole: the block holds all evaluation examples of the sweep.
        seed: the one to train with, of an estimator that trains runs of its own; its values are the mean over seeds.
        at: the one recorded step that is wanted, for a ranking; None = all of them.
    """

    estimator: str
    params: str
    removals: tuple[NamedRemoval, ...]
    first: int
    count: int
    whole: bool = True
    seed: int | None = None
    at: int | None = None

    @property
    def span(self) -> str:
        """The block and the seed in words, to follow the estimator's name; empty if there is one block and no seed."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        return seed + ("" if self.whole else f", evaluation examples {self.first} to {self.first + self.count - 1}")


@dataclass(frozen=True)
class WitnessTask:
    """Removals of one seed, trained again with their baseline to measure the noise floor.

    Attributes:
        moved: those that are trained from θᶠ moved by more than rounding, beside the others.
    """

    seed: int
    removals: tuple[NamedRemoval, ...]
    moved: tuple[NamedRemoval, ...] = ()


Task = Shard | EstimateTask | WitnessTask
"""What a sweep owes: done, claimed, or set aside one by one."""


@dataclass(frozen=True)
class Together:
    """Shards of the same removals that are trained in the same stacks; each is committed as its own part.

    Attributes:
        shards: all that make the stacks: those that are owed, and what is done of a stack that was interrupted.
        owed: those whose parts are missing.
        block: the first seed of their block, which they are claimed by.
    """

    shards: tuple[Shard, ...]
    owed: tuple[Shard, ...]
    block: int


Work = Task | Together
"""What a pool is given."""


@overload
def tasks_in(work: Shard | Together) -> tuple[Shard, ...]: ...


@overload
def tasks_in(work: Work) -> tuple[Task, ...]: ...


def tasks_in(work: Work) -> tuple[Task, ...]:
    """The tasks that are done when the work is."""
    return work.owed if isinstance(work, Together) else (work,)


def as_work(
    tasks: Iterable[Task], together: int, first: int, mates: Callable[[Sequence[Shard]], Collection[int]]
) -> list[Work]:
    """The tasks in order, shards of the same removals and of one block of seeds as one, where the first of them stood.

    Args:
        together: seeds of a block; ``first``: the sweep's first seed, where the first block begins.
        mates: the seeds that are done of the stacks of which some are owed.
    """
    kept, blocks = list(tasks), dict[tuple[int, tuple[NamedRemoval, ...]], list[Shard]]()
    if together <= 1:
        return list[Work](kept)
    for task in kept:
        if isinstance(task, Shard):
            blocks.setdefault(((task.seed - first) // together, task.removals), []).append(task)
    every = list[Work]()
    for task in kept:
        if not isinstance(task, Shard):
            every.append(task)
            continue
        block = (task.seed - first) // together
        if owed := blocks.pop((block, task.removals), None):
            seeds = sorted({*mates(owed), *(shard.seed for shard in owed)})
            shards = tuple(Shard(seed, task.removals) for seed in seeds)
            every.append(Together(shards, tuple(owed), first + block * together) if len(shards) > 1 else task)
    return every


def task_name(task: Work) -> str:
    """How a task is called in progress and errors."""
    if isinstance(task, Together):
        return f"seeds {task.shards[0].seed} to {task.shards[-1].seed}, {len(task.shards[0].removals)} removals each"
    if isinstance(task, Shard):
        return f"seed {task.seed}, {len(task.removals)} removals"
    if isinstance(task, WitnessTask):
        return f"witness, seed {task.seed}"
    return f"estimator {task.estimator} {task.params}{task.span}"


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
