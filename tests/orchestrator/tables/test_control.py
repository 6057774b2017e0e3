"""Control variates against what theory says of them, on arrays whose truth, noise and correlation are known."""

from __future__ import annotations

import numpy as np
import pytest

from fimo.orchestrator.tables.audit import audit
from fimo.orchestrator.tables.control import LEAST, control
from fimo.workers.errors import UsageError

R, M, DRAWS = 6, 5, 200
SIGMA, SCALE = 0.7, 3.0


def drawn(rng, rho, k, more, shared=False):
    """(truth, effects, own controls, other controls): the controls of another scale, and of another mean."""
    truth = rng.normal(size=(R, M))
    biased = rng.normal(size=(R, M)) * 5
    rows = 1 if shared else R
    noise = rng.normal(size=(k + more, rows, M)) * np.ones((1, R, 1))
    alone = rng.normal(size=(k, rows, M)) * np.ones((1, R, 1))
    effects = truth + SIGMA * (rho * noise[:k] + np.sqrt(1 - rho**2) * alone)
    controls = biased + SCALE * noise
    return truth, effects, controls[:k], controls[k:]


def errors(rho, k, more, shared=False, draws=DRAWS):
    """Of many draws: controlled mean − truth, plain mean − truth, and the squared standard error, (draws, R, M)."""
    rng, found = np.random.default_rng(0), []
    for _ in range(draws):
        truth, effects, own, others = drawn(rng, rho, k, more, shared)
        one = control(effects, own, others)
        found.append((one.mean - truth, effects.mean(axis=0) - truth, one.sem**2))
    return (np.stack(of) for of in zip(*found, strict=True))


def ratio(rho, k, more, freedom):
    """Variance of a controlled mean over that of a plain one (the module's formula)."""
    share = more / (more + k)
    return 1 - share * (rho**2 - (1 - rho**2) / (freedom - 2))


@pytest.mark.parametrize(("rho", "k", "more"), [(0.9, 5, 20), (0.0, 5, 20), (-0.6, 4, 4), (0.9, 12, 24)])
def test_the_mean_is_unbiased_the_variance_is_theorys_and_the_standard_error_is_honest(rho, k, more):
    controlled, _, squared_sem = errors(rho, k, more)
    wanted = ratio(rho, k, more, R * (k - 2))
    spread = np.sqrt(wanted * SIGMA**2 / k / controlled.size)
    assert abs(controlled.mean()) < 4 * spread
    # No pair is off either: the largest of 30 standardised means.
    assert np.abs(controlled.mean(axis=0)).max() < 4 * np.sqrt(wanted * SIGMA**2 / k / DRAWS)
    # 6,000 squares have a relative standard error of 2%, somewhat more for heavy tails.
    assert (controlled**2).mean() == pytest.approx(wanted * SIGMA**2 / k, rel=0.08)
    assert squared_sem.mean() == pytest.approx((controlled**2).mean(), rel=0.08)


def test_noise_that_removals_share_leaves_few_degrees_of_freedom():
    k, more = 8, 32
    controlled, plain, squared_sem = errors(0.8, k, more, shared=True, draws=4 * DRAWS)
    measured = (controlled**2).mean() / (plain**2).mean()
    assert measured == pytest.approx(ratio(0.8, k, more, k - 2), abs=0.08)
    assert measured > ratio(0.8, k, more, R * (k - 2)) + 0.02
    assert squared_sem.mean() == pytest.approx((controlled**2).mean(), rel=0.12)


def test_a_slope_over_all_seeds_would_be_biased_where_noise_is_skewed():
    """Guards the cross-fitting: effects that are a square of what the control sees."""
    rng, k, more = np.random.default_rng(1), 4, 16
    fair, naive = [], []
    for _ in range(2000):
        noise = rng.normal(size=(k + more, 1, 8))
        effects, own, others = noise[:k] ** 2 - 1, noise[:k], noise[k:]
        fair.append(control(effects, own, others).mean)
        e, c = effects - effects.mean(axis=0), own - own.mean(axis=0)
        slope = (e * c).sum(axis=(0, 1)) / (c * c).sum(axis=(0, 1))
        naive.append((effects - slope * (own - others.mean(axis=0))).mean(axis=0))
    errors = [np.std(of) / np.sqrt(np.size(of)) for of in (fair, naive)]
    assert abs(np.mean(fair)) < 4 * errors[0]
    assert abs(np.mean(naive)) > 8 * errors[1]


