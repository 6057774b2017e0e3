from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from fimo.orchestrator.tables.halves import Gold, best_at, best_over, half_scores, split
from fimo.orchestrator.tables.score import EstimateMatrix

R, T, M = 7, 3, 11


def gold(metric="cosine", seed=0, **changes):
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=(R, T, M))
    plain = Gold(
        metric=metric,
        steps=(2, 4, 8),
        keep=np.ones(R, dtype=bool),
        effects=effects,
        floor=np.zeros((T, M)),
        exploded=np.zeros(T, dtype=bool),
        ceilings=np.full((T, M), 0.9),
        without_one=tuple(effects + 0.1 * rng.normal(size=effects.shape) for _ in range(4)),
    )
    return replace(plain, **changes)


def estimate(seed=1, steps=None):
    shape = (R, M) if steps is None else (len(steps), R, M)
    return EstimateMatrix("cg", "{}", np.random.default_rng(seed).normal(size=shape), steps)


def test_the_halves_are_disjoint_whole_and_the_same_for_ever():
    for m in (2, 3, 11, 100):
        searched, held = split(m)
        assert sorted([*searched, *held]) == list(range(m))
        assert len(searched) - len(held) == m % 2
    # Written out: a split that moved would make stored results those of other examples.
    assert split(8)[0].tolist() == SPLIT_OF_8


SPLIT_OF_8 = [3, 5, 6, 7]


@pytest.mark.parametrize("metric", ["cosine", "spearman"])
def test_scores_are_means_over_a_half_of_plain_agreements(metric):
    """Against numpy and scipy, example by example."""
    of, given = gold(metric), estimate()
    searched, held = split(M)

    def one(t, z):
        a, b = of.effects[:, t, z], given.values[:, z]
        return spearmanr(a, b)[0] if metric == "spearman" else a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    for t, row in enumerate(half_scores(of, given)):
        assert row.searched == pytest.approx(np.mean([one(t, z) for z in searched]), abs=1e-12)
        assert row.score == pytest.approx(np.mean([one(t, z) for z in held]), abs=1e-12)
        assert (row.searched_evals, row.evals, row.undefined, row.ceiling) == (6, 5, 0, pytest.approx(0.9))
        assert row.low < row.score < row.high


def test_what_is_undefined_is_counted_and_in_no_mean():
    _, held = split(M)
    floor = np.zeros((T, M))
    floor[1, held[:2]] = 1e9
    rows = half_scores(gold(floor=floor, exploded=np.array([False, False, True])), estimate())
    assert (rows[1].evals, rows[1].undefined) == (3, 2)
    assert (rows[2].searched, rows[2].score, rows[2].evals, rows[2].undefined) == (None, None, 0, 5)


def test_a_removal_without_results_is_left_out_of_the_estimate_too():
    of = gold()
    keep = np.ones(R, dtype=bool)
    keep[2] = False
    cut = replace(of, keep=keep, effects=of.effects[keep], without_one=tuple(other[keep] for other in of.without_one))
    given = estimate()
    other = replace(given, values=np.where(keep[:, None], given.values, 1e6))
    assert half_scores(cut, given) == half_scores(cut, other)


def test_an_estimate_of_some_steps_is_scored_at_those():
    rows = half_scores(gold(), estimate(steps=(4, 8, 16)))
    assert [row.step for row in rows] == [4, 8]


def points(seed, held_order=None):
    """Scores of 12 estimates; ``held_order`` shuffles the gold standard of the held-out half."""
    of = gold(seed=seed)
    if held_order is not None:
        _, held = split(M)
        moved = np.arange(M)
        moved[held] = held[held_order]
        of = replace(of, effects=of.effects[..., moved], without_one=())
    return [half_scores(of, estimate(seed=100 + e)) for e in range(12)]


def test_the_held_out_half_has_no_say_in_the_choice():
    """Its gold standard is permuted: its scores change, the winners do not."""
    for seed in range(5):
        plain, moved = points(seed), points(seed, np.roll(np.arange(5), 2))
        assert any(a.score != b.score for a, b in zip(plain[0], moved[0], strict=True))
        for step in (2, 4, 8):
            assert best_at(plain, step) == best_at(moved, step)
        assert best_over(plain) == best_over(moved)


def test_the_winner_has_the_highest_searched_score_and_of_equals_is_the_first():
    rows = points(0)
    for place, step in enumerate((2, 4, 8)):
        assert best_at(rows, step) == int(np.argmax([of[place].searched for of in rows]))
    assert best_over(rows) == int(np.argmax([np.mean([row.searched for row in of]) for of in rows]))
    assert best_at([rows[3], rows[3]], 2) == 0
    assert best_over([rows[3], rows[3]]) == 0


def test_a_point_that_lacks_a_step_is_not_the_best_over_all():
    some = half_scores(gold(), estimate(steps=(4,)))
    some = [replace(some[0], searched=1.0)]
    assert best_over([some, points(0)[0]]) == 1
    assert best_at([some, points(0)[0]], 4) == 0
    assert best_over([[]]) is None
    assert best_at([[]], 4) is None
