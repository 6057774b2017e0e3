"""Progress of a run on stderr: a live bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fimo.orchestrator.report.show import task_label
from fimo.orchestrator.run.driver import Listener
from fimo.orchestrator.run.plan import Plan, Shard, Task
from fimo.orchestrator.run.schedule import Failed, Lost, Result, error_line
from fimo.orchestrator.run.tasks import Receipt

LOG_EVERY_S = 10.0


class ProgressReport:
    """Tells a person how a run goes; use as a context manager and pass ``listener`` to the run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = console.is_terminal
        columns = [
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        ]
        self._bar = Progress(*columns, console=console, transient=True) if self._live else None
        self._cells, self._done, self._logged = 0, 0, 0.0
        self._bar_task = None if self._bar is None else self._bar.add_task("cells", total=None)

    def __enter__(self) -> ProgressReport:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def listener(self) -> Listener:
        """What a run calls."""
        return Listener(self._start, self._result, self.say)

    def _start(self, plan: Plan, tasks: int) -> None:
        self._cells, self._done = plan.cells, plan.done
        there = f", {plan.done} there already" if plan.done else ""
        self.say(f"{plan.cells} cells{there}; {len(plan.shards)} shards to train, {tasks} tasks in all")
        self._show()

    def _result(self, task: Task, result: Result) -> None:
        if isinstance(result, Receipt):
            self._done += result.cells
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
        self._show()

    def _show(self) -> None:
        if self._bar is not None and self._bar_task is not None:
            self._bar.update(self._bar_task, completed=self._done, total=self._cells)
        elif time.monotonic() - self._logged > LOG_EVERY_S or self._done == self._cells:
            self._logged = time.monotonic()
            self.say(f"{self._done} of {self._cells} cells done")

    def say(self, line: str) -> None:
        """One line of talk; the reduction of each seed is told on the bar alone, if there is one."""
        if line.startswith("reducing"):
            if self._bar is not None and self._bar_task is not None:
                self._bar.update(self._bar_task, description=line)
            return
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
