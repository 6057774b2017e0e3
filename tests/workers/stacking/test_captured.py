"""A recorded step gives what the step gives, or is not launched. Kernels are recorded on the CPU, as a GPU does it."""

from __future__ import annotations

import gc
import itertools
import random
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fimo.workers import further_training
from fimo.workers.amounts import Removal
from fimo.workers.batches import Block
from fimo.workers.definition import train_cell
from fimo.workers.further_training import Deltas, further_train
from fimo.workers.proof import prove
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.stacking import ahead
from fimo.workers.stacking import captured as captured_module
from fimo.workers.stacking.captured import CHECKED, Captured, Recorder
from fimo.workers.stacking.read import Read
from fimo.workers.stacking.replay import AFTER
from fimo.workers.stacking.trimming import Trimming
from fimo.workers.start import Engine, Start
from fimo.workers.trial import Case
from fimo.workers.workload import Workload
from tests.support.recorded import Counted, record
from tests.workers.problems import classification, make, regression, sentences, settings

LANES: list[Removal] = [(), (3,), (4, 9), (22,)]
SGD = Optimizer("sgd", lr=0.02, momentum=0.9)
ADAMW = Optimizer("adamw", lr=0.01, weight_decay=0.1)
ADAM = Optimizer("adam", lr=0.01, amsgrad=True)


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count recordings anew, and let torch's Adam count its steps on the CPU as it does on a GPU."""
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    Counted.recorded = Counted.launched = 0


def with_recorder(start: Start, recorder: Recorder | None = record) -> Start:
    return replace(start, graphs=None, captures=recorder)


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def both(
    workload: Workload, chosen: FurtherTraining, recorder: Recorder = record, engine: Engine | None = None
) -> tuple[Deltas, Deltas]:
    """Recorded and launched, and run."""
    start = make(workload, chosen)
    start = start.using(engine) if engine is not None else start
    return tuple(further_train(with_recorder(start, r), LANES, 5) for r in (recorder, None))  # type: ignore[return-value]


def assert_same(got: Deltas, expected: Deltas, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got.deltas, expected.deltas, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.distances, expected.distances, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["drop", "mask", "reweight"])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW, ADAM], ids=lambda o: o.name)
def test_what_is_launched_gives_the_numbers_of_what_is_run(mode: str, optimizer: Optimizer) -> None:
    chosen = settings(optimizer, removal_mode=mode, epochs=9, clip_norm=0.5, evaluate=Evaluate(every_epochs=1))
    assert_same(*both(classification(), chosen))
    # The step of a whole batch, of the ragged one, and the evaluation.
    assert Counted.recorded == 3
    assert Counted.launched == 9 * 5 - 2 * AFTER + 9 - AFTER


@pytest.mark.parametrize("mode", ["drop", "mask", "reweight"])
def test_blocks_of_some_lanes_are_launched_too(mode: str) -> None:
    # Of lanes 3 and 4 the batches are smaller, and a removal is subtracted apart.
    chosen = settings(ADAMW, removal_mode=mode, epochs=8, evaluate=Evaluate(every_epochs=1))
    assert_same(*both(regression(), chosen, engine=Engine(fold=False)))
    assert Counted.launched > 20


def test_running_statistics_are_part_of_a_launched_step() -> None:
    chosen = settings(SGD, removal_mode="mask", epochs=9, evaluate=Evaluate(every_epochs=1))
    assert_same(*both(classification(model=normed()), chosen))
    assert Counted.launched > 15


def test_replicas_that_are_due_at_other_steps_are_evaluated_for_themselves() -> None:
    # 26 examples in batches of 5: without one of them an epoch has a step less.
    chosen = settings(SGD, removal_mode="drop", epochs=9, evaluate=Evaluate(every_epochs=1))
    assert_same(*both(regression(n=26), chosen, engine=Engine(fork=False)))
    assert Counted.launched > 20


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=lambda o: o.name)
def test_a_fork_of_what_is_launched_has_its_bits(optimizer: Optimizer) -> None:
    chosen = settings(optimizer, removal_mode="drop", epochs=9, precision="float32")
    start = with_recorder(make(regression(), chosen))
    forked, whole = (
        run_shard(replace(start, engine=Engine(fork=fork)), [(3,), (17,), (22,), (9,), (14,)], 5, 2)
        for fork in (True, False)
    )
    assert torch.equal(forked.deltas, whole.deltas)
    assert Counted.launched > 50


