"""From parts to attribution: Welford means and standard errors of effects over seeds (eq. 17), in float64.

Pure: parts come in as values, seed by seed in ascending order, tables go out. Memory is bounded by blocks of one seed,
not by the number of seeds. Parts of a seed are taken in the order of their keys, so order of arrival changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.sweep.parts import Part
from fimo.orchestrator.tables.floor import Floor, Measured, Pair, measured
from fimo.orchestrator.tables.moments import Comoment, Welford
from fimo.orchestrator.tables.sanity import exploded

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SeedBlock:
    """One seed's results.

    Attributes:
        effects: (delta − its own part's baseline delta) / removal weight, float64 (R, T, m); NaN if missing or
            diverged.
        training_only: the baseline's delta (mean over the seed's parts), float64 (T, m); NaN if it diverged.
        floor_squares: Σ over the seed's parts (``floor_parts``) of ((second baseline − baseline) / removal weight)²,
            float64 (T, m).
        diverged: (removal number or −1 for a baseline, step) of every run that was not finite.
        scale: the root mean square of g(z, θᶠ) over evaluation examples.
        distance: the baseline's ‖Δθ_t‖ (mean over the seed's parts), float64 (T,); NaN if it diverged.
        at_final: g(z, θᶠ), float64 (m,); None if no part has it.
        finite: ``present``, if whoever made the block knows it.
        whole: ``complete`` over all steps of the sweep, in a block that is cut to some of them.
    """

    seed: int
    effects: Array
    training_only: Array
    floor_squares: Array
    floor_parts: int
    diverged: tuple[tuple[int, int], ...]
    scale: float = 0.0
    distance: Array | None = None
    at_final: Array | None = None
    finite: NDArray[np.bool_] | None = None
    whole: bool | None = None

    @property
    def present(self) -> NDArray[np.bool_]:
        """Which removals have finite effects at which steps, bool (R, T)."""
        return np.asarray(np.isfinite(self.effects).all(axis=2)) if self.finite is None else self.finite

    @property
    def complete(self) -> bool:
        """Whether every removal has a finite effect at every step of the sweep."""
        return bool(self.present.all()) if self.whole is None else self.whole

    def at(self, steps: slice, effects: Array | None = None) -> SeedBlock:
        """The block cut to some steps.

        Args:
            effects: those at all steps, if they are not the block's own.
        """
        effects = self.effects if effects is None else effects
        return replace(
            self,
            effects=effects[:, steps].copy(),
            training_only=self.training_only[steps],
            floor_squares=self.floor_squares[steps],
            distance=None if self.distance is None else self.distance[steps],
            finite=self.present[:, steps],
            whole=self.complete,
        )


def witness_pair(sweep: Sequence[Part], witness: Part, weight: float = 1.0) -> Pair:
    """A seed's effects of the removals that have witnesses, beside theirs; in both as ``seed_block`` has an effect.

    Args:
        sweep: the seed's parts, in the order of their keys.
        weight: as for ``seed_block``.
    """
    moved = _moved_in(witness)
    removals = witness.removals[: len(witness.removals) - moved]
    about = removals, witness.steps, witness.deltas.shape[2], weight
    own, again = (seed_block(witness.seed, parts, *about).effects for parts in (sweep, [witness]))
    return Pair(
        tuple(r.indices for r in removals),
        own,
        again,
        runs=_run_differences(sweep, removals, witness.deltas[: len(removals)], witness.deltas[-2]) / weight,
        moved=_run_differences(
            sweep, witness.removals[len(removals) :], witness.deltas[len(removals) : -2], witness.deltas[-1]
        )
        / weight,
        steps=witness.steps,
    )


def _moved_in(witness: Part) -> int:
    count = witness.provenance.get("moved", 0)
    return min(count, len(witness.removals) - 1) if isinstance(count, int) else 0


def _run_differences(sweep: Sequence[Part], removals: Sequence[NamedRemoval], deltas: Array, baseline: Array) -> Array:
    """By how much the sweep's own runs differ from the same runs trained again, (n, T, m): cells and the baseline."""
    rows = {r.indices: part.deltas[row] for part in reversed(sweep) for row, r in enumerate(part.removals)}
    found = [again - rows[r.indices] for r, again in zip(removals, deltas, strict=True) if r.indices in rows]
    found += [baseline - part.deltas[-2] for part in sweep[:1]] if len(removals) else []
    finite = [d for d in found if np.isfinite(d).all()]
    return np.stack(finite) if finite else np.zeros((0, *baseline.shape))


def seed_block(
    seed: int,
    parts: Sequence[Part],
    removals: Sequence[NamedRemoval],
    steps: Sequence[int],
    m: int,
    weight: float = 1.0,
) -> SeedBlock:
    """Assemble one seed's effects from its parts, in the order given (the first part that holds a cell counts).

    Args:
        weight: the removal weight that the parts' cells were trained with: their deltas are as trained, effects and
            their noise are per unit of it.
    """
    shape = (len(removals), len(steps), m)
    effects, taken = np.empty(shape), np.zeros(len(removals), dtype=bool)
    rows: dict[tuple[int, ...], list[int]] = {}
    for place, removal in enumerate(removals):
        rows.setdefault(removal.indices, []).append(place)
    baselines, squares, floors, diverged = [], np.zeros(shape[1:]), 0, []
    for part in parts:
        baseline, second = part.deltas[-2], part.deltas[-1]
        baselines.append(baseline)
        difference = (second - baseline) / weight
        if np.isfinite(difference).all():
            squares, floors = squares + difference**2, floors + 1
        found = [(row, p) for row, r in enumerate(part.removals) for p in rows.get(r.indices, []) if not taken[p]]
        # Of a removal that stands in it twice the first counts.
        where = {p: row for row, p in reversed(found)}
        _take(effects, list(where), part.deltas, list(where.values()), baseline, weight)
        taken[list(where)] = True
        for row, step in part.diverged:
            number = removals[rows[part.removals[row].indices][0]].number if _known(part, row, rows) else -1
            diverged.append((number, step))
    with np.errstate(invalid="ignore"):
        training_only = np.mean(baselines, axis=0) if baselines else np.full(shape[1:], np.nan)
        distance = np.mean([part.distances[-2] for part in parts], axis=0) if parts else None
    at_final = next((part.at_final for part in parts if part.at_final is not None), None)
    scale = max((part.scale for part in parts), default=0.0)
    effects[~taken] = np.nan
    finite = np.ones(shape[:2], dtype=bool)
    if not np.isfinite(effects).all():
        finite = np.asarray(np.isfinite(effects).all(axis=2))
        effects[~finite] = np.nan
    return SeedBlock(seed, effects, training_only, squares, floors, tuple(diverged), scale, distance, at_final, finite)


