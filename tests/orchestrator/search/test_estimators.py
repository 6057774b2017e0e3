from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run.estimate_block import estimate_whole
from fimo.orchestrator.search import estimators as searching
from fimo.orchestrator.search.estimators import Listener, search_estimators
from fimo.orchestrator.search.tabled import matched_dampings, search_table
from fimo.orchestrator.spec.spec import parse
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.remove import contents, remove
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import FimoError, UsageError
from tests.orchestrator.search.places import Here
from tests.support.small_sweep import OWN, SPEC, make_spec, run_here

DAMPINGS = {"from": 1e-2, "to": 1e2, "count": 5}
SEARCH = {"estimators": ["grad_dot", {"name": "cg", "damping": DAMPINGS}]}
QUIET = Listener(lambda of, done: None, lambda name: None, lambda line: None)


def spec_of(search=None, **changes):
    values = {**SPEC, **changes, "search": search or SEARCH}
    return parse(values)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A sweep that has been run, in memory, and the folder of its spec."""
    folder = tmp_path_factory.mktemp("search") / "spec"
    shutil.copytree(OWN, folder)
    return run_here(make_spec(), folder)[1], folder


@pytest.fixture
def sweep(ran):
    """A copy of it, to be searched on."""
    store = copy_of(ran[0])
    return SimpleNamespace(store=store, beside=ran[1], sweep=Sweep(store, "flowers"))


def copy_of(store):
    other = MemoryStore()
    for entry in store.list(""):
        other.put(entry.key, store.get(entry.key))
    return other


def search(sweep, here=None, spec=None, stop=lambda: None):
    spec = spec or spec_of()
    here = here or Here()
    return search_estimators(resolve(spec, sweep.beside), sweep.store, spec.search, here, QUIET, stop), here


def winners(found):
    best = {step: found.tried[place].point for step, place in found.best.items()}
    return best, found.tried[found.overall].point, [one.rows for one in found.tried]


def test_halves_joined_are_the_score_of_the_sweep_s_own_table(sweep):
    """grad_dot is an estimator of the sweep too: means over both halves, weighted, are its score there."""
    found, _ = search(sweep)
    from fimo.orchestrator.run.written import read_table

    rows = [
        row
        for row in read_table(sweep.sweep, "scores").to_pylist()
        if (row["estimator"], row["metric"], row["adjust"], row["seeds"]) == ("grad_dot", "cosine", "baseline", 4)
    ]
    assert len(rows) == len(found.tried[0].rows) >= 3
    for row, mine in zip(rows, found.tried[0].rows, strict=True):
        assert row["step"] == mine.step
        total = mine.searched * mine.searched_evals + mine.score * mine.evals
        assert total / (mine.searched_evals + mine.evals) == pytest.approx(row["score"], abs=1e-12)
        assert mine.searched_evals + mine.evals == row["evals"]


def test_a_point_s_values_are_the_blocks_of_the_same_estimator(sweep):
    resolved = resolve(make_spec(), sweep.beside)
    done = estimate_whole(sweep.sweep, resolved.manifest, None, "grad_dot", "{}")
    from fimo.orchestrator.run.blocks import assemble, listed_blocks, value_digest

    (named, entries), *_ = listed_blocks(sweep.sweep, resolved.manifest)
    digest = value_digest(resolved.manifest, *named)
    blocks = [sweep.sweep.read_block(entry.key, digest, *named) for entry in entries]
    np.testing.assert_array_equal(assemble(blocks, resolved.manifest), done.matrix.values)


def test_an_interrupted_search_goes_on_with_the_same_best_and_computes_nothing_twice(sweep):
    whole, _ = search(SimpleNamespace(store=copy_of(sweep.store), beside=sweep.beside))
    part, first = search(sweep, Here(most=3), stop=lambda: None)
    assert len(part.tried) == len(first.ran) == 3
    rest, second = search(sweep)
    assert not {name for name, _ in first.ran} & set(second.given)
    assert len(second.ran) == 3
    assert winners(rest) == winners(whole)
    again, third = search(sweep)
    assert (third.given, again.computed, winners(again)) == ([], 0, winners(whole))


def test_a_signal_ends_the_search_incomplete(sweep):
    asked = iter([None, None])
    found, here = search(sweep, stop=lambda: next(asked, "stopped by SIGINT"))
    assert len(here.ran) == 1
    assert (found.stopped, found.exit_code) == ("stopped by SIGINT", 3)


@pytest.mark.parametrize("harm", ["torn", "altered", "foreign", "of another point"])
def test_an_object_that_does_not_verify_is_computed_anew(sweep, harm):
    whole, _ = search(sweep)
    listed = [entry.key for entry in sweep.store.list("flowers/search/")]
    assert len(listed) == 6
    data = sweep.store.get(listed[0])
    bad = {
        "torn": data[:-20],
        "altered": data.replace(b'"searched_evals"', b'"searched_Evals"', 1),
        "foreign": b'{"rows": []}',
        "of another point": sweep.store.get(listed[1]),
    }[harm]
    assert bad != data
    sweep.store.put(listed[0], bad)
    again, here = search(sweep)
    assert len(here.ran) == 1
    assert winners(again) == winners(whole)
    assert winners(search(sweep)[0]) == winners(whole)


def test_more_seeds_or_another_metric_or_step_are_another_search(sweep):
    search(sweep)
    assert len(search(sweep, spec=spec_of({**SEARCH, "metric": "spearman"}))[1].ran) == 6
    assert len(search(sweep, spec=spec_of({**SEARCH, "steps": [3]}))[1].ran) == 6
    run_here(make_spec(seeds=5), sweep.beside, sweep.store)
    assert len(search(sweep, spec=spec_of(seeds=5))[1].ran) == 6
    # Which estimators the sweep itself has moves no score.
    run_here(make_spec(seeds=5, estimators=["grad_cos"]), sweep.beside, sweep.store)
    assert search(sweep, spec=spec_of(seeds=5, estimators=["grad_cos"]))[1].ran == []


def test_a_sweep_that_has_not_been_run_is_refused_with_the_line_to_type(sweep):
    empty = SimpleNamespace(store=MemoryStore(), beside=sweep.beside)
    with pytest.raises(UsageError, match=r"no sweep 'flowers' in .*: run it first, `fimo run SPEC --store STORE`"):
        search(empty)
    with pytest.raises(UsageError, match=r"lacks 5 of its 25 cells: run it first, `fimo run"):
        search(sweep, spec=spec_of(seeds=5))
    with pytest.raises(UsageError, match="is another sweep of this name"):
        search(sweep, spec=spec_of(further_training={**SPEC["further_training"], "batch_size": 4}))


def test_a_step_that_is_not_recorded_is_refused_with_the_nearest(sweep):
    with pytest.raises(UsageError, match=r"step 4 is not recorded \(did you mean 3\?\)"):
        search(sweep, spec=spec_of({**SEARCH, "steps": [4]}))


def test_a_point_that_cannot_be_had_is_told_and_never_wins(sweep, monkeypatch):
    real = searching.estimate_whole

    def broken(*given):
        if given[3] == "grad_dot":
            raise searching.CannotEstimateError("it does not apply")
        return real(*given)

    monkeypatch.setattr(searching, "estimate_whole", broken)
    found, _ = search(sweep)
    assert found.tried[0].failed == "it does not apply"
    assert 0 not in {found.overall, *found.best.values()}
    assert found.exit_code == 0


def test_a_bad_part_is_told_and_nothing_is_scored_against_the_rest(sweep):
    key = next(entry.key for entry in sweep.store.list("flowers/parts/"))
    sweep.store.put(key, sweep.store.get(key)[:-100])
    with pytest.raises(FimoError, match="computes it again"):
        search(sweep)


def test_removing_the_sweep_removes_what_was_searched(sweep):
    search(sweep)
    assert list(sweep.store.list("flowers/search/"))
    remove(sweep.sweep, contents(sweep.sweep))
    assert not list(sweep.store.list("flowers/"))


def test_the_table_has_a_row_for_each_point_and_step_and_marks_the_best(sweep):
    found, _ = search(sweep)
    manifest = resolve(spec_of(), sweep.beside).manifest
    rows = search_table(found, manifest).to_pylist()
    assert len(rows) == 6 * len(found.steps)
    for step in found.steps:
        here = [row for row in rows if row["step"] == step]
        [best] = [row for row in here if row["best"]]
        assert best["searched"] == max(row["searched"] for row in here)
        # Plain SGD at 0.1: t steps go 0.1 t along a constant gradient.
        assert best["matched"] == pytest.approx(1 / (0.1 * step))
    assert sum(row["best_overall"] for row in rows) == len(found.steps)
    clipped = replace(manifest, spec=make_spec(further_training={"clip_norm": 1.0}))
    assert matched_dampings(clipped, [3]) == [None]
    adam = replace(manifest, spec=make_spec(further_training={"optimizer": {"name": "adam"}}))
    assert matched_dampings(adam, [3]) == [None]


def test_keys_of_points_rungs_and_decisions_are_apart():
    of = ("s", "d" * 64, "p" * 64)
    every = {keys.search(*of), keys.search(*of, 2), keys.search(*of, 4), keys.search(*of, 2, decision=True)}
    assert len(every) == 4
    assert all(key.startswith(keys.search("s", "d" * 64)) for key in every)
