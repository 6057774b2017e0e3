"""Progress of a run on stderr: a live display on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from fimo.orchestrator.report.show import duration, task_label
from fimo.orchestrator.run.course import Course
from fimo.orchestrator.run.driver import Listener
from fimo.orchestrator.run.places import Failed, Lost, Result
from fimo.orchestrator.run.plan import Plan, Shard, Task
from fimo.orchestrator.run.schedule import error_line
from fimo.orchestrator.run.tasks import Receipt

LOG_EVERY_S, LOG_SHARE, LOG_AT_MOST_S = 10.0, 0.05, 300.0
"""Seconds between two log lines: at first, as a share of the time so far, and at most."""
WAITS_S = 5.0
"""Seconds of waiting after which it is said."""
SHOWN = 6
"""Running tasks that are named."""


class ProgressReport:
    """Tells a person how a run goes; use as a context manager and pass ``listener`` to the run.

    ``cells``: whether it trains any; else its tasks are counted alone.
    """

    def __init__(self, console: Console, cells: bool = True) -> None:
        self.console = console
        self._trains, self._unit = cells, "cells" if cells else "estimates"
        self._of = self._done = 0
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        self._bar = Progress(*columns, console=console)
        self._bar_task = self._bar.add_task(self._unit, total=None)
        self._live = Live(console=console, transient=True, refresh_per_second=4) if console.is_terminal else None
        self._waits: str | None = None
        self._began = self._logged = time.monotonic()

    def __enter__(self) -> ProgressReport:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def listener(self) -> Listener:
        """What a run calls."""
        return Listener(self._start, self._result, self.say, self._turn)

    def _start(self, plan: Plan, tasks: int) -> None:
        self._of, self._done = (plan.cells, plan.done) if self._trains else (tasks, 0)
        if not self._trains:
            self.say(f"{tasks} {'task' if tasks == 1 else 'tasks'} of estimates alone; no cell is trained")
            return
        there = f", {plan.done} there already" if plan.done else ""
        self.say(f"{plan.cells} cells{there}; {len(plan.shards)} shards to train, {tasks} tasks in all")

    def _result(self, task: Task, result: Result) -> None:
        if isinstance(result, Receipt):
            self._done += result.cells if self._trains else 1
            if self._live is None and self._done == self._of and (result.cells or not self._trains):
                self.say(f"{self._done} of {self._of} {self._unit} done")
            for line in result.lines:
                self.say(line)
            if result.diverged:
                self.say(f"{task_label(task)}: {result.diverged} runs diverged (not finite) and will not be averaged")
            if not isinstance(task, Shard):
                self.say(f"{task_label(task)}: {result.seconds:.1f} s")
        elif isinstance(result, Lost):
            self.say(f"{task_label(task)}: lost ({result.reason}); queued again")
        elif isinstance(result, Failed):
            self.say(f"{task_label(task)}: {error_line(result.error)}")

    def _turn(self, course: Course) -> None:
        now = time.monotonic()
        self._wait(course, now)
        done, of = (course.done, course.cells) if self._trains else (self._done, self._of)
        if self._live is not None:
            self._bar.update(self._bar_task, completed=done, total=of)
            self._live.update(Group(self._bar, *(Text(line) for line in course_lines(course.json()))))
        elif now - self._logged > min(LOG_AT_MOST_S, max(LOG_EVERY_S, LOG_SHARE * (now - self._began))):
            self._logged = now
            self.say("; ".join([f"{done} of {of} {self._unit} done", *course_lines(course.json())]))

    def _wait(self, course: Course, now: float) -> None:
        """Say once what the run waits for, when it has for a while."""
        waits, since = course.waits or (None, now)
        if waits is not None and waits != self._waits and now - since > WAITS_S:
            self._waits = waits
            self.say(f"waiting for {waits}")
        elif waits is None:
            self._waits = None

    def say(self, line: str) -> None:
        """One line of talk; the reduction of each seed is told on the live display alone, if there is one."""
        if line.startswith("reducing"):
            if self._live is not None:
                self._live.update(Text(line))
            return
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def course_lines(course: Mapping[str, Any]) -> list[str]:
    """How fast, what runs and what is left, from a ``Course`` as JSON; a line each, those that there are."""
    lines = []
    if course.get("cells_per_second"):
        left = course.get("finish_in_s")
        until = f", its cells done in about {duration(left)}" if left is not None else ""
        lines.append(f"{_pace(course['cells_per_second'])}{until}")
    waits = course.get("waits")
    if isinstance(waits, Mapping):
        lines.append(f"waits for {waits.get('for')} ({duration(float(waits.get('seconds', 0)))} so far)")
    running = [f"{task['task']} ({duration(task['seconds'])})" for task in course["running"] if not waits]
    if running:
        more = f" and {len(running) - SHOWN} more" if len(running) > SHOWN else ""
        lines.append(f"running: {', '.join(running[:SHOWN])}{more}")
    if course["left"]:
        lines.append(f"not finished: {_left(course['left'])}")
    return lines


def _pace(cells_per_second: float) -> str:
    if cells_per_second >= 0.1:
        return f"{cells_per_second:.2g} cells a second"
    return f"{cells_per_second * 3600:.2g} cells an hour"


def _left(left: Mapping[str, int]) -> str:
    """Tasks by name: "6 shards, datainf, 3 of cg, 1 witness"."""
    plural = {"shard": "shards", "witness": "witnesses"}
    told: Sequence[str] = [
        f"{count} {name if count == 1 else plural[name]}" if name in plural else name + (f" × {count}" * (count > 1))
        for name, count in left.items()
    ]
    return ", ".join(told)
