"""The tables that a sweep's store holds, and whether they are still what the store's objects come to.

Invariant: if ``made-from.json`` holds the stamp of what the store holds now, so do the tables beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import pyarrow as pa

from fimo.orchestrator.run.blocks import listed_blocks
from fimo.orchestrator.run.plan import witness_tasks
from fimo.orchestrator.spec.canonical import canonical, digest
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.imported import imported_keys
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Listed, Sweep
from fimo.orchestrator.tables import schemas
from fimo.workers.errors import StoreError

FORMULAS = 3
"""Raised when tables come out otherwise of the same objects, so that those of an older version are made anew."""


def listed_parts(sweep: Sweep, manifest: Manifest) -> list[Listed]:
    """The parts of the spec's own seeds; raises StoreError."""
    seeds = set(manifest.spec.seeds)
    return [part for part in sweep.list_parts(manifest.digest) if part.seed in seeds]


def listed_witnesses(sweep: Sweep, manifest: Manifest) -> list[int]:
    """The seeds whose witnesses are asked for and there; raises StoreError."""
    wanted = [task.seed for task in witness_tasks(manifest)]
    held = set(sweep.list_witnesses(manifest.digest)) if wanted else set()
    return [seed for seed in wanted if seed in held]


def stamp(sweep: Sweep, manifest: Manifest, listed: Sequence[Listed]) -> str:
    """A digest of the manifest and of the objects that tables are made from; only imported scores are read for it.

    Args:
        listed: the sweep's parts (``listed_parts``).

    Raises:
        StoreError: the store cannot be read.
    """
    blocks = [entry.key for _, entries in listed_blocks(sweep, manifest) for entry in entries]
    wanted = [manifest.digest, manifest.estimate_digest, [list(e) for e in manifest.estimators]]
    # The form counts beside the indices: over random groups there is one metric more.
    removals = [manifest.spec.removals.random_groups, [[r.name, list(r.indices)] for r in manifest.removals]]
    others = [hashlib.sha256(sweep.store.get(key)).hexdigest() for key in imported_keys(sweep)]
    witnesses = listed_witnesses(sweep, manifest)
    parts = [part.key for part in listed]
    names = [list(of) for of in manifest.names]
    return digest([FORMULAS, wanted, removals, names, manifest.evals, parts, blocks, others, witnesses])


def write_tables(
    sweep: Sweep, tables: Mapping[str, pa.Table], made_from: str, warnings: Sequence[str] = ()
) -> dict[str, str]:
    """Put tables into the store.

    Args:
        made_from: the stamp of what they were made from.
        warnings: what a reader of them must be told first.

    Returns:
        The tables' URIs by name.

    Raises:
        StoreError: the store cannot be written.
    """
    written = {}
    for name, table in tables.items():
        key = keys.table(sweep.name, name)
        sweep.store.put(key, schemas.encode_table(table))
        written[name] = f"{sweep.store.uri.rstrip('/')}/{key}"
    sweep.store.put(keys.made_from(sweep.name), canonical({"stamp": made_from, "warnings": list(warnings)}).encode())
    return written


def is_current(sweep: Sweep, manifest: Manifest) -> bool:
    """Whether the store's tables were made from what it holds now."""
    try:
        made_from = json.loads(sweep.store.get(keys.made_from(sweep.name)))["stamp"]
        return bool(made_from == stamp(sweep, manifest, listed_parts(sweep, manifest)))
    except (StoreError, ValueError, KeyError, TypeError, RecursionError):
        return False


def read_table(sweep: Sweep, name: str) -> pa.Table:
    """One of the store's tables.

    Raises:
        StoreError: there is none, or it is torn or foreign.
    """
    return schemas.decode_table(sweep.store.get(keys.table(sweep.name, name)), name)


def read_warnings(sweep: Sweep) -> list[str]:
    """What a reader of the stored tables must be told first; none if it is not recorded."""
    try:
        warnings = json.loads(sweep.store.get(keys.made_from(sweep.name)))["warnings"]
        return [str(line) for line in warnings]
    except (StoreError, ValueError, KeyError, TypeError, RecursionError):
        return []
