"""From a shell: a token-protected head and a worker node, S3 with credentials, jobs, and a worker node that dies."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from fimo.orchestrator.run.status import sweep_status
from fimo.orchestrator.store import MemoryStore, open_store
from fimo.orchestrator.sweep.sweep import open_sweep
from tests.faults import sweeps
from tests.faults.processes import environment, fimo, wait_until
from tests.support.seaweed import set_environment

pytestmark = [pytest.mark.ray, pytest.mark.s3]

SCRIPT = Path(__file__).parents[3] / "deploy" / "local" / "cluster.py"
SEEDS = 6


@dataclass
class Shell:
    """A shell beside the local cluster; keeps everything that a command ever printed."""

    state: Path
    folder: Path
    variables: dict[str, str]
    said: list[str] = field(default_factory=list)

    @property
    def store(self) -> str:
        return self.variables["FIMO_STORE"]

    @property
    def address(self) -> str:
        return self.variables["FIMO_ADDRESS"]

    @property
    def secrets(self) -> list[str]:
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        return [(self.state / "token").read_text(), *(self.variables[name] for name in names)]

    def __call__(self, *words: str, cwd: Path | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
        done = fimo(*words, environment=self.variables | changes, cwd=cwd or self.folder)
        self.said += [done.stdout, done.stderr]
        return done

    def cluster(self, *words: str) -> None:
        command = [sys.executable, str(SCRIPT), "--state", str(self.state), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    folder = tmp_path_factory.mktemp("shell")
    shell = Shell(folder / "state", folder, {})
    shell.cluster("up", "--workers", "1", "--cpus", "1")
    try:
        variables = json.loads((shell.state / "environment.json").read_text())
        aws = {"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
        # Only the embedded Ray's variables are pinned by `environment`; this cluster has a token.
        shell.variables = environment(aws | variables | {"XDG_STATE_HOME": str(folder / "home")})
        shell.variables.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
        with pytest.MonkeyPatch.context() as patch:
            set_environment(patch, {k: v for k, v in shell.variables.items() if k.startswith("AWS_")})
            yield shell
    finally:
        shell.cluster("down")


@pytest.fixture(scope="module")
def project(shell: Shell) -> Path:
    """A user's folder outside the repository, with things in it that must not go up."""
    spec = sweeps.write_project(shell.folder / "project", seeds=SEEDS, epochs=30)
    (spec.parent / ".git").mkdir()
    for name in (".git/config", "data.csv", "unrelated.py"):
        (spec.parent / name).write_text("not to go up")
    return spec.parent


def local_tables(spec: Path) -> dict[str, bytes]:
    store = MemoryStore()
    assert sweeps.run_here(sweeps.resolved(spec), store).exit_code == 0
    return sweeps.tables(store)