@pytest.mark.parametrize("optimizer", [ADAMW, ADAM], ids=lambda o: o.name)
def test_steps_that_are_counted_on_the_device_are_those_of_plain_torch(optimizer: Optimizer) -> None:
    # torch counts in float32, which makes 1 - 0.999 ** t wrong by 6e-5.
    chosen = settings(optimizer, removal_mode="drop", epochs=3, evaluate=Evaluate(every_epochs=1))
    got = further_train(with_recorder(make(regression(), chosen)), LANES, 5)
    for row, removal in enumerate(LANES):
        plain = train_cell(regression(), chosen, removal, 5)
        torch.testing.assert_close(got.deltas[row], plain.deltas, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recorder", [record, None])
def test_a_pass_that_has_ended_leaves_its_memory_at_once(recorder: Recorder | None) -> None:
    # Not when the garbage collector comes by: the next stack of a shard needs it.
    start = with_recorder(make(regression(), settings(SGD, removal_mode="drop", epochs=3)), recorder)
    gc.collect()
    gc.disable()
    try:
        training = further_training.Training(start, LANES, 5)
        training.advance()
        left = [weakref.ref(p) for p in training._stack.params.values()]
        del training
        assert not [one for one in left if one() is not None]
    finally:
        gc.enable()


# -- what cannot be recorded, and what is recorded wrongly ----------------------------------------------------------


class Reads(nn.Module):
    """Decides by its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(self.layer.weight.detach().sum()) < 1e9 else x


def test_a_forward_that_reads_a_number_is_run() -> None:
    chosen = settings(SGD, removal_mode="drop", epochs=4)
    start = make(classification(model=Reads()), chosen)
    got, expected = (further_train(with_recorder(start, r), [(3,)], 5) for r in (record, None))
    assert_same(got, expected)
    assert Counted.launched == 0


class Skips(nn.Module):
    """Skips a layer once in eight times, in ragged batches alone."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.first, self.last, self.draw = nn.Linear(4, 4), nn.Linear(4, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        skips = self.training and len(x) == 3 and self.draw() < 1 / 8
        return self.last(x if skips else self.first(x))


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand()), lambda: torch.rand(()).item()])
def test_a_step_that_draws_now_and_then_is_run(draw: Callable[[], float]) -> None:
    """A launch is held against a step that most often goes as the recorded one did."""
    chosen = settings(SGD, removal_mode="mask", epochs=30)
    start = make(classification(model=Skips(draw)), chosen)
    assert_same(*(further_train(with_recorder(start, r), [(), (3,)], 5) for r in (record, None)))
    assert Counted.launched > 0, "whole batches draw nothing"


def test_a_step_that_counts_its_calls_is_run() -> None:
    calls, total = 0, torch.zeros(())

    def body(blocks: Sequence[Block]) -> None:
        nonlocal calls
        calls += 1
        total.add_(blocks[0].weights * calls)

    captured = Captured(body, lambda: [total], record)
    for _ in range(AFTER + 3):
        before = float(total)
        captured([Block((0,), torch.zeros(1, dtype=torch.long), torch.ones(()))])
        assert float(total) - before == calls, "what was frozen is not launched"
    assert Counted.launched == 1


def frozen(body: Callable[[], None]) -> Callable[[], None]:
    """A recorder whose launches do nothing."""
    body()
    return lambda: None


def forgets(body: Callable[[], None]) -> Callable[[], None]:
    """A recorder whose launches leave out the last kernel that was recorded."""
    import tests.support.recorded as recorded

    with recorded._Recording() as recording:
        body()
    calls = recording.calls[:-1]

    def launch() -> None:
        for func, args, kwargs, out in calls:
            recorded.again(func, args, kwargs, out)

    return launch


def refuses(_body: Callable[[], None]) -> Callable[[], None]:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def half_done(body: Callable[[], None]) -> Callable[[], None]:
    """A recorder that fails when the step has been taken."""
    body()
    raise RuntimeError("CUDA error: out of memory")


@pytest.mark.parametrize("recorder", [frozen, forgets, refuses, half_done])
def test_a_recorder_that_errs_changes_no_number(recorder: Recorder) -> None:
    chosen = settings(ADAMW, removal_mode="reweight", epochs=9, evaluate=Evaluate(every_epochs=1))
    assert_same(*both(regression(), chosen, recorder))


def test_a_launch_that_does_not_see_its_inputs_is_found_at_the_second() -> None:
    given = [torch.tensor(float(i)) for i in range(AFTER + 4)]
    total = torch.zeros(())

    def body(blocks: Sequence[Block]) -> None:
        total.add_(blocks[0].weights)

    def deaf(run: Callable[[], None]) -> Callable[[], None]:
        del run
        return lambda: total.add_(given[AFTER])

    captured = Captured(body, lambda: [total], deaf)
    for number in given:
        captured([Block((0,), torch.zeros(1, dtype=torch.long), number)])
    assert float(total) == sum(range(AFTER + 4))


@pytest.mark.parametrize(("dtype", "launched"), [(torch.float32, 3), (torch.float64, 1)])
def test_a_measure_in_float64_of_a_float32_model_may_round_as_float32_does(dtype: torch.dtype, launched: int) -> None:
    g = torch.zeros(3, dtype=torch.float64)

    def other_kernels(body: Callable[[], None]) -> Callable[[], None]:
        del body

        def launch() -> None:
            Counted.launched += 1
            g.copy_(torch.arange(1.0, 4.0).double() + 1e-6)

        return launch

    captured = Captured(lambda _: g.copy_(torch.arange(1.0, 4.0)), lambda: [g], other_kernels, dtype)
    for _ in range(AFTER + 3):
        g.zero_()
        captured()
    assert Counted.launched == launched


