"""How close estimators come to further training: by amount, by seeds averaged, by evaluation example, by cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fimo.orchestrator.report.figures.style import (
    FAINT,
    INK,
    SIZE,
    Named,
    axes,
    by_step,
    drawn,
    legend,
    log_scale,
    looks,
    nothing,
)
from fimo.orchestrator.report.show import labels
from fimo.orchestrator.tables.matrices import (
    agreement_by_example,
    at_seeds,
    effects_at,
    estimate_at,
    numbers,
    steps_of,
    where,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = {"cosine": "cosine", "spearman": "Spearman", "lds": "LDS"}


def entries(table: pa.Table) -> list[Named]:
    """The (estimator, params) of a table in its order."""
    # In one thread groups come in the order in which they are met.
    found = table.select(["estimator", "params"]).group_by(["estimator", "params"], use_threads=False).aggregate([])
    return list(zip(found["estimator"].to_pylist(), found["params"].to_pylist(), strict=True))


def of_all_seeds(scores: pa.Table, metric: str, adjust: str) -> pa.Table:
    """The rows of all seeds for a metric and an adjustment."""
    rows = where(scores, metric=metric, adjust=adjust)
    return where(rows, seeds=pc.max(rows["seeds"]).as_py()) if len(rows) else rows


def last_scores(
    scores: pa.Table, step: int | None = None, metric: str = "cosine", adjust: str = "baseline"
) -> pa.Table:
    """The rows of all seeds at a step (default: the last)."""
    rows = of_all_seeds(scores, metric, adjust)
    steps = steps_of(rows) if len(rows) else []
    return where(rows, step=steps[-1] if step is None else step) if steps else rows


@drawn
def score_by_amount(scores: pa.Table, metric: str = "cosine", adjust: str = "baseline", ax: Axes | None = None) -> Axes:
    """Scores of all seeds against the amount of further training, with 95% intervals and the ceiling.

    Args:
        scores: ``scores.parquet``. ``metric``, ``adjust``: as there. ``ax``: to draw on; default: a figure of its own.
    """
    rows = of_all_seeds(scores, metric, adjust)
    ax = axes(ax)
    if not len(rows):
        return nothing(ax, "no scores yet")
    named = entries(rows)
    look, names = looks(entries(scores)), labels(named)
    for one in named:
        own = where(rows, estimator=one[0], params=one[1]).sort_by("step")
        step, score = numbers(own, "step"), numbers(own, "score")
        ax.plot(step, score, label=names[one], **look[one].plot(), markevery=_every(len(step)))
        ax.fill_between(step, numbers(own, "low"), numbers(own, "high"), color=look[one].colour, alpha=0.12, lw=0)
    _ceiling(ax, rows)
    by_step(ax, steps_of(rows))
    ax.set_ylabel(f"{METRICS[metric]} with further training")
    ax.set_ylim(min(-0.05, ax.get_ylim()[0]), 1.03)
    legend(ax)
    return ax


def _every(count: int) -> int:
    """Markers on at most a dozen points of a line."""
    return max(1, count // 12)


def _ceiling(ax: Axes, rows: pa.Table) -> None:
    """The highest score that an estimate is expected to reach, by step."""
    known = {r["step"]: r["ceiling"] for r in rows.to_pylist() if r["ceiling"] is not None}
    if known:
        steps = sorted(known)
        ax.plot(steps, [known[s] for s in steps], color=INK, lw=1.1, ls=(0, (6, 3)), label="ceiling")


@drawn
def score_by_seeds(
    scores: pa.Table, reliability: pa.Table, step: int | None = None, adjust: str = "baseline", ax: Axes | None = None
) -> Axes:
    """Cosines against averages of k seeds as measured (points), and by the law that extrapolates them (lines).

    The law: an estimate's score is a fixed share of the ceiling, which is known for any number of seeds
    (``tables.matrices.at_seeds``). Lines left of the last point are the law's too, so that it can be judged.
    """
    rows = where(scores, metric="cosine", adjust=adjust)
    ax = axes(ax)
    if not len(rows):
        return nothing(ax, "no scores yet")
    step = steps_of(rows)[-1] if step is None else step
    rows = where(rows, step=step)
    named = entries(rows)
    look, names = looks(entries(scores)), labels(named)
    ceilings = ceiling_by_seeds(reliability, step, adjust)
    for one in named:
        own = where(rows, estimator=one[0], params=one[1]).sort_by("seeds")
        kind = look[one]
        ax.plot(numbers(own, "seeds"), numbers(own, "score"), label=names[one], **{**kind.plot(), "linestyle": "none"})
        law = by_law(own.to_pylist(), ceilings)
        if law:
            ax.plot([k for k, _ in law], [s for _, s in law], color=kind.colour, lw=1.0, ls=kind.line)
    if ceilings:
        ax.plot(list(ceilings), list(ceilings.values()), color=INK, lw=1.1, ls=(0, (6, 3)), label="ceiling")
    log_scale(ax, [1, *ceilings])
    ax.set_xlabel(f"seeds averaged, at step {step}")
    ax.set_ylabel("cosine with further training")
    ax.set_ylim(min(-0.05, ax.get_ylim()[0]), 1.03)
    legend(ax)
    return ax


def ceiling_by_seeds(reliability: pa.Table, step: int, adjust: str = "baseline") -> dict[int, float]:
    """The ceiling of a cosine for every number of seeds that ``reliability.parquet`` tells, at a step."""
    rows = where(where(reliability, adjust=adjust), step=step).to_pylist()
    return {r["seeds"]: r["ceiling"] for r in sorted(rows, key=lambda r: int(r["seeds"])) if r["ceiling"] is not None}


def by_law(rows: Sequence[Mapping[str, Any]], ceilings: Mapping[int, float]) -> list[tuple[int, float]]:
    """(seeds, expected score) at every number of seeds with a ceiling; none if the last score has none.

    Args:
        rows: one estimator's rows at a step, by seeds.
    """
    last = rows[-1]
    if last["score"] is None or not last["ceiling"]:
        return []
    return [(k, at_seeds(last["score"], last["ceiling"], ceiling)) for k, ceiling in ceilings.items()]


@drawn
def score_by_example(
    attribution: pa.Table, estimates: pa.Table, step: int | None = None, ax: Axes | None = None
) -> Axes:
    """Each evaluation example's cosine, for every estimator: a point an example, a bar at the mean (the score)."""
    steps = steps_of(attribution)
    named = entries(estimates)
    if not steps or not named:
        return nothing(axes(ax), "no effects or no estimates yet")
    ax = axes(ax, (SIZE[0], 0.9 + 0.32 * len(named)))
    effects = effects_at(attribution, steps[-1] if step is None else step)
    look, names = looks(named), labels(named)
    drop = np.random.default_rng(0)
    shown: list[str] = []
    for one in named:
        values = estimate_at(estimates, one, effects)
        if values is None:
            continue
        agreement = agreement_by_example(effects, values)
        agreement = agreement[~np.isnan(agreement)]
        if not len(agreement):
            continue
        height = -len(shown) + drop.uniform(-0.28, 0.28, len(agreement))
        ax.plot(agreement, height, ls="none", marker=".", ms=3, color=look[one].colour, alpha=0.45)
        ax.plot([agreement.mean()] * 2, [-len(shown) - 0.36, -len(shown) + 0.36], color=look[one].colour, lw=2)
        shown.append(names[one])
    if not shown:
        return nothing(ax, "no estimate can be compared with further training yet")
    ax.set_yticks([-place for place in range(len(shown))], shown)
    ax.set_ylim(-len(shown) + 0.4, 0.6)
    ax.set_xlabel(f"cosine by evaluation example, step {effects.step}")
    ax.grid(axis="y", visible=False)
    return ax


