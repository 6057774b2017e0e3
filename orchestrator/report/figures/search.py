"""The figure of a search over estimators: scores against the damping, a line for each step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fimo.orchestrator.report.figures.style import axes, drawn, legend, log_scale, shades
from fimo.orchestrator.report.show import spread
from fimo.workers.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = 6
"""Steps drawn, if no step is named: evenly spaced on a log scale."""


@drawn
def search_figure(table: pa.Table, step: int | None = None, ax: Axes | None = None) -> Axes:
    """Score against λ on a log axis: the searched half solid, the held-out half dashed, a line for each step.

    The best point of a step, chosen on the searched half, is marked by a dot, and the damping that its steps amount to,
    λ = 1/(ηt), by a dotted line, if the table has it.

    Args:
        table: ``search.parquet``; the estimator drawn is that of the best point over all steps, or the first that has
            dampings. Of several points of one damping the best is drawn.
        step: the one to draw; None = up to ``LINES`` of them.
        ax: where to draw; None = a figure of its own, ``ax.figure``.

    Raises:
        UsageError: the table has no point with a damping, or not this step.
    """
    rows = _drawn(table)
    steps = sorted({row["step"] for row in rows})
    if not rows or (step is not None and step not in steps):
        raise UsageError("no point of the search has a damping" if not rows else f"step {step} is not in the table")
    ax = axes(ax)
    chosen = [step] if step is not None else spread(steps, LINES)
    for shade, at in zip(shades(len(chosen)), chosen, strict=True):
        _line(ax, [row for row in rows if row["step"] == at], at, shade)
    log_scale(ax, [row["damping"] for row in rows])
    ax.set_xlabel(f"damping λ of {rows[0]['estimator']} (solid: searched half; dashed: held out; dotted: 1/(ηt))")
    ax.set_ylabel("agreement with further training")
    legend(ax)
    return ax


def _drawn(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of one estimator that have a damping above 0, a row for each step and damping, ascending."""
    rows = [row for row in table.to_pylist() if row["damping"] and row["searched"] is not None]
    overall = [row["estimator"] for row in rows if row["best_overall"]]
    name = (overall or [row["estimator"] for row in rows] or [""])[0]
    best: dict[tuple[int, float], dict[str, Any]] = {}
    for row in rows:
        key = row["step"], row["damping"]
        if row["estimator"] == name and (key not in best or row["searched"] > best[key]["searched"]):
            best[key] = row
    return [best[key] for key in sorted(best)]


def _line(ax: Axes, rows: list[dict[str, Any]], step: int, colour: Any) -> None:
    dampings = [row["damping"] for row in rows]
    ax.plot(dampings, [row["searched"] for row in rows], color=colour, label=f"step {step}")
    held = [float("nan") if row["score"] is None else row["score"] for row in rows]
    ax.plot(dampings, held, color=colour, linestyle="--")
    top = max(rows, key=lambda row: row["searched"])
    ax.plot([top["damping"]], [top["searched"]], color=colour, marker="o")
    if rows[0]["matched"] is not None:
        ax.axvline(rows[0]["matched"], color=colour, linestyle=":", linewidth=1)
