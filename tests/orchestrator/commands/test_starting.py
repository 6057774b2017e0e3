"""What commands import: a sweep is looked at from a shell many times, and torch takes longer than the look."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fimo.orchestrator.store import LocalStore
from fimo.orchestrator.sweep import keys
from tests.support.shell import Shell
from tests.support.small_sweep import make_spec, run_here

LOOKS = """
import sys
absent = {"torch", "ray", "scipy"}
class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ImportError(f"{name} is imported")
sys.meta_path.insert(0, Refusing())
# Before `fimo plan` imports torch it has started the process that loads the workload a second time.
from fimo.orchestrator.resolve import again
from fimo.orchestrator.commands.main import main
for words in (["status", SWEEP], ["list", STORE], ["status", SWEEP, "--json"], ["pull", SWEEP, "--to", TO]):
    if words[0] == "pull":
        # Tables that are not of what the store holds are reduced anew.
        absent.remove("scipy")
    sys.argv = ["fimo", *words]
    try:
        main()
    except SystemExit as ended:
        print("ended with", words[0], ended.code, flush=True)
"""


def test_looking_at_a_sweep_imports_neither_torch_nor_ray_and_says_the_same(
    shell: Shell, beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(str(tmp_path / "store"), tmp_path / "store")
    entries = ["grad_dot", {"name": "mirrored", "seeds": 2}]
    spec = make_spec(seeds=2, estimators=entries, resources={"witnesses": 1, "replay": False})
    _, _, heard = run_here(spec, beside, store)
    assert len(heard.tasks) == 2 * 3 + 1 + 2 + 1
    # Of each kind one is missing: what is owed is told by what estimators declare.
    for kind in ("/parts/", "/witnesses/", "/mirrored-"):
        store.delete(max(entry.key for entry in store.list("flowers/") if kind in entry.key))
    store.put(keys.failed("flowers", "0" * 16 + "-other"), b"{}")
    sweep = f"{store.uri}/flowers"
    words = f"SWEEP, STORE, TO = {sweep!r}, {store.uri!r}, {str(tmp_path / 'to')!r}\n"
    done = subprocess.run([sys.executable, "-c", words + LOOKS], capture_output=True, text=True, check=False)
    ends = [line for line in done.stdout.splitlines() if line.startswith("ended with")]
    assert ends == ["ended with status 3", "ended with list 0", "ended with status 3", "ended with pull 3"], done.stderr
    listed: list[str] = []
    every = LocalStore.list
    monkeypatch.setattr(LocalStore, "list", lambda self, prefix: listed.append(prefix) or every(self, prefix))
    here = json.loads(shell("status", sweep, "--json").out)
    there = json.loads(done.stdout.partition("ended with list 0\n")[2].partition("\nended with status")[0])
    assert there["missing"] == 1
    assert (there["estimates_missing"], there["witnesses_missing"]) == (["mirrored"], here["witnesses_missing"])
    # Of a large sweep a listing takes seconds, and longer on S3.
    assert sum("/parts/" in prefix for prefix in listed) == 1
    for values in (here, there):
        values.pop("last_commit_age_s")
    assert there == here


COMPUTES_NOTHING = """
import sys
class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ImportError(f"{name} is imported")
sys.meta_path.insert(0, Refusing())
from fimo.orchestrator.commands.main import main
for words in (["run", SPEC, "--store", STORE], ["resume", SWEEP], ["amount", SWEEP, "--no-train"]):
    sys.argv = ["fimo", *words]
    try:
        main()
    except SystemExit as ended:
        print("ended with", words[0], ended.code, flush=True)
# A second of torch's own, when the first gradient is taken: of a complete sweep there is none to take.
assert "torch._dynamo" not in sys.modules
"""


def test_ray_is_not_imported_where_nothing_is_computed(beside: Path, tmp_path: Path) -> None:
    """An embedded Ray takes seconds to start; a complete sweep is run again to see its table."""
    store = LocalStore(str(tmp_path / "store"), tmp_path / "store")
    spec = make_spec(seeds=2, estimators=["grad_dot"], resources={"replay": False})
    assert run_here(spec, beside, store)[0].exit_code == 0
    (beside / "spec.yaml").write_text(yaml.safe_dump(spec.canonical()))
    words = f"SPEC, SWEEP, STORE = {str(beside / 'spec.yaml')!r}, {store.uri + '/flowers'!r}, {store.uri!r}\n"
    program = [sys.executable, "-c", words + COMPUTES_NOTHING]
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=beside)
    ends = [line for line in done.stdout.splitlines() if line.startswith("ended with")]
    assert ends == [f"ended with {word} 0" for word in ("run", "resume", "amount")], done.stderr
    assert done.returncode == 0, done.stderr
