"""Several drivers on one sweep share its work: a driver claims a task before it starts it.

Claims are never the truth. A part is committed once whoever computes it, and a claim that is lost, stale or doubled
costs time and nothing else. A claim names its driver; while that driver is heard of, others leave the task to it, and
take it over when it is not.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any

from fimo.orchestrator.run.failures import task_id
from fimo.orchestrator.run.heartbeat import Heartbeat, Others
from fimo.orchestrator.run.work import Together, Work
from fimo.orchestrator.spec.canonical import canonical
from fimo.orchestrator.store import NotFound
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import FimoError, StoreError

TOGETHER = 16
"""Claims that are written at once."""
TURNS = 50
"""Drivers that may have died over one task before a claim is no longer asked for."""
LOOK_EVERY_S = 2.0
"""Seconds between two looks at what other drivers have finished, or a few times what a look takes."""
PATIENCE_S = 10.0
"""Seconds that a driver waits at its end for its claims to be withdrawn."""
FORGOTTEN = timedelta(hours=1)
"""After which what a dead driver has claimed is cleared away."""


class Claims:
    """The claims of one driver, which a heartbeat keeps alive. A context manager: at its end they are withdrawn."""

    def __init__(self, sweep: Sweep, manifest: Manifest, heartbeat: Heartbeat) -> None:
        self._sweep, self._manifest = sweep, manifest
        self._others = Others(sweep, heartbeat)
        self._body = canonical({"driver": heartbeat.name, **heartbeat.who}).encode()
        self._held: dict[str, str] = {}
        self._withdrawn = deque[Future[None]]()
        self._threads = ThreadPoolExecutor(TOGETHER, thread_name_prefix="fimo-claims")

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._held):
            self._withdraw(name)
        wait([*self._withdrawn, self._threads.submit(self._clear)], timeout=PATIENCE_S)
        # What a store that fails has not done by now stays, and is stale.
        self._threads.shutdown(wait=False, cancel_futures=True)

    def take(self, work: Sequence[Work]) -> list[bool]:
        """Claim tasks; False where another driver that is heard of has one.

        A store that fails here is no reason to stop: the task is computed without a claim.
        """
        names = [task_id(self._manifest, one) for one in work]
        return list(self._threads.map(self._take, names))

    def release(self, work: Work) -> None:
        """Withdraw the claim on a task that has ended, in the background."""
        self._withdraw(task_id(self._manifest, work))

    def _take(self, name: str) -> bool:
        with contextlib.suppress(StoreError):
            for turn in range(TURNS):
                key = keys.claim(self._sweep.name, name, turn)
                if self._sweep.store.create(key, self._body):
                    self._held[name] = key
                    return True
                holder = self._read(key)
                if holder is not None and self._others.alive(holder):
                    return False
        return True

    def _read(self, key: str) -> dict[str, Any] | None:
        """A claim's body; None if it has just been withdrawn, or is none."""
        try:
            values = json.loads(self._sweep.store.get(key))
        except (NotFound, ValueError, RecursionError):
            return None
        return values if isinstance(values, dict) else None

    def _withdraw(self, name: str) -> None:
        key = self._held.pop(name, None)
        if key is not None:
            while self._withdrawn and self._withdrawn[0].done():
                self._withdrawn.popleft()
            self._withdrawn.append(self._threads.submit(self._delete, key))

    def _delete(self, key: str) -> None:
        # What stays is stale as soon as this driver ends.
        with contextlib.suppress(FimoError):
            self._sweep.store.delete(key)

    def _clear(self) -> None:
        """Remove what dead drivers have left; never what a live one holds."""
        with contextlib.suppress(FimoError):
            for entry in list(self._sweep.store.list(keys.claim(self._sweep.name))):
                if datetime.now(UTC) - entry.modified < FORGOTTEN:
                    continue
                holder = self._read(entry.key)
                if holder is None or not self._others.alive(holder):
                    self._delete(entry.key)


class SharedTasks:
    """Tasks in order, of which this driver takes those that no other has; see ``places.Source``.

    Args:
        remaining: of some tasks, those that the store still lacks, cut down to what is missing of each.
    """

    def __init__(
        self, work: Sequence[Work], claims: Claims, remaining: Callable[[Sequence[Work]], Sequence[Work]]
    ) -> None:
        self._queue, self._theirs = deque(work), deque[Work]()
        self._claims, self._remaining = claims, remaining
        self._looked, self._pause_s = time.monotonic(), LOOK_EVERY_S

    def take(self, count: int) -> list[Work]:
        """Up to ``count`` to start now."""
        mine: list[Work] = []
        if self._theirs and time.monotonic() - self._looked > self._pause_s:
            self._look()
        while self._queue and len(mine) < count:
            batch = [self._queue.popleft() for _ in range(min(count - len(mine), len(self._queue)))]
            for work, taken in zip(batch, self._claims.take(batch), strict=True):
                (mine if taken else self._theirs).append(work)
        return mine

    def done(self, work: Work) -> None:
        """What was taken has ended."""
        self._claims.release(work)

    def split(self, work: Together) -> list[Work]:
        """Those shards of what was taken that are to be tried one by one from now on, each under its own claim."""
        mine: list[Work] = []
        for shard, taken in zip(work.owed, self._claims.take(work.owed), strict=True):
            (mine if taken else self._theirs).append(shard)
        self._claims.release(work)
        return mine

    @property
    def waits(self) -> int:
        """Tasks that other drivers have."""
        return len(self._theirs)

    @property
    def open(self) -> bool:
        """Whether there may be more to take."""
        return bool(self._queue or self._theirs)

    def _look(self) -> None:
        """Forget what the others have done, and ask again for what is left of theirs, before the rest."""
        began = time.monotonic()
        with contextlib.suppress(StoreError):
            left = self._remaining([*self._theirs, *self._queue])
            self._queue, self._theirs = deque(left), deque()
        self._looked = time.monotonic()
        self._pause_s = max(LOOK_EVERY_S, 5 * (self._looked - began))
