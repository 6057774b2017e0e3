"""``fimo amount`` on small sweeps: real cells at other weights, late explosions, and the command itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from fimo.orchestrator.report.amount import amounts_json, amounts_tables, legend
from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run import prepared
from fimo.orchestrator.run.amount import first_order, how_much
from fimo.orchestrator.run.places import in_process
from fimo.orchestrator.run.weighing import proven_whole
from fimo.orchestrator.store import MemoryStore, open_store
from fimo.orchestrator.sweep import parts
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables.amounts import metasmoothness
from fimo.workers.definition import attribution
from fimo.workers.errors import FimoError, UsageError
from tests.support.small_sweep import OWN, Heard, make_spec, run_here, table_bytes

SECTION = {"removal_mode": "reweight", "precision": "float64"}
SPEC = {
    "further_training": SECTION,
    "seeds": 3,
    "estimators": ["grad_dot"],
    "resources": {"proof": True},
}

LINE = """
import torch
from torch import nn
from fimo import Workload

def line(n=23, m=7, classes=0):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n + m, 4, generator=g)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]]) + 0.3 * torch.randn(n + m, 1, generator=g)
    torch.manual_seed(1)
    norm = [nn.BatchNorm1d(4)] if classes else []
    return Workload(
        nn.Sequential(*norm, nn.Linear(4, 1)),
        {"x": x[:n], "y": y[:n]},
        {"x": x[n:], "y": y[n:]},
        lambda model, batch: model(batch["x"]),
        lambda outputs, batch: ((outputs - batch["y"]) ** 2)[:, 0],
    )
