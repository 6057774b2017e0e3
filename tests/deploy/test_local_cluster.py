"""deploy/local on this machine: a token-protected head, worker nodes that come and go, S3 with credentials."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fimo.orchestrator.store import open_store
from fimo.workers.errors import StoreError
from tests.deploy.manifests import DEPLOY
from tests.deploy.test_spot_watch import Service, metadata_service
from tests.support.seaweed import set_environment

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.s3]

SCRIPT = str(DEPLOY / "local" / "cluster.py")
JOB = """
import ray
ray.init(address="auto", logging_level="ERROR")
@ray.remote(num_cpus=1)
def where():
    return ray.get_runtime_context().get_node_id()
head = ray.get_runtime_context().get_node_id()
print("on the head:", head in ray.get([where.remote() for _ in range(4)]), "CPUs:", ray.cluster_resources()["CPU"])
"""


def cluster(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, "--state", str(folder), *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("local") / "state"
    started = cluster(folder, "up", "--workers", "1")
    assert started.returncode == 0, started.stderr
    yield folder
    cluster(folder, "down")


def environment(folder: Path) -> Mapping[str, str]:
    shell = subprocess.run(
        ["sh", "-c", f". {folder}/env.sh && env -0"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    variables = dict(entry.split("=", 1) for entry in shell.stdout.split("\0") if "=" in entry)
    return {name: value for name, value in variables.items() if name.startswith(("RAY_", "AWS_", "FIMO_"))}


def submit(folder: Path, **changed: str) -> subprocess.CompletedProcess[str]:
    values = {**environment(folder), **changed}
    ray = str(Path(sys.executable).parent / "ray")
    entrypoint = [sys.executable, "-c", f"exec({JOB!r})"]
    return subprocess.run(
        [ray, "job", "submit", "--address", values["FIMO_ADDRESS"], "--", *entrypoint],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **values},
    )


def test_secrets_are_readable_by_their_owner_alone_and_on_no_command_line(folder: Path) -> None:
    token = (folder / "token").read_text()
    secret = environment(folder)["AWS_SECRET_ACCESS_KEY"]
    for name in ("token", "env.sh", "environment.json", "state.json"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        assert token not in line
        assert secret not in line


def test_jobs_run_on_the_worker_node_with_the_token_and_not_without(folder: Path) -> None:
    done = submit(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on the head: False CPUs: 1.0" in done.stdout
    wrong = submit(folder, RAY_AUTH_TOKEN="0" * 64)
    assert wrong.returncode != 0
    assert "authentication token is invalid" in wrong.stdout + wrong.stderr
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(environment(folder)["FIMO_ADDRESS"] + "/api/jobs/", timeout=10)


def test_the_store_takes_its_own_keys_and_no_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, environment(folder))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", environment(folder)["AWS_ENDPOINT_URL_S3"])
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    store = environment(folder)["FIMO_STORE"]
    open_store(store).check()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="credentials are refused"):
        open_store(store).check()


def test_a_worker_node_is_killed_and_another_comes(folder: Path) -> None:
    assert cluster(folder, "kill", "7").returncode == 1
    assert cluster(folder, "kill").returncode == 0
    assert [line.split("\t")[2] for line in cluster(folder, "status").stdout.splitlines()] == ["running"] * 2 + [
        "ended"
    ]
    assert cluster(folder, "add").returncode == 0
    done = submit(folder)
    assert "CPUs: 1.0" in done.stdout, done.stdout + done.stderr


def alive_nodes(folder: Path) -> set[str]:
    """By Ray's ids, as the head counts them."""
    values = environment(folder)
    request = urllib.request.Request(values["FIMO_ADDRESS"] + "/nodes?view=summary")
    request.add_header("Authorization", f"Bearer {(folder / 'token').read_text()}")
    with urllib.request.urlopen(request, timeout=10) as answer:
        nodes = [node["raylet"] for node in json.loads(answer.read())["data"]["summary"]]
    return {node["nodeId"] for node in nodes if node.get("state") == "ALIVE"}


SLOW_JOB = """
import sys, time
import ray
ray.init(address="auto", logging_level="ERROR")
@ray.remote(num_cpus=1, max_retries=0)
def work(path):
    with open(path, "w") as file:
        file.write(ray.get_runtime_context().get_node_id())
    time.sleep(8)
    return "finished"
print(ray.get(work.remote(sys.argv[1])))
"""


@pytest.mark.parametrize("how", ["as a pod", "as a spot instance"])
def test_a_node_that_is_told_finishes_its_task_and_goes(folder: Path, tmp_path: Path, how: str) -> None:
    """Ray's own drain: of `ray start --block` on SIGTERM, and after AWS's notice by spot_watch.py."""
    began, values = tmp_path / "began", environment(folder)
    ray = str(Path(sys.executable).parent / "ray")
    entrypoint = [sys.executable, "-c", f"exec({SLOW_JOB!r})", str(began)]
    variables = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(folder), **values}
    job = subprocess.Popen(
        [ray, "job", "submit", "--address", values["FIMO_ADDRESS"], "--", *entrypoint],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=variables,
    )
    deadline = time.monotonic() + 60
    while not (began.exists() and began.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    state = json.loads((folder / "state.json").read_text())
    leader = [entry["pid"] for entry in state["processes"] if entry["name"].startswith("worker-")][-1]
    if how == "as a pod":
        os.kill(leader, signal.SIGTERM)
    else:
        with metadata_service() as endpoint:
            Service.notice = json.dumps({"time": (datetime.now(UTC) + timedelta(seconds=60)).isoformat()})
            variables |= {"AWS_EC2_METADATA_SERVICE_ENDPOINT": endpoint, "RAY_ADDRESS": state["gcs"]}
            watch = [sys.executable, str(DEPLOY / "aws" / "spot_watch.py"), "--node-id", began.read_text()]
            subprocess.run([*watch, "--lock", str(tmp_path / "lock")], env=variables, check=True)
    output, _ = job.communicate(timeout=90)
    assert job.returncode == 0, output
    assert "finished" in output
    deadline = time.monotonic() + 30
    while began.read_text() in alive_nodes(folder) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert began.read_text() not in alive_nodes(folder), "a drained node goes"
    assert cluster(folder, "add").returncode == 0


def test_a_second_up_is_refused_and_down_ends_what_was_started_and_nothing_else(folder: Path) -> None:
    refused = cluster(folder, "up")
    assert refused.returncode == 1
    assert "already holds a cluster" in refused.stderr
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        state = json.loads((folder / "state.json").read_text())
        groups = {entry["pid"] for entry in state["processes"]}
        # A process that only has a number that was ours before is someone else's.
        state["processes"].append({"name": "worker-9", "pid": bystander.pid, "started": "1"})
        (folder / "state.json").write_text(json.dumps(state))
        assert cluster(folder, "down").returncode == 0
        time.sleep(0.2)
        assert bystander.poll() is None
        assert not groups & set(_live_groups())
        assert not (folder / "token").exists()
        assert not Path(state["ray"]).exists()
    finally:
        bystander.kill()
        bystander.wait()


def _live_groups() -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            yield int(fields[2])