def test_a_seeds_slope_is_fitted_to_the_others_alone():
    rng = np.random.default_rng(2)
    _, effects, own, others = drawn(rng, 0.8, 5, 7)
    one = control(effects, own, others)
    groups = np.array_split(np.arange(7), 5)
    for s in range(5):
        kept = [t for t in range(5) if t != s]
        for m in range(M):
            e = effects[kept, :, m] - effects[kept, :, m].mean(axis=0)
            c = own[kept, :, m] - own[kept, :, m].mean(axis=0)
            share = len(groups[s]) / (len(groups[s]) + 1)
            slope = share * np.polyfit(c.ravel(), e.ravel(), 1)[0]
            # Centred by removal, the fit has no intercept.
            assert one.slopes[s, m] == pytest.approx(slope, rel=1e-9)
            expected = effects[s, :, m] - slope * (own[s, :, m] - others[groups[s]][:, :, m].mean(axis=0))
            assert one.effects[s, :, m] == pytest.approx(expected, rel=1e-9)


def test_a_control_that_is_the_truth_itself_leaves_the_noise_of_all_seeds_together():
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(40, R, M))
    one = control(noise[:8], noise[:8], noise[8:])
    assert one.slopes == pytest.approx(np.full((8, M), 0.8))
    assert one.mean == pytest.approx(noise.mean(axis=0))


def test_a_control_that_does_not_vary_changes_nothing():
    effects = np.random.default_rng(4).normal(size=(5, R, M))
    still = np.full((5, R, M), 0.1)
    one = control(effects, still, still)
    assert (one.effects == effects).all()
    assert (one.sem == one.plain_sem).all()
    # One seed alone varies: the others' slope is of nothing.
    still[2] = 7.0
    assert np.isfinite(control(effects, still, still).effects).all()
    assert (control(effects, still, still).slopes[2] == 0).all()


def test_controlled_effects_go_on_into_an_audit():
    """Were one mean of controls shared by all seeds, their spread would miss its noise, and the audit overrate them."""
    rng, k, r, m, rho = np.random.default_rng(5), 8, 12, 60, 0.95
    truth, noise, alone = rng.normal(size=(r, m)), rng.normal(size=(2 * k, r, m)), rng.normal(size=(k, r, m))
    effects = truth + 3 * (rho * noise[:k] + np.sqrt(1 - rho**2) * alone)
    one = control(effects, noise[:k], noise[k:])
    shared = effects - one.slopes[:, None] * (noise[:k] - noise[k:].mean(axis=0))
    assert shared.mean(axis=0) == pytest.approx(one.mean, abs=0.3)
    power, left = r * 1.0, r * 9 / k * ratio(rho, k, k, r * (k - 2))
    assert reliability(one.effects) == pytest.approx(power / (power + left), abs=0.04)
    assert reliability(shared) > power / (power + left) + 0.08


def reliability(effects):
    [row] = [r for r in audit(effects).reliability.to_pylist() if r["measured"] and r["adjust"] == "mean"]
    return row["reliability"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e, c, o: (e[:, :-1], c, o), "one size"),
        (lambda e, c, o: (e, c, o[:, :, :-1]), "one size"),
        (lambda e, c, o: (e[0], c[0], o), "one size"),
        (lambda e, c, o: (e * np.nan, c, o), "not finite"),
        (lambda e, c, o: (e, c, o * np.inf), "not finite"),
        (lambda e, c, o: (e[: LEAST - 1], c[: LEAST - 1], o), "4 seeds at least"),
        (lambda e, c, o: (e, c, o[:4]), "at least as many other seeds"),
    ],
)
def test_what_cannot_be_controlled_is_told_in_a_line(change, words):
    _, *arrays = drawn(np.random.default_rng(6), 0.5, 5, 5)
    with pytest.raises(UsageError, match=words) as caught:
        control(*change(*arrays))
    assert "\n" not in str(caught.value)