"""


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    folder = tmp_path_factory.mktemp("amount") / "spec"
    shutil.copytree(OWN, folder)
    (folder / "line.py").write_text(LINE)
    return folder


@pytest.fixture(scope="module")
def swept(beside):
    # A process proves an engine once, and another test's store may hold the verdict.
    prepared._engines.clear()
    return run_here(make_spec(**SPEC), beside)[1]


@pytest.fixture
def store(swept):
    own = MemoryStore()
    for entry in swept.list(""):
        own.put(entry.key, swept.get(entry.key))
    return own


@pytest.fixture(autouse=True)
def _here(beside, monkeypatch):
    """The user stands where the code is."""
    monkeypatch.chdir(beside)


def look(store, **options):
    heard = Heard()
    return how_much(Sweep(store, "flowers"), in_process, heard.listener(), **options), heard


def test_metasmoothness_and_linearity_are_those_of_the_plain_definition(store, beside):
    spec = make_spec(**SPEC)
    resolved, before = resolve(spec, beside), table_bytes(store)
    found, heard = look(store)
    # Of the five removals four, spread evenly, and the first two seeds; those at weight 1 are the sweep's own.
    removals, seeds = [[0], [3], [11], [22]], range(2)
    trained = [r.indices for task in heard.tasks for r in task.removals]
    assert sorted(trained) == sorted([(i,) for [i] in removals] * 2 * 3)
    at = {}
    for w in (1.0, 2.0, 10.0, 100.0):
        section = spec.further_training.model_copy(update={"removal_weight": w}).settings()
        at[w] = attribution(resolved.workload, section, removals, seeds).effects.numpy()
    assert found.advice.steps
    for place, a in enumerate(found.amounts):
        f1, f2, ten, light = (x[:, :, place].reshape(8, -1) for x in (at[1.0], 2 * at[2.0], at[10.0], at[1.0]))
        assert a.metasmoothness == pytest.approx(metasmoothness(f1, f2).mean(), abs=1e-6)
        cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(ten, light, strict=True)]
        assert a.linear[0].cosine == pytest.approx(np.mean(cosines), abs=1e-6)
    assert table_bytes(store) == before


def test_nothing_is_trained_twice_and_the_sweep_s_own_runs_stay_complete(store, beside):
    first, _ = look(store)
    again, heard = look(store)
    assert heard.tasks == []
    assert amounts_json(again)["amounts"] == amounts_json(first)["amounts"]
    assert (first.weighed.trained, again.weighed.trained) == (24, 0)
    _, _, heard = run_here(make_spec(**SPEC), beside, store)
    assert heard.tasks == []


def test_an_interrupted_one_goes_on_and_a_torn_part_is_set_aside(store):
    turns = iter([None, "stopped"] + [None] * 999)
    with pytest.raises(FimoError, match="the same command goes on"):
        look(store, should_stop=lambda: next(turns))
    found, _ = look(store)
    digest = Sweep(store, "flowers").read_manifest().digest
    key = next(e.key for e in store.list("flowers/parts/") if e.key.endswith(".parquet") and digest[:32] not in e.key)
    store.put(key, b"torn")
    with pytest.raises(FimoError, match="the same command computes it again"):
        look(store)
    again, heard = look(store)
    assert len(heard.tasks) == 1
    assert again.amounts == found.amounts


@pytest.mark.usefixtures("proven")
def test_a_sweep_of_drop_or_of_a_weight_is_tried_at_multiples_of_its_own(beside):
    _, store, _ = run_here(make_spec(seeds=2, estimators=[]), beside)
    found, heard = look(store)
    assert sum(len(task.removals) for task in heard.tasks) == 2 * 4 * 4
    assert any("sweep's is drop" in line for line in found.notes)
    heavy = make_spec(**{**SPEC, "further_training": {**SECTION, "removal_weight": 3.0}})
    _, store, _ = run_here(heavy, beside)
    found, _ = look(store)
    keys = [e.key for e in store.list("flowers/parts/") if e.key.endswith(".parquet")]
    about = [parts.decode_part(store.get(key), key).provenance for key in keys]
    assert {one["removal_weight"] for one in about} == {3.0, 6.0, 30.0, 300.0}
    # The engine is proven at the sweep's own weight, and no further.
    assert {one["removal_weight"] for one in about if one["engine"]["proof"] != "off"} == {3.0}
    assert (found.weighed.weight, found.weighed.trained) == (3, 24)


@pytest.mark.parametrize(("steps", "finite"), [(60, True), pytest.param(800, False, marks=pytest.mark.slow)])
def test_a_late_explosion_is_never_recommended_and_early_amounts_still_are(beside, steps, finite):
    # Along the steepest direction a step of SGD multiplies what is left by a little less than −1: growth without end.
    training = {"optimizer": {"name": "sgd", "lr": 0.56}, "batch_size": 23, "epochs": None, "steps": steps}
    training |= {"removal_mode": "reweight", "evaluate": {"at_steps": [1, 2, 3, 40, steps]}}
    about = {"estimators": ["grad_dot"], "resources": {"proof": False}, "seeds": 2}
    spec = make_spec(workload="line:line", further_training=training, **about)
    report, store, _ = run_here(spec, beside)
    assert bool(report.gathered.diverged) is not finite
    found, _ = look(store)
    beyond = [a.step for a in found.amounts if a.exploded]
    assert beyond == [40, steps]
    assert found.advice.steps
    assert found.advice.qualified
    assert not set(found.advice.steps) & set(beyond)
    # One run that is not finite must not take the figures of the steps before it away.
    assert all(a.reliability is not None for a in found.amounts[:3])
    if not finite:
        assert found.amounts[-1].reliability is None


def test_a_sound_line_is_taken_from_the_first_step_to_the_last(beside):
    training = {"optimizer": {"name": "sgd", "lr": 0.01}, "batch_size": 5, "removal_mode": "reweight"}
    training |= {"precision": "float64", "evaluate": {"every_steps": 2}}
    _, store, _ = run_here(make_spec(workload="line:line", further_training=training, estimators=["grad_dot"]), beside)
    found, _ = look(store)
    assert found.advice.steps == found.advice.first_order == (2, 4, 6, 8, 10)
    assert min(a.metasmoothness for a in found.amounts) > 0.99
    # Neighbours share their seeds' noise, which must not count as agreement.
    assert max(a.stability for a in found.amounts) < 1.02


def test_a_forward_that_mixes_a_batch_has_no_weights_and_says_so(beside):
    spec = make_spec(
        workload="line:line",
        workload_args={"classes": 1},
        further_training={"removal_mode": "mask", "batch_size": 6},
        estimators=[],
        seeds=2,
    )
    _, store, _ = run_here(spec, beside)
    found, heard = look(store)
    assert heard.tasks == []
    assert any("mixes the examples of a batch" in line for line in found.notes)
    assert all(a.metasmoothness is None for a in found.amounts)
    assert not any("smooth" in line for line in legend(found))


def test_without_grad_dot_the_first_reliable_amount_is_the_limit_and_one_seed_says_nothing(beside):
    _, store, _ = run_here(make_spec(**{**SPEC, "estimators": ["grad_cos"]}), beside)
    found, _ = look(store, train=False)
    assert found.limit == "step 3"
    assert found.amounts[0].first_order is None
    assert found.amounts[1].first_order is not None
    _, store, _ = run_here(make_spec(**{**SPEC, "seeds": 1}), beside)
    found, _ = look(store, train=False)
    assert found.advice.steps == ()
    assert any("more seeds" in line for line in found.advice.lines)


def test_the_limit_under_adam_is_grad_dot_in_the_optimizer_s_scale(beside):
    adam = {**SECTION, "optimizer": {"name": "adam", "lr": 0.01}}
    scaled = {"name": "grad_dot", "preconditioner": "optimizer"}
    for given, expected in ((["grad_dot"], None), (["grad_dot", scaled], "optimizer")):
        named = first_order(resolve(make_spec(further_training=adam, estimators=given), beside).manifest)
        assert (None if named is None else json.loads(named[1])["preconditioner"]) == expected


def test_no_cell_is_a_usage_error(store):
    for entry in list(store.list("flowers/parts/")):
        store.delete(entry.key)
    with pytest.raises(UsageError, match="no cell yet"):
        look(store)


def test_a_partial_sweep_is_looked_at_and_exits_3_from_a_shell_without_its_code(swept, tmp_path):
    own = open_store(str(tmp_path / "runs"))
    for entry in swept.list(""):
        own.put(entry.key, swept.get(entry.key))
    fimo = [sys.executable, "-c", "from fimo.orchestrator.commands.main import main; main()"]

    def run(*arguments):
        command = [*fimo, "amount", "runs/flowers", "--no-train", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120, env=environment
        )

    whole = run("--json")
    assert whole.returncode == 0, whole.stderr
    values = json.loads(whole.stdout)
    assert [a["step"] for a in values["amounts"]] == [3, 6, 9, 10]
    assert values["amounts"][0]["metasmoothness"] is None
    own.delete(next(e.key for e in own.list("flowers/parts/") if "seed-0000000002" in e.key))
    part = run()
    assert part.returncode == 3, part.stderr
    assert "the sweep is incomplete; `fimo resume" in part.stderr
    assert "amounts of further training" in part.stdout


def test_the_table_has_a_row_for_each_amount(store):
    found, _ = look(store)
    decides, measured = amounts_tables(found)
    assert decides.row_count == measured.row_count == 4
    assert [c.header for c in decides.columns][-2:] == ["smooth", "against it"]
    assert [c.header for c in measured.columns][-2:] == ["×10", "×100"]


@pytest.mark.usefixtures("proven")
def test_an_engine_with_something_given_up_is_proven_at_each_weight(store):
    sweep, [proof] = Sweep(store, "flowers"), [e.key for e in store.list("flowers/proofs/")]
    manifest = sweep.read_manifest()
    assert proven_whole(manifest, sweep)
    verdict = json.loads(store.get(proof))
    verdict["engine"]["stack"] = False
    store.put(proof, json.dumps(verdict).encode())
    assert not proven_whole(manifest, sweep)
    store.delete(proof)
    assert not proven_whole(manifest, sweep)