def later_wrong(body: Callable[[], None]) -> Callable[[], None]:
    """A recorder whose launches go wrong when nobody looks any more."""
    launch, launches = record(body), 0

    def launched() -> None:
        nonlocal launches
        launches += 1
        launch()
        if launches > CHECKED:
            launch()

    return launched


def _case(workload: Workload, start: Start) -> Case:
    removals: list[Removal] = [(3,), (7,), (11, 12), (0,)]
    return Case(workload, None, start.settings, len(start.at_final), torch.device("cpu"), removals, 5, 3, [4])


@pytest.mark.parametrize(
    ("recorder", "path"), [(record, "traced, folded and stacked"), (later_wrong, "folded and stacked")]
)
def test_the_proof_holds_what_is_launched_against_the_definition(recorder: Any, path: str) -> None:
    chosen = settings(SGD, removal_mode="drop", epochs=9)
    workload = regression()
    start = with_recorder(make(workload, chosen), recorder)
    verdict = prove(_case(workload, start), start)
    assert verdict.path == path
    assert verdict.engine.replay == (recorder is record)


def test_what_a_recorded_step_reads_lives_as_long_as_it() -> None:
    # A graph has addresses: the index of some lanes is forgotten after a thousand others.
    kept, total = [torch.full((3,), 2.0)], torch.zeros(3)

    def body(_blocks: Sequence[Block]) -> None:
        total.add_((kept[0] * 2).exp())

    captured = Captured(body, lambda: [total], lambda run: (run(), lambda: total.add_(54.598150033144236))[1])
    for _ in range(AFTER + CHECKED + 1):
        captured()
    storage = weakref.ref(kept[0].untyped_storage()), kept[0].untyped_storage()._cdata
    (recorded,) = captured._recorded.values()
    assert recorded is not None
    assert set(recorded.read.held) == {storage[1], total.untyped_storage()._cdata}, "and nothing that it makes"
    kept.clear()
    assert storage[0]() is not None


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), x.sum()),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
    ],
)
def test_what_brings_a_value_from_the_device_is_refused_before_torch_prepares_for_it(reads: Any) -> None:
    # It asks CUDA for pinned memory first, which ends a recording; the meta device stands for a GPU.
    with Read():
        torch.ones(3).sum().item()
        with pytest.raises(RuntimeError, match="brings a value to the host"):
            reads(torch.empty(3, device="meta"))


def test_random_numbers_are_refused_but_not_layers_that_could_draw() -> None:
    x = torch.empty(2, 3, 4, 8, device="meta")
    with Read():
        for draws in (torch.rand_like, lambda t: t.bernoulli_(0.5), lambda t: torch.native_dropout(t, 0.5, True)):
            with pytest.raises(RuntimeError, match="draws random numbers"):
                draws(x)
        torch.ops.aten._scaled_dot_product_flash_attention(x, x, x)


def test_indices_and_writes_that_need_no_value_are_recorded() -> None:
    x, places = torch.empty(3, device="meta"), torch.empty(2, dtype=torch.long, device="meta")
    with Read():
        x[places] = x[places] * 2
        x.masked_fill_(x > 0, 1.0)
        torch.where(x > 0, x, 0.0).gather(0, places).sum()


# -- batches that are brought ahead ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["drop", "mask", "reweight"])
def test_blocks_that_are_brought_ahead_are_the_same_blocks(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "BYTES", 3000)
    for engine in (Engine(), Engine(fold=False)):
        start = make(regression(), settings(removal_mode=mode)).using(engine)
        here, there = (further_training._schedule(start, LANES, [5] * len(LANES)) for _ in range(2))
        brought = ahead.placed(itertools.islice(there, 33), torch.device("cpu"))
        steps = 0
        for expected, got in zip(itertools.islice(here, 33), brought, strict=True):
            steps += 1
            for one, other in zip(expected, got, strict=True):
                assert (one.lanes, one.sizes, one.length) == (other.lanes, other.sizes, other.length)
                assert torch.equal(one.indices, other.indices)
                assert torch.equal(one.weights, other.weights)
        assert steps == 33


def test_only_examples_that_are_tensors_are_brought_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    brought = []
    monkeypatch.setattr(further_training, "is_gpu", lambda _: True)
    monkeypatch.setattr(further_training, "placed", lambda steps, _: brought.append(1) or steps)
    for workload in (sentences(), regression()):
        start = make(workload, settings(removal_mode="drop"))
        further_train(start, LANES, 5)
    assert len(brought) == 1, "a dataset is asked for numbers that would have to come back"
    cut = Trimming(torch.full((23,), 4), 4)
    further_train(replace(make(regression(), settings(removal_mode="reweight")), trimming=cut), LANES, 5, last=1)
    assert len(brought) == 1


def test_steps_that_are_hardly_ever_alike_are_not_all_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_module, "MOST", 2)
    total = torch.zeros(())
    captured = Captured(lambda blocks: total.add_(blocks[0].weights.sum()), lambda: [total], record)
    for size in (1, 2, 3) * (AFTER + CHECKED + 2):
        captured([Block((0,), torch.zeros(size, dtype=torch.long), torch.ones(size))])
    assert Counted.recorded == 2
    assert float(total) == 6 * (AFTER + CHECKED + 2)
