"""Choosing an estimator, ranks, and the loop that verifies the top, by plain Python and on simulated effects."""

from __future__ import annotations

import numpy as np
import pytest

from fimo.orchestrator.tables.agreement import cosine
from fimo.orchestrator.tables.calibration import calibrate
from fimo.orchestrator.tables.ranking import candidates, choose, order, rank_of, top

RNG = np.random.default_rng(0)
R, M = 20, 11
GOLD = RNG.normal(size=(R, M))
NO = np.zeros(M, dtype=bool)


def noisy(level, seed=1):
    return GOLD + level * np.random.default_rng(seed).normal(size=GOLD.shape)


def test_it_is_chosen_on_even_places_and_scored_on_odd_ones():
    even = np.arange(M) % 2 == 0
    good_on_even, good_on_odd = np.where(even, noisy(0.1), noisy(3)), np.where(even, noisy(3), noisy(0.1))
    ceilings = np.linspace(0.5, 1, M)
    chosen = choose([good_on_odd, good_on_even], GOLD, ceilings, NO)
    cosines = cosine(good_on_even, GOLD)
    assert chosen.place == 1
    assert chosen.score == pytest.approx(cosines[1::2].mean())
    assert chosen.normalised == pytest.approx(cosines[1::2].mean() / ceilings[1::2].mean())
    assert chosen.chosen_by == pytest.approx(cosines[0::2].mean() / ceilings[0::2].mean())
    assert (chosen.evals, chosen.same) == (5, False)


def test_one_evaluation_example_is_both_and_says_so():
    chosen = choose([noisy(3)[:, :1], noisy(0.1)[:, :1]], GOLD[:, :1], np.ones(1), NO[:1])
    assert (chosen.place, chosen.evals, chosen.same) == (1, 1, True)
    # Only odd places have a gold standard: they are chosen by and scored.
    chosen = choose([noisy(3), noisy(0.1)], GOLD, np.ones(M), np.arange(M) % 2 == 0)
    assert (chosen.place, chosen.evals, chosen.same) == (1, 5, True)


def test_what_is_undefined_is_left_out_and_nothing_defined_is_none():
    holes = noisy(0.5)
    holes[:, 3] = np.nan
    without = NO.copy()
    without[[0, 1]] = True
    chosen = choose([holes], GOLD, np.full(M, 0.8), without)
    kept = [5, 7, 9]
    assert chosen.score == pytest.approx(cosine(holes, GOLD)[kept].mean())
    assert chosen.evals == 3
    assert choose([holes, noisy(1)], GOLD, np.ones(M), ~NO) is None
    assert choose([np.zeros_like(GOLD)], GOLD, np.ones(M), NO) is None
    assert choose([], GOLD, np.ones(M), NO) is None


def test_an_estimator_that_is_all_but_undefined_does_not_win_by_one_example():
    lucky = np.full_like(GOLD, np.nan)
    lucky[:, :2] = GOLD[:, :2]
    assert choose([lucky, noisy(1)], GOLD, np.ones(M), NO).place == 1
    assert choose([lucky], GOLD, np.ones(M), NO).place == 0


def test_ceilings_that_are_zero_or_unknown_normalise_nothing():
    for ceilings in (np.zeros(M), np.full(M, np.nan)):
        chosen = choose([noisy(3), noisy(0.1)], GOLD, ceilings, NO)
        assert chosen.place == 1
        assert chosen.normalised is None
        assert chosen.score > 0.9


def test_ranks_are_plain_sorting_with_ties_by_index():
    values = np.array([0.0, 2.0, -1.0, 2.0, 0.0])
    assert order(values).tolist() == [1, 3, 0, 4, 2]
    assert rank_of(values).tolist() == [3, 1, 5, 2, 4]
    many = RNG.integers(-3, 3, size=(40, 5)).astype(float)
    for column, ranks in zip(many.T, rank_of(many).T, strict=True):
        expected = sorted(range(40), key=lambda i: (-column[i], i))
        assert [int(np.flatnonzero(ranks == r + 1)[0]) for r in range(40)] == expected
    helpful, harmful = top(values, 2)
    assert (helpful.tolist(), harmful.tolist()) == ([1, 3], [2, 0])
    assert [len(part) for part in top(values, 9)] == [5, 5]


