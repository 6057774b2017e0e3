"""The whole of a sweep in this process: its numbers against plain loops, and what a second run computes."""

from __future__ import annotations

import copy
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import RandomSampler

from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run import driver as runs
from fimo.orchestrator.run import prepared
from fimo.orchestrator.run.results import Failed, Receipt
from fimo.orchestrator.run.work import EstimateTask, Shard
from fimo.orchestrator.store import MemoryStore, NotFound, open_store
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables.schemas import SCHEMAS
from fimo.workers import joined
from fimo.workers.errors import DivergedError, StoreError
from fimo.workers.workload import load_workload
from tests.support.small_sweep import OWN, make_spec, run_here, table_bytes


@pytest.fixture(scope="module")
def whole():
    """The store of an undisturbed traced run, which tests compare with and do not write to."""
    return run_here(make_spec(resources={"replay": True}), OWN)[1]


def table(store, name, sweep="flowers"):
    return pq.read_table(io.BytesIO(store.get(f"{sweep}/tables/{name}.parquet")))


def shards_in(heard) -> int:
    return sum(isinstance(t, Shard) for t in heard.tasks)


def plain_deltas(beside, removal, seed) -> dict[int, np.ndarray]:
    """One run, written out: drop, SGD at 0.1, batches of 5, 2 epochs of 23 examples, g at every third step."""
    workload = load_workload("flowers:flowers", {}, beside)
    model, data = copy.deepcopy(workload.model), workload.train
    g0 = workload.loss(workload.outputs(model, workload.evals).double(), workload.evals)
    sampler = RandomSampler(range(23), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step, found = 0, {}
    for _ in range(2):
        order = [i for i in sampler if i != removal]
        for start in range(0, len(order), 5):
            batch = {k: v[order[start : start + 5]] for k, v in data.items()}
            optimizer.zero_grad()
            workload.loss(workload.outputs(model, batch), batch).mean().backward()
            optimizer.step()
            step += 1
            if step % 3 == 0 or step == 10:
                with torch.no_grad():
                    g = workload.loss(workload.outputs(model, workload.evals).double(), workload.evals)
                found[step] = (g - g0).detach().numpy()
    return found


@pytest.mark.usefixtures("traced")
def test_attribution_equals_plain_runs_averaged_over_seeds(beside):
    report, store, _ = run_here(make_spec(), beside)
    assert report.exit_code == 0
    base = {s: plain_deltas(beside, None, s) for s in range(4)}
    for removal, index in enumerate([0, 3, 5, 11, 22]):
        cells = {s: plain_deltas(beside, index, s) for s in range(4)}
        for step in (3, 6, 9, 10):
            effects = np.array([cells[s][step] - base[s][step] for s in range(4)])
            rows = table(store, "attribution").to_pandas().query(f"removal == {removal} and step == {step}")
            np.testing.assert_allclose(rows["effect"].to_numpy(), effects.mean(axis=0), atol=1e-6)
            np.testing.assert_allclose(rows["sem"].to_numpy(), effects.std(axis=0, ddof=1) / 2, atol=1e-6)
    only = table(store, "training_only").to_pandas().query("step == 10")
    np.testing.assert_allclose(only["delta"], np.mean([base[s][10] for s in range(4)], axis=0), atol=1e-6)


def test_a_finished_sweep_computes_nothing_and_gives_the_same_bytes(beside):
    _, store, first = run_here(make_spec(), beside)
    before = table_bytes(store)
    _, _, again = run_here(make_spec(), beside, store)
    assert shards_in(first) == 12
    assert again.tasks == []
    assert table_bytes(store) == before
    assert set(before) == {f"flowers/tables/{name}.parquet" for name in set(SCHEMAS) - {"costs"}}


@pytest.mark.usefixtures("traced")
def test_two_runs_from_nothing_give_the_same_bytes(beside, whole):
    _, other, _ = run_here(make_spec(), beside)
    assert table_bytes(other) == table_bytes(whole)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("keep", [0, 1, 5, 11])
def test_a_resumed_sweep_has_the_bytes_of_an_undisturbed_one_and_recomputes_only_what_is_missing(beside, whole, keep):
    keys = [e.key for e in whole.list("flowers/parts/")]
    torn = MemoryStore()
    for key in (e.key for e in whole.list("flowers/")):
        if key not in keys or keys.index(key) * 7 % 12 < keep:
            torn.create(key, whole.get(key))
    _, _, heard = run_here(make_spec(), beside, torn)
    assert shards_in(heard) == 12 - keep
    assert table_bytes(torn) == table_bytes(whole)


@pytest.mark.usefixtures("traced")
def test_raising_seeds_and_adding_removals_and_estimators_computes_only_the_new(beside):
    _, store, _ = run_here(make_spec(seeds=2, removals={"indices": [0, 3]}, estimators=["grad_dot"]), beside)
    _, _, heard = run_here(make_spec(seeds=2, removals={"indices": [0, 3]}), beside, store)
    assert [t.estimator for t in heard.tasks] == ["grad_cos"]
    _, _, heard = run_here(make_spec(seeds=3, removals={"indices": [0, 3]}), beside, store)
    assert [(t.seed, len(t.removals)) for t in heard.tasks] == [(2, 2)]
    report, _, heard = run_here(make_spec(seeds=3, removals={"indices": [7, 0, 3, 9]}), beside, store)
    shards = [t for t in heard.tasks if isinstance(t, Shard)]
    assert [(t.seed, [r.indices for r in t.removals]) for t in shards] == [(s, [(7,), (9,)]) for s in range(3)]
    assert sorted(t.estimator for t in heard.tasks if isinstance(t, EstimateTask)) == ["grad_cos", "grad_dot"]
    assert report.exit_code == 0
    _, fresh, _ = run_here(make_spec(seeds=3, removals={"indices": [7, 0, 3, 9]}, resources={"shard": 9}), beside)
    np.testing.assert_allclose(
        table(store, "attribution")["effect"].to_numpy(), table(fresh, "attribution")["effect"].to_numpy(), atol=1e-6
    )
    np.testing.assert_allclose(
        table(store, "estimates")["value"].to_numpy(), table(fresh, "estimates")["value"].to_numpy(), atol=1e-6
    )


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("replicas", [pytest.param(1, marks=pytest.mark.slow), 2, 32])
def test_replicas_change_nothing_beyond_the_noise_floor(beside, whole, replicas):
    _, other, _ = run_here(make_spec(resources={"replicas": replicas, "shard": 5}), beside)
    floor = max(table(s, "reliability")["noise_floor"].to_numpy().max() for s in (whole, other))
    difference = table(whole, "attribution")["effect"].to_numpy() - table(other, "attribution")["effect"].to_numpy()
    assert 0 < floor < 1e-6
    assert np.abs(difference).max() <= 10 * floor


def test_a_torn_or_foreign_part_is_set_aside_and_computed_again(beside):
    _, store, _ = run_here(make_spec(), beside)
    before = table_bytes(store)
    keys = [e.key for e in store.list("flowers/parts/")]
    store.put(keys[1], store.get(keys[1])[:-100])
    store.put(keys[4], store.get(keys[5]))
    report, _, heard = run_here(make_spec(), beside, store)
    assert shards_in(heard) == 2
    assert report.exit_code == 0
    assert table_bytes(store) == before
    assert len(list(store.list("flowers/rejected/"))) == 2


class Late(MemoryStore):
    """A store in which another writer's object shows up only when this run commits its own."""

    def __init__(self, store, key):
        super().__init__()
        self.late, self.seen = key, False
        for entry in store.list("flowers/"):
            super().create(entry.key, store.get(entry.key))

    def list(self, prefix):
        return (e for e in super().list(prefix) if self.seen or e.key != self.late)

    def get(self, key):
        if key == self.late and not self.seen:
            raise NotFound(f"no '{key}'")
        return super().get(key)

    def create(self, key, data):
        self.seen = self.seen or key == self.late
        return super().create(key, data)


def test_the_same_rows_under_a_key_are_no_error_and_other_rows_are_and_the_committed_part_stands(beside):
    _, store, _ = run_here(make_spec(seeds=1), beside)
    key = next(e.key for e in store.list("flowers/parts/"))
    kept = store.get(key)

    late = Late(store, key)
    report, _, heard = run_here(make_spec(seeds=1), beside, late)
    [receipt] = [r for r in heard.results if isinstance(r, Receipt) and r.cells]
    assert not receipt.written
    assert report.exit_code == 0

    late = Late(store, key)
    report, _, heard = run_here(make_spec(seeds=1, resources={"replicas": 1}), beside, late)
    [failed] = [r for r in heard.results if isinstance(r, Failed)]
    assert "holds other rows" in str(failed.error)
    assert report.exit_code == 1
    assert late.get(key) == kept


def test_a_dataset_with_a_collate_and_a_measure_of_its_own(beside):
    spec = make_spec(
        workload="flowers:sentences", removals={"groups": {"some": [0, 4], "none": [], "one": [9]}}, seeds=2
    )
    report, store, _ = run_here(spec, beside)
    assert report.exit_code == 0
    effects = table(store, "attribution").to_pandas()
    assert (effects.query("removal == 1")["effect"] == 0).all()
    assert (effects.query("removal != 1")["effect"] != 0).any()


def test_diverged_runs_are_left_out_and_reported_with_exit_1(beside):
    spec = make_spec(further_training={"optimizer": {"name": "sgd", "lr": 1e38, "momentum": 0.9}})
    report, store, _ = run_here(spec, beside)
    assert report.gathered.diverged
    assert "not finite" in report.gathered.warnings[0]
    assert report.exit_code == 1
    assert np.isfinite(table(store, "attribution")["effect"].to_numpy()).all()


def test_an_estimator_that_fails_is_set_aside_and_the_sweep_goes_on(beside, monkeypatch):
    import fimo.orchestrator.run.tasks as tasks

    def broken(*_args):
        raise ValueError("out of luck\nwith a traceback")

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "_estimate", broken)
        report, store, _ = run_here(make_spec(), beside)
    assert (report.exit_code, report.gathered.done, report.gathered.cells) == (1, 20, 20)
    kept = [json.loads(store.get(e.key)) for e in store.list("flowers/failed/")]
    assert len(kept) == 2
    assert all("ValueError: out of luck" in k["error"] and "broken" in k["traceback"] for k in kept)
    report, _, heard = run_here(make_spec(), beside, store)
    assert heard.tasks == []
    assert report.exit_code == 1
    report, _, heard = run_here(make_spec(), beside, store, retry_failed=True)
    assert len(heard.tasks) == 2
    assert report.exit_code == 0


