"""The noise floor by witnesses: its closed form on plain arrays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fimo.orchestrator.tables.floor import Floor, Pair, measured

T, M = 3, 5
NAMES = ((1,), (4, 7), (9,), (12,))
NONE = np.zeros((T, M))


def floor(given: list[Pair], second: np.ndarray, cells: int = 0) -> Floor:
    return measured(given).floor(second, cells)


def pairs(seeds: int, removals: int = 4, common: float = 0.0, baseline: float = 0.0, m: int = M) -> list[Pair]:
    """Differences = own noise of size 1 + ``common`` of the removal + ``baseline`` of the seed."""
    rng = np.random.default_rng(0)
    shared = common * rng.normal(size=(removals, T, m))
    found = []
    for _ in range(seeds):
        sweep = rng.normal(size=(removals, T, m)) * 1e3
        noise = rng.normal(size=sweep.shape) + shared + baseline * rng.normal(size=(1, T, m))
        found.append(Pair(NAMES[:removals], sweep, sweep + noise))
    return found


def test_the_noise_of_one_effect_is_the_root_mean_square_difference_by_step_and_example():
    given = pairs(3)
    d = np.concatenate([p.witness - p.sweep for p in given])
    got = floor(given, NONE)
    assert (got.measured, got.witnesses) == (True, 12)
    np.testing.assert_allclose(got.one["baseline"], np.sqrt((d**2).mean(axis=0)), rtol=1e-12)
    np.testing.assert_allclose(got.of_mean(1), got.one["baseline"], rtol=1e-12)


def test_centred_noise_is_the_unbiased_variance_over_the_removals_of_a_seed():
    given = pairs(3, baseline=50.0)
    variances = [(p.witness - p.sweep).var(axis=0, ddof=1) for p in given]
    np.testing.assert_allclose(floor(given, NONE).one["mean"], np.sqrt(np.mean(variances, axis=0)), rtol=1e-8)


def test_the_part_that_seeds_have_in_common_is_the_mean_product_over_pairs_and_does_not_average_out():
    given = pairs(4, common=2.0)
    d = [p.witness - p.sweep for p in given]
    got = floor(given, NONE)
    product = np.mean([(a * b).mean(axis=(0, 2)) for a, b in itertools.combinations(d, 2)], axis=0)
    share = product / np.mean([(a * a).mean(axis=(0, 2)) for a in d], axis=0)
    assert (share > 0.3).all()
    square = got.one["baseline"] ** 2
    np.testing.assert_allclose(got.common["baseline"], share[:, None] * square, rtol=1e-10)
    np.testing.assert_allclose(got.of_mean(7) ** 2, square * (share[:, None] + (1 - share[:, None]) / 7), rtol=1e-10)


def test_many_witnesses_find_what_they_were_drawn_with():
    """Own noise 1, common 2, baseline 3: variances 1 + 4 + 9 of one effect, 4 of it common; centred 1 + 4 and 4."""
    got = floor(pairs(60, common=2.0, baseline=3.0, m=400), NONE[:, :1])
    root = {adjust: np.sqrt((one**2).mean()) for adjust, one in got.one.items()}
    assert root["baseline"] ** 2 == pytest.approx(14, rel=0.1)
    assert root["mean"] ** 2 == pytest.approx(5, rel=0.1)
    for adjust in ("baseline", "mean"):
        assert got.common[adjust].mean() == pytest.approx(4, rel=0.1)
        assert (got.of_mean(10**9, adjust) ** 2).mean() == pytest.approx(4, rel=0.1)


def test_independent_noise_averages_out():
    got = floor(pairs(60, m=400), NONE[:, :1])
    np.testing.assert_allclose((got.of_mean(16) ** 2).mean(), 1 / 16, rtol=0.15)


def test_one_removal_has_nothing_to_be_centred_over_and_one_seed_nothing_in_common():
    got = floor(pairs(1, removals=1), NONE)
    np.testing.assert_array_equal(got.one["mean"], got.one["baseline"])
    for adjust in ("baseline", "mean"):
        np.testing.assert_array_equal(got.common[adjust], 0)
        np.testing.assert_allclose(got.of_mean(4, adjust), got.one["baseline"] / 2, rtol=1e-12)


def test_second_baselines_are_a_lower_bound_and_the_fallback():
    second = np.full((T, M), 0.8)
    alone = floor([], second)
    assert (alone.measured, alone.witnesses) == (False, 0)
    np.testing.assert_allclose(alone.of_mean(4, "mean"), 0.4, rtol=1e-12)
    own = floor(pairs(2), NONE).one["baseline"]
    assert (own < 0.8).any()
    assert (own > 0.8).any()
    np.testing.assert_array_equal(floor(pairs(2), second).one["baseline"], np.maximum(own, 0.8))


def test_what_diverged_or_is_missing_is_no_witness():
    given = pairs(2)
    given[0].sweep[1, 2] = np.nan
    given[1].witness[:, 0, 3] = np.nan
    d = np.stack([p.differences for p in given])
    assert np.isnan(d[0, 1, 2]).all()
    assert np.isnan(d[1, :, 0]).all()
    assert np.isnan(d).sum() == 5 * M
    got = floor(given, NONE)
    np.testing.assert_allclose(got.one["baseline"], np.sqrt(np.nanmean(d**2, axis=(0, 1))), rtol=1e-12)
    # At the first step one seed is left, so that nothing can be told to be common.
    assert (got.common["baseline"][0] == 0).all()
    given[0].sweep[:, 0] = np.nan
    lost = floor(given, np.full((T, M), 1e-3))
    np.testing.assert_array_equal(lost.one["baseline"][0], 1e-3)
    np.testing.assert_array_equal(lost.one["mean"][0], 1e-3)
    assert not floor([Pair(NAMES, np.full((4, T, M), np.nan), given[1].witness)], NONE).measured


def test_seeds_are_compared_on_the_removals_that_both_have():
    whole, part = pairs(2, common=3.0)
    part = Pair(NAMES[1:3], part.sweep[1:3], part.witness[1:3])
    a, b = whole.differences, part.differences
    products = (a[1:3] * b).mean(axis=(0, 2))
    squares = ((a**2).sum(axis=(0, 2)) + (b**2).sum(axis=(0, 2))) / (6 * M)
    got = floor([whole, part], NONE)
    share = np.clip(products / squares, 0, 1)
    np.testing.assert_allclose(got.common["baseline"], share[:, None] * got.one["baseline"] ** 2, rtol=1e-10)
    centred = 2 * (a[1:3] - a[1:3].mean(axis=0)) * (b - b.mean(axis=0))
    product, square = centred.mean(axis=(0, 2)), (got.one["mean"] ** 2).mean(axis=1)
    expected = np.clip(product / square, 0, 1)[:, None] * got.one["mean"] ** 2
    np.testing.assert_allclose(got.common["mean"], expected, rtol=1e-10)


def with_moved(rng: np.random.Generator, seldom: float, often: float = 20.0, size: float = 50.0, m: int = 30) -> Pair:
    """One witness and its baseline, six moved cells and theirs: rounding of size 1, and seldom of ``size``."""
    steps = (24, 48, 72, 96)

    def run(usual: float, rate: float) -> np.ndarray:
        hit = (rng.random((len(steps), 1)) < rate * np.array([0.25, 0.5, 0.75, 1])[:, None]).astype(float)
        return usual * rng.normal(size=(len(steps), m)) + size * hit * rng.normal(size=(len(steps), m))

    runs = np.stack([run(1.0, seldom) for _ in range(2)])
    moved = np.stack([run(often, min(1.0, often * seldom)) for _ in range(7)])
    sweep = rng.normal(size=(1, len(steps), m))
    return Pair(NAMES[:1], sweep, sweep + (runs[:1] - runs[1:]), runs, moved, steps)


def test_what_rounding_does_seldom_is_seen_in_moved_runs():
    """A hundredth of the runs is off by 50 at the last step: 7 an effect (root mean square); witnesses say 1."""
    rng, none = np.random.default_rng(1), np.zeros((4, 1))
    found = [floor([with_moved(rng, 0.01)], none, 1000) for _ in range(200)]
    last = np.array([np.sqrt(np.square(f.one["baseline"][-1]).mean()) for f in found])
    true = np.sqrt(1 + 2 * 0.01 * 50**2)
    assert ((last > true / 3) & (last < 3 * true)).mean() > 0.75
    assert np.median([np.sqrt(np.square(f.one["mean"][-1]).mean()) for f in found]) < np.median(last)


def test_what_never_happens_is_not_made_up_from_moved_runs():
    rng, none = np.random.default_rng(2), np.zeros((4, 1))
    found = [floor([with_moved(rng, 0.0)], none, 1000) for _ in range(50)]
    last = np.array([np.sqrt(np.square(f.one["baseline"][-1]).mean()) for f in found])
    assert (last > 0.4).all()
    assert (last < 2).all()


def test_where_every_cell_has_a_witness_nothing_is_expected_beyond_them():
    pair = with_moved(np.random.default_rng(3), 0.01)
    alone = Pair(pair.removals, pair.sweep, pair.witness)
    np.testing.assert_allclose(
        floor([pair], np.zeros((4, 1)), 1).one["baseline"], floor([alone], np.zeros((4, 1))).one["baseline"], rtol=1e-12
    )
