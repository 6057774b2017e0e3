"""FIMO_STORE: the default of every STORE, the place of a bare NAME, and never taken without saying so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import yaml

from fimo.orchestrator.commands import places
from fimo.orchestrator.store import open_store
from tests.support.small_sweep import SPEC, make_spec, run_here


@pytest.fixture
def stored(beside, tmp_path, monkeypatch):
    """A store with the small sweep, another one without; the working directory holds the spec."""
    run_here(make_spec(), beside, open_store(str(tmp_path / "mine")))
    (tmp_path / "empty").mkdir()
    (beside / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    monkeypatch.chdir(beside)
    return tmp_path


def test_a_bare_name_lies_in_the_store_of_the_variable(stored, shell, monkeypatch):
    assert shell("status", "flowers").code == 2
    monkeypatch.setenv("FIMO_STORE", f"{stored}/mine/")
    told = shell("status", "flowers", "--json")
    assert (told.code, json.loads(told.out)["sweep"]) == (0, f"{stored}/mine/flowers")
    compared = shell("compare", "flowers", "flowers", "--json")
    assert compared.code == 0


def test_a_path_is_never_taken_for_a_name(stored, shell, monkeypatch):
    monkeypatch.setenv("FIMO_STORE", str(stored / "mine"))
    assert shell("status", "./flowers").code == 2
    assert shell("status", f"{stored}/empty/flowers").code == 2
    monkeypatch.setenv("FIMO_STORE", str(stored / "empty"))
    assert shell("status", f"{stored}/mine/flowers").code == 0
    # A sweep of the current folder goes before the variable's.
    monkeypatch.chdir(stored / "mine")
    assert shell("status", "flowers").code == 0


def test_who_is_told_of_a_store_is_told_that_the_variable_named_it(stored, shell, monkeypatch):
    monkeypatch.setenv("FIMO_STORE", str(stored / "empty"))
    said = shell("status", "flowers")
    assert (said.code, len(said.err.splitlines())) == (2, 1)
    assert f"({stored}/empty is FIMO_STORE's)" in said.err
    # What was given on the command line is not the variable's.
    assert "FIMO_STORE" not in shell("status", f"{stored}/empty/flowers").err
    assert "FIMO_STORE" not in shell("list", stored / "empty").err
    assert "FIMO_STORE" in shell("list").err


def test_a_store_is_told_once_and_not_beside_what_is_wrong_with_a_workload(stored, shell, monkeypatch):
    monkeypatch.setenv("FIMO_STORE", str(stored / "mine"))
    with open("broken.yaml", "w") as file:
        yaml.safe_dump({**SPEC, "workload": "flowers:fails"}, file)
    said = shell("plan", "broken.yaml")
    assert said.code == 1
    assert "FIMO_STORE" not in said.err
    with open("other.yaml", "w") as file:
        yaml.safe_dump({**SPEC, "further_training": {**SPEC["further_training"], "batch_size": 4}}, file)
    said = shell("run", "other.yaml")
    assert said.code == 2
    assert "is another sweep of this name" in said.err
    assert said.err.count("FIMO_STORE") == 1


def test_a_plan_subtracts_what_the_variable_s_store_holds_and_says_so(stored, shell, monkeypatch):
    plain = shell("plan", "spec.yaml")
    assert "there already" not in plain.out
    assert plain.err == ""
    monkeypatch.setenv("FIMO_STORE", str(stored / "mine"))
    less = shell("plan", "spec.yaml")
    assert "20 there already" in less.out
    assert f"{stored}/mine is FIMO_STORE's" in less.err
    given = shell("plan", "spec.yaml", "--store", stored / "empty")
    assert "there already" not in given.out
    assert "FIMO_STORE" not in given.err


def test_every_store_of_a_command_has_the_variable_as_its_default():
    from typer.main import get_command

    from fimo.orchestrator.commands.main import app

    found = {
        name: parameter.envvar
        for name, command in get_command(app).commands.items()
        for parameter in command.params
        if parameter.name == "store"
    }
    assert {"plan", "run", "submit", "estimate", "doctor", "list"} <= set(found)
    assert {name for name, variable in found.items() if variable != places.VARIABLE} == set()


def subprocess_of(words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``fimo`` in a process of its own, which says on stderr what it should not have imported."""
    program = (
        "import sys; sys.argv[0] = 'fimo'; from fimo.orchestrator.commands.main import main\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "sys.stderr.write(' '.join({'torch', 'ray', 'pyarrow'} & set(sys.modules)))"
    )
    command, all_of_it = [sys.executable, "-c", program, *words.split()], {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=all_of_it)


def test_the_version_is_the_package_s_and_neither_it_nor_the_help_needs_torch():
    for option, said in (("--version", f"fimo {version('fimo')}\n"), ("--help", "Usage: ")):
        done = subprocess_of(option)
        assert (done.returncode, done.stderr) == (0, "")
        assert said in done.stdout


@pytest.mark.parametrize(("words", "wanted"), [("fimo li", {"list"}), ("fimo re", {"resume", "remove", "report"})])
def test_a_shell_completes_commands(words, wanted):
    done = subprocess_of("", _FIMO_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) == wanted
