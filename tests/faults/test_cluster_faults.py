"""Faults on a real cluster: several raylets, shards in worker processes, a store on a real S3 server.

Killed, at moments that a random generator chooses: workers mid-shard and mid-commit, a node, the driver, the S3
server. After each story the tables are byte for byte those of an undisturbed run here.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from fimo.orchestrator.store import MemoryStore, S3Store
from tests.faults import sweeps
from tests.faults.processes import FIMO, busy_workers, environment, kill, wait_until
from tests.support.seaweed import BUCKET, Seaweed, set_environment
from tests.support.weather_proxy import bad_weather

pytestmark = [pytest.mark.ray, pytest.mark.s3]

SEEDS = 12
CELLS = 5 * SEEDS


@dataclass
class Commits:
    """The proxy's plan: at chosen writes of parts, the workers are killed in the middle."""

    cluster: int = 0
    deadly: dict[int, str] = field(default_factory=dict)
    seen: int = 0
    killed: int = 0

    def __call__(self, method: str, path: str) -> str | None:
        if method != "PUT" or "/parts/" not in path or not self.deadly:
            return None
        self.seen += 1
        fault = self.deadly.pop(self.seen, None)
        if fault == "before":
            self._kill()
            return "reset_before"
        if fault == "after":
            # The object is committed while its writer dies without an answer.
            threading.Timer(0.05, self._kill).start()
            return "hang_after_commit"
        return None

    def _kill(self) -> None:
        self.killed += sum(map(kill, busy_workers(self.cluster)))


@dataclass
class Place:
    """The cluster with its S3 server."""

    process: subprocess.Popen[str]
    address: str
    server: Seaweed
    commits: Commits
    environment: dict[str, str]
    project: Path

    def tell(self, word: str) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(word, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def driver(self, uri: str, log: Path) -> subprocess.Popen[bytes]:
        with open(log, "ab") as out:
            return subprocess.Popen(
                [FIMO, "run", "spec.yaml", "--store", uri, "--address", self.address, "--json"],
                env=self.environment,
                cwd=self.project,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("cluster")
    project = sweeps.write_project(folder / "project", seeds=SEEDS, epochs=12).parent
    server, commits = Seaweed(folder / "s3"), Commits()
    (folder / "s3").mkdir(exist_ok=True)
    server.start()
    with pytest.MonkeyPatch.context() as patch, bad_weather(server.ports[0], commits) as proxy:
        set_environment(patch, server.environment())
        server.wait_until_writable()
        variables = environment(server.environment(f"http://127.0.0.1:{proxy.server_address[1]}"))
        with open(folder / "ray.log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.ray_cluster"],
                env=variables,
                cwd=Path(__file__).parents[2],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address, (folder / "ray.log").read_text()
            commits.cluster = process.pid
            yield Place(process, address, server, commits, variables, project)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(timeout=60)
            server.stop()


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> dict[str, bytes]:
    store = MemoryStore()
    assert sweeps.run_here(sweeps.resolved(place.project / "spec.yaml"), store).exit_code == 0
    return sweeps.tables(store)


@pytest.fixture
def store(place: Place) -> S3Store:
    """An empty store on the server itself: what the test looks at passes no proxy."""
    prefix = uuid.uuid4().hex
    return S3Store(f"s3://{BUCKET}/{prefix}", BUCKET, prefix)


def already_there(log: Path) -> int:
    """The cells that the last driver found done when it began."""
    counts = re.findall(r"cells(?:, (\d+) there already)?;", log.read_text())
    return int(counts[-1] or 0)


def test_workers_nodes_and_the_s3_server_die_under_one_driver(
    place: Place, undisturbed: dict[str, bytes], store: S3Store, tmp_path: Path
) -> None:
    """Seven faults: three workers mid-shard, two mid-commit, a node, the S3 server."""
    random, log = Random(4), tmp_path / "log"
    place.commits.deadly = {4: "before", 9: "after"}
    driver = place.driver(store.uri, log)
    for _ in range(3):
        wait_until(lambda: busy_workers(place.process.pid) and sweeps.part_keys(store))
        time.sleep(random.uniform(0.0, 0.2))
        for pid in busy_workers(place.process.pid)[:1]:
            assert kill(pid)
    wait_until(lambda: len(sweeps.part_keys(store)) >= 6)
    place.server.kill()
    time.sleep(random.uniform(0.5, 1.5))
    place.server.start()
    wait_until(lambda: len(sweeps.part_keys(store)) >= 9)
    assert place.tell("kill") == 1
    assert place.tell("add") == 2
    assert driver.wait(timeout=200) == 0, log.read_text()
    assert place.commits.killed >= 2
    assert not place.commits.deadly
    sweeps.check_sound(store, undisturbed, CELLS)
    assert list(store.list("tiny/failed/")) == []


# Without Ray the same storm is part of every run: ``test_killed_processes``, and SIGTERM from a shell.
@pytest.mark.slow
def test_a_killed_and_a_terminated_driver_lose_nothing(
    place: Place, undisturbed: dict[str, bytes], store: S3Store, tmp_path: Path
) -> None:
    """Three faults: SIGKILL of the driver twice, SIGTERM once, each followed by a new one."""
    random, log = Random(5), tmp_path / "log"
    parts = 0
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        driver = place.driver(store.uri, log)
        wait_until(lambda parts=parts: len(sweeps.part_keys(store)) >= parts + 3)
        time.sleep(random.uniform(0.0, 0.3))
        os.kill(driver.pid, number)
        code = driver.wait(timeout=60)
        assert code == (3 if number == signal.SIGTERM else -signal.SIGKILL), log.read_text()
        wait_until(lambda: not busy_workers(place.process.pid))
        parts, before = len(sweeps.part_keys(store)), sweeps.objects(store)
        assert parts < 2 * SEEDS
    assert "stopped by SIGTERM" in log.read_text()
    cells = len(sweeps.held_cells(store))
    driver = place.driver(store.uri, log)
    assert driver.wait(timeout=200) == 0, log.read_text()
    assert already_there(log) == cells
    sweeps.check_kept(store, before)
    sweeps.check_sound(store, undisturbed, CELLS)


@pytest.mark.slow
def test_three_drivers_on_one_sweep_share_it_and_make_the_tables_of_one(
    place: Place, undisturbed: dict[str, bytes], store: S3Store, tmp_path: Path
) -> None:
    logs = [tmp_path / str(number) for number in range(3)]
    drivers = [place.driver(store.uri, log) for log in logs]
    for driver, log in zip(drivers, logs, strict=True):
        assert driver.wait(timeout=200) == 0, log.read_text()
    sweeps.check_sound(store, undisturbed, CELLS)
    finished = [json.loads(text[text.index("{\n") :]) for text in (log.read_text() for log in logs)]
    # A task that another driver was quicker at counts as computed here too, though nothing is trained.
    assert sum(of["computed"] for of in finished) <= 1.1 * CELLS
