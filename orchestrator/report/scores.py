"""The score table, and how sure the sweep is that it is scored against; text only, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from rich.table import Table

from fimo.orchestrator.report.show import COLUMNS, labels, number, spread
from fimo.orchestrator.report.sparks import can_show, sparkline
from fimo.orchestrator.report.trust import trust_lines

WIDE = 160
"""Characters of a line if nobody says how many there are."""
METRIC_NAMES = {"lds": "LDS (Spearman over random groups)"}
LEAST, FEWEST = 3, 2
"""Amounts below which intervals are dropped, and below which names are folded."""
BORDER, SECONDS = 3, 7
"""Characters of a column beside its text, and of the column of costs."""
SPARK, CURVE = "0 to 1", 8
"""Heading of the column of curves, which is its least width, and how many characters a curve has at most."""


@dataclass(frozen=True)
class Layout:
    """What fits a line.

    Attributes:
        amounts: columns of scores; ``detailed``: each with its share of the ceiling and its interval; ``costs``: with a
            column of seconds; ``curve``: characters of a last column of curves over all steps, 0 = none.
    """

    amounts: int
    detailed: bool
    costs: bool
    curve: int = 0


def lay_out(width: int, names: int, steps: int | None = None) -> Layout:
    """What fits ``width`` characters beside names of ``names``: curves go first, intervals, then costs, names never.

    Args:
        steps: how many amounts there are to show, so that fewer leave room; None = as many as fit.
    """
    free = width - 1 - names - BORDER
    most = COLUMNS if steps is None else min(COLUMNS, steps)
    for detailed, cell, least in ((True, 13, LEAST), (False, 6, LEAST), (False, 6, FEWEST)):
        for costs in (True, False):
            room = free - (SECONDS + BORDER if costs else 0)
            amounts = room // (cell + BORDER)
            if amounts >= least:
                left = room - min(most, amounts) * (cell + BORDER) - BORDER
                return Layout(min(COLUMNS, amounts), detailed, costs, min(left, CURVE) if left >= len(SPARK) else 0)
    return Layout(FEWEST, False, False)


def score_table(
    scores: pa.Table,
    costs: pa.Table,
    coverage: Mapping[tuple[str, str], float] | None = None,
    metric: str = "cosine",
    adjust: str = "baseline",
    weight: float = 1.0,
    width: int = WIDE,
    encoding: str = "utf-8",
) -> Table | None:
    """Estimator × amount against all seeds: score, share of the ceiling, 95% interval, what the estimator cost, and its
    scores at all recorded steps as a curve from 0 to 1.

    Args:
        coverage: share of the trainable scalars that an estimator's curvature covers; named where it is not all.
        weight: the removal weight; named where it is not 1.
        width: characters of a line.
        encoding: of the output; curves are for those that have their characters.
    """
    rows = [r for r in scores.to_pylist() if r["metric"] == metric and r["adjust"] == adjust]
    if not rows:
        return None
    rows = [r for r in rows if r["seeds"] == max(r["seeds"] for r in rows)]
    names = _names(rows, coverage or {})
    every = sorted({r["step"] for r in rows})
    layout = lay_out(width, max(map(len, ("estimator", *names.values()))), len(every))
    steps = spread(every, layout.amounts)
    curved = layout.curve > 0 and len(every) > 1 and can_show(encoding)
    spent = {(c["name"], c["params"]): c["device_seconds"] for c in costs.to_pylist() if c["what"] == "estimator"}
    bounded = any(r["ceiling"] is not None for r in rows)
    table = Table(title=_title(rows, metric, weight, bounded and layout.detailed), title_justify="left")
    table.add_column("estimator", overflow="fold")
    for step in steps:
        table.add_column(str(step), justify="right", no_wrap=True)
    if layout.costs:
        table.add_column("seconds", justify="right", no_wrap=True)
    if curved:
        table.add_column(SPARK, no_wrap=True)
    by_step = {(r["estimator"], r["params"], r["step"]): r for r in rows}
    for named, name in names.items():
        cells = [_score(by_step.get((*named, step)), layout.detailed) for step in steps]
        cost = spent.get(named)
        last = [f"{cost:.1f}" if cost is not None else ""] if layout.costs else []
        if curved:
            last.append(sparkline([by_step.get((*named, step), {}).get("score") for step in every], layout.curve))
        table.add_row(name, *cells, *last)
    if bounded:
        ceilings = {r["step"]: r["ceiling"] for r in reversed(rows) if r["ceiling"] is not None}
        last = ([""] if layout.costs else []) + (
            [sparkline([ceilings.get(step) for step in every], layout.curve)] if curved else []
        )
        table.add_section()
        table.add_row("ceiling", *(number(ceilings.get(step)) for step in steps), *last)
    table.caption, table.caption_justify = _undefined([r for r in rows if r["step"] in steps]), "left"
    return table


def _names(rows: Sequence[Mapping[str, Any]], coverage: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], str]:
    plain = labels((r["estimator"], r["params"]) for r in rows)
    return {
        named: name + (f", covers {coverage[named]:.0%}" if coverage.get(named, 1.0) < 1 else "")
        for named, name in plain.items()
    }


def _title(rows: Sequence[Mapping[str, Any]], metric: str, weight: float, told: bool) -> str:
    seeds = rows[0]["seeds"]
    training = "further training" + (f" at removal weight {weight:g}" if weight != 1 else "")
    title = f"{METRIC_NAMES.get(metric, metric)} with {training}, {seeds} {'seed' if seeds == 1 else 'seeds'}, by step"
    return title + (" (share of the ceiling), 95% interval" if told else "")


def _undefined(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What the mark of undefined evaluation examples means; None if there are none."""
    most = max((r["undefined"] for r in rows), default=0)
    if not most:
        return None
    every = max(r["evals"] + r["undefined"] for r in rows)
    return (
        f"*: up to {most} of {every} evaluation examples, whose effects or estimates are constant or under the noise "
        "floor, are in no mean"
    )


