"""Files and stores made by an enemy: no code of theirs runs, nothing hangs, and what is wrong is one line."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fimo.orchestrator.commands.main import main
from fimo.orchestrator.resolve.code import source_digest
from fimo.orchestrator.run.status import sweep_status
from fimo.orchestrator.spec.canonical import sealed
from fimo.orchestrator.store import LocalStore
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.sweep import open_sweep
from tests.faults import sweeps

Run = Callable[..., str]


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.canary,))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "code-has-run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sweeps.write_project(tmp_path / "project").parent


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, canary: Path) -> Run:
    """Runs a command that must fail in one line, which is returned, and without a trace of the canary."""

    def run(*words: str, codes: tuple[int, ...] = (1, 2)) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["fimo", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code in codes, said
        lines = said.err.strip().splitlines()
        assert len(lines) == 1, said.err
        assert "Traceback" not in said.err
        assert len(lines[0]) < 600
        assert not canary.exists()
        return lines[0]

    return run


def spec_with(folder: Path, old: str, new: str) -> str:
    text = (folder / "spec.yaml").read_text()
    assert old in text
    (folder / "enemy.yaml").write_text(text.replace(old, new))
    return "enemy.yaml"


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "aliases"),
        ("name: &x [*x]\n", "aliases"),
        ("[" * 20000, "nested too deeply"),
        ("{a: " * 5000 + "}" * 5000, "nested too deeply"),
        ("!!python/object/apply:os.system ['touch code-has-run']", "not valid YAML"),
        ("name: !!python/name:os.system x", "not valid YAML"),
        ("name: a\nname: b\n", "given twice"),
        ("x" * (33 * 2**20), "larger than"),
        ("\x00\x01", "not valid YAML"),
        ("- just\n- a list\n", "must be a mapping"),
    ],
)
def test_a_hostile_spec_is_one_line(fails: Run, folder: Path, text: str, says: str) -> None:
    (folder / "enemy.yaml").write_text(text)
    assert says in fails("plan", "enemy.yaml")


def test_a_spec_without_end_is_not_read_to_its_end(fails: Run) -> None:
    assert "larger than" in fails("plan", "/dev/zero")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("name: tiny", "name: ../../outside"),
        ("name: tiny", "name: /etc/x"),
        ("name: tiny", 'name: "a\\nb"'),
        ("name: tiny", "name: .hidden"),
        ("faults_workload:make", "../faults_workload:make"),
        ("faults_workload:make", "/tmp/x:make"),
        ("faults_workload:make", "faults_workload:make()"),
        ("faults_workload:make", "subprocess:call\nworkload_args: {args: [touch, ../code-has-run]}"),
        ("faults_workload:make", "os:system\nworkload_args: {command: touch ../code-has-run}"),
        ("faults_workload:make", "pathlib:Path\nworkload_args: {}"),
        ("faults_workload:make", "faults_workload:os"),
    ],
)
def test_a_name_that_reaches_elsewhere_is_refused(fails: Run, folder: Path, tmp_path: Path, old: str, new: str) -> None:
    spec = spec_with(folder, old, new)
    before = sorted(tmp_path.iterdir())
    fails("run", spec, "--store", str(folder / "store"))
    fails("submit", spec, "--store", "s3://bucket-x/y", "--address", "http://127.0.0.1:9")
    assert sorted(tmp_path.iterdir()) == before
    assert not (folder / "store").exists()


@pytest.mark.parametrize("kind", ["pickle", "huge header", "empty", "text"])
def test_a_final_model_that_is_none_is_refused(fails: Run, folder: Path, canary: Path, kind: str) -> None:
    data = {
        "pickle": pickle.dumps(Trap(canary)),
        "huge header": (2**62).to_bytes(8, "little") + b"{}",
        "empty": b"",
        "text": b"weights",
    }[kind]
    (folder / "model.safetensors").write_bytes(data)
    spec = spec_with(folder, "seeds:", "final_model: model.safetensors\nseeds:")
    assert "not a valid safetensors file" in fails("plan", spec)


def parquet(**columns: pa.Array) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


@pytest.mark.parametrize("kind", ["torn", "foreign", "pickle", "types", "deep", "outside"])
def test_a_removals_file_that_is_none_is_refused(fails: Run, folder: Path, canary: Path, kind: str) -> None:
    name = "removals.json" if kind == "deep" else "removals.parquet"
    good = parquet(name=pa.array(["a"]), indices=pa.array([[1]]))
    data = {
        "torn": good[: len(good) // 2],
        "foreign": parquet(x=pa.array([1])),
        "pickle": pickle.dumps(Trap(canary)),
        "types": parquet(name=pa.array(["a"]), indices=pa.array([[1.5]])),
        "deep": b"[" * 100_000,
        "outside": parquet(name=pa.array(["a"]), indices=pa.array([[10**9]])),
    }[kind]
    (folder / name).write_bytes(data)
    fails("plan", spec_with(folder, "{every: 4, count: 5}", f"{{from: {name}}}"))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the folder's sweep, run once; each test has a copy."""
    project = tmp_path_factory.mktemp("swept") / "project"
    spec = sweeps.write_project(project)
    assert sweeps.run_here(sweeps.resolved(spec), sweeps.folder_store(project / "store")).exit_code == 0
    return project / "store"


