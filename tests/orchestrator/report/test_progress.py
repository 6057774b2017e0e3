"""What a person is shown while a run goes on."""

from __future__ import annotations

import io

from rich.console import Console

from fimo.estimators.declared import Declaration
from fimo.orchestrator.report.progress import ProgressReport
from fimo.orchestrator.run.plan import EstimateTask
from tests.support.small_sweep import make_spec, run_here


def lines_of_estimators(beside) -> list[str]:
    text = io.StringIO()
    with ProgressReport(Console(file=text, width=200)) as progress:
        _, _, heard = run_here(make_spec(), beside)
        for task, result in zip(heard.tasks, heard.results, strict=True):
            progress.listener.result(task, result)
    return [line.rpartition(":")[0] for line in text.getvalue().splitlines() if line.startswith("estimator")]


def test_blocks_of_one_estimator_are_told_apart(beside, monkeypatch):
    monkeypatch.setattr(Declaration, "evals_together", 3)
    lines = lines_of_estimators(beside)
    assert len(lines) == len(set(lines)) == 6
    assert "estimator grad_dot, evaluation examples 0 to 2" in lines
    assert "estimator grad_dot, evaluation examples 6 to 6" in lines


def test_an_only_block_goes_without_saying(beside):
    assert sorted(lines_of_estimators(beside)) == ["estimator grad_cos", "estimator grad_dot"]


def test_a_block_is_named_in_errors_too():
    from fimo.orchestrator.run.plan import task_name

    assert task_name(EstimateTask("cg", "{}", (), 128, 40, whole=False)).endswith("evaluation examples 128 to 167")
