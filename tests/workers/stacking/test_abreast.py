"""Replicas of a stack that are computed each by itself, on streams: the same numbers, and nothing out of order."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fimo.workers.amounts import Removal
from fimo.workers.definition import train_cell
from fimo.workers.further_training import further_train
from fimo.workers.joined import run_shards
from fimo.workers.proof import LEVELS, prove
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.stacking import abreast, size
from fimo.workers.stacking.captured import Recorder
from fimo.workers.stacking.size import measure_stacks
from fimo.workers.start import Engine, Start
from fimo.workers.trial import Case
from fimo.workers.workload import Workload
from tests.support.recorded import Counted, record
from tests.workers.problems import classification, make, regression, sentences, settings

LANES: list[Removal] = [(), (3,), (4, 9), (22,)]
SGD = Optimizer("sgd", lr=0.02, momentum=0.9)
GPU = torch.device("cuda", 0)


def images(middle: nn.Module | None = None) -> Workload:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), middle or nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    return classification(23, 6, nn.Sequential(*layers), 2, 4, 4)


def side_by_side(workload: Workload, chosen: FurtherTraining, recorder: Recorder | None = None) -> Start:
    start = replace(make(workload, chosen), captures=recorder)
    start = start.using(replace(start.engine, abreast=True))
    assert start.abreast
    return start


@pytest.mark.parametrize("recorder", [record, None])
@pytest.mark.parametrize("mode", ["drop", "mask", "reweight"])
@pytest.mark.parametrize("workload", [images, lambda: images(nn.GroupNorm(2, 4)), regression, sentences])
def test_cells_are_the_definitions(workload: Callable[[], Workload], mode: Any, recorder: Recorder | None) -> None:
    if workload is images and mode == "reweight":
        pytest.skip("refused for batch norm")
    if workload is sentences and recorder is not None:
        pytest.skip("a dataset's steps are not recorded")
    chosen = settings(SGD, removal_mode=mode, epochs=7, evaluate=Evaluate(every_epochs=1), clip_norm=1.0)
    before = Counted.launched
    got = further_train(side_by_side(workload(), chosen, recorder), LANES, 5)
    for row, removal in enumerate(LANES):
        cell = train_cell(workload(), chosen, removal, 5)
        torch.testing.assert_close(got.deltas[row], cell.deltas, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got.distances[row], cell.distances, rtol=1e-9, atol=1e-9)
    assert (Counted.launched > before + 5) == (recorder is not None)


def test_several_seeds_and_a_last_smaller_stack() -> None:
    chosen = settings(SGD, removal_mode="drop", epochs=2, evaluate=Evaluate(every_epochs=1))
    start = side_by_side(images(nn.GroupNorm(2, 4)), chosen)
    shards = [([(3,), (17,), (22,)], seed) for seed in (5, 6, 7)]
    results = [result for _, some in run_shards(start, shards, 8) for result in some]
    for result, (removals, seed) in zip(results, shards, strict=True):
        for row, removal in enumerate([*removals, (), ()]):
            cell = train_cell(images(nn.GroupNorm(2, 4)), chosen, removal, seed)
            torch.testing.assert_close(result.deltas[row], cell.deltas, rtol=1e-9, atol=1e-9)


class WritesIntoZeros(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=x.dtype)
        out += x
        return out


def test_second_baselines_of_a_model_that_vmap_refuses_are_trained_abreast() -> None:
    shards = [([(3,), (4,)], 0), ([(3,), (4,)], 1)]
    start = side_by_side(images(WritesIntoZeros()), settings(SGD, removal_mode="drop", epochs=2))
    [(places, results)] = run_shards(start, shards, 6)
    assert places == range(2)
    for (removals, seed), result in zip(shards, results, strict=True):
        torch.testing.assert_close(result.deltas, run_shard(start, removals, seed, 3).deltas, rtol=1e-9, atol=1e-9)


def test_a_replica_has_the_bits_of_one_that_is_alone_whatever_the_stack() -> None:
    chosen = settings(SGD, removal_mode="drop", precision="float32", epochs=3, evaluate=Evaluate(every_epochs=1))
    start = replace(side_by_side(images(), chosen), graphs=None)
    one, three = (run_shard(start, LANES[1:], 5, replicas).deltas for replicas in (1, 3))
    assert torch.equal(one, three)
    several = next(result for _, some in run_shards(start, [(LANES[1:], 5), (LANES[1:], 6)], 8) for result in some)
    assert torch.equal(several.deltas[:-1], one[:-1])
    # So the second baseline, which shows what rounding does, is trained otherwise.
    for deltas in (one, three, several.deltas):
        assert 0 < float((deltas[-1] - deltas[-2]).abs().max()) < 1e-5


def test_what_one_replica_alone_depends_on_is_refused() -> None:
    torch.manual_seed(0)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.other(x) if float(self.one.bias.detach()[0]) > 0 else self.one(x)

    start = make(classification(model=Gated()), settings())
    params = {name: torch.stack([p, p]) for name, p in start.model.params.items()}
    params["one.bias"][:, 0] = torch.tensor([1.0, -1.0])
    with pytest.raises(RuntimeError, match="only some replicas' losses depend on"):
        abreast.gradients(start.model, params, {}, start.train.batch(range(5)), torch.ones(5), True)


def test_a_forward_that_draws_is_not_computed_abreast() -> None:
    start = make(regression(middle=nn.Dropout(0.5)), settings())
    assert not start.using(Engine(abreast=True)).abreast


# -- streams ---------------------------------------------------------------------------------------------------------


class Streams:
    """CUDA's order, as far as streams know it: what each of them is sure to come after."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capturing: bool) -> None:
        own, self.here = self, self.stream("main")
        monkeypatch.setattr(abreast, "_streams", lambda _: [own.stream(str(i)) for i in range(3)])
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: own.here)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        monkeypatch.setattr(torch.cuda, "stream", own.on)

    def stream(self, name: str) -> Any:
        class Stream:
            def __init__(self) -> None:
                self.name, self.after = name, set[str]()

            def wait_stream(self, other: Stream) -> None:
                self.after |= other.after

        return Stream()

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.here = self.here, stream
        try:
            yield
        finally:
            self.here = before

    def work(self, name: str) -> set[str]:
        """Do some work here; what is sure to be done before."""
        before = set(self.here.after)
        self.here.after.add(name)
        return before


