"""Synthetic ground truths whose noise is known: ceilings, intervals, extrapolation, significance against the truth."""

from __future__ import annotations

import numpy as np
import pytest

import fimo
from fimo.orchestrator.tables.audit import Audit, audit
from fimo.workers.errors import UsageError

R, M = 50, 50


def draw(rng, seeds, noise=1.0, shared=0.0, uneven=0.0, r=R, m=M):
    """The truth (R, m), and effects (seeds, R, m); ``shared``: a baseline's noise; ``uneven``: over examples."""
    truth = rng.normal(size=(r, m))
    size = noise * np.exp(uneven * rng.normal(size=m))
    own, baseline = rng.normal(size=(seeds, r, m)), rng.normal(size=(seeds, 1, m))
    return truth, truth + size * (own + shared * baseline), size


def row(found: Audit, name: str, metric: str = "cosine", adjust: str = "baseline") -> dict:
    chosen = [
        r
        for r in found.scores.to_pylist()
        if (r["estimator"], r["metric"], r["adjust"], r["seeds"]) == (name, metric, adjust, found.seeds)
    ]
    return chosen[0]


@pytest.mark.parametrize("adjust", ["baseline", "mean"])
@pytest.mark.parametrize(
    ("noise", "shared", "uneven"), [(1, 0, 0), (3, 0, 0), (1, 1, 0), (1, 3, 0), (1, 0, 1), (3, 0, 1), (1, 1, 1)]
)
def test_a_perfect_estimate_has_a_normalised_score_of_1(noise, shared, uneven, adjust):
    rng = np.random.default_rng(1)
    # A baseline's noise three times that of a removal is one number an example: fifty examples tell little of it.
    times = 4 if shared > 1 and adjust == "baseline" else 1
    for seeds, repeats in ((4, 10), (10, 6), (50, 2)):
        normalised = []
        for _ in range(times * repeats):
            truth, effects, _ = draw(rng, seeds, noise, shared, uneven)
            normalised.append(row(audit(effects, {"perfect": truth}), "perfect", adjust=adjust)["normalised"])
        assert np.mean(normalised) == pytest.approx(1, abs=0.03), (seeds, normalised)


@pytest.mark.parametrize("dead", [0.2, 0.5, 0.8])
def test_examples_that_say_nothing_do_not_borrow_a_ceiling_from_those_that_do(dead):
    """A prior without dead examples said .72 for a true .51 where half were dead."""
    rng = np.random.default_rng(6)
    scores, ceilings, reliabilities = [], [], []
    for _ in range(8):
        truth, effects, _ = draw(rng, 6, 0.2, r=30, m=40)
        silent = int(dead * 40)
        effects[:, :, :silent] -= truth[:, :silent]
        found = audit(effects, {"perfect": truth})
        at = row(found, "perfect", adjust="mean")
        # What is dead has no direction: the cosine of anything with it is 0 in expectation.
        scores.append(at["score"])
        ceilings.append(at["ceiling"])
        [r] = [r for r in found.reliability.to_pylist() if r["measured"] and r["adjust"] == "mean"]
        reliabilities.append(r["reliability"])
    assert np.mean(ceilings) == pytest.approx(np.mean(scores), abs=0.03)
    assert np.mean(reliabilities) == pytest.approx(1 - dead, abs=0.02)


