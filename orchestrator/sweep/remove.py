"""A sweep taken out of its store for good: every object under its prefix, and nothing beside it.

What is not a sweep of fimo is refused, so that no mistyped path is ever deleted. Not covered: a run that goes on
meanwhile; whoever finds its objects there afterwards says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from fimo.orchestrator.store import Entry, LocalStore, NotFound
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import StoreError, UsageError

TOGETHER = 16
"""Objects removed at a time: a store on S3 answers one in tens of milliseconds."""


def contents(sweep: Sweep) -> list[Entry]:
    """Every object of a sweep.

    Raises:
        UsageError: there is no sweep of fimo.
        StoreError: the store cannot be read.
    """
    try:
        manifest = json.loads(sweep.store.get(keys.manifest(sweep.name)))
    except NotFound as error:
        raise UsageError(f"{sweep.uri} holds no sweep (no sweep.json): nothing is removed") from error
    except (ValueError, RecursionError):
        manifest = None
    # Not the whole form: a sweep of another version of fimo is one too.
    if not isinstance(manifest, dict) or not {"spec", "digest", "removals"} <= manifest.keys():
        raise UsageError(f"{sweep.uri}/sweep.json is not fimo's: nothing is removed")
    # With the slash: "mine" is no neighbour's beginning ("mine-2").
    return list(sweep.store.list(f"{sweep.name}/"))


def remove(sweep: Sweep, entries: Iterable[Entry]) -> None:
    """Remove a sweep's objects.

    Tables go first, so that nothing that is left tells of results that are gone. The manifest goes last: what is left
    of a removal that was interrupted is a sweep that lacks parts, which can be resumed, or removed again.

    Args:
        entries: of ``contents``.

    Raises:
        StoreError: an object cannot be removed, or something still writes to the sweep.
    """
    listed, last = [entry.key for entry in entries], keys.manifest(sweep.name)
    tables = [key for key in listed if key.startswith(f"{sweep.name}/tables/")]
    _delete(sweep, sorted(tables, key=lambda key: key != keys.made_from(sweep.name)), together=1)
    _delete(sweep, [key for key in listed if key not in tables and key != last])
    if left := [entry.key for entry in sweep.store.list(f"{sweep.name}/") if entry.key != last]:
        raise StoreError(
            f"{sweep.uri}: {len(left)} objects were written while it was removed: stop what writes there "
            "(`fimo cancel`), and remove it again"
        )
    sweep.store.delete(last)
    if isinstance(sweep.store, LocalStore):
        sweep.store.remove_empty(sweep.name)


def _delete(sweep: Sweep, listed: list[str], together: int = TOGETHER) -> None:
    with ThreadPoolExecutor(together) as pool:
        list(pool.map(sweep.store.delete, listed))
