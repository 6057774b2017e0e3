"""What ``fimo init`` writes runs as it is, overwrites nothing, and goes by the name that it was given."""

from __future__ import annotations

import ast
import math
import sys
import types
from pathlib import Path

import pytest

from fimo.orchestrator.spec.spec import read
from fimo.orchestrator.starters import KINDS
from fimo.workers.workload import load_workload
from tests.support.shell import Shell, shell
from tests.support.small_sweep import run_here

__all__ = ["shell"]

STARTERS = Path(__file__).parent.parent / "orchestrator" / "starters"


def test_every_starter_is_a_kind_and_every_kind_a_starter() -> None:
    assert {path.stem for path in STARTERS.glob("*.yaml")} == set(KINDS.values())
    assert {path.stem for path in STARTERS.glob("*.py")} == {*KINDS.values(), "__init__"}


# The tutorial's own test runs the tabular starter.
SLOW = ("tabular", "language-model")


@pytest.mark.long
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS])
def test_it_runs_as_it_is_and_says_something(kind: str, tmp_path: Path, shell: Shell) -> None:
    name = f"my_{KINDS[kind]}"
    written = shell("init", kind, "--to", tmp_path, "--name", name)
    assert written.code == 0, written.err
    spec = tmp_path / f"{name}.yaml"
    assert written.out.splitlines() == [str(spec), str(tmp_path / f"{name}.py"), str(tmp_path / "fimo.schema.json")]
    assert f"next: fimo plan {spec}" in written.err
    assert f"next: fimo run {spec} --store runs" in written.err

    planned = shell("plan", spec)
    assert planned.code == 0, planned.err
    assert planned.out.startswith(f"{name}: ")

    text = spec.read_text()
    if kind in ("text", "image"):  # the others, and the tutorial, have their stacks measured: half of the time
        assert "\nresources" not in text
        text += "\nresources: {replicas: 8}\n"
    report, _, _ = run_here(read(text), tmp_path)
    assert (report.exit_code, report.gathered.nonsense) == (0, False)
    effects = [row["effect"] for row in report.gathered.tables["attribution"].to_pylist()]
    assert all(math.isfinite(effect) for effect in effects)
    assert max(map(abs, effects)) > 1e-5
    first = [
        row["score"]
        for row in report.gathered.tables["scores"].to_pylist()
        if (row["estimator"], row["metric"], row["adjust"]) == ("grad_dot", "cosine", "baseline")
    ]
    # A gradient estimate after a few steps: what is measured is the removal's effect.
    assert max(first) > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_name_is_a_module_s_and_no_template_names_another(
    kind: str, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shell("init", kind).code == 0
    text = (tmp_path / f"{KINDS[kind]}.yaml").read_text()
    spec = read(text)
    assert (spec.name, spec.workload) == (KINDS[kind], f"{KINDS[kind]}:workload")
    assert text.startswith("# yaml-language-server: $schema=fimo.schema.json\n")
    load_workload(spec.workload, {}, tmp_path)
    # Under another name nothing is left of the first.
    assert shell("init", kind, "--name", "other_one", "--to", "there").code == 0
    for ending in ("yaml", "py"):
        there = (tmp_path / "there" / f"other_one.{ending}").read_text()
        for old in (f"{KINDS[kind]}.py", f"{KINDS[kind]}.yaml", f"{KINDS[kind]}:", f"name: {KINDS[kind]}"):
            assert old not in there
    ast.parse(there)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tabular"], "'months.py' exists and is not overwritten: give another --name, or --to"),
        (["tabluar"], "did you mean 'tabular'?"),
        (["lm"], "no kind 'lm'"),
        (["tabular", "--name", "torch"], "installed module"),
        (["tabular", "--name", "a-b"], "is no module's"),
        (["tabular", "--name", "../x"], "is no module's"),
        (["tabular", "--name", "fresh", "--to", "months.py"], "cannot write"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: list[str], said: str, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "months.py").write_text("months of work")
    if "--name" not in arguments:
        arguments = [*arguments, "--name", "months"]
    done = shell("init", *arguments)
    assert done.code in (1, 2)
    assert (done.out, len(done.err.splitlines())) == ("", 1)
    assert said in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["months.py"]
    assert (tmp_path / "months.py").read_text() == "months of work"


def test_the_kronfluence_starter_is_a_task_of_the_library_if_that_is_there(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Task:
        """Stands in for kronfluence.task.Task."""

    package, module = types.ModuleType("kronfluence"), types.ModuleType("kronfluence.task")
    module.Task = Task  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kronfluence", package)
    monkeypatch.setitem(sys.modules, "kronfluence.task", module)
    assert shell("init", "kronfluence", "--to", tmp_path, "--name", "with_the_library").code == 0
    load_workload("with_the_library:workload", {}, tmp_path)
    assert issubclass(sys.modules["with_the_library"].Classification, Task)
