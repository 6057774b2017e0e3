"""Slopes and intervals on simulated effects whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from fimo.orchestrator.tables.calibration import calibrate, coverage, fit, needed
from fimo.workers.errors import UsageError

NEW = 200
KINDS = ["normal", "proportional", "heavy", "shared"]


def simulated(seed, removals, m, kind="normal", spread=0.3):
    """(estimates, effects) of removals + NEW removals, and the slopes: sizes of removals and scales of evals differ."""
    rng = np.random.default_rng(seed)
    count = removals + NEW
    slope = 1 + spread * rng.normal(size=m)
    size = np.exp(rng.normal(size=(count, 1)))
    x = size * rng.normal(size=(count, m))
    noise = {
        "normal": lambda: 0.3 * rng.normal(size=x.shape),
        "proportional": lambda: (0.5 * np.abs(x) + 0.02) * rng.normal(size=x.shape),
        "heavy": lambda: 0.3 * rng.standard_t(2.2, size=x.shape),
        "shared": lambda: 0.3 * size * rng.standard_t(3, size=(count, 1)) * np.ones(m),
    }[kind]()
    scale = 10.0 ** rng.uniform(-6, 3, m)
    return x * scale, (slope * x + noise) * scale, slope


def inside(calibration, estimates, effects):
    _, low, high = calibration.effects(estimates)
    return float(((low <= effects) & (effects <= high)).mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("removals", "m"), [(30, 20), (60, 20), (40, 1)])
def test_intervals_cover_effects_that_they_have_not_seen(kind, removals, m):
    found = []
    for seed in range(40 if m > 1 else 120):
        x, a, _ = simulated(seed, removals, m, kind)
        found.append(inside(calibrate(x[:removals], a[:removals]), x[removals:], a[removals:]))
    assert 0.88 < np.mean(found) < 0.94


def test_another_level_is_another_share():
    found = []
    for seed in range(40):
        x, a, _ = simulated(seed, 60, 10)
        found.append(inside(calibrate(x[:60], a[:60], level=0.6), x[60:], a[60:]))
    assert 0.57 < np.mean(found) < 0.64


def test_intervals_widen_with_the_effect_if_residuals_do_and_only_then():
    x, a, _ = simulated(0, 77, 30, "proportional")
    calibration = calibrate(x[:77], a[:77])
    _, low, high = calibration.effects(np.stack([0.1 * calibration.fit.size, 10 * calibration.fit.size]))
    assert ((high - low)[1] > 5 * (high - low)[0]).all()
    x, a, _ = simulated(0, 77, 30, "normal")
    assert calibrate(x[:77], a[:77]).fit.growth < 0.1
    # Wider where it matters: large effects alone are covered too.
    x, a, _ = simulated(3, 77, 30, "proportional")
    calibration, new = calibrate(x[:77], a[:77]), slice(77, None)
    _, low, high = calibration.effects(x[new])
    large = np.abs(x[new]) > 2 * calibration.fit.size
    assert ((low <= a[new]) & (a[new] <= high))[large].mean() > 0.8


def test_slopes_are_those_of_plain_least_squares_shrunk_by_the_formula():
    x, a, _ = simulated(1, 12, 8, "heavy")
    x, a = x[:12], a[:12]
    found = fit(x, a)
    for e in range(8):
        b = float(np.linalg.lstsq(x[:, e : e + 1], a[:, e], rcond=None)[0][0])
        r = a[:, e] - b * x[:, e]
        v = 12 / 11 * float((x[:, e] ** 2 * r**2).sum() / (x[:, e] ** 2).sum() ** 2)
        assert found.own[e] == pytest.approx(b)
        assert found.variance[e] == pytest.approx(v)
        shrunk = (found.spread * b + v * found.common) / (found.spread + v)
        assert found.slope[e] == pytest.approx(min(max(shrunk, b - v**0.5), b + v**0.5))
    w = 1 / found.variance
    mean = (w * found.own).sum() / w.sum()
    q = (w * (found.own - mean) ** 2).sum()
    assert found.spread == pytest.approx(max(0, (q - 7) / (w.sum() - (w**2).sum() / w.sum())))
    w = 1 / (found.variance + found.spread)
    assert found.common == pytest.approx((w * found.own).sum() / w.sum())


def test_shrinking_comes_closer_to_the_truth_and_equal_slopes_become_one():
    own, shrunk = [], []
    for seed in range(20):
        x, a, slope = simulated(seed, 20, 30, "proportional", spread=0.1)
        found = fit(x[:20], a[:20])
        own.append(np.square(found.own - slope).mean())
        shrunk.append(np.square(found.slope - slope).mean())
    assert np.mean(shrunk) < 0.7 * np.mean(own)
    x, a, slope = simulated(0, 77, 30, spread=2.0)
    assert (slope < 0).any()
    assert np.abs(fit(x, a).slope - slope).max() < 0.05


def test_every_example_may_have_a_unit_of_its_own():
    x, a, slope = simulated(0, 77, 30)
    unit = 10.0 ** np.random.default_rng(0).uniform(-6, 6, 30)
    found = fit(x / unit, a)
    np.testing.assert_allclose(found.slope / unit, slope, atol=0.08)


def test_coverage_is_told_without_having_seen_the_effects():
    told, true, errors = [], [], []
    for seed in range(20):
        x, a, _ = simulated(seed, 45, 20, "heavy")
        share, error = coverage(x[:45], a[:45])
        told.append(share)
        errors.append(error)
        true.append(inside(calibrate(x[:45], a[:45]), x[45:], a[45:]))
    assert abs(np.mean(told) - np.mean(true)) < 0.02
    assert 0.5 < np.std(np.subtract(told, true)) / np.mean(errors) < 2


def test_too_few_removals_give_infinite_intervals_and_say_so():
    assert [needed(level) for level in (0.5, 0.9, 0.95)] == [1, 9, 19]
    x, a, _ = simulated(0, 9, 4)
    enough, few = calibrate(x[:9], a[:9]), calibrate(x[:8], a[:8])
    assert enough.line is None
    assert np.isfinite(enough.quantile).all()
    assert few.line == "8 removals are too few for intervals at 90%: that takes 9"
    effect, low, high = few.effects(x)
    assert np.isfinite(effect).all()
    assert (low == -np.inf).all()
    assert (high == np.inf).all()
    assert coverage(x[:9], a[:9]) is None
    with pytest.raises(UsageError, match="at least 2 removals"):
        calibrate(x[:1], a[:1])


def test_constant_estimates_zero_effects_and_perfect_fits_have_numbers():
    x, a, _ = simulated(0, 30, 6)
    x, a = x[:30], a[:30]
    x[:, 0] = 0  # no slope of its own
    x[:, 1] = 3.0  # constant
    a[:, 2] = 0
    a[:, 3] = 2 * x[:, 3]  # exact
    x[:, 4], a[:, 4] = 0, 0
    x[:, 5] *= 1e-100
    calibration = calibrate(x, a, np.full_like(a, 0.1))
    for values in (*calibration.effects(x), calibration.fit.slope, calibration.quantile):
        assert np.isfinite(values).all()
    assert calibration.fit.slope[0] == calibration.fit.common
    assert calibration.fit.slope[3] == pytest.approx(2, rel=1e-6)
    assert np.isfinite(coverage(x, a)).all()
    for nothing in (np.zeros((20, 3)), np.ones((20, 3))):
        for known in (np.zeros((20, 3)), np.ones((20, 3))):
            effect, low, high = calibrate(nothing, known).effects(nothing)
            assert (low <= effect).all()
            assert (effect <= high).all()
    with pytest.raises(UsageError, match="finite"):
        calibrate(np.full((20, 3), np.nan), np.zeros((20, 3)))


def test_the_gold_standards_own_noise_is_told():
    x, a, _ = simulated(0, 60, 5)
    residual = np.square(a[:60] - fit(x[:60], a[:60]).centre(x[:60])).mean(axis=0)
    sems = np.sqrt(residual / 2) * np.ones((60, 1))
    np.testing.assert_allclose(calibrate(x[:60], a[:60], sems).noise, 0.5)
    assert np.isnan(calibrate(x[:60], a[:60]).noise).all()


def test_pairs_in_another_order_or_scale_are_the_same_calibration():
    x, a, _ = simulated(2, 30, 4)
    one, other = calibrate(x[:30], a[:30]), calibrate(x[:30] * 7.0, a[:30] * 3.0)
    np.testing.assert_allclose(one.effects(x[:30])[2] * 3, other.effects(x[:30] * 7.0)[2], rtol=1e-9)
