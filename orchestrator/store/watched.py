"""A store whose silence is told: one line when an operation takes long, one when the store answers again.

A store that fails is tried again for minutes, and whoever waits should know for what.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from fimo.orchestrator.store.base import Entry, Store

SLOW_S = 8.0
"""Seconds without an answer after which it is told."""
LOOK_S = 1.0


def itself(store: Store) -> Store:
    """What a watched store is to another process: the store without its watcher."""
    return store


class WatchedStore:
    """``store`` under the same contract; see `fimo.orchestrator.store.base.Store`. A context manager.

    Pickles as the store itself.

    Args:
        say: is told a line, from a thread of its own.
    """

    def __init__(self, store: Store, say: Callable[[str], None], slow_s: float = SLOW_S) -> None:
        self._store, self._say, self._slow_s = store, say, slow_s
        self._began: dict[int, float] = {}
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self._told = False
        self._thread = threading.Thread(target=self._watch, name="fimo-store", daemon=True)

    def __enter__(self) -> WatchedStore:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=2 * LOOK_S)

    def __reduce__(self) -> tuple[Any, ...]:
        return itself, (self._store,)

    @property
    def uri(self) -> str:
        """See `Store.uri`."""
        return self._store.uri

    @property
    def silent_s(self) -> float:
        """Seconds that the oldest operation has had no answer for; 0 if none is under way."""
        return max((time.monotonic() - began for began in list(self._began.values())), default=0.0)

    def create(self, key: str, data: bytes) -> bool:
        """See `Store.create`."""
        with self._asked():
            return self._store.create(key, data)

    def put(self, key: str, data: bytes) -> None:
        """See `Store.put`."""
        with self._asked():
            self._store.put(key, data)

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        with self._asked():
            return self._store.get(key)

    def list(self, prefix: str) -> Iterator[Entry]:
        """See `Store.list`."""
        with self._asked():
            return self._store.list(prefix)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        with self._asked():
            self._store.delete(key)

    def check(self) -> None:
        """See `Store.check`."""
        with self._asked():
            self._store.check()

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        number = next(self._numbers)
        self._began[number] = time.monotonic()
        try:
            yield
        finally:
            self._began.pop(number, None)

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_S):
            silent_s = self.silent_s
            if silent_s > self._slow_s and not self._told:
                self._told = True
                self._say(f"store {self.uri}: still waiting for its answer, {silent_s:.0f} s so far")
            elif self._told and silent_s <= self._slow_s:
                self._told = False
                self._say(f"store {self.uri} answers")
