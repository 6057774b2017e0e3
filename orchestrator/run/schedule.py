"""The scheduling loop over any pool: a bounded window, retries, deadlines, set-asides and a circuit breaker.

Invariant: a task is finished, set aside with its error, or still owed; none is lost. What a task *does* and where it
runs are the pool's business; progress is the store's, so this loop may die at any moment.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from fimo.orchestrator.run.budget import TooDearError
from fimo.orchestrator.run.plan import Shard, Task
from fimo.orchestrator.run.tasks import CannotEstimateError, ConflictError, Receipt, run_task
from fimo.orchestrator.run.witnessing import NoWitnessError
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import DivergedError, FimoError, StoreError, UsageError, WorkloadError

ATTEMPTS = 3
"""Times that a task may fail by its own error before it is set aside."""
LOSSES = 20
"""Times that a task's worker or node may die under it: a shard that kills its worker must not circle for ever."""
BREAKER = 3
"""Set-asides without a single success that stop the sweep: a bug that fails every shard."""


@dataclass(frozen=True)
class Lost:
    """The worker or node died, or a deadline passed; not the task's own error."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """The task raised."""

    error: BaseException
    traceback: str


Result = Receipt | Lost | Failed


class Pool(Protocol):
    """Where tasks run."""

    def submit(self, task: Task) -> Hashable:
        """Start a task; returns a handle."""

    def wait(self, timeout_s: float) -> list[tuple[Hashable, Result]]:
        """Results that have arrived, waiting at most ``timeout_s`` for the first."""

    def cancel(self, handle: Hashable) -> None:
        """Give a task up; no result of it arrives any more."""

    def slots(self) -> int:
        """How many tasks can run at once; 0 while there is no node for any."""


@dataclass(frozen=True)
class SetAside:
    """A task given up, with its last error.

    Attributes:
        final: an estimator's own verdict, the same at every try.
        dear: it is over the budget of the default set, which is no verdict on an estimator that the spec names.
    """

    task: Task
    line: str
    traceback: str
    final: bool = False
    dear: bool = False


@dataclass
class Outcome:
    """How a drive ended.

    Attributes:
        stopped: why it ended early, None if every task was finished or set aside.
        broken: the circuit breaker opened: nothing was set aside for good.
        lost: how often a task's worker or node died, or a deadline passed.
    """

    receipts: list[Receipt] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)
    stopped: str | None = None
    broken: bool = False
    lost: int = 0


@dataclass
class _Flight:
    task: Task
    since: float
    running: float | None = None


def drive(
    tasks: Iterable[Task],
    pool: Pool,
    on_result: Callable[[Task, Result], None] = lambda task, result: None,
    should_stop: Callable[[], str | None] = lambda: None,
    deadline_s: float | None = None,
    poll_s: float = 0.5,
    on_turn: Callable[[Sequence[tuple[Task, float]]], None] = lambda running: None,
) -> Outcome:
    """Run tasks in order within a bounded window until each is finished or set aside.

    Args:
        on_result: told of every result as it arrives.
        should_stop: asked at every turn; a reason ends the drive, with the tasks in flight given up.
        deadline_s: seconds from submission after which a task counts as lost; None = generous, from those before it.
        on_turn: told at every turn of the tasks that run, each with its seconds so far, as far as the order of
            submission tells.
    """
    loop = _Loop(iter(tasks), pool, deadline_s)
    while loop.refill():
        reason = should_stop()
        if reason is None:
            on_turn(loop.running())
            for handle, result in pool.wait(poll_s):
                task = loop.take(handle, result)
                if task is not None:
                    on_result(task, result)
            for task, lost in loop.overdue():
                on_result(task, lost)
            reason = loop.breaker()
        if reason is not None:
            loop.abandon(reason)
            break
    return loop.outcome


class _Loop:
    """The state of one drive: what is in flight, what comes again, and how often each task has failed or been lost."""

    def __init__(self, tasks: Iterator[Task], pool: Pool, deadline_s: float | None) -> None:
        self.tasks, self.pool, self.deadline_s = tasks, pool, deadline_s
        self.again: deque[Task] = deque()
        self.flying: dict[Hashable, _Flight] = {}
        self.failures: dict[str, int] = {}
        self.losses: dict[str, int] = {}
        self.longest_s = 0.0
        self.room, self.slots = True, 1
        self.store_failures, self.store_line = 0, ""
        self.outcome = Outcome()

    def refill(self) -> bool:
        """Fill the window; whether anything is in flight."""
        slots = self.pool.slots()
        self.room, self.slots = slots > 0, slots
        window = 2 * max(1, slots)
        while len(self.flying) < window:
            task = self.again.popleft() if self.again else next(self.tasks, None)
            if task is None:
                break
            self.flying[self.pool.submit(task)] = _Flight(task, time.monotonic())
        return bool(self.flying)

    def running(self) -> list[tuple[Task, float]]:
        """Tasks with their seconds so far: pools start them in the order in which they were handed over."""
        now, first = time.monotonic(), list(self.flying.values())[: max(1, self.slots)]
        for flight in first:
            flight.running = now if flight.running is None else flight.running
        return [(flight.task, now - (flight.running or now)) for flight in first]

    def take(self, handle: Hashable, result: Result) -> Task | None:
        flight = self.flying.pop(handle, None)
        if flight is None:
            return None
        if isinstance(result, Receipt):
            self.outcome.receipts.append(result)
            self.longest_s = max(self.longest_s, result.seconds)
            self.store_failures = 0
        elif isinstance(result, Lost):
            self._lost(flight.task, result)
        else:
            self._failed(flight.task, result)
        return flight.task

    def _lost(self, task: Task, result: Lost) -> None:
        name = repr(task)
        self.outcome.lost += 1
        self.losses[name] = self.losses.get(name, 0) + 1
        if self.losses[name] >= LOSSES:
            line = f"lost {LOSSES} times, the last time: {result.reason}"
            self.outcome.set_aside.append(SetAside(task, line, result.reason))
        else:
            self.again.append(task)

    def _failed(self, task: Task, result: Failed) -> None:
        name = repr(task)
        # Expired credentials or a lost server are not the task's fault: it stays owed, and the drive ends.
        self.store_failures = self.store_failures + 1 if isinstance(result.error, StoreError) else 0
        if self.store_failures >= BREAKER:
            self.store_line = error_line(result.error)
            self.again.append(task)
            return
        self.failures[name] = self.failures.get(name, 0) + 1
        dear = isinstance(result.error, TooDearError)
        final = dear or isinstance(result.error, CannotEstimateError)
        # These errors come again at every try.
        certain = final or isinstance(
            result.error, UsageError | WorkloadError | DivergedError | ConflictError | NoWitnessError
        )
        if certain or self.failures[name] >= ATTEMPTS:
            self.outcome.set_aside.append(SetAside(task, error_line(result.error), result.traceback, final, dear))
        else:
            self.again.append(task)

    def overdue(self) -> list[tuple[Task, Lost]]:
        """Give up what has passed its deadline, and queue it again."""
        limit = self.deadline_s if self.deadline_s is not None else self._generous()
        now, given_up = time.monotonic(), list[tuple[Task, Lost]]()
        if not self.room:
            # While there is no node for any task, none runs, so none is late.
            for flight in self.flying.values():
                flight.since = now
        for handle, flight in list(self.flying.items()):
            if limit is not None and now - flight.since > limit:
                self.pool.cancel(handle)
                lost = Lost(f"no result within {limit:.0f} s")
                self.take(handle, lost)
                given_up.append((flight.task, lost))
        return given_up

    def _generous(self) -> float | None:
        return max(1800.0, 20 * self.longest_s) if self.longest_s else None

    def breaker(self) -> str | None:
        """The reason to stop if the first shards all fail, or the store does; else None."""
        if self.store_failures >= BREAKER:
            return f"stopped, since the store fails: {self.store_line}"
        aside = [a for a in self.outcome.set_aside if isinstance(a.task, Shard)]
        shards = any(r.cells for r in self.outcome.receipts)
        if shards or not aside:
            return None
        owed = any(isinstance(f.task, Shard) for f in self.flying.values()) or self.again
        if len(aside) >= BREAKER or not owed:
            self.outcome.broken = True
            return f"every shard fails: {aside[0].line}"
        return None

    def abandon(self, reason: str) -> None:
        for handle in list(self.flying):
            self.pool.cancel(handle)
        self.flying.clear()
        self.outcome.stopped = reason


def error_line(error: BaseException) -> str:
    """The first line of an error, with its type unless it is one of fimo's own."""
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, FimoError) else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def in_process(sweep: Sweep, manifest: Manifest, final_model: bytes | None) -> Iterator[LocalPool]:
    """Tasks in this process, one after another, under the same contract as on Ray; torch's threads are put back."""
    threads = torch.get_num_threads()
    try:
        yield LocalPool(lambda task: run_task(sweep, manifest, final_model, task))
    finally:
        torch.set_num_threads(threads)


class LocalPool:
    """Runs tasks one after another in this process: for notebooks, tests, and debugging a workload.

    Args:
        work: computes a task and returns its receipt.
    """

    def __init__(self, work: Callable[[Task], Receipt]) -> None:
        self._work = work
        self._queue: deque[tuple[int, Task]] = deque()
        self._count = 0

    def submit(self, task: Task) -> Hashable:
        """Queue a task."""
        self._count += 1
        self._queue.append((self._count, task))
        return self._count

    def wait(self, timeout_s: float) -> list[tuple[Hashable, Result]]:
        """Run the next task."""
        if not self._queue:
            return []
        handle, task = self._queue.popleft()
        try:
            return [(handle, self._work(task))]
        except Exception as error:
            return [(handle, Failed(error, traceback.format_exc()))]

    def cancel(self, handle: Hashable) -> None:
        """Take a task out of the queue."""
        self._queue = deque(item for item in self._queue if item[0] != handle)

    def slots(self) -> int:
        """One."""
        return 1
