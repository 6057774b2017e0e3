"""A sweep's effects with a control taken out, against runs trained here one by one."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from fimo.estimators.declared import DECLARED
from fimo.orchestrator.notebook import OpenSweep
from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run.gather import gather
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables.control import CONTROLLED, control
from fimo.workers.errors import UsageError
from fimo.workers.mirror import train_mirrored
from fimo.workers.shard import run_shard
from tests.support.small_sweep import OWN, make_spec, run_here

SEEDS, MORE = 4, 6
OWN_SEEDS = {"name": "mirrored", "own_seeds": True, "seeds": SEEDS}
SPEC = {
    "seeds": {"first": 3, "count": SEEDS},
    "estimators": ["grad_dot", OWN_SEEDS, {"name": "mirrored", "seeds": 5}, {"name": "mirrored", "seeds": MORE}],
    "resources": {"shard": 2, "replay": False},
}


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "spec"
    shutil.copytree(OWN, folder)
    return folder


@pytest.fixture(scope="module")
def once(beside):
    """Three evaluation examples in a block: the seven make three blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DECLARED["mirrored"], "evals_together", 3)
        report, store, _ = run_here(make_spec(**SPEC), beside)
    assert report.exit_code == 0
    return store


@pytest.fixture
def store(once):
    own = MemoryStore()
    for entry in once.list(""):
        own.put(entry.key, once.get(entry.key))
    return own


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(DECLARED["mirrored"], "evals_together", 3)


def test_it_is_the_arithmetic_of_runs_of_the_same_and_of_other_seeds(store, beside):
    resolved = resolve(make_spec(**SPEC), beside)
    start, manifest = resolved.start(torch.device("cpu")), resolved.manifest
    removals, steps = [r.indices for r in manifest.removals], manifest.steps
    effects, controls = [], []
    for seed in range(3, 3 + SEEDS):
        deltas = run_shard(start, removals, seed, 3).deltas
        effects.append((deltas[:-2] - deltas[-2]).numpy())
    for seed in range(3, 3 + SEEDS + MORE):
        controls.append(train_mirrored(start, start.examples, removals, seed, steps, 3).values.numpy())
    table = OpenSweep(Sweep(store, "flowers")).controlled()
    assert table.schema.equals(CONTROLLED)
    assert table.num_rows == len(removals) * manifest.evals * len(steps)
    rows = {(row["removal"], row["eval"], row["step"]): row for row in table.to_pylist()}
    scale = np.abs(np.stack(effects)).max()
    for place, step in enumerate(steps):
        own, others = (np.stack([c[place] for c in of]) for of in (controls[:SEEDS], controls[SEEDS:]))
        one = control(np.stack([e[:, place] for e in effects]), own, others)
        for r in range(len(removals)):
            for m in range(manifest.evals):
                row = rows[r, m, step]
                assert row["seeds"] == SEEDS
                assert row["effect"] == pytest.approx(one.mean[r, m], abs=1e-4 * scale)
                assert row["sem"] == pytest.approx(one.sem[r, m], abs=1e-4 * scale)
                assert row["plain_sem"] == pytest.approx(one.plain_sem[r, m], abs=1e-4 * scale)


def test_the_plain_standard_error_is_the_attributions(store):
    sweep = OpenSweep(Sweep(store, "flowers"))
    plain = {(r["removal"], r["eval"], r["step"]): r["sem"] for r in sweep.attribution().to_pylist()}
    table = sweep.controlled().to_pylist()
    assert [plain[r["removal"], r["eval"], r["step"]] for r in table] == pytest.approx([r["plain_sem"] for r in table])
    # The order of rows is the attribution's too.
    assert list(plain) == [(r["removal"], r["eval"], r["step"]) for r in table]


def test_tables_know_nothing_of_it(store, beside):
    """Off by default: asking for it changes nothing that others read."""
    sweep = Sweep(store, "flowers")
    before = gather(sweep, sweep.read_manifest()).tables["attribution"]
    OpenSweep(sweep).controlled()
    assert gather(sweep, sweep.read_manifest()).tables["attribution"].equals(before)


@pytest.mark.parametrize(
    "listed",
    [
        ["grad_dot"],
        [OWN_SEEDS],
        [{"name": "mirrored", "seeds": MORE}],
        # Some of the sweep's seeds, other seeds that are fewer, or other steps.
        [{**OWN_SEEDS, "seeds": SEEDS - 1}, {"name": "mirrored", "seeds": MORE}],
        [OWN_SEEDS, {"name": "mirrored", "seeds": SEEDS - 1}],
        [OWN_SEEDS, {"name": "mirrored", "seeds": MORE, "last_step": 3}],
    ],
)
def test_lines_that_are_missing_from_the_spec_are_named(store, beside, listed):
    sweep = Sweep(store, "flowers")
    sweep.write_manifest(resolve(make_spec(**{**SPEC, "estimators": listed}), beside).manifest)
    with pytest.raises(UsageError) as caught:
        OpenSweep(sweep).controlled()
    line = str(caught.value)
    assert "{name: mirrored, own_seeds: true, seeds: 4}" in line
    assert "{name: mirrored, seeds: 4}" in line
    assert "\n" not in line


def test_a_seed_that_is_missing_is_told(store):
    keys = [e.key for e in store.list("flowers/estimates/") if "seed-0000000012" in e.key]
    assert keys, "the last of the other seeds"
    store.delete(keys[0])
    with pytest.raises(UsageError, match="not complete for seed 12: `fimo resume"):
        OpenSweep(Sweep(store, "flowers")).controlled()


def test_a_block_that_does_not_verify_counts_as_missing(store):
    key = next(e.key for e in store.list("flowers/estimates/") if "seed-0000000012" in e.key)
    store.put(key, store.get(key)[:-40])
    with pytest.raises(UsageError, match="not complete for seed 12"):
        OpenSweep(Sweep(store, "flowers")).controlled()


def test_a_seed_without_all_its_cells_is_left_out(store):
    keys = [e.key for e in store.list("flowers/parts/") if "seed-0000000004" in e.key]
    assert len(keys) > 1
    store.delete(keys[0])
    with pytest.raises(UsageError, match="has 3 whole seeds: a control needs 4"):
        OpenSweep(Sweep(store, "flowers")).controlled()


def test_a_control_of_no_runs_is_refused(store):
    sweep = OpenSweep(Sweep(store, "flowers"))
    for name in ("grad_dot", "mirored"):
        with pytest.raises(UsageError, match=f"'{name}' trains no runs of its own.*mirrored, unrolled"):
            sweep.controlled(by=name)


def test_parts_of_another_manifest_are_not_mixed_in(store, beside):
    """More seeds in the spec than the control has: the line is asked for anew, and nothing is computed of four."""
    sweep = Sweep(store, "flowers")
    manifest = sweep.read_manifest()
    sweep.write_manifest(replace(manifest, spec=manifest.with_seeds(SEEDS + 1).spec))
    with pytest.raises(UsageError, match="seeds: 5}"):
        OpenSweep(sweep).controlled()
