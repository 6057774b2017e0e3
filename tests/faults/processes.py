"""Processes of a test: those that it started, and their descendants, by /proc."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

FIMO = str(Path(sys.executable).parent / "fimo")

RAY_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A dead node is noticed in a second.
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "2",
    "RAY_health_check_initial_delay_ms": "500",
}


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's, without its AWS and Ray settings, with ``more``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_"))}
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept.get('PATH', '')}"
    return {**kept, **RAY_ENVIRONMENT, **more}


def descendants(pid: int) -> list[tuple[int, str]]:
    """(pid, command line) of every live descendant."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            stat = (folder / "stat").read_text()
            fields = stat[stat.rindex(")") + 2 :].split()
            if fields[0] != "Z":
                parents[int(folder.name)] = int(fields[1])
                commands[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    workers = []
    for child in parents:
        above = child
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and child != pid:
            workers.append((child, commands[child]))
    return workers


def busy_workers(cluster: int) -> list[int]:
    """Pids of the cluster's workers that are running a task now."""
    return [pid for pid, command in descendants(cluster) if command.startswith("ray::enter")]


def kill(pid: int) -> bool:
    """SIGKILL; whether it was there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def wait_until(what: Callable[[], object], timeout_s: float = 240, every_s: float = 0.1) -> None:
    """Poll until ``what()`` is true; fails the test after the time-out."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(every_s)


def fimo(
    *words: str, environment: Mapping[str, str], cwd: Path, timeout_s: float = 200
) -> subprocess.CompletedProcess[str]:
    """A command to its end."""
    return subprocess.run(
        [FIMO, *words],
        env=dict(environment),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