def test_replicas_are_computed_at_once_after_what_was_before_and_before_what_comes_after(monkeypatch) -> None:
    streams = Streams(monkeypatch, capturing=True)
    streams.work("batch")
    seen = abreast.side_by_side(lambda lane: streams.work(f"lane {lane}"), 5, GPU)
    # Three streams for five replicas: two follow another on its stream.
    assert seen == [{"batch"}, {"batch"}, {"batch"}, {"batch", "lane 0"}, {"batch", "lane 1"}]
    assert streams.work("step") == {"batch", *(f"lane {lane}" for lane in range(5))}
    # The next step's come after this one's, on whatever stream they are: memory may be taken again.
    assert {"step", "lane 4"} <= set.intersection(*abreast.side_by_side(lambda _: streams.work("next"), 3, GPU))


def test_what_is_not_recorded_is_computed_one_after_the_other(monkeypatch) -> None:
    streams = Streams(monkeypatch, capturing=False)
    streams.work("batch")
    seen = abreast.side_by_side(lambda lane: streams.work(f"lane {lane}"), 5, GPU)
    assert seen == [{"batch", *(f"lane {earlier}" for earlier in range(lane))} for lane in range(5)]
    assert streams.work("step") == {"batch", *(f"lane {lane}" for lane in range(5))}


@pytest.mark.parametrize("capturing", [True, False])
def test_all_streams_come_back_if_a_replica_fails(monkeypatch, capturing: bool) -> None:
    streams = Streams(monkeypatch, capturing)

    def fails(lane: int) -> None:
        streams.work(f"lane {lane}")
        if lane == 1:
            raise RuntimeError("CUDA error: out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        abreast.side_by_side(fails, 5, GPU)
    assert streams.here.name == "main"
    assert streams.work("") >= {"lane 0", "lane 1"}


# -- replicas that depend on each other ------------------------------------------------------------------------------


def lanes_of(works: Sequence[Callable[[], object]]) -> None:
    apart = abreast.Apart()
    for lane, work in enumerate(works):
        with apart.of(lane):
            work()


def test_what_another_replica_has_made_is_not_read() -> None:
    table: list[Tensor] = []

    def forward() -> Tensor:
        if not table:
            table.append(torch.arange(4.0))
        return table[0][1:].exp()

    with pytest.raises(RuntimeError, match="reads what another replica has made"):
        lanes_of([forward, forward])
    # One that was there before is everybody's.
    lanes_of([forward, forward])


WRITES = (
    lambda t: t.add_(1),
    lambda t: t[1:].zero_(),
    lambda t: torch.exp(torch.ones(3), out=t),
    lambda t: t.relu_(),
)


@pytest.mark.parametrize("work", WRITES)
def test_what_is_not_a_replicas_own_is_not_written(work: Callable[[Tensor], Tensor]) -> None:
    count = torch.zeros(3)
    with pytest.raises(RuntimeError, match="writes what is not the replica's own"):
        lanes_of([lambda: work(count)])
    lanes_of([lambda: work(count.clone()), lambda: work(count * 2)])


def test_a_backward_is_looked_at_too() -> None:
    kept: list[Tensor] = []

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_ctx: Any, grad: Tensor) -> Tensor:
            if not kept:
                kept.append(grad * 2)
            return grad * kept[0]

    def one() -> object:
        x = torch.ones(3, requires_grad=True)
        return torch.autograd.grad(Keeps.apply(x).sum(), x)

    with pytest.raises(RuntimeError, match="reads what another replica has made"):
        lanes_of([one, one])