def test_the_plug_in_ceiling_would_be_off_where_seeds_share_their_baseline_s_noise():
    """That of DESIGN's closed form, √max(0, 1 − N/‖ē‖²): what ``trust`` corrects is not small."""
    truth, effects, _ = draw(np.random.default_rng(2), 4, 1.0, 3.0)
    mean, sem = effects.mean(axis=0), effects.std(axis=0, ddof=1) / 2
    plain = np.sqrt(np.maximum(0, 1 - (sem**2).sum(axis=0) / (mean**2).sum(axis=0))).mean()
    found = row(audit(effects, {"perfect": truth}), "perfect")
    assert found["score"] / plain > 1.3
    assert found["normalised"] == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize(("shared", "uneven"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_ten_seeds_foretell_the_reliability_of_fifty(shared, uneven):
    rng = np.random.default_rng(3)
    foretold, true, later = {"baseline": [], "mean": []}, {"baseline": [], "mean": []}, {"baseline": [], "mean": []}
    for _ in range(4):
        truth, effects, size = draw(rng, 50, 2.0, shared, uneven)
        for adjust in ("baseline", "mean"):
            for into, few in ((foretold, effects[:10]), (later, effects)):
                rows = audit(few).reliability.to_pylist()
                [r] = [r for r in rows if r["adjust"] == adjust and r["seeds"] == 50]
                assert r["measured"] == (len(few) == 50)
                into[adjust].append(r["reliability"])
            centred = truth - truth.mean(axis=0) if adjust == "mean" else truth
            power = (centred**2).sum(axis=0)
            noise = size**2 / 50 * ((R - 1) if adjust == "mean" else R * (1 + shared**2))
            true[adjust].append((power / (power + noise)).mean())
    for adjust in ("baseline", "mean"):
        assert np.mean(foretold[adjust]) == pytest.approx(np.mean(later[adjust]), abs=0.02)
        assert np.mean(foretold[adjust]) == pytest.approx(np.mean(true[adjust]), abs=0.02)


@pytest.mark.parametrize(
    ("seeds", "shared", "uneven"),
    [(4, 1, 0), pytest.param(10, 0, 1, marks=pytest.mark.slow), pytest.param(10, 1, 0, marks=pytest.mark.slow)],
)
def test_intervals_hold_the_expected_score_19_times_in_20(seeds, shared, uneven):
    rng = np.random.default_rng(4)

    def estimated():
        truth, effects, _ = draw(rng, seeds, 1.5, shared, uneven, r=25, m=30)
        return effects, truth + rng.normal(size=truth.shape)

    def plain(effects, estimate):
        mean = effects.mean(axis=0)
        return ((mean * estimate).sum(axis=0) / np.linalg.norm(mean, axis=0) / np.linalg.norm(estimate, axis=0)).mean()

    expected, held = np.mean([plain(*estimated()) for _ in range(3000)]), 0
    for _ in range(100):
        effects, estimate = estimated()
        found = row(audit(effects, {"noisy": estimate}), "noisy")
        assert found["score"] == pytest.approx(plain(effects, estimate), abs=1e-12)
        held += found["low"] <= expected <= found["high"]
    assert 90 <= held <= 99


def test_a_difference_between_methods_is_told_from_noise():
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(60):
        truth, effects, _ = draw(rng, 5, 2.0, 1.0, r=25, m=30)
        first, second = (truth + rng.normal(size=truth.shape) for _ in range(2))
        better = truth + 0.3 * rng.normal(size=truth.shape)
        found = audit(effects, {"first": first, "second": second, "better": better}).differences.to_pylist()
        told = {(r["estimator"], r["other"]): r for r in found if (r["metric"], r["adjust"]) == ("cosine", "baseline")}
        wrong += not told["first", "second"]["noise"]
        assert told["first", "better"]["noise"] is False
        assert told["first", "better"]["high"] < 0
    assert wrong <= 7


def test_discoveries_are_true_but_for_their_share():
    rng = np.random.default_rng(6)
    effects = rng.normal(size=(8, 40, 30))
    assert rows_of(effects)["significant"] < 0.005
    effects[:, :20] += 3
    assert rows_of(effects)["significant"] == pytest.approx(0.5, abs=0.05)
    assert rows_of(np.ones((3, 4, 5)))["significant"] == 1, "equal over all seeds, and not 0"


def rows_of(effects: np.ndarray) -> dict:
    [found] = [r for r in audit(effects).reliability.to_pylist() if r["measured"] and r["adjust"] == "baseline"]
    return found


def test_the_bounds_for_spearman_hold_what_a_perfect_estimate_reaches():
    rng = np.random.default_rng(7)
    scores, lower, upper, best = [], [], [], []
    for _ in range(6):
        truth, effects, _ = draw(rng, 10, 2.0, 1.0, 0.5)
        found = audit(effects, {"perfect": truth})
        one = row(found, "perfect", "spearman")
        scores.append(one["score"])
        best.append(one["normalised"])
        here = rows_of(effects)
        lower.append(here["spearman_lower"])
        upper.append(here["spearman_upper"])
    assert np.mean(lower) < np.mean(scores) < np.mean(upper)
    assert np.mean(best) == pytest.approx(1, abs=0.03)


def test_one_seed_has_a_score_but_no_ceiling_and_no_interval():
    truth, effects, _ = draw(np.random.default_rng(8), 1)
    found = audit(effects, {"perfect": truth})
    one = row(found, "perfect")
    assert one["score"] > 0.5
    assert one["ceiling"] is one["normalised"] is one["low"] is one["high"] is None
    for r in found.reliability.to_pylist():
        assert r["reliability"] is r["ceiling"] is r["significant"] is r["spearman_lower"] is None
    assert "one seed" in found.notes[0]


def test_no_unit_of_g_changes_what_is_said():
    truth, effects, _ = draw(np.random.default_rng(9), 6, shared=1.0, uneven=1.0)
    one, other = (audit(c * effects, {"perfect": truth}) for c in (1.0, 1e-13))
    for a, b in ((one.scores, other.scores), (one.reliability, other.reliability)):
        for name in a.column_names:
            if pa_is_number(a[name]):
                first, second = (np.array(t[name].to_pylist(), dtype=float) for t in (a, b))
                np.testing.assert_allclose(first, second, rtol=1e-6, err_msg=name)


def pa_is_number(column) -> bool:
    return str(column.type) == "double"


def test_no_noise_is_full_trust_and_all_noise_next_to_none():
    truth, effects, _ = draw(np.random.default_rng(10), 5, noise=0.0)
    assert rows_of(effects)["reliability"] == pytest.approx(1)
    rng = np.random.default_rng(11)
    assert rows_of(rng.normal(size=(5, 60, 60)))["reliability"] < 0.05
    both = np.concatenate([effects, rng.normal(size=(5, R, M))], axis=2)
    assert rows_of(both)["reliability"] == pytest.approx(0.5, abs=0.05)
    assert row(audit(effects, {"perfect": truth}), "perfect")["normalised"] == pytest.approx(1)


def test_missing_runs_are_left_out_of_what_is_said_of_noise():
    truth, effects, _ = draw(np.random.default_rng(12), 6)
    effects[2, 3, 4] = np.nan
    found = audit(effects, {"perfect": truth})
    assert "1 of 6 seeds lack a removal" in found.notes[0]
    assert row(found, "perfect")["normalised"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("effects", "estimates", "said"),
    [
        (np.zeros((3, 4)), {}, "three axes"),
        ("many", {}, "array of numbers"),
        (np.zeros((3, 1, 4)), {}, "one removal"),
        (np.full((3, 4, 5), np.inf), {}, "infinite"),
        (np.full((3, 4, 5), np.nan), {}, "no whole run"),
        (np.zeros((3, 4, 5)), {"a": np.zeros((5, 4))}, "transposed"),
        (np.zeros((3, 4, 5)), {"a": np.full((4, 5), np.nan)}, "not finite"),
    ],
)
def test_what_is_no_ground_truth_is_refused_in_a_line(effects, estimates, said):
    with pytest.raises(UsageError, match=said):
        fimo.audit(effects, estimates)
