"""A sweep's tables as matrices, removals × evaluation examples at one step, and what figures show of them; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fimo.orchestrator.tables.agreement import adjusted, cosine, undefined
from fimo.orchestrator.tables.ordering import ranks
from fimo.orchestrator.tables.ranking import rank_of

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Effects:
    """The attribution at one step, of the removals that have it.

    Attributes:
        removals: their numbers, int64 (R,), ascending.
        mean, sem: effects and their standard errors over seeds, float64 (R, m); NaN where there is none.
        floor: the noise floor of each evaluation example's effects, float64 (m,), at most: as large as the largest
            effect that the table says is under it.
    """

    step: int
    removals: NDArray[np.int64]
    mean: Array
    sem: Array
    floor: Array

    @property
    def evals(self) -> int:
        """How many evaluation examples."""
        return int(self.mean.shape[1])

    @property
    def complete(self) -> NDArray[np.bool_]:
        """Which removals have an effect on every evaluation example, bool (R,)."""
        out: NDArray[np.bool_] = np.asarray(np.isfinite(self.mean).all(axis=1))
        return out


def steps_of(table: pa.Table) -> list[int]:
    """The steps that a table has, ascending; a row of every amount (null) counts for none."""
    return sorted(value for value in pc.unique(table["step"]).to_pylist() if value is not None)


def where(table: pa.Table, **equal: Any) -> pa.Table:
    """The rows whose columns have these values; None is null."""
    for name, value in equal.items():
        column = table[name]
        table = table.filter(pc.is_null(column) if value is None else pc.equal(column, value))
    return table


def numbers(table: pa.Table, name: str) -> Array:
    """A column as float64, NaN for null."""
    out: Array = np.asarray(table[name].cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)
    return out


def effects_at(attribution: pa.Table, step: int) -> Effects:
    """The attribution at a step as matrices."""
    rows = where(attribution, step=step)
    removal, example = (rows[name].to_numpy().astype(np.int64) for name in ("removal", "eval"))
    found = np.unique(removal)
    place = np.searchsorted(found, removal)
    shape = (len(found), int(example.max(initial=-1)) + 1)
    mean, sem = np.full(shape, np.nan), np.full(shape, np.nan)
    mean[place, example], sem[place, example] = numbers(rows, "effect"), numbers(rows, "sem")
    floor = np.zeros(shape[1])
    under = rows["under_floor"].fill_null(False).to_numpy(zero_copy_only=False).astype(bool)
    np.maximum.at(floor, example[under], np.abs(numbers(rows, "effect")[under]))
    return Effects(step, found, mean, sem, floor)


def estimate_at(estimates: pa.Table, named: tuple[str, str], effects: Effects) -> Array | None:
    """An estimator's values at the effects' step, float64 as they; None if it has none there."""
    own = where(estimates, estimator=named[0], params=named[1])
    rows = where(own, step=effects.step)
    rows = rows if len(rows) else where(own, step=None)
    if not len(rows):
        return None
    removal, example = (rows[name].to_numpy().astype(np.int64) for name in ("removal", "eval"))
    kept = np.isin(removal, effects.removals) & (example < effects.evals)
    out = np.full(effects.mean.shape, np.nan)
    place = np.searchsorted(effects.removals, removal[kept])
    out[place, example[kept]] = numbers(rows, "value")[kept]
    return out


def agreement_by_example(effects: Effects, values: Array, metric: str = "cosine", adjust: str = "baseline") -> Array:
    """Agreement of an estimate with the attribution for each evaluation example, float64 (m,); NaN where undefined.

    Its mean is the score of ``scores.parquet`` at the same step (``fimo.orchestrator.tables.score``).
    """
    kept = effects.complete
    if kept.sum() < 2:
        return np.full(effects.evals, np.nan)
    gold, other = adjusted(effects.mean[kept], adjust), values[kept]
    agreement = cosine(ranks(gold), ranks(other)) if metric != "cosine" else cosine(gold, other)
    return np.where(undefined(gold, effects.floor), np.nan, agreement)


def known_ranks(values: Array) -> NDArray[np.int64]:
    """Ranks from 1, the largest value first, over the first axis; 0 where there is no value."""
    return np.where(np.isnan(values), 0, rank_of(values))


def at_seeds(score: float, ceiling: float, other: float) -> float:
    """The score that is expected of a mean over another number of seeds, by its ceiling there.

    An estimate's agreement with the truth does not depend on seeds, so that its score is a fixed share of the ceiling
    (the correction for attenuation, Spearman 1904).
    """
    return score / ceiling * other


def own_rows(reliability: pa.Table, adjust: str = "baseline") -> list[Mapping[str, Any]]:
    """The rows of the sweep's own seeds, by step."""
    rows = where(where(reliability, adjust=adjust), measured=True).to_pylist()
    return sorted(rows, key=lambda row: int(row["step"]))
