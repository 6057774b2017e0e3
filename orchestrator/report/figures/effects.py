"""The attribution itself: one evaluation example's effects in order, and all effects of a step as a histogram."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fimo.orchestrator.report.figures.style import BAND, FAINT, HARMFUL, HELPFUL, INK, axes, drawn, legend, nothing
from fimo.orchestrator.tables.matrices import effects_at, own_rows, steps_of
from fimo.orchestrator.tables.top import Effect, Top

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@drawn
def sorted_effects(top: Top, floor: float | None = None, ax: Axes | None = None) -> Axes:
    """One evaluation example's effects, the largest first, with 95% intervals; what rounding does as a grey band.

    Args:
        top: the example's effects (``fimo.orchestrator.tables.top``).
        floor: the noise floor, in units of g; None if it is not known.
    """
    ax = axes(ax)
    effects = top.effects
    if not effects:
        return nothing(ax, "no effects")
    if floor:
        ax.axhspan(-floor, floor, color=BAND, lw=0, label="what rounding does")
    place = np.arange(1, len(effects) + 1)
    for text, colour, marker, chosen in (
        ("helpful, told from zero", HELPFUL, "o", [bool(e.told) and e.helpful for e in effects]),
        ("harmful, told from zero", HARMFUL, "s", [bool(e.told) and not e.helpful for e in effects]),
        ("not told from zero", FAINT, ".", [not e.told for e in effects]),
    ):
        kept = np.array(chosen)
        if kept.any():
            mean = np.array([e.effect for e in effects])[kept]
            half = np.array([_half(e) for e in effects])[kept]
            ax.errorbar(place[kept], mean, half, ls="none", marker=marker, ms=4, lw=1, color=colour, label=text)
    ax.axhline(0, color=INK, lw=0.8)
    ax.set_xlabel(f"removals in order of their effect on evaluation example {top.eval}")
    ax.set_ylabel("effect, in units of g")
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    legend(ax, 2)
    return ax


def _half(effect: Effect) -> float:
    return 0.0 if effect.high is None else effect.high - effect.effect


@drawn
def effects_histogram(
    attribution: pa.Table, reliability: pa.Table, step: int | None = None, ax: Axes | None = None
) -> Axes:
    """All effects of a step (default: the last), of every removal on every evaluation example.

    The axis is linear near zero and logarithmic beyond, since effects span orders of magnitude; the grey band is what
    rounding does, the dashed lines the median standard error over seeds.
    """
    steps = steps_of(attribution)
    ax = axes(ax)
    if not steps:
        return nothing(ax, "nothing is trained yet")
    effects = effects_at(attribution, steps[-1] if step is None else step)
    values = effects.mean[np.isfinite(effects.mean)]
    size = float(np.abs(values).max(initial=0.0))
    if not size:
        return nothing(ax, "every effect is zero")
    near = max(float(np.median(np.abs(values))), size * 1e-4)
    edges = _edges(size, near)
    ax.hist(values, bins=edges, color=HELPFUL, alpha=0.75, lw=0)
    ax.set_xscale("asinh", linear_width=near)
    floor = noise_floor(reliability, effects.step)
    if floor:
        ax.axvspan(-floor, floor, color=BAND, lw=0, zorder=0, label="what rounding does")
    sem = effects.sem[np.isfinite(effects.sem)]
    if len(sem):
        middle = float(np.median(sem))
        ax.axvline(middle, color=INK, lw=1, ls=(0, (4, 2)), label="median standard error over seeds")
        ax.axvline(-middle, color=INK, lw=1, ls=(0, (4, 2)))
    _few_ticks(ax, size, near)
    ax.set_xlabel(f"effect in units of g, at step {effects.step}")
    ax.set_ylabel("removals × evaluation examples")
    legend(ax, 2)
    return ax


def _edges(size: float, near: float) -> Any:
    """Bins that are equally wide on the axis."""
    end = np.arcsinh(size * 1.0001 / near)
    return near * np.sinh(np.linspace(-end, end, 61))


def _few_ticks(ax: Axes, size: float, near: float) -> None:
    """At most three a side, so that a telephone can show them."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    first = 10.0 ** np.ceil(np.log10(near))
    powers = [first * 10.0**k for k in range(8) if first * 10.0**k <= size * 1.5] or [size]
    powers = powers[:: max(1, (len(powers) + 1) // 2)]
    ax.xaxis.set_major_locator(FixedLocator([*(-p for p in reversed(powers)), 0.0, *powers]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}" if value else "0"))


def noise_floor(reliability: pa.Table, step: int) -> float | None:
    """What rounding does to an effect at a step, root mean square over evaluation examples; None if not known."""
    return next((r["noise_floor"] for r in own_rows(reliability) if r["step"] == step), None)
