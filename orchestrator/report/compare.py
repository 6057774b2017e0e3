"""What ``fimo compare`` prints: a table for each adjustment and metric, from the comparison; text only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from fimo.orchestrator.report.show import number, spread
from fimo.orchestrator.run.comparing import Comparison

SHOWN = 10
"""Pairs of steps shown in a table; all of them are in the file of ``--to`` and in ``--json``."""

SHOWN_METRICS = (("cosine", "baseline"), ("cosine", "mean"), ("spearman", "baseline"))
TITLES = {"baseline": "effects against the training-only effect", "mean": "effects centred over the removals"}


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """A comparison as plain values."""
    return {
        "sweep": comparison.sweep,
        "other": comparison.other,
        "differences": {key: list(values) for key, values in comparison.differences.items()},
        "removals": comparison.removals,
        "evals": comparison.evals,
        "complete": comparison.complete,
        "notes": list(comparison.notes),
        "rows": comparison.table.to_pylist(),
        "exit_code": 0 if comparison.complete else 3,
    }


def heading(comparison: Comparison) -> Iterator[str]:
    """What is compared, in lines."""
    yield f"{comparison.sweep} against {comparison.other}"
    yield f"{comparison.removals} common removals, {comparison.evals} common evaluation examples"
    for key, (own, other) in comparison.differences.items():
        yield f"{key}: {_value(own)} against {_value(other)}"


def comparison_tables(comparison: Comparison) -> Iterator[Table]:
    """Agreement by pair of steps: mean ± standard error over evaluation examples, with what it could be at most.

    Spearman's is shown once: an adjustment moves all removals of an evaluation example alike, and no rank.
    """
    rows = comparison.table.to_pylist()
    for metric, adjust in SHOWN_METRICS:
        chosen = [row for row in rows if (row["metric"], row["adjust"]) == (metric, adjust)]
        if chosen:
            yield _table(f"{metric}, {TITLES[adjust]} (adjust: {adjust})", chosen)


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    names = ("step", "other step", "score", "ceiling", "other ceiling", "joint ceiling", "normalised", "evals")
    for name in names:
        table.add_column(name, justify="right", no_wrap=name == "score")
    for place in spread(range(len(rows)), SHOWN):
        row = rows[place]
        score = number(row["score"]) + (f" ± {row['sem']:.3f}" if row["sem"] is not None else "")
        ceilings = (number(row[n]) for n in ("ceiling", "other_ceiling", "joint_ceiling", "normalised"))
        table.add_row(str(row["step"]), str(row["other_step"]), score, *ceilings, str(row["evals"]))
    return table


def _value(value: Any) -> str:
    return "none" if value is None else str(value)
