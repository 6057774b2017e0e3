"""How many seeds are enough: the reliability or the standard error wanted, solved for their number.

A rule that stops when an effect looks good makes the mean it stops at too good. The mean of normal numbers and their
standard error are independent, so this rule looks at standard errors alone: how strong the signal is, it takes from the
first seeds once and for all. The dependence that is left, of the strength over all pairs on those few seeds, is far
below the standard error (tested).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fimo.orchestrator.tables.reduce import Reduction
from fimo.orchestrator.tables.reliability import Reliability
from fimo.orchestrator.tables.trust import Trust

Array = NDArray[np.float64]
MOST = 1_000_000
"""Seeds beyond which no number is given."""


def fewest(reaches: Callable[[int], bool], least: int = 1, most: int = MOST) -> int | None:
    """The smallest number in ``least … most`` that ``reaches``, which holds for all above one it holds for; or None."""
    if not reaches(most):
        return None
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if reaches(middle) else (middle + 1, most)
    return least


def seeds_for_reliability(of: Reliability, adjust: str, place: int, target: float) -> int | None:
    """Seeds at which one step's mean reliability reaches ``target``; None if it is not known, or beyond ``MOST``."""
    defined = ~of.without(adjust)[place] if of.known else np.zeros(0, dtype=bool)
    if not defined.any():
        return None
    trust = of.trust(adjust, place)
    return fewest(lambda k: bool(trust.reliability(k)[defined].mean() >= target))


def seeds_for_sem(reduction: Reduction, keep: NDArray[np.bool_], place: int, target: float) -> int | None:
    """Seeds at which the root mean square standard error over pairs is at most ``target``, in units of g."""
    sem = reduction.effects.sem()[keep, place]
    if not np.isfinite(sem).all() or not sem.size:
        return None
    seeds = int(reduction.effects.count[keep, place].min())
    needed = seeds * float(np.square(sem).mean()) / target**2
    return max(1, int(np.ceil(needed - 1e-9))) if needed <= MOST else None


def more_seeds(first: Reliability, now: Reliability, target: float, most: int) -> int | None:
    """How many seeds a sweep should have next, or None: it has enough, or it can have no more.

    Args:
        first: of the first seeds, from which the signal is taken; ``now``: of all that are there, for the noise.
        target: reliability wanted at every recorded step that says anything, without adjustment (eq. 17).
        most: seeds that the sweep may have.
    """
    seeds = now.seeds
    if seeds >= most or not (first.known and now.known):
        return None
    without = first.without("baseline")
    places = [place for place in range(len(without)) if not without[place].all()]
    if not places:
        return None
    known = [(first.trust("baseline", p), now.trust("baseline", p), ~without[p]) for p in places]

    def reaches(k: int) -> bool:
        return all(_reliability(one, other, k)[defined].mean() >= target for one, other, defined in known)

    if reaches(seeds):
        return None
    wanted = fewest(reaches, seeds + 1, MOST) or most
    # Not far at once: the noise of few seeds is not known well.
    return min(wanted, 2 * seeds, most)


def missed(rows: Sequence[Mapping[str, Any]], seeds: int, target: float, most: int) -> str | None:
    """One line if a sweep that adds seeds by itself has not come to what was asked for; else None.

    Args:
        rows: of ``reliability.parquet``; ``seeds``: that the sweep has; ``target``, ``most``: as for ``more_seeds``.
    """
    own = [r for r in rows if r["measured"] and r["adjust"] == "baseline"]
    known = {r["step"]: r["reliability"] for r in own if r["reliability"] is not None}
    if not known:
        return "until_reliability: nothing is known of it; it takes two removals and two whole seeds at least"
    below = [step for step, reliability in known.items() if reliability < target]
    if seeds < most or not below:
        return None
    worst = min(below, key=lambda step: float(known[step]))
    return (
        f"reliability {target:g} is not reached at {len(below)} of {len(own)} steps, at step {worst} it is "
        f"{known[worst]:.2f}, with {seeds} seeds, the most that seeds.max allows"
    )


def _reliability(first: Trust, now: Trust, seeds: int) -> Array:
    noise = now.noise * now.of.k / first.of.k
    return first.reliability(seeds, noise)
