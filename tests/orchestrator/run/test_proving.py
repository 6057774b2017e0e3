"""Every sweep proves its engine before it trusts it; the verdict is an object of the sweep, named in every part."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from fimo.orchestrator.report.status import status_lines
from fimo.orchestrator.resolve.at_hand import Own
from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run import prepared, proving, verification
from fimo.orchestrator.run.status import sweep_status
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep.parts import Part
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers import further_training
from fimo.workers.stacking import products, replicas
from fimo.workers.stacking.size import Stacks
from tests.support.small_sweep import make_spec, run_here, table_bytes

pytestmark = pytest.mark.usefixtures("proven")


@pytest.fixture(autouse=True)
def new_process():
    prepared._engines.clear()
    yield
    prepared._engines.clear()


def proofs(store: MemoryStore) -> list[dict[str, Any]]:
    return [json.loads(store.get(entry.key)) for entry in store.list("flowers/proofs/")]


def parts(store: MemoryStore) -> list[Part]:
    sweep = Sweep(store, "flowers")
    manifest = sweep.read_manifest()
    return [sweep.read_part(p.key, manifest) for p in sweep.list_parts(manifest.digest)]


def provenances(store: MemoryStore) -> list[dict[str, Any]]:
    return [dict(part.provenance) for part in parts(store)]


def test_the_verdict_is_kept_named_in_every_part_and_shown(beside):
    report, store, _ = run_here(make_spec(), beside)
    assert report.exit_code == 0
    [entry] = store.list("flowers/proofs/")
    [proof] = proofs(store)
    assert proof["path"] == "traced, folded and stacked"
    assert set(proof["precisions"]) == {"float32", "float64"}
    wide = proof["precisions"]["float64"]
    assert wide["effects"] <= 1e-8 * wide["largest_effect"] + 1e-13
    assert [cell for cell in proof["cells"] if cell in ([], [0], [22])] == [[], [0], [22]]
    assert {1, 3} <= set(proof["stacks"])
    assert all(p["engine"] == {"proof": entry.key, "path": proof["path"]} for p in provenances(store))
    shown = "; ".join(status_lines(sweep_status(Sweep(store, "flowers"))))
    assert "engine proven on" in shown
    assert "float64" in shown


def test_a_resume_proves_nothing_again_and_other_software_does(beside, monkeypatch):
    _, store, _ = run_here(make_spec(seeds=1), beside)
    monkeypatch.setattr(proving, "prove", lambda *_: pytest.fail("proven again"))
    prepared._engines.clear()
    report, _, _ = run_here(make_spec(seeds=3), beside, store)
    assert report.exit_code == 0
    monkeypatch.undo()
    monkeypatch.setattr(proving, "versions", lambda: {"torch": "another"})
    prepared._engines.clear()
    run_here(make_spec(seeds=4), beside, store)
    assert len(proofs(store)) == 2


@pytest.mark.parametrize("damage", ["torn", "of another kind"])
def test_a_damaged_verdict_or_stack_size_is_set_aside_and_made_anew(beside, damage):
    """It would stop every run of the sweep until somebody removes it; a stack size would be measured by each worker."""
    auto = {"resources": {"replicas": "auto"}}
    _, store, _ = run_here(make_spec(seeds=1, **auto), beside)
    good = {
        entry.key: store.get(entry.key) for kind in ("proofs", "replicas") for entry in store.list(f"flowers/{kind}/")
    }
    for key, whole in good.items():
        store.put(key, whole[: len(whole) // 2] if damage == "torn" else b"[1]")
    prepared._engines.clear()
    again = resolve(make_spec(seeds=3, **auto), beside)
    proving.rehearsed(Sweep(store, "flowers"), again, again.start(torch.device("cpu")))
    report, _, heard = run_here(make_spec(seeds=3, **auto), beside, store)
    assert report.exit_code == 0
    assert sorted(line.split(" ")[0] for line in heard.lines if "made anew" in line) == sorted(good)
    assert len(list(store.list("flowers/rejected/"))) == len(good) == 2
    for key, whole in good.items():
        assert json.loads(store.get(key)).keys() == json.loads(whole).keys()


def test_an_engine_that_multiplies_otherwise_is_proven_anew(beside, monkeypatch):
    """A verdict from before oneDNN multiplied, or of a CPU of the same name, says nothing of it."""
    monkeypatch.setattr(products, "gains", lambda: False)
    _, store, _ = run_here(make_spec(seeds=1), beside)
    monkeypatch.setattr(products, "gains", lambda: True)
    prepared._engines.clear()
    run_here(make_spec(seeds=2), beside, store)
    assert sorted(proof["about"].get("products", "torch") for proof in proofs(store)) == ["oneDNN", "torch"]
    assert [p["products"] for p in provenances(store)] == ["torch", "torch", "torch", "oneDNN", "oneDNN", "oneDNN"]


def test_a_process_that_has_proven_another_sweep_s_engine_does_not_trust_it_here(beside, monkeypatch):
    """As in a notebook: another store, a verdict that is gone, and groups where there were single examples."""

    def proven(sweep, resolved, start, removals):
        key = f"flowers/proofs/{max(len(r.indices) for r in sweep.read_manifest().removals) > 1}.json"
        sweep.store.put(key, b"{}")
        return proving.Proven(start, 3, {"proof": key})

    monkeypatch.setattr(prepared, "proven", proven)
    few = {"removals": {"indices": [0]}, "estimators": [], "further_training": {"epochs": 1}}
    _, first, _ = run_here(make_spec(seeds=1, **few), beside)
    _, second, _ = run_here(make_spec(seeds=1, **few), beside)
    run_here(make_spec(seeds=1, **{**few, "removals": {"groups": {"pair": [0, 1]}}}), beside, first)
    names = [[e.key.rpartition("/")[2] for e in store.list("flowers/proofs/")] for store in (first, second)]
    assert names == [["False.json", "True.json"], ["False.json"]]
    second.delete("flowers/proofs/False.json")
    run_here(make_spec(seeds=2, **few), beside, second)
    assert list(second.list("flowers/proofs/"))


def test_off_is_recorded(beside):
    report, store, _ = run_here(make_spec(resources={"proof": False}), beside)
    assert report.exit_code == 0
    assert proofs(store) == []
    assert all(p["engine"] == {"proof": "off", "path": "not proven"} for p in provenances(store))


@pytest.mark.parametrize("proof", [True, False])
def test_stacks_on_streams_are_chosen_once_and_rerun_in_the_same_way(beside, monkeypatch, proof):
    ways: list[bool] = []
    monkeypatch.setattr(proving, "measure_stacks", lambda *_: ways.append(True) or Stacks(3, True, {3: 0.1}, {3: 0.05}))
    spec = make_spec(seeds=2, resources={"proof": proof, "replicas": "auto"})
    report, store, _ = run_here(spec, beside)
    assert report.exit_code == 0
    [entry] = store.list("flowers/replicas/")
    assert json.loads(store.get(entry.key))["abreast"]
    prepared._engines.clear()
    run_here(spec.model_copy(update={"seeds": spec.seeds.model_copy(update={"count": 3})}), beside, store)
    assert ways == [True]
    path = "traced, folded and stacked on streams" if proof else "not proven"
    assert {p["engine"]["path"] for p in provenances(store)} == {path}
    sweep = Sweep(store, "flowers")
    manifest = sweep.read_manifest()
    assert all(proving.engine_of_part(sweep, manifest, p).abreast for p in provenances(store))
    found = verification.verify(sweep, rerun=2, own=Own(beside))
    assert [(r.exact, r.identical, r.ok) for r in found.reruns] == 2 * [(True, True, True)]


def test_stacks_on_streams_are_none_where_no_step_is_recorded(beside, monkeypatch):
    """Their kernels would be launched one by one: those of one replica at a time."""
    monkeypatch.setattr(proving, "measure_stacks", lambda *_: Stacks(3, True, {3: 0.1}, {3: 0.05}))
    spec = make_spec(seeds=1, resources={"proof": False, "replicas": "auto"})
    _, store, _ = run_here(spec, beside)
    prepared._engines.clear()
    more = make_spec(seeds=2, resources={"proof": False, "replicas": "auto", "replay": False})
    report, _, _ = run_here(more, beside, store)
    assert report.exit_code == 0
    by_seed = {part.seed: dict(part.provenance) for part in parts(store)}
    assert [by_seed[seed]["engine"].get("abreast") for seed in sorted(by_seed)] == [True, None]


def wrong_in_a_stack(monkeypatch: pytest.MonkeyPatch, lane: int = 1) -> None:
    """The stacked gradients of one lane are off by 1%."""
    real = replicas.gradients

    def gradients(model, params, *rest, **options):
        grads, after = real(model, params, *rest, **options)
        for grad in grads.values():
            if grad is not None and len(grad) > lane:
                grad[lane] *= 1.01
        return grads, after

    monkeypatch.setattr(further_training.replicas, "gradients", gradients)


def test_an_engine_that_is_wrong_in_a_stack_falls_back_to_one_at_a_time_and_says_so(beside, monkeypatch):
    alone, expected, _ = run_here(make_spec(resources={"replicas": 1, "proof": False, "replay": False}), beside)
    prepared._engines.clear()
    wrong_in_a_stack(monkeypatch)
    report, store, heard = run_here(make_spec(), beside)
    assert report.exit_code == alone.exit_code == 0
    [proof] = proofs(store)
    assert proof["path"] == "one replica at a time"
    assert proof["replicas"] == 1
    receipts = [line for result in heard.results for line in getattr(result, "lines", ())]
    assert len(receipts) == len(proof["lines"]) > 0
    assert all("off by" in line for line in receipts)
    ours, theirs = table_bytes(store), table_bytes(expected)
    assert ours["flowers/tables/attribution.parquet"] == theirs["flowers/tables/attribution.parquet"]


def test_an_engine_that_is_always_wrong_is_refused_in_one_line(beside, monkeypatch):
    wrong_in_a_stack(monkeypatch, lane=0)
    report, store, _ = run_here(make_spec(), beside)
    assert report.exit_code == 1
    assert not list(store.list("flowers/parts/"))
    assert "does not give the definition's numbers" in (report.outcome.stopped or "")
    assert "\n" not in str(report.outcome.stopped)
    [proof] = proofs(store)
    assert "refused" in proof
    assert any("engine refused on" in line for line in status_lines(sweep_status(Sweep(store, "flowers"))))


def test_verify_finds_what_the_engine_gets_wrong_every_time(beside, monkeypatch):
    """The same wrong bits come out of a rerun by the engine; only the definition tells."""
    wrong_in_a_stack(monkeypatch, lane=0)
    _, store, _ = run_here(make_spec(resources={"proof": False}), beside)
    verified = verification.verify(Sweep(store, "flowers"), rerun=3, own=Own(beside))
    assert verified.exit_code == 1
    assert [(r.identical, r.ok, r.definition > 1) for r in verified.reruns] == 3 * [(True, False, True)]
    monkeypatch.undo()
    prepared._engines.clear()
    _, sound, _ = run_here(make_spec(), beside)
    verified = verification.verify(Sweep(sound, "flowers"), rerun=3, own=Own(beside))
    assert verified.exit_code == 0
    assert all(r.definition < 0.5 for r in verified.reruns)


def test_the_mode_is_settled_by_the_model_and_part_of_the_digest(beside):
    section = make_spec().further_training.model_dump(exclude={"removal_mode"}, exclude_none=True)
    spec = make_spec()
    spec = spec.model_copy(update={"further_training": spec.further_training.model_copy(update={"removal_mode": None})})
    assert section
    from fimo.orchestrator.resolve.resolved import resolve

    settled = resolve(spec, beside).manifest
    named = resolve(make_spec(further_training={"removal_mode": "reweight"}), beside).manifest
    assert settled.spec.further_training.removal_mode == "reweight"
    assert settled.digest == named.digest != resolve(make_spec(), beside).manifest.digest


def test_a_float64_final_model_has_a_digest_of_its_own(beside, tmp_path):
    from safetensors.torch import save_file

    from fimo.orchestrator.resolve.resolved import resolve

    state = resolve(make_spec(), beside).model(torch.device("cpu")).module.state_dict()
    digests = set()
    for factor in (1.0, 1 + 1e-10):
        save_file({n: t.double() * factor for n, t in state.items()}, beside / "theta.safetensors")
        digests.add(resolve(make_spec(final_model="theta.safetensors"), beside).manifest.digest)
    plain = resolve(make_spec(), beside).manifest
    assert len(digests) == 2
    assert plain.digest in digests, "equal values are one final model, whatever the precision that holds them"
    assert replace(plain) == plain
