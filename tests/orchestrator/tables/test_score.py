from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from fimo.orchestrator.tables.agreement import cosine, undefined
from fimo.orchestrator.tables.floor import measured
from fimo.orchestrator.tables.ordering import ranks
from fimo.orchestrator.tables.reduce import SeedBlock, reduce
from fimo.orchestrator.tables.reliability import windows
from fimo.orchestrator.tables.score import EstimateMatrix, Scorer
from fimo.orchestrator.tables.similarity import similarity_table

R, T, M, SEEDS = 6, 2, 3, 7
STEPS = (4, 9)
RNG = np.random.default_rng(0)
GOLD = RNG.normal(size=(SEEDS, R, T, M))
FIXED = EstimateMatrix("grad_dot", "{}", RNG.normal(size=(R, M)))
MOVING = EstimateMatrix("unrolled", "{}", RNG.normal(size=(2, R, M)), (9, 11))


def block(seed: int, effects: np.ndarray) -> SeedBlock:
    return SeedBlock(seed, effects, np.zeros((T, M)), np.full((T, M), 1e-20), 1, ())


def scored(gold: np.ndarray, estimates: list[EstimateMatrix], floor: float | None = None):
    scorer = Scorer(estimates, STEPS, len(gold))
    blocks, reduction = reduce((block(s, e) for s, e in enumerate(gold)), R, T, M)
    for b in blocks:
        scorer.add(b, reduction.floor if floor is None else np.full((T, M), floor))
    if floor is not None:
        reduction.floors = measured([]).floor(np.full((T, M), floor))
    scorer.finish(reduction)
    return scorer, reduction


