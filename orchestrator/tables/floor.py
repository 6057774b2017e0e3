"""The noise floor: what rounding alone makes of an effect, measured on witnesses. Pure functions.

A witness is a cell of the sweep trained again so that it rounds otherwise (``fimo.workers.witness``). With d_ws the
difference of the effects of removal w in seed s, the noise of one effect is √mean d², by step and evaluation example.
The share of d² that the seeds have in common is the mean over pairs of seeds of d_ws · d_ws' beside it. Averaging over
k seeds leaves the common part as it is and divides the rest by k.

Few witnesses miss what rounding does seldom, which is most of it: see ``_of_runs`` for what moved runs add.

The share is one number a step: so few products are mostly chance, of which cutting them off at 0 keeps the half that
says too much. Measured on Concrete (16 witnesses in 4 seeds, a mean over 20 seeds, step 1): truth 2.3e-8, with one
share 3.2e-8, with one for each evaluation example 4.2e-8.

For ``adjust: mean`` the differences are centred over the removals first, c of them, and their squares multiplied by
c/(c−1): what the removals have in common (the baseline's rounding) drops out of centred effects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MOST_OFTEN = 64.0
"""Times that moving θᶠ makes more frequent what is seldom, at most."""
FAR = 2.0
"""Times its usual size by which a run's difference is told to be of the seldom kind."""
NEAR = 0.25
"""Logarithm of the ratio of two steps that are near each other."""


@dataclass(frozen=True)
class Pair:
    """One seed's effects and their witnesses'.

    Attributes:
        removals: W removals as training indices.
        sweep, witness: float64 (W, T, m), NaN where there is none.
        runs: the differences of the runs' own deltas, cells and baseline, (n, T, m).
        moved: the same of runs in the sweep's precision from θᶠ moved by more than rounding, (k, T, m); None = none.
        steps: the T steps.
    """

    removals: tuple[tuple[int, ...], ...]
    sweep: Array
    witness: Array
    runs: Array | None = None
    moved: Array | None = None
    steps: tuple[int, ...] = ()

    @property
    def differences(self) -> Array:
        """Witness less sweep, (W, T, m); NaN at the steps where a cell lacks any value."""
        difference = self.witness - self.sweep
        finite = np.isfinite(difference).all(axis=2, keepdims=True)
        return np.where(finite, difference, np.nan)

    def at(self, removals: Sequence[tuple[int, ...]]) -> Array:
        """The differences of some of the removals."""
        return self.differences[[self.removals.index(removal) for removal in removals]]


@dataclass(frozen=True)
class Floor:
    """The noise of effects, by adjustment (``baseline``, ``mean``).

    Attributes:
        one: of one effect, float64 (T, m).
        common: the part of its square that does not average out over seeds, float64 (T, m).
        measured: whether witnesses say so; else it is a lower bound, from second baselines.
        witnesses: how many cells say so.
    """

    one: Mapping[str, Array]
    common: Mapping[str, Array]
    measured: bool = False
    witnesses: int = 0

    def of_mean(self, k: int, adjust: str = "baseline") -> Array:
        """The noise of a mean over ``k`` seeds, float64 (T, m)."""
        square, common = self.one[adjust] ** 2, self.common[adjust]
        result: Array = np.sqrt(common + (square - common) / max(k, 1))
        return result


@dataclass(frozen=True)
class Measured:
    """What witnesses say, whatever second baselines and the size of the sweep are.

    Attributes:
        count: witnesses.
        squares: the mean square of their differences, by adjustment, (T, m); ``shares``: common to seeds, (T, 1).
        of_runs: the squares that are expected of a cell without a witness; None if no run was moved.
    """

    count: int
    squares: Mapping[str, Array]
    shares: Mapping[str, Array]
    of_runs: Mapping[str, Array] | None

    def at(self, steps: slice) -> Measured:
        """What they say of some steps."""
        kept = [
            None if of is None else {adjust: values[steps] for adjust, values in of.items()}
            for of in (self.squares, self.shares, self.of_runs)
        ]
        return Measured(self.count, kept[0] or {}, kept[1] or {}, kept[2])

    def floor(self, second: Array, cells: int = 0) -> Floor:
        """The floor, nowhere below that of second baselines; by those alone where there is no witness.

        Args:
            second: the root mean square difference of two baselines, float64 (T, m).
            cells: of the whole sweep: the noise of those that have witnesses is known, of the others it is expected.
        """
        if not self.count:
            zero = np.zeros_like(second)
            return Floor({"baseline": second, "mean": second}, {"baseline": zero, "mean": zero})
        squares = self.squares
        if self.of_runs is not None:
            known = min(1.0, self.count / cells) if cells else 0.0
            squares = {
                adjust: known * square + (1 - known) * self.of_runs[adjust] for adjust, square in squares.items()
            }
        floors = {adjust: np.fmax(np.sqrt(square), second) for adjust, square in squares.items()}
        common = {adjust: self.shares[adjust] * one**2 for adjust, one in floors.items()}
        return Floor(floors, common, True, self.count)