def test_a_bug_that_fails_every_shard_stops_the_sweep_and_sets_nothing_aside(beside, monkeypatch):

    def broken(*_args):
        raise ValueError("always")

    with monkeypatch.context() as patch:
        patch.setattr(joined, "run_shard", broken)
        report, store, heard = run_here(make_spec(), beside)
    assert report.outcome.broken
    assert report.exit_code == 1
    assert shards_in(heard) < 12
    assert not list(store.list("flowers/failed/"))
    report, _, _ = run_here(make_spec(), beside, store)
    assert report.exit_code == 0


def test_an_interrupted_run_is_incomplete_and_says_what_is_there(beside):
    turns = iter([None] * 5 + ["stopped"] * 99)
    report, store, _ = run_here(make_spec(), beside, should_stop=lambda: next(turns))
    assert report.exit_code == 3
    assert 0 < report.gathered.done < 20
    assert report.outcome.stopped == "stopped"
    report, _, _ = run_here(make_spec(), beside, store)
    assert report.exit_code == 0


def test_a_loss_that_is_not_finite_at_the_final_model_is_refused(beside):
    store = MemoryStore()
    with pytest.raises(DivergedError, match="nan at the final model"):
        run_here(make_spec(workload="flowers:nan_loss", estimators=[]), beside, store)
    assert not list(store.list("flowers/"))