def brute(k: int, t: int, metric: str, adjust: str, estimate: np.ndarray) -> list[float]:
    """Per evaluation example, plainly: average windows of k seeds, score each, average the scores."""
    means = []
    for e in range(M):
        scores = []
        for w in range(SEEDS // k):
            a = GOLD[w * k : (w + 1) * k, :, t, e].mean(axis=0)
            a = a - a.mean() if adjust == "mean" else a
            b = estimate[:, e]
            if metric == "cosine":
                scores.append(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
            else:
                scores.append(float(spearmanr(a, b).statistic))
        means.append(float(np.mean(scores)))
    return means


def test_windows_of_seeds_are_the_contract_s():
    assert windows(1) == [1]
    assert windows(7) == [1, 2, 5, 7]
    assert windows(100) == [1, 2, 5, 10, 20, 50, 100]
    assert windows(130) == [1, 2, 5, 10, 20, 50, 100, 130]


def test_scores_equal_plain_loops_for_every_window_step_metric_and_adjustment():
    scorer, _ = scored(GOLD, [FIXED])
    rows = scorer.table().to_pylist()
    assert len(rows) == 2 * 2 * 4 * 2
    for row in rows:
        expected = brute(row["seeds"], STEPS.index(row["step"]), row["metric"], row["adjust"], FIXED.values)
        assert row["score"] == pytest.approx(np.mean(expected), abs=1e-12)
        assert row["sem"] == pytest.approx(np.std(expected, ddof=1) / np.sqrt(M), abs=1e-12)
        assert (row["evals"], row["undefined"]) == (M, 0)


def test_an_estimate_of_an_amount_is_scored_at_that_amount_alone():
    scorer, _ = scored(GOLD, [MOVING])
    rows = scorer.table().to_pylist()
    assert {r["step"] for r in rows} == {9}
    [row] = [r for r in rows if (r["metric"], r["adjust"], r["seeds"]) == ("cosine", "baseline", 7)]
    assert row["score"] == pytest.approx(np.mean(brute(7, 1, "cosine", "baseline", MOVING.values[0])), abs=1e-12)


def test_constant_vectors_and_vectors_under_the_noise_floor_are_counted_not_scored():
    gold = GOLD.copy()
    gold[:, :, 0, 1] = 0.25
    gold[:, :, 1, 2] *= 1e-9
    scorer, _ = scored(gold, [FIXED], floor=1e-6)
    by_step = {
        r["step"]: r
        for r in scorer.table().to_pylist()
        if (r["metric"], r["adjust"], r["seeds"]) == ("cosine", "baseline", SEEDS)
    }
    assert (by_step[4]["evals"], by_step[4]["undefined"]) == (2, 1)
    assert (by_step[9]["evals"], by_step[9]["undefined"]) == (2, 1)


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_one_removal_has_no_scores_however_many_seeds_it_has(seeds):
    scorer = Scorer([EstimateMatrix("grad_dot", "{}", FIXED.values[:1])], STEPS, seeds)
    blocks, reduction = reduce((block(s, e[:1]) for s, e in enumerate(GOLD[:seeds])), 1, T, M)
    for b in blocks:
        scorer.add(b, reduction.floor)
    scorer.finish(reduction)
    assert scorer.table().num_rows == 0


def test_an_estimate_that_is_zero_for_an_example_is_undefined_there():
    values = FIXED.values.copy()
    values[:, 0] = 0.0
    scorer, _ = scored(GOLD, [EstimateMatrix("zero", "{}", values)])
    assert {r["undefined"] for r in scorer.table().to_pylist()} == {1}


def test_a_seed_that_lacks_a_removal_is_in_no_window_but_in_the_mean_of_all():
    gold = GOLD.copy()
    gold[3, 2] = np.nan
    scorer, reduction = scored(gold, [FIXED])
    assert scorer.groups.seeds == SEEDS - 1
    assert reduction.effects.count[2].tolist() == [SEEDS - 1] * T
    [row] = [
        r
        for r in scorer.table().to_pylist()
        if (r["metric"], r["adjust"], r["seeds"], r["step"]) == ("cosine", "baseline", SEEDS, 4)
    ]
    mean = np.nanmean(gold, axis=0)[:, 0]
    expected = np.mean([cosine(mean[:, e], FIXED.values[:, e]) for e in range(M)])
    assert row["score"] == pytest.approx(expected, abs=1e-12)


def test_a_removal_without_any_seed_does_not_empty_the_scores():
    gold = GOLD.copy()
    gold[:, 2] = np.nan
    scorer, _ = scored(gold, [FIXED])
    kept = [i for i in range(R) if i != 2]
    mean = GOLD.mean(axis=0)[kept]
    [row] = [
        r
        for r in scorer.table().to_pylist()
        if (r["metric"], r["adjust"], r["seeds"], r["step"]) == ("cosine", "baseline", SEEDS, 9)
    ]
    expected = np.mean([cosine(mean[:, 1, e], FIXED.values[kept, e]) for e in range(M)])
    assert row["score"] == pytest.approx(expected, abs=1e-12)


def test_ranks_give_ties_their_mean_rank():
    a, b = np.array([1.0, 2.0, 2.0, 5.0]), np.array([3.0, 3.0, 1.0, 9.0])
    assert cosine(ranks(a), ranks(b)) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_undefined_is_constant_or_not_above_the_floor():
    effects = np.array([[1.0, 1e-9, 1.0], [1.0, -1e-9, -1.0]])
    assert undefined(effects, 1e-8).tolist() == [True, True, False]


def test_the_similarity_matrix_has_every_pair_and_ones_on_its_diagonal():
    rows = similarity_table([FIXED, MOVING]).to_pylist()
    cosines = {(r["estimator"], r["other_estimator"], r["step"]): r["cosine"] for r in rows}
    assert set(cosines) == {
        ("grad_dot", "grad_dot", None),
        ("grad_dot", "unrolled", 9),
        ("grad_dot", "unrolled", 11),
        ("unrolled", "grad_dot", 9),
        ("unrolled", "grad_dot", 11),
        ("unrolled", "unrolled", 9),
        ("unrolled", "unrolled", 11),
    }
    assert cosines["grad_dot", "grad_dot", None] == pytest.approx(1.0)
    assert cosines["grad_dot", "unrolled", 11] == pytest.approx(np.mean(cosine(FIXED.values, MOVING.values[1])))


def test_the_linear_datamodeling_score_is_that_of_its_definition():
    """Park et al. 2023: outputs of models trained on the kept halves against sums of τ over the kept, by scipy."""
    n, groups, m = 20, 12, 4
    rng = np.random.default_rng(5)
    removed = [rng.choice(n, size=7, replace=False) for _ in range(groups)]
    single = rng.normal(size=(n, m))
    baseline = rng.normal(size=m)
    outputs = baseline + np.stack([(single[g] ** 3).sum(axis=0) for g in removed]) + 0.5 * rng.normal(size=(groups, m))
    tau = -single
    kept = np.stack([tau[np.setdiff1d(np.arange(n), g)].sum(axis=0) for g in removed])
    expected = [spearmanr(outputs[:, e], kept[:, e]).statistic for e in range(m)]

    estimate = EstimateMatrix("grad_dot", "{}", np.stack([single[g].sum(axis=0) for g in removed]))
    scorer = Scorer([estimate], [3], 2, random_groups=True)
    effects = (outputs - baseline)[:, None]
    seeds = [SeedBlock(s, effects, np.zeros((1, m)), np.full((1, m), 1e-20), 1, ()) for s in range(2)]
    blocks, reduction = reduce(iter(seeds), groups, 1, m)
    for one in blocks:
        scorer.add(one, reduction.floor)
    scorer.finish(reduction)
    rows = [r for r in scorer.table().to_pylist() if r["metric"] == "lds"]
    assert {(r["adjust"], r["seeds"]) for r in rows} == {(a, k) for a in ("baseline", "mean") for k in (1, 2)}
    for row in rows:
        assert row["score"] == pytest.approx(np.mean(expected), abs=1e-12)
        assert 0.3 < row["score"] < 0.99
