"""What a sweep owes, task by task, and what of it a pool is given: values, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import overload

from fimo.orchestrator.spec.removals import NamedRemoval


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
