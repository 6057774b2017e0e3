"""A shard's results do not depend on how its cells were stacked, and effects are exactly 0 before a cell differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from fimo.workers import further_training
from fimo.workers.batches import orders
from fimo.workers.definition import train_cell
from fimo.workers.further_training import further_train
from fimo.workers.settings import Evaluate, Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.stacking.size import measure_stack_size
from tests.workers.problems import Workload, classification, every_step, make, regression, sentences, settings

MODES = ["drop", "mask", "reweight"]
REMOVALS = [(i,) for i in range(12)]
ADAMW = Optimizer("adamw", lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workload", [regression, sentences])
def test_the_stack_size_changes_nothing_beyond_ten_times_the_noise_floor(workload, mode: str) -> None:
    start = make(workload(), settings(precision="float32", removal_mode=mode, epochs=2))
    results = [run_shard(start, REMOVALS, 4, replicas).deltas for replicas in (1, 3, 32, 13)]
    # A floor of exactly 0 happens on so small a model; one rounding of the outputs is then the measure.
    floor = max(float((r[-1] - r[-2]).abs().max()) for r in results)
    for other in results[1:]:
        assert (other - results[0]).abs().max() <= 10 * max(floor, 1.2e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("replicas", [1, 5])
def test_the_same_shard_twice_is_bitwise_the_same(mode: str, replicas: int) -> None:
    chosen = settings(ADAMW, precision="float32", removal_mode=mode, clip_norm=1.0)
    results = [run_shard(make(regression(), chosen), REMOVALS, 4, replicas) for _ in range(2)]
    assert torch.equal(results[0].deltas, results[1].deltas)
    assert torch.equal(results[0].distances, results[1].distances)


def test_rows_are_the_removals_in_order_then_the_two_baselines() -> None:
    chosen = settings(removal_mode="drop", evaluate=Evaluate(at_steps=(4, 9)), steps=11)
    removals = [(3,), (), (17, 2)]
    got = run_shard(make(regression(), chosen), removals, 6, replicas=2)
    assert got.steps == (4, 9, 11)
    assert got.seed == 6
    for row, removal in enumerate([*removals, (), ()]):
        cell = train_cell(regression(), chosen, removal, 6)
        deltas, distances = cell.deltas, cell.distances
        torch.testing.assert_close(got.deltas[row], deltas, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(got.distances[row], distances, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("replicas", [1, 2, 7])
def test_an_empty_removal_has_an_effect_of_exactly_0(mode: str, replicas: int) -> None:
    start = make(regression(), settings(precision="float32", removal_mode=mode))
    got = run_shard(start, [(1,), (2,), (), (3,), ()], 0, replicas)
    baseline = got.deltas[-2]
    assert torch.equal(got.deltas[2], baseline)
    assert torch.equal(got.deltas[4], baseline)
    assert not torch.equal(got.deltas[0], baseline)


@pytest.mark.parametrize("replicas", [1, 2, 7])
def test_a_removal_that_is_never_in_a_batch_has_an_effect_of_exactly_0_in_mask_mode(replicas: int) -> None:
    start = make(regression(), settings(precision="float32", removal_mode="mask", steps=3, evaluate=every_step(3)))
    order = next(orders(23, 8)).tolist()
    got = run_shard(start, [(order[15],), (order[22],), (order[0],), (order[10],), (order[12], order[20])], 8, replicas)
    effect = got.deltas - got.deltas[-2]
    assert (effect[:2] == 0).all()
    assert (effect[2].abs().amax(dim=1) > 0).all(), "removed from the first batch"
    for row in (3, 4):
        assert (effect[row, :2] == 0).all()
        assert effect[row, 2].abs().max() > 0, "removed from the third batch, and not before"


FULL = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
NO_WORKSPACE = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def _out_of_memory_above(limit: int, monkeypatch: pytest.MonkeyPatch, error: Exception = FULL) -> list[int]:
    tried: list[int] = []

    right = further_training.Training.__init__

    def limited(self, start, lanes: Sequence, *more, **options):
        tried.append(len(lanes))
        if len(lanes) > limit:
            raise error
        right(self, start, lanes, *more, **options)

    monkeypatch.setattr(further_training.Training, "__init__", limited)
    return tried


@pytest.mark.parametrize("error", [FULL, NO_WORKSPACE])
def test_lack_of_memory_halves_the_stack_and_changes_nothing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    start = make(regression(), settings(removal_mode="drop"))
    undisturbed = run_shard(start, REMOVALS, 1, 13)
    tried = _out_of_memory_above(4, monkeypatch, error)
    got = run_shard(start, REMOVALS, 1, 13)
    assert list(dict.fromkeys(size for size in tried if size > 1)) == [13, 6, 3]
    assert got.replicas == 3
    torch.testing.assert_close(got.deltas, undisturbed.deltas, rtol=1e-11, atol=1e-11)


def test_lack_of_memory_for_one_replica_is_the_error_that_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    _out_of_memory_above(0, monkeypatch)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run_shard(make(regression(), settings()), REMOVALS, 1, 13)


class Branches(torch.nn.Module):
    """Looks at its data to decide what to compute, which ``vmap`` cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        return self.last(torch.relu(hidden) if hidden.sum().item() > 0 else torch.tanh(hidden))


@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_a_model_that_cannot_be_stacked_trains_one_at_a_time(mode: str) -> None:
    workload, chosen = classification(model=Branches()), settings(removal_mode=mode)
    start = make(workload, chosen)
    assert measure_stack_size(start, 8)[0] == 1
    got = run_shard(start, [(3,), (4,)], 2, replicas=8)
    assert got.replicas == 1
    for row, removal in enumerate([(3,), (4,), (), ()]):
        deltas = train_cell(workload, chosen, removal, 2).deltas
        torch.testing.assert_close(got.deltas[row], deltas, rtol=1e-11, atol=1e-11)


def test_the_measured_stack_size_is_one_that_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    start = make(regression(), settings(precision="float32"))
    size, seconds = measure_stack_size(start, 10)
    assert size in seconds
    assert set(seconds) <= {1, 2, 4, 8}
    assert seconds[size] == min(seconds.values())
    assert measure_stack_size(start, 1)[0] == 1


def _outlier() -> Workload:
    """Training example 7 has a huge input: with it gradient descent diverges, without it not."""
    workload = regression()
    workload.train["x"][7] *= 1e4
    return workload


@pytest.mark.parametrize("mode", MODES)
def test_a_diverged_replica_harms_no_other(mode: str) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 1)
    workload = replace(_outlier(), model=linear)
    chosen = settings(Optimizer("sgd", lr=0.05), precision="float32", removal_mode=mode, epochs=20, batch_size=23)
    start = make(workload, chosen)
    got = further_train(start, [(), (7,), (3,), (3, 7)], 0).deltas
    assert not got[0, -1].isfinite().any()
    assert not got[2, -1].isfinite().any()
    if mode == "reweight":
        return  # The outlier is in every batch, and subtracted: too large to cancel in float32.
    alone = further_train(start, [(7,), (3, 7)], 0).deltas
    assert got[[1, 3]].isfinite().all()
    torch.testing.assert_close(got[[1, 3]], alone, rtol=1e-4, atol=1e-5)
