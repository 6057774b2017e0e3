"""Progress of a run on stderr: a live display on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from fimo.orchestrator.report.course import course_lines
from fimo.orchestrator.report.show import task_label
from fimo.orchestrator.run.course import Course
from fimo.orchestrator.run.driver import Listener
from fimo.orchestrator.run.plan import Plan
from fimo.orchestrator.run.results import Failed, Lost, Receipt, Result, error_line
from fimo.orchestrator.run.work import Shard, Work

LOG_EVERY_S, LOG_SHARE, LOG_AT_MOST_S = 10.0, 0.05, 300.0
"""Seconds between two log lines: at first, as a share of the time so far, and at most."""
WAITS_S = 5.0
"""Seconds of waiting after which it is said."""


@dataclass(frozen=True)
class _Shown:
    """A bar and a course, which is put in words when it is drawn: four times a second, not at every turn."""

    bar: Progress
    course: Course

    def __rich__(self) -> Group:
        return Group(self.bar, *(Text(line) for line in course_lines(self.course.json())))


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

    def _result(self, task: Work, result: Result) -> None:
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
            self._live.update(_Shown(self._bar, course))
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
