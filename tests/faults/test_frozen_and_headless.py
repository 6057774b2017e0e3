"""A node that freezes under its tasks, and a head that is killed: a cluster of several raylets, from a shell."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fimo.orchestrator.store import LocalStore, MemoryStore
from tests.faults import sweeps
from tests.faults.processes import FIMO, environment, fimo, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SEEDS, LONGER = 12, 240
"""Seeds of a sweep in which a node freezes, and of one that outlasts the half minute in which a head is missed."""


def project(folder: Path, seeds: int) -> Path:
    return sweeps.write_project(folder / "project", seeds=seeds, epochs=40).parent


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with open(tmp_path / "ray.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.ray_cluster"],
            # Ray's own patience, as on a user's cluster: it takes a minute to notice a frozen node.
            env={k: v for k, v in environment({}).items() if not k.startswith("RAY_health")},
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=90)


def tell(cluster: subprocess.Popen[str], word: str) -> None:
    assert cluster.stdin is not None
    assert cluster.stdout is not None
    print(word, file=cluster.stdin, flush=True)
    cluster.stdout.readline()


def start(cluster: subprocess.Popen[str], project: Path, store: LocalStore, log: Path) -> subprocess.Popen[bytes]:
    assert cluster.stdout is not None
    address = cluster.stdout.readline().strip()
    with open(log, "wb") as out:
        driver = subprocess.Popen(
            [FIMO, "run", "spec.yaml", "--store", store.uri, "--address", address],
            env=environment({}),
            cwd=project,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    wait_until(lambda: len(sweeps.part_keys(store)) >= 3)
    return driver


def undisturbed(project: Path) -> dict[str, bytes]:
    store = MemoryStore()
    assert sweeps.run_here(sweeps.resolved(project / "spec.yaml"), store).exit_code == 0
    return sweeps.tables(store)


def test_while_one_of_two_nodes_is_frozen_the_other_goes_on_to_the_end(
    cluster: subprocess.Popen[str], tmp_path: Path
) -> None:
    store, log, folder = sweeps.folder_store(tmp_path / "store"), tmp_path / "log", project(tmp_path, SEEDS)
    driver = start(cluster, folder, store, log)
    tell(cluster, "freeze")
    try:
        frozen_at, parts = time.monotonic(), len(sweeps.part_keys(store))
        wait_until(lambda: len(sweeps.part_keys(store)) >= parts + 4, timeout_s=60)
        assert driver.wait(timeout=200) == 0, log.read_text()
        assert time.monotonic() - frozen_at < 200
    finally:
        tell(cluster, "thaw")
    sweeps.check_sound(store, undisturbed(folder), 5 * SEEDS)


def test_a_driver_whose_head_is_killed_ends_within_a_minute_with_a_line_of_ours_and_resumes(
    cluster: subprocess.Popen[str], tmp_path: Path
) -> None:
    store, log, folder = sweeps.folder_store(tmp_path / "store"), tmp_path / "log", project(tmp_path, LONGER)
    driver = start(cluster, folder, store, log)
    tell(cluster, "behead")
    began = time.monotonic()
    assert driver.wait(timeout=90) == 3, log.read_text()
    assert time.monotonic() - began < 60
    text = log.read_text()
    assert "the Ray head has not answered for" in text
    assert "Traceback" not in text
    assert "The program will terminate" not in text
    resumed = fimo("resume", f"{store.uri}/tiny", environment=environment({}), cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    sweeps.check_sound(store, undisturbed(folder), 5 * LONGER)
