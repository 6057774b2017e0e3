"""The highest Spearman correlation that any estimate can be expected to reach, bounded by leaving seeds out.

Ranks have no closed form. What is measured is how the ranks of the mean over some seeds agree with those over the
others, r(a, b), and with those over all. As if noise were added to ranks, r(a, b)² = q / (q + 1/a) · q / (q + 1/b)
with q the signal-to-noise ratio of one seed (Spearman and Brown), and the ceiling against k seeds is √(q / (q + 1/k)).
Three q:

* **lower**: r(a, b) taken for the agreement of a seeds with the truth, from which the others differ by their noise;
* **upper**: the agreement with the mean over all, themselves among them, taken for that with the truth
  (both bounds: Nili et al. 2014, for k = a);
* **best**: the equation solved.

The map is concave and a correlation over few removals is noisy, so before the mean over evaluation examples is taken,
correlations are drawn towards their mean by as much as noise has driven them apart: their true variance is the
covariance of those over even and over odd removals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fimo.orchestrator.tables.agreement import cosine
from fimo.orchestrator.tables.groups import SeedGroups
from fimo.orchestrator.tables.ordering import ranks

Array = NDArray[np.float64]


@dataclass(frozen=True)
class RankCeilings:
    """Signal-to-noise ratios of one seed's ranks, float64 (T, m) each."""

    lower: Array
    best: Array
    upper: Array

    def at(self, seeds: int) -> tuple[Array, Array, Array]:
        """(lower, best, upper) ceilings against a mean over ``seeds``, (T, m) each."""
        lower, best, upper = (_ceiling(q, seeds) for q in (self.lower, self.best, self.upper))
        return lower, best, upper


def rank_ceilings(groups: SeedGroups, keep: NDArray[np.bool_]) -> RankCeilings | None:
    """From whole seeds in groups; None if there are fewer than two, or than four removals.

    Args:
        keep: the removals that count, bool (R,).
    """
    if len(groups) < 2 or keep.sum() < 4:
        return None
    apart, within = _Correlations(), _Correlations()
    for own, few, others, many in groups.left_out(keep):
        apart.add(own, others)
        within.add(own, (few * own + many * others) / (few + many))
    a = groups.seeds / len(groups)
    r, r_all = apart.settled(), within.settled()
    return RankCeilings(_naive(r, a), _solved(r, a, groups.seeds - a), _naive(r_all, a))


class _Correlations:
    """The mean over groups of Spearman correlations, over all removals and over every other one."""

    def __init__(self) -> None:
        self._sums: list[Array | float] = [0.0, 0.0, 0.0]
        self._count = 0

    def add(self, one: Array, other: Array) -> None:
        self._count += 1
        for place, rows in enumerate((slice(None), slice(0, None, 2), slice(1, None, 2))):
            r = np.nan_to_num(cosine(ranks(one[rows]), ranks(other[rows])))
            self._sums[place] = self._sums[place] + r

    def settled(self) -> Array:
        """Per example, (T, m), drawn together, at least 0."""
        r, even, odd = (np.asarray(s) / self._count for s in self._sums)
        middle, seen = r.mean(axis=1, keepdims=True), r.var(axis=1)
        true = ((even - even.mean(axis=1, keepdims=True)) * (odd - odd.mean(axis=1, keepdims=True))).mean(axis=1)
        kept: Array = np.sqrt(np.clip(np.divide(true, seen, out=np.zeros_like(seen), where=seen > 0), 0, 1))
        return np.asarray(np.clip(middle + kept[:, None] * (r - middle), 0, 1))


def _naive(r: Array, a: float) -> Array:
    """q from r² = q / (q + 1/a)."""
    with np.errstate(divide="ignore"):
        return np.asarray(r**2 / (a * (1 - r**2)))


def _solved(r: Array, a: float, b: float) -> Array:
    """q from r² = q / (q + 1/a) · q / (q + 1/b)."""
    square, both = r**2, 1 / a + 1 / b
    root = np.sqrt(square**2 * both**2 + 4 * (1 - square) * square / (a * b))
    with np.errstate(divide="ignore", invalid="ignore"):
        q = (square * both + root) / (2 * (1 - square))
    return np.where(square < 1, q, np.inf)


def _ceiling(q: Array, seeds: int) -> Array:
    with np.errstate(invalid="ignore"):
        share = q / (q + 1 / seeds)
    return np.asarray(np.sqrt(np.where(np.isfinite(q), share, 1.0)))
