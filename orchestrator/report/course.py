"""The course of a run in words: pace, running tasks, what is left; text only, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fimo.orchestrator.report.show import duration

SHOWN = 6
"""Running tasks that are named."""


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
