"""Estimators that train runs of their own: a task for each seed and block, resumed like shards."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from fimo import estimators
from fimo.estimators.declared import DECLARED
from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run import estimating, failures, plan, prepared, proving, tasks
from fimo.orchestrator.run.blocks import runs_of, value_digest
from fimo.orchestrator.run.failures import task_id
from fimo.orchestrator.run.gather import gather
from fimo.orchestrator.run.owed import missing_estimates, owed_tasks
from fimo.orchestrator.run.places import in_process
from fimo.orchestrator.run.verification import verify
from fimo.orchestrator.run.work import EstimateTask, task_name
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.estimates import encode_block
from fimo.orchestrator.sweep.parts import BadPartError
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import DivergedError
from tests.support.small_sweep import OWN, make_spec, run_here, table_bytes

SPEC = {
    "seeds": 2,
    "estimators": ["grad_dot", {"name": "mirrored", "seeds": 2}],
    "resources": {"shard": 5, "replay": False, "proof": True},
}


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Three evaluation examples in a block: the seven make three blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DECLARED["mirrored"], "evals_together", 3)
        yield


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "spec"
    shutil.copytree(OWN, folder)
    return folder


@pytest.fixture(scope="module")
def once(small_blocks, beside):
    return run_here(make_spec(**SPEC), beside)


@pytest.fixture
def swept(once):
    report, store, heard = once
    own = MemoryStore()
    for entry in store.list(""):
        own.put(entry.key, store.get(entry.key))
    return report, own, heard, Sweep(own, "flowers")


def of_mirrored(given) -> list[EstimateTask]:
    return [t for t in given if isinstance(t, EstimateTask) and t.estimator == "mirrored"]


def blocks_of(sweep: Sweep) -> list[str]:
    return [e.key for e in sweep.store.list("flowers/estimates/") if "/mirrored-" in e.key]


def test_one_task_and_one_object_for_each_seed_and_block(swept):
    report, _, heard, sweep = swept
    assert report.exit_code == 0
    done = of_mirrored(heard.tasks)
    assert sorted((t.seed, t.first, t.count) for t in done) == [
        (s, f, c) for s in (2, 3) for f, c in ((0, 3), (3, 3), (6, 1))
    ]
    folders = [key.split("/")[-2] for key in blocks_of(sweep)]
    assert folders == ["seed-0000000002"] * 3 + ["seed-0000000003"] * 3
    manifest = sweep.read_manifest()
    assert len({task_id(manifest, t) for t in done}) == len({task_name(t) for t in done}) == 6
    assert any("seed 3, evaluation examples 3 to 5" in task_name(t) for t in done)


def test_blocks_of_a_dear_model_are_smaller(beside, monkeypatch):
    monkeypatch.setattr(plan, "SHARD_WORK", 1)
    monkeypatch.setattr(plan, "SMALLEST", 3)
    manifest, sweep = resolve(make_spec(**SPEC), beside).manifest, Sweep(MemoryStore(), "flowers")
    missing = missing_estimates(manifest, sweep, failures.Failures((), {}))
    assert [t.count for t in missing if t.estimator == "grad_dot"] == [7]
    assert [t.count for t in of_mirrored(missing)] == [2, 2, 2, 1] * 2


def test_the_values_are_the_estimator_s_own_mean_over_its_seeds(swept, beside):
    _, _, _, sweep = swept
    resolved, manifest = resolve(make_spec(**SPEC), beside), sweep.read_manifest()
    train, evals = resolved.examples(torch.device("cpu"))
    problem = estimators.Problem(
        resolved.model(torch.device("cpu")),
        train,
        evals,
        [r.indices for r in manifest.removals],
        resolved.spec.further_training.settings(),
        seeds=[2, 3],
        replicas=3,
    )
    expected = estimators.parse({"name": "mirrored", "seeds": 2})[0].estimate(problem)
    rows = (
        gather(sweep, manifest)
        .tables["estimates"]
        .filter(np.array(gather(sweep, manifest).tables["estimates"]["estimator"]) == "mirrored")
    )
    assert rows["step"].unique().to_pylist() == list(expected.steps) == list(manifest.steps)
    got = rows["value"].to_numpy().reshape(expected.values.shape)
    np.testing.assert_allclose(got, expected.values.numpy(), rtol=1e-3, atol=1e-6 * np.abs(got).max())
    assert np.abs(got).max() > 0


@pytest.mark.usefixtures("proven")
def test_a_block_says_what_it_was_made_with_and_costs_add_up(swept):
    report, _, _, sweep = swept
    manifest = sweep.read_manifest()
    name, params = manifest.estimators[1]
    digest = value_digest(manifest, name, params)
    blocks = [sweep.read_block(key, digest, name, params) for key in blocks_of(sweep)]
    assert [b.seed for b in blocks] == [2, 2, 2, 3, 3, 3]
    for block in blocks:
        assert block.provenance["engine"]["proof"].startswith("flowers/proofs/")
        assert block.provenance["notes"]["seeds"] == [block.seed]
        assert block.provenance["notes"]["replicas"] <= 3
    costs = [r for r in report.gathered.tables["costs"].to_pylist() if r["name"] == "mirrored"]
    assert len(costs) == 1
    assert costs[0]["device_seconds"] == pytest.approx(sum(b.provenance["device_seconds"] for b in blocks))


def test_what_is_missing_is_computed_and_no_more_and_order_changes_no_byte(swept, beside):
    _, store, _, sweep = swept
    before, lost = table_bytes(store), blocks_of(sweep)[4]
    held = store.get(lost)
    store.delete(lost)
    gathered = gather(sweep, sweep.read_manifest())
    assert "mirrored" not in gathered.tables["estimates"]["estimator"].to_pylist(), "a mean over some seeds is none"
    assert not gathered.estimated
    assert verify(sweep).owed == 1
    report, _, heard = run_here(make_spec(**SPEC), beside, store)
    assert [(t.seed, t.first) for t in heard.tasks] == [(3, 3)]
    assert report.exit_code == 0
    assert table_bytes(store) == before
    assert store.get(lost) != b""
    assert held[:4] == b"PAR1"


def test_tasks_in_any_order_give_the_same_tables(swept, beside):
    _, store, _, _ = swept
    resolved, other = resolve(make_spec(**SPEC), beside), MemoryStore()
    sweep, manifest = Sweep(other, "flowers"), resolved.manifest
    sweep.write_manifest(manifest)
    sweep.write_set(manifest.digest, manifest.removals)
    owed, _ = owed_tasks(manifest, sweep, failures.read(sweep, manifest))
    with in_process(sweep, manifest, None):
        for task in reversed(owed):
            tasks.run_task(sweep, manifest, None, task)
    _, _, heard = run_here(make_spec(**SPEC), beside, other)
    assert heard.tasks == []
    assert table_bytes(other) == table_bytes(store)


def test_a_sweep_that_grows_into_its_seeds_has_it_computed_anew(swept, beside):
    _, store, _, sweep = swept
    before = set(blocks_of(sweep))
    report, _, heard = run_here(make_spec(**{**SPEC, "seeds": 3}), beside, store)
    assert report.exit_code == 0
    assert {t.seed for t in of_mirrored(heard.tasks)} == {3, 4}
    manifest = sweep.read_manifest()
    assert runs_of(manifest, *manifest.estimators[1]) == (3, 4)
    assert len(set(blocks_of(sweep)) - before) == 6


def test_more_removals_compute_only_the_new_ones(swept, beside):
    _, store, _, _ = swept
    more = {**SPEC, "removals": {"indices": [0, 3, 5, 11, 22, 7]}}
    report, _, heard = run_here(make_spec(**more), beside, store)
    assert report.exit_code == 0
    assert {tuple(r.indices for r in t.removals) for t in of_mirrored(heard.tasks)} == {((7,),)}
    assert len(of_mirrored(heard.tasks)) == 6


def test_a_block_under_another_seed_s_key_is_refused_and_computed_again(swept, beside):
    _, store, _, sweep = swept
    manifest, listed = sweep.read_manifest(), blocks_of(sweep)
    name, params = manifest.estimators[1]
    digest = value_digest(manifest, name, params)
    good = store.get(listed[0])
    store.put(listed[3], good)
    with pytest.raises(BadPartError, match="another key"):
        sweep.read_block(listed[3], digest, name, params)
    block = sweep.read_block(listed[0], digest, name, params)
    store.put(listed[4], encode_block(replace(block, seed=None))[0])
    with pytest.raises(BadPartError, match="another key"):
        sweep.read_block(listed[4], digest, name, params)
    report, _, heard = run_here(make_spec(**SPEC), beside, store)
    assert report.exit_code == 0
    assert sorted((t.seed, t.first) for t in of_mirrored(heard.tasks)) == [(3, 0), (3, 3)]


@pytest.mark.usefixtures("proven")
def test_it_trains_with_the_engine_that_was_proven(beside, monkeypatch):
    used, real, made = [], estimating.asked, []
    prove = proving.prove

    def estimate(resolved, device, estimator, params, removals, evals, say, run, *rest):
        used.append((estimator, run))
        return real(resolved, device, estimator, params, removals, evals, say, run, *rest)

    def refuse_stacks(case, start):
        made.append(1)
        verdict = prove(case, start)
        return replace(verdict, engine=replace(verdict.engine, replay=False, stack=False), path="one replica at a time")

    monkeypatch.setattr(estimating, "asked", estimate)
    monkeypatch.setattr(proving, "prove", refuse_stacks)
    monkeypatch.setattr(prepared, "_engines", {})
    spec = make_spec(**{**SPEC, "seeds": 1, "estimators": ["grad_dot", {"name": "mirrored", "seeds": 1}]})
    report, _, _ = run_here(spec, beside)
    assert report.exit_code == 0
    assert made == [1]
    runs = [run for name, run in used if name == "mirrored"]
    assert {run.replicas for run in runs} == {1}
    assert {run.start.engine.stack for run in runs} == {False}
    assert [run for name, run in used if name == "grad_dot"] == [None]


def test_a_seed_that_diverges_is_told_and_is_no_estimate(beside, monkeypatch):
    real = estimating.asked

    def estimate(resolved, device, estimator, params, removals, evals, say, run, *rest):
        if estimator == "mirrored" and run.seed == 3:
            raise DivergedError("mirrored further training is not finite")
        return real(resolved, device, estimator, params, removals, evals, say, run, *rest)

    monkeypatch.setattr(estimating, "asked", estimate)
    report, store, _ = run_here(make_spec(**SPEC), beside)
    assert report.exit_code == 1
    assert len(report.failures.aside) == 3
    assert all("seed 3" in f.line for f in report.failures.aside)
    assert "mirrored" not in report.gathered.tables["estimates"]["estimator"].to_pylist()
    sweep = Sweep(store, "flowers")
    assert len(missing_estimates(sweep.read_manifest(), sweep, report.failures)) == 3
    record = json.loads(store.get(next(e.key for e in store.list(keys.failed("flowers")))))
    assert record["estimator"] == "mirrored"
