"""How far further training can be trusted, and what it does by itself: reliability, training-only effect, drift."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from fimo.orchestrator.report.figures.style import (
    FAINT,
    HARMFUL,
    HELPFUL,
    INK,
    axes,
    by_step,
    drawn,
    legend,
    log_scale,
    nothing,
    shades,
)
from fimo.orchestrator.report.show import spread
from fimo.orchestrator.tables.matrices import numbers, own_rows, steps_of, where

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@drawn
def reliability_by_seeds(reliability: pa.Table, adjust: str = "baseline", ax: Axes | None = None) -> Axes:
    """Reliability of a mean over k seeds, a line a step: the sweep's own as points, others extrapolated."""
    rows = where(reliability, adjust=adjust)
    steps = steps_of(rows)
    known = {s: [r for r in where(rows, step=s).to_pylist() if r["reliability"] is not None] for s in steps}
    chosen = spread([s for s in steps if known[s]], 5)
    ax = axes(ax)
    if not chosen:
        return nothing(ax, "reliability takes two seeds and two removals at least")
    for step, shade in zip(chosen, shades(len(chosen)), strict=True):
        line = sorted(known[step], key=lambda r: int(r["seeds"]))
        ax.plot([r["seeds"] for r in line], [r["reliability"] for r in line], color=shade, lw=1.3, label=f"step {step}")
        own = [r for r in line if r["measured"]]
        ax.plot([r["seeds"] for r in own], [r["reliability"] for r in own], ls="none", marker="o", ms=5, color=shade)
    log_scale(ax, [r["seeds"] for r in known[chosen[0]]])
    ax.axhline(0.95, color=FAINT, lw=1, ls=(0, (2, 2)))
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("seeds averaged (points: this sweep)")
    ax.set_ylabel("reliability of further training")
    legend(ax)
    return ax


@drawn
def reliability_by_amount(reliability: pa.Table, adjust: str = "baseline", ax: Axes | None = None) -> Axes:
    """Reliability of the sweep's own mean, and the share of effects that can be told from zero, by step."""
    rows = [r for r in own_rows(reliability, adjust) if r["reliability"] is not None]
    ax = axes(ax)
    if not rows:
        return nothing(ax, "reliability takes two seeds and two removals at least")
    steps = [r["step"] for r in rows]
    every = max(1, len(steps) // 12)
    for name, text, colour, marker in (
        ("reliability", "reliability", HELPFUL, "o"),
        ("significant", "share of effects told from zero", HARMFUL, "s"),
    ):
        values = [np.nan if r[name] is None else r[name] for r in rows]
        ax.plot(steps, values, color=colour, marker=marker, ms=4, lw=1.3, markevery=every, label=text)
    by_step(ax, steps)
    ax.set_ylim(0, 1.03)
    ax.set_ylabel(f"mean over {rows[0]['seeds']} seeds")
    legend(ax, 2)
    return ax


@drawn
def training_only_by_amount(training_only: pa.Table, ax: Axes | None = None) -> Axes:
    """What training on everything does to g by itself: median and quantiles over evaluation examples, by step."""
    steps = steps_of(training_only)
    ax = axes(ax)
    if not steps:
        return nothing(ax, "nothing is trained yet")
    found = np.array([np.nanquantile(_deltas(training_only, s), (0.05, 0.25, 0.5, 0.75, 0.95)) for s in steps])
    ax.fill_between(steps, found[:, 0], found[:, 4], color=HELPFUL, alpha=0.12, lw=0, label="5% to 95% of examples")
    ax.fill_between(steps, found[:, 1], found[:, 3], color=HELPFUL, alpha=0.25, lw=0, label="middle half")
    ax.plot(steps, found[:, 2], color=HELPFUL, lw=1.4, label="median")
    ax.axhline(0, color=INK, lw=0.8)
    by_step(ax, steps)
    ax.set_ylabel("training-only effect, in units of g")
    legend(ax)
    return ax


def _deltas(training_only: pa.Table, step: int) -> np.ndarray:
    values = numbers(where(training_only, step=step), "delta")
    return values if np.isfinite(values).any() else np.zeros(1)


@drawn
def drift_by_amount(amounts: pa.Table, ax: Axes | None = None) -> Axes:
    """How far training on everything moves the parameters: ‖Δθ‖ ± its standard error over seeds, by step."""
    rows = [r for r in amounts.sort_by("step").to_pylist() if r["distance"] is not None]
    ax = axes(ax)
    if not rows:
        return nothing(ax, "nothing is trained yet")
    steps, mean = [r["step"] for r in rows], np.array([r["distance"] for r in rows])
    sem = np.array([r["sem"] or 0.0 for r in rows])
    ax.fill_between(steps, mean - sem, mean + sem, color=HELPFUL, alpha=0.25, lw=0)
    ax.plot(steps, mean, color=HELPFUL, lw=1.4, marker="o", ms=3.5, markevery=max(1, len(steps) // 12))
    by_step(ax, steps)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("distance from the final model, ‖Δθ‖")
    return ax
