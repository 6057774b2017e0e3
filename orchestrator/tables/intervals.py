"""Confidence intervals of a mean that varies with seeds and with evaluation examples at once.

A score is a mean over evaluation examples of numbers that also vary with the seeds. A bootstrap that draws seeds with
replacement averages fewer distinct seeds than there are: it adds noise of its own, which lowers a cosine, and counts
the noise of one (seed, example) several times (Owen 2007, the pigeonhole bootstrap). So the two are resampled by
leaving out: seeds in at most ``GROUPS`` groups by the jackknife (Tukey 1958), examples by their own spread, and what
belongs to both, counted by either, is taken away once. No seed is ever on both sides.

    V = V_examples + V_seeds − V_both,        an interval of Student's t with Satterthwaite's degrees of freedom.

Pure functions over arrays.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CONFIDENCE = 0.95
GROUPS = 10
"""Groups of seeds that are left out one at a time, at most."""


class Spread:
    """Sums over replicates of per-example values, from which the variance over replicates comes.

    A replicate is a value without one group of seeds (``jackknife``), or that of one window of seeds. Values are
    (…, T, m); one that is NaN in the first replicate is left out, one that is NaN in a later counts as unchanged.
    """

    def __init__(self) -> None:
        self.count = 0
        self._first = np.zeros((0, 0))
        self._examples = np.zeros(0, dtype=np.int64)
        self._sum, self._square = np.zeros((0, 0)), np.zeros((0, 0))
        self._mean_sum: Array | float = 0.0
        self._mean_square: Array | float = 0.0

    def add(self, values: Array) -> None:
        """Take one replicate, (…, T, m)."""
        if not self.count:
            self._first = values
            self._examples = np.maximum(np.isfinite(values).sum(axis=-1), 1)
        self.count += 1
        # Less the first: replicates are alike, and a variance is a small difference of squares.
        offset = values - self._first
        if (nowhere := np.isnan(offset)).any():
            np.copyto(offset, 0.0, where=nowhere)
        mean = offset.sum(axis=-1) / self._examples
        self._mean_sum, self._mean_square = self._mean_sum + mean, self._mean_square + mean**2
        if self.count == 1:
            self._sum, self._square = offset, offset**2
            return
        self._sum += offset
        offset *= offset
        self._square += offset

    def variances(self, jackknife: bool) -> tuple[Array, Array]:
        """(V_seeds, V_both) of the mean over examples, (…, T) each; NaN if there are fewer than two replicates.

        Args:
            jackknife: replicates leave out a group each; else each stands for itself, and their mean is what varies.
        """
        g = self.count
        if g < 2:
            nothing = np.full(self._first.shape[:-1], np.nan)
            return nothing, nothing
        factor = (g - 1) / g if jackknife else 1 / (g * (g - 1))
        each = np.maximum(self._square - self._sum**2 / g, 0).sum(axis=-1) / self._examples**2
        means = np.maximum(self._mean_square - np.asarray(self._mean_sum) ** 2 / g, 0)
        return factor * means, factor * each


def interval(
    values: Array, seeds: float, both: float, replicates: int, lowest: float = -1.0, highest: float = 1.0
) -> tuple[float, float] | None:
    """The 95% interval of the mean of ``values`` over evaluation examples; None if it cannot be told.

    Args:
        values: one step's, (m,), NaN where undefined.
        seeds, both: the variances of ``Spread``; ``replicates``: how many are behind them.
    """
    kept = values[~np.isnan(values)]
    if len(kept) < 2 or not np.isfinite(seeds):
        return None
    from scipy.special import stdtrit  # slow to import; see ``agreement.ranks``

    examples = float(kept.var(ddof=1)) / len(kept)
    alone = max(seeds - both, 0.0)
    total = examples + alone
    if total <= 0:
        return float(kept.mean()), float(kept.mean())
    freedom = total**2 / (examples**2 / (len(kept) - 1) + alone**2 / (replicates - 1))
    middle, unit = float(kept.mean()), float(np.sqrt(total))
    # The mean of m values has their skewness over √m; what seeds add is taken to have none.
    lean = _skewness(kept) / np.sqrt(len(kept)) * (examples / total) ** 1.5
    tail = float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
    low, high = (middle - unit * _unskewed(sign * tail, lean) for sign in (1, -1))
    return max(lowest, low), min(highest, high)


def _skewness(values: Array) -> float:
    """The unbiased sample skewness; 0 of fewer than three values or equal ones."""
    n, deviations = len(values), values - values.mean()
    square = float((deviations**2).mean())
    if n < 3 or square <= 0:
        return 0.0
    return float((deviations**3).mean() / square**1.5 * np.sqrt(n * (n - 1)) / (n - 2))


def _unskewed(tail: float, lean: float) -> float:
    """The quantile of a studentised mean of skewness ``lean`` that a symmetric one would have at ``tail`` (Hall 1992).

    Scores near 1 have a long tail below: a symmetric interval would miss what is there eight times in a hundred.
    """
    if abs(lean) < 1e-6:
        return tail
    return 3 / lean * (float(np.cbrt(1 + lean * (tail - lean / 6))) - 1)
