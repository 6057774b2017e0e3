"""How well an estimate agrees with an attribution, for each evaluation example over the removals.

Arrays run over removals first. What is undefined is NaN here, never 0, and is counted by whoever averages.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def dot(a: Array, b: Array) -> Array:
    """Inner product over the first axis of arrays (R, …) that broadcast against each other, without a temporary."""
    out: Array = np.einsum("r...,r...->...", a, b)
    return out


def norm(a: Array) -> Array:
    """Euclidean norm over the first axis."""
    return np.sqrt(dot(a, a))


def cosine(a: Array, b: Array, norm_a: Array | None = None, norm_b: Array | None = None) -> Array:
    """Cosine similarity over the first axis, float64 (…); NaN for a vector of zeros.

    Args:
        a, b: float64 (R, …), broadcast against each other.
        norm_a, norm_b: their norms over the first axis, if the caller has them already.
    """
    norms = (norm(a) if norm_a is None else norm_a) * (norm(b) if norm_b is None else norm_b)
    return divide(dot(a, b), norms)


def divide(dots: Array, norms: Array) -> Array:
    """``dots / norms``, NaN for a norm of zero; in C order, which later sums depend on in their last bit."""
    out: Array = np.empty(dots.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        np.divide(dots, norms, out=out)
    if not (norms > 0).all():
        np.copyto(out, np.nan, where=~(norms > 0))
    return out


def adjusted(effects: Array, adjust: str) -> Array:
    """Effects under one of the two adjustments for the training-only effect (Wei et al. 2025).

    ``baseline``: as they are, the baseline having been subtracted (eq. 17). ``mean``: their mean over the removals
    subtracted (eq. 13).
    """
    return effects - effects.mean(axis=0) if adjust == "mean" else effects


def undefined(effects: Array, floor: Array | float, norms: Array | None = None) -> NDArray[np.bool_]:
    """Which vectors over removals carry no signal: constant, or its root mean square not above the noise floor.

    Args:
        effects: float64 (R, …), adjusted.
        floor: the noise of such an effect, broadcast against the rest of the shape.
        norms: those of the vectors, if the caller has them already.
    """
    constant = effects[0] == effects[min(1, len(effects) - 1)]
    if constant.any():
        constant = np.ptp(effects, axis=0) == 0
    rms = (norm(effects) if norms is None else norms) / np.sqrt(len(effects))
    out: NDArray[np.bool_] = constant | (rms <= floor)
    return out


def mean_and_sem(values: Array) -> tuple[float | None, float | None, int]:
    """Mean, standard error and number of the values that are not NaN; None if too few are left."""
    kept = values[~np.isnan(values)]
    if not len(kept):
        return None, None, 0
    sem = float(kept.std(ddof=1) / np.sqrt(len(kept))) if len(kept) > 1 else None
    return float(kept.mean()), sem, len(kept)
