"""Nonsense is said first: exploded further training, drowned effects, no ceiling."""

from __future__ import annotations

import numpy as np
import pytest

from fimo.orchestrator.tables.sanity import exploded, is_nonsense, warnings
from tests.support.small_sweep import make_spec, run_here

STEPS = (5, 10, 20)
RNG = np.random.default_rng(0)
EFFECTS = RNG.normal(size=(6, 3, 8))
FINE = np.zeros(3, dtype=bool)


def told(effects=EFFECTS, floor=0.0, beyond=FINE, ceilings=(0.9, 0.9, 0.9), seeds=4):
    return list(warnings(STEPS, effects, np.full((3, 8), floor), beyond, ceilings, seeds))


def test_a_sound_sweep_has_nothing_to_say():
    assert told() == []


def test_each_kind_is_told_with_its_steps_and_its_mend():
    beyond = FINE.copy()
    beyond[2] = True
    [line] = told(beyond=beyond)
    assert "nonsense at step 20" in line
    assert "learning rate" in line
    [line] = told(floor=100.0)
    assert "nothing to see at every step" in line
    assert "float64" in line
    [line] = told(ceilings=(0.9, None, None))
    assert "no ceiling at steps 10, 20" in line
    [line] = told(ceilings=(None, None, None), seeds=1)
    assert line.startswith("one seed")


def test_beyond_reason_is_measured_beside_g_itself():
    deltas = np.array([[1.0, -30.0], [0.0, -150.0]])
    assert exploded(deltas, 1.0).tolist() == [False, True]
    assert exploded(deltas, 0.1).tolist() == [True, True]
    assert not exploded(deltas, 0.0).any(), "an unknown scale condemns nothing"
    assert is_nonsense(np.ones(2, dtype=bool))
    assert not is_nonsense(np.array([True, False]))


@pytest.mark.parametrize("rate", [500.0, 1e4])
def test_a_sweep_at_a_senseless_learning_rate_says_so_and_fails(beside, rate):
    report, _, _ = run_here(make_spec(further_training={"optimizer": {"name": "sgd", "lr": rate}}), beside)
    first = report.gathered.warnings[0]
    assert first.startswith("nonsense at")
    if "every step" in first:
        assert report.exit_code == 1
        scores = report.gathered.tables["scores"].to_pylist()
        assert scores
        assert all(row["score"] is None for row in scores if row["seeds"] == 4)


def test_effects_that_are_the_same_for_every_removal_are_not_drowned():
    """Two removals of one index: constant, far above the floor, and `use float64` was the wrong advice."""
    constant = np.ones((2, 3, 8)) * 3e-4
    assert told(constant, floor=1e-8) == []
    assert "rounding drowns" in told(constant, floor=1e-3)[0]
    assert "rounding drowns" in told(np.zeros((2, 3, 8)))[0]
