"""Two gold standards against each other, on synthetic seeds whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr, t

from fimo.orchestrator.tables.compare import by_seed, compare, cut
from fimo.orchestrator.tables.reduce import SeedBlock

R, T, M = 150, 2, 120
STEPS = [(4, 4), (9, 18)]


def truth(rng, correlation: float, shape=(R, T, M)):
    """Two sets of true effects whose vectors over removals correlate so in expectation, neither centred."""
    a, b = rng.normal(size=shape), rng.normal(size=shape)
    return a, correlation * a + np.sqrt(1 - correlation**2) * b


def blocks(true, noise, seeds, rng=None, shared=0.0, offset=0.0):
    """Seeds of a standard; ``shared`` is the noise's part that is a function of the seed alone."""
    for seed in seeds:
        common = np.random.default_rng(1000 + seed).normal(size=true.shape)
        own = common if rng is None else shared * common + np.sqrt(1 - shared**2) * rng.normal(size=true.shape)
        baseline = offset * np.random.default_rng(50 + seed).normal(size=true.shape[1:])
        values = true + noise * own + baseline
        yield SeedBlock(seed, values, np.zeros(true.shape[1:]), np.full(true.shape[1:], 1e-20), 1, ())


def rows(own, other, steps=STEPS, r=R, m=M):
    table = compare(own, other, r, steps, m).to_pylist()
    return {(row["metric"], row["adjust"], row["step"]): row for row in table}


def test_scores_equal_plain_loops():
    rng = np.random.default_rng(0)
    a, b = truth(rng, 0.5, (6, 2, 5))
    own, other = list(blocks(a, 0.3, range(4), rng)), list(blocks(b, 0.4, range(10, 13), rng))
    found = rows(own, other, r=6, m=5)
    x, y = (np.mean([s.effects for s in seeds], axis=0) for seeds in (own, other))
    for (metric, adjust, step), row in found.items():
        place = [s for s, _ in STEPS].index(step)
        each = []
        for e in range(5):
            u, v = x[:, place, e], y[:, place, e]
            u, v = (u - u.mean(), v - v.mean()) if adjust == "mean" else (u, v)
            each.append(spearmanr(u, v).statistic if metric == "spearman" else u @ v / np.sqrt((u @ u) * (v @ v)))
        sem = np.std(each, ddof=1) / np.sqrt(5)
        assert row["score"] == pytest.approx(np.mean(each), abs=1e-12)
        assert row["sem"] == pytest.approx(sem, abs=1e-12)
        assert row["low"] == pytest.approx(max(-1, np.mean(each) - t.ppf(0.975, 4) * sem), abs=1e-12)
        assert (row["evals"], row["undefined"], row["removals"]) == (5, 0, 6)
        assert (row["seeds"], row["other_seeds"], row["other_step"]) == (4, 3, STEPS[place][1])
    assert set(found) == {(m, a, s) for m in ("cosine", "spearman") for a in ("baseline", "mean") for s in (4, 9)}


@pytest.mark.parametrize("correlation", [1.0, 0.6, 0.0])
def test_independent_noise_lowers_the_score_to_the_joint_ceiling_and_normalised_undoes_it(correlation):
    rng = np.random.default_rng(1)
    a, b = truth(rng, correlation)
    found = rows(blocks(a, 2.0, range(8), rng), blocks(b, 1.0, range(100, 104), rng))
    # Signal variance 1, noise variances 4/8 and 1/4: what the highest cosines and the joint one must be.
    mine, theirs = np.sqrt(1 / 1.5), np.sqrt(1 / 1.25)
    for (metric, adjust, _), row in found.items():
        slack = 0.02 if metric == "cosine" else 0.03
        assert row["ceiling"] == pytest.approx(mine, abs=slack), (metric, adjust)
        assert row["other_ceiling"] == pytest.approx(theirs, abs=slack), (metric, adjust)
        assert row["joint_ceiling"] == pytest.approx(mine * theirs, abs=0.03)
        assert row["shared"] == 0
        if metric == "cosine":
            assert row["score"] == pytest.approx(correlation * mine * theirs, abs=0.02)
            assert row["normalised"] == pytest.approx(correlation, abs=0.03)
        else:
            rank = 6 / np.pi * np.arcsin(correlation / 2)  # of normal vectors
            assert row["normalised"] == pytest.approx(rank, abs=0.05)


