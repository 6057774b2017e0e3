"""Which effects can be told from zero: two-sided t-tests over seeds, and their share with false discoveries controlled.

Pure functions over arrays.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FALSE_DISCOVERIES = 0.05
"""The share of false ones among the pairs that are called significant (Benjamini and Hochberg 1995)."""


def p_values(mean: Array, sem: Array, count: NDArray[np.int64]) -> Array:
    """The two-sided p of no effect by Student's t-test over seeds; NaN with fewer than two seeds.

    Args:
        mean, sem: over seeds, of equal shapes; ``count``: the number of seeds, broadcast against them.

    Equal values over all seeds have no standard error: p is 1 if they are 0, else 0.
    """
    from scipy.special import stdtr  # slow to import; see ``agreement.ranks``

    freedom = np.broadcast_to(count, mean.shape) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(mean == 0, 0.0, np.abs(mean) / sem)
    p: Array = 2 * stdtr(np.maximum(freedom, 1), -ratio)
    return np.where(freedom > 0, p, np.nan)


def share_significant(p: Array, drowned: NDArray[np.bool_]) -> float | None:
    """The share of pairs that can be told from zero; None if no p is known.

    Args:
        p: of every pair; NaN = unknown, left out.
        drowned: the pairs whose effect is under the noise floor: a wrong effect may come out the same for every seed.
    """
    known = np.isfinite(p)
    if not known.any():
        return None
    from scipy.stats import false_discovery_control

    adjusted = false_discovery_control(p[known])
    return float(((adjusted <= FALSE_DISCOVERIES) & ~drowned[known]).mean())
