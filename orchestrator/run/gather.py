"""From a sweep's objects to its tables: read, verify, reduce, score.

Reads the store and writes nothing but what it is asked to; the arithmetic is in ``reduce`` and ``score``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from fimo.orchestrator.resolve.identity import canonical, digest
from fimo.orchestrator.run.estimating import estimate_identity
from fimo.orchestrator.store import Entry
from fimo.orchestrator.sweep import estimates as estimate_parts
from fimo.orchestrator.sweep.estimates import EstimateBlock
from fimo.orchestrator.sweep.imported import imported, imported_keys
from fimo.orchestrator.sweep.parts import BadPartError, Part
from fimo.orchestrator.sweep.sweep import Listed, Manifest, Sweep
from fimo.orchestrator.tables import schemas as tables
from fimo.orchestrator.tables.reduce import (
    Reduction,
    SeedBlock,
    attribution_table,
    reduce,
    removals_table,
    seed_block,
    training_only_table,
)
from fimo.orchestrator.tables.score import EstimateMatrix, Scorer, similarity_table
from fimo.workers.errors import StoreError
from numpy.typing import NDArray


@dataclass
class Gathered:
    """Tables by name, and what was found wrong on the way.

    Attributes:
        bad: (key, why) of objects that did not verify; they count as missing.
        diverged: (removal number or −1 for a baseline, seed, step).
        cells, done: of the whole sweep, and those with a verified part.
        estimates: estimators wanted, and those complete.
        devices: device types that parts come from.
        stamp: digest of everything the tables were made from.
    """

    tables: dict[str, pa.Table]
    bad: list[tuple[str, str]] = field(default_factory=list)
    diverged: list[tuple[int, int, int]] = field(default_factory=list)
    cells: int = 0
    done: int = 0
    estimators_wanted: int = 0
    estimators_done: int = 0
    devices: list[str] = field(default_factory=list)
    stamp: str = ""

    @property
    def estimated(self) -> bool:
        """Whether every estimate is there."""
        return self.estimators_done == self.estimators_wanted

    @property
    def complete(self) -> bool:
        """Whether every cell and every estimate is there."""
        return self.done == self.cells and self.estimated


def gather(sweep: Sweep, manifest: Manifest, say: Callable[[str], None] = lambda line: None) -> Gathered:
    """Reduce and score whatever the store holds of a sweep."""
    found = Gathered({}, cells=len(manifest.removals) * manifest.spec.seeds.count)
    seeds = set(manifest.spec.seeds)
    listed = [part for part in sweep.list_parts(manifest.digest) if part.seed in seeds]
    costs: list[tuple[object, ...]] = []
    estimates = _estimates(sweep, manifest, found, costs)
    scorer = Scorer(estimates, manifest.steps, len({part.seed for part in listed}))
    blocks, reduction = reduce(
        _blocks(sweep, manifest, listed, found, costs, say), len(manifest.removals), len(manifest.steps), manifest.evals
    )
    for block in blocks:
        scorer.add(block, reduction.floor)
    scorer.finish(reduction)
    found.diverged = sorted(reduction.diverged)
    found.tables = _tables(manifest, reduction, scorer, estimates, costs)
    found.devices = sorted({str(row[3]) for row in costs if row[0] == "shard"})
    found.stamp = stamp(sweep, manifest, listed)
    return found


def stamp(sweep: Sweep, manifest: Manifest, listed: Sequence[Listed] | None = None) -> str:
    """A digest of the manifest and of the objects that tables are made from, by listing alone."""
    if listed is None:
        seeds = set(manifest.spec.seeds)
        listed = [part for part in sweep.list_parts(manifest.digest) if part.seed in seeds]
    blocks = [entry.key for _, entries in listed_estimates(sweep, manifest) for entry in entries]
    wanted = [manifest.digest, manifest.estimate_digest, [list(e) for e in manifest.estimators]]
    removals = [list(r.indices) for r in manifest.removals]
    others = [hashlib.sha256(sweep.store.get(key)).hexdigest() for key in imported_keys(sweep)]
    return digest([wanted, removals, manifest.evals, [part.key for part in listed], blocks, others])


def _blocks(
    sweep: Sweep,
    manifest: Manifest,
    listed: Sequence[Listed],
    found: Gathered,
    costs: list[tuple[object, ...]],
    say: Callable[[str], None],
) -> Iterator[SeedBlock]:
    by_seed: dict[int, list[Listed]] = {}
    for one in listed:
        by_seed.setdefault(one.seed, []).append(one)
    wanted = {r.indices for r in manifest.removals}
    for number, seed in enumerate(sorted(by_seed), start=1):
        parts: list[Part] = []
        for item in sorted(by_seed[seed], key=lambda p: p.key):
            try:
                part = sweep.read_part(item, manifest.digest)
                if part.steps != manifest.steps or part.deltas.shape[2] != manifest.evals:
                    raise BadPartError(f"part {item.key}: its steps or evaluation examples are not the sweep's")
            except BadPartError as error:
                found.bad.append((item.key, str(error)))
                continue
            parts.append(part)
            costs.append(_cost("shard", f"seed {seed} {item.set}", "", part.provenance))
        have = {r.indices for part in parts for r in part.removals} & wanted
        found.done += sum(r.indices in have for r in manifest.removals)
        say(f"reducing seed {seed} ({number} of {len(by_seed)})")
        if parts:
            yield seed_block(seed, parts, manifest.removals, manifest.steps, manifest.evals)


def _cost(what: str, name: str, params: str, provenance: object) -> tuple[object, ...]:
    values = provenance if isinstance(provenance, dict) else {}
    return (
        what,
        name,
        params,
        str(values.get("device", "")),
        float(values.get("device_seconds", 0.0)),
        int(values.get("peak_bytes", 0)),
    )


def estimate_digest(manifest: Manifest, estimator: str, params: str) -> str:
    """What an estimator's values depend on: see ``fimo.orchestrator.run.tasks.estimate_digest``."""
    return estimate_identity(manifest.digest, manifest.estimate_digest, manifest.spec, estimator, params)