def test_must_and_might_on_an_example_by_hand():
    effect = np.array([5.0, 4.0, 3.0, 2.9, 0.0, -1.0, -2.0, -2.5, 1.0])
    low, high = effect - 0.5, effect + 0.5
    low[4], high[4] = -0.1, 4.5  # skewed: reaches far
    verified = np.full(9, np.nan)
    verified[1], verified[6] = 3.2, -3.0
    found = candidates(effect, low, high, verified, 2)
    # Helpful: 0 (5.0), 1 (3.2 verified); harmful: 6 (−3.0 verified), 7 (−2.5).
    assert found.must.tolist() == [0, 7]
    # The second most helpful is at 3.2: 2 falls 0.2 short of 0.5, 3 falls 0.3 short, 4 falls 3.2 short of 4.5.
    assert found.might.tolist() == [2, 3, 4]
    done = candidates(effect, low, high, effect, 2)
    assert (done.must.tolist(), done.might.tolist()) == ([], [])


def test_infinite_and_empty_intervals_have_an_order():
    effect, nothing = np.array([3.0, 1.0, 2.0, -1.0]), np.full(4, np.nan)
    far = np.full(4, np.inf)
    assert candidates(effect, -far, far, nothing, 1).might.tolist() == [2, 1]
    assert candidates(effect, effect, effect, nothing, 1).might.tolist() == []
    assert candidates(effect, effect, effect, nothing, 0).must.tolist() == []
    assert sorted(candidates(effect, -far, far, nothing, 9).must.tolist()) == [0, 1, 2, 3]


def energy_like(seed, n=691, m=3):
    """Effects of heavy tails, and estimates that correlate with them at about 0.95."""
    rng = np.random.default_rng(seed)
    size = np.exp(0.7 * rng.normal(size=(n, 1)))
    effects = size * rng.normal(size=(n, m))
    noise = np.sqrt(np.abs(effects) + 0.1) * rng.normal(size=(n, m))
    return effects + noise * effects.std() / noise.std() / 3, effects


def test_verifying_must_ends_with_the_true_top_of_all_that_was_verified():
    before, after, more, cost = [], [], [], []
    for seed in range(5):
        estimates, effects = energy_like(seed)
        swept = np.linspace(0, 690, 40).astype(int)
        calibration = calibrate(estimates[swept], effects[swept])
        effect, low, high = (values[:, 0] for values in calibration.effects(estimates))
        verified = np.full(691, np.nan)
        verified[swept] = effects[swept, 0]

        def recall(known, effect=effect, effects=effects):
            values = np.where(np.isnan(known), effect, known)
            pairs = zip(top(values, 10), top(effects[:, 0], 10), strict=True)
            return np.mean([len(set(a) & set(b)) / 10 for a, b in pairs])

        before.append(recall(np.full(691, np.nan)))
        rounds = 0
        while len(must := candidates(effect, low, high, verified, 10).must):
            assert np.isnan(verified[must]).all()
            verified[must] = effects[must, 0]
            rounds += 1
            assert rounds < 30
        for part in top(np.where(np.isnan(verified), effect, verified), 10):
            assert not np.isnan(verified[part]).any()
        after.append(recall(verified))
        cost.append(int((~np.isnan(verified)).sum()) - 40)
        might = candidates(effect, low, high, verified, 10).might[:100]
        verified[might] = effects[might, 0]
        more.append(recall(verified))
    assert np.mean(before) < np.mean(after) <= np.mean(more)
    assert np.mean(more) > 0.9
    assert max(cost) < 60
