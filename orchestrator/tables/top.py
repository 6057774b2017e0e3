"""The most helpful and the most harmful removals of one evaluation example, from a sweep's tables; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fimo.orchestrator.tables.significance import FALSE_DISCOVERIES
from fimo.workers.errors import UsageError

LEVEL = 0.95
"""Of the intervals."""


@dataclass(frozen=True)
class Effect:
    """One removal's effect on the evaluation example, in units of g.

    Attributes:
        removal: its number; ``name``, ``indices``, ``ids`` and ``labels`` as in ``removals.parquet``.
        low, high: the ends of the 95% interval of the mean over seeds, by Student's t; None with one seed.
        told: whether it can be told from zero: above the noise floor, and significant with false discoveries
            controlled over all removals of the example; None with one seed.
        relative: the effect as a share of |g(z, θᶠ)|; None if that is 0 or not known.
    """

    removal: int
    name: str
    indices: tuple[int, ...]
    ids: tuple[str, ...] | None
    labels: tuple[str, ...] | None
    effect: float
    sem: float | None
    low: float | None
    high: float | None
    p: float | None
    told: bool | None
    relative: float | None

    @property
    def helpful(self) -> bool:
        """Whether removing it raises g: for g = loss, the example helped."""
        return self.effect > 0


@dataclass(frozen=True)
class Top:
    """The effects of an evaluation example at one step, the most helpful first.

    Attributes:
        at_final: g(z, θᶠ); None if the parts are from before it was kept.
        training_only: what training on everything does to g.
    """

    eval: int
    step: int
    epoch: float
    seeds: int
    at_final: float | None
    training_only: float | None
    effects: tuple[Effect, ...]

    def shown(self, count: int) -> tuple[list[Effect], list[Effect]]:
        """At most ``count`` helpful and ``count`` harmful removals, the largest effects first."""
        helpful = [e for e in self.effects if e.effect > 0][:count]
        harmful = [e for e in reversed(self.effects) if e.effect < 0][:count]
        return helpful, harmful


def top(tables: Mapping[str, pa.Table], number: int, step: int | None = None) -> Top:
    """All effects on an evaluation example at a recorded step (default: the last), largest first.

    Raises:
        UsageError: the sweep has no effect on this example, or none at this step.
    """
    table = tables["attribution"]
    rows = table.filter(pc.equal(table["eval"], number))
    if not len(rows):
        count = (pc.max(table["eval"]).as_py() or 0) + 1 if len(table) else 0
        raise UsageError(
            f"there is no effect on evaluation example {number}: "
            + (f"the sweep has examples 0 to {count - 1}" if count else "nothing is trained yet")
        )
    steps = sorted(set(rows["step"].to_pylist()))
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UsageError(f"step {step} is not recorded; the sweep has {', '.join(map(str, steps[:20]))}")
    found = rows.filter(pc.equal(rows["step"], step)).to_pylist()
    at_final, delta = _of_g(tables["training_only"], number, step)
    removals = {row["removal"]: row for row in tables["removals"].to_pylist()}
    told = _told(found)
    effects = [_effect(row, removals[row["removal"]], t, at_final) for row, t in zip(found, told, strict=True)]
    effects.sort(key=lambda e: (-e.effect, e.removal))
    most = max(row["seeds"] for row in found)
    return Top(number, step, found[0]["epoch"], most, at_final, delta, tuple(effects))


def _of_g(table: pa.Table, number: int, step: int) -> tuple[float | None, float | None]:
    here = table.filter(pc.and_(pc.equal(table["eval"], number), pc.equal(table["step"], step))).to_pylist()
    return (here[0]["at_final"], here[0]["delta"]) if here else (None, None)


def _told(rows: list[dict[str, Any]]) -> list[bool | None]:
    """Whether each can be told from zero, with false discoveries controlled over those whose p is known."""
    from scipy.stats import false_discovery_control  # slow to import

    p = np.array([math.nan if row["p"] is None else row["p"] for row in rows])
    known = np.isfinite(p)
    adjusted = np.full(len(p), math.nan)
    if known.any():
        adjusted[known] = false_discovery_control(p[known])
    return [
        bool(a <= FALSE_DISCOVERIES and not row["under_floor"]) if k else None
        for row, a, k in zip(rows, adjusted, known, strict=True)
    ]


def _effect(row: Mapping[str, Any], removal: Mapping[str, Any], told: bool | None, at_final: float | None) -> Effect:
    from scipy.special import stdtrit

    effect, sem, seeds = row["effect"], row["sem"], row["seeds"]
    half = None if sem is None or seeds < 2 else float(stdtrit(seeds - 1, (1 + LEVEL) / 2)) * sem
    return Effect(
        removal=row["removal"],
        name=removal["name"],
        indices=tuple(removal["indices"]),
        ids=_texts(removal["ids"]),
        labels=_texts(removal["labels"]),
        effect=effect,
        sem=sem,
        low=None if half is None else effect - half,
        high=None if half is None else effect + half,
        p=row["p"],
        told=told,
        relative=effect / abs(at_final) if at_final else None,
    )


def _texts(values: list[str | None] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(value or "" for value in values)
