"""The schedule as data: who trains on which examples, with which weights, and when results are recorded."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler

from fimo.workers.amounts import amounts, steps_recorded
from fimo.workers.batches import first_difference, orders, schedule
from fimo.workers.settings import Evaluate
from fimo.workers.stacking.folding import folded
from tests.workers.problems import settings

MODES = ["drop", "mask", "reweight"]


def plain(
    n: int, size: int, seed: int, removal: tuple[int, ...], mode: str, steps: int, w: float = 1.0
) -> list[dict[int, float]]:
    """{index: weight} of each step, from torch's own samplers."""
    sampler, out = RandomSampler(range(n), generator=torch.Generator().manual_seed(seed)), []
    while len(out) < steps:
        order = [i for i in sampler if mode != "drop" or i not in removal]
        for batch in BatchSampler(order, size, drop_last=False):
            stays = [i for i in batch if mode == "reweight" or i not in removal]
            weights = {i: 1 / len(stays) for i in stays}
            if mode == "reweight":
                for i in removal:
                    weights[i] = weights.get(i, 0.0) - w / n
            out.append(weights)
    return out[:steps]


@hypothesis_settings(max_examples=80, deadline=None)
@given(st.integers(3, 14), st.integers(1, 6), st.integers(0, 2**31), st.sampled_from(MODES), st.booleans(), st.data())
def test_every_lane_of_every_step_has_the_plain_loops_weights(n, size, seed, mode, mixes, data) -> None:
    sets = st.sets(st.integers(0, n - 1), max_size=n - 1).map(lambda s: tuple(sorted(s)))
    lanes = data.draw(st.lists(sets, min_size=1, max_size=4))
    heavy = data.draw(st.sampled_from([1.0, 0.5, 30.0])) if mode == "reweight" else 1.0
    chosen = settings(batch_size=size, removal_mode=mode, removal_weight=heavy)
    folds = mode == "reweight" or data.draw(st.booleans())
    steps = list(islice(folded(n, lanes, chosen, seed) if folds else schedule(n, lanes, chosen, seed, mixes), 12))
    for lane, removal in enumerate(lanes):
        assert not folds or mode == "mask" or all(len(blocks) == 1 for blocks in steps)
        for got, expected in zip(steps, plain(n, size, seed, removal, mode, 12, heavy), strict=True):
            weights: dict[int, float] = {}
            for block in got:
                if lane in block.lanes:
                    row = block.lanes.index(lane)
                    indices = block.indices if block.indices.ndim == 1 else block.indices[row]
                    of_lane = block.weights if block.weights.ndim == 1 else block.weights[row]
                    assert len(indices) == len(of_lane)
                    for i, w in zip(indices.tolist(), of_lane.tolist(), strict=True):
                        weights[i] = weights.get(i, 0.0) + w
            nonzero = {i: w for i, w in weights.items() if abs(w) > 1e-15}
            assert nonzero == pytest.approx({i: w for i, w in expected.items() if abs(w) > 1e-15}, rel=1e-12)


@hypothesis_settings(max_examples=80, deadline=None)
@given(st.integers(3, 14), st.integers(1, 6), st.integers(0, 2**31), st.sampled_from(MODES), st.data())
def test_before_the_first_difference_a_cell_is_the_baseline(n, size, seed, mode, data) -> None:
    removal = tuple(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1)))
    first = first_difference(n, removal, settings(batch_size=size, removal_mode=mode), seed)
    assert first is not None
    own, baseline = (plain(n, size, seed, r, mode, first) for r in (removal, ()))
    assert own[: first - 1] == baseline[: first - 1]
    assert own[first - 1] != baseline[first - 1]
    assert first_difference(n, (), settings(batch_size=size, removal_mode=mode), seed) is None


def test_the_permutation_is_the_samplers_own_carried_on_over_epochs() -> None:
    sampler = RandomSampler(range(50), generator=torch.Generator().manual_seed(7))
    for order in islice(orders(50, 7), 4):
        assert order.tolist() == list(sampler)


def test_a_block_of_all_lanes_is_in_the_order_of_the_stack() -> None:
    """So that the parameters need no copying."""
    for blocks in islice(schedule(20, [(), (1, 2), (3,), (), (4, 5)], settings(removal_mode="drop"), 0), 3):
        assert [block.lanes for block in blocks] == [(0, 1, 2, 3, 4)]


def test_amounts_when_an_epoch_is_shorter_without_the_removal() -> None:
    epochs = settings(removal_mode="drop", epochs=4, evaluate=Evaluate(every_epochs=2))
    assert amounts(21, (3,), epochs) == [(8, 10), (16, 20)]
    assert amounts(21, (), epochs) == [(10, 10), (20, 20)]
    assert steps_recorded(21, epochs) == [10, 20]
    ragged = settings(removal_mode="drop", epochs=5, evaluate=Evaluate(every_epochs=2))
    assert amounts(21, (3,), ragged) == [(8, 10), (16, 20), (20, 25)]
    steps = settings(removal_mode="drop", steps=12, evaluate=Evaluate(every_epochs=1))
    assert amounts(21, (3,), steps) == [(4, 5), (8, 10), (12, 12)]


@pytest.mark.parametrize("mode", ["mask", "reweight"])
def test_amounts_are_the_baselines_in_the_other_modes(mode: str) -> None:
    chosen = settings(removal_mode=mode, epochs=4, evaluate=Evaluate(every_epochs=1))
    assert amounts(21, (3,), chosen) == [(5, 5), (10, 10), (15, 15), (20, 20)]


def test_the_last_step_is_always_recorded_and_none_beyond_it() -> None:
    assert steps_recorded(23, settings(steps=12, evaluate=Evaluate(every_steps=5))) == [5, 10, 12]
    assert steps_recorded(23, settings(steps=10, evaluate=Evaluate(every_steps=5))) == [5, 10]
    assert steps_recorded(23, settings(steps=9, evaluate=Evaluate(at_steps=(6, 3)))) == [3, 6, 9]
    assert steps_recorded(23, settings(epochs=2, evaluate=Evaluate(every_epochs=5))) == [10]
