"""The scheduling loop over any pool: a bounded window, retries, deadlines, set-asides and a circuit breaker.

Invariant: a task is finished, set aside with its error, or still owed; none is lost. What a task *does* and where it
runs are the pool's business; progress is the store's, so this loop may die at any moment.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter

from fimo.orchestrator.run.lateness import Lateness
from fimo.orchestrator.run.places import Pool, Source, Unshared
from fimo.orchestrator.run.results import (
    ApartError,
    CannotEstimateError,
    ConflictError,
    Failed,
    Lost,
    NoWitnessError,
    Outcome,
    Receipt,
    Result,
    SetAside,
    TooDearError,
    UnableError,
    error_line,
)
from fimo.orchestrator.run.work import Shard, Together, Work, tasks_in
from fimo.workers.errors import DivergedError, StoreError, UsageError, WorkloadError

WINDOW = 2
"""Tasks that are handed over, of those that run at once: a GPU that is done must find the next one there."""
ATTEMPTS = 3
"""Times that a task may fail by its own error before it is set aside."""
LOSSES = 20
"""Times that a task's worker or node may die under it: a shard that kills its worker must not circle for ever."""
BREAKER = 3
"""Set-asides without a single success that stop the sweep: a bug that fails every shard."""
UNABLE = 30
"""Tasks in a row that nodes could not begin, and none finished meanwhile, that stop the sweep."""
APART = 5
"""Times that shards may be lost together before they are tried one by one: together they may take too much memory."""
REMEMBERED_S = 60.0
"""Nodes that have gone leave their tasks behind for a while, so the window shrinks so late."""


@dataclass
class _Flight:
    """What was handed over; ``twin``: the handle of its other copy; ``copied``: it has, or had, one."""

    task: Work
    running: float | None = None
    twin: Hashable | None = None
    copied: bool = False

    def ran_s(self, now: float) -> float:
        """Seconds for which it has run, as far as is known."""
        return 0.0 if self.running is None else now - self.running


def drive(
    tasks: Iterable[Work] | Source,
    pool: Pool,
    on_result: Callable[[Work, Result], None] = lambda task, result: None,
    should_stop: Callable[[], str | None] = lambda: None,
    deadline_s: float | None = None,
    poll_s: float = 0.5,
    on_turn: Callable[[Sequence[tuple[Work, float]], str | None], None] = lambda running, waits: None,
) -> Outcome:
    """Run tasks in order within a bounded window until each is finished or set aside.

    Args:
        on_result: told of every result as it arrives; of shards that were done together, of each.
        should_stop: asked at every turn; a reason ends the drive, with the tasks in flight given up.
        deadline_s: seconds of running after which a task counts as lost; None = from those before it.
        on_turn: told at every turn of the tasks that run, each with its seconds so far, as far as the order of
            submission tells; and of what the run waits for, if it does.
    """
    source = Unshared(tasks) if isinstance(tasks, Iterable) else tasks
    loop = _Loop(source, pool, deadline_s)
    while loop.refill():
        reason = should_stop() or pool.lost()
        if reason is None:
            on_turn(loop.running(), loop.waits())
            if not loop.flying:
                time.sleep(poll_s)
            for handle, result in pool.wait(poll_s):
                for told in loop.take(handle, result):
                    on_result(*told)
            for task, lost in loop.overdue():
                on_result(task, lost)
            reason = loop.breaker()
        if reason is not None:
            loop.abandon(reason)
            break
    return loop.outcome


