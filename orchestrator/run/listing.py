"""The sweeps of a store, and how far each is: one listing, and of each sweep its manifest and small records.

No part is read, but one whose set of removals is lost. What complete means is what it means for one sweep.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import groupby, takewhile
from typing import Any

from fimo.orchestrator.run import failures
from fimo.orchestrator.run.owed import is_complete, missing_estimates
from fimo.orchestrator.store import Entry, Store
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import FimoError, StoreError


class Snapshot:
    """A store as one listing showed it, for reading: many sweeps for the price of one listing."""

    def __init__(self, inner: Store) -> None:
        self._inner, self.uri = inner, inner.uri
        self._entries = sorted(inner.list(""))
        self._keys = [entry.key for entry in self._entries]

    def list(self, prefix: str) -> Iterator[Entry]:
        """See `Store.list`; as it was."""
        rest = self._entries[bisect_left(self._keys, prefix) :]
        return takewhile(lambda entry: entry.key.startswith(prefix), rest)

    def get(self, key: str) -> bytes:
        """See `Store.get`; as it is."""
        return self._inner.get(key)

    def create(self, key: str, data: bytes) -> bool:
        """Refused."""
        raise StoreError(f"store {self.uri} is only looked at")

    def put(self, key: str, data: bytes) -> None:
        """Refused."""
        raise StoreError(f"store {self.uri} is only looked at")

    def delete(self, key: str) -> None:
        """Refused."""
        raise StoreError(f"store {self.uri} is only looked at")

    def check(self) -> None:
        """See `Store.check`."""
        self._inner.check()


def sweeps(store: Store) -> list[dict[str, Any]]:
    """The sweeps of a store by name, as plain values.

    Each has ``name``, ``last_write`` (ISO 8601, UTC) and ``state`` (complete, incomplete, estimated only, failed:
    tasks are set aside, or unreadable: then the rest is None), ``digest``, ``cells``, ``done``, ``seeds``,
    ``seeds_complete`` (of which all cells are there), ``failed`` (tasks set aside) and ``complete``.

    Raises:
        StoreError: the store cannot be listed.
    """
    snapshot = Snapshot(store)
    found = []
    for name, group in groupby(snapshot.list(""), key=lambda entry: entry.key.partition("/")[0]):
        entries = list(group)
        if any(entry.key == keys.manifest(name) for entry in entries):
            written = max(entry.modified for entry in entries)
            about = {"name": name, "last_write": written.isoformat(timespec="seconds")}
            found.append(about | _progress(Sweep(snapshot, name)))
    return found


def elsewhere(store: Store) -> str | None:
    """The folder of a sweep in a store that holds none by name: "" if it is a sweep itself; None if there is none."""
    lies = (entry.key.rpartition("/") for entry in store.list("") if entry.key.split("/")[-1] == "sweep.json")
    return next((folder for folder, _, _ in lies), None)


def _progress(sweep: Sweep) -> dict[str, Any]:
    try:
        manifest = sweep.read_manifest()
        recorded = failures.read(sweep, manifest)
        listed = sweep.list_parts(manifest.digest)
        done = sweep.done(manifest, listed)
        wanted = {r.indices for r in manifest.removals}
        by_seed = [len(wanted & done.get(seed, set())) for seed in manifest.spec.seeds]
        complete = is_complete(manifest, sweep, recorded)
        estimated = bool(manifest.estimators) and not (listed or missing_estimates(manifest, sweep, recorded))
    except FimoError:
        lacking = dict.fromkeys(("digest", "cells", "done", "seeds", "seeds_complete", "failed"))
        return {"state": "unreadable", **lacking, "complete": False}
    state = "complete" if complete else "estimated only" if estimated else "incomplete"
    return {
        "state": "failed" if recorded.aside else state,
        "digest": manifest.digest,
        "cells": manifest.cells,
        "done": sum(by_seed),
        "seeds": manifest.spec.seeds.count,
        "seeds_complete": sum(count == len(wanted) for count in by_seed),
        "failed": len(recorded.aside),
        "complete": complete,
    }
