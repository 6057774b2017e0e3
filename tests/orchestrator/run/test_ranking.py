"""``fimo rank`` on a small sweep, against every training example by brute force."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from fimo.orchestrator.commands.rank import read_estimator, read_places
from fimo.orchestrator.report.rank import ranked_json, ranked_lines, tables, top_table
from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run import ranking
from fimo.orchestrator.run.gather import gather
from fimo.orchestrator.run.places import in_process
from fimo.orchestrator.run.rank_cost import rank_cost
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables import schemas
from fimo.workers.errors import FimoError, UsageError
from tests.support.small_sweep import OWN, Heard, make_spec, run_here

SPEC = {
    "removals": {"every": 2},
    "seeds": 3,
    "estimators": ["grad_dot", "trak", {"name": "mirrored", "seeds": 2}],
    "further_training": {"removal_mode": "reweight"},
    "resources": {"replay": False, "shard": 20},
}
N, M = 23, 7


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rank") / "spec"
    shutil.copytree(OWN, folder)
    return folder


@pytest.fixture(scope="module")
def swept(beside):
    return run_here(make_spec(**SPEC), beside)[1]


@pytest.fixture(scope="module")
def brute(beside):
    """Effects (n, m) at the last step of every training example."""
    report, _, _ = run_here(make_spec(**{**SPEC, "removals": "all", "estimators": ["grad_dot"]}), beside)
    rows = report.gathered.tables["attribution"].to_pylist()
    last, out = max(row["step"] for row in rows), np.full((N, M), np.nan)
    for row in rows:
        if row["step"] == last:
            out[row["removal"], row["eval"]] = row["effect"]
    return out


@pytest.fixture
def store(swept):
    own = MemoryStore()
    for entry in swept.list(""):
        own.put(entry.key, swept.get(entry.key))
    return own


def rank(store, beside, **options):
    heard, options = Heard(), {"cells": 10_000, **options}
    sweep = Sweep(store, "flowers")
    resolved = resolve(make_spec(**SPEC), beside)
    return ranking.rank(resolved, sweep, in_process, heard.listener(), **options), heard


def test_what_is_printed_is_verified_and_is_what_brute_force_says(store, beside, brute):
    ranked, heard = rank(store, beside, k=3)
    whole = [table.to_pylist() for table in tables(ranked, {})]
    assert [len(rows) for rows in whole] == [N] * M
    for place, rows in enumerate(whole):
        assert [row["rank"] for row in rows] == list(range(1, N + 1))
        assert sorted(row["index"] for row in rows) == list(range(N))
        assert {row["eval"] for row in rows} == {place}
        for row in rows[:3] + rows[-3:]:
            assert row["verified"] == pytest.approx(brute[row["index"], place], rel=1e-3, abs=1e-7)
            assert row["sem"] is not None
            assert 0 <= row["p"] <= 1
        values = [row["effect"] if row["verified"] is None else row["verified"] for row in rows]
        assert values == sorted(values, reverse=True)
    trained = {r.indices for task in heard.tasks for r in getattr(task, "removals", ()) if hasattr(task, "seed")}
    assert trained
    assert ranked.choice is not None
    assert ranked.estimator[0] in ("grad_dot", "mirrored")
    assert any("verified" in line for line in ranked_lines(ranked))
    assert ranked_json(ranked)["cells_brute_force"] == 3 * N
    assert top_table(next(tables(ranked, {})), ranked.step, ranked.k).row_count == 6


def test_nothing_is_computed_twice_and_the_sweeps_tables_stay(store, beside):
    sweep = Sweep(store, "flowers")
    before = {n: schemas.encode_table(t) for n, t in gather(sweep, sweep.read_manifest()).tables.items()}
    first, heard = rank(store, beside, k=2)
    assert heard.tasks
    again, heard = rank(store, beside, k=2)
    assert heard.tasks == []
    assert again.trained > 0 or first.trained == 0
    assert np.array_equal(first.values, again.values)
    after = {n: schemas.encode_table(t) for n, t in gather(sweep, sweep.read_manifest()).tables.items()}
    assert before == after
    # The verified cells are the sweep's own once its spec asks for them.
    report, _, heard = run_here(make_spec(**{**SPEC, "removals": "all", "estimators": ["grad_dot"]}), beside, store)
    assert report.exit_code == 0
    trained = sum(len(t.removals) for t in heard.tasks if not hasattr(t, "estimator"))
    assert trained < 3 * (N - 12)


def test_a_share_of_brute_force_is_spent_on_what_most_ask_for_and_the_rest_is_told(store, beside):
    ranked, heard = rank(store, beside, k=5, cells=None)
    trained = {r.indices for t in heard.tasks if not hasattr(t, "estimator") for r in t.removals}
    assert len(trained) == N // 5
    assert ranked.trained == 3 * (N // 5)
    assert ranked.left > 0
    assert any("are not verified" in line for line in ranked_lines(ranked))
    unverified = 0
    for table in tables(ranked, {}):
        rows = table.to_pylist()
        unverified += sum(row["verified"] is None for row in rows[:5] + rows[-5:])
    assert ranked.left == unverified == ranked_json(ranked)["unverified"]
    none, heard = rank(store, beside, k=5, cells=0)
    assert (heard.tasks, none.trained) == ([], 0)


def test_some_evaluation_examples_one_estimator_another_step(store, beside, brute):
    ranked, _ = rank(store, beside, evals=[5, 2], named=read_estimator("grad_dot"), k=2, step=3)
    assert (ranked.evals, ranked.step, ranked.choice) == ((5, 2), 3, None)
    assert [table["eval"][0].as_py() for table in tables(ranked, {})] == [5, 2]


def test_blocks_of_training_examples_make_the_same_values(store, beside, monkeypatch):
    whole, _ = rank(store, beside, named=read_estimator("grad_dot"), k=1)
    monkeypatch.setattr(ranking, "VALUES", 10 * M)
    fresh = MemoryStore()
    for entry in store.list(""):
        if "/estimates/" not in entry.key:
            fresh.put(entry.key, store.get(entry.key))
    cut, heard = rank(fresh, beside, named=read_estimator("grad_dot"), k=1)
    assert sum(hasattr(t, "estimator") for t in heard.tasks) == 3
    np.testing.assert_allclose(cut.values, whole.values, rtol=1e-4, atol=1e-7)


def test_an_interrupted_ranking_goes_on(store, beside):
    turns = iter([None, None, "stopped"] + [None] * 999)
    with pytest.raises(FimoError, match="the same command goes on"):
        rank(store, beside, k=3, should_stop=lambda: next(turns))
    done = len(list(store.list("")))
    ranked, _ = rank(store, beside, k=3)
    assert len(list(store.list(""))) > done
    assert ranked.trained > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [({"step": 4}, "step 4 is not recorded"), ({"evals": [7]}, "run from 0 to 6"), ({"evals": []}, "run from 0")],
)
def test_what_the_sweep_does_not_have_is_one_line(store, beside, options, words):
    with pytest.raises(UsageError, match=words) as error:
        rank(store, beside, **options)
    assert "\n" not in str(error.value)


def test_too_few_cells_to_calibrate_on_are_told(beside):
    _, store, _ = run_here(make_spec(**{**SPEC, "removals": {"indices": [1, 2, 3]}}), beside)
    with pytest.raises(UsageError, match="at least 10"):
        rank(store, beside)


def test_places_and_estimators_are_read_as_written():
    assert read_places("0,3,5-7") == [0, 3, 5, 6, 7]
    assert read_places(None) is None
    assert read_estimator("{name: cg, damping: 0.1}")[0] == "cg"
    for wrong in ("a", "1-", "-1", "1,,2", "2-x"):
        with pytest.raises(UsageError, match="--evals"):
            read_places(wrong)
    for wrong in ("nope", "{name: cg, damping: [0.1, 1]}", "{"):
        with pytest.raises(UsageError):
            read_estimator(wrong)


def test_a_plan_says_what_a_ranking_takes_before_anything_is_run(beside):
    cost = rank_cost(resolve(make_spec(**SPEC), beside), M, 10)
    assert (cost["train"], cost["evals"]) == (N, M)
    assert {name.split(" ")[0] for name in cost["ranking"]} == {"grad_dot", "trak", "mirrored"}
    assert all(0 < hours < float("inf") for hours in cost["ranking"].values())
    assert cost["verify_cells"] == 3 * N
    assert cost["verify_hours"] > 0
