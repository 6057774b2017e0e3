"""Training examples in order of their effect, by the estimator that agrees best, and what is left to verify of the top.

Positive = removing the example raises g: rank 1 is the most helpful example, rank n the most harmful. Effects and their
intervals come from ``calibration``. Pure functions over arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fimo.orchestrator.tables.agreement import cosine

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """The chosen estimator.

    Attributes:
        place: among the estimates given.
        score: mean cosine over the held-out evaluation examples; ``normalised``: divided by their mean ceiling, None if
            that is 0 or not known.
        chosen_by: the normalised score that decided, of the other examples.
        evals: how many examples the score is of.
        same: both are of the same examples, because there were no others: the score is then too high.
    """

    place: int
    score: float
    normalised: float | None
    chosen_by: float
    evals: int
    same: bool


def choose(
    estimates: Sequence[Array], gold: Array, ceilings: Array | None, without: NDArray[np.bool_]
) -> Choice | None:
    """The estimator with the highest normalised score on the evaluation examples at even places, scored on the others.

    Args:
        estimates: float64 (R, m) of each; NaN = missing.
        gold: the attribution, float64 (R, m).
        ceilings: by evaluation example (``tables.trust``), (m,); None or NaN = not known, and then nothing is divided.
        without: where ``gold`` says nothing (``compare.Standard.without``), (m,).

    Examples for which a cosine is not defined are left out of its mean. An estimator that is defined for fewer than
    half of the examples that the best defined one has is chosen only if there is no other. Ties go to the first. None
    if nothing is defined.
    """
    cosines = [np.where(without, np.nan, cosine(values, gold)) for values in estimates]
    even = np.arange(gold.shape[1]) % 2 == 0
    halves = [(part, other) for part, other in ((even, ~even), (~even, even)) if _any(cosines, part)]
    if not halves:
        return None
    by, held = halves[0]
    most = max(_count(c, by) for c in cosines)
    scores = [_score(c, ceilings, by) if 2 * _count(c, by) >= most else None for c in cosines]
    place = int(np.argmax([-np.inf if s is None else s[1] if s[1] is not None else s[0] for s in scores]))
    same = _score(cosines[place], ceilings, held) is None
    shown, decided = _score(cosines[place], ceilings, by if same else held), scores[place]
    assert shown is not None
    assert decided is not None
    number = decided[0] if decided[1] is None else decided[1]
    return Choice(place, shown[0], shown[1], number, _count(cosines[place], by if same else held), same)


def _any(cosines: Sequence[Array], part: NDArray[np.bool_]) -> bool:
    return any(_count(c, part) for c in cosines)


def _count(values: Array, part: NDArray[np.bool_]) -> int:
    return int((part & ~np.isnan(values)).sum())


def _score(values: Array, ceilings: Array | None, part: NDArray[np.bool_]) -> tuple[float, float | None] | None:
    """(mean cosine, the same over the mean ceiling) over a part's defined examples."""
    kept = part & ~np.isnan(values)
    if not kept.any():
        return None
    score = float(values[kept].mean())
    ceiling = float(ceilings[kept].mean()) if ceilings is not None else np.nan
    return score, score / ceiling if ceiling > 0 else None


def order(values: Array) -> Indices:
    """Training indices from the largest effect to the smallest, over the first axis; ties by index, NaN last."""
    out: Indices = np.argsort(-values, axis=0, kind="stable")
    return out


def rank_of(values: Array) -> Indices:
    """The rank of each training example, over the first axis: 1 = the largest effect."""
    ranks = np.empty(values.shape, dtype=np.int64)
    places = np.arange(1, len(values) + 1).reshape(-1, *[1] * (values.ndim - 1))
    np.put_along_axis(ranks, order(values), np.broadcast_to(places, values.shape), axis=0)
    return ranks


def top(values: Array, k: int) -> tuple[Indices, Indices]:
    """The k most helpful and the k most harmful of effects (n,), the most so first; all n if there are no more."""
    helpful = order(values)[:k]
    return helpful, np.argsort(values, kind="stable")[:k]


@dataclass(frozen=True)
class Candidates:
    """Unverified training indices.

    Attributes:
        must: those in the top k of either sign, the most helpful first, then the most harmful.
        might: those whose interval reaches as far as the k-th, the likeliest first.
    """

    must: Indices
    might: Indices


def candidates(effect: Array, low: Array, high: Array, verified: Array, k: int) -> Candidates:
    """What is left to verify, for one evaluation example, so that its top k of both signs are verified.

    Args:
        effect, low, high: calibrated, (n,).
        verified: the gold standard's effects, NaN where there is none, (n,).

    Verify ``must``, and ask again: a verified effect that is smaller than its estimate lets another in. That ends, and
    then the k-th of each sign is a verified one.
    """
    known = ~np.isnan(verified)
    values = np.where(known, verified, effect)
    helpful, harmful = top(values, k)
    must = np.array(list(dict.fromkeys(i for i in (*helpful, *harmful) if not known[i])), dtype=np.int64)
    if not len(helpful):
        return Candidates(must, must)
    # By how much of its own half-interval each falls short of the k-th, in the sign where that is least.
    short = [values[helpful[-1]] - effect, effect - values[harmful[-1]]]
    halves = [high - effect, effect - low]
    reaches = (short[0] <= halves[0]) | (short[1] <= halves[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = [np.where(s <= 0, 0.0, np.divide(s, h)) for s, h in zip(short, halves, strict=True)]
    left = reaches & ~known
    left[must] = False
    places = np.flatnonzero(left)
    likeliest = np.lexsort((np.minimum(*short)[places], np.minimum(*relative)[places]))
    return Candidates(must, places[likeliest])
