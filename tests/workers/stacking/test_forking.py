"""A cell that is forked from its baseline has the bits of one that was trained from θᶠ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fimo.workers import further_training
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.stacking.forking import stacks_of
from fimo.workers.stacking.replay import Graphs
from fimo.workers.start import Engine
from fimo.workers.workload import Workload
from tests.support.covering import covering
from tests.workers.problems import classification, make, regression, sentences, settings

ADAMW = Optimizer("adamw", lr=0.01, weight_decay=0.1)
MOMENTUM = Optimizer("sgd", lr=0.02, momentum=0.9, nesterov=True)
REMOVALS = [(3,), (17,), (22,), (0, 5), (9,), (11,), (4, 9, 20), (1,), (14,)]


class Scaled(nn.Module):
    """A parameter that is one number, and one that the loss does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale, self.idle = nn.Linear(4, 3), nn.Parameter(torch.tensor(1.5)), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


def dropping() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3))


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


WORKLOADS = {
    "mlp": regression,
    "scalar": lambda: classification(model=Scaled()),
    "dropout": lambda: classification(model=dropping()),
    "batch norm": lambda: classification(25, model=normed()),
    "dataset": sentences,
    "last batch of one": lambda: regression(n=26),
}


def both(workload: Workload, chosen: FurtherTraining, replicas: int, monkeypatch: pytest.MonkeyPatch):
    """Results with and without forking, and the steps that each took, weighted by replicas."""
    start, taken, found = make(workload, chosen), [], []
    right = further_training._Stack.gradients

    def counted(self, step, blocks):
        taken.append(self.size)
        return right(self, step, blocks)

    monkeypatch.setattr(further_training._Stack, "gradients", counted)
    for fork in (True, False):
        taken.clear()
        fresh = replace(start, graphs=None if start.graphs is None else Graphs())
        found.append((run_shard(fresh.using(Engine(fork=fork)), REMOVALS, 4, replicas), sum(taken)))
    return found


@pytest.mark.parametrize(
    ("name", "mode", "replicas"),
    [
        *covering(WORKLOADS, ["drop", "mask"], [1, 4]),
        *(pytest.param(name, mode, 3, marks=pytest.mark.slow) for name in WORKLOADS for mode in ("drop", "mask")),
    ],
)
def test_forking_changes_no_bit(name: str, mode: str, replicas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = ADAMW if name in ("scalar", "dropout") else MOMENTUM
    chosen = settings(optimizer, removal_mode=mode, epochs=8, evaluate=Evaluate(every_epochs=1), clip_norm=1.0)
    (forked, fewer), (plain, more) = both(WORKLOADS[name](), chosen, replicas, monkeypatch)
    assert plain.deltas.isfinite().all()
    assert torch.equal(forked.deltas, plain.deltas)
    assert torch.equal(forked.distances, plain.distances)
    if replicas == 1 or name != "batch norm" or mode == "drop":
        assert fewer < more, "nothing was forked"


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_half_of_one_epoch_of_mask_is_saved_cell_by_cell(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    every = Evaluate(every_steps=1)
    chosen = settings(ADAMW, removal_mode="mask", epochs=1, evaluate=every, batch_size=2, precision=precision)
    (forked, fewer), (plain, more) = both(classification(), chosen, 1, monkeypatch)
    assert torch.equal(forked.deltas, plain.deltas)
    assert fewer < 0.7 * more


def test_a_traced_stack_is_forked_as_if_its_calls_had_been_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(MOMENTUM, removal_mode="mask", epochs=3, batch_size=2, precision="float32")
    (forked, fewer), (plain, more) = both(regression(), chosen, 4, monkeypatch)
    assert torch.equal(forked.deltas, plain.deltas)
    assert fewer < more


def test_reweight_differs_from_the_first_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    (forked, taken), (plain, as_many) = both(regression(), settings(removal_mode="reweight"), 4, monkeypatch)
    assert torch.equal(forked.deltas, plain.deltas)
    assert taken == as_many


def test_the_baseline_is_first_and_a_smaller_stack_shares_nothing() -> None:
    start = make(regression(), settings(removal_mode="mask", batch_size=2))
    cells = [(), *REMOVALS]
    stacks = stacks_of(start, cells, range(len(cells)), 4, 4)
    assert [len(stack.lanes) for stack in stacks] == [4, 2, 4]
    assert sorted(place for stack in stacks for place in stack.places) == list(range(len(cells)))
    assert stacks[0].lanes[0] == ()
    assert stacks[1].shared == 0 < stacks[2].shared


def test_memory_that_lacks_for_two_stacks_is_enough_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    start = make(regression(), settings(removal_mode="mask"))
    right, begun = further_training.Training.__init__, []

    def short(self, start, lanes, seed, origin=None, rates=None):
        begun.append(origin is not None)
        if origin is not None:
            raise torch.cuda.OutOfMemoryError("out of memory")
        right(self, start, lanes, seed, origin, rates)

    expected = run_shard(start, REMOVALS, 4, 5)
    monkeypatch.setattr(further_training.Training, "__init__", short)
    got = run_shard(start, REMOVALS, 4, 5)
    assert any(begun)
    assert got.replicas == 5
    assert torch.equal(got.deltas, expected.deltas)
