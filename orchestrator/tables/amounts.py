"""How much further training: what each recorded amount is worth, and which to take. Pure functions.

An amount is worth taking if the attribution there can be trusted (reliable, over the noise floor, not exploded), does
not turn on the amount (*stable*: it agrees with a neighbouring one) and answers to a removal as a smooth function does
(*metasmooth*). Where it also points as the infinitesimal limit does, a first-order estimator can work.

**Metasmoothness** is definition 2 of Engstrom et al., Optimizing ML Training with Metagradient Descent (2025, arXiv
2503.13751), with a removal's weight as the metaparameter, and g over evaluation examples in the place of the trained
parameters: with f₀, f₁, f₂ after training at weights 0, h, 2h and d = |f₂ − f₀|,

    Σ_z d_z/‖d‖₁ · sign(f₁ − f₀)_z · sign(f₂ − f₁)_z,        between −1 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fimo.orchestrator.tables.sanity import exploded

Array = NDArray[np.float64]
Agreements = Mapping[tuple[int, int], float | None]
"""Pair of steps -> the agreement of the attributions there, their common noise and their ceilings taken out."""

MOST = 16
"""Amounts that are looked at, at most: between closer ones any attribution is stable."""
LEAST_CEILING = 0.3
"""Under it, a share of a ceiling is mostly noise."""
EXACT, SIZE = 0.99, 0.1
"""A heavier removal is as good as one of weight 1: cosine at least, size off by at most."""


@dataclass(frozen=True)
class Linear:
    """Effects per unit of weight at ``weight`` against those at ``against``, both multiples of the sweep's own.

    Attributes:
        cosine: over evaluation examples, mean over cells; ``size``: ratio of norms, geometric mean over cells. None if
            a cell is not finite, or has no effect.
    """

    weight: float
    against: float
    cosine: float | None
    size: float | None

    @property
    def exact(self) -> bool:
        """Whether the heavier can stand for the lighter."""
        return self.cosine is not None and self.size is not None and self.cosine >= EXACT and abs(self.size - 1) <= SIZE


@dataclass(frozen=True)
class Amount:
    """One recorded step of a sweep; None = not known.

    Attributes:
        seeds: that the attribution averages; ``reliability``, ``ceiling``: of those (adjust: baseline).
        distance: ‖Δθ_t‖ of the baseline, mean over seeds.
        moved: root mean square over evaluation examples of the training-only effect; ``relative``: to that of g at θᶠ.
        exploded: training on everything has moved g beyond reason, or a run is not finite; or is on the way there: has
            moved g by more than its size, before an amount that has exploded.
        under_floor: share of (removal, eval) pairs that rounding drowns; ``significant``: that differ from zero.
        before, after: agreement with the attribution at the amount before, and after.
        first_order: agreement with the infinitesimal limit.
        metasmoothness, linear: of a few cells; see the module, and ``Linear``.
        enough: seeds at which reliability is extrapolated to be a half; None if it is, or if none are enough.
    """

    step: int
    seeds: int
    reliability: float | None
    ceiling: float | None
    distance: float | None
    moved: float | None
    relative: float | None
    exploded: bool
    under_floor: float | None
    significant: float | None
    before: float | None = None
    after: float | None = None
    first_order: float | None = None
    metasmoothness: float | None = None
    linear: tuple[Linear, ...] = ()
    enough: int | None = None

    @property
    def stability(self) -> float | None:
        """Agreement with the neighbour that is closer; at most 1, which noise may take it beyond."""
        known = [value for value in (self.before, self.after) if value is not None]
        return min(1.0, max(known)) if known else None


def thinned(steps: Sequence[int], most: int = MOST) -> list[int]:
    """At most ``most`` of the steps, the first and the last among them, evenly spaced on a log scale."""
    if len(steps) <= most:
        return list(steps)
    wanted = np.geomspace(steps[0], steps[-1], most)
    return sorted({min(steps, key=lambda step: abs(np.log(step / at))) for at in wanted})


def neighbours(steps: Sequence[int]) -> list[tuple[int, int]]:
    """Each step with the next."""
    return list(pairwise(steps))


def finite_steps(attribution: pa.Table, steps: Sequence[int]) -> list[int]:
    """Those of the steps at which no run is not finite that was finite before."""
    of, seeds = attribution["step"].to_numpy(), attribution["seeds"].to_numpy()
    cells = {step: int(seeds[of == step].sum()) for step in steps}
    return [step for step in steps if cells[step] and cells[step] == max(cells.values())]


def amounts(
    tables: Mapping[str, pa.Table], steps: Sequence[int], distances: Mapping[int, float], scale: float, reliable: float
) -> list[Amount]:
    """Each of ``steps`` from a sweep's tables, without what takes agreements or further cells.

    Args:
        distances: step -> ‖Δθ_t‖; ``scale``: the root mean square of g(z, θᶠ) over evaluation examples, 0 = unknown.
        reliable: the reliability for which seeds are extrapolated.
    """
    only, pairs = tables["training_only"], tables["attribution"]
    trust = [row for row in tables["reliability"].to_pylist() if row["adjust"] == "baseline"]
    delta, at, of = only["delta"].to_numpy(), only["step"].to_numpy(), pairs["step"].to_numpy()
    drowned = pairs["under_floor"].to_numpy()
    finite = finite_steps(pairs, steps)
    found: list[Amount] = []
    for step in steps:
        moves, own = delta[at == step], drowned[of == step]
        rows = [r for r in trust if r["step"] == step]
        row: dict[str, Any] = next((r for r in rows if r["measured"]), {})
        moved = float(np.sqrt(np.square(moves).mean())) if len(moves) else None
        found.append(
            Amount(
                step=step,
                seeds=int(row.get("seeds") or 0),
                reliability=row.get("reliability"),
                ceiling=row.get("ceiling"),
                distance=distances.get(step),
                moved=moved,
                relative=moved / scale if moved is not None and scale > 0 else None,
                exploded=step not in finite or not len(moves) or bool(exploded(moves[None], scale)[0]),
                under_floor=float(own.mean()) if len(own) else None,
                significant=row.get("significant"),
                enough=_enough(row, rows, reliable),
            )
        )
    return _on_the_way(found)


def _on_the_way(found: Sequence[Amount]) -> list[Amount]:
    """Count as exploded too what leads up to an explosion."""
    last = max((place for place, a in enumerate(found) if a.exploded), default=-1)
    return [
        replace(a, exploded=a.exploded or (place < last and (a.relative or 0) > 1)) for place, a in enumerate(found)
    ]


def _enough(own: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], reliable: float) -> int | None:
    if own.get("reliability") is None or own["reliability"] >= reliable:
        return None
    return min((r["seeds"] for r in rows if (r["reliability"] or 0) >= reliable), default=None)


def compared(found: Sequence[Amount], agreements: Agreements, limit: Mapping[int, float | None]) -> list[Amount]:
    """The amounts with what they agree with.

    Args:
        agreements: of each amount with the next; ``limit``: step -> agreement with the infinitesimal limit.
    """
    before = {later: value for (_, later), value in agreements.items()}
    after = {earlier: value for (earlier, _), value in agreements.items()}
    return [
        replace(a, before=before.get(a.step), after=after.get(a.step), first_order=limit.get(a.step)) for a in found
    ]


def limit_of(scores: pa.Table, estimator: str, params: str) -> dict[int, float | None]:
    """Step -> an estimator's cosine with the attribution of all seeds, divided by its ceiling (``share``)."""
    rows = [
        r
        for r in scores.to_pylist()
        if (r["estimator"], r["params"], r["metric"], r["adjust"]) == (estimator, params, "cosine", "baseline")
    ]
    most = max((r["seeds"] for r in rows), default=0)
    return {r["step"]: share(r["normalised"], r["ceiling"]) for r in rows if r["seeds"] == most}


