"""What commands print: the score table and the like, from tables; text only, no I/O."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from fimo.orchestrator.run.tasks import EstimateTask, Task, task_name
from rich.table import Table

from fimo import estimators

COLUMNS = 6
"""Amounts shown in the score table; all of them are in ``scores.parquet``."""


def spread(steps: Sequence[int], count: int = COLUMNS) -> list[int]:
    """At most ``count`` of the steps, the first and the last among them, evenly spaced on a log scale."""
    if len(steps) <= count:
        return list(steps)
    ratio = (len(steps) - 1) ** (1 / (count - 1))
    places = sorted({round(ratio**i) if i else 0 for i in range(count)} | {len(steps) - 1})
    return [steps[p] for p in places if p < len(steps)]


def label(estimator: str, params: str) -> str:
    """An estimator with the hyper-parameters that are not its defaults."""
    if estimator not in estimators.REGISTRY:
        return f"{estimator} (imported)"
    [plain] = estimators.parse(estimator)
    usual = plain.params()
    values: dict[str, Any] = {k: v for k, v in json.loads(params).items() if v != usual.get(k)}
    shown = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
    return f"{estimator} ({shown})" if shown else estimator


def task_label(task: Task) -> str:
    """A task in a line of progress."""
    if isinstance(task, EstimateTask):
        return f"estimator {label(task.estimator, task.params)}"
    return task_name(task)


def score_table(scores: pa.Table, costs: pa.Table, metric: str = "cosine", adjust: str = "baseline") -> Table | None:
    """Estimator × amount: mean score ± standard error over evaluation examples against all seeds, with its cost."""
    rows = [r for r in scores.to_pylist() if r["metric"] == metric and r["adjust"] == adjust]
    if not rows:
        return None
    seeds = max(r["seeds"] for r in rows)
    rows = [r for r in rows if r["seeds"] == seeds]
    steps = spread(sorted({r["step"] for r in rows}))
    spent = {(c["name"], c["params"]): c["device_seconds"] for c in costs.to_pylist() if c["what"] == "estimator"}
    title = f"{metric} with further training, {seeds} seeds, by step (mean ± SEM over evaluation examples)"
    table = Table(title=title, title_justify="left")
    table.add_column("estimator", no_wrap=True)
    for step in steps:
        table.add_column(str(step), justify="right", no_wrap=True)
    table.add_column("seconds", justify="right")
    found = {(r["estimator"], r["params"], r["step"]): r for r in rows}
    for estimator, params in dict.fromkeys((r["estimator"], r["params"]) for r in rows):
        cells = [_score(found.get((estimator, params, step))) for step in steps]
        cost = spent.get((estimator, params))
        table.add_row(label(estimator, params), *cells, f"{cost:.1f}" if cost is not None else "")
    return table


def _score(row: dict[str, Any] | None) -> str:
    if row is None or row["score"] is None:
        return "–"
    return f"{row['score']:.3f}" + (f" ± {row['sem']:.3f}" if row["sem"] is not None else "")


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


def plan_lines(found: dict[str, Any]) -> list[str]:
    """``fimo plan`` for people."""
    there = f" ({found['done']} there already)" if found["done"] else ""
    lines = [
        f"{found['name']}: {found['removals']} removals × {found['seeds']} seeds = {found['cells']} cells{there}",
        f"{found['shards']} shards to train, {found['steps']} steps a cell, evaluated at {found['amounts']} amounts on "
        f"{found['evals']} evaluation examples",
        f"{found['scalars']} trainable scalars, {found['train']} training examples, "
        f"removal mode {found['removal_mode']}",
        f"about {size(found['bytes'])} of rows before compression",
        f"estimators: {', '.join(found['estimators']) or 'none'}",
        f"digest {found['digest'][:32]}",
    ]
    if "device_hours" in found:
        lines.append(
            f"measured on this {found['device']}: {found['replicas']} replicas together, "
            f"{found['seconds_per_cell']:.2f} s a cell; {found['device_hours']:.3g} device-hours for what is missing"
        )
    return lines


def status_lines(found: dict[str, Any]) -> list[str]:
    """``fimo status`` for people."""
    lines = [
        f"{found['sweep']}: {found['done']} of {found['cells']} cells done, {found['missing']} missing",
        f"seeds: {found['seeds_complete']} of {found['seeds']} whole, {found['seeds_begun']} begun",
        f"{found['parts']} parts, {size(found['part_bytes'])}",
    ]
    if found["last_commit_age_s"] is not None:
        pace = found["parts_per_minute"]
        lines.append(
            f"last commit {duration(found['last_commit_age_s'])} ago"
            + (f", {pace:.1f} parts a minute" if pace else "")
            + (f", done in about {duration(found['finish_in_s'])}" if found["finish_in_s"] else "")
        )
    if found["estimates_missing"]:
        lines.append(f"estimators still to run: {', '.join(found['estimates_missing'])}")
    if found["failed"]:
        lines.append(f"{len(found['failed'])} tasks set aside; the first: {found['failed'][0]}")
    lines.append("complete" if found["complete"] else f"incomplete: `fimo resume {found['sweep']}` computes the rest")
    return lines
