"""How far a mean over seeds can be trusted: reliability and the ceiling of a cosine, from its own noise.

For an evaluation example, let ē be the mean effects over k seeds, R removals long. ē is the truth μ plus noise.
Reliability is the truth's share of what is expected of ‖ē‖², ρ = P / (P + N) with P = ‖μ‖² and N = Σ_r sem_r²; at m
seeds N is k/m times as large. The ceiling is the cosine that μ itself, a perfect estimate, is expected to reach against
ē (Schoppe et al. 2016, CCnorm; Spearman 1904). If N is known and R is large, P = ‖ē‖² − N and the ceiling is √ρ.

In practice P is not known well, for two reasons, and a plug-in is off by up to a factor of two (tested):

* A square root and a maximum with 0 are not linear. Where noise is as large as signal they shift a mean by 5 to 20%. So
  the signal-to-noise ratio q = P/N of an example gets a distribution, its *posterior*. Its prior is log-normal, but for
  a share of examples that have no signal at all (a model is often sure of half of them). The prior's three numbers
  are averaged over, weighted by what all evaluation examples say (empirical Bayes).
* Without adjustment (eq. 17) all removals of a seed share their baseline's noise, which moves ē along one direction,
  the constant vector. One number carries that noise, so it does not average out: sometimes it hides the signal, mostly
  it does not. So ē is split into its mean over removals, ā, and what is centred. The truth's mean over removals gets a
  normal prior of variance ϑ·P/R, with ϑ common to all examples. The variance of ā has k − 1 degrees of freedom; it
  borrows from other examples in proportion to how well N predicts it (Smyth 2004, moderated variances).

Pure functions over arrays; the last axis runs over evaluation examples, and one step is looked at at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_Q = np.concatenate([[0.0], np.geomspace(3e-3, 1e6, 128)])
_THETA = np.concatenate([[0.0], np.geomspace(1e-3, 1e2, 30)])
_TINY = 1e-300
_DEAD = (0.0, 0.2, 0.4, 0.6, 0.8)
_ALIVE_ODDS = 1000.0
"""Shares of evaluation examples without any signal; how much likelier none is beforehand than any of the others."""
POINTS = 9
"""Quantiles that stand for a distribution where it meets others."""


@dataclass(frozen=True)
class Moments:
    """What the seeds say of one step's effects, (m,) of each evaluation example.

    Attributes:
        k: seeds averaged, at least 2; ``r``: removals, at least 2.
        square: ‖centred ē‖²; ``noise``: Σ_r of the squared standard errors of the centred effects.
        narrow: Σ_r of their squared shares in ``noise``: 1/R if removals are equally noisy, 1 if one alone is.
        aligned: Σ_r of a removal's share in ``square`` times its share in ``noise``.
        mean: ē's mean over removals; ``wobble``: its squared standard error.
    """

    k: int
    r: int
    square: Array
    noise: Array
    narrow: Array
    aligned: Array
    mean: Array
    wobble: Array


def moments(k: int, centred: Array, centred_m2: Array, mean: Array, mean_m2: Array) -> Moments:
    """Moments of one step from running means and sums of squared deviations over ``k`` seeds.

    Args:
        centred: mean over seeds of effects centred over removals, float64 (R, m); ``centred_m2`` belongs to it.
        mean: mean over seeds of effects' mean over removals, float64 (m,); ``mean_m2`` belongs to it.
    """
    squared_sem = centred_m2 / (k * (k - 1))
    noise, squares = squared_sem.sum(axis=0), centred**2
    square = squares.sum(axis=0)
    shares = _share(squared_sem, noise)
    return Moments(
        k=k,
        r=len(centred),
        square=square,
        noise=noise,
        # A variance of k − 1 degrees of freedom, squared, is too large by this factor.
        narrow=(shares**2).sum(axis=0) / (1 + 2 / (k - 1)),
        aligned=(_share(squares, square) * shares).sum(axis=0),
        mean=mean,
        wobble=mean_m2 / (k * (k - 1)),
    )


class Trust:
    """Reliability and ceilings at one step, for an adjustment; ``fimo.orchestrator.tables.trust`` has the model."""

    def __init__(self, of: Moments, adjust: str) -> None:
        self.of, self.adjust = of, adjust
        self._q = _ratio_posterior(of)
        self._shift = _Shift(of, self._q) if adjust == "baseline" else None
        self._points = _quantiles(_Q, self._q)

    def reliability(self, seeds: int | None = None, noise: Array | None = None) -> Array:
        """The truth's share of a mean over ``seeds`` (default: those there are), float64 (m,), between 0 and 1.

        Args:
            noise: what is known of it from more seeds than these (``noise``), scaled to as many seeds as these.
        """
        times = self.of.k / (seeds or self.of.k)
        signal = _power(self.of, _Q)
        noise = ((self.noise if noise is None else noise) * times)[:, None]
        if self._shift is None:
            alone: Array = (self._q * _share(signal, signal + noise)).sum(axis=1)
            return alone
        out = np.zeros(len(signal))
        for theta in self._shift.points:
            power = signal * (1 + theta)
            out += (self._q * _share(power, power + noise)).sum(axis=1)
        return out / len(self._shift.points)

    @property
    def noise(self) -> Array:
        """N: what noise adds to ‖ē‖², float64 (m,)."""
        return self.of.noise if self._shift is None else self.of.noise + self.of.r * self._shift.wobble

    def ceiling(self, seeds: int | None = None) -> Array:
        """The cosine that a perfect estimate is expected to reach, float64 (m,).

        Against ē as it is, or against a mean over ``seeds`` others.
        """
        if self._shift is None:
            times = self.of.k / (seeds or self.of.k)
            out: Array = (self._q * np.sqrt(_Q / (_Q + times))).sum(axis=1)
            return out
        return self._here() if seeds is None else self._elsewhere(seeds)

    def _here(self) -> Array:
        assert self._shift is not None
        of, shift = self.of, self._shift
        length = np.sqrt(of.square + of.r * of.mean**2)[:, None]
        power = of.square[:, None] * (self._points / (1 + self._points))
        total = np.zeros(power.shape)
        for theta in shift.points:
            prior = theta * shift.signal / of.r
            kept = _share(prior, prior + shift.wobble)
            for node, weight in _nodes(5):
                mean = kept * of.mean + np.sqrt(kept * shift.wobble) * node
                norms = np.sqrt(power + (of.r * mean**2)[:, None]) * length
                total += weight * _share(power + (of.r * mean * of.mean)[:, None], norms)
        return self._averaged(total)

    def _elsewhere(self, seeds: int) -> Array:
        assert self._shift is not None
        of, shift, times = self.of, self._shift, self.of.k / seeds
        power = _power(of, self._points)
        centred = power + (of.noise * times)[:, None]
        total = np.zeros(power.shape)
        for theta in shift.points:
            spread = np.sqrt(theta * shift.signal / of.r)
            for node, weight in _nodes(3):
                mean = spread * node
                own = power + (of.r * mean**2)[:, None]
                for other, other_weight in _nodes(5):
                    met = mean + np.sqrt(shift.wobble * times) * other
                    norms = np.sqrt(own * (centred + (of.r * met**2)[:, None]))
                    total += weight * other_weight * _share(power + (of.r * mean * met)[:, None], norms)
        return self._averaged(total)

    def _averaged(self, total: Array) -> Array:
        """Over the points of ϑ and of q, which weigh alike."""
        assert self._shift is not None
        mean: Array = total.mean(axis=1) / len(self._shift.points)
        return np.clip(mean, 0, 1)


class _Shift:
    """What is known of the truth's mean over removals: quantiles of ϑ, and the moderated variance of ā."""

    def __init__(self, of: Moments, posterior: Array) -> None:
        from scipy.stats import t as student  # slow to import; see ``agreement.ranks``

        self.signal = (posterior * _power(of, _Q)).sum(axis=1)
        self.wobble, freedom = _moderated(of.wobble, of.noise / of.r, of.k - 1)
        known = self.wobble > 0
        if not known.any():
            # Nothing moves ā: what is seen is the truth's.
            self.points = _THETA[-1:]
            return
        ratio = 1 + _THETA * (self.signal[known] / of.r / self.wobble[known])[:, None]
        seen = (of.mean[known] / np.sqrt(self.wobble[known]))[:, None]
        logs = student.logpdf(seen / np.sqrt(ratio), freedom[known][:, None]) - np.log(ratio) / 2
        self.points = _quantiles(_THETA, _normalised(logs.sum(axis=0))[None])[0]