def measured(pairs: Sequence[Pair]) -> Measured:
    """What the pairs, one for each seed that has witnesses, say of rounding."""
    count = sum(int((~np.isnan(pair.differences[:, :, 0])).any(axis=1).sum()) for pair in pairs)
    if not count:
        return Measured(0, {}, {}, None)
    each = [pair.differences for pair in pairs]
    both = [
        (one.at(shared), other.at(shared))
        for one, other in combinations(pairs, 2)
        if (shared := [r for r in one.removals if r in other.removals])
    ]
    squares = {"baseline": _mean_product([(d, d) for d in each]), "mean": _centred_product([(d, d) for d in each])}
    products = {"baseline": _mean_product(both), "mean": _centred_product(both)}
    # One removal has nothing to be centred over, and a step at which all witnesses diverged has only second baselines.
    squares["mean"] = np.where(np.isnan(squares["mean"]), squares["baseline"], squares["mean"])
    shares = {adjust: _share(products[adjust], square) for adjust, square in squares.items()}
    return Measured(count, squares, shares, _of_runs(pairs))


def _of_runs(pairs: Sequence[Pair]) -> dict[str, Array] | None:
    """The squared noise of an effect from what rounding does to runs, seldom and always; None if no run was moved.

    Witnesses say what rounding does to a run in between: the least that any of them shows, by step. Moved runs show
    what is seldom, ``often`` times as frequently: as much as their common differences are larger than the witnesses'.
    An effect has what a run has in between, since cell and baseline round alike, and twice what is seldom, since either
    may have it; a centred effect once. By step, drawn towards neighbouring steps.
    """
    runs = [pair.runs for pair in pairs if pair.runs is not None and len(pair.runs)]
    moves = [pair.moved for pair in pairs if pair.moved is not None and len(pair.moved)]
    if not runs or not moves:
        return None
    fine, moved = np.concatenate(runs), np.concatenate(moves)
    of_fine, of_moved = (np.square(d).mean(axis=2) for d in (fine, moved))
    always, common = of_fine.min(axis=0), np.quantile(of_moved, 0.25, axis=0)
    known = (always > 0) & (common > 0)
    ratio = np.log(common[known] / always[known]).mean() / 2 if known.any() else 0.0
    often = float(np.clip(np.exp(ratio), 1, MOST_OFTEN))
    excess = _excess(of_moved, common) + _excess(of_fine, always)
    steps = next(pair.steps for pair in pairs if pair.moved is not None)
    seldom = _smoothed(excess / (often * len(of_moved) + len(of_fine)), steps)
    both = np.concatenate([fine, moved])
    sizes = np.square(both).mean(axis=2, keepdims=True)
    shape = np.divide(np.square(both), sizes, out=np.ones_like(both), where=sizes > 0).mean(axis=0)
    return {adjust: (always + times * seldom)[:, None] * shape for adjust, times in (("baseline", 2), ("mean", 1))}


def _excess(squares: Array, usual: Array) -> Array:
    """Σ over runs of what their squares, (n, T), have beyond the usual, (T,), where that is far beyond."""
    out: Array = np.where(squares > FAR**2 * usual, squares - usual, 0.0).sum(axis=0)
    return out


def _smoothed(values: Array, steps: Sequence[int]) -> Array:
    """Means over neighbouring steps, weighted by a Gaussian of their ratio's logarithm."""
    places = np.log(steps)
    weights = np.exp(-(((places[:, None] - places) / NEAR) ** 2) / 2)
    out: Array = weights @ values / weights.sum(axis=1)
    return out


def _mean_product(factors: Sequence[tuple[Array, Array]]) -> Array:
    """The mean of products over removals, of all factors together, (T, m); NaN where there is none."""
    total, count = np.zeros(()), np.zeros(())
    for one, other in factors:
        product = one * other
        total = total + np.nansum(product, axis=0)
        count = count + np.isfinite(product).sum(axis=0)
    return _quotient(total, count)


def _centred_product(factors: Sequence[tuple[Array, Array]]) -> Array:
    """The same of factors centred over the removals that both have, each mean times c/(c−1)."""
    total, count = np.zeros(()), np.zeros(())
    for one, other in factors:
        present = np.isfinite(one * other)
        c = present.sum(axis=0)
        a, b = (np.where(present, d, 0.0) for d in (one, other))
        total = total + (a * b).sum(axis=0) - a.sum(axis=0) * b.sum(axis=0) / np.maximum(c, 1)
        count = count + np.maximum(c - 1, 0)
    return _quotient(total, count)


def _share(product: Array, square: Array) -> Array:
    """The share of the squares that is common to seeds, (T, 1); 0 if no two seeds can be compared."""
    # At a step without any pair the product is NaN, for all evaluation examples alike.
    product = np.broadcast_to(np.nan_to_num(product), square.shape).sum(axis=1)
    total = np.nan_to_num(square).sum(axis=1)
    return np.clip(np.where(total > 0, product / np.where(total > 0, total, 1), 0.0), 0.0, 1.0)[:, None]


def _quotient(total: Array, count: NDArray[np.float64 | np.int64]) -> Array:
    result: Array = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return result
