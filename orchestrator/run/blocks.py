"""An estimator's blocks in a sweep: what their values depend on, where they lie, and the matrix that they make."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fimo.estimators.declared import DECLARED, declared
from fimo.orchestrator.run.plan import shard_size
from fimo.orchestrator.spec.canonical import digest
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.spec.spec import Spec
from fimo.orchestrator.store import Entry
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.estimates import EstimateBlock, decode_block
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.parts import BadPartError
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import StoreError

Named = tuple[str, str]
"""An estimator's name and its canonical params."""


def estimate_identity(result_digest: str, at_final_digest: str, spec: Spec, estimator: str, params: str) -> str:
    """The digest in the keys of an estimator's blocks: of all that its values depend on, which it declares itself.

    θᶠ, the workload, the data and the estimator's version for all; the further-training section and the seeds for those
    that follow them.
    """
    named = declared(estimator, json.loads(params))
    source = result_digest if named.follows_training() else at_final_digest
    seeds = named.follows_seeds(tuple(spec.seeds), spec.seeds.after)
    return digest([source, list(seeds), named.version])


def value_digest(manifest: Manifest, estimator: str, params: str, at: int | None = None) -> str:
    """The digest (64 hex digits) of all that an estimator's values depend on.

    ``at``: of values for one recorded step alone, which are kept apart from those for all of them.
    """
    whole = estimate_identity(manifest.digest, manifest.estimate_digest, manifest.spec, estimator, params)
    return whole if at is None else digest([whole, "at", at])


def listed_blocks(sweep: Sweep, manifest: Manifest, at: int | None = None) -> Iterator[tuple[Named, list[Entry]]]:
    """Each estimator in spec order with the blocks that are listed for it; raises StoreError."""
    for estimator, params in manifest.estimators:
        prefix = keys.estimates(sweep.name, value_digest(manifest, estimator, params, at), estimator, params)
        yield (estimator, params), list(sweep.store.list(prefix))


def held_removals(sweep: Sweep, manifest: Manifest, key: str, set_name: str) -> Sequence[NamedRemoval]:
    """The removals of a block; one whose set cannot be told is read for it, and holds none if it does not verify."""
    try:
        return sweep.read_set(manifest.digest, set_name)
    except StoreError:
        try:
            removals = decode_block(sweep.store.get(key), key).removals
        except BadPartError:
            return ()
        return removals if keys.set_hash(removals) == set_name else ()


def runs_of(manifest: Manifest, estimator: str, params: str) -> tuple[int, ...]:
    """The seeds that an estimator trains with on a sweep, ascending; none if it trains no runs of its own."""
    seeds = manifest.spec.seeds
    return tuple(sorted(declared(estimator, json.loads(params)).runs(tuple(seeds), seeds.after)))


def shares(manifest: Manifest, estimator: str, params: str) -> Iterator[tuple[int | None, int, int]]:
    """(seed, first, count) of an estimator's blocks: lowest seeds first; None if it trains no runs of its own."""
    kind = DECLARED[estimator]
    size = kind.evals_together
    if kind.trains:
        # A run is as dear as a cell. With its baseline a block is no more than a shard, whatever ``resources`` say.
        size = min(size, shard_size(manifest.scalars, manifest.steps[-1]) - 1)
    for seed in runs_of(manifest, estimator, params) or (None,):
        for first in range(0, manifest.evals, size):
            yield seed, first, min(size, manifest.evals - first)


def wanted(blocks: Sequence[EstimateBlock], manifest: Manifest) -> list[EstimateBlock]:
    """Those that hold a removal of the sweep; the steps and notes of others are no table's business, as with parts."""
    removals = {r.indices for r in manifest.removals}
    return [block for block in blocks if not removals.isdisjoint(r.indices for r in block.removals)]


def assemble(
    blocks: Sequence[EstimateBlock], manifest: Manifest, seeds: Sequence[int] = ()
) -> NDArray[np.float64] | None:
    """The removal × eval matrix of blocks, float64 (R, m), or (S, R, m) over ``common_steps``; None while it lacks one.

    Args:
        seeds: the mean is taken over them, in this order; blocks of others do not count. None = blocks have no seed.
    """
    total: NDArray[np.float64] | None = None
    of, steps = _of(blocks, seeds), common_steps(blocks, seeds)
    for seed in seeds or (None,):
        matrix = _matrix([b for b in of if b.seed == seed], manifest, steps)
        if matrix is None:
            return None
        total = matrix if total is None else total + matrix
    return total if total is None or not seeds else total / len(seeds)


def common_steps(blocks: Sequence[EstimateBlock], seeds: Sequence[int] = ()) -> tuple[int, ...] | None:
    """The steps that every block has, of those that count for ``assemble``; None if the estimate is of every amount.

    A seed may end early, where its changes grow without bound.
    """
    of = [b.steps for b in _of(blocks, seeds)]
    if not of or of[0] is None:
        return None
    return tuple(step for step in of[0] if all(step in (steps or ()) for steps in of))


def _of(blocks: Sequence[EstimateBlock], seeds: Sequence[int]) -> list[EstimateBlock]:
    return [b for b in blocks if b.seed in (seeds or (None,))]


def _matrix(
    blocks: Sequence[EstimateBlock], manifest: Manifest, steps: tuple[int, ...] | None
) -> NDArray[np.float64] | None:
    if not blocks:
        return None
    leading = (len(steps),) if steps is not None else ()
    matrix = np.full((*leading, len(manifest.removals), manifest.evals), np.nan)
    for block in blocks:
        rows = {r.indices: place for place, r in enumerate(block.removals)}
        pairs = [(place, rows[r.indices]) for place, r in enumerate(manifest.removals) if r.indices in rows]
        stop = min(block.first + block.values.shape[-1], manifest.evals)
        if not pairs or (block.steps is None) != (steps is None) or stop <= block.first:
            continue
        into, out_of = [p for p, _ in pairs], [p for _, p in pairs]
        own = block.values if steps is None else block.values[[(block.steps or ()).index(step) for step in steps]]
        matrix[..., into, block.first : stop] = own[..., out_of, : stop - block.first]
    return None if np.isnan(matrix).any() else matrix
