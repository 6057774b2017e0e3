"""What commands print: the score table and the like, from tables; text only, no I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from rich.table import Table

from fimo import estimators
from fimo.orchestrator.run.plan import EstimateTask, Task, task_name

COLUMNS = 6
"""Amounts shown in the score table; all of them are in ``scores.parquet``."""
NAMES, CELL = 32, 15
"""Characters of a terminal's line that names and costs take in the score table, and an amount."""


SHOWN_SCORES = (("cosine", "baseline"), ("cosine", "mean"), ("spearman", "baseline"))
"""What a person is shown of metrics and adjustments: an adjustment moves no rank."""
METRIC_NAMES = {"lds": "LDS (Spearman over random groups)"}


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
        return f"estimator {label(task.estimator, task.params)}{task.span}"
    return task_name(task)


def score_table(
    scores: pa.Table,
    costs: pa.Table,
    coverage: Mapping[tuple[str, str], float] | None = None,
    metric: str = "cosine",
    adjust: str = "baseline",
    weight: float = 1.0,
    columns: int = COLUMNS,
) -> Table | None:
    """Estimator × amount against all seeds: score, share of the ceiling, 95% interval, and what the estimator cost.

    Args:
        coverage: share of the trainable scalars that an estimator's curvature covers; named where it is not all.
        weight: the removal weight; named where it is not 1.
        columns: amounts shown at most.
    """
    rows = [r for r in scores.to_pylist() if r["metric"] == metric and r["adjust"] == adjust]
    if not rows:
        return None
    seeds = max(r["seeds"] for r in rows)
    rows = [r for r in rows if r["seeds"] == seeds]
    steps = spread(sorted({r["step"] for r in rows}), columns)
    spent = {(c["name"], c["params"]): c["device_seconds"] for c in costs.to_pylist() if c["what"] == "estimator"}
    named = METRIC_NAMES.get(metric, metric)
    training = "further training" + (f" at removal weight {weight:g}" if weight != 1 else "")
    told = " (share of the ceiling), 95% interval" if any(r["ceiling"] is not None for r in rows) else ""
    title = f"{named} with {training}, {seeds} {'seed' if seeds == 1 else 'seeds'}, by step{told}"
    table = Table(title=title, title_justify="left")
    table.add_column("estimator")
    for step in steps:
        table.add_column(str(step), justify="right", no_wrap=True)
    table.add_column("seconds", justify="right")
    by_step = {(r["estimator"], r["params"], r["step"]): r for r in rows}
    for estimator, params in dict.fromkeys((r["estimator"], r["params"]) for r in rows):
        cells = [_score(by_step.get((estimator, params, step))) for step in steps]
        cost = spent.get((estimator, params))
        share = (coverage or {}).get((estimator, params), 1.0)
        name = label(estimator, params) + (f", covers {share:.0%}" if share < 1 else "")
        table.add_row(name, *cells, f"{cost:.1f}" if cost is not None else "")
    if told:
        ceilings = {r["step"]: r["ceiling"] for r in reversed(rows) if r["ceiling"] is not None}
        table.add_section()
        table.add_row("ceiling", *(number(ceilings.get(step)) for step in steps), "")
    return table


def score_tables(
    scores: pa.Table,
    costs: pa.Table,
    coverage: Mapping[tuple[str, str], float] | None = None,
    weight: float = 1.0,
    width: int | None = None,
) -> list[Table]:
    """The score tables that a person is shown: cosines, and the LDS if the removals are random groups.

    ``width``: of the terminal, which decides how many amounts are shown.
    """
    columns = COLUMNS if width is None else max(2, min(COLUMNS, (width - NAMES) // CELL))
    both = (
        score_table(scores, costs, coverage, metric, weight=weight, columns=columns) for metric in ("cosine", "lds")
    )
    return [table for table in both if table is not None]


def _score(row: dict[str, Any] | None) -> str:
    if row is None or row["score"] is None:
        return "–"
    share = "" if row["normalised"] is None else f" ({row['normalised']:.2f})"
    interval = "" if row["low"] is None else f"\n{row['low']:.2f} to {row['high']:.2f}"
    return f"{row['score']:.3f}{share}{interval}"


def trust_lines(reliability: Sequence[Mapping[str, Any]]) -> list[str]:
    """How far a sweep's own seeds can be trusted, for people: from the rows of ``reliability.parquet``."""
    rows = [r for r in reliability if r["measured"] and r["adjust"] == "baseline" and r["reliability"] is not None]
    if not rows:
        return []
    shown = [r for r in rows if r["step"] in spread([r["step"] for r in rows])]
    told = ", ".join(f"{r['reliability']:.2f} at step {r['step']}" for r in shown)
    pairs = ", ".join("–" if r["significant"] is None else f"{r['significant']:.0%}" for r in shown)
    seeds = rows[0]["seeds"]
    return [f"reliability of the mean over {seeds} seeds: {told}; pairs that can be told from zero: {pairs}"]


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


def proof_line(proof: Mapping[str, Any]) -> str:
    """A verdict on the engine for people."""
    if "refused" in proof:
        return f"engine refused on {proof.get('device')}: {proof['refused']}"
    differences = [
        f"{numbers.get('effects') or 0:.1e} in {precision}"
        for precision, numbers in sorted(dict(proof.get("precisions", {})).items(), reverse=True)
    ]
    given_up = "".join(f"; given up: {line}" for line in proof.get("lines", ()))
    return (
        f"engine proven on {proof.get('device')}: {proof.get('path')}, {proof.get('replicas')} cells together; effects "
        f"differ from the definition's by at most {', '.join(differences)}{given_up}"
    )


def status_lines(status: dict[str, Any]) -> list[str]:
    """``fimo status`` for people."""
    lines = [
        *status["warnings"],
        f"{status['sweep']}: {status['done']} of {status['cells']} cells done, {status['missing']} missing",
        f"seeds: {status['seeds_complete']} of {status['seeds']} whole, {status['seeds_begun']} begun",
        f"{status['parts']} parts, {size(status['part_bytes'])}",
    ]
    if status["last_commit_age_s"] is not None:
        pace = status["parts_per_minute"]
        lines.append(
            f"last commit {duration(status['last_commit_age_s'])} ago"
            + (f", {pace:.1f} parts a minute" if pace else "")
            + (f", done in about {duration(status['finish_in_s'])}" if status["finish_in_s"] else "")
        )
    if status["estimates_missing"]:
        lines.append(f"estimators still to run: {', '.join(status['estimates_missing'])}")
    if status["witnesses_missing"]:
        lines.append(f"{status['witnesses_missing']} witnesses of the noise floor still to train")
    lines += [f"no witnesses of seed {seed}: {why}" for seed, why in status["witnesses_left_out"].items()]
    lines += [f"{name} is left out of the default estimators: {why}" for name, why in status["left_out"].items()]
    lines += [proof_line(proof) for proof in status["proofs"]]
    lines += trust_lines(status["reliability"])
    if status["failed"]:
        lines.append(f"{len(status['failed'])} tasks set aside; the first: {status['failed'][0]}")
    if status["complete"]:
        lines.append("complete")
    elif status["resumable"]:
        lines.append(f"incomplete: `fimo resume {status['sweep']}` computes the rest")
    else:
        lines.append("incomplete: all that is missing was set aside")
    return lines