@drawn
def score_by_cost(scores: pa.Table, costs: pa.Table, step: int | None = None, ax: Axes | None = None) -> Axes:
    """Each estimator's cosine with its 95% interval against the device-seconds it took, further training beside."""
    rows = last_scores(scores, step)
    spent = seconds_of(costs)
    known = [r for r in rows.to_pylist() if r["score"] is not None and spent.get((r["estimator"], r["params"]))]
    ax = axes(ax)
    if not known:
        return nothing(ax, "no score or no cost is known yet")
    look, names = looks(entries(scores)), labels((r["estimator"], r["params"]) for r in known)
    for row in known:
        one, kind = (row["estimator"], row["params"]), look[row["estimator"], row["params"]]
        if row["low"] is not None:
            ax.plot([spent[one]] * 2, [row["low"], row["high"]], color=kind.colour, lw=1)
        ax.plot(spent[one], row["score"], ls="none", marker=kind.marker, color=kind.colour, ms=6, label=names[one])
    training = sum(r["device_seconds"] or 0.0 for r in costs.to_pylist() if r["what"] == "shard")
    everything = [spent[r["estimator"], r["params"]] for r in known]
    if training:
        everything.append(training)
        ax.axvline(training, color=FAINT, ls=(0, (2, 2)), lw=1.2, label="further training")
    log_scale(ax, everything)
    ax.set_xlabel("device-seconds, of the whole sweep")
    ax.set_ylabel(f"cosine with further training, step {known[0]['step']}")
    legend(ax)
    return ax


def seconds_of(costs: pa.Table) -> dict[Named, float]:
    """Device-seconds by estimator and params."""
    found: dict[Named, float] = {}
    for row in where(costs, what="estimator").to_pylist():
        if row["device_seconds"] is not None:
            one = row["name"], row["params"]
            found[one] = found.get(one, 0.0) + row["device_seconds"]
    return found


@drawn
def similarity(similarity: pa.Table, step: int | None = None, ax: Axes | None = None) -> Axes:
    """Mean cosine between any two estimators, at a step (default: the last) where they depend on it."""
    named = entries(similarity)
    if not named:
        return nothing(axes(ax), "no estimates yet")
    side = 1.6 + 0.36 * len(named)
    ax = axes(ax, (max(SIZE[0], side + 1.2), max(SIZE[1], side)))
    names, steps = labels(named), steps_of(similarity)
    step = (steps[-1] if steps else None) if step is None else step
    found = {
        (r["estimator"], r["params"], r["other_estimator"], r["other_params"]): r["cosine"]
        for r in [
            *where(similarity, step=None).to_pylist(),
            *(where(similarity, step=step).to_pylist() if steps else []),
        ]
    }
    table = np.array([[_either(found, a, b) for b in named] for a in named], dtype=np.float64)
    image = ax.imshow(table, vmin=-1, vmax=1, cmap="PuOr_r")
    for (i, j), value in np.ndenumerate(table):
        if not np.isnan(value):
            dark = abs(value) > 0.7
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else INK)
    ticks = range(len(named))
    ax.set_xticks(ticks, [names[one] for one in named], rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(ticks, [names[one] for one in named])
    ax.grid(visible=False)
    ax.figure.colorbar(image, ax=ax, shrink=0.75, label="mean cosine" + ("" if step is None else f", step {step}"))
    return ax


def _either(found: Mapping[tuple[str, str, str, str], float | None], a: Named, b: Named) -> float:
    value = found.get((*a, *b), found.get((*b, *a)))
    return float("nan") if value is None else value
