"""The tables that a sweep's store holds, and whether they are still what the store's objects come to.

Invariant: if ``made-from.json`` holds the stamp of what the store holds now, a table with the hash that stands there is
of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from fimo.orchestrator.run.blocks import listed_blocks
from fimo.orchestrator.run.witness_plan import witness_tasks
from fimo.orchestrator.spec.canonical import canonical, digest, is_sealed, sealed
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
    written, hashes = {}, {}
    for name, table in tables.items():
        key, data = keys.table(sweep.name, name), schemas.encode_table(table)
        sweep.store.put(key, data)
        written[name], hashes[name] = f"{sweep.store.uri.rstrip('/')}/{key}", hashlib.sha256(data).hexdigest()
    about = {"stamp": made_from, "warnings": list(warnings), "tables": hashes}
    sweep.store.put(keys.made_from(sweep.name), canonical(sealed(about)).encode())
    return written


def current(sweep: Sweep, manifest: Manifest, listed: Sequence[Listed] | None = None) -> dict[str, Any] | None:
    """What is recorded of the store's tables, if they were made from what it holds now; else None.

    Args:
        listed: all parts of its digest, if known.
    """
    try:
        made, seeds = _made_from(sweep), set(manifest.spec.seeds)
        every = sweep.list_parts(manifest.digest) if listed is None else listed
        now = stamp(sweep, manifest, [part for part in every if part.seed in seeds])
    except StoreError:
        return None
    return made if made.get("stamp") == now else None


def read_table(sweep: Sweep, name: str, made: Mapping[str, Any] | None = None) -> pa.Table:
    """One of the store's tables, as it was written with the others beside it.

    Two drivers that end at once may leave tables of both: those of one of them are not taken for the other's.

    Args:
        made: what is recorded of the tables (``current``), for whoever reads several: a driver that writes new ones
            meanwhile writes another record, and its tables are none of this one's. None = what is recorded now.

    Raises:
        StoreError: there is none, or it is torn, foreign, or not the one that was written last.
    """
    data = sweep.store.get(keys.table(sweep.name, name))
    made = _made_from(sweep) if made is None else made
    if hashlib.sha256(data).hexdigest() != dict(made.get("tables", {})).get(name):
        raise StoreError(f"table {name} is not the one that was written; run the sweep again to write it anew")
    return schemas.decode_table(data, name)


def warnings_in(made: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables must be told first, by what is recorded of them; none if that is not recorded."""
    try:
        return [str(line) for line in made["warnings"]]
    except (KeyError, TypeError):
        return []


def _made_from(sweep: Sweep) -> dict[str, Any]:
    """What is recorded of the tables; raises StoreError if there is no record, or it is not as it was written."""
    try:
        about = json.loads(sweep.store.get(keys.made_from(sweep.name)))
        if isinstance(about, dict) and isinstance(about.get("tables", {}), dict) and is_sealed(about):
            return about
    except (ValueError, TypeError, RecursionError):
        pass
    raise StoreError(f"{sweep.uri}: what its tables were made from is not recorded")
