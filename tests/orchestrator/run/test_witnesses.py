"""The noise floor of a sweep is measured: by witnesses that are planned, trained once, and may be left out."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run import tasks as running
from fimo.orchestrator.run import witnessing
from fimo.orchestrator.run.reading import Gathered, seed_blocks
from fimo.orchestrator.run.status import sweep_status
from fimo.orchestrator.run.verification import verify
from fimo.orchestrator.run.witness_plan import count_witnesses, witness_tasks
from fimo.orchestrator.run.witnesses import read_witnesses
from fimo.orchestrator.run.work import WitnessTask
from fimo.orchestrator.run.written import listed_parts
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.parts import BadPartError
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables.reduce import reduce
from fimo.workers import joined
from fimo.workers.errors import UsageError
from tests.support.small_sweep import make_spec, run_here, table_bytes


def witnessed(**changes):
    resources = {"witnesses": "auto", "proof": False, **changes.pop("resources", {})}
    return make_spec(estimators=[], resources=resources, **changes)


def reduction_of(store, manifest):
    sweep = Sweep(store, manifest.spec.name)
    listed = listed_parts(sweep, manifest)
    blocks = list(seed_blocks(sweep, manifest, listed, Gathered({}), [], lambda line: None))
    pairs = read_witnesses(sweep, manifest, listed).pairs
    stream, reduction = reduce(iter(blocks), len(manifest.removals), len(manifest.steps), manifest.evals, pairs)
    list(stream)
    return np.stack([block.effects for block in blocks]), reduction


def rms(values, axis):
    return np.sqrt(np.square(values).mean(axis=axis))


def witness_keys(store, name="flowers"):
    return [entry.key for entry in store.list(f"{name}/witnesses/")]


# -- truth ----------------------------------------------------------------------------------------------------------


def concrete(precision: str, witnesses: object):
    return make_spec(
        name="concrete",
        workload="concrete",
        removals={"every": 180, "count": 5},
        seeds=2,
        estimators=[],
        further_training={
            "optimizer": {"name": "sgd", "lr": 0.03},
            "batch_size": 128,
            "epochs": None,
            "steps": 240,
            "removal_mode": "reweight",
            "precision": precision,
            "evaluate": {"at_steps": [1, 8, 30, 120, 240]},
        },
        resources={"replicas": 6, "shard": 5, "witnesses": witnesses, "proof": False, "replay": True},
    )


def test_the_floor_is_what_float32_really_is_off_by_on_concrete(beside):
    """All cells against the same in float64, step by step, by both adjustments. Second baselines say far less."""
    (_, single, _), (_, double, _) = (run_here(concrete(p, w), beside) for p, w in (("float32", 8), ("float64", 0)))
    effects, reduction = reduction_of(single, resolve(concrete("float32", 8), beside).manifest)
    exact, _ = reduction_of(double, resolve(concrete("float64", 0), beside).manifest)
    _, without = reduction_of(single, resolve(concrete("float32", 0), beside).manifest)
    off, floors = effects - exact, reduction.floors
    centred = (off - off.mean(axis=1, keepdims=True)) * np.sqrt(5 / 4)
    assert (floors.measured, floors.witnesses) == (True, 8)
    for floor, truth in (
        (floors.one["baseline"], off),
        (floors.one["mean"], centred),
        (floors.of_mean(2), off.mean(axis=0)[None]),
    ):
        ratio = rms(floor, 1) / rms(truth, (0, 1, 3))
        # Eight of the ten cells have witnesses; of the other two what is seldom is expected, and has not happened.
        assert (ratio > 1 / 3).all(), ratio
        assert (ratio < 6).all(), ratio
    # Without witnesses the floor is off by more than a factor of ten at the last step.
    assert rms(without.floor, 1)[-1] < 0.1 * rms(off, (0, 1, 3))[-1]


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "mode", [pytest.param("drop", marks=pytest.mark.slow), pytest.param("mask", marks=pytest.mark.slow), "reweight"]
)
def test_the_witness_s_effect_is_the_float64_sweep_s_in_every_mode(beside, mode):
    spec = witnessed(further_training={"removal_mode": mode}, resources={"witnesses": 8})
    wide = witnessed(further_training={"removal_mode": mode, "precision": "float64"}, resources={"witnesses": 0})
    (report, store, _), (_, double, _) = run_here(spec, beside), run_here(wide, beside)
    exact, _ = reduction_of(double, resolve(wide, beside).manifest)
    manifest, sweep = resolve(spec, beside).manifest, Sweep(store, "flowers")
    places = {r.indices: r.number for r in manifest.removals}
    pairs = read_witnesses(sweep, manifest, listed_parts(sweep, manifest)).pairs
    assert report.exit_code == 0
    assert [len(pair.removals) for pair in pairs] == [4, 4]
    for seed, pair in enumerate(pairs):
        own = exact[seed][[places[indices] for indices in pair.removals]]
        np.testing.assert_allclose(pair.witness, own, atol=1e-12)
        assert 0 < np.abs(pair.differences).max() < 1e-5


def test_a_float64_sweep_s_floor_is_tiny_and_not_0(beside):
    spec = witnessed(further_training={"precision": "float64"})
    report, store, _ = run_here(spec, beside)
    effects, reduction = reduction_of(store, resolve(spec, beside).manifest)
    assert report.exit_code == 0
    assert reduction.floors.measured
    assert 0 < reduction.floor.max() < 1e-12 < 1e-6 * np.abs(effects).max()


def test_the_table_s_noise_floor_is_the_measured_one(beside):
    report, store, _ = run_here(witnessed(), beside)
    _, reduction = reduction_of(store, resolve(witnessed(), beside).manifest)
    rows = report.gathered.tables["reliability"].to_pylist()
    shown = [r["noise_floor"] for r in rows if (r["seeds"], r["adjust"]) == (1, "baseline")]
    np.testing.assert_allclose(shown, np.sqrt(np.square(reduction.floor).mean(axis=1)), rtol=1e-12)
    assert not report.gathered.warnings


# -- how many, and of what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "removals", "seeds", "precision", "witnesses"),
    [
        ("auto", 5, 4, "float32", 1),  # a small sweep has one seed's, whatever their share
        ("auto", 2, 4, "float32", 1),
        ("auto", 20, 32, "float32", 2),  # 704 cells, a twentieth is 35: 2 · (3 · 2 + 1.5 · 7) = 33
        ("auto", 20, 32, "float64", 2),  # 2 · 1.5 · (2 + 7) = 27
        ("auto", 20, 1000, "float32", 16),
        ("auto", 1, 1, "float32", 1),
        (0, 20, 100, "float32", 0),
        (7, 5, 4, "float32", 7),
        (99, 5, 4, "float32", 16),
        (99, 2, 3, "float32", 6),
    ],
)
def test_how_many_witnesses_there_are(beside, asked, removals, seeds, precision, witnesses):
    spec = witnessed(
        seeds=seeds, further_training={"precision": precision}, resources={"witnesses": asked, "shard": 20}
    )
    named = tuple(NamedRemoval(i, str(i), (i,)) for i in range(removals))
    manifest = replace(resolve(spec, beside).manifest, removals=named)
    tasks = witness_tasks(manifest)
    assert all(min(2, removals) <= len(task.moved) <= 6 for task in tasks)
    assert count_witnesses(manifest) == sum(len(task.removals) for task in tasks) == witnesses
    assert [task.seed for task in tasks] == list(range(len(tasks)))
    assert all(0 < len(task.removals) <= min(4, removals) for task in tasks)
    assert all(len(task.removals) == (1 if asked == "auto" else min(4, removals)) for task in tasks[:-1])


def test_witnesses_are_spread_over_the_removals_and_the_same_in_every_seed(beside):
    groups = {f"g{i}": [i, i + 1] for i in range(10)} | {"again": [0, 1]}
    spec = witnessed(removals={"groups": groups}, seeds={"first": 5, "count": 3}, resources={"witnesses": 10})
    tasks = witness_tasks(resolve(spec, beside).manifest)
    assert [task.seed for task in tasks] == [5, 6, 7]
    assert [r.name for r in tasks[0].removals] == ["g1", "g3", "g6", "g8"]
    assert [r.name for r in tasks[0].moved] == ["g0", "g2", "g4", "g5", "g7", "g9"]
    assert tasks[1].removals == tasks[0].removals
    assert [r.name for r in tasks[2].removals] == ["g3", "g8"]


def test_a_number_below_0_is_refused():
    with pytest.raises(UsageError, match=r"resources\.witnesses"):
        make_spec(resources={"witnesses": -1})


# -- resuming --------------------------------------------------------------------------------------------------------


def test_a_witness_is_trained_once_and_again_only_if_it_is_gone(beside):
    spec = witnessed(resources={"witnesses": 8})
    _, store, first = run_here(spec, beside)
    before = {key: store.get(key) for key in witness_keys(store)}
    tables = table_bytes(store)
    assert len(before) == 2
    assert [t.seed for t in first.tasks if isinstance(t, WitnessTask)] == [0, 1]
    assert isinstance(first.tasks[-1], WitnessTask)
    _, _, again = run_here(spec, beside, store)
    assert again.tasks == []
    gone = sorted(before)[1]
    store.delete(gone)
    status = sweep_status(Sweep(store, "flowers"))
    assert (status["witnesses_missing"], status["complete"], status["resumable"], status["exit_code"]) == (
        4,
        False,
        True,
        3,
    )
    report, _, heard = run_here(spec, beside, store)
    assert report.exit_code == 0
    assert [type(t) for t in heard.tasks] == [WitnessTask]
    assert table_bytes(store) == tables
    assert sweep_status(Sweep(store, "flowers"))["complete"]


@pytest.mark.usefixtures("traced")
def test_two_runs_from_nothing_measure_the_same_floor(beside):
    (_, one, _), (_, other, _) = run_here(witnessed(), beside), run_here(witnessed(), beside)
    assert table_bytes(one) == table_bytes(other)


def test_more_seeds_and_other_removals_leave_the_witnesses_as_they_are(beside):
    _, store, _ = run_here(witnessed(seeds=2), beside)
    [key] = witness_keys(store)
    before = store.get(key)
    _, _, heard = run_here(witnessed(seeds=3, removals={"indices": [0, 3, 5, 7, 9, 11, 22]}), beside, store)
    assert not any(isinstance(task, WitnessTask) for task in heard.tasks)
    assert store.get(key) == before
    _, _, heard = run_here(witnessed(seeds=3, resources={"witnesses": 9}), beside, store)
    assert [t.seed for t in heard.tasks if isinstance(t, WitnessTask)] == [1, 2]
    assert store.get(key) == before


def test_asking_for_none_trains_none_and_says_nothing_measured(beside):
    spec = witnessed(resources={"witnesses": 0})
    report, store, heard = run_here(spec, beside)
    assert not any(isinstance(task, WitnessTask) for task in heard.tasks)
    assert witness_keys(store) == []
    assert report.exit_code == 0
    assert not reduction_of(store, resolve(spec, beside).manifest)[1].floors.measured


def test_the_witnesses_cost_is_told(beside):
    report, _, _ = run_here(witnessed(resources={"witnesses": 5}), beside)
    costs = [c for c in report.gathered.tables["costs"].to_pylist() if c["what"] == "witness"]
    assert [c["name"] for c in costs] == ["seed 0", "seed 1"]
    assert all(c["device_seconds"] > 0 and c["peak_bytes"] > 0 and c["device"] for c in costs)


@pytest.mark.parametrize("torn", ["torn", pytest.param("a part's", marks=pytest.mark.slow), "another seed's"])
def test_a_witness_that_does_not_verify_is_set_aside_and_trained_again(beside, torn):
    spec = witnessed(resources={"witnesses": 8})
    _, store, _ = run_here(spec, beside)
    tables, (first, second) = table_bytes(store), witness_keys(store)
    part = next(e.key for e in store.list("flowers/parts/") if "seed-0000000000" in e.key)
    store.put(
        first, {"torn": store.get(first)[:-50], "a part's": store.get(part), "another seed's": store.get(second)}[torn]
    )
    manifest = resolve(spec, beside).manifest
    with pytest.raises(BadPartError):
        Sweep(store, "flowers").read_witness(0, manifest)
    assert verify(Sweep(store, "flowers")).exit_code == 1
    report, _, heard = run_here(spec, beside, store)
    assert [type(t) for t in heard.tasks] == [WitnessTask]
    assert report.exit_code == 0
    assert verify(Sweep(store, "flowers")).exit_code == 0
    assert table_bytes(store) == tables
    assert len(list(store.list("flowers/rejected/"))) == 1


def test_a_witness_cannot_pass_for_a_part(beside):
    _, store, _ = run_here(witnessed(), beside)
    manifest, sweep = resolve(witnessed(), beside).manifest, Sweep(store, "flowers")
    witness = sweep.read_witness(0, manifest)
    key = keys.part("flowers", manifest.digest, 0, witness.removals)
    store.put(key, store.get(witness_keys(store)[0]))
    with pytest.raises(BadPartError, match="another key"):
        sweep.read_part(key, manifest)


# -- left out --------------------------------------------------------------------------------------------------------

FLOAT32_ALONE = '''

def float32_alone():
    """A forward with a constant of its own in float32."""
    w = flowers()
    scale = torch.eye(3)
    return Workload(w.model, w.train, w.evals, lambda model, batch: model(batch["features"]) @ scale.float(), _loss)
'''


def test_a_workload_that_fails_in_float64_is_complete_without_witnesses(beside):
    module = beside / "flowers.py"
    module.write_text(module.read_text() + FLOAT32_ALONE)
    spec = witnessed(workload="flowers:float32_alone")
    report, store, _ = run_here(spec, beside)
    assert report.exit_code == 0
    assert report.complete
    [line] = report.gathered.warnings
    assert line.startswith("no witnesses of seed 0, so that the noise floor may be a lower bound: ")
    assert "float" in line
    manifest = resolve(spec, beside).manifest
    assert not reduction_of(store, manifest)[1].floors.measured
    assert (reduction_of(store, manifest)[1].floor > 0).any()
    status = sweep_status(Sweep(store, "flowers"))
    assert (status["complete"], status["exit_code"], list(status["witnesses_left_out"])) == (True, 0, ["0"])
    _, _, again = run_here(spec, beside, store)
    assert again.tasks == []
    _, _, retried = run_here(spec, beside, store, retry_failed=True)
    assert [type(t) for t in retried.tasks] == [WitnessTask]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("what is this")])
def test_whatever_a_witness_fails_of_never_fails_the_sweep(beside, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(running, "witnessed", fail)
    report, _, _ = run_here(witnessed(), beside)
    assert report.exit_code == 0
    assert str(error) in report.gathered.warnings[0]


def timed(monkeypatch, wide: float, own: float) -> None:
    """Seconds of a cell's step: of the witnesses' stack, and of the sweep's."""
    monkeypatch.setattr(
        witnessing,
        "seconds_a_cell_step",
        lambda start, removals, replicas: wide if start.settings.precision == "float64" else own,
    )


