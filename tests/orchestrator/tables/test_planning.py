"""The number of seeds solved for, and the rule that adds them, on simulated sweeps whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from fimo.orchestrator.tables.groups import SeedGroups
from fimo.orchestrator.tables.planning import fewest, missed, more_seeds, seeds_for_reliability, seeds_for_sem
from fimo.orchestrator.tables.reduce import Reduction, SeedBlock, reduce
from fimo.orchestrator.tables.reliability import Reliability

R, M = 20, 15


def reduction_of(effects: np.ndarray) -> Reduction:
    """Effects (seeds, R, T, m)."""
    _, r, t, m = effects.shape
    nothing = np.zeros((t, m))
    blocks = (SeedBlock(s, e, nothing, nothing, 1, ()) for s, e in enumerate(effects))
    stream, reduction = reduce(blocks, r, t, m)
    list(stream)
    return reduction


def trusted(effects: np.ndarray) -> Reliability:
    return Reliability(reduction_of(effects), SeedGroups(), np.ones(effects.shape[1], dtype=bool))


def settle(effects: np.ndarray, target: float, least: int = 4) -> int:
    """Where the rule stops, on a sweep whose seeds are drawn beforehand."""
    first, count = trusted(effects[:least]), least
    while True:
        more = more_seeds(first, trusted(effects[:count]), target, len(effects))
        if more is None:
            return count
        assert count < more <= min(2 * count, len(effects))
        count = more


def draw(rng: np.random.Generator, seeds: int, noise: float, shared: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    truth = rng.normal(size=(R, 1, M))
    own, baseline = rng.normal(size=(seeds, R, 1, M)), rng.normal(size=(seeds, 1, 1, M))
    return truth, truth + noise * (own + shared * baseline)


def ideal(truth: np.ndarray, noise: float, shared: float, target: float) -> int:
    power = (truth**2).sum(axis=(0, 1))
    of = R * noise**2 * (1 + shared**2)
    return fewest(lambda k: bool((power / (power + of / k)).mean() >= target)) or 0


@pytest.mark.parametrize(("noise", "shared"), [(1.0, 0.0), (1.0, 1.0), (1.5, 0.0)])
def test_the_rule_stops_within_a_fifth_of_the_ideal_number_of_seeds(noise, shared):
    rng, ratios = np.random.default_rng(0), []
    for _ in range(12):
        truth, effects = draw(rng, 120, noise, shared)
        ratios.append(settle(effects, 0.95) / ideal(truth, noise, shared, 0.95))
    assert np.mean(ratios) == pytest.approx(1, abs=0.1)
    assert np.abs(np.array(ratios) - 1).mean() < 0.2


def test_the_mean_that_it_stops_at_is_unbiased_over_200_sweeps():
    rng, errors, sizes, counts = np.random.default_rng(1), [], [], set()
    truth = rng.normal(size=(R, 1, M))
    for _ in range(200):
        effects = truth + 1.2 * rng.normal(size=(80, R, 1, M))
        count = settle(effects, 0.93)
        counts.add(count)
        error = effects[:count].mean(axis=0) - truth
        errors.append(error.mean())
        sizes.append((error * truth).mean())
    assert len(counts) > 3, "the rule must have had a choice"
    for values in (errors, sizes):
        assert abs(np.mean(values)) < 3 * np.std(values, ddof=1) / np.sqrt(200)
    # A bias of six thousandths of an effect would be seen.
    assert 3 * np.std(sizes, ddof=1) / np.sqrt(200) < 6e-3


def test_it_stops_where_nothing_is_to_be_had():
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(10, R, 1, M))
    assert settle(noise, 0.95) == 10, "at most as many as may be"
    assert more_seeds(trusted(noise[:1]), trusted(noise[:1]), 0.95, 10) is None, "one seed says nothing"
    assert settle(np.zeros((10, R, 1, M)), 0.95) == 4, "no effect at all"


def test_the_least_reliable_step_decides():
    rng = np.random.default_rng(3)
    truth = rng.normal(size=(R, 1, M))
    quiet, loud = (truth + s * rng.normal(size=(100, R, 1, M)) for s in (0.3, 1.2))
    assert settle(quiet, 0.95) < settle(loud, 0.95) == settle(np.concatenate([quiet, loud], axis=2), 0.95)


def test_seeds_for_a_reliability_and_for_a_standard_error():
    rng = np.random.default_rng(4)
    truth, effects = draw(rng, 40, 1.5, 0.5)
    of = trusted(effects)
    wanted = seeds_for_reliability(of, "baseline", 0, 0.9)
    assert wanted == pytest.approx(ideal(truth, 1.5, 0.5, 0.9), rel=0.15)
    trust = of.trust("baseline", 0)
    assert trust.reliability(wanted).mean() >= 0.9 > trust.reliability(wanted - 1).mean()
    keep = np.ones(R, dtype=bool)
    sem = np.sqrt(np.square(of._reduction.effects.sem()).mean())
    assert seeds_for_sem(of._reduction, keep, 0, sem) == 40
    assert seeds_for_sem(of._reduction, keep, 0, sem / 2) == 160
    assert seeds_for_sem(reduction_of(effects[:1]), keep, 0, 1.0) is None


def test_fewest_is_the_smallest_number_that_reaches():
    assert fewest(lambda k: k >= 37) == 37
    assert fewest(lambda k: True) == 1
    assert fewest(lambda k: False) is None


def test_a_target_that_was_missed_is_told_and_one_that_was_met_is_not():
    def rows(*reliabilities: float | None) -> list[dict]:
        return [
            {"measured": True, "adjust": "baseline", "step": step, "reliability": r}
            for step, r in enumerate(reliabilities, start=1)
        ]

    said = missed(rows(0.95, 0.63, 0.8), 8, 0.9, 8)
    assert said is not None
    assert "not reached at 2 of 3 steps, at step 2 it is 0.63, with 8 seeds" in said
    assert missed(rows(0.95, 0.91), 8, 0.9, 8) is None
    assert missed(rows(0.95, 0.89), 6, 0.9, 8) is None, "the rule takes the signal from the first seeds"
    assert "two removals and two whole seeds" in (missed(rows(None, None), 4, 0.9, 8) or "")
