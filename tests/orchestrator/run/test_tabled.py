"""Tables stand alone: what they are of, epochs, g at θᶠ, distances, notes, and the user's own rows."""

from __future__ import annotations

import io
import json

import pyarrow.parquet as pq
import pytest
import torch

from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables import schemas
from fimo.workers.amounts import BASELINE
from fimo.workers.definition import train_cell
from fimo.workers.errors import UsageError, WorkloadError
from tests.support.small_sweep import make_spec, run_here

NAMED = """
import dataclasses
import flowers as plain

def flowers(**how):
    of = plain.flowers()
    n = len(next(iter(of.train.values())))
    return dataclasses.replace(of, ids=range(100, 100 + n), labels=[f"flower {i}" for i in range(n)], **how)
"""


def stored(store: MemoryStore) -> dict[str, object]:
    return {name: pq.read_table(io.BytesIO(store.get(f"flowers/tables/{name}.parquet"))) for name in schemas.SCHEMAS}


def test_every_table_says_what_it_is_of_and_has_epochs_beside_steps(beside):
    report, store, _ = run_here(make_spec(), beside)
    manifest = Sweep(store, "flowers").read_manifest()
    for name, table in stored(store).items():
        about = json.loads(table.schema.metadata[b"fimo"])
        assert (about["sweep"], about["digest"], about["table"]) == ("flowers", manifest.digest, name)
        assert about["spec"]["further_training"]["optimizer"]["lr"] == 0.1
        assert "resources" not in about["spec"], "what no number depends on"
        columns = table.schema.names
        if "step" in columns:
            assert columns[columns.index("step") + 1] == "epoch"
            per_epoch = -(-manifest.train // 5)
            for row in table.to_pylist():
                assert row["epoch"] == (None if row["step"] is None else row["step"] / per_epoch)
    assert report.gathered.tables["attribution"].schema.metadata is not None


def test_g_at_the_final_model_and_how_far_training_went_are_the_definition_s(beside):
    spec = make_spec()
    _, store, _ = run_here(spec, beside)
    resolved = resolve(spec, beside)
    model, (_, evals) = resolved.model(torch.device("cpu")), resolved.examples(torch.device("cpu"))
    with torch.no_grad(), model.mode("eval"):
        expected = model.measure(model.params, evals.batch(range(len(evals))))
    tables = stored(store)
    for row in tables["training_only"].to_pylist():
        assert row["at_final"] == pytest.approx(float(expected[row["eval"]]), rel=1e-6)
    settings = resolved.spec.further_training.settings()
    cells = [train_cell(resolved.workload, settings, BASELINE, seed) for seed in spec.seeds]
    for row in tables["amounts"].to_pylist():
        place = cells[0].steps.index(row["step"])
        mean = sum(float(c.distances[place]) for c in cells) / len(cells)
        assert row["distance"] == pytest.approx(mean, rel=1e-5)
        assert row["seeds"] == 4


def test_ids_and_labels_lead_from_a_removal_to_the_user_s_rows_and_move_no_number(beside):
    (beside / "named.py").write_text(NAMED)
    groups = {"groups": {"one": [3], "two": [11, 5]}}
    _, store, _ = run_here(make_spec(workload="named:flowers", removals=groups), beside)
    rows = stored(store)["removals"].to_pylist()
    assert [r["ids"] for r in rows] == [["103"], ["105", "111"]]
    assert rows[1]["labels"] == ["flower 5", "flower 11"]
    digests = {resolve(make_spec(workload="named:flowers"), beside).manifest.digest}
    (beside / "named.py").write_text(NAMED.replace("flower {i}", "{i}"))
    _, without, _ = run_here(make_spec(removals=groups), beside)
    assert stored(without)["removals"].to_pylist()[0]["ids"] is None
    assert len(digests) == 1
    (beside / "short.py").write_text(NAMED.replace("range(100, 100 + n)", "range(3)"))
    with pytest.raises(WorkloadError, match=r"ids must be one for each of the \d+ training examples, got 3"):
        resolve(make_spec(workload="short:flowers"), beside)


def test_notes_of_estimators_are_rows(beside):
    _, store, _ = run_here(make_spec(estimators=[{"name": "cg", "damping": 0.1}]), beside)
    notes = {r["note"]: r for r in stored(store)["estimator_notes"].to_pylist()}
    assert json.loads(notes["damping"]["value"]) == pytest.approx(0.1)
    assert notes["units"]["value"] == "n times an effect"
    assert (notes["damping"]["estimator"], notes["damping"]["first"], notes["damping"]["seed"]) == ("cg", 0, None)


def test_another_sweep_of_the_name_is_never_overwritten_unasked(beside):
    _, store, _ = run_here(make_spec(), beside)
    other = make_spec(further_training={"optimizer": {"name": "sgd", "lr": 0.2}})
    before = {e.key: store.get(e.key) for e in store.list("flowers/")}
    with pytest.raises(UsageError) as error:
        run_here(other, beside, store)
    assert "further_training.optimizer.lr (0.1, now 0.2) changed" in str(error.value)
    assert "another name, or --replace" in str(error.value)
    assert {e.key: store.get(e.key) for e in store.list("flowers/")} == before
    report, _, heard = run_here(other, beside, store, replace_other=True)
    assert report.exit_code == 0
    assert heard.tasks
    _, _, again = run_here(make_spec(), beside, store, replace_other=True)
    assert not again.tasks, "the first one's parts are there still"
    more, _, _ = run_here(make_spec(seeds=5), beside, store)
    assert more.exit_code == 0, "seeds are no part of the digest"