def pulled(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.parquet") if p.name != "costs.parquet"}


def complete(shell: Shell, cells: int) -> bool:
    """Looked up here, since a command takes seconds to start."""
    store = open_store(shell.store)
    if not list(store.list("tiny/sweep.json")):
        return False
    told = sweep_status(open_sweep(f"{shell.store}/tiny"))
    return told["cells"] == cells and bool(told["complete"])


def test_a_dry_run_lists_the_spec_and_the_code_and_submits_nothing(shell: Shell, project: Path) -> None:
    done = shell("submit", "spec.yaml", "--store", shell.store, "--dry-run", cwd=project)
    assert done.returncode == 0, done.stderr
    listed = [line.split()[1] for line in done.stdout.splitlines()]
    assert listed == ["spec.yaml", "faults_helper.py", "faults_workload.py"]
    assert list(open_store(shell.store).list("tiny/")) == []


def test_a_submitted_sweep_survives_its_worker_node(shell: Shell, project: Path, tmp_path: Path) -> None:
    store = open_store(shell.store)
    done = shell("submit", "spec.yaml", "--store", shell.store, cwd=project)
    assert done.returncode == 0, done.stderr
    number = done.stdout.strip()
    assert f"fimo status {shell.store}/tiny --watch" in done.stderr
    wait_until(lambda: len(sweeps.part_keys(store)) >= 2)
    shell.cluster("kill")
    committed = sweeps.objects(store)
    assert 0 < len(sweeps.held_cells(store)) < 5 * SEEDS
    half = shell("status", f"{shell.store}/tiny")
    assert half.returncode == 3
    assert "cells done" in half.stdout
    shell.cluster("add")
    wait_until(lambda: complete(shell, 5 * SEEDS), timeout_s=180, every_s=1)
    assert "scores.parquet" in shell("logs", f"{shell.store}/tiny", "--follow").stdout
    sweeps.check_kept(store, committed)
    here = local_tables(project / "spec.yaml")
    sweeps.check_sound(store, here, 5 * SEEDS)
    done = shell("pull", f"{shell.store}/tiny", "--to", str(tmp_path / "pulled"))
    assert done.returncode == 0, done.stderr
    assert pulled(tmp_path / "pulled") == here
    logs = shell("logs", f"{shell.store}/tiny", "--job", number).stdout
    assert f"{5 * SEEDS} cells;" in logs


@pytest.mark.slow
def test_an_extended_sweep_computes_only_what_is_new(shell: Shell, project: Path) -> None:
    """Two more seeds, a removal and an estimator, submitted under the same name."""
    store = open_store(shell.store)
    if not complete(shell, 5 * SEEDS):  # run by itself, without the test above
        assert shell("submit", "spec.yaml", "--store", shell.store, cwd=project).returncode == 0
        wait_until(lambda: complete(shell, 5 * SEEDS), timeout_s=180, every_s=1)
    before = sweeps.objects(store)
    text = (project / "spec.yaml").read_text()
    text = text.replace(f"seeds: {SEEDS}", f"seeds: {SEEDS + 2}").replace("count: 5", "count: 6")
    (project / "spec.yaml").write_text(text.replace("[grad_dot]", "[grad_dot, grad_cos]"))
    planned = json.loads(shell("plan", "spec.yaml", "--store", shell.store, "--json", cwd=project).stdout)
    assert (planned["done"], planned["cells"]) == (5 * SEEDS, 6 * (SEEDS + 2))
    assert shell("submit", "spec.yaml", "--store", shell.store, cwd=project).returncode == 0
    wait_until(lambda: complete(shell, 6 * (SEEDS + 2)), timeout_s=180, every_s=1)
    sweeps.check_kept(store, before)
    held = sweeps.held_cells(store)
    assert len(held) == 6 * (SEEDS + 2)
    assert set(held.values()) == {1}


@pytest.mark.slow
def test_a_cancelled_sweep_is_resumed_from_the_store_alone(shell: Shell, project: Path) -> None:
    store = open_store(shell.store)
    sweeps.write_project(project, seeds=60, epochs=30)
    done = shell("submit", "spec.yaml", "--store", shell.store, "--json", cwd=project)
    submitted = json.loads(done.stdout)
    parts = len(sweeps.part_keys(store))
    wait_until(lambda: len(sweeps.part_keys(store)) > parts)
    stopped = json.loads(shell("cancel", f"{shell.store}/tiny", "--json").stdout)
    assert stopped == {"stopped": [{"job": submitted["job"], "status": "STOPPED"}]}
    before = sweeps.objects(store)
    assert len(before) >= parts + 1
    assert shell("cancel", f"{shell.store}/tiny").stdout == ""
    # From a folder that is not the project's, and without the spec.
    (project / "spec.yaml").unlink()
    done = shell("resume", f"{shell.store}/tiny", "--address", shell.address, cwd=project)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: len(sweeps.part_keys(store)) > len(before))
    shell("cancel", f"{shell.store}/tiny")
    sweeps.check_kept(store, before)
    # Another machine, which has never submitted to this head, is asked before the token goes there.
    stranger = shell("logs", f"{shell.store}/tiny", XDG_STATE_HOME=str(shell.folder / "elsewhere"))
    assert stranger.returncode == 2
    assert "another machine" in stranger.stderr


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    talk = [line for line in done.stderr.splitlines() if "cells" not in line]
    assert len(talk) == 1, done.stderr
    assert talk[0].startswith("fimo: ")
    return talk[0]


