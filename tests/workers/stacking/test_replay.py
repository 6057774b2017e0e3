"""A replayed step computes what the step computes, and what a graph could get wrong is not traced."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.further_training import further_train
from fimo.workers.settings import FurtherTraining, Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.stacking import replay
from fimo.workers.stacking.replay import AFTER, Replayed
from fimo.workers.start import Engine, start_from
from tests.support.covering import covering
from tests.workers.problems import Workload, classification, make, regression, sentences, settings
from tests.workers.stacking.test_stacked import Decides
from tests.workers.test_dropout_and_norm import batch_norm
from tests.workers.test_shard import Branches

MODES = ["drop", "mask", "reweight"]
LANES = [(), (3,), (17,), (22,)]


def both(workload: Workload, chosen: FurtherTraining, lanes: list[tuple[int, ...]]) -> tuple[Any, Tensor, Tensor]:
    """The start that replays, its deltas and the deltas without replaying."""
    dtype = getattr(torch, chosen.precision)
    parts = [Examples(s, workload.collate, dtype=dtype) for s in (workload.train, workload.evals)]
    model = FunctionalModel(workload, dtype=dtype)
    replaying, plain = (start_from(model, *parts, chosen, Engine(replay=r)) for r in (True, False))
    return replaying, further_train(replaying, lanes, 1).deltas, further_train(plain, lanes, 1).deltas


def convolutions() -> Workload:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))
    return classification(23, 6, model, 1, 8, 8)


def wide() -> Workload:
    """Products above the size from which they are turned round."""
    model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 48), nn.GELU(), nn.Linear(48, 3))
    return classification(90, 6, model)


def partly_frozen() -> Workload:
    workload = regression()
    workload.model[0].requires_grad_(False)
    workload.model.register_buffer("unused", torch.ones(3))
    return workload


def indexed() -> Workload:
    """The label's probability is picked by an index, and rows of a table are."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.layer = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + self.table[(x[:, 0] > 0).long()])

    def loss(out: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return -out.log_softmax(-1)[torch.arange(len(out)), batch["label"]]

    return replace(classification(model=Rows()), loss=loss)


def with_an_unused_parameter() -> Workload:
    workload = regression()
    workload.model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return workload


@pytest.mark.parametrize(
    ("workload", "mode", "precision"),
    covering(
        [regression, classification, convolutions, wide, partly_frozen, with_an_unused_parameter, indexed],
        MODES,
        ["float32", "float64"],
    ),
)
def test_replaying_changes_nothing_beyond_rounding(workload, precision: str, mode: str) -> None:
    optimizer = Optimizer("sgd", lr=0.05, momentum=0.9, weight_decay=0.1)
    chosen = settings(
        optimizer, precision=precision, removal_mode=mode, epochs=8, batch_size=40 if workload is wide else 5
    )
    replaying, replayed, plain = both(workload(), chosen, LANES)
    names = {key[0] for key, graph in replaying.graphs.items() if graph is not None}
    assert names == {"batch", "measures"}
    tight = {"float32": 2e-6, "float64": 1e-11}[precision]
    torch.testing.assert_close(replayed, plain, rtol=tight, atol=tight)
    assert plain.abs().max() > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_groups_of_different_sizes_step_as_one_block(mode: str) -> None:
    _, replayed, plain = both(regression(), settings(removal_mode=mode, epochs=8), [(), (3,), (4, 9, 20), (0, 1, 2, 5)])
    torch.testing.assert_close(replayed, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_a_shard_does_not_depend_on_the_shards_before_it(order: tuple[int, int]) -> None:
    """Graphs are kept from shard to shard, but when they are used follows from the shard alone."""
    chosen = settings(precision="float32", removal_mode="drop", epochs=6)
    removals = [(i,) for i in range(6)]
    fresh = run_shard(make(regression(), chosen), removals, 2, replicas=3)
    kept = make(regression(), chosen)
    results = {seed: run_shard(kept, removals, seed, replicas=3) for seed in order}
    assert torch.equal(results[2].deltas, fresh.deltas)


def _graphs(workload: Workload, **more: object) -> dict[object, Any] | None:
    prepared = make(workload, settings(epochs=4, **more))
    further_train(prepared, LANES, 0)
    return prepared.graphs


def test_randomness_state_and_ragged_data_are_never_traced() -> None:
    assert _graphs(regression(middle=nn.Dropout(0.5))) is None
    assert _graphs(classification(model=batch_norm())) is None
    assert _graphs(sentences()) is None


def test_stochastic_depth_that_never_drops_is_still_randomness() -> None:
    class Rarely(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (torch.rand(()) > 1e-9)

    assert make(regression(middle=Rarely()), settings()).forward.random


def test_decisions_on_data_are_not_baked_into_a_graph() -> None:
    workload = classification(model=Decides())
    chosen = settings(removal_mode="mask", epochs=8)
    replaying, replayed, plain = both(workload, chosen, LANES)
    assert [graph for key, graph in replaying.graphs.items() if key[0] == "batch"] == [None, None]
    assert torch.equal(replayed, plain)


def test_one_replica_alone_is_replayed_only_where_vmap_has_shown_it_to_be_safe() -> None:
    """A model alone may read numbers out of its tensors, which a graph would hold fast."""
    chosen = settings(epochs=8, removal_mode="drop")
    plain = make(classification(model=Branches()), chosen)
    further_train(plain, [()], 0)
    assert plain.graphs == {}
    replaying, replayed, eager = both(regression(), chosen, [(3,)])
    assert None not in replaying.graphs.values()
    assert len(replaying.graphs) == 3
    torch.testing.assert_close(replayed, eager, rtol=1e-11, atol=1e-11)


def test_writes_and_draws_are_refused_by_the_tracer() -> None:
    def writes(x: Tensor) -> Tensor:
        return (x + 1).relu_()

    def draws(x: Tensor) -> Tensor:
        return x + torch.rand_like(x)

    def reads_out(x: Tensor) -> Tensor:
        return x * float(x.sum())

    def draws_in_vain(x: Tensor) -> Tensor:
        torch.rand_like(x)
        return x * 2

    def draws_in_python(x: Tensor) -> Tensor:
        return x * (2 if random.random() < 1e-6 or np.random.rand() < 1e-6 else 3)

    def picks(x: Tensor) -> Tensor:
        return x[x > 0].sum()

    for function in (writes, draws, draws_in_vain, draws_in_python, reads_out, picks):
        graphs = replay.Graphs()
        replayed = Replayed(function, "f", graphs)
        for _ in range(AFTER + 2):
            replayed(torch.ones(3))
        assert list(graphs.values()) == [None]


def test_a_trace_makes_no_mode_for_each_of_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads Python's whole stack of calls: half of the time of a trace."""
    from torch.fx.experimental import proxy_tensor

    made = []
    monkeypatch.setattr(proxy_tensor, "FakeTensorMode", lambda **options: made.append(1) or FakeTensorMode(**options))
    graphs = replay.Graphs()
    replayed = Replayed(lambda x: (x.sin() * 2).sum(), "f", graphs)
    for _ in range(AFTER + 1):
        got = replayed(torch.ones(3))
    assert None not in graphs.values()
    assert made == []
    torch.testing.assert_close(got, 6 * torch.ones(()).sin())


def test_a_graph_that_would_not_reproduce_the_call_is_not_used() -> None:
    calls = []

    def counts(x: Tensor) -> Tensor:
        calls.append(1)
        return x * len(calls)

    graphs = replay.Graphs()
    replayed = Replayed(counts, "f", graphs)
    for _ in range(AFTER + 3):
        assert replayed(torch.ones(1)).item() == len(calls)
    assert list(graphs.values()) == [None]


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(5, 1, 7), (5, 6, 1), (1, 6, 5), (1, 1, 1), (40, 33, 50), (3, 4, 5)]
)
def test_products_of_every_shape_and_their_transposes(rows: int, inner: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, *s, generator=generator).double() for s in ((rows, inner), (inner, columns)))

    def function(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        product = torch.bmm(a, b)
        return product, torch.bmm(a, b).mT.reshape(3, -1) * 1, torch.bmm(a, b).transpose(2, 1)

    graphs = replay.Graphs()
    replayed = Replayed(function, "f", graphs)
    for _ in range(AFTER + 1):
        got = replayed(a, b)
    assert None not in graphs.values()
    for one, other in zip(got, function(a, b), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
