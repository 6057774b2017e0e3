"""``fimo compare``: what two sweeps have in common, read from their stores, and how well they agree on it.

Removals are matched by the training indices that they leave out, evaluation examples by their places. Both sweeps must
be of the same training data, and of the same evaluation examples as far as both have them. All else (θᶠ, optimizer,
removal mode, precision, seeds) may differ: that is what is compared. The arithmetic is in
``fimo.orchestrator.tables.compare``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from fimo.orchestrator.run.reading import Gathered, seed_blocks
from fimo.orchestrator.run.written import listed_parts
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Listed, Sweep
from fimo.orchestrator.tables.compare import compare, cut
from fimo.orchestrator.tables.reduce import SeedBlock
from fimo.orchestrator.tables.schemas import COMPARISON
from fimo.workers.errors import UsageError

Pair = tuple[int, int]
"""A step of the first sweep and one of the second."""


@dataclass(frozen=True)
class Comparison:
    """Two sweeps compared.

    Attributes:
        table: see ``fimo.orchestrator.tables.schemas.COMPARISON``.
        sweep, other: STORE/NAME.
        differences: key of the spec -> its two values, where they differ.
        removals, evals: how many both have.
        complete: every cell of the common removals is there in both.
        notes: what a reader of the table must know.
    """

    table: pa.Table
    sweep: str
    other: str
    differences: dict[str, tuple[Any, Any]]
    removals: int
    evals: int
    complete: bool
    notes: tuple[str, ...]


def compare_sweeps(
    sweep: Sweep, other: Sweep, pairs: Sequence[Pair] = (), say: Callable[[str], None] = lambda line: None
) -> Comparison:
    """Compare two sweeps on their common removals and evaluation examples.

    Args:
        pairs: the steps to compare; none = those that both recorded, or the last ones if there is no such.
        say: told of each seed as it is read.

    Raises:
        UsageError: there is no such sweep or step, their data differ, or they have fewer than two removals in common.
        StoreError: a store cannot be read.
    """
    manifests = sweep.read_manifest(), other.read_manifest()
    m = common_evals(*manifests, sweep.uri, other.uri)
    common = common_removals(*manifests, sweep.uri, other.uri)
    steps = paired_steps(manifests[0].steps, manifests[1].steps, pairs)
    listed = [listed_parts(s, manifest) for s, manifest in zip((sweep, other), manifests, strict=True)]
    begun = [_begun(*each) for each in zip((sweep, other), manifests, listed, strict=True)]
    there = tuple(r for r in common if all(r.indices in held for held in begun))
    sides = [
        _Side(s, replace(manifest, removals=there), parts, [pair[place] for pair in steps], m, len(common))
        for place, (s, manifest, parts) in enumerate(zip((sweep, other), manifests, listed, strict=True))
    ]
    own, theirs = (side.blocks(say) for side in sides)
    table = compare(own, theirs, len(there), steps, m) if len(there) > 1 else COMPARISON.empty_table()
    complete = all(side.gathered.done == side.gathered.cells for side in sides)
    notes = (
        *_nothing(table),
        *_notes(*manifests, steps, pairs),
        *(line for side in sides for line in side.complaints()),
    )
    differences = spec_differences(*manifests)
    return Comparison(table, sweep.uri, other.uri, differences, len(common), m, complete, notes)


def _begun(sweep: Sweep, manifest: Manifest, listed: Sequence[Listed]) -> set[tuple[int, ...]]:
    """The removals of which at least one seed is there."""
    return set().union(*sweep.done(manifest, listed).values())


class _Side:
    """One of the two sweeps: its seeds, cut to what is compared, and what was met while they were read."""

    def __init__(
        self, sweep: Sweep, manifest: Manifest, listed: Sequence[Listed], steps: Sequence[int], m: int, common: int
    ) -> None:
        self.gathered = Gathered({}, cells=common * manifest.spec.seeds.count)
        self._about, self._sweep, self._m = (sweep, manifest, listed), sweep, m
        self._places = [manifest.steps.index(step) for step in steps]

    def blocks(self, say: Callable[[str], None]) -> Iterator[SeedBlock]:
        """Seeds in ascending order."""
        told: Callable[[str], None] = lambda line: say(f"{self._sweep.uri}: {line}")  # noqa: E731
        return cut(seed_blocks(*self._about, self.gathered, [], told), self._places, self._m)

    def complaints(self) -> Iterator[str]:
        """One line for each thing that is not as it should be; final once the blocks are consumed."""
        for _, why in self.gathered.bad:
            yield f"{why}; left out (`fimo resume {self._sweep.uri}` computes it again)"
        if self.gathered.done < self.gathered.cells:
            yield (
                f"{self._sweep.uri} has {self.gathered.done} of the {self.gathered.cells} cells that are compared; "
                f"`fimo resume {self._sweep.uri}` computes the rest"
            )


# -- what they have in common --------------------------------------------------------------------------------------


def common_evals(own: Manifest, other: Manifest, name: str, other_name: str) -> int:
    """How many evaluation examples both sweeps have, counted from the first.

    Raises:
        UsageError: training data or one of those evaluation examples differ, or a manifest does not tell.
    """
    for manifest, uri in ((own, name), (other, other_name)):
        if not manifest.train_digest or len(manifest.eval_digests) != manifest.evals:
            raise UsageError(
                f"{uri} was started by a fimo that did not record its data; run its spec again with `fimo run`, which "
                "records it and computes nothing that is there"
            )
    if own.train_digest != other.train_digest:
        raise UsageError(
            f"{name} and {other_name} are of different training data ({own.train} and {other.train} examples), so "
            "their removals are not the same; give both workloads the same `train`"
        )
    m = min(own.evals, other.evals)
    differ = [e for e in range(m) if own.eval_digests[e] != other.eval_digests[e]]
    if differ:
        raise UsageError(
            f"{name} and {other_name} are of different evaluation data (example {differ[0]} is the first of "
            f"{len(differ)} that differ); give both workloads the same `evals`"
        )
    return m


def common_removals(own: Manifest, other: Manifest, name: str, other_name: str) -> tuple[NamedRemoval, ...]:
    """The removals of ``own`` whose training indices ``other`` leaves out too, each once.

    Raises:
        UsageError: there are fewer than two.
    """
    theirs = {r.indices for r in other.removals}
    found = {r.indices: r for r in reversed(own.removals) if r.indices in theirs}
    common = tuple(sorted(found.values(), key=lambda r: r.number))
    if len(common) < 2:
        what = f"only '{common[0].name}'" if common else "none"
        raise UsageError(
            f"{name} and {other_name} have too few removals in common ({what} of {len(own.removals)} and "
            f"{len(other.removals)}): agreement needs at least two; give both specs the same removals"
        )
    return common


def paired_steps(own: Sequence[int], other: Sequence[int], pairs: Sequence[Pair] = ()) -> list[Pair]:
    """Which steps are compared: ``pairs`` if given, else equal steps, else the last ones.

    Raises:
        UsageError: a pair names a step that its sweep did not record.
    """
    for pair in pairs:
        for step, known, which in zip(pair, (own, other), ("first", "second"), strict=True):
            if step not in known:
                near = min(known, key=lambda k: abs(k - step))
                raise UsageError(
                    f"the {which} sweep recorded no step {step} (the nearest is {near}, the last {known[-1]})"
                )
    if pairs:
        return list(dict.fromkeys(pairs))
    return [(step, step) for step in sorted(set(own) & set(other))] or [(own[-1], other[-1])]


def spec_differences(own: Manifest, other: Manifest) -> dict[str, tuple[Any, Any]]:
    """Keys of the specs, dotted, whose values differ, of those that a delta depends on and the seeds."""
    wanted = ("workload", "workload_args", "final_model", "seeds", "further_training")
    flat = [_flat({key: m.spec.canonical()[key] for key in wanted}) for m in (own, other)]
    keys = dict.fromkeys([*flat[0], *flat[1]])
    return {key: (flat[0].get(key), flat[1].get(key)) for key in keys if flat[0].get(key) != flat[1].get(key)}


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return out


def _nothing(table: pa.Table) -> Iterator[str]:
    empty = sorted({(row["step"], row["other_step"]) for row in table.to_pylist() if row["score"] is None})
    if empty:
        where = ", ".join(f"{a}:{b}" for a, b in empty[:4]) + (f" and {len(empty) - 4} more" if len(empty) > 4 else "")
        yield f"nothing to compare at {where}: the effects of one have exploded, are constant or drown in rounding"


def _notes(own: Manifest, other: Manifest, steps: Sequence[Pair], pairs: Sequence[Pair]) -> Iterator[str]:
    if not pairs and steps[0][0] != steps[0][1]:
        yield (
            f"the sweeps recorded no step in common: the last are compared ({steps[0][0]} and {steps[0][1]}); pair "
            "others with --pair STEP:STEP"
        )
    sizes = own.spec.further_training.batch_size, other.spec.further_training.batch_size
    if sizes[0] != sizes[1]:
        yield f"a step is {sizes[0]} examples in the first sweep and {sizes[1]} in the second"
    if own.source != other.source:
        yield "the workloads' code differs: see that both measure the same g"
    shared = set(own.spec.seeds) & set(other.spec.seeds)
    if shared:
        yield (
            f"{len(shared)} seeds are common to both, so part of their noise is: a score may pass the joint ceiling; "
            "normalised takes that part out"
        )
