"""Tasks that were given up: what counts against a sweep, what does not, and what a user is told to do."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from rich.console import Console

from fimo.estimators import REGISTRY
from fimo.estimators.declared import DECLARED
from fimo.orchestrator.report.ending import complaints, listed_tables, report_json
from fimo.orchestrator.report.progress import ProgressReport
from fimo.orchestrator.report.status import status_lines
from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run import budget, driver, estimating, places
from fimo.orchestrator.run.gather import current_tables
from fimo.orchestrator.run.status import sweep_status
from fimo.orchestrator.run.verification import verify
from fimo.orchestrator.spec.spec import parse
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import DivergedError, UsageError
from tests.support.small_sweep import OWN, SPEC, make_spec, run_here

WHY = "the recursion grows instead of converging"
NO_CPU_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes")


@pytest.fixture(scope="module")
def parts():
    """The parts of the small sweep, by key: what is told of estimators is no other for being trained once."""
    _, store, _ = run_here(make_spec(estimators=[]), OWN)
    return {entry.key: store.get(entry.key) for entry in store.list("flowers/parts/")}


@pytest.fixture
def trained(parts):
    """A store in which the small sweep's cells are trained and nothing else is."""
    store = MemoryStore()
    for key, data in parts.items():
        store.put(key, data)
    return store


@pytest.fixture
def diverging(monkeypatch):
    """grad_cos cannot give values for any model; returns how often it was asked."""
    tries: list[str] = []
    real = estimating.asked

    def estimate(resolved, device, estimator, *rest):
        if estimator == "grad_cos":
            tries.append(estimator)
            raise DivergedError(f"grad_cos: {WHY}")
        return real(resolved, device, estimator, *rest)

    monkeypatch.setattr(estimating, "asked", estimate)
    return tries


def default_set(monkeypatch):
    """A spec that names no estimator, where the default set is two of them."""
    from fimo import estimators

    monkeypatch.setattr(
        estimators, "choose", lambda problem: (estimators.parse("grad_dot") + estimators.parse("grad_cos"), [])
    )
    values = copy.deepcopy(SPEC)
    del values["estimators"]
    return parse(values)


def test_an_estimator_of_the_default_set_that_cannot_is_left_out_and_the_sweep_is_complete(
    beside, trained, diverging, monkeypatch
):
    spec = default_set(monkeypatch)
    report, store, _ = run_here(spec, beside, trained)
    assert (report.exit_code, report.complete) == (0, True)
    assert list(complaints(report)) == [f"grad_cos is left out of the default estimators: {WHY}"]
    assert report_json(report)["left_out"] == {"grad_cos": WHY}
    assert set(report.gathered.tables["estimates"]["estimator"].to_pylist()) == {"grad_dot"}
    assert diverging == ["grad_cos"]

    sweep = Sweep(store, "flowers")
    status = sweep_status(sweep)
    assert (status["exit_code"], status["complete"], status["resumable"]) == (0, True, False)
    assert (status["failed"], status["estimates_missing"]) == ([], [])
    assert any("left out" in line for line in status_lines(status))
    assert status_lines(status)[-1] == "complete"
    _, complete = current_tables(sweep, sweep.read_manifest())
    assert complete
    assert verify(sweep).exit_code == 0

    again, _, heard = run_here(spec, beside, store)
    assert (again.exit_code, heard.tasks) == (0, [])
    assert report_json(again)["left_out"] == {"grad_cos": WHY}


def test_retry_failed_tries_what_was_left_out_again(beside, trained, diverging, monkeypatch):
    spec = default_set(monkeypatch)
    _, store, _ = run_here(spec, beside, trained)
    report, _, heard = run_here(spec, beside, store, retry_failed=True)
    assert [task.estimator for task in heard.tasks] == ["grad_cos"]
    assert report.exit_code == 0


def test_a_named_estimator_that_cannot_is_an_error_and_nothing_promises_that_resume_computes_it(
    beside, trained, diverging
):
    report, store, _ = run_here(make_spec(), beside, trained)
    assert (report.exit_code, report.complete) == (1, False)
    said = "\n".join(complaints(report))
    assert WHY in said
    assert "resume" not in said
    assert "--retry-failed" not in said
    assert "take it out" in said
    status = sweep_status(Sweep(store, "flowers"))
    assert (status["exit_code"], status["resumable"]) == (1, False)
    assert "resume" not in status_lines(status)[-1]
    # Taken out of the spec, it no longer counts.
    report, _, _ = run_here(make_spec(estimators=["grad_dot"]), beside, store)
    assert report.exit_code == 0
    assert sweep_status(Sweep(store, "flowers"))["exit_code"] == 0


