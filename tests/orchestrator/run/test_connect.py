"""Reaching Ray: what is none is refused soon, and an embedded one keeps to itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from fimo.orchestrator.run import connect, sessions
from fimo.orchestrator.run.connect import ClusterError, cluster


def test_what_answers_and_is_no_ray_is_refused_soon(monkeypatch):
    monkeypatch.setattr(connect, "HEALTH_TIMEOUT_S", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ClusterError, match="is not Ray") as refused, cluster(address):
            pass
    assert time.monotonic() - began < 15
    assert len(str(refused.value).splitlines()) == 1


def test_a_folder_too_long_for_sockets_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 60)))
    assert sessions._root().parent == Path("/tmp")


def test_folders_of_sessions_that_have_ended_go_and_those_of_others_stay(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", tempfile.mkdtemp(prefix="f-", dir="/tmp"))
    with sessions.own_folder() as first:
        (first / "session_1").mkdir()
        held, told = os.pipe(), os.pipe()
        other = os.fork()
        if other == 0:
            with sessions.own_folder() as mine:
                os.write(told[1], str(mine).encode())
                os.read(held[0], 1)
            os._exit(0)
        its = Path(os.read(told[0], 1000).decode())
        with sessions.own_folder() as second:
            assert first.is_dir()
            assert its.is_dir()
        os.write(held[1], b"x")
        os.waitpid(other, 0)
    assert first.is_dir(), "the newest is kept for its logs"
    with sessions.own_folder() as last:
        assert sorted(last.parent.iterdir()) == [last]
    assert not second.exists()
    assert last.is_dir()


EMBEDDED = """
from fimo.orchestrator.run import sessions
from fimo.orchestrator.run.connect import cluster
with cluster("local"):
    import ray
    print(ray.nodes()[0]["NodeManagerAddress"])
    [own] = sessions._root().iterdir()
    print(own.parent.parent, any(path.name.startswith("session_") for path in own.iterdir()))
"""


@pytest.mark.ray
def test_an_embedded_ray_leaves_another_rays_folder_alone_and_listens_on_loopback(tmp_path):
    """In a process of its own: Ray reads its environment when it is first imported."""
    short = Path(tempfile.mkdtemp(prefix="f-", dir="/tmp"))
    theirs = short / "ray" / "ray_current_cluster"
    theirs.parent.mkdir()
    theirs.write_text("10.0.0.1:6379")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", EMBEDDED],
        env={**kept, "TMPDIR": str(tmp_path), "RAY_TMPDIR": str(short), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.splitlines() == ["127.0.0.1", f"{short} True"], done.stderr
    assert theirs.read_text() == "10.0.0.1:6379"
    assert list(theirs.parent.iterdir()) == [theirs]


def ended(program: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, whose Ray has a folder of its own."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "RAY_TMPDIR": tempfile.mkdtemp(prefix="f-", dir="/tmp"), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


SIGNALLED = """
import os, signal
from fimo.orchestrator.run.connect import cluster
signal.signal(signal.SIGTERM, lambda *about: print("noted", flush=True))
with cluster("local"):
    os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
print("printed")
"""


@pytest.mark.ray
def test_a_signal_while_results_are_printed_is_the_callers_to_handle():
    """Ray's native code leaves SIGTERM to kill the process when it is shut down, and Python does not notice."""
    done = ended(SIGNALLED)
    assert (done.returncode, done.stdout.split()) == (0, ["noted", "noted", "printed"]), done.stderr


STARTING = """
import os, signal, threading, time
from fimo.orchestrator.run.connect import cluster

def own(*about): print("noted", flush=True)

def send():
    while signal.getsignal(signal.SIGTERM) is own:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)

signal.signal(signal.SIGTERM, own)
threading.Thread(target=send, daemon=True).start()
try:
    with cluster("local"):
        print("entered")
except KeyboardInterrupt:
    print("interrupted", signal.getsignal(signal.SIGTERM) is own)
"""


@pytest.mark.ray
def test_a_signal_while_ray_starts_is_an_interruption():
    """Ray's own handler ends the process with exit code 15, and says nothing."""
    done = ended(STARTING)
    assert (done.returncode, done.stdout.split()) == (0, ["interrupted", "True"]), done.stderr
