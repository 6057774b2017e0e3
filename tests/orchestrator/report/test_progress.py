"""What a person is shown while a run goes on."""

from __future__ import annotations

import io

from rich.console import Console

from fimo.estimators.declared import Declaration
from fimo.orchestrator.report.progress import ProgressReport
from fimo.orchestrator.run.course import Course
from fimo.orchestrator.run.work import EstimateTask, Shard
from fimo.orchestrator.spec.removals import NamedRemoval
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
    from fimo.orchestrator.run.work import task_name

    assert task_name(EstimateTask("cg", "{}", (), 128, 40, whole=False)).endswith("evaluation examples 128 to 167")


def test_a_terminal_is_shown_what_runs_as_it_is_when_it_is_drawn():
    """It is put in words when it is drawn: at every turn that would take longer than the run's own work."""
    shards = [Shard(seed, (NamedRemoval(0, "0", (0,)),)) for seed in (3, 4)]
    text, course = io.StringIO(), Course.of(2, 0, shards)
    with ProgressReport(Console(file=text, force_terminal=True, width=100)) as progress:
        course.run([(shards[0], 5.0)])
        progress.listener.turn(course)
        course.run([(shards[0], 5.0), (shards[1], 65.0)])
    assert "running: seed 4, 1 removals (65 s), seed 3, 1 removals (5 s)" in text.getvalue()
    assert "not finished: 2 shards" in text.getvalue()
