"""Where tasks run and where they come from: the contracts of the schedule, and the pool of this process."""

from __future__ import annotations

import contextlib
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import islice
from typing import Protocol

import torch

from fimo.orchestrator.run.prepared import look_again
from fimo.orchestrator.run.results import Failed, Receipt, Result
from fimo.orchestrator.run.tasks import run_task
from fimo.orchestrator.run.work import Together, Work
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep


class Pool(Protocol):
    """Where tasks run."""

    def submit(self, task: Work) -> Hashable:
        """Start a task; returns a handle."""

    def wait(self, timeout_s: float) -> list[tuple[Hashable, Result]]:
        """Results that have arrived, waiting at most ``timeout_s`` for the first."""

    def cancel(self, handle: Hashable) -> None:
        """Give a task up; no result of it arrives any more."""

    def slots(self) -> int:
        """How many tasks can run at once; 0 while there is no node for any."""

    def waits(self) -> str | None:
        """What tasks wait for, in words, if none can run; else None."""
        return None

    def lost(self) -> str | None:
        """Why no task can run any more, in one line; None while they can."""
        return None

    def avoid(self, node: str) -> None:
        """Start no more tasks on a node."""
        return None

    def doubt(self, seconds: float) -> bool:
        """Some tasks take long: for now avoid nodes that have returned nothing for so long while others have.

        Returns:
            Whether a node is avoided that was not before.
        """
        return False


class Source(Protocol):
    """Where tasks come from, in order."""

    def take(self, count: int) -> list[Work]:
        """Up to ``count`` to start now."""

    def done(self, work: Work) -> None:
        """What was taken has ended, or was set aside."""

    def split(self, work: Together) -> list[Work]:
        """Those shards of what was taken that are to be tried one by one from now on."""

    @property
    def waits(self) -> int:
        """Tasks that others compute."""

    @property
    def open(self) -> bool:
        """Whether there may be more to take."""


class Unshared:
    """Tasks that no other driver computes."""

    waits, open = 0, False

    def __init__(self, tasks: Iterable[Work]) -> None:
        self._tasks = iter(tasks)

    def take(self, count: int) -> list[Work]:
        """See ``Source``."""
        return list(islice(self._tasks, count))

    def done(self, work: Work) -> None:
        """See ``Source``."""

    def split(self, work: Together) -> list[Work]:
        """See ``Source``."""
        return list(work.owed)


@contextlib.contextmanager
def in_process(sweep: Sweep, manifest: Manifest, final_model: bytes | None) -> Iterator[LocalPool]:
    """Tasks in this process, one after another, under the same contract as on Ray; torch's threads are put back."""
    threads = torch.get_num_threads()
    look_again(sweep, manifest)
    try:
        yield LocalPool(lambda task: run_task(sweep, manifest, final_model, task))
    finally:
        torch.set_num_threads(threads)


class LocalPool(Pool):
    """Runs tasks one after another in this process: for notebooks, tests, and debugging a workload.

    Args:
        work: computes a task and returns its receipt.
    """

    def __init__(self, work: Callable[[Work], Receipt]) -> None:
        self._work = work
        self._queue: deque[tuple[int, Work]] = deque()
        self._count = 0

    def submit(self, task: Work) -> Hashable:
        """Queue a task."""
        self._count += 1
        self._queue.append((self._count, task))
        return self._count

    def wait(self, timeout_s: float) -> list[tuple[Hashable, Result]]:
        """Run the next task."""
        if not self._queue:
            return []
        handle, task = self._queue.popleft()
        return [(handle, self._run(task))]

    def _run(self, task: Work) -> Result:
        try:
            return self._work(task)
        except Exception as error:
            return Failed(error, traceback.format_exc())

    def cancel(self, handle: Hashable) -> None:
        """Take a task out of the queue."""
        self._queue = deque(item for item in self._queue if item[0] != handle)

    def slots(self) -> int:
        """One."""
        return 1
