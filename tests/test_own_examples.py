"""A user's own workload is less than thirty lines of code, and its sweep runs: a language model, images, text."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest

from fimo.orchestrator.spec.spec import read
from tests.support.small_sweep import run_here

OWN = Path(__file__).parent.parent / "examples" / "own"
NAMES = sorted(path.stem for path in OWN.glob("*.yaml"))


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank ones, comments or docstrings."""
    source = path.read_text(encoding="utf-8")
    told = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(source.splitlines(), start=1)
    return sum(1 for number, line in lines if line.strip() and not line.strip().startswith("#") and number not in told)


def test_there_is_one_of_each() -> None:
    assert NAMES == ["causal_lm", "conv_net", "text_classifier"]


@pytest.mark.parametrize("name", NAMES)
def test_an_own_workload_is_less_than_thirty_lines(name: str) -> None:
    assert code_lines(OWN / f"{name}.py") < 30


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_its_sweep_runs_and_says_something(name: str) -> None:
    if name == "causal_lm":
        pytest.importorskip("transformers")
    text = (OWN / f"{name}.yaml").read_text()
    if name != "conv_net":  # the quickest has its stacks measured, which takes half of the others' time
        assert "\nresources" not in text
        text += "\nresources: {replicas: 8}\n"
    report, _, _ = run_here(read(text), OWN)
    assert report.exit_code == 0
    effects = [row["effect"] for row in report.gathered.tables["attribution"].to_pylist()]
    assert len(effects) % 8 == 0
    assert all(math.isfinite(effect) for effect in effects)
    assert max(map(abs, effects)) > 1e-5
    scores = [
        row["score"]
        for row in report.gathered.tables["scores"].to_pylist()
        if (row["estimator"], row["metric"], row["adjust"]) == ("grad_dot", "cosine", "baseline")
    ]
    # A gradient estimate after a few steps of further training: what is measured is the removal's effect.
    assert max(scores) > 0.3
