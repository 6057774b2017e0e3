"""Control variates: a cheap run of the same seed takes its share of the noise out of an effect. Pure functions.

Let e_s be the effects of seed s, and c_s a *control*: an estimate of the same effects that was trained with the same
seed (``mirrored`` or ``unrolled``). Let c̄_s be the mean of the same control over n seeds of their own, none of the
sweep's and none of another s. Then

    u_s = e_s − λ β₋ₛ (c_s − c̄_s),    λ = n / (n + 1)

has the expectation of e_s whatever the control is worth: c_s and c̄_s have one expectation, and β₋ₛ is a number that
neither of them has a part in. It is the slope of e on c over the *other* seeds, pooled over removals, one for each
evaluation example (cross-fitting). A slope over all seeds would not be independent of c_s, and the mean would be
biased.

λ is the shrinkage that minimises the variance, since c̄_s is a mean over n seeds alone. With ρ the correlation of e and
c over seeds, and removals whose noise is independent, the variance of a controlled mean over that of a plain one is

    1 − λ (ρ² − (1 − ρ²) / (ν − 2)),    ν = R (k − 2)

for normal noise (Lavenberg and Welch 1981 have the case of one removal). If removals share their noise, as they do
where the baseline's is most of it, ν is as small as k − 2. Then a control that says little makes things worse.

Since every seed has controls of its own, the u_s are independent of each other but for the slopes: their spread over
seeds holds the noise of c̄_s, and everything that takes effects by seed (``fimo.audit``) takes them. Slopes that share
seeds correlate in pairs without moving the covariance of the u_s (tested, for normal noise).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fimo.workers.errors import UsageError

Array = NDArray[np.float64]
LEAST = 4
"""Seeds at least: a slope is fitted to the others, and from two seeds it would be mostly chance."""
_NOTHING = 1e-12

CONTROLLED = pa.schema(
    [
        ("removal", pa.int32()),
        ("eval", pa.int32()),
        ("step", pa.int32()),
        ("effect", pa.float64()),
        ("sem", pa.float64()),
        ("seeds", pa.int32()),
        ("plain_sem", pa.float64()),
    ]
)
"""What ``OpenSweep.controlled`` gives; no table of a sweep."""


@dataclass(frozen=True)
class Controlled:
    """One step's effects with their control taken out.

    Attributes:
        effects: float64 (k, R, m), a seed's controlled effects: as independent as the seeds' own.
        slopes: λ β₋ₛ as applied, float64 (k, m); 0 where the control does not vary.
        plain: the effects as they were, float64 (k, R, m).
    """

    effects: Array
    slopes: Array
    plain: Array

    @property
    def mean(self) -> Array:
        """The attribution, float64 (R, m)."""
        out: Array = self.effects.mean(axis=0)
        return out

    @property
    def sem(self) -> Array:
        """Its standard error, float64 (R, m), the noise of the controls' means included."""
        return _sem(self.effects)

    @property
    def plain_sem(self) -> Array:
        """The standard error without control, float64 (R, m)."""
        return _sem(self.plain)


def control(effects: Array, own: Array, others: Array) -> Controlled:
    """Take the control out of one step's effects.

    Args:
        effects: of each seed, float64 (k, R, m).
        own: the control with the same seeds, in the same order, float64 (k, R, m).
        others: the control with K other seeds, float64 (K, R, m); they are dealt out to the k seeds.

    Raises:
        UsageError: other shapes, values that are not finite, fewer than ``LEAST`` seeds, or fewer others than seeds.
    """
    k = len(effects)
    if effects.ndim != 3 or own.shape != effects.shape or others.shape[1:] != effects.shape[1:]:
        shapes = ", ".join(str(a.shape) for a in (effects, own, others))
        raise UsageError(f"effects, own and other controls are (seeds, removals, evals) of one size, got {shapes}")
    if not all(np.isfinite(a).all() for a in (effects, own, others)):
        raise UsageError("effects or controls hold values that are not finite: leave those seeds out")
    if k < LEAST:
        raise UsageError(f"a control needs {LEAST} seeds at least, to fit a slope to the others of each; there are {k}")
    if len(others) < k:
        raise UsageError(f"a control needs at least as many other seeds as there are seeds: {k}, got {len(others)}")
    groups = np.array_split(others, k)
    means = np.stack([group.mean(axis=0) for group in groups])
    size = np.array([len(group) for group in groups], dtype=np.float64)
    slopes = (size / (size + 1))[:, None] * _slopes_of_the_others(effects, own)
    return Controlled(effects - slopes[:, None] * (own - means), slopes, effects)


def _slopes_of_the_others(effects: Array, own: Array) -> Array:
    """β₋ₛ for each seed and evaluation example, float64 (k, m).

    Sums of products around the others' mean are those around the mean of all, less k/(k−1) of the seed's own.
    """
    k = len(effects)
    e, c = effects - effects.mean(axis=0), own - own.mean(axis=0)
    products, squares = (e * c).sum(axis=1), (c * c).sum(axis=1)
    product, square = (total.sum(axis=0) - total * (k / (k - 1)) for total in (products, squares))
    # What is left of a difference of nearly equal sums is rounding.
    varies = square > _NOTHING * squares.sum(axis=0)
    out: Array = np.divide(product, square, out=np.zeros_like(product), where=varies)
    return out


def _sem(effects: Array) -> Array:
    out: Array = effects.std(axis=0, ddof=1) / np.sqrt(len(effects))
    return out