def score_tables(
    scores: pa.Table,
    costs: pa.Table,
    coverage: Mapping[tuple[str, str], float] | None = None,
    weight: float = 1.0,
    width: int | None = None,
    encoding: str = "utf-8",
) -> list[Table]:
    """The score tables that a person is shown: cosines, and the LDS if the removals are random groups.

    ``width``, ``encoding``: of the terminal.
    """
    both = (
        score_table(scores, costs, coverage, metric, weight=weight, width=width or WIDE, encoding=encoding)
        for metric in ("cosine", "lds")
    )
    return [table for table in both if table is not None]


def _score(row: Mapping[str, Any] | None, detailed: bool) -> str:
    if row is None:
        return "–"
    mark = "*" if row["undefined"] else ""
    if row["score"] is None:
        return "undefined" if row["undefined"] and detailed else f"–{mark}"
    if not detailed:
        return f"{row['score']:.3f}{mark}"
    share = "" if row["normalised"] is None else f" ({row['normalised']:.2f})"
    interval = "" if row["low"] is None else f"\n{row['low']:.2f} to {row['high']:.2f}"
    return f"{row['score']:.3f}{mark}{share}{interval}"


def sure_lines(tables: Mapping[str, pa.Table]) -> list[str]:
    """One sentence that says how sure the sweep is, to stand above its scores; or why there are none."""
    removals, estimates = len(tables["removals"]), len(tables["estimates"])
    lines = [] if len(tables["scores"]) or not estimates or not len(tables["attribution"]) else [_no_score(removals)]
    return trust_lines(tables["reliability"].to_pylist()) + lines


def _no_score(removals: int) -> str:
    if removals == 1:
        return (
            "no scores: a score compares effects over removals, and there is one; `fimo top` shows its effects, more "
            "removals give scores"
        )
    return "no scores: no evaluation example has effects of every removal yet"
