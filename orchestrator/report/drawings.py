"""Every figure of a report: which there are, in what order, and what stands under each; no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from fimo.orchestrator.report.figures import effects, scores, trust
from fimo.orchestrator.tables.top import Top

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn.

    Attributes:
        name: of its files; ``section``: of the page ("agreement", "trust" or "effects").
        title, caption: what stands under it.
    """

    name: str
    section: str
    title: str
    caption: str
    draw: Callable[[], Axes]


def drawings(tables: Mapping[str, pa.Table], step: int) -> Iterator[Drawing]:
    """The figures of a sweep as a whole, those of amounts aside at one step."""
    scored, reliability = tables["scores"], tables["reliability"]
    if len(scored):
        yield from _agreement(tables, scored, reliability, step)
    elif len(tables["estimates"]):
        yield _similarity(tables, step)
    yield Drawing(
        "reliability-by-seeds",
        "trust",
        "Reliability against seeds",
        "Share of signal in the mean over k seeds. Points are this sweep, lines say what other numbers of seeds would "
        "give; dotted: 0.95.",
        lambda: trust.reliability_by_seeds(reliability),
    )
    yield Drawing(
        "reliability-by-amount",
        "trust",
        "Reliability against amount",
        "Of this sweep's own mean, and the share of effects that can be told from zero, 5% of those falsely.",
        lambda: trust.reliability_by_amount(reliability),
    )
    yield Drawing(
        "training-only",
        "trust",
        "What training on everything does to g",
        "It is subtracted from every effect; here over the evaluation examples. It is not zero if the final model is "
        "not at a minimum.",
        lambda: trust.training_only_by_amount(tables["training_only"]),
    )
    yield Drawing(
        "drift",
        "trust",
        "Drift",
        "How far training on everything has moved the parameters, mean over seeds ± its standard error.",
        lambda: trust.drift_by_amount(tables["amounts"]),
    )
    yield Drawing(
        "effects",
        "trust",
        "All effects",
        "Every removal on every evaluation example. The axis is linear near zero and logarithmic beyond. Grey: no "
        "larger than what rounding does. Dashed: the median standard error over seeds.",
        lambda: effects.effects_histogram(tables["attribution"], reliability, step),
    )


def _agreement(tables: Mapping[str, pa.Table], scored: pa.Table, reliability: pa.Table, step: int) -> Iterator[Drawing]:
    yield Drawing(
        "cosine-by-amount",
        "agreement",
        "Cosine against amount",
        "Agreement with further training by how long that goes on, mean over evaluation examples; bands: 95% intervals "
        "over seeds and evaluation examples; dashed: the ceiling, what a perfect estimate would reach.",
        lambda: scores.score_by_amount(scored),
    )
    metrics = set(pc.unique(scored["metric"]).to_pylist())
    for metric, title in (("spearman", "Spearman correlation"), ("lds", "Linear datamodeling score")):
        if metric in metrics:
            yield Drawing(
                f"{metric}-by-amount",
                "agreement",
                f"{title} against amount",
                "As above, of ranks.",
                lambda metric=metric: scores.score_by_amount(scored, metric),  # type: ignore[misc]
            )
    yield Drawing(
        "cosine-by-seeds",
        "agreement",
        "Cosine against seeds averaged",
        "Points: measured, against means over k seeds. Lines: the law that a score is a fixed share of the ceiling, "
        "fitted at the last point and extrapolated to both sides.",
        lambda: scores.score_by_seeds(scored, reliability, step),
    )
    yield Drawing(
        "cosine-by-example",
        "agreement",
        "By evaluation example",
        "A point for each evaluation example, a bar at their mean, which is the score.",
        lambda: scores.score_by_example(tables["attribution"], tables["estimates"], step),
    )
    yield Drawing(
        "cosine-by-cost",
        "agreement",
        "Cost against score",
        "Device-seconds of each estimator, with the 95% interval of its score; dotted: what further training took.",
        lambda: scores.score_by_cost(scored, tables["costs"], step),
    )
    yield _similarity(tables, step)


def _similarity(tables: Mapping[str, pa.Table], step: int) -> Drawing:
    return Drawing(
        "similarity",
        "agreement",
        "Estimators against each other",
        "Mean cosine between the estimates of any two.",
        lambda: scores.similarity(tables["similarity"], step),
    )


def of_example(top: Top, floor: float | None) -> Drawing:
    """One evaluation example's effects in order."""
    return Drawing(
        f"effects-{top.eval}",
        "example",
        f"Effects on evaluation example {top.eval}, in order",
        "95% intervals over seeds; grey: no larger than what rounding does.",
        lambda: effects.sorted_effects(top, floor),
    )