def _power(of: Moments, q: Array) -> Array:
    """P for ratios q, float64 (m, …): all that is seen where there is no noise."""
    return np.where(of.noise[:, None] > 0, q * of.noise[:, None], of.square[:, None])


def _ratio_posterior(of: Moments) -> Array:
    """The distribution of q = P/N of each evaluation example over the grid ``_Q``, float64 (m, Q).

    ‖centred ē‖²/N has mean 1 + q. Its variance is that of signal times noise, of noise squared, and of N's estimate.
    """
    # Beyond the grid there is nothing to tell apart.
    seen = np.minimum(_share(of.square, of.noise), 2 * _Q[-1])
    narrow = np.clip(of.narrow, 1 / of.r, 1)
    along = np.clip((of.aligned * seen - of.narrow) / np.maximum(seen - 1, 0.1), 1 / of.r, 1)
    variance = 4 * _Q * along[:, None] + 2 * narrow[:, None] * (1 + (1 + _Q) ** 2 / (of.k - 1))
    logs = -((seen[:, None] - 1 - _Q) ** 2) / (2 * variance) - np.log(variance) / 2
    prior = _priors()
    likelihood = np.exp(logs - logs.max(axis=1, keepdims=True))
    alive, dead = likelihood @ prior, likelihood[:, :1]
    odds = np.log([_ALIVE_ODDS if share == 0 else 1.0 for share in _DEAD])[:, None]
    weights = _normalised(odds + [np.log(_evidence(alive, dead, share)).sum(axis=0) for share in _DEAD])
    posterior: Array = np.zeros_like(likelihood)
    # One share at a time: with many evaluation examples these arrays are large.
    for share, weight in zip(_DEAD, weights, strict=True):
        ratio = weight / _evidence(alive, dead, share)
        posterior += (1 - share) * (ratio @ prior.T)
        posterior[:, 0] += share * ratio.sum(axis=1)
    posterior *= likelihood
    posterior /= np.maximum(posterior.sum(axis=1, keepdims=True), _TINY)
    # No noise at all: what is seen is the truth. No effect at all: nothing of it is.
    silent = of.noise <= 0
    posterior[silent] = 0.0
    posterior[silent, np.where(of.square[silent] > 0, -1, 0)] = 1.0
    return posterior