class OtherRay(BaseHTTPRequestHandler):
    """A head of another version."""

    def do_GET(self) -> None:
        body = b'{"version": "4", "ray_version": "2.47.1", "ray_commit": "x", "session_name": "x"}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def test_what_is_wrong_is_told_in_one_line(shell: Shell, tmp_path: Path) -> None:
    folder = sweeps.write_project(tmp_path / "p").parent
    submit = ["submit", "spec.yaml", "--store", shell.store]

    def says(*words: str, text: str, **changes: str) -> None:
        done = shell(*words, cwd=folder, **changes)
        assert done.returncode == 1, done.stderr
        assert text in one_line(done)

    says(*submit, text="credentials are refused", AWS_SECRET_ACCESS_KEY="x" * 40)
    (tmp_path / "token").write_text("0" * 64)
    says(*submit, text="refuses the Ray token", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    says(*submit, text="refuses the Ray token", RAY_AUTH_MODE="disabled")
    says("submit", "spec.yaml", "--store", "s3://no-such-bucket-here/x", text="the bucket does not exist")
    says(*submit, "--address", "http://127.0.0.1:9", text="no Ray head answers")
    says("run", "spec.yaml", "--store", str(tmp_path / "s"), "--address", "127.0.0.1:9", text="cannot reach Ray")
    server = HTTPServer(("127.0.0.1", 0), OtherRay)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        other = f"http://127.0.0.1:{server.server_address[1]}"
        says(*submit, "--address", other, text="runs Ray 2.47.1, this machine 2.60.0")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--store", "runs"], "is a directory"),
        (["--address", "http://user:word@127.0.0.1:1"], "no user or password"),
        (["--address", "ray://127.0.0.1:1"], "give the head's dashboard"),
        (["--store", "s3://key:word@bucket/x"], "takes no user, password"),
    ],
)
def test_a_mistaken_argument_is_told_in_one_line(shell: Shell, tmp_path: Path, words: list[str], text: str) -> None:
    folder = sweeps.write_project(tmp_path / "p").parent
    done = shell("submit", "spec.yaml", "--store", shell.store, *words, cwd=folder)
    assert done.returncode == 2
    assert text in one_line(done)
    assert "word@" not in done.stderr


@pytest.mark.slow
def test_the_doctor_finds_the_cluster_well(shell: Shell) -> None:
    done = shell("doctor", "--store", shell.store, "--address", shell.address, "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0, told
    assert told["ok"]
    names = {check["name"].split(" on ")[0] for check in told["checks"]}
    assert {"credentials", "store", "conditional writes", "clock", "head", "cluster: versions"} <= names
    assert "cluster: determinism" in names


def test_no_credential_is_anywhere(shell: Shell) -> None:
    """In what commands print, in the store, in the jobs' metadata and in the cluster's logs; the last test here."""
    state = json.loads((shell.state / "state.json").read_text())
    script = "import sys; from ray.job_submission import JobSubmissionClient as C; print(C(sys.argv[1]).list_jobs())"
    jobs = subprocess.run(
        [sys.executable, "-c", script, shell.address], env=shell.variables, capture_output=True, text=True, check=True
    ).stdout
    assert "fimo run spec.yaml" in jobs
    store = open_store(shell.store)
    texts = {"output": "".join(shell.said).encode(), "jobs": jobs.encode()}
    texts |= {entry.key: store.get(entry.key) for entry in store.list("")}
    logs = [path for path in Path(state["ray"]).glob("session_*/logs/**/*") if path.is_file()]
    texts |= {str(path): path.read_bytes() for path in [*logs, *shell.state.glob("*.log")]}
    assert len(logs) > 10
    for name, data in texts.items():
        for secret in shell.secrets:
            assert secret.encode() not in data, name