def test_examples_that_differ_in_noise_do_not_raise_the_ceiling():
    """The mean of the square roots, not the root of one reliability of all."""
    rng = np.random.default_rng(2)
    a, _ = truth(rng, 1.0)
    loud = np.where(np.arange(M) % 2, 3.0, 0.1)
    own, other = blocks(a, loud, range(6), rng), blocks(a, loud, range(50, 56), rng)
    row = rows(own, other)["cosine", "baseline", 4]
    truly = np.mean(1 / np.sqrt(1 + loud**2 / 6))
    assert row["ceiling"] == pytest.approx(truly, abs=0.02)
    assert row["joint_ceiling"] == pytest.approx(np.mean(1 / (1 + loud**2 / 6)), abs=0.02)
    assert row["joint_ceiling"] - row["ceiling"] * row["other_ceiling"] > 0.02, "the noise goes with the example"
    assert row["normalised"] == pytest.approx(1, abs=0.03)


def test_the_baseline_s_noise_is_no_noise_of_the_centred_effects():
    rng = np.random.default_rng(3)
    a, _ = truth(rng, 1.0)
    found = rows(blocks(a, 1.0, range(6), rng, offset=3.0), blocks(a, 1.0, range(50, 56), rng, offset=3.0))
    assert found["cosine", "mean", 4]["ceiling"] == pytest.approx(np.sqrt(1 / (1 + 1 / 6)), abs=0.02)
    assert found["cosine", "mean", 4]["normalised"] == pytest.approx(1, abs=0.03)
    assert found["spearman", "baseline", 4]["ceiling"] == found["spearman", "mean", 4]["ceiling"]


@pytest.mark.parametrize("offset", [1.0, 5.0])
def test_a_standard_agrees_with_itself_as_far_as_it_can_whatever_its_baseline_s_noise(offset):
    rng = np.random.default_rng(9)
    a, _ = truth(rng, 1.0)
    own = list(blocks(a, 1.0, range(6), rng, offset=offset))
    for adjust in ("baseline", "mean"):
        row = rows(own, own)["cosine", adjust, 4]
        assert row["score"] == pytest.approx(1)
        assert row["normalised"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("correlation", "shared"), [(0.5, 0.9), (1.0, 0.7), (0.0, 1.0)])
def test_noise_that_common_seeds_share_is_told_and_taken_out(correlation, shared):
    rng = np.random.default_rng(4)
    a, b = truth(rng, correlation)
    own = blocks(a, 2.0, range(2, 10), rng, shared=1.0)
    other = blocks(b, 2.0, range(12), rng, shared=shared)
    found = rows(own, other)
    for adjust in ("baseline", "mean"):
        row = found["cosine", adjust, 4]
        covariance = shared * 4 / 12  # 8 common ones of 8 and of 12 seeds
        assert row["shared"] == pytest.approx(covariance / np.sqrt(1.5 * (1 + 4 / 12)), abs=0.03)
        assert row["normalised"] == pytest.approx(correlation, abs=0.05)
        assert row["score"] > correlation * row["joint_ceiling"] + 0.1
        assert found["spearman", adjust, 4]["normalised"] is None


def test_a_standard_and_itself_agree_wholly_and_normalised_does_not_exceed_one():
    rng = np.random.default_rng(5)
    a, _ = truth(rng, 1.0)
    seeds = list(blocks(a, 2.0, range(5), rng))
    found = rows(seeds, seeds)
    for (metric, _, _), row in found.items():
        assert row["score"] == pytest.approx(1, abs=1e-12)
        assert row["ceiling"] < 0.9
        assert row["normalised"] == (pytest.approx(1, abs=0.02) if metric == "cosine" else None)