class _Loop:
    """The state of one drive: what is in flight, what comes again, and how often each task has failed or been lost."""

    def __init__(self, source: Source, pool: Pool, deadline_s: float | None) -> None:
        self.source, self.pool, self.lateness = source, pool, Lateness(deadline_s)
        self.again: deque[Work] = deque()
        self.flying: dict[Hashable, _Flight] = {}
        self.failures: dict[str, int] = {}
        self.losses: dict[str, int] = {}
        self.slots = 1
        self.most, self.most_at = 0, 0.0
        self.store_failures, self.store_line = 0, ""
        self.unable, self.unable_line = 0, ""
        self.apart = False
        self.outcome = Outcome()

    def refill(self) -> bool:
        """Fill the window; whether anything is in flight, or may still come."""
        now, self.slots = time.monotonic(), self.pool.slots()
        if self.slots >= self.most or now - self.most_at > REMEMBERED_S:
            self.most, self.most_at = self.slots, now
        window = WINDOW * max(1, self.most)
        stuck = [f.ran_s(now) for f in self.flying.values() if self.lateness.is_stuck(f.task, f.ran_s(now))]
        window += len(stuck)
        self._doubts(stuck)
        if (room := window - len(self.flying)) > 0:
            tasks = [self.again.popleft() for _ in range(min(room, len(self.again)))]
            for task in self.source.take(room - len(tasks)):
                tasks += self.source.split(task) if self.apart and isinstance(task, Together) else [task]
            for task in tasks:
                self.flying[self.pool.submit(task)] = _Flight(task)
            if not (self.again or self.source.open):
                self._copy(now)
        return bool(self.flying or self.source.open)

    def _copy(self, now: float) -> None:
        """At the end of a run start late shards once more where nothing runs: no slow or frozen GPU is waited for.

        Who is first commits the part. Without it a run of five minutes on 1,000 GPUs takes twenty if one of them
        freezes at its end (``benchmarks/fleet.py``).
        """
        late = [
            (flight.ran_s(now), handle)
            for handle, flight in self.flying.items()
            if isinstance(flight.task, Shard | Together) and self.lateness.is_late(flight.task, flight.ran_s(now))
        ]
        if self._doubts([seconds for seconds, _ in late]):
            # A copy on the node that has frozen would wait as the first one does: it is made in the next turn.
            return
        # What is late may be on nodes that are avoided now, or still wait for one: more of it than they have slots.
        away = len(late) if self.most > self.slots else 0
        idle = max(0, self.slots - (len(self.flying) - away))
        owed = [one for one in late if not self.flying[one[1]].copied]
        for _, handle in sorted(owed, key=itemgetter(0), reverse=True)[:idle]:
            flight = self.flying[handle]
            flight.twin, flight.copied = self.pool.submit(flight.task), True
            self.flying[flight.twin] = _Flight(flight.task, twin=handle, copied=True)

    def _doubts(self, seconds: Sequence[float]) -> bool:
        """Whether a node is newly avoided, since tasks have run for so long; what has not begun is handed over again.

        It may wait for a node that has frozen, and Ray would let it.
        """
        if not seconds or not self.pool.doubt(max(seconds)):
            return False
        waiting = [handle for handle, flight in self.flying.items() if flight.running is None]
        for handle in reversed(waiting):
            self.pool.cancel(handle)
            flight = self.flying.pop(handle)
            if (other := self.flying.get(flight.twin)) is not None:
                # The copy that is left has lost nothing but time: it may have another.
                other.copied = False
            if not self._parted(flight):
                self.again.appendleft(flight.task)
        return True

    def _parted(self, flight: _Flight) -> bool:
        """Whether a copy of a task that has ended, or is given up, still runs; from now on by itself."""
        other = self.flying.get(flight.twin)
        if other is not None:
            other.twin = None
        return other is not None

    def running(self) -> list[tuple[Work, float]]:
        """Tasks with their seconds so far: pools start them in the order in which they were handed over."""
        now = time.monotonic()
        stuck, others = list[_Flight](), list[_Flight]()
        for flight in self.flying.values():
            (stuck if self.lateness.is_stuck(flight.task, flight.ran_s(now)) else others).append(flight)
        for flight in others[: self.slots]:
            flight.running = now if flight.running is None else flight.running
        return [(f.task, f.ran_s(now)) for f in [*stuck, *others] if f.running is not None]

    def waits(self) -> str | None:
        """What the run waits for, if it does."""
        if self.flying and (line := self.pool.waits()):
            return line
        if not self.flying and self.source.waits:
            return f"other drivers of this sweep, which compute {self.source.waits} tasks"
        return None

    def take(self, handle: Hashable, result: Result) -> list[tuple[Work, Result]]:
        """What became of what was handed over, task by task if it is done."""
        flight = self.flying.pop(handle, None)
        if flight is None:
            return []
        if isinstance(result, Receipt):
            if flight.twin in self.flying:
                self.pool.cancel(flight.twin)
                del self.flying[flight.twin]
            self._finished(flight, result)
            each = list(zip(tasks_in(flight.task), result.each or (result,), strict=True))
            self.outcome.receipts += [receipt for _, receipt in each]
            return list(each)
        if self._parted(flight):
            # The other copy's result is the task's.
            self.outcome.lost += isinstance(result, Lost)
            if isinstance(result, Failed) and isinstance(result.error, UnableError):
                self.pool.avoid(result.error.node)
        elif isinstance(result, Lost):
            self._lost(flight.task, result)
        else:
            self._failed(flight.task, result)
        return [(flight.task, result)]

    def _finished(self, flight: _Flight, receipt: Receipt) -> None:
        # What was there already says nothing of how long the work takes.
        if receipt.written:
            # With what the task took beside its own work: a worker that starts, data that is loaded.
            self.lateness.finished(flight.task, max(receipt.seconds, flight.ran_s(time.monotonic())))
        self.store_failures = self.unable = 0
        self.source.done(flight.task)

    def _set_aside(self, given_up: SetAside) -> None:
        self.outcome.set_aside.append(given_up)
        self.source.done(given_up.task)

    def _lost(self, task: Work, result: Lost) -> None:
        name = repr(task)
        self.outcome.lost += 1
        self.losses[name] = self.losses.get(name, 0) + 1
        if isinstance(task, Together):
            self.again.extend(self.source.split(task) if self.losses[name] >= APART else (task,))
        elif self.losses[name] >= LOSSES:
            line = f"lost {LOSSES} times, the last time: {result.reason}"
            self._set_aside(SetAside(task, line, result.reason))
        else:
            self.again.append(task)

    def _failed(self, task: Work, result: Failed) -> None:
        name = repr(task)
        # Expired credentials or a lost server are not the task's fault: it stays owed, and the drive ends.
        self.store_failures = self.store_failures + 1 if isinstance(result.error, StoreError) else 0
        if self.store_failures >= BREAKER:
            self.store_line = error_line(result.error)
            self.again.append(task)
            return
        if isinstance(result.error, UnableError):
            # No verdict on the task: another node may be able to, or this one once it is mended.
            self.unable, self.unable_line = self.unable + 1, error_line(result.error)
            self.pool.avoid(result.error.node)
            self.again.append(task)
            return
        self.failures[name] = self.failures.get(name, 0) + 1
        if isinstance(task, Together):
            # The store's error is none of theirs. Another's shows when they are tried one by one.
            whole = isinstance(result.error, StoreError) and self.failures[name] < ATTEMPTS
            self.again.extend((task,) if whole else self.source.split(task))
            self.apart |= isinstance(result.error, ApartError)
            return
        dear = isinstance(result.error, TooDearError)
        final = dear or isinstance(result.error, CannotEstimateError)
        # These errors come again at every try.
        certain = final or isinstance(
            result.error, UsageError | WorkloadError | DivergedError | ConflictError | NoWitnessError
        )
        if certain or self.failures[name] >= ATTEMPTS:
            self._set_aside(SetAside(task, error_line(result.error), result.traceback, final, dear))
        else:
            self.again.append(task)

    def overdue(self) -> list[tuple[Work, Lost]]:
        """Give up what has passed its deadline, and queue it again."""
        now, given_up = time.monotonic(), list[tuple[Work, Lost]]()
        for handle, flight in list(self.flying.items()):
            if not self.slots:
                # While there is no node for any task, none runs, so none is late.
                flight.running = None
            limit = self.lateness.passed(flight.task, flight.ran_s(now))
            if limit is not None:
                self.pool.cancel(handle)
                lost = Lost(f"no result within {limit:.0f} s")
                self.lateness.gave_up(flight.task)
                self.take(handle, lost)
                given_up.append((flight.task, lost))
        return given_up

    def breaker(self) -> str | None:
        """The reason to stop if the first shards all fail, or the store does; else None."""
        if self.store_failures >= BREAKER:
            return f"stopped, since the store fails: {self.store_line}"
        if self.unable >= (UNABLE if self.outcome.receipts else BREAKER) or (self.unable and not self.pool.slots()):
            self.outcome.broken = True
            return f"no task can begin: {self.unable_line}"
        aside = [a for a in self.outcome.set_aside if isinstance(a.task, Shard)]
        shards = any(r.cells for r in self.outcome.receipts)
        if shards or not aside:
            return None
        owed = any(isinstance(f.task, Shard | Together) for f in self.flying.values()) or self.again
        if len(aside) >= BREAKER or not owed:
            self.outcome.broken = True
            return f"every shard fails: {aside[0].line}"
        return None

    def abandon(self, reason: str) -> None:
        for handle in list(self.flying):
            self.pool.cancel(handle)
        self.flying.clear()
        self.outcome.stopped = reason
