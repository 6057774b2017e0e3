"""From parts to attribution: Welford means and standard errors of effects over seeds (eq. 17), in float64.

Pure: parts come in as values, seed by seed in ascending order, tables go out. Memory is bounded by blocks of one seed,
not by the number of seeds. Parts of a seed are taken in the order of their keys, so order of arrival changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.sweep.parts import Part
from fimo.orchestrator.tables.floor import Floor, Pair, measured
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

    @property
    def present(self) -> NDArray[np.bool_]:
        """Which removals have finite effects at which steps, bool (R, T)."""
        return np.asarray(np.isfinite(self.effects).all(axis=2))

    @property
    def complete(self) -> bool:
        """Whether every removal has a finite effect at every step."""
        return bool(self.present.all())


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
    effects, taken = np.full(shape, np.nan), np.zeros(len(removals), dtype=bool)
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
        for row, removal in enumerate(part.removals):
            for place in rows.get(removal.indices, []):
                if not taken[place]:
                    effects[place], taken[place] = (part.deltas[row] - baseline) / weight, True
        for row, step in part.diverged:
            number = removals[rows[part.removals[row].indices][0]].number if _known(part, row, rows) else -1
            diverged.append((number, step))
    with np.errstate(invalid="ignore"):
        training_only = np.mean(baselines, axis=0) if baselines else np.full(shape[1:], np.nan)
        distance = np.mean([part.distances[-2] for part in parts], axis=0) if parts else None
    at_final = next((part.at_final for part in parts if part.at_final is not None), None)
    finite, scale = np.isfinite(effects).all(axis=2, keepdims=True), max((part.scale for part in parts), default=0.0)
    effects = effects if finite.all() else np.where(finite, effects, np.nan)
    return SeedBlock(seed, effects, training_only, squares, floors, tuple(diverged), scale, distance, at_final)


def _known(part: Part, row: int, rows: dict[tuple[int, ...], list[int]]) -> bool:
    return row < len(part.removals) and part.removals[row].indices in rows


TOGETHER = 2**15
"""Numbers that are worked on at once: what fits into a core's cache with its temporaries."""


def _together(values: Array) -> Iterator[slice]:
    """Rows of an array (R, …) a few at a time."""
    step = max(1, TOGETHER * len(values) // max(1, values.size))
    return (slice(first, first + step) for first in range(0, len(values), step))


class Welford:
    """Running mean and sum of squared deviations, elementwise, over blocks in which cells may be missing.

    Attributes:
        count: int64 (R, T): blocks with a finite value for the cell.
        mean, m2: float64 (R, T, m).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count = np.zeros(shape[:-1], dtype=np.int64)
        self.mean, self.m2 = np.zeros(shape), np.zeros(shape)

    def add(self, values: Array, present: NDArray[np.bool_] | None = None) -> None:
        """Take one block, (R, T, m); cells that are NaN are left out.

        Args:
            present: which are not, bool (R, T), if the caller knows.
        """
        present = np.asarray(np.isfinite(values).all(axis=-1)) if present is None else present
        self.count += present
        for rows in _together(values):
            self._add(values[rows], present[rows], self.count[rows], self.mean[rows], self.m2[rows])

    @staticmethod
    def _add(values: Array, present: NDArray[np.bool_], count: NDArray[np.int64], mean: Array, m2: Array) -> None:
        delta = values - mean
        if present.all():
            mean += delta / count[..., None]
            m2 += delta * (values - mean)
            return
        where = np.expand_dims(present, -1)
        delta = np.where(where, delta, 0.0)
        mean += delta / np.maximum(count, 1)[..., None]
        m2 += np.where(where, delta * (values - mean), 0.0)

    def sem(self) -> Array:
        """Standard error of the mean, NaN with fewer than two blocks."""
        k = self.count[..., None].astype(np.float64)
        return np.where(k > 1, np.sqrt(self.m2 / np.maximum(k - 1, 1) / np.maximum(k, 1)), np.nan)


class Comoment:
    """Running covariance of effects with their seed's training-only effect, elementwise; cells may be missing."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._count = np.zeros(shape[:-1], dtype=np.int64)
        self._mean, self._sum = np.zeros(shape), np.zeros(shape)

    def add(self, values: Array, baseline: Array, after: Welford, finite: NDArray[np.bool_] | None = None) -> None:
        """Take one block (R, T, m) with its baseline (T, m); ``after``: the moments of values, with this block.

        Args:
            finite: which values are not NaN, bool (R, T), if the caller knows.
        """
        finite = np.asarray(np.isfinite(values).all(axis=-1)) if finite is None else finite
        present: NDArray[np.bool_] = finite & np.asarray(np.isfinite(baseline).all(axis=-1))
        self._count += present
        for rows in _together(values):
            own, mean, total = values[rows], self._mean[rows], self._sum[rows]
            offset, count = baseline - mean, self._count[rows]
            if present[rows].all():
                mean += offset / count[..., None]
                total += offset * (own - after.mean[rows])
                continue
            where = present[rows][..., None]
            offset = np.where(where, offset, 0.0)
            mean += offset / np.maximum(count, 1)[..., None]
            total += offset * np.where(where, own - after.mean[rows], 0.0)

    def spread(self, effects: Welford) -> Array:
        """Var(Δ_i) − Var(Δ) over seeds, float64 (R, T, m): by how much removing i spreads g; NaN below two seeds.

        With Δ_i = effect + Δ this is Var(effect) + 2 Cov(effect, Δ) (distributional attribution, arXiv 2506.12965).
        """
        k = effects.count[..., None]
        return np.where(k > 1, (effects.m2 + 2 * self._sum) / np.maximum(k - 1, 1), np.nan)


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


def reduce(
    blocks: Iterable[SeedBlock], removals: int, steps: int, m: int, witnesses: Sequence[Pair] = ()
) -> tuple[Iterator[SeedBlock], Reduction]:
    """Average over seeds as blocks stream past.

    Args:
        witnesses: known beforehand, since the floor is asked for while blocks stream past.

    Returns:
        The blocks again, for whoever else needs them, and the reduction, which is final once they are consumed.
    """
    each, one = (removals, steps, m), (1, steps, m)
    rounding = measured(witnesses)
    result = Reduction(
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

    def stream() -> Iterator[SeedBlock]:
        squares, parts = np.zeros((steps, m)), 0
        for block in blocks:
            present = block.present
            result.effects.add(block.effects, present)
            result.joint.add(block.effects, block.training_only, result.effects, present)
            if present.all():
                shift = block.effects.mean(axis=0, keepdims=True)
                result.centred.add(block.effects - shift, present)
                result.shift.add(shift)
            result.training_only.add(block.training_only[None])
            if block.distance is not None:
                result.distance.add(block.distance[None, :, None])
            result.at_final = block.at_final if result.at_final is None else result.at_final
            squares, parts = squares + block.floor_squares, parts + block.floor_parts
            result.seeds.append(block.seed)
            result.floors = rounding.floor(np.sqrt(squares / max(parts, 1)), removals * len(result.seeds))
            result.scale = max(result.scale, block.scale)
            result.diverged += [(number, block.seed, step) for number, step in block.diverged]
            yield block

    return stream(), result