def test_what_either_standard_does_not_say_is_undefined_not_zero():
    rng = np.random.default_rng(6)
    a, b = truth(rng, 1.0, (6, 2, 4))
    a[:, 0, 1] = 0.5  # constant
    b[:, 0, 2] *= 1e-14  # under the floor of 1e-10
    found = rows(blocks(a, 0.0, range(2)), blocks(b, 0.0, range(2)), r=6, m=4)
    assert (found["cosine", "baseline", 4]["evals"], found["cosine", "baseline", 4]["undefined"]) == (2, 2)
    assert found["cosine", "baseline", 4]["score"] == pytest.approx(1)
    assert (found["cosine", "baseline", 9]["evals"], found["cosine", "baseline", 9]["undefined"]) == (4, 0)


def test_a_standard_that_has_exploded_is_compared_nowhere():
    rng = np.random.default_rng(7)
    a, _ = truth(rng, 1.0, (6, 2, 4))
    moved = np.array([[0.0], [1e6]]) * np.ones((2, 4))
    own = [SeedBlock(0, a, moved, np.full((2, 4), 1e-20), 1, (), scale=1.0)]
    found = rows(own, blocks(a, 0.0, range(2)), r=6, m=4)
    assert found["cosine", "baseline", 4]["evals"] == 4
    late = found["cosine", "baseline", 9]
    assert (late["score"], late["sem"], late["evals"], late["undefined"]) == (None, None, 0, 4)
    assert late["normalised"] is late["ceiling"] is None


def test_one_seed_has_a_score_and_no_ceiling():
    rng = np.random.default_rng(8)
    a, _ = truth(rng, 1.0, (6, 2, 4))
    found = rows(blocks(a, 0.1, [3], rng), blocks(a, 0.1, range(9), rng), r=6, m=4)
    for row in found.values():
        assert row["score"] is not None
        assert row["ceiling"] is row["joint_ceiling"] is row["normalised"] is None
        assert row["other_ceiling"] > 0.9
        assert row["shared"] is None, "one common seed has no covariance"


def test_a_removal_that_either_lacks_and_a_seed_that_lacks_one_are_left_out():
    rng = np.random.default_rng(9)
    a, b = truth(rng, 0.5, (6, 2, 4))
    own, other = list(blocks(a, 0.0, range(4))), list(blocks(b, 0.0, range(10, 14)))
    for block in other:
        block.effects[2] = np.nan
    own[1].effects[0] = np.nan
    row = rows(own, other, r=6, m=4)["cosine", "baseline", 4]
    kept = [0, 1, 3, 4, 5]
    x, y = a[kept][:, 0], b[kept][:, 0]
    expected = ((x * y).sum(0) / np.sqrt((x * x).sum(0) * (y * y).sum(0))).mean()
    assert row["score"] == pytest.approx(expected, abs=1e-12)
    assert (row["removals"], row["seeds"]) == (5, 4)
    for block in other:
        block.effects[1:] = np.nan
    assert rows(own, other, r=6, m=4) == {}


def test_streams_meet_at_their_common_seeds():
    a, _ = truth(np.random.default_rng(0), 1.0, (2, 1, 1))
    met = by_seed(blocks(a, 1.0, [0, 2, 5]), blocks(a, 1.0, [2, 3, 5, 6]))
    assert [(x and x.seed, y and y.seed) for x, y in met] == [(0, None), (2, 2), (None, 3), (5, 5), (None, 6)]


def test_blocks_are_cut_to_steps_by_place_and_to_the_first_evaluation_examples():
    a, _ = truth(np.random.default_rng(0), 1.0, (3, 4, 5))
    [one] = cut(blocks(a, 0.0, [0]), [3, 1, 1], 2)
    np.testing.assert_array_equal(one.effects, a[:, [3, 1, 1], :2])
    assert one.training_only.shape == one.floor_squares.shape == (3, 2)