def test_an_estimator_left_out_of_the_default_set_counts_once_the_spec_names_it(
    beside, trained, diverging, monkeypatch
):
    _, store, _ = run_here(default_set(monkeypatch), beside, trained)
    report, _, heard = run_here(make_spec(), beside, store)
    assert heard.tasks == []
    assert report.exit_code == 1


def broken(*_args):
    raise ValueError("out of luck")


def test_a_failure_of_a_named_estimator_that_may_be_mended_says_retry_failed(beside, trained, monkeypatch):
    spec = make_spec()
    with monkeypatch.context() as patch:
        patch.setattr(estimating, "asked", broken)
        report, store, _ = run_here(spec, beside, trained)
    assert report.exit_code == 1
    assert not report.failures.left_out
    assert any("--retry-failed" in line for line in complaints(report))
    report, _, _ = run_here(spec, beside, store, retry_failed=True)
    assert report.exit_code == 0


def test_the_default_set_never_fails_a_run_whatever_happens_to_it(beside, trained, monkeypatch):
    spec = default_set(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(estimating, "asked", broken)
        report, store, _ = run_here(spec, beside, trained)
    assert (report.exit_code, report.complete) == (0, True)
    assert {name for name, _ in report.failures.left_out} == {"grad_dot", "grad_cos"}
    assert all("out of luck" in line for line in report.failures.left_out.values())
    report, _, _ = run_here(spec, beside, store, retry_failed=True)
    assert (report.exit_code, report.failures.left_out) == (0, {})


def test_what_is_too_dear_is_left_out_until_it_is_named_or_its_budget_is_another(beside, trained, monkeypatch):
    default_set(monkeypatch)
    values = copy.deepcopy(SPEC)
    del values["estimators"]
    tight = parse({**values, "resources": {**values["resources"], "estimator_budget_s": 1e-9}})
    report, store, _ = run_here(tight, beside, trained)
    assert (report.exit_code, report.complete) == (0, True)
    said = list(complaints(report))
    assert len(said) == 2
    assert all("too dear" in line and "budget is 1e-09" in line for line in said)
    again, _, heard = run_here(tight, beside, store)
    assert (again.exit_code, heard.tasks) == (0, [])
    named, _, heard = run_here(make_spec(estimators=["grad_dot"]), beside, store)
    assert (named.exit_code, [task.estimator for task in heard.tasks]) == (0, ["grad_dot"])
    loose, _, heard = run_here(parse(values), beside, store)
    assert (loose.exit_code, loose.failures.left_out) == (0, {})
    assert [task.estimator for task in heard.tasks] == ["grad_cos"]


def test_an_estimator_at_its_budget_s_edge_is_not_dropped_with_half_of_its_values_there(beside, trained, monkeypatch):
    """Each of its tasks was timed anew, and one timing over the budget threw away what the others had computed."""
    spec = default_set(monkeypatch)
    monkeypatch.setattr(DECLARED["grad_dot"], "evals_together", 3)
    timed: list[str] = []

    def at_the_edge(named, *_):
        timed.append(named.name)
        return None if timed.count(named.name) == 1 else "too dear: about 65 device-seconds, the budget is 60"

    monkeypatch.setattr(estimating, "too_dear", at_the_edge)
    report, store, _ = run_here(spec, beside, trained)
    assert (report.exit_code, report.failures.left_out) == (0, {})
    assert timed == ["grad_dot", "grad_cos"]
    assert len(list(store.list("flowers/estimates/"))) == 3 + 1


def test_what_does_not_fit_into_memory_is_left_out(beside, trained, monkeypatch):
    spec = default_set(monkeypatch)
    monkeypatch.setattr(budget, "_free_bytes", lambda device: 1.0)
    report, _, _ = run_here(spec, beside, trained)
    assert report.exit_code == 0
    assert all("too large" in line for line in complaints(report))


def test_what_a_resume_would_compute_is_what_it_promises(beside):
    turns = iter([None] * 5 + ["stopped"] * 99)
    report, store, _ = run_here(make_spec(), beside, should_stop=lambda: next(turns))
    assert report.exit_code == 3
    *_, last = complaints(report)
    assert f"{report.owed_cells} cells" in last
    assert f"`fimo resume {report.sweep}` computes them" in last
    assert report.owed_cells == 20 - report.gathered.done
    assert sweep_status(Sweep(store, "flowers"))["resumable"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), MemoryError(), NO_CPU_MEMORY]
)
def test_what_ran_out_of_memory_is_not_simply_to_be_tried_again(beside, trained, monkeypatch, error):
    def full(*_args):
        raise error

    monkeypatch.setattr(estimating, "asked", full)
    report, _, _ = run_here(make_spec(), beside, trained)
    assert report.exit_code == 1
    *_, advice = complaints(report)
    assert "ran out of memory" in advice
    assert "only then `fimo resume" in advice
    assert "tries again" not in "\n".join(complaints(report))


