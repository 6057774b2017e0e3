"""What one of the processes does that share in a reduction.

It reads and verifies whole seeds as it is told to, leaves their effects in the common memory, and reduces and scores
its own share of the steps of every seed. It talks to ``run/sharing.py`` alone, writes to no store, and ends if the
other side does. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from fimo.orchestrator.run.reading import Costs, Gathered, seed_blocks
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Listed, Sweep
from fimo.orchestrator.tables.reduce import SeedBlock
from fimo.orchestrator.tables.shares import Course, Reduced, Share
from fimo.workers.memory import keep_freed_memory

Array = NDArray[np.float64]
NOTHING = np.zeros((0, 0, 0))


@dataclass(frozen=True)
class Begin:
    """The first thing that a process is told.

    Attributes:
        course: of its share of the steps, which are ``steps`` of the sweep's.
        slots: seeds for which there is room in the common memory, ``shape`` (R, T, m) each.
    """

    sweep: Sweep
    manifest: Manifest
    course: Course
    steps: slice
    slots: int
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Read:
    """To read a seed's parts, and leave its effects in a slot."""

    listed: Sequence[Listed]
    slot: int


@dataclass(frozen=True)
class Found:
    """A seed that was read: its block without effects, None if no part counts; and what was met (``Gathered``)."""

    block: SeedBlock | None
    slot: int
    gone: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    done: int = 0
    costs: Costs = field(default_factory=list)


@dataclass(frozen=True)
class Add:
    """To take seeds whose effects lie in their slots, in this order; answered when the slots are free again."""

    seeds: Sequence[Found]


@dataclass(frozen=True)
class Finish:
    """No more seeds; answered by what they came to. ``everywhere`` as in ``Share.finish``."""

    everywhere: NDArray[np.bool_]


class Worker:
    """What a process does with what it is told."""

    def __init__(self, begin: Begin, memory: Array) -> None:
        self._begin, self._memory = begin, memory
        self._share = Share(begin.course)

    def answer(self, told: Read | Add | Finish) -> Found | Reduced | None:
        """Do it."""
        if isinstance(told, Read):
            return self._read(told)
        if isinstance(told, Finish):
            return self._share.finish(told.everywhere)
        for found in told.seeds:
            if found.block is not None:
                self._share.add(found.block.at(self._begin.steps, self._memory[found.slot]))
        return None

    def _read(self, told: Read) -> Found:
        met, costs = Gathered({}), Costs()
        about = self._begin.sweep, self._begin.manifest, told.listed
        blocks = list(seed_blocks(*about, met, costs, lambda line: None, readers=1))
        for block in blocks:
            self._memory[told.slot] = block.effects
        without = replace(blocks[0], effects=NOTHING) if blocks else None
        return Found(without, told.slot, met.gone, met.bad, met.done, costs)


def main(connection: int, memory: int) -> None:
    """Answer until the other side is gone; numbers of file descriptors."""
    keep_freed_memory()
    with Connection(connection) as other, os.fdopen(memory, "r+b") as file:
        with contextlib.suppress(EOFError, ConnectionError):
            begin = other.recv()
            worker = Worker(begin, np.memmap(file, dtype=np.float64, mode="r+", shape=(begin.slots, *begin.shape)))
            while True:
                other.send(_answered(worker, other.recv()))


def _answered(worker: Worker, told: Read | Add | Finish) -> Found | Reduced | Exception | None:
    try:
        return worker.answer(told)
    except Exception as error:
        return error
