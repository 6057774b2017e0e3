"""``removal_weight``: w · Σ ℓ / n is subtracted from every step's loss, and effects are divided by w."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, RandomSampler

from fimo.workers.batches import first_difference
from fimo.workers.definition import attribution, train_cell
from fimo.workers.errors import UsageError
from fimo.workers.further_training import Deltas, further_train
from fimo.workers.proof import UnprovenError, prove
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.start import Engine, Start
from fimo.workers.trial import Case
from fimo.workers.workload import Workload
from tests.workers import test_quadratic as quadratics
from tests.workers.problems import SGD, classification, every_step, make, regression, sentences, settings

ADAMW = Optimizer("adamw", lr=0.003, weight_decay=0.1)
MOMENTUM = Optimizer("sgd", lr=0.01, momentum=0.9, weight_decay=0.01)
GROUPS = [(), (3,), (4, 9, 20), (17,), (0, 1, 2, 5, 6)]


def weighted(optimizer: Optimizer = SGD, weight: float = 30.0, **more: object) -> FurtherTraining:
    return settings(optimizer, removal_mode="reweight", removal_weight=weight, **more)


def plain_deltas(workload: Workload, chosen: FurtherTraining, removal: tuple[int, ...], seed: int, w: float) -> Tensor:
    """g(θ_t) − g(θᶠ) after every step, (T, m), by a loop that shares nothing with the package but the workload."""
    model = copy.deepcopy(workload.model).double()
    train, evals = ({k: v.double() for k, v in data.items()} for data in (workload.train, workload.evals))
    n, optimizer = len(train["y"]), chosen.optimizer.build(list(model.parameters()))
    sampler = RandomSampler(range(n), generator=torch.Generator().manual_seed(seed))
    loss = lambda data: (model(data["x"]).squeeze(-1) - data["y"]) ** 2  # noqa: E731
    before, rows = loss(evals).detach(), []
    for _ in range(chosen.epochs):
        for indices in BatchSampler(sampler, chosen.batch_size, drop_last=False):
            optimizer.zero_grad()
            total = loss({k: v[indices] for k, v in train.items()}).mean()
            for i in removal:
                total = total - w / n * loss({k: v[i : i + 1] for k, v in train.items()})[0]
            total.backward()
            optimizer.step()
            rows.append(loss(evals).detach() - before)
    return torch.stack(rows)


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAMW])
@pytest.mark.parametrize("w", [30.0, 0.25])
def test_the_definition_is_a_plain_loop_and_its_effects_are_divided_by_the_weight(optimizer: Optimizer, w) -> None:
    workload, removals = regression(), [(3,), (4, 9, 20)]
    chosen = weighted(optimizer, w, epochs=2, evaluate=every_step(10))
    deltas = torch.stack([plain_deltas(workload, chosen, r, 5, w) for r in [(), *removals]])
    for removal, expected in zip([(), *removals], deltas, strict=True):
        torch.testing.assert_close(train_cell(workload, chosen, removal, 5).deltas, expected, rtol=1e-9, atol=1e-11)
    effects = (deltas[1:] - deltas[0]) / w
    for stacked in (False, True):
        found = attribution(workload, chosen, removals, [5], stacked=stacked)
        torch.testing.assert_close(found.effects[0], effects, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found.training_only[0], deltas[0], rtol=1e-9, atol=1e-11)
    light = attribution(workload, replace(chosen, removal_weight=1.0), removals, [5]).effects[0]
    assert (effects - light).norm() > 0.01 * light.norm(), "a network is not linear: the weight is felt"


ENGINES = {
    "traced": Engine(),
    "folded": Engine(replay=False),
    "unfolded": Engine(replay=False, trim=False, fold=False),
    "one at a time": Engine(replay=False, trim=False, fold=False, stack=False),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAMW])
def test_the_engine_gives_the_definitions_cells_in_every_way_and_stack(engine: str, optimizer: Optimizer) -> None:
    """Groups of four sizes in one stack, batches of 5 of 23: the last is ragged."""
    workload, chosen = regression(), weighted(optimizer, 7.0, evaluate=Evaluate(every_steps=4))
    plain = [train_cell(workload, chosen, removal, 5).deltas for removal in (*GROUPS[1:], ())]
    start = make(workload, chosen)
    assert start.folds
    start = start.using(ENGINES[engine])
    for replicas in (1, 2, 5) if engine == "folded" else (5,):
        shard = run_shard(start, GROUPS[1:], 5, replicas)
        torch.testing.assert_close(shard.deltas[:-1], torch.stack(plain), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("workload", "more"),
    [
        (sentences, {}),
        (classification, {"clip_norm": 0.5}),
        (lambda: regression(middle=nn.Dropout(0.3)), {}),
        (regression, {"trainable": ("4.*",)}),
    ],
)
def test_data_sets_clipping_dropout_and_frozen_layers_have_the_weight_too(workload, more) -> None:
    """Removed examples ride in the batch, beside it, or in a forward of their own."""
    workload, chosen = workload(), weighted(MOMENTUM, 5.0, **more)
    got = further_train(make(workload, chosen), GROUPS, 5).deltas
    for lane, removal in enumerate(GROUPS):
        torch.testing.assert_close(got[lane], train_cell(workload, chosen, removal, 5).deltas, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("w", [1e-3, 1.0, 30.0])
def test_on_a_quadratic_every_delta_is_the_geometric_series_of_the_weighted_loss(w: float) -> None:
    workload, n = quadratics.quadratic(), quadratics.N
    chosen = weighted(
        Optimizer("sgd", lr=quadratics.RATE), w, batch_size=n, steps=quadratics.STEPS, evaluate=every_step(8)
    )
    removals = [(2,), (8,), (0, 5, 6)]
    deltas = run_shard(make(workload, chosen), removals, seed=3, replicas=3).deltas
    for row, removal in enumerate([*removals, ()]):
        weights = torch.ones(n, dtype=torch.float64) / n
        weights[list(removal)] -= w / n
        expected = quadratics.closed_form(workload, weights)[:8]
        torch.testing.assert_close(deltas[row, :8], expected, rtol=1e-9, atol=1e-10)


def test_at_small_amounts_the_effect_is_one_derivative_whatever_the_weight() -> None:
    workload, n, removals = quadratics.quadratic(), quadratics.N, [[2], [8], [0, 5, 6]]

    def effects(w: float, rate: float) -> Tensor:
        chosen = weighted(Optimizer("sgd", lr=rate), w, batch_size=n, steps=3, evaluate=Evaluate(at_steps=(3,)))
        return attribution(workload, chosen, removals, [0], stacked=True).effect

    small, large = (torch.stack([effects(w, rate) for w in (1e-3, 1.0, 30.0)]) for rate in (1e-6, 0.1))
    # Rounding of g is 1e-16, of an effect of 1e-9 at the smallest weight 1e-7; the second order is about rate · w.
    torch.testing.assert_close(small[0], small[1], rtol=3e-5, atol=3e-12)
    torch.testing.assert_close(small[2], small[1], rtol=1e-3, atol=1e-10)
    assert small.abs().max() > 1e-7
    assert (large[2] - large[1]).norm() > 0.5 * large[1].norm(), "not so at large ones"


def test_a_weight_lifts_the_effect_out_of_float32s_rounding() -> None:
    workload, removals = regression(n=400), [(3,), (250,), (17, 90), (399,)]

    def error(w: float) -> float:
        chosen = weighted(Optimizer("sgd", lr=0.02), w, batch_size=64, epochs=3)
        narrow, wide = (
            attribution(workload, replace(chosen, precision=p), removals, [0], stacked=True).effect[:, -1]
            for p in ("float32", "float64")
        )
        return float((narrow - wide).norm() / wide.norm())

    heavy, light = error(30.0), error(1.0)
    assert heavy < light / 5


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_proof_compares_cells_of_the_sweeps_own_weight(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workload, chosen = regression(), weighted(MOMENTUM, 6.0, precision=precision)
    start = make(workload, chosen)
    case = Case(workload, None, chosen, 7, torch.device("cpu"), GROUPS[1:], 0, 4, [4])
    verdict = prove(case, start)
    assert verdict.engine == Engine(join=False)

    def lighter(start: Start, *more: object) -> Deltas:
        return further_train(replace(start, settings=replace(start.settings, removal_weight=5.0)), *more)

    monkeypatch.setattr("fimo.workers.trial.further_train", lighter)
    with pytest.raises(UnprovenError, match="does not give the definition's numbers"):
        prove(case, start)


def test_a_weight_below_0_or_in_another_mode_is_refused_with_the_mend() -> None:
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="removal_weight must be above 0 and finite"):
            weighted(weight=weight)
    for mode in ("drop", "mask"):
        with pytest.raises(UsageError, match=f"removal_mode {mode} .* use removal_mode: reweight"):
            settings(removal_mode=mode, removal_weight=2.0)
        assert settings(removal_mode=mode, removal_weight=1.0) == settings(removal_mode=mode)
    unsettled = settings(removal_weight=2.0)
    assert unsettled.settled(mixes=False).removal_mode == "reweight"
    assert first_difference(23, (3,), unsettled.settled(mixes=False), 0) == 1


def test_a_model_that_settles_to_mask_refuses_a_weight() -> None:
    workload = regression(middle=nn.BatchNorm1d(8))
    for train in (lambda c: make(workload, c), lambda c: train_cell(workload, c, (3,), 0)):
        with pytest.raises(UsageError, match=r"leave removal_weight out, or use mode: eval") as caught:
            train(settings(removal_weight=2.0))
        assert "\n" not in str(caught.value)
    frozen = settings(removal_weight=2.0, mode="eval")
    assert make(workload, frozen).settings.removal_mode == "reweight"
