"""What ``fimo search`` prints of estimators: the best point of each step, and how it does where it was not chosen."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fimo.orchestrator.report.show import duration, labels, number, spread
from fimo.orchestrator.search.estimators import Found, Listener, Tried
from fimo.orchestrator.tables.halves import HalfScore

LOG_EVERY_S = 10.0
SHOWN = 8
"""Steps in the table; all of them are in ``search.parquet``."""


class SearchProgress:
    """Tells a person how a search goes; use as a context manager and pass ``listener`` to the search."""

    def __init__(self, console: Console, unit: str = "points") -> None:
        self._console, self._unit, self._of, self._done = console, unit, 0, 0
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(unit, total=None)
        self._logged = time.monotonic()

    def __enter__(self) -> SearchProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def listener(self) -> Listener:
        """What a search calls."""
        return Listener(self._start, self._result, self.say)

    def _start(self, of: int, done: int) -> None:
        self._of, self._done = of, done
        self._bar.update(self._task, total=of, completed=done)
        self.say(f"{of} {self._unit}, {done} there already" if done else f"{of} {self._unit}")

    def _result(self, name: str) -> None:
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        now = time.monotonic()
        if self._bar.disable and (self._done == self._of or now - self._logged > LOG_EVERY_S):
            self._logged = now
            self.say(f"{self._done} of {self._of} {self._unit} done")

    def say(self, line: str) -> None:
        """One line of talk; that a seed is reduced is not told."""
        if not line.startswith("reducing"):
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _name_of(found: Found) -> dict[tuple[str, str], str]:
    return labels((one.point.estimator, one.point.params) for one in found.tried)


def _row(one: Tried, step: int) -> HalfScore:
    return next(row for row in one.rows if row.step == step)


def found_table(found: Found, matched: dict[int, float | None]) -> Table:
    """The best point of up to ``SHOWN`` steps; ``matched``: the damping that each step amounts to."""
    names, known = _name_of(found), any(value is not None for value in matched.values())
    table = Table(title=f"best by {found.metric} on {found.searched} evaluation examples", title_justify="left")
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("point", overflow="fold")
    for name in ("searched", "held out", "95%", "ceiling", *(["1/(ηt)"] if known else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for step in spread([step for step in found.steps if step in found.best], SHOWN):
        one = found.tried[found.best[step]]
        row = _row(one, step)
        between = "–" if row.low is None or row.high is None else f"{row.low:.2f}…{row.high:.2f}"
        values = [number(row.searched), number(row.score), between, number(row.ceiling)]
        damping = matched.get(step)
        shown = [] if not known else ["–" if damping is None else f"{damping:.3g}"]
        table.add_row(str(step), names[one.point.estimator, one.point.params], *values, *shown)
    return table


def _means(one: Tried) -> tuple[float | None, float | None]:
    """Over steps, on the searched and on the held-out half."""
    each = [[v for v in (getattr(row, name) for row in one.rows) if v is not None] for name in ("searched", "score")]
    searched, held = (float(np.mean(values)) if values else None for values in each)
    return searched, held


def found_lines(found: Found) -> Iterator[str]:
    """The best point over all steps, what the columns are, and what could not be had."""
    names = _name_of(found)
    if found.overall is not None:
        one = found.tried[found.overall]
        searched, held = _means(one)
        name = names[one.point.estimator, one.point.params]
        yield f"best over {len(found.steps)} steps: {name}, searched {number(searched)}, held out {number(held)}"
    yield (
        f"searched: on the half of the evaluation examples that points are chosen by; held out: on the {found.held} "
        f"others; {found.seeds} seeds"
    )
    seconds = sum(one.seconds for one in found.tried)
    yield (
        f"{len(found.tried)} of {found.points} points, {found.computed} computed now in {duration(found.seconds)} "
        f"({seconds:.1f} device-seconds in all)"
    )
    failed = [one for one in found.tried if one.failed is not None]
    for one in failed[:3]:
        yield f"{names[one.point.estimator, one.point.params]}: {one.failed}"
    if len(failed) > 3:
        yield f"and {len(failed) - 3} more that cannot be had"


def found_json(found: Found, matched: dict[int, float | None]) -> dict[str, Any]:
    """The same as plain values; every point and step is in the table."""

    def told(place: int, step: int) -> dict[str, Any]:
        one = found.tried[place]
        return {**_point(one), **asdict(_row(one, step)), "matched_damping": matched.get(step)}

    overall = None
    if found.overall is not None:
        searched, held = _means(found.tried[found.overall])
        overall = {**_point(found.tried[found.overall]), "searched": searched, "score": held}
    return {
        "sweep": found.sweep,
        "metric": found.metric,
        "steps": list(found.steps),
        "points": found.points,
        "done": len(found.tried),
        "computed": found.computed,
        "searched_evals": found.searched,
        "held_out_evals": found.held,
        "seeds": found.seeds,
        "best": [told(place, step) for step, place in found.best.items()],
        "best_overall": overall,
        "failed": [{**_point(one), "why": one.failed} for one in found.tried if one.failed is not None],
        "seconds": found.seconds,
        "device_seconds": sum(one.seconds for one in found.tried),
        "stopped": found.stopped,
        "errors": list(found.errors),
        "exit_code": found.exit_code,
    }


def _point(one: Tried) -> dict[str, Any]:
    return {"estimator": one.point.estimator, "params": json.loads(one.point.params)}