def share(normalised: float | None, ceiling: float | None) -> float | None:
    """An agreement in shares of what noise leaves possible; None if that is so little that the share is noise."""
    return normalised if ceiling is not None and ceiling >= LEAST_CEILING else None


# -- of a few cells at several weights -------------------------------------------------------------------------------


def metasmoothness(one: Array, two: Array) -> Array:
    """Sign agreement of the two halves of a response, float64 (…); NaN where nothing moves.

    Args:
        one, two: f₁ − f₀ and f₂ − f₀, what weights h and 2h do to g, float64 (…, m). A response that is not finite
            agrees with nothing: 0.
    """
    finite = np.asarray(np.isfinite(one).all(axis=-1) & np.isfinite(two).all(axis=-1))
    one, two = (np.where(finite[..., None], x, 0.0) for x in (one, two))
    d = np.abs(two)
    total = d.sum(axis=-1)
    agreement = (d * np.sign(one) * np.sign(two - one)).sum(axis=-1)
    out: Array = np.divide(agreement, total, out=np.full(total.shape, np.nan), where=total > 0)
    return np.where(finite, out, 0.0)


def linearity(weight: float, against: float, heavy: Array, light: Array) -> Linear:
    """Effects per unit of weight, float64 (cells, m), at two weights."""
    norms = np.linalg.norm(heavy, axis=-1), np.linalg.norm(light, axis=-1)
    if not all(np.isfinite(n).all() and (n > 0).all() for n in norms):
        return Linear(weight, against, None, None)
    cosine = (heavy * light).sum(axis=-1) / (norms[0] * norms[1])
    return Linear(weight, against, float(cosine.mean()), float(np.exp(np.log(norms[0] / norms[1]).mean())))