def trained(store) -> list[int]:
    sweep = Sweep(store, "flowers")
    manifest = sweep.read_manifest()
    found = [sweep.read_witness(seed, manifest) for seed in sweep.list_witnesses(manifest.digest)]
    return [len(part.removals) - part.provenance["moved"] for part in found]


@pytest.mark.parametrize(
    ("wide", "own", "left"),
    [
        (0.1, 1e-9, 4),  # 10 steps · 5 cells · 0.1 = 5 s: cheap whatever the sweep costs
        (1.0, 1e9, 4),  # a small share of the sweep
        (1.0, 0.69, 3),  # 40 s for 3 removals; a twentieth of 10 steps · 120 cells at 0.69 is 41.4
        (1.0, 0.35, 1),  # 20 s for one; the share is 21
        (2.9, 1e-9, 1),  # 58 s for one: over the share, and not dear
        (3.1, 1e-9, None),  # 62 s
        (3.1, 1.1, 1),  # 62 s, and within the share
    ],
)
def test_what_costs_more_in_float64_than_was_reckoned_is_cut(beside, monkeypatch, wide, own, left):
    timed(monkeypatch, wide, own)
    monkeypatch.setattr(witnessing, "witness_tasks", lambda manifest: [None])
    monkeypatch.setattr(witnessing, "trained_cells", lambda manifest, removals: 120)
    from fimo.orchestrator.run import owed, witness_plan, witnesses, written

    every = lambda manifest: (WitnessTask(0, tuple(witness_plan.spread_evenly(manifest.removals, 4))),)  # noqa: E731
    for module in (owed, witnesses, written):
        monkeypatch.setattr(module, "witness_tasks", every)
    spec = witnessed(seeds=1, resources={"shard": 5})
    report, store, _ = run_here(spec, beside)
    assert report.exit_code == 0
    assert trained(store) == ([] if left is None else [left])
    _, _, again = run_here(spec, beside, store)
    assert again.tasks == []
    if left is None:
        assert "more than 5% of what the sweep takes" in report.gathered.warnings[0]
        # Asked for by number, it is trained all the same.
        _, _, asked = run_here(witnessed(seeds=1, resources={"shard": 5, "witnesses": 2}), beside, store)
        assert [type(t) for t in asked.tasks] == [WitnessTask]
        assert trained(store) == [4]


def test_a_foreign_record_of_a_witness_breaks_nothing(beside):
    _, store, _ = run_here(witnessed(), beside)
    digest = resolve(witnessed(), beside).manifest.digest
    store.put(f"flowers/failed/{digest[:16]}-witness-0000000000.json", json.dumps({"witness": "x"}).encode())
    report, _, _ = run_here(witnessed(), beside, store)
    assert report.gathered.complete


def test_estimates_alone_train_no_witness(beside):
    _, store, heard = run_here(witnessed(), beside, shards=False)
    assert heard.tasks == []
    assert witness_keys(store) == []


def test_a_sweep_whose_shards_all_fail_is_still_broken(beside, monkeypatch):
    def fail(*_):
        raise RuntimeError("no shard")

    monkeypatch.setattr(joined, "run_shard", fail)
    report, _, _ = run_here(witnessed(), beside)
    assert report.outcome.broken
    assert report.exit_code == 1
