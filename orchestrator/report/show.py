"""What commands print: the score table and the like, from tables; text only, no I/O."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from fimo.estimators import declared
from fimo.orchestrator.run.work import EstimateTask, Work, task_name

COLUMNS = 6
"""Amounts shown in the score table; all of them are in ``scores.parquet``."""
SHOWN_SCORES = (("cosine", "baseline"), ("cosine", "mean"), ("spearman", "baseline"))
"""What a person is shown of metrics and adjustments: an adjustment moves no rank."""


def spread(steps: Sequence[int], count: int = COLUMNS) -> list[int]:
    """At most ``count`` of the steps, the first and the last among them, evenly spaced on a log scale."""
    if len(steps) <= count:
        return list(steps)
    ratio = (len(steps) - 1) ** (1 / (count - 1))
    places = sorted({round(ratio**i) if i else 0 for i in range(count)} | {len(steps) - 1})
    return [steps[p] for p in places if p < len(steps)]


def label(estimator: str, params: str, swept: Collection[str] = ()) -> str:
    """An estimator with the hyper-parameters that are not its defaults, and those that are ``swept``."""
    if estimator not in declared.DECLARED:
        return f"{estimator} (imported)"
    [plain] = declared.parse(estimator)
    usual, given = plain.params(), dict[str, Any](json.loads(params))
    values = {k: v for k, v in given.items() if v != usual.get(k) or k in swept}
    shown = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
    return f"{estimator} ({shown})" if shown else estimator


def labels(entries: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Each (estimator, params) by its label, in which what differs between entries of one estimator is always shown."""
    kept = list(dict.fromkeys(entries))
    found: dict[tuple[str, str], str] = {}
    for estimator, params in kept:
        others = [json.loads(p) for name, p in kept if name == estimator] if estimator in declared.DECLARED else []
        swept = {key for other in others for key in other if any(o.get(key) != other[key] for o in others)}
        found[estimator, params] = label(estimator, params, swept)
    return found


def task_label(task: Work) -> str:
    """A task in a line of progress."""
    if isinstance(task, EstimateTask):
        return f"estimator {label(task.estimator, task.params)}{task.span}"
    return task_name(task)


def number(value: float | None) -> str:
    """A figure for people."""
    return "–" if value is None else f"{value:.3f}"


def scored(row: Mapping[str, Any]) -> str:
    """A score with its interval for people."""
    if row["score"] is None:
        return "–"
    interval = "" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
    return f"{row['score']:.3f}{interval}"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
