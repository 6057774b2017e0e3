"""Sweeps over groups: the plain definition's numbers in every mode, and only new groups are computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fimo.orchestrator.report.scores import score_tables
from fimo.orchestrator.resolve.at_hand import Own
from fimo.orchestrator.resolve.resolved import resolve, resolve_again
from fimo.orchestrator.run import driver as runs
from fimo.orchestrator.run.places import in_process
from fimo.orchestrator.run.results import Receipt
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables import schemas
from fimo.workers.definition import attribution
from tests.support.own.flowers import flowers
from tests.support.small_sweep import Heard, make_spec, run_here, table_bytes

GROUPS = {"none": [], "one": [4], "pair": [0, 9], "many": [1, 2, 3, 5, 8, 13, 21], "most": list(range(20))}


def tables(store, name):
    return schemas.decode_table(store.get(f"flowers/tables/{name}.parquet"), name).to_pandas()


@pytest.mark.parametrize("mode", ["reweight", "mask", "drop"])
def test_groups_of_several_sizes_in_one_sweep_are_the_plain_definition_s(beside, mode):
    further = {"removal_mode": mode, "precision": "float64", "evaluate": {"every_epochs": 1}}
    spec = make_spec(removals={"groups": GROUPS}, further_training=further, seeds=3)
    report, store, _ = run_here(spec, beside)
    assert report.exit_code == 0
    torch.manual_seed(0)
    plain = attribution(flowers(), spec.further_training.settings(), list(GROUPS.values()), range(3))
    table = tables(store, "attribution")
    effects = table["effect"].to_numpy().reshape(len(GROUPS), 7, len(plain.steps))
    np.testing.assert_allclose(effects, plain.effect.numpy().swapaxes(1, 2), rtol=1e-7, atol=1e-12)
    assert np.abs(effects[4]).min() > 1e-6


def test_estimates_of_a_sweep_s_groups_are_sums_over_those_of_its_examples(beside):
    _, single, _ = run_here(make_spec(removals="all", seeds=1), beside)
    _, grouped, _ = run_here(make_spec(removals={"groups": GROUPS}, seeds=1), beside)
    of_one = tables(single, "estimates").pivot_table(index=["estimator", "removal"], columns="eval", values="value")
    of_group = tables(grouped, "estimates").pivot_table(index=["estimator", "removal"], columns="eval", values="value")
    for estimator in ("grad_dot", "grad_cos"):
        for number, group in enumerate(GROUPS.values()):
            summed = of_one.loc[estimator].loc[group].sum()
            np.testing.assert_allclose(of_group.loc[estimator, number], summed, rtol=1e-4, atol=1e-6)


def test_more_random_groups_compute_only_the_new_ones_and_have_the_lds(beside):
    random = {"fraction": 0.4, "count": 4, "seed": 3}
    report, store, _ = run_here(make_spec(removals=random), beside)
    assert report.exit_code == 0
    report, store, heard = run_here(make_spec(removals={**random, "count": 7}), beside, store)
    trained = [r for r in heard.results if isinstance(r, Receipt) and r.cells]
    assert sum(r.cells for r in trained) == 3 * 4
    assert report.exit_code == 0
    scores, removals = tables(store, "scores"), tables(store, "removals")
    assert removals["name"].tolist() == [f"random-{i}" for i in range(7)]
    assert {len(x) for x in removals["indices"]} == {9}
    assert set(scores["metric"]) == {"cosine", "spearman", "lds"}
    shown = score_tables(report.gathered.tables["scores"], report.gathered.tables["costs"])
    assert [str(t.title).split(" with ")[0] for t in shown] == ["cosine", "LDS (Spearman over random groups)"]

    # The same groups by name share every part; over groups of anybody's choice there is no LDS.
    manifest = resolve(make_spec(removals={**random, "count": 7}), beside).manifest
    named = {"groups": {r.name: list(r.indices) for r in manifest.removals}}
    report, store, heard = run_here(make_spec(removals=named), beside, store)
    assert heard.results == []
    assert set(tables(store, "scores")["metric"]) == {"cosine", "spearman"}
    assert len(score_tables(report.gathered.tables["scores"], report.gathered.tables["costs"])) == 1


def test_reweight_trains_a_group_s_rest_at_a_rate_that_is_lower_by_the_group_s_share(beside):
    """Weights that sum to 1 − |G|/n: with full batches, drop at (1 − |G|/n) times the rate, exactly."""
    groups = {"groups": {"some": list(range(6)), "other": list(range(10, 16))}}
    whole = {"batch_size": 23, "precision": "float64", "epochs": 6, "evaluate": {"every_epochs": 6}}

    def deltas(mode, rate):
        further = {**whole, "removal_mode": mode, "optimizer": {"name": "sgd", "lr": rate}}
        _, store, _ = run_here(make_spec(removals=groups, seeds=1, further_training=further, estimators=[]), beside)
        effects = tables(store, "attribution")["effect"].to_numpy().reshape(2, 7)
        return effects + tables(store, "training_only")["delta"].to_numpy()

    slower = deltas("drop", 0.5 * (1 - 6 / 23))
    np.testing.assert_allclose(deltas("reweight", 0.5), slower, rtol=1e-7, atol=1e-10)
    assert np.abs(deltas("drop", 0.5) - slower).max() > 1e-3


def test_renamed_groups_have_their_new_names_in_the_tables(beside):
    _, store, _ = run_here(make_spec(removals={"groups": {"a": [1, 2]}}, seeds=1), beside)
    run_here(make_spec(removals={"groups": {"b": [1, 2]}}, seeds=1), beside, store)
    assert tables(store, "removals")["name"].tolist() == ["b"]


def test_a_resumed_sweep_numbers_its_groups_as_the_spec_does_and_not_by_their_names(beside):
    spec = make_spec(removals={"groups": {"z": [0], "b": [4, 7], "a": [3]}}, seeds=2, estimators=[])
    _, store, _ = run_here(spec, beside)
    before, part = table_bytes(store), next(e.key for e in store.list("flowers/parts/"))
    store.delete(part)
    again = resolve_again(Sweep(store, "flowers"), Own(beside))
    heard = Heard()
    assert runs.run(again, store, heard.listener(), where=in_process).exit_code == 0
    assert [result.key for result in heard.results] == [part], "the shard that was lost, and no other"
    assert tables(store, "removals")["name"].tolist() == ["z", "b", "a"]
    assert table_bytes(store) == before
    assert list(again.spec.removals.groups) == ["z", "b", "a"], "what `fimo submit` sends to a cluster"


def test_a_group_for_each_label_runs(beside):
    report, store, _ = run_here(make_spec(removals={"by": "label"}, seeds=1), beside)
    assert report.exit_code == 0
    removals = tables(store, "removals")
    assert removals["name"].tolist() == ["label=0", "label=1", "label=2"]
    assert sum(len(x) for x in removals["indices"]) == 23
