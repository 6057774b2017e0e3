"""The course of a run: what is done, what runs, what is left; for whoever shows it, and never the truth of a sweep."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from fimo.orchestrator.run.work import EstimateTask, Task, WitnessTask, Work, task_name


@dataclass
class Course:
    """How far a driver is with its tasks.

    Attributes:
        cells: of the sweep; ``done``: of them, those that the store had and those that were trained since.
        left: tasks that are not finished, by kind: ``shard``, ``witness`` or an estimator's name.
        waits: what the run waits for, if it does, with when that began on the monotonic clock.
        trained: cells trained by this driver; ``began``: when it started, on the monotonic clock.
    """

    cells: int
    done: int
    left: Counter[str] = field(default_factory=Counter)
    waits: tuple[str, float] | None = None
    trained: int = 0
    began: float = field(default_factory=time.monotonic)
    _running: tuple[float, Sequence[tuple[Work, float]]] = (0.0, ())

    @classmethod
    def of(cls, cells: int, done: int, tasks: Sequence[Task]) -> Course:
        """At the start of a run of some tasks."""
        return cls(cells, done, Counter(kind_of(task) for task in tasks))

    def finish(self, task: Work, cells: int) -> None:
        """Note a task that is done, with the cells that it trained."""
        left = Counter(self.left)
        left[kind_of(task)] -= 1
        # Put in its place whole, since a heartbeat reads it from another thread; what is at zero is dropped.
        self.left = +left
        self.done, self.trained = self.done + cells, self.trained + cells

    def by_others(self, before: Sequence[Task], after: Sequence[Task], cells: int) -> None:
        """Note that of some tasks only ``after`` are left, since other drivers have trained ``cells`` of them."""
        left = Counter(self.left)
        left.subtract(kind_of(task) for task in before)
        left.update(kind_of(task) for task in after)
        self.left, self.done = +left, self.done + cells

    def run(self, running: Sequence[tuple[Work, float]], waits: str | None = None) -> None:
        """Note what runs now, each with its seconds so far, and what the run waits for."""
        now = time.monotonic()
        if waits is None or self.waits is None or self.waits[0] != waits:
            self.waits = None if waits is None else (waits, now)
        # Told at every turn, and asked for every few seconds: put in words when it is asked for.
        self._running = now, running

    @property
    def running(self) -> list[tuple[str, float]]:
        """(task in words, when it began on the monotonic clock) of every task that runs, the longest first."""
        told, running = self._running
        return sorted(((_named(task), told - seconds) for task, seconds in running), key=itemgetter(1))

    @property
    def elapsed_s(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    @property
    def pace(self) -> float | None:
        """Cells a second since the start; None before the first."""
        return self.trained / max(self.elapsed_s, 1e-9) if self.trained else None

    @property
    def finish_in_s(self) -> float | None:
        """Until the cells are trained at this pace; None while it is not known, or no cell is missing."""
        return (self.cells - self.done) / self.pace if self.pace and self.cells > self.done else None

    def json(self) -> dict[str, Any]:
        """As plain values."""
        # Read once: the run goes on in another thread.
        now, waits = time.monotonic(), self.waits
        return {
            "cells": self.cells,
            "done": self.done,
            "left": dict(sorted(self.left.items())),
            "running": [{"task": name, "seconds": round(now - began, 1)} for name, began in self.running],
            "waits": None if waits is None else {"for": waits[0], "seconds": round(now - waits[1], 1)},
            "elapsed_s": round(self.elapsed_s, 1),
            "cells_per_second": self.pace,
            "finish_in_s": self.finish_in_s,
        }


def kind_of(task: Work) -> str:
    """What a task counts as among those that are left."""
    if isinstance(task, EstimateTask):
        return task.estimator
    return "witness" if isinstance(task, WitnessTask) else "shard"


def _named(task: Work) -> str:
    return f"estimator {task.estimator}{task.span}" if isinstance(task, EstimateTask) else task_name(task)