def listed_estimates(sweep: Sweep, manifest: Manifest) -> Iterator[tuple[tuple[str, str], list[Entry]]]:
    """(estimator, params) in spec order, with the blocks that are listed under it."""
    for estimator, params in manifest.estimators:
        folder = estimate_parts.folder(sweep.name, estimate_digest(manifest, estimator, params), estimator, params)
        yield (estimator, params), list(sweep.store.list(folder))


def _estimates(
    sweep: Sweep, manifest: Manifest, found: Gathered, costs: list[tuple[object, ...]]
) -> list[EstimateMatrix]:
    """Assemble each estimator's matrix from its blocks; an incomplete one is left out."""
    estimates: list[EstimateMatrix] = []
    found.estimators_wanted = len(manifest.estimators)
    for (estimator, params), entries in listed_estimates(sweep, manifest):
        blocks: list[EstimateBlock] = []
        seconds: list[dict[str, object]] = []
        for entry in entries:
            try:
                block = estimate_parts.decode_block(sweep.store.get(entry.key), entry.key)
                if (block.estimator, block.params) != (estimator, params):
                    raise BadPartError(f"estimates {entry.key}: they belong under another key")
            except BadPartError as error:
                found.bad.append((entry.key, str(error)))
                continue
            blocks.append(block)
            seconds.append(dict(block.provenance))
        matrix = assemble(blocks, manifest)
        if seconds:
            costs.append(_total_cost(estimator, params, seconds))
        if matrix is not None:
            steps = next((b.steps for b in blocks if b.steps is not None), None)
            estimates.append(EstimateMatrix(estimator, params, matrix, steps))
            found.estimators_done += 1
    return estimates + _imported(sweep, manifest, found)


def _imported(sweep: Sweep, manifest: Manifest, found: Gathered) -> list[EstimateMatrix]:
    """Matrices of other libraries, those that cover every removal and evaluation example."""
    parts, bad = imported(sweep, manifest)
    found.bad += bad
    covered = [(part, assemble([part], manifest)) for part in parts]
    return [EstimateMatrix(p.estimator, p.params, matrix, p.steps) for p, matrix in covered if matrix is not None]


