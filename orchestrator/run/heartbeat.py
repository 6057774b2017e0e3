"""A small object that a running driver overwrites, so that ``fimo status`` can say what runs; never the truth.

Other drivers of the sweep read in it whether this one is still heard of, and leave it what it has claimed. It is gone
when the driver ends in good order; one that was killed leaves it, and its age says so.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from fimo.orchestrator.run.course import Course
from fimo.orchestrator.spec.canonical import canonical
from fimo.orchestrator.sweep import keys, records
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import FimoError

EVERY_S = 5.0
SILENT_S = 30.0
"""Without a beat for so long a driver has most likely ended."""
KEPT_S = 3.0
"""Seconds for which what was read of other drivers is not read again."""
FORGOTTEN = timedelta(hours=1)
"""After which a new driver clears away what another one left."""


class Heartbeat:
    """Writes how far a driver is, from a thread of its own: a task of this process may take long. A context manager."""

    def __init__(self, sweep: Sweep) -> None:
        host = "".join(c if c.isalnum() else "-" for c in platform.node())[:40] or "host"
        self._sweep = sweep
        self.name = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        self.who = {"host": platform.node(), **_this_process()}
        self.key = keys.driver(sweep.name, self.name)
        self._began, self._course = datetime.now(UTC), None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="fimo-heartbeat", daemon=True)

    _course: Course | None

    def follow(self, course: Course) -> None:
        """Tell of this course from now on, and once before this returns: whoever meets a claim must find its driver."""
        self._course = course
        self.beat()

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=EVERY_S)
        with contextlib.suppress(FimoError):
            self._sweep.store.delete(self.key)

    def beat(self) -> None:
        """Say now how far the driver is."""
        if self._course is not None:
            # A store that does not answer is the run's to tell.
            with contextlib.suppress(FimoError):
                self._sweep.store.put(self.key, canonical(self._json(self._course)).encode())

    def _beat(self) -> None:
        with contextlib.suppress(FimoError):
            self._clear()
        while not self._stop.wait(EVERY_S):
            self.beat()

    def _json(self, course: Course) -> dict[str, Any]:
        return {**self.who, "since": self._began.isoformat(), "every_s": EVERY_S, **course.json()}

    def _clear(self) -> None:
        for entry in list(self._sweep.store.list(keys.driver(self._sweep.name))):
            if datetime.now(UTC) - entry.modified > FORGOTTEN:
                self._sweep.store.delete(entry.key)


class Others:
    """Which other drivers of a sweep are heard of, as far as this one can tell.

    Ages are by the store's own clock: that of this driver's last beat against those of the others.
    """

    def __init__(self, sweep: Sweep, own: Heartbeat) -> None:
        self._sweep, self._own = sweep, own
        self._ages: dict[str, float] = {}
        self._ended = set[str]()
        self._read = 0.0
        self._lock = threading.Lock()

    def alive(self, claim: Mapping[str, Any]) -> bool:
        """Whether a claim's driver is heard of; one of this machine whose process has gone is not.

        Args:
            claim: its driver's name and what ``Heartbeat.who`` says of the process.
        """
        if claim.get("driver") == self._own.name:
            return True
        if _has_gone(claim):
            return False
        driver = str(claim.get("driver"))
        with self._lock:
            # A driver has beaten before it claims anything: one that is not there now has ended, and none comes back.
            if driver in self._ended:
                return False
            if driver not in self._ages or time.monotonic() - self._read > KEPT_S:
                self._ages, self._read = self._look(), time.monotonic()
            if driver not in self._ages:
                self._ended.add(driver)
            return self._ages.get(driver, SILENT_S) < SILENT_S

    def _look(self) -> dict[str, float]:
        prefix = keys.driver(self._sweep.name)
        beats = {e.key.removeprefix(prefix).removesuffix(".json"): e.modified for e in self._sweep.store.list(prefix)}
        now = max(beats.values(), default=datetime.now(UTC))
        return {name: (now - beat).total_seconds() for name, beat in beats.items()}


def _this_process() -> dict[str, Any]:
    """This process as other processes of the machine can find it: machine, process id, and when it was started."""
    return {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def _machine() -> str:
    """The boot of the machine and the namespace of its process ids; empty where there is no such thing."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process was started, in the kernel's ticks; empty if there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    # A process that nobody has waited for is dead.
    return "" if fields[0] in "ZX" else fields[19]


def _has_gone(claim: Mapping[str, Any]) -> bool:
    pid, machine = claim.get("pid"), claim.get("machine")
    if not machine or machine != _machine() or not isinstance(pid, int):
        return False
    return _started(pid) != claim.get("started")


def drivers(sweep: Sweep) -> list[dict[str, Any]]:
    """What each driver said last, with ``age_s`` and whether it is ``silent``; newest first; raises StoreError."""
    found = []
    for entry in sweep.store.list(keys.driver(sweep.name)):
        try:
            said = records.read(records.Said, sweep.store.get(entry.key))
        except FimoError:
            continue
        if said is not None:
            age = max(0.0, (datetime.now(UTC) - entry.modified).total_seconds())
            found.append({**said[1], "age_s": age, "silent": age > SILENT_S})
    return sorted(found, key=lambda values: float(values["age_s"]))
