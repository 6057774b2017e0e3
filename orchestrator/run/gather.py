"""From a sweep's objects to its tables: read, verify, reduce, score.

Reads the store and writes nothing; the arithmetic is in ``fimo.orchestrator.tables``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from fimo.orchestrator.run import failures
from fimo.orchestrator.run.blocks import assemble, common_steps, listed_blocks, runs_of, value_digest, wanted
from fimo.orchestrator.run.owed import is_complete
from fimo.orchestrator.run.reading import Costs, Gathered, cost
from fimo.orchestrator.run.sharing import reduce_parts
from fimo.orchestrator.run.tabled import tables_of
from fimo.orchestrator.run.witnesses import Witnesses, read_witnesses
from fimo.orchestrator.run.written import current, listed_parts, read_table, stamp, warnings_in
from fimo.orchestrator.spec.canonical import digest
from fimo.orchestrator.store import NotFound
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.estimates import EstimateBlock
from fimo.orchestrator.sweep.imported import imported
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.parts import BadPartError
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables import schemas
from fimo.orchestrator.tables.floor import measured
from fimo.orchestrator.tables.planning import missed
from fimo.orchestrator.tables.reduce import Reduction
from fimo.orchestrator.tables.sanity import is_nonsense, warnings
from fimo.orchestrator.tables.score import EstimateMatrix
from fimo.orchestrator.tables.shares import Course
from fimo.workers.errors import StoreError


def gather(
    sweep: Sweep,
    manifest: Manifest,
    say: Callable[[str], None] = lambda line: None,
    processes: int | None = None,
) -> Gathered:
    """Reduce and score whatever the store holds of a sweep.

    Args:
        say: told of each seed as it is reduced.
        processes: that share in it; None = as many as its parts are worth on this machine.

    Raises:
        StoreError: the store cannot be read.
    """
    gathered = Gathered({}, cells=manifest.cells, settled=manifest.settled)
    listed = listed_parts(sweep, manifest)
    before = stamp(sweep, manifest, listed)
    costs: Costs = []
    notes: list[tuple[object, ...]] = []
    estimates = _estimates(sweep, manifest, gathered, costs, notes)
    # Known before the first seed is reduced: scores are taken under the floor as seeds stream past.
    witnesses = read_witnesses(sweep, manifest, listed)
    _note_witnesses(witnesses, gathered, costs)
    course = Course(
        estimates=tuple(estimates),
        steps=manifest.steps,
        removals=len(manifest.removals),
        evals=manifest.evals,
        seeds=len({part.seed for part in listed}),
        random_groups=manifest.spec.removals.random_groups,
        rounding=measured(witnesses.pairs),
        whole=8 * len(manifest.removals) * len(manifest.steps) * manifest.evals,
    )
    found = reduce_parts(sweep, manifest, listed, course, gathered, costs, say, processes)
    reduction = found.reduction
    gathered.diverged = sorted(reduction.diverged)
    gathered.tables = tables_of(manifest, found, estimates, costs, notes)
    _look(gathered, manifest, reduction)
    gathered.devices = sorted({str(row[3]) for row in costs if row[0] == "shard"})
    gathered.stamp = stamp(sweep, manifest, listed)
    imports = keys.imported(sweep.name)
    unused = sorted({*gathered.gone, *(key for key, _ in gathered.bad if not key.startswith(imports))})
    if unused or gathered.stamp != before:
        # What was of no use, or came meanwhile, may be there by the next listing: these tables are not of that.
        gathered.stamp = digest([before, gathered.stamp, unused])
    return gathered


def _note_witnesses(witnesses: Witnesses, gathered: Gathered, costs: Costs) -> None:
    gathered.bad += witnesses.bad
    gathered.witnesses_missing = witnesses.missing
    gathered.warnings += [
        f"no witnesses of seed {seed}, so that the noise floor may be a lower bound: {why}"
        for seed, why in witnesses.left_out.items()
    ]
    costs += [cost("witness", f"seed {seed}", "", about) for seed, about in witnesses.provenance.items()]


def _estimates(
    sweep: Sweep, manifest: Manifest, gathered: Gathered, costs: Costs, notes: list[tuple[object, ...]]
) -> list[EstimateMatrix]:
    """Each estimator's matrix from its blocks, incomplete ones without; then the imported ones."""
    estimates: list[EstimateMatrix] = []
    left_out = failures.read(sweep, manifest).left_out
    for (estimator, params), entries in listed_blocks(sweep, manifest):
        gathered.estimators_wanted += (estimator, params) not in left_out
        of = value_digest(manifest, estimator, params)
        blocks: list[EstimateBlock] = []
        for entry in entries:
            try:
                blocks.append(sweep.read_block(entry.key, of, estimator, params))
            except NotFound:
                gathered.gone.append(entry.key)
            except BadPartError as error:
                gathered.bad.append((entry.key, str(error)))
        blocks, seeds = wanted(blocks, manifest), runs_of(manifest, estimator, params)
        matrix = assemble(blocks, manifest, seeds)
        if blocks:
            costs.append(_total_cost(estimator, params, blocks))
            _note_coverage(gathered, blocks[0])
            notes += [row for block in blocks for row in _notes(block)]
        if matrix is not None:
            estimates.append(EstimateMatrix(estimator, params, matrix, common_steps(blocks, seeds)))
            gathered.estimators_done += (estimator, params) not in left_out
    return estimates + _imported(sweep, manifest, gathered)