def _evidence(alive: Array, dead: Array, share: float) -> Array:
    return np.maximum((1 - share) * alive + share * dead, _TINY)


@lru_cache(maxsize=1)
def _priors() -> Array:
    """Log-normal priors of q on the grid, float64 (Q, priors)."""
    logs = np.log(_Q[1:])
    middles, widths = np.arange(-6.0, 14.0, 0.2), np.array([0.1, 0.3, 0.6, 1.0, 1.6, 2.5])
    bells = np.exp(-(((logs[:, None, None] - middles[:, None]) / widths) ** 2) / 2).reshape(len(logs), -1)
    return np.concatenate([np.zeros((1, bells.shape[1])), bells / bells.sum(axis=0)])


def _quantiles(grid: Array, weights: Array) -> Array:
    """``POINTS`` quantiles of distributions (m, grid) over a grid, float64 (m, POINTS): a sum over them is cheap."""
    wanted = (np.arange(POINTS) + 0.5) / POINTS
    places = (np.cumsum(weights, axis=1)[:, None, :] < wanted[:, None]).sum(axis=2)
    out: Array = grid[np.minimum(places, len(grid) - 1)]
    return out


@lru_cache(maxsize=2)
def _nodes(count: int) -> tuple[tuple[float, float], ...]:
    """Gauss-Hermite nodes and weights of a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return tuple(zip(nodes.tolist(), (weights / weights.sum()).tolist(), strict=True))


def _normalised(logs: Array) -> Array:
    weights = np.exp(logs - logs.max())
    out: Array = weights / weights.sum()
    return out


def _share(part: Array, whole: Array) -> Array:
    """``part / whole``, 0 where the whole is."""
    out: Array = np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole > 0)
    return out


def _moderated(variances: Array, expected: Array, freedom: int) -> tuple[Array, Array]:
    """Variances that borrow from each other, and their degrees of freedom (Smyth 2004, section 6).

    Args:
        variances: estimates of ``freedom`` degrees of freedom, float64 (m,).
        expected: what they are thought to be in proportion to, float64 (m,).
    """
    own = np.full(len(variances), float(freedom))
    usable = (variances > 0) & (expected > 0)
    if usable.sum() < 3:
        return variances, own
    from scipy.optimize import brentq
    from scipy.special import digamma, polygamma

    def trigamma(x: float) -> float:
        return float(polygamma(1, x))

    logs = np.log(variances[usable] / expected[usable]) - digamma(freedom / 2) + np.log(freedom / 2)
    excess = float(logs.var(ddof=1)) - trigamma(freedom / 2)
    most, least = 1e4, 1e-2
    if excess >= trigamma(least / 2):
        return variances, own
    lent = most if excess <= trigamma(most / 2) else brentq(lambda x: trigamma(x / 2) - excess, least, most)
    middle = np.exp(logs.mean() + digamma(lent / 2) - np.log(lent / 2)) * expected
    mixed = (lent * middle + freedom * variances) / (lent + freedom)
    return np.where(usable, mixed, variances), np.where(usable, own + lent, own)
