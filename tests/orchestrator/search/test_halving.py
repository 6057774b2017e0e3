"""Asynchronous halving with decisions that were kept; no Ray is started."""

from __future__ import annotations

from types import SimpleNamespace

from fimo.orchestrator.search.tune import OBJECTIVE, RUNG, _Halving

RUNGS = (2, 4, 8)
VALUES = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 0.5, "e": 4.0}


def raced(order, kept=None):
    """Decisions by (name, rung), candidates reporting in an order, each as far as it may go."""
    noted = {}
    halving = _Halving(kept or {}, lambda name, rung, on: noted.__setitem__((name, rung), on), RUNGS)
    trials = {n: SimpleNamespace(trial_id=n, config={"name": n}, stub=False, is_finished=lambda: False) for n in VALUES}
    alive, said = dict(trials), {}
    for trial in trials.values():
        halving.on_trial_add(None, trial)
    for rung in RUNGS[:-1]:
        for name in [n for n in order if n in alive]:
            told = halving.on_trial_result(None, trials[name], {RUNG: rung, OBJECTIVE: VALUES[name]})
            said[name, rung] = told
            if told == "STOP":
                del alive[name]
    return said, noted


def test_stored_rungs_are_halved_as_they_were_whatever_comes_first():
    first, noted = raced("abcde")
    other, _ = raced("edcba")
    assert first != other, "else the order does not matter, and nothing is tested"
    assert set(noted.values()) == {True, False}
    again, anew = raced("edcba", kept=noted)
    assert again == first
    assert anew == {}


def test_the_best_of_a_rung_always_goes_on():
    for order in ("abcde", "edcba", "cadbe"):
        said, _ = raced(order)
        assert said["e", 2] == said["e", 4] == "CONTINUE"