@pytest.fixture
def store(folder: Path, swept: Path) -> LocalStore:
    shutil.copytree(swept, folder / "store")
    return sweeps.folder_store(folder / "store")


def alter(store: LocalStore, key: str, **changes: object) -> None:
    values = json.loads(store.get(key)) | changes
    # Whoever may write to a store can seal what they like.
    seal = sealed({name: value for name, value in values.items() if name != "seal"}) if "seal" in values else values
    store.put(key, json.dumps(seal).encode())


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"null", b"[" * 100_000, b"\xff\xfe", b'{"spec": 1}'])
@pytest.mark.parametrize("command", ["status", "resume", "pull", "verify"])
def test_a_manifest_that_is_none_is_one_line(fails: Run, store: LocalStore, command: str, text: bytes) -> None:
    store.put("tiny/sweep.json", text)
    fails(command, f"{store.uri}/tiny", *(["--to", "out"] if command == "pull" else []))


def test_a_manifest_does_not_choose_what_code_runs(fails: Run, store: LocalStore, folder: Path) -> None:
    spec = json.loads(store.get("tiny/sweep.json"))["spec"]
    spec |= {"workload": "subprocess:call", "workload_args": {"args": ["touch", "../code-has-run"]}}
    alter(store, "tiny/sweep.json", spec=spec, source=source_digest("subprocess:call", folder))
    for words in (["resume"], ["resume", "--trust"], ["verify", "--rerun", "1"], ["amount"], ["rank"]):
        said = fails(words[0], f"{store.uri}/tiny", *words[1:])
        assert ("installed and no workload" if "--trust" in words else "subprocess:call is not in") in said


def test_changed_code_is_not_run_by_a_resume(fails: Run, store: LocalStore, folder: Path, canary: Path) -> None:
    with (folder / "faults_workload.py").open("a") as file:
        file.write(f"\nopen({str(canary)!r}, 'w').close()\n")
    assert "as it was when" in fails("resume", f"{store.uri}/tiny")


@pytest.mark.parametrize("name", ["spec", "../x", "a/../../etc/passwd", "/etc/passwd", "~/x"])
def test_a_manifest_does_not_choose_what_files_go_up(fails: Run, store: LocalStore, folder: Path, name: str) -> None:
    spec = json.loads(store.get("tiny/sweep.json"))["spec"]
    alter(store, "tiny/sweep.json", spec=spec | {"final_model": name})
    fails("resume", f"{store.uri}/tiny", "--address", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b"\x80\x04",
        b'{"id": "x", "address": "http://enemy.example:8265", "when": "9", "beside": "/"}',
        b'{"id": "x", "address": "file:///etc/passwd", "when": "9", "beside": "/", "renamed": {}}',
        b'{"id": "x", "address": "http://a", "when": "9", "beside": "/", "renamed": 7}',
    ],
)
@pytest.mark.parametrize("command", ["logs", "cancel"])
def test_a_job_record_does_not_choose_who_gets_the_token(
    fails: Run, store: LocalStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, record: bytes
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    store.put("tiny/jobs/x.json", record)
    line = fails(command, f"{store.uri}/tiny")
    assert "0000" not in line


def test_hostile_sets_failures_and_foreign_objects_do_not_stop_a_status(store: LocalStore) -> None:
    """What cannot be read is passed over; what parts and blocks hold is told from themselves."""
    for entry in list(store.list("tiny/sets/")):
        store.put(entry.key, b"[" * 50_000)
    digest = open_sweep(f"{store.uri}/tiny").read_manifest().digest
    store.put(keys.failed("tiny", f"{digest[:16]}-x"), b"[" * 50_000)
    for entry in [*store.list("tiny/estimates/"), *store.list("tiny/parts/")]:
        store.put(f"{entry.key.rpartition('/')[0]}/foreign", b"")
    status = sweep_status(open_sweep(f"{store.uri}/tiny"))
    assert status["done"] == status["cells"]
    assert status["estimates_missing"] == []
    assert status["failed"] == ["its record cannot be read"]


@pytest.mark.parametrize(
    "uri", ["store/../../etc", "store/.x", "s3://user:hunter2@bucket/x", "gopher://x/y", "store/a\nb"]
)
def test_a_sweep_that_reaches_elsewhere_is_refused(fails: Run, uri: str) -> None:
    assert "hunter2" not in fails("status", uri)
