"""What a reclaimed node costs: seconds of work lost, and seconds until another one does its share.

A cluster on this machine (deploy/local) with two worker nodes of one CPU, and a sweep of Concrete whose shards take
seconds. A node goes a share of a shard's time after it began one: killed without a word; told as a Kubernetes pod is
(SIGTERM to `ray start --block`, 100 s to drain); told as an EC2 instance is (deploy/aws/spot_watch.py hears a notice).
A fresh node is started at once. What Ray did when is read from its own record of tasks.

    python benchmarks/reclaim.py [--epochs 60]

Lost is what the node had computed of a shard that it did not commit. A cloud's minutes for a new machine come on top.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
DRAIN_S, NOTICE_S = 100, 120
STORIES = [(how, share) for how in ("killed", "pod told", "EC2 told") for share in (0.1, 0.5, 0.9)]
SPEC = """
name: reclaim
workload: concrete
removals: {every: 30, count: 30}
seeds: 500
further_training:
  optimizer: {name: sgd, lr: 0.03}
  batch_size: 128
  epochs: EPOCHS
  evaluate: {every_epochs: 20}
estimators: []
resources: {proof: off, witnesses: 0, shard: 30}
"""


def load_local() -> Any:
    """deploy/local/cluster.py, which is a program and in no package."""
    spec = importlib.util.spec_from_file_location("local_cluster", ROOT / "deploy" / "local" / "cluster.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Local:
    """The cluster: its nodes by Ray's id, with the process that each is."""

    def __init__(self, folder: Path) -> None:
        self.tool, self.folder = load_local(), folder
        os.environ |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S)}
        self.tool.bring_up(folder, 0, 1)
        self.variables = json.loads((folder / "environment.json").read_text())
        os.environ |= self.variables
        self.state = self.tool.load(folder)
        while not self.tool.alive_nodes(folder, self.state):
            time.sleep(0.2)  # The head answers before it counts itself.
        self.leaders: dict[str, int] = {}

    def add(self) -> str:
        """Start a worker node; its id."""
        before = self.tool.alive_nodes(self.folder, self.state) or set()
        self.tool.add(self.folder, self.state)
        (node,) = (self.tool.alive_nodes(self.folder, self.state) or set()) - before
        self.leaders[node] = self.state["processes"][-1]["pid"]
        return str(node)

    def tasks(self) -> list[Any]:
        """Every task that Ray remembers."""
        from ray.util.state import list_tasks

        found: list[Any] = list_tasks(address=self.state["dashboard"], limit=10_000, detail=True)
        return [task for task in found if task.name == "enter" and task.start_time_ms]


def wait_for_start(local: Local, node: str, known: set[str], timeout_s: float = 120) -> float:
    """Until the node runs a task that it did not run before; when it began, in seconds of the epoch."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for task in local.tasks():
            if task.node_id == node and task.state == "RUNNING" and task.task_id not in known:
                return float(task.start_time_ms) / 1000
        time.sleep(0.3)
    raise RuntimeError(f"node {node[:8]} started no shard in {timeout_s:.0f} s")


@contextmanager
def notice(end: datetime) -> Iterator[str]:
    """A metadata service that has the notice."""

    class Service(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self._answer("token")

        def do_GET(self) -> None:
            self._answer(json.dumps({"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")}))

        def _answer(self, body: str) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_arguments: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def reclaim(local: Local, node: str, how: str) -> None:
    """Take the node as the story has it."""
    leader = local.leaders[node]
    if how == "killed":
        os.killpg(leader, signal.SIGKILL)
    elif how == "pod told":
        os.kill(leader, signal.SIGTERM)
    else:
        with notice(datetime.now(UTC) + timedelta(seconds=NOTICE_S)) as endpoint:
            command = [sys.executable, str(ROOT / "deploy" / "aws" / "spot_watch.py"), "--node-id", node]
            command += ["--lock", str(local.folder / f"lock-{node[:8]}")]
            variables = {**os.environ, "AWS_EC2_METADATA_SERVICE_ENDPOINT": endpoint, "RAY_ADDRESS": local.state["gcs"]}
            variables["PATH"] = f"{BIN}:{os.environ['PATH']}"
            subprocess.run(command, env=variables, check=True, stdout=subprocess.DEVNULL)


def story(local: Local, nodes: list[str], how: str, share: float, shard_s: float) -> dict[str, Any]:
    """One reclaim; what was lost is looked up when all is over."""
    victim = nodes.pop(0)
    known = {task.task_id for task in local.tasks() if task.node_id == victim}
    began = wait_for_start(local, victim, known)
    time.sleep(max(0.0, began + share * shard_s - time.time()))
    at = time.time()
    reclaim(local, victim, how)
    nodes.append(local.add())
    wait_for_start(local, nodes[-1], set())
    return {"how": how, "at": at, "victim": victim, "began": began, "fresh": nodes[-1]}


def told(local: Local, event: dict[str, Any]) -> tuple[float, float, float]:
    """Seconds into the shard, seconds of work lost, seconds until the fresh node worked."""
    on_victim = [t for t in local.tasks() if t.node_id == event["victim"] and t.start_time_ms / 1000 < event["at"]]
    lost = sum(event["at"] - t.start_time_ms / 1000 for t in on_victim if t.state != "FINISHED")
    first = min(t.start_time_ms for t in local.tasks() if t.node_id == event["fresh"]) / 1000
    return event["at"] - event["began"], lost, first - event["at"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=60)
    epochs = parser.parse_args().epochs
    with tempfile.TemporaryDirectory(prefix="fimo-reclaim-") as scratch:
        folder = Path(scratch)
        (folder / "reclaim.yaml").write_text(SPEC.replace("EPOCHS", str(epochs)))
        local = Local(folder / "state")
        try:
            measure(local, folder)
        finally:
            local.tool.bring_down(folder / "state", local.state)


def measure(local: Local, folder: Path) -> None:
    nodes = [local.add(), local.add()]
    command = [str(BIN / "fimo"), "run", "reclaim.yaml", "--store", local.variables["FIMO_STORE"]]
    with open(folder / "log", "wb") as log:
        driver = subprocess.Popen([*command, "--address", local.state["gcs"]], cwd=folder, stdout=log, stderr=log)
    try:
        # The first shard of a process loads and traces: the second ones say how long a shard takes.
        for node in nodes:
            wait_for_start(local, node, set())
        while len(done := [t for t in local.tasks() if t.state == "FINISHED"]) < 6:
            if driver.poll() is not None:
                raise RuntimeError((folder / "log").read_text()[-2000:])
            time.sleep(1)
        shard_s = sorted((t.end_time_ms - t.start_time_ms) / 1000 for t in done[-4:])[1]
        print(f"a shard takes {shard_s:.1f} s", flush=True)
        events = [story(local, nodes, how, share, shard_s) for how, share in STORIES]
        print("| the node is | s after a shard began | work lost, s | s until a fresh node works |\n|---|---|---|---|")
        for event in events:
            at, lost, refill = told(local, event)
            print(f"| {event['how']} | {at:.1f} | {lost:.1f} | {refill:.1f} |")
    except BaseException:
        sys.stderr.write((folder / "log").read_text()[-2000:])
        raise
    finally:
        driver.terminate()
        driver.wait(timeout=120)


if __name__ == "__main__":
    main()
