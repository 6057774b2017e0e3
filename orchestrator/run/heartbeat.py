"""A small object that a running driver overwrites, so that ``fimo status`` can say what runs; never the truth.

Nothing reads it to decide anything. It is gone when the driver ends in good order; one that was killed leaves it, and
its age says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import threading
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any

from fimo.orchestrator.run.course import Course
from fimo.orchestrator.spec.canonical import canonical
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import FimoError

EVERY_S = 10.0
SILENT_S = 60.0
"""Without a beat for so long a driver has most likely ended."""
SAID = {"left": dict, "running": list, "done": int, "cells": int}
"""What an object must hold to be a driver's."""
FORGOTTEN = timedelta(hours=1)
"""After which a new driver clears away what another one left."""


class Heartbeat:
    """Writes how far a driver is, from a thread of its own: a task of this process may take long. A context manager."""

    def __init__(self, sweep: Sweep) -> None:
        host = "".join(c if c.isalnum() else "-" for c in platform.node())[:40] or "host"
        self._sweep = sweep
        self._key = keys.driver(sweep.name, f"{host}-{os.getpid()}-{secrets.token_hex(4)}")
        self._began, self._course = datetime.now(UTC), None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="fimo-heartbeat", daemon=True)

    _course: Course | None

    def follow(self, course: Course) -> None:
        """Tell of this course from now on."""
        self._course = course

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=EVERY_S)
        with contextlib.suppress(FimoError):
            self._sweep.store.delete(self._key)

    def _beat(self) -> None:
        with contextlib.suppress(FimoError):
            self._clear()
        # The first beat waits for a second: a run that has nothing to do leaves no trace.
        wait_s = 1.0
        while not self._stop.wait(wait_s):
            wait_s = EVERY_S
            if self._course is None:
                continue
            # A store that does not answer is the run's to tell.
            with contextlib.suppress(FimoError):
                self._sweep.store.put(self._key, canonical(self._json(self._course)).encode())

    def _json(self, course: Course) -> dict[str, Any]:
        about = {"host": platform.node(), "pid": os.getpid(), "since": self._began.isoformat()}
        return {**about, "every_s": EVERY_S, **course.json()}

    def _clear(self) -> None:
        for entry in list(self._sweep.store.list(keys.driver(self._sweep.name))):
            if datetime.now(UTC) - entry.modified > FORGOTTEN:
                self._sweep.store.delete(entry.key)


def drivers(sweep: Sweep) -> list[dict[str, Any]]:
    """What each driver said last, with ``age_s`` and whether it is ``silent``; newest first; raises StoreError."""
    found = []
    for entry in sweep.store.list(keys.driver(sweep.name)):
        try:
            values = json.loads(sweep.store.get(entry.key))
        except (FimoError, ValueError, RecursionError):
            continue
        if isinstance(values, dict) and all(isinstance(values.get(key), kind) for key, kind in SAID.items()):
            age = max(0.0, (datetime.now(UTC) - entry.modified).total_seconds())
            found.append({**values, "age_s": age, "silent": age > SILENT_S})
    return sorted(found, key=lambda values: float(values["age_s"]))
