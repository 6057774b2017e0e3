"""The tutorial's commands exist, with their options; up to the first score table they are run, and print what it shows.

`fimo run` has its tasks done in this process instead of on a Ray, under the same contract.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from fimo.orchestrator.commands import run as running
from fimo.orchestrator.commands.app import out
from fimo.orchestrator.commands.main import app
from fimo.orchestrator.run import pool
from fimo.orchestrator.run.places import in_process
from fimo.orchestrator.spec.spec import read_file
from fimo.orchestrator.spec.yaml import read_yaml
from tests.support.shell import Ended, Shell, shell

__all__ = ["shell"]

PAGE = (Path(__file__).parent.parent / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n((?:(?!```).*\n)*)```\n+((?:(?:    .*)?\n)*)", PAGE, re.MULTILINE)
"""(shell lines, what is shown of their output) in order."""
SCORE = re.compile(r"│ ([a-z_]+(?: \([a-z_=.0-9]+\))?) +│ +(\d\.\d{3}).*?│ +(\d\.\d{3}).*?│ +(\d\.\d{3})")


@pytest.fixture(autouse=True)
def no_other_mine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`fimo init` refuses a module's name that is taken: other tests have a `mine` too, and this one leaves none."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "mine.py").exists()])
    sys.modules.pop("mine", None)
    yield
    sys.modules.pop("mine", None)


def test_every_command_and_option_that_is_shown_exists() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = [line for block, _ in BLOCKS for line in block.splitlines() if line.startswith("fimo ")]
    assert len(lines) > 12
    for line in lines:
        _, name, *words = shlex.split(line)
        assert name in commands, line
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_the_spec_that_is_shown_is_the_starter_s(tmp_path: Path, shell: Shell) -> None:
    shell("init", "tabular", "--name", "mine", "--to", tmp_path)
    [first, seeds] = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    spec = read_yaml((tmp_path / "mine.yaml").read_text(), "mine.yaml")
    assert {name: spec[name] for name in read_yaml(first, "the page")} == read_yaml(first, "the page")
    assert read_yaml(seeds, "the page") == {"seeds": 8}


def shown_scores(text: str) -> dict[str, list[float]]:
    """The scores of each estimator in the first table of a text."""
    return {name: list(map(float, scores)) for name, *scores in SCORE.findall(text)}


@pytest.mark.long
def test_up_to_the_first_score_table_it_runs_and_prints_what_is_shown(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(out, "width", 100)
    # The tests' own handlers stay.
    monkeypatch.setattr(running, "stop_on_signal", lambda: lambda: None)
    monkeypatch.setattr(pool, "on_ray", lambda address, say=None: contextlib.nullcontext(in_process))
    done: list[Ended] = []
    for block, output in BLOCKS:
        for line in block.splitlines():
            words = shlex.split(line)
            if words[0] == "export":
                monkeypatch.setenv(*words[1].split("=", 1))
                continue
            # `--measure` times what `tests/orchestrator/run/test_measure.py` has timed.
            done.append(shell(*(word for word in words[1:] if word != "--measure")))
            assert done[-1].code == 0, done[-1].err
        if "┃ estimator" in output:
            break
    init, plan, run = done
    shown = [output for _, output in BLOCKS[: len(done)]]
    assert init.out.split() == shown[0].split()
    for line in plan.out.splitlines()[:-1]:
        if not line.startswith("digest"):
            assert line in shown[1]
    assert read_file(tmp_path / "mine.yaml").name == "mine"
    scores = shown_scores(run.out)
    assert scores.keys() == shown_scores(shown[2]).keys()
    assert len(scores) == 5, "four estimators and the ceiling"
    for name, expected in shown_scores(shown[2]).items():
        # Another processor rounds otherwise, and five seeds of a small network feel it: not as much as this.
        assert scores[name] == pytest.approx(expected, abs=0.02), name
    assert "runs/mine/tables/attribution.parquet" in run.out
    assert run.out.splitlines()[0].startswith("the mean over 5 seeds has a reliability of 1.00 at step 7")
