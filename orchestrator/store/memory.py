"""A store in this process's memory: a stateful fake under the whole contract, for in-process tests.

Invariant: every change happens under one lock. It pickles as a reference, so an unpickled copy in the
same process *is* the same store; in any other process unpickling is refused, since objects written
there would be lost. Not for sweeps: nothing survives the process.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from fimo.orchestrator.store.base import Entry, NotFound, check_store, short, validate_key, validate_prefix
from fimo.workers.errors import StoreError

_numbers = itertools.count()
_living: weakref.WeakValueDictionary[str, MemoryStore] = weakref.WeakValueDictionary()


class MemoryStore:
    """See `fimo.orchestrator.store.base.Store`."""

    def __init__(self) -> None:
        self.uri = f"memory:{next(_numbers)}"
        self._objects: dict[str, tuple[bytes, datetime]] = {}
        self._lock = threading.Lock()
        _living[self.uri] = self

    def __repr__(self) -> str:
        return f"MemoryStore({self.uri!r})"

    def __reduce__(self) -> tuple[Callable[[str], MemoryStore], tuple[str]]:
        return _find, (self.uri,)

    def create(self, key: str, data: bytes) -> bool:
        """See `Store.create`."""
        validate_key(key)
        with self._lock:
            if key in self._objects:
                return False
            self._objects[key] = (bytes(data), datetime.now(UTC))
            return True

    def put(self, key: str, data: bytes) -> None:
        """See `Store.put`."""
        validate_key(key)
        with self._lock:
            self._objects[key] = (bytes(data), datetime.now(UTC))

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        validate_key(key)
        with self._lock:
            if key not in self._objects:
                raise NotFound(f"store {self.uri} has no object {short(key)}")
            return self._objects[key][0]

    def list(self, prefix: str) -> Iterator[Entry]:
        """See `Store.list`."""
        validate_prefix(prefix)
        with self._lock:
            entries = [Entry(k, len(d), t) for k, (d, t) in self._objects.items() if k.startswith(prefix)]
        return iter(sorted(entries))

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        validate_key(key)
        with self._lock:
            self._objects.pop(key, None)

    def check(self) -> None:
        """See `Store.check`."""
        check_store(self)


def _find(uri: str) -> MemoryStore:
    if uri not in _living:
        raise StoreError(f"store {uri} lives in the process that made it; use a directory or s3://bucket/prefix")
    return _living[uri]
