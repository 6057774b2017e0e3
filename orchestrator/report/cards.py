"""The training examples that matter most for an evaluation example, as what a reader is shown of each; no I/O.

From the sweep's own removals, or, where ``fimo rank`` has ranked this evaluation example, from every training example,
measured where that has been done and estimated where not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fimo.orchestrator.report.figures.style import Named
from fimo.orchestrator.report.gallery import Gallery, Shown
from fimo.orchestrator.report.top import NAMES, named
from fimo.orchestrator.tables.calibration import LEVEL as CALIBRATED
from fimo.orchestrator.tables.matrices import Effects, estimate_at, known_ranks, where
from fimo.orchestrator.tables.top import LEVEL, Effect, Top
from fimo.workers.errors import WorkloadError


@dataclass(frozen=True)
class Card:
    """One training example, or a group, and its effect on an evaluation example.

    Attributes:
        name: short; ``title``: by its name, id and label.
        how: "measured" (further training), "verified" (by ``fimo rank``) or "estimated".
        effect: with ``sem`` over seeds where it is measured; ``low``, ``high``: its interval, at ``level``.
        told: whether it can be told from zero; None if that is not known.
        p: of no effect, by itself; of verified ones.
        share: of |g| at θᶠ.
        shown: the example, or the first few of a group.
        ranks: (estimator's place in the list of them, its rank among the sweep's removals), 1 = the most helpful.
    """

    name: str
    title: str
    how: str
    effect: float
    sem: float | None
    low: float | None
    high: float | None
    told: bool | None
    share: float | None
    shown: tuple[Shown, ...]
    ranks: tuple[tuple[int, int], ...]
    level: float = LEVEL
    p: float | None = None

    @property
    def helpful(self) -> bool:
        """Whether removing it raises g."""
        return self.effect > 0


@dataclass(frozen=True)
class Hand:
    """The cards of an evaluation example.

    Attributes:
        helpful, harmful: the largest effects first.
        removals: among how many the estimators' ranks are.
        of: how many training examples or removals they were chosen from.
    """

    helpful: tuple[Card, ...]
    harmful: tuple[Card, ...]
    removals: int
    of: int

    def largest(self, count: int) -> list[Card]:
        """Those that are largest in size, whatever their sign."""
        return sorted([*self.helpful, *self.harmful], key=lambda card: -abs(card.effect))[:count]


class Dealer:
    """Makes the cards of a sweep at one step.

    Args:
        estimators: (name, params) of those whose ranks are shown.
        gallery: None if the examples are not here.
        ranking: ``ranking.parquet``; None if there is none, or if it is of another step.
    """

    def __init__(
        self,
        effects: Effects,
        estimates: pa.Table,
        estimators: Sequence[Named],
        gallery: Gallery | None,
        ranking: pa.Table | None,
    ) -> None:
        self._gallery, self._ranking = gallery, ranking
        self._place = {int(number): place for place, number in enumerate(effects.removals)}
        values = [estimate_at(estimates, one, effects) for one in estimators]
        self._ranks = [None if v is None else known_ranks(v) for v in values]
        self.wrong: list[str] = []

    def deal(self, top: Top, count: int) -> Hand:
        """At most ``count`` cards of each sign."""
        ranked = None if self._ranking is None else where(self._ranking, eval=top.eval)
        if ranked is not None and len(ranked):
            return self._ranked(top, ranked.sort_by("rank"), count)
        helpful, harmful = (tuple(self._measured(top, e) for e in part) for part in top.shown(count))
        return Hand(helpful, harmful, len(top.effects), len(top.effects))

    def _measured(self, top: Top, effect: Effect) -> Card:
        return Card(
            effect.ids[0] if effect.ids is not None and len(effect.ids) == 1 else effect.name,
            named(effect),
            "measured",
            effect.effect,
            effect.sem,
            effect.low,
            effect.high,
            effect.told,
            effect.relative,
            self._show(effect.indices),
            self._ranks_of(effect.removal, top.eval),
        )

    def _ranked(self, top: Top, ranked: pa.Table, count: int) -> Hand:
        own = {e.indices[0]: e for e in top.effects if len(e.indices) == 1}
        rows = ranked.to_pylist()
        chosen = [_by_sign(rows, sign)[:count] for sign in (1, -1)]
        parts = [tuple(self._row(top, row, own) for row in part) for part in chosen]
        return Hand(parts[0], parts[1], len(top.effects), len(rows))

    def _row(self, top: Top, row: Mapping[str, Any], own: Mapping[int, Effect]) -> Card:
        index = int(row["index"])
        if index in own:
            return self._measured(top, own[index])
        verified = row["verified"] is not None
        effect = _best(row)
        names = [str(row[name]) for name in ("id", "label") if row[name] is not None]
        title = names[0] if names else str(index)
        return Card(
            title,
            title + (f": {names[1]}" if len(names) > 1 else ""),
            "verified" if verified else "estimated",
            effect,
            row["sem"] if verified else None,
            None if verified else row["low"],
            None if verified else row["high"],
            None,
            effect / abs(top.at_final) if top.at_final else None,
            self._show((index,)),
            (),
            level=CALIBRATED,
            p=row["p"] if verified else None,
        )

    def _show(self, indices: Sequence[int]) -> tuple[Shown, ...]:
        if self._gallery is None:
            return ()
        try:
            return tuple(self._gallery.train(index) for index in indices[:NAMES])
        except WorkloadError as error:
            return self._failed(error)

    def show_eval(self, number: int) -> Shown | None:
        """The evaluation example itself; None if it cannot be shown."""
        if self._gallery is None:
            return None
        try:
            return self._gallery.eval(number)
        except WorkloadError as error:
            self._failed(error)
            return None

    def _failed(self, error: WorkloadError) -> tuple[Shown, ...]:
        """A function that fails on one example fails on many: one line is enough."""
        self.wrong = self.wrong or [str(error)]
        return ()

    def _ranks_of(self, removal: int, number: int) -> tuple[tuple[int, int], ...]:
        place = self._place.get(removal)
        if place is None:
            return ()
        found = ((i, int(r[place, number])) for i, r in enumerate(self._ranks) if r is not None)
        return tuple((i, rank) for i, rank in found if rank)


def _best(row: Mapping[str, Any]) -> float:
    """What is known best of a ranked example: verified, else calibrated."""
    known = row["verified"] if row["verified"] is not None else row["effect"]
    return float("nan") if known is None else float(known)


def _by_sign(rows: Sequence[Mapping[str, Any]], sign: int) -> list[Mapping[str, Any]]:
    found = [row for row in rows if np.isfinite(_best(row)) and _best(row) * sign > 0]
    return sorted(found, key=lambda row: -sign * _best(row))
