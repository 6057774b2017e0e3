"""An estimator's values made into effects with intervals, by the effects that the gold standard knows.

**Slopes.** For evaluation example e, effects a_r and estimates â_r of R removals, a line through the origin:

    b_e = Σ_r â_r a_r / Σ_r â_r²,    v_e = R/(R−1) · Σ_r â_r² (a_r − b_e â_r)² / (Σ_r â_r²)²

with v_e the sampling variance of b_e whatever the noise of each removal (White 1980). Slopes differ from example to
example by τ² beyond that noise, which is estimated by moments (DerSimonian and Laird 1986): with w = 1/v,
b̄ = Σwb/Σw and Q = Σ w (b − b̄)² over m examples, τ² = max(0, (Q − (m−1)) / (Σw − Σw²/Σw)). With μ = Σ b/(v + τ²) /
Σ 1/(v + τ²) the slope used is the empirical Bayes one (Efron and Morris 1975),

    β_e = (τ² b_e + v_e μ) / (τ² + v_e),    moved by no more than √v_e from b_e

(limited translation, Efron and Morris 1972: an estimator may have another unit for every example, and a slope that is
known well must not be drawn to theirs). An exact slope, v = 0, is kept and has no say in μ and τ². An example whose
estimates are all 0 has no slope of its own and gets μ.

**Intervals.** β â ± q s(β â), where s_e(x) = p_e (c₀ + c₁ |x| / x̄_e), c₀ + c₁ = 1: p_e the mean absolute residual of
the example, x̄_e its mean |β â|, and c₁ in [0, 0.95] the slope of |residual| / p_e on |x| / x̄_e over all examples, so
that an interval is wider where the effect is large, if residuals are. q is *cross-conformal*: the removals are dealt
into ``FOLDS`` folds by a seeded permutation; each one's normalised residual |a − β â| / s is by a fit to the other
folds; q is their quantile with the finite-sample correction, ⌈(R+1)(1−α)⌉ of R. The last β and s are of all
removals. Splitting in two instead would be exactly valid, but its slope and its quantile would each know half of few
removals; that β hardly moves as a fold leaves is what validity rests on here (Barber et al. 2021, section 1.2 and
theorem 5 for the weaker bound without it), and ``coverage`` measures it on removals that had no part in it.

The removals are what is exchangeable, never the pairs: residuals of one removal go together. An example with at least
``OWN`` removals has its own q. Below that, examples share one: each removal has mass 1/(R+1), dealt evenly to its
examples, and so has infinity (Dunn, Wasserman and Ramdas 2022; Lee, Barber and Willett 2023). It then holds on average
over the examples. An interval covers the *measured* effect of a removal drawn as the R were, noise of its seeds
included; not of one that was picked because its estimate is extreme, for which verifying is the answer. Simulated (five
kinds of noise, 20 to 77 removals): .91 to .95 at the level .9, and at least .93 below, where R+1 is coarse.

Pure functions over arrays of R removals × m evaluation examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fimo.workers.errors import UsageError

Array = NDArray[np.float64]

LEVEL = 0.9
FOLDS = 10
OWN = 50
"""Removals from which on an evaluation example has a quantile of its own."""

STEEPEST = 0.95


@dataclass(frozen=True)
class Fit:
    """What is fitted to removals: slopes, and scales of the residuals.

    Attributes:
        slope, own, variance: β, b (NaN = it has none) and v, (m,); ``common``: μ; ``spread``: τ².
        residual: p, ``size``: x̄, (m,); ``growth``: c₁.
    """

    slope: Array
    own: Array
    variance: Array
    common: float
    spread: float
    residual: Array
    size: Array
    growth: float

    def centre(self, estimates: Array) -> Array:
        """β â, (…, m)."""
        return self.slope * estimates

    def scale(self, estimates: Array) -> Array:
        """s(β â), (…, m)."""
        x = np.abs(self.centre(estimates))
        relative = np.divide(x, self.size, out=np.ones_like(x), where=self.size > 0)
        return self.residual * (1 - self.growth + self.growth * relative)


@dataclass(frozen=True)
class Calibration:
    """Effects and intervals from estimates.

    Attributes:
        fit: to all removals.
        quantile: q, (m,); infinite if there are too few removals for the level.
        noise: the share of the mean squared residual that is the gold standard's own noise, (m,); NaN = not known.
        line: what a person should know of the intervals; None = nothing.
    """

    fit: Fit
    quantile: Array
    noise: Array
    level: float
    removals: int
    line: str | None

    def at(self, place: int) -> Calibration:
        """Of one evaluation example alone."""
        names = ("slope", "own", "variance", "residual", "size")
        own = replace(self.fit, **{name: getattr(self.fit, name)[[place]] for name in names})
        return replace(self, fit=own, quantile=self.quantile[[place]], noise=self.noise[[place]])

    def effects(self, estimates: Array) -> tuple[Array, Array, Array]:
        """(effect, low, high) of estimates (n, m), each (n, m); low and high infinite without a quantile."""
        centre, scale = self.fit.centre(estimates), self.fit.scale(estimates)
        with np.errstate(invalid="ignore"):
            half = np.where(np.isinf(self.quantile), np.inf, self.quantile * scale)
        return centre, centre - half, centre + half


def calibrate(
    estimates: Array, effects: Array, sems: Array | None = None, level: float = LEVEL, seed: int = 0
) -> Calibration:
    """Fit slopes and intervals to R removals × m evaluation examples whose effects are known.

    Args:
        estimates, effects: float64 (R, m), finite.
        sems: standard errors of the effects, (R, m), NaN = not known; they are in the residuals already and decide
            nothing but ``noise``.
        level: of the intervals, between 0 and 1.
        seed: of the permutation that deals the removals into folds.

    Raises:
        UsageError: fewer than two removals, or a number that is not finite.
    """
    _check(estimates, effects)
    fitted = fit(estimates, effects)
    quantile, count = _quantile(_scores(estimates, effects, seed), level), len(effects)
    squares = np.square(effects - fitted.centre(estimates)).mean(axis=0)
    noise = np.full(effects.shape[1], np.nan)
    if sems is not None:
        np.divide(np.square(sems).mean(axis=0), squares, out=noise, where=squares > 0)
    line = None
    if np.isinf(quantile).all():
        line = f"{count} removals are too few for intervals at {level:.0%}: that takes {needed(level)}"
    return Calibration(fitted, quantile, np.minimum(noise, 1), level, count, line)


def needed(level: float) -> int:
    """The fewest removals R with ⌈(R+1) · level⌉ ≤ R."""
    return math.ceil(level / (1 - level) - 1e-9)


def _check(estimates: Array, effects: Array) -> None:
    if estimates.shape != effects.shape:
        raise UsageError(f"estimates {estimates.shape} and effects {effects.shape} are not of the same pairs")
    if len(effects) < 2:
        raise UsageError(f"calibration needs at least 2 removals whose effect is known, got {len(effects)}")
    if not (np.isfinite(estimates).all() and np.isfinite(effects).all()):
        raise UsageError("calibration needs finite estimates and effects; leave out the removals that have none")


def fit(estimates: Array, effects: Array) -> Fit:
    """Slopes and scales, see above."""
    own, variance = _own_slopes(estimates, effects)
    slope, common, spread = _shrunk(own, variance)
    x, residuals = np.abs(slope * estimates), np.abs(effects - slope * estimates)
    size, residual = x.mean(axis=0), residuals.mean(axis=0)
    return Fit(slope, own, variance, common, spread, residual, size, _growth(x, residuals, size, residual))


def _own_slopes(estimates: Array, effects: Array) -> tuple[Array, Array]:
    """b and v, (m,); NaN and infinity where the estimates are all 0."""
    removals, m = estimates.shape
    # Scale each example's estimates to 1: squares of 1e-200 are 0.
    unit = np.abs(estimates).max(axis=0)
    known = unit > 0
    z = np.divide(estimates, unit, out=np.zeros_like(estimates), where=known)
    squares = np.square(z).sum(axis=0)
    b = np.divide((z * effects).sum(axis=0), squares, out=np.full(m, np.nan), where=known)
    residuals = effects - np.where(known, b, 0.0) * z
    v = np.full(m, np.inf)
    np.divide((np.square(z) * np.square(residuals)).sum(axis=0), squares**2, out=v, where=known)
    b[known] /= unit[known]
    v[known] *= removals / (removals - 1) / unit[known] ** 2
    return b, v


def _shrunk(own: Array, variance: Array) -> tuple[Array, float, float]:
    """β (m,), μ and τ²."""
    # An exact slope (a perfect fit, effects that are all 0) is kept, and has no say about the others.
    noisy = np.isfinite(own) & (variance > 1e-24 * np.square(own))
    slope = np.where(np.isfinite(own), own, 0.0)
    if not noisy.any():
        common = float(own[np.isfinite(own)].mean()) if np.isfinite(own).any() else 0.0
        return np.where(np.isfinite(own), own, common), common, 0.0
    b, v = own[noisy], variance[noisy]
    unit = float(v.min())  # weights relative to the largest, so that none overflows
    w = unit / v
    mean = (w * b).sum() / w.sum()
    q, left = (w * np.square(b - mean)).sum() / unit, w.sum() - np.square(w).sum() / w.sum()
    spread = max(0.0, float((q - (len(b) - 1)) / (left / unit))) if left > 1e-12 * w.sum() else 0.0
    precision = 1 / (v + spread)
    common = float((precision * b).sum() / precision.sum())
    slope[~np.isfinite(own)] = common
    slope[noisy] = b + np.clip((common - b) * v / (spread + v), -np.sqrt(v), np.sqrt(v))
    return slope, common, spread


def _growth(x: Array, residuals: Array, size: Array, residual: Array) -> float:
    """c₁: how much of the residuals' size goes with the effect's."""
    defined = (size > 0) & (residual > 0)
    if not defined.any():
        return 0.0
    u, r = x[:, defined] / size[defined] - 1, residuals[:, defined] / residual[defined] - 1
    return float(np.clip((u * r).sum() / max(np.square(u).sum(), np.finfo(float).tiny), 0, STEEPEST))


def folds(count: int, parts: int, seed: int) -> list[NDArray[np.int64]]:
    """``range(count)`` dealt into at most ``parts`` folds by a seeded permutation."""
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(order[start :: min(parts, count)]) for start in range(min(parts, count))]


def _scores(estimates: Array, effects: Array, seed: int) -> Array:
    """Normalised residuals (R, m) of each removal by a fit to the other folds; 0/0 is 0."""
    scores = np.zeros_like(effects)
    for out in folds(len(effects), FOLDS, seed):
        rest = np.setdiff1d(np.arange(len(effects)), out)
        fitted = fit(estimates[rest], effects[rest])
        residuals, scale = np.abs(effects[out] - fitted.centre(estimates[out])), fitted.scale(estimates[out])
        beyond = np.where(residuals > 0, np.inf, 0.0)
        scores[out] = np.divide(residuals, scale, out=beyond, where=scale > 0)
    return scores


def _quantile(scores: Array, level: float) -> Array:
    """q (m,) of scores (R, m); infinite if the level takes more removals."""
    removals, m = scores.shape
    if removals < needed(level):
        return np.full(m, np.inf)
    if removals >= OWN:
        place = math.ceil((removals + 1) * level - 1e-9) - 1
        own: Array = np.sort(scores, axis=0)[place]
        return own
    # Mass 1/((R+1) m) a pair: the smallest value with mass ``level`` at or below it.
    place = math.ceil((removals + 1) * m * level - 1e-9) - 1
    return np.full(m, np.sort(scores, axis=None)[place])


def coverage(
    estimates: Array, effects: Array, level: float = LEVEL, parts: int = FOLDS, seed: int = 0
) -> tuple[float, float] | None:
    """How often intervals hold effects that had no part in them, and its standard error over removals.

    Each of ``parts`` folds of removals is checked by a calibration on the others, its own cross-fitting included. None
    if those are too few for finite intervals.

    Raises:
        UsageError: as ``calibrate``.
    """
    _check(estimates, effects)
    # Another permutation than the calibrations' own.
    dealt = folds(len(effects), parts, seed + 1)
    if len(effects) - max(map(len, dealt)) < max(needed(level), 2):
        return None
    inside = np.zeros(len(effects))
    for out in dealt:
        rest = np.setdiff1d(np.arange(len(effects)), out)
        calibration = calibrate(estimates[rest], effects[rest], level=level, seed=seed)
        _, low, high = calibration.effects(estimates[out])
        inside[out] = ((low <= effects[out]) & (effects[out] <= high)).mean(axis=1)
    return float(inside.mean()), float(inside.std(ddof=1) / np.sqrt(len(inside)))