def _take(
    effects: Array, places: Sequence[int], deltas: Array, rows: Sequence[int], baseline: Array, weight: float
) -> None:
    """Effects at ``places`` from a part's ``rows``."""
    into, of = (_consecutive(numbers) for numbers in (places, rows))
    if into is None or of is None:
        effects[list(places)] = (deltas[list(rows)] - baseline) / weight
        return
    np.subtract(deltas[of], baseline, out=effects[into])
    if weight != 1:
        effects[into] /= weight


def _consecutive(numbers: Sequence[int]) -> slice | None:
    """Numbers as a slice, if each is one more than the last."""
    if not numbers or list(numbers) != list(range(numbers[0], numbers[0] + len(numbers))):
        return None
    return slice(numbers[0], numbers[0] + len(numbers))


def _known(part: Part, row: int, rows: dict[tuple[int, ...], list[int]]) -> bool:
    return row < len(part.removals) and part.removals[row].indices in rows


@dataclass
class Reduction:
    """What the blocks of all seeds come to.

    Attributes:
        effects, training_only: running moments of the effects (R, T, m) and of the baseline's deltas (1, T, m).
        centred, shift: of whole seeds, the effects less their mean over removals (R, T, m), and that mean (1, T, m).
        joint: covariance of the effects with their baseline's deltas.
        floors: the noise that rounding makes, of an effect and of means over seeds, as far as it is known so far.
        seeds: seeds of which there is at least one part.
        diverged: (removal number, seed, step) of runs that were not finite, −1 for a baseline.
        scale: the root mean square of g(z, θᶠ) over evaluation examples.
        distance: of the baseline's ‖Δθ_t‖, (1, T, 1).
        at_final: g(z, θᶠ), float64 (m,), as the first part has it; None if none does.
    """

    effects: Welford
    training_only: Welford
    centred: Welford
    shift: Welford
    joint: Comoment
    floors: Floor
    seeds: list[int]
    diverged: list[tuple[int, int, int]]
    distance: Welford
    scale: float = 0.0
    at_final: Array | None = None

    @property
    def floor(self) -> Array:
        """The noise of one effect, float64 (T, m)."""
        return self.floors.one["baseline"]

    @property
    def exploded(self) -> NDArray[np.bool_]:
        """The steps at which training on everything has moved g beyond reason, (T,); see ``tables.sanity``."""
        return exploded(self.training_only.mean[0], self.scale)


class Reducer:
    """Averages over seeds, given one after another.

    Args:
        rounding: known beforehand, since the floor is asked for while seeds are given.

    Attributes:
        reduction: of the seeds given so far.
    """

    def __init__(self, removals: int, steps: int, m: int, rounding: Measured) -> None:
        each, one = (removals, steps, m), (1, steps, m)
        self._rounding, self._removals = rounding, removals
        self._squares, self._parts = np.zeros((steps, m)), 0
        self.reduction = Reduction(
            effects=Welford(each),
            training_only=Welford(one),
            centred=Welford(each),
            shift=Welford(one),
            joint=Comoment(each),
            floors=rounding.floor(np.zeros((steps, m))),
            seeds=[],
            diverged=[],
            distance=Welford((1, steps, 1)),
        )

    def add(self, block: SeedBlock) -> None:
        """Take one seed."""
        result, present = self.reduction, block.present
        result.effects.add(block.effects, present)
        result.joint.add(block.effects, block.training_only, result.effects, present)
        if block.complete:
            shift = block.effects.mean(axis=0, keepdims=True)
            result.centred.add(block.effects - shift, present)
            result.shift.add(shift)
        result.training_only.add(block.training_only[None])
        if block.distance is not None:
            result.distance.add(block.distance[None, :, None])
        result.at_final = block.at_final if result.at_final is None else result.at_final
        self._squares, self._parts = self._squares + block.floor_squares, self._parts + block.floor_parts
        result.seeds.append(block.seed)
        second = np.sqrt(self._squares / max(self._parts, 1))
        result.floors = self._rounding.floor(second, self._removals * len(result.seeds))
        result.scale = max(result.scale, block.scale)
        result.diverged += [(number, block.seed, step) for number, step in block.diverged]


def reduce(
    blocks: Iterable[SeedBlock], removals: int, steps: int, m: int, witnesses: Sequence[Pair] = ()
) -> tuple[Iterator[SeedBlock], Reduction]:
    """Average over seeds as blocks stream past.

    Returns:
        The blocks again, for whoever else needs them, and the reduction, which is final once they are consumed.
    """
    reducer = Reducer(removals, steps, m, measured(witnesses))

    def stream() -> Iterator[SeedBlock]:
        for block in blocks:
            reducer.add(block)
            yield block

    return stream(), reducer.reduction