def _total_cost(estimator: str, params: str, provenances: Sequence[dict[str, object]]) -> tuple[object, ...]:
    rows = [_cost("estimator", estimator, params, p) for p in provenances]
    seconds = sum(float(str(row[4])) for row in rows)
    return ("estimator", estimator, params, rows[0][3], seconds, max(int(str(row[5])) for row in rows))


def assemble(blocks: Sequence[EstimateBlock], manifest: Manifest) -> NDArray[np.float64] | None:
    """The removal × eval matrix of blocks, (R, m) or (S, R, m); None while a value is missing."""
    if not blocks:
        return None
    leading = (len(blocks[0].steps),) if blocks[0].steps is not None else ()
    matrix = np.full((*leading, len(manifest.removals), manifest.evals), np.nan)
    for block in blocks:
        rows = {r.indices: place for place, r in enumerate(block.removals)}
        pairs = [(place, rows[r.indices]) for place, r in enumerate(manifest.removals) if r.indices in rows]
        stop = min(block.first + block.values.shape[-1], manifest.evals)
        if not pairs or block.steps != blocks[0].steps or stop <= block.first:
            continue
        into, out_of = [p for p, _ in pairs], [p for _, p in pairs]
        matrix[..., into, block.first : stop] = block.values[..., out_of, : stop - block.first]
    return None if np.isnan(matrix).any() else matrix


def _tables(
    manifest: Manifest,
    reduction: Reduction,
    scorer: Scorer,
    estimates: Sequence[EstimateMatrix],
    costs: list[tuple[object, ...]],
) -> dict[str, pa.Table]:
    names = [f.name for f in tables.COSTS]
    columns = list(zip(*costs, strict=True)) or [() for _ in names]
    return {
        "attribution": attribution_table(reduction, manifest.removals, manifest.steps),
        "training_only": training_only_table(reduction, manifest.steps),
        "estimates": _estimates_table(estimates, manifest),
        "scores": scorer.table(),
        "similarity": similarity_table(estimates),
        "reliability": scorer.reliability(reduction.floor),
        "removals": removals_table(manifest.removals),
        "costs": tables.table(tables.COSTS, **{n: list(c) for n, c in zip(names, columns, strict=True)}),
    }


def _estimates_table(estimates: Sequence[EstimateMatrix], manifest: Manifest) -> pa.Table:
    numbers = np.array([r.number for r in manifest.removals], dtype=np.int32)
    found: list[pa.Table] = []
    for e in estimates:
        values = e.values if e.steps is not None else e.values[None]
        s, r, m = values.shape
        steps = [None] if e.steps is None else list(e.steps)
        found.append(
            tables.table(
                tables.ESTIMATES,
                estimator=[e.estimator] * values.size,
                params=[e.params] * values.size,
                removal=np.tile(np.repeat(numbers, m), s),
                eval=np.tile(np.arange(m, dtype=np.int32), s * r),
                step=[step for step in steps for _ in range(r * m)],
                value=values.reshape(-1),
            )
        )
    return pa.concat_tables(found) if found else tables.ESTIMATES.empty_table()


def write_tables(sweep: Sweep, found: Gathered) -> dict[str, str]:
    """Put the tables under ``NAME/tables/``; returns their URIs by name."""
    written = {}
    for name, table in found.tables.items():
        key = f"{sweep.name}/tables/{name}.parquet"
        sweep.store.put(key, tables.encode_table(table))
        written[name] = f"{sweep.store.uri.rstrip('/')}/{key}"
    sweep.store.put(f"{sweep.name}/tables/made-from.json", canonical({"stamp": found.stamp}).encode())
    return written


def reject(sweep: Sweep, found: Gathered) -> None:
    """Set every bad object aside, so that the next run computes it again."""
    for key, _ in found.bad:
        try:
            sweep.reject(key)
        except StoreError:
            continue
