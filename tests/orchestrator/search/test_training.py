from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.search.candidates import candidates_of
from fimo.orchestrator.search.estimators import Listener
from fimo.orchestrator.search.records import Records
from fimo.orchestrator.search.tabled import training_table
from fimo.orchestrator.search.training import FIRST, Rung, rungs_of, search_training, winner_of
from fimo.orchestrator.spec.spec import parse
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables.worth import NOTHING, UNDER, VANISHES, VANISHING, Worth, fault_of, objective
from fimo.workers.errors import UsageError
from tests.orchestrator.search.places import Here
from tests.support.small_sweep import OWN, SPEC

QUIET = Listener(lambda of, done: None, lambda name: None, lambda line: None)


def worth(reliability=0.9, seconds=1.0, fault=None, step=8):
    return Worth(step, reliability, 0.1, 0.1, 0.0, seconds, fault)


def test_a_vanishing_or_drowned_candidate_never_wins_however_reliable_and_cheap():
    assert fault_of(False, False, 0.0, VANISHING / 2, 1.0) == VANISHES
    assert fault_of(False, False, 0.9, 1.0, 1.0) == UNDER
    assert fault_of(False, False, None, 1.0, 1.0) == UNDER
    assert fault_of(True, False, 0.0, 1.0, 1.0) == "diverged"
    assert fault_of(False, True, 0.0, 1.0, 1.0) == "exploded"
    assert fault_of(False, False, 0.0, 2 * VANISHING, 1.0) is None
    for fault in (VANISHES, UNDER, "diverged", "exploded"):
        perfect = Rung(None, 8, (worth(1.0, 1e-6, fault),), "cpu")
        poor = Rung(None, 2, (worth(0.1, 5.0),), "cpu")
        assert objective(perfect.rows, 8) == NOTHING < objective(poor.rows, 2)
        assert winner_of([perfect, poor]) == (1, 8)
        assert winner_of([perfect]) is None


def test_the_winner_is_the_best_of_those_with_the_most_seeds_at_its_best_step():
    last = [
        Rung(None, 2, (worth(1.0, 0.1),), "cpu", stopped=True),
        Rung(None, 8, (worth(0.9, 1.0, step=4), worth(0.95, 1.01, step=8)), "cpu"),
        Rung(None, 8, (worth(0.5, 1.0),), "cpu"),
    ]
    assert winner_of(last) == (1, 8)
    assert objective(last[1].rows, 8) == pytest.approx(0.95 / (1.01 * 8))


def test_rungs_double_up_to_the_most():
    assert rungs_of(2) == (2,)
    assert rungs_of(8) == (2, 4, 8)
    assert rungs_of(9) == (2, 4, 8, 9)


def spec_of(**search):
    section = {"lr": [0.1, 0.02, 1e-9], "seeds": 4, **search}
    return parse({**SPEC, "search": {"further_training": section}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "spec"
    shutil.copytree(OWN, folder)
    return folder


def search(store, folder, here=None, spec=None, stop=lambda: None):
    spec, here = spec or spec_of(), here or Here()
    return search_training(resolve(spec, folder), store, spec.search.further_training, here, QUIET, stop), here


@pytest.fixture(scope="module")
def whole(folder):
    store = MemoryStore()
    found, here = search(store, folder)
    return SimpleNamespace(store=store, found=found, here=here)


def copy_of(store):
    other = MemoryStore()
    for entry in store.list(""):
        other.put(entry.key, store.get(entry.key))
    return other


def told(found):
    return [(one.candidate.lr, one.seeds, one.rows, one.stopped) for one in found.last], found.winner


def test_a_learning_rate_near_0_is_told_and_not_the_best(whole):
    found = whole.found
    assert [one.candidate.lr for one in found.last] == [0.1, 0.02, 1e-9]
    assert {one.seeds for one in found.last} == {4}
    assert all(row.fault is not None for row in found.last[2].rows)
    assert found.winner is not None
    assert found.winner[0] != 2
    assert found.exit_code == 0
    table = training_table(found, found.last[0].candidate.manifest).to_pylist()
    assert len(table) == 3 * len(found.last[0].rows)
    assert [(row["lr"], row["step"]) for row in table if row["best"]] == [
        (found.last[found.winner[0]].candidate.lr, found.winner[1])
    ]


def test_the_first_rung_is_trained_in_shared_stacks_and_is_each_candidate_s_own(whole, folder):
    """The parts of a candidate that was trained beside others are those of its own sweep."""
    sweep, alone = Sweep(whole.store, "flowers"), MemoryStore()
    search(alone, folder, spec=spec_of(lr=[0.02], seeds=2))
    [one] = candidates_of(resolve(spec_of(lr=[0.02]), folder), spec_of(lr=[0.02]).search.further_training)
    assert whole.here.given[0] == "0", "the group comes first"
    compared = 0
    for item in Sweep(alone, "flowers").list_parts(one.name):
        own, shared = Sweep(alone, "flowers").read_part(item.key, one.manifest), sweep.read_part(item.key, one.manifest)
        assert shared.provenance["engine"]["rates_together"] == 3
        np.testing.assert_allclose(shared.deltas, own.deltas, rtol=1e-5, atol=2e-6)
        compared += 1
    assert compared == FIRST * 3, "two seeds of five removals, two at a time"


def test_a_search_that_is_begun_again_trains_nothing_and_says_the_same(whole, folder):
    again, here = search(copy_of(whole.store), folder)
    assert (here.given, again.computed) == ([], 0)
    assert told(again) == told(whole.found)


def test_an_interrupted_search_goes_on_from_its_rungs(folder):
    store = MemoryStore()
    asked = iter([None] * 4)
    part, first = search(store, folder, stop=lambda: next(asked, "stopped by SIGTERM"))
    assert part.exit_code == 3
    before = {entry.key for entry in store.list("flowers/parts/")}
    done = {(n, r) for n, r in first.ran if n != "0"}
    rest, _ = search(store, folder)
    assert rest.exit_code == 0
    assert rest.computed == 6 - len(done)
    assert before <= {entry.key for entry in store.list("flowers/parts/")}


def test_a_torn_rung_is_reduced_anew_from_its_parts(whole, folder):
    store = copy_of(whole.store)
    keys = [e.key for e in store.list("flowers/search/") if "decision" not in e.key]
    assert len(keys) == 6
    store.put(keys[0], store.get(keys[0])[:-9])
    parts = [e.key for e in store.list("flowers/parts/")]
    again, _ = search(store, folder)
    assert again.computed == 1
    assert told(again) == told(whole.found)
    assert [e.key for e in store.list("flowers/parts/")] == parts


def test_a_candidate_that_was_given_up_stays_so(whole, folder):
    store = copy_of(whole.store)
    of = whole.found.last[1].candidate.name
    digest = json.loads(store.get(next(e.key for e in store.list("flowers/search/"))))["of"][0]
    records = Records(Sweep(store, "flowers"), digest)
    records.write(of, {"goes_on": False}, 2, decision=True)
    again, here = search(store, folder)
    assert here.given == []
    assert (again.last[1].seeds, again.last[1].stopped) == (2, True)


def test_a_removal_mode_that_the_model_does_not_have_is_refused_in_one_line(folder):
    spec = parse(
        {
            **SPEC,
            "further_training": {**SPEC["further_training"], "removal_mode": "reweight", "removal_weight": 2.0},
            "search": {"further_training": {"removal_mode": ["reweight", "drop"]}},
        }
    )
    with pytest.raises(UsageError, match=r"search.further_training, sgd in drop mode: removal_mode drop takes"):
        search(MemoryStore(), folder, spec=spec)
