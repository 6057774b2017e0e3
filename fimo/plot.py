"""A sweep's figures for a notebook; each takes what ``fimo.open_sweep`` gives and returns matplotlib axes.

They are those of ``fimo report``. ``ax`` draws on axes of one's own; without it each makes a figure, the axes'
``figure``, which a notebook shows as the last value of a cell (``%matplotlib inline``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fimo.orchestrator.notebook import OpenSweep
from fimo.orchestrator.report.figures import effects as of_effects
from fimo.orchestrator.report.figures import scores as of_scores
from fimo.orchestrator.report.figures import trust as of_trust

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.axes import Axes

__all__ = [
    "cost",
    "drift",
    "effects",
    "evals",
    "histogram",
    "reliability",
    "reliability_by_amount",
    "scores",
    "seeds",
    "similarity",
    "training_only",
]


def scores(sweep: OpenSweep, metric: str = "cosine", adjust: str = "baseline", ax: Axes | None = None) -> Axes:
    """Scores against the amount of further training, with intervals and the ceiling.

    Args:
        metric: cosine, spearman, or lds over random groups. ``adjust``: baseline or mean.
    """
    return of_scores.score_by_amount(sweep.scores(), metric, adjust, ax)


def seeds(sweep: OpenSweep, step: int | None = None, adjust: str = "baseline", ax: Axes | None = None) -> Axes:
    """Scores against the number of seeds averaged, measured and by the law that extrapolates them."""
    return of_scores.score_by_seeds(*_both(sweep, "scores", "reliability"), step, adjust, ax)


def evals(sweep: OpenSweep, step: int | None = None, ax: Axes | None = None) -> Axes:
    """Each evaluation example's cosine, for every estimator."""
    return of_scores.score_by_example(*_both(sweep, "attribution", "estimates"), step, ax)


def cost(sweep: OpenSweep, step: int | None = None, ax: Axes | None = None) -> Axes:
    """Scores against device-seconds."""
    return of_scores.score_by_cost(*_both(sweep, "scores", "costs"), step, ax)


def similarity(sweep: OpenSweep, step: int | None = None, ax: Axes | None = None) -> Axes:
    """Mean cosine between any two estimators."""
    return of_scores.similarity(sweep.similarity(), step, ax)


def reliability(sweep: OpenSweep, adjust: str = "baseline", ax: Axes | None = None) -> Axes:
    """Reliability against the number of seeds, a line a step."""
    return of_trust.reliability_by_seeds(sweep.reliability(), adjust, ax)


def reliability_by_amount(sweep: OpenSweep, adjust: str = "baseline", ax: Axes | None = None) -> Axes:
    """Reliability of the sweep's own mean, and the share of effects told from zero, by step."""
    return of_trust.reliability_by_amount(sweep.reliability(), adjust, ax)


def training_only(sweep: OpenSweep, ax: Axes | None = None) -> Axes:
    """What training on everything does to g, by step."""
    return of_trust.training_only_by_amount(sweep.training_only(), ax)


def drift(sweep: OpenSweep, ax: Axes | None = None) -> Axes:
    """How far training on everything moves the parameters, by step."""
    return of_trust.drift_by_amount(sweep.amounts(), ax)


def effects(sweep: OpenSweep, eval: int = 0, step: int | None = None, ax: Axes | None = None) -> Axes:
    """One evaluation example's effects in order, with 95% intervals and the noise band."""
    tables = sweep.tables("reliability", "attribution", "training_only", "removals")
    found = sweep.top(eval, step)
    return of_effects.sorted_effects(found, of_effects.noise_floor(tables["reliability"], found.step), ax)


def histogram(sweep: OpenSweep, step: int | None = None, ax: Axes | None = None) -> Axes:
    """All effects of a step, with the noise band."""
    return of_effects.effects_histogram(*_both(sweep, "attribution", "reliability"), step, ax)


def _both(sweep: OpenSweep, one: str, other: str) -> tuple[pa.Table, pa.Table]:
    tables = sweep.tables(one, other)
    return tables[one], tables[other]