@pytest.mark.parametrize("prefix", ["estimator grad_cos: ", "grad_cos: ", "lissa: ", ""])
def test_an_estimator_is_named_once_where_its_failure_is_told(beside, trained, monkeypatch, prefix):
    real = estimating.asked

    def estimate(resolved, device, estimator, *rest):
        if estimator == "grad_cos":
            raise UsageError(f"{prefix}{WHY}: really")
        return real(resolved, device, estimator, *rest)

    monkeypatch.setattr(estimating, "asked", estimate)
    report, _, heard = run_here(make_spec(), beside, trained)
    assert [failure.line for failure in report.failures.aside] == [f"estimator grad_cos {{}}: {WHY}: really"]
    text = io.StringIO()
    with ProgressReport(Console(file=text, width=200)) as progress:
        for task, result in zip(heard.tasks, heard.results, strict=True):
            progress.listener.result(task, result)
    assert f"estimator grad_cos: {WHY}: really\n" in text.getvalue()


@pytest.mark.parametrize("name", ["trak", "cg", "ekfac", "lissa_h", "unrolled"])
def test_no_estimator_of_ours_names_itself_twice(beside, trained, monkeypatch, name):
    """Whatever it refuses by itself, told of a model that it does not suit."""
    monkeypatch.setattr(REGISTRY[name], "unsuited", lambda self, problem: "this model is none for it")
    report, _, _ = run_here(make_spec(estimators=[name]), beside, trained)
    assert report.failures.aside
    for failure in report.failures.aside:
        assert failure.line.count(f"estimator {name}") == 1, failure.line


def test_estimates_alone_promise_no_cell_and_no_resume_that_would_train_them(beside):
    text = io.StringIO()
    with ProgressReport(Console(file=text, width=200), cells=False) as progress:
        store = MemoryStore()
        report = driver.run(
            resolve(make_spec(), beside), store, progress.listener, where=places.in_process, shards=False
        )
    assert report.exit_code == 0
    assert "2 tasks of estimates alone; no cell is trained" in text.getvalue()
    assert "shards to train" not in text.getvalue()
    [line] = complaints(report)
    assert line.startswith("estimates alone: 20 cells are not trained")
    assert f"`fimo run SPEC --store {store.uri}`" in line
    status = sweep_status(Sweep(store, "flowers"))
    assert status["estimated_only"]
    last = status_lines(status)[-1]
    assert last.startswith("estimated only")
    assert "resume" not in last
    # Once a cell is trained, a resume is what computes the rest.
    turns = iter([None] * 3 + ["stopped"] * 99)
    run_here(make_spec(), beside, store, should_stop=lambda: next(turns))
    status = sweep_status(Sweep(store, "flowers"))
    assert (0 < status["done"] < 20, status["estimated_only"]) == (True, False)
    assert "fimo resume" in status_lines(status)[-1]


def test_estimates_alone_that_fail_are_not_sent_to_a_resume(beside, monkeypatch):
    monkeypatch.setattr(estimating, "asked", broken)
    report, _, _ = run_here(make_spec(), beside, shards=False)
    said = "\n".join(complaints(report))
    assert "--retry-failed" in said
    assert "fimo resume" not in said


def test_a_run_lists_no_empty_table(beside, trained):
    report, _, _ = run_here(make_spec(estimators=[]), beside, trained)
    listed = listed_tables(report)
    names = {uri.rpartition("/")[2].removesuffix(".parquet") for uri in listed}
    assert names == {name for name, table in report.gathered.tables.items() if table.num_rows}
    assert {"attribution", "removals"} <= names
    assert not {"estimates", "scores", "similarity"} & names


@pytest.mark.parametrize("record", [b"{", b"[]", b"null", b'{"task": 1}', b"[" * 100_000])
def test_a_foreign_record_is_told_and_breaks_nothing(beside, trained, record):
    report, store, _ = run_here(make_spec(), beside, trained)
    manifest = Sweep(store, "flowers").read_manifest()
    store.put(f"flowers/failed/{manifest.digest[:16]}-x.json", record)
    store.put("flowers/failed/other-sweep.json", record)
    report, _, _ = run_here(make_spec(), beside, store)
    assert [failure.line for failure in report.failures.aside] == ["its record cannot be read"]
    report, _, _ = run_here(make_spec(), beside, store, retry_failed=True)
    assert report.exit_code == 0