def _note_coverage(gathered: Gathered, block: EstimateBlock) -> None:
    notes = block.provenance.get("notes")
    share = notes.get("coverage") if isinstance(notes, dict) else None
    if isinstance(share, int | float):
        gathered.coverage[block.estimator, block.params] = float(share)


def _notes(block: EstimateBlock) -> Iterator[tuple[object, ...]]:
    """Rows of ``estimator_notes``: what an estimator says of a block of its values."""
    notes = block.provenance.get("notes")
    for note, value in sorted(notes.items()) if isinstance(notes, dict) else ():
        # Not canonical: an estimator may say of a residual that it is not a number.
        told = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        count = block.values.shape[-1]
        yield block.estimator, block.params, block.first, count, block.seed, str(note), told


def _imported(sweep: Sweep, manifest: Manifest, gathered: Gathered) -> list[EstimateMatrix]:
    """Matrices of other libraries, those that cover every removal and evaluation example; the others are told of."""
    blocks, bad, others = imported(sweep, manifest)
    gathered.bad += bad
    covered = [(block, assemble([block], manifest)) for block in blocks]
    lacking = [*others, *(block.estimator for block, matrix in covered if matrix is None)]
    gathered.warnings += [
        f"scores '{name}' are in no table, since the sweep has other removals, evaluation examples or data than when "
        "they were imported: import them again"
        for name in lacking
    ]
    return [EstimateMatrix(b.estimator, b.params, matrix, b.steps) for b, matrix in covered if matrix is not None]


def _look(gathered: Gathered, manifest: Manifest, reduction: Reduction) -> None:
    """Note what is nonsense, or says nothing."""
    if reduction.diverged:
        count = len(reduction.diverged)
        gathered.warnings.append(f"{count} results are not finite and in no mean: lower the learning rate, or clip")
    if not reduction.seeds or not reduction.effects.count.any():
        return
    there = np.asarray((reduction.effects.count > 0).all(axis=1))
    seeds, beyond = len(reduction.seeds), reduction.exploded
    rows = gathered.tables["reliability"].to_pylist()
    ceilings = [row["ceiling"] for row in rows if row["measured"] and row["adjust"] == "baseline"]
    effects, floor = reduction.effects.mean[there], reduction.floors.of_mean(seeds)
    if len(effects) > 1:
        gathered.warnings += warnings(manifest.steps, effects, floor, beyond, ceilings, seeds)
    asked = manifest.spec.seeds
    if asked.until_reliability is not None:
        line = missed(rows, asked.count, asked.until_reliability, asked.max)
        gathered.warnings += [line] if line is not None else []
    gathered.nonsense = is_nonsense(beyond)


def _total_cost(estimator: str, params: str, blocks: Sequence[EstimateBlock]) -> tuple[object, ...]:
    rows = [cost("estimator", estimator, params, dict(block.provenance)) for block in blocks]
    seconds = sum(float(str(row[4])) for row in rows)
    return ("estimator", estimator, params, rows[0][3], seconds, max(int(str(row[5])) for row in rows))


def current_tables(
    sweep: Sweep, manifest: Manifest, say: Callable[[str], None] = lambda line: None
) -> tuple[dict[str, pa.Table], bool]:
    """A sweep's tables: the store's own if they were made from what it holds now, else gathered anew.

    Returns:
        The tables by name, and whether the sweep is complete.

    Raises:
        StoreError: the store cannot be read.
    """
    # Before the tables are known to be current: what is complete only afterwards is not what they were made from.
    complete = is_complete(manifest, sweep, failures.read(sweep, manifest))
    if (made := current(sweep, manifest)) is not None:
        try:
            tables = {name: read_table(sweep, name, made) for name in schemas.SCHEMAS}
        except StoreError:
            pass
        else:
            for line in warnings_in(made):
                say(line)
            return tables, complete
    gathered = gather(sweep, manifest, say)
    for line in gathered.warnings:
        say(line)
    for _, why in gathered.bad:
        say(f"{why}; left out (`fimo resume {sweep.uri}` computes it again)")
    return gathered.tables, gathered.complete