def test_a_final_model_from_a_file_is_what_is_trained_on(beside):
    from safetensors.torch import save_file

    workload = load_workload("flowers:flowers", {}, beside)
    state = {k: v * 0.5 for k, v in workload.model.state_dict().items()}
    save_file(state, beside / "half.safetensors")
    plain, given = (resolve(make_spec(final_model=f), beside) for f in (None, "half.safetensors"))
    assert plain.manifest.digest != given.manifest.digest
    model = given.model(torch.device("cpu"))
    assert all(torch.equal(model.params[k], v) for k, v in state.items())
    report, _, _ = run_here(make_spec(final_model="half.safetensors", seeds=1), beside)
    assert report.exit_code == 0


def test_measured_replicas_are_kept_and_used_again(beside):
    spec = make_spec(resources={"replicas": "auto"}, seeds=1, estimators=[])
    _, store, _ = run_here(spec, beside)
    [entry] = store.list("flowers/replicas/")
    kept = json.loads(store.get(entry.key))["replicas"]
    store.put(entry.key, json.dumps({"replicas": 2 if kept != 2 else 3}).encode())
    for part in [*store.list("flowers/parts/"), *store.list("flowers/proofs/")]:
        store.delete(part.key)
    prepared._engines.clear()  # as in a new process
    run_here(spec, beside, store)
    listed = Sweep(store, "flowers").list_parts(resolve(spec, beside).manifest.digest)
    part = Sweep(store, "flowers").read_part(listed[0].key, resolve(spec, beside).manifest)
    assert part.provenance["replicas"] == (2 if kept != 2 else 3)


def test_a_store_that_cannot_be_written_is_one_line_before_any_work(beside, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError) as caught:
        run_here(make_spec(), beside, open_store(str(tmp_path / "file")))
    assert "\n" not in str(caught.value)


def test_provenance_says_where_a_part_comes_from(beside):
    spec = make_spec(seeds=1)
    _, store, _ = run_here(spec, beside)
    sweep, manifest = Sweep(store, "flowers"), resolve(spec, beside).manifest
    about = sweep.read_part(sweep.list_parts(manifest.digest)[0].key, manifest).provenance
    assert about["dtype"] == "float32"
    assert about["replicas"] == 3
    assert about["determinism"]["deterministic_algorithms"] is True
    assert {"python", "torch", "numpy", "pyarrow"} <= set(about["versions"])
    assert about["device_seconds"] > 0


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("seed", range(3))
def test_the_order_in_which_shards_finish_changes_no_byte(beside, whole, seed):
    import contextlib
    import random

    from fimo.orchestrator.run.places import LocalPool
    from fimo.orchestrator.run.tasks import run_task

    class Shuffled(LocalPool):
        def wait(self, timeout_s):
            random.Random(seed).shuffle(self._queue)
            return super().wait(timeout_s)

        def slots(self):
            return 50

    @contextlib.contextmanager
    def shuffled(sweep, manifest, final_model):
        yield Shuffled(lambda task: run_task(sweep, manifest, final_model, task))

    other = MemoryStore()
    resolved = resolve(make_spec(), beside)
    runs.run(resolved, other, runs.Listener(lambda p, n: None, lambda t, r: None, lambda s: None), where=shuffled)
    assert table_bytes(other) == table_bytes(whole)