def test_a_forward_that_draws_for_some_batches_alone_is_not_computed_abreast_there() -> None:
    """Each replica would draw what comes after the numbers of the one before."""

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * random.random() if self.training and len(x) == 3 else x

    chosen = settings(SGD, removal_mode="mask", epochs=2)
    shard = run_shard(side_by_side(images(Noisy()), chosen), LANES[1:], 5, 4)
    assert shard.replicas == 1
    for row, removal in enumerate([*LANES[1:], ()]):
        cell = train_cell(images(Noisy()), chosen, removal, 5)
        torch.testing.assert_close(shard.deltas[row], cell.deltas, rtol=1e-9, atol=1e-9)


# -- the choice ------------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Ways that were timed; abreast takes half as long as ``vmap`` does, and a stack of one what it takes."""
    tried: list[bool] = []

    def time_stack(start: Start, lanes: Sequence[Removal], **_more: object) -> float:
        tried.append(start.abreast)
        return 1.0 if len(lanes) == 1 else (0.4 if start.abreast else 0.8) / len(lanes)

    monkeypatch.setattr(size, "time_stack", time_stack)
    return tried


def test_the_way_is_measured_where_there_are_convolutions_and_steps_are_recorded(timed: list[bool]) -> None:
    start = replace(make(images(), settings()), captures=record)
    stacks = measure_stacks(start, 8)
    assert (stacks.replicas, stacks.abreast, set(timed)) == (8, True, {False, True})
    assert stacks.by_streams[8] == 0.05
    assert stacks.seconds[8] == 0.1


@pytest.mark.parametrize(
    "start",
    [
        lambda: make(images(), settings()),
        lambda: replace(make(regression(), settings()), captures=record),
        lambda: replace(make(images(nn.Dropout(0.5)), settings()), captures=record),
        lambda: replace(make(images(), settings()), captures=record).using(Engine(stack=False)),
    ],
    ids=["run", "no convolutions", "draws", "alone"],
)
def test_elsewhere_there_is_one_way(timed: list[bool], start: Callable[[], Start]) -> None:
    assert not measure_stacks(start(), 8).abreast
    assert set(timed) == {False}


def _case(workload: Workload, start: Start) -> Case:
    removals: list[Removal] = [(3,), (7,), (11, 12), (0,)]
    return Case(workload, None, start.settings, len(start.at_final), torch.device("cpu"), removals, 5, 3, [4])


def test_the_proof_holds_it_against_the_definition_and_gives_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(SGD, removal_mode="drop", epochs=3)
    workload = images()
    start = side_by_side(workload, chosen)
    verdict = prove(_case(workload, start), start)
    assert (verdict.path, verdict.engine.abreast, verdict.lines) == ("stacked on streams", True, ())
    right = abreast._stacked
    monkeypatch.setattr(abreast, "_stacked", lambda grads: right([grads[0], *grads[:-1]]))
    verdict = prove(_case(workload, start), start)
    assert (verdict.path, verdict.engine.abreast) == ("stacked", False)
    assert "stacked on streams: the effect" in verdict.lines[0]


def test_a_proof_that_gives_up_recorded_steps_gives_up_streams() -> None:
    """Launched one by one, replicas by themselves are as slow as one at a time."""
    assert not any(level.abreast and not level.replay for level in LEVELS)
