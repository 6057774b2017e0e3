"""The proof of the engine sees every fault that is put in on purpose, and gives up no more than what is wrong.

The faults are of one percent, in one lane, one step, one block or one kind of removal alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fimo.workers import further_training
from fimo.workers.amounts import Removal
from fimo.workers.batches import Block
from fimo.workers.errors import WorkloadError
from fimo.workers.proof import UnprovenError, Verdict, prove
from fimo.workers.settings import FurtherTraining, Optimizer
from fimo.workers.stacking import replay, replicas
from fimo.workers.start import Engine
from fimo.workers.trial import Case
from fimo.workers.workload import Workload
from tests.workers.problems import classification, make, regression, settings

TRACED, FOLDED, STACKED = "traced, folded and stacked", "folded and stacked", "stacked"
ALONE = "one replica at a time"
REMOVALS = [(3,), (7,), (11, 12), (22,), (0,), (5, 6, 8)]
PLAIN = Engine(replay=False)


def apart(**ways: bool) -> Engine:
    """An engine without stacks of several seeds, of which none was shown."""
    return Engine(join=False, **ways)


def verdict(
    workload: Workload,
    chosen: FurtherTraining,
    size: int = 4,
    shards: Sequence[int] = (6,),
    engine: Engine = PLAIN,
    removals: Sequence[Removal] = REMOVALS,
    joint: Sequence[int] = (),
) -> Verdict:
    start = make(workload, chosen)
    start = replace(start, engine=engine, graphs=start.graphs if engine.replay else None)
    case = Case(
        workload, None, start.settings, len(start.at_final), torch.device("cpu"), removals, 5, size, list(shards), joint
    )
    return prove(case, start)


@pytest.mark.parametrize("mode", ["drop", pytest.param("mask", marks=pytest.mark.slow), "reweight"])
def test_a_sound_engine_is_proven_and_the_verdict_says_on_what(mode: str) -> None:
    got = verdict(regression(), settings(precision="float32", removal_mode=mode, epochs=8), engine=Engine())
    assert (got.engine, got.path, got.lines) == (apart(), TRACED, ())
    assert {(), REMOVALS[0], REMOVALS[-1], (11, 12)} <= set(got.cells)
    assert list(got.stacks) == [4, 3, 1], "the full stack, the last of a shard, and a cell alone"
    assert got.steps[-1] > 6 * 5, "through the epochs until ragged batches are traced too"
    assert set(got.precisions) == {"float32", "float64"}
    for numbers in got.precisions.values():
        assert numbers["effects"] <= numbers["bound"]
        assert numbers["largest_effect"] > 1e-3
    assert got.precisions["float64"]["bound"] < 1e-7
    assert got.seconds < 60
    plain = json.loads(json.dumps(got.json(), allow_nan=False))
    assert plain["engine"] == {
        "replay": True,
        "trim": True,
        "fold": True,
        "stack": True,
        "fork": True,
        "join": False,
        "abreast": False,
    }


# -- faults of gradients and measures -------------------------------------------------------------------------------


def off_by_a_percent(monkeypatch: pytest.MonkeyPatch, name: str, where: Callable[[Any, Any], Any]) -> None:
    """Let ``replicas.<name>`` give 1% more in the lanes ``where(number of lanes, batch)``, None = in none."""
    right = getattr(replicas, name)

    def wrong(model: Any, params: Any, buffers: Any, batch: Any, *more: Any, **options: Any) -> Any:
        out = right(model, params, buffers, batch, *more, **options)
        lanes = where(len(next(iter(params.values()))), batch)
        if lanes is None:
            return out
        if name == "measures":
            out[lanes] *= 1.01
            return out
        return {n: g.index_put((torch.tensor(lanes),), 1.01 * g[lanes]) for n, g in out[0].items()}, out[1]

    monkeypatch.setattr(replicas, name, wrong)


@pytest.mark.parametrize("name", ["gradients", "measures"])
@pytest.mark.parametrize(
    ("size", "shards", "where"),
    [
        (4, [6], lambda count, _: [2] if count > 2 else None),
        (4, [6], lambda count, _: [0] if count == 3 else None),
        (4, [7, 5], lambda count, _: [1] if count == 2 else None),
        *((9, [17], lambda count, _, lane=lane: [lane] if count == 9 else None) for lane in range(9)),
    ],
    ids=["third lane", "last stack", "last stack of the last shard", *(f"lane {lane} of 9" for lane in range(9))],
)
def test_a_fault_in_one_lane(name: str, size: int, shards: list[int], where: Any, monkeypatch: Any) -> None:
    off_by_a_percent(monkeypatch, name, where)
    got = verdict(regression(), settings(removal_mode="mask"), size, shards)
    assert (got.path, got.engine.stack) == (ALONE, False)
    assert len(got.lines) == 2
    assert all("is off by" in line and "\n" not in line for line in got.lines)


def test_a_fault_in_the_second_block_of_evaluation_examples(monkeypatch: Any) -> None:
    off_by_a_percent(monkeypatch, "measures", lambda count, batch: [1] if count > 1 and len(batch["x"]) == 2 else None)
    assert verdict(regression(evals=130), settings()).path == ALONE


def test_a_fault_that_remains_one_replica_at_a_time_is_refused_in_one_line(monkeypatch: Any) -> None:
    off_by_a_percent(monkeypatch, "gradients", lambda count, _: [0] if count == 1 else None)
    with pytest.raises(UnprovenError, match="does not give the definition's numbers") as error:
        verdict(regression(), settings())
    assert "\n" not in str(error.value)


def test_a_fault_in_the_sum_of_blocks(monkeypatch: Any) -> None:
    right = replicas.GradientSum.add

    def wrong(self: Any, part: Any, lanes: tuple[int, ...]) -> None:
        more = 1.01 if len(lanes) < self._count else 1.0
        right(self, {n: None if g is None else g * more for n, g in part.items()}, lanes)

    monkeypatch.setattr(replicas.GradientSum, "add", wrong)
    assert verdict(regression(), settings(removal_mode="drop")).engine.fold, "one block has no sum"
    unfolded = verdict(regression(), settings(removal_mode="drop"), engine=Engine(replay=False, fold=False))
    assert unfolded.path == ALONE


def test_a_fault_in_clipping(monkeypatch: Any) -> None:
    right = replicas.clip

    def wrong(grads: Any, norm: float) -> Any:
        """As if the stack had one norm."""
        return right(grads, norm / len(next(iter(grads.values()))) ** 0.5)

    monkeypatch.setattr(replicas, "clip", wrong)
    assert verdict(regression(), settings(clip_norm=0.3)).path == ALONE


def test_a_fault_of_tracing_alone_gives_up_tracing_alone(monkeypatch: Any) -> None:
    right = replay._trace

    def wrong(*args: Any) -> Any:
        graph = right(*args)

        def off(leaves: list[Any]) -> Any:
            out = graph(leaves)
            return out * 1.01 if isinstance(out, Tensor) else out

        return off

    monkeypatch.setattr(replay, "_trace", wrong)
    got = verdict(regression(), settings(epochs=8), engine=Engine())
    assert (got.path, got.engine) == (FOLDED, apart(replay=False))
    assert [line.startswith(TRACED) for line in got.lines] == [True]


# -- faults of schedules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["drop", "mask", "reweight"])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda step, lane, removal: step == 8,
        lambda step, lane, removal: step == 5,
        lambda step, lane, removal: lane == 2,
        lambda step, lane, removal: len(removal) > 1,
        lambda step, lane, removal: len(removal) == 0,
    ],
    ids=["second epoch", "ragged batch", "one lane", "groups", "baseline"],
)
def test_a_fault_of_folding_gives_up_folding(wrong: Any, mode: str, monkeypatch: Any) -> None:
    right = further_training.folded

    def folded(n: int, lanes: Sequence[Removal], *more: Any) -> Iterator[list[Block]]:
        for step, (block,) in enumerate(right(n, lanes, *more), start=1):
            rows = torch.tensor([1.01 if wrong(step, lane, removal) else 1.0 for lane, removal in enumerate(lanes)])
            indices = block.indices if block.indices.ndim == 2 else block.indices.expand(len(lanes), -1)
            yield [Block(block.lanes, indices, block.weights * rows[:, None])]

    monkeypatch.setattr(further_training, "folded", folded)
    got = verdict(regression(), settings(removal_mode=mode))
    assert (got.path, got.engine) == (STACKED, apart(replay=False, trim=False, fold=False))


# -- several seeds in one stack ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["drop", "mask", "reweight"])
def test_stacks_of_several_seeds_are_proven_too(mode: str) -> None:
    got = verdict(regression(), settings(precision="float32", removal_mode=mode), joint=[14, 7])
    assert (got.engine, got.path) == (PLAIN, FOLDED + ", several seeds together")
    assert verdict(regression(), settings(removal_mode=mode)).path == FOLDED, "where there are any"


def test_a_forward_that_draws_has_no_stacks_of_several_seeds() -> None:
    got = verdict(regression(middle=nn.Dropout(0.5)), settings(), joint=[14])
    assert "seeds" not in got.path
    assert got.lines == ()


@pytest.mark.parametrize("size", [7, 70])
def test_a_fault_of_several_seeds_alone_gives_up_them_alone(size: int, monkeypatch: Any) -> None:
    right = further_training._schedule

    def first_seed_for_all(start: Any, removals: Sequence[Removal], seeds: Sequence[int]) -> Any:
        return right(start, removals, [seeds[0]] * len(seeds))

    monkeypatch.setattr(further_training, "_schedule", first_seed_for_all)
    got = verdict(regression(), settings(removal_mode="reweight"), joint=[size])
    assert (got.path, got.engine) == (FOLDED, replace(PLAIN, join=False))
    assert [f"in a stack of {size} of several seeds" in line for line in got.lines] == [True]


def test_a_fault_in_one_lane_of_a_stack_of_several_seeds(monkeypatch: Any) -> None:
    off_by_a_percent(monkeypatch, "gradients", lambda count, _: [13] if count == 14 else None)
    got = verdict(regression(), settings(), joint=[14])
    assert (got.path, got.engine) == (FOLDED, replace(PLAIN, join=False))


# -- models ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_stacked_falls_back_and_the_line_says_why() -> None:
    class Reads(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + self[0].bias[0].item())

    got = verdict(classification(model=Reads(nn.Linear(4, 3))), settings(), engine=Engine())
    assert (got.path, got.engine) == (ALONE, apart(replay=False, trim=False, fold=False, stack=False))
    assert list(got.stacks) == [1]
    assert ".item()" in got.lines[-1]


def test_state_outside_of_parameters_and_buffers_is_refused() -> None:
    class Keeps(nn.Sequential):
        """Keeps the mean of the first batch that it sees."""

        def forward(self, x: Tensor) -> Tensor:
            kept = self.__dict__.setdefault("kept", {})
            return super().forward(x) * (1 + kept.setdefault(len(x), x[:, :1].abs().mean().item()))

    with pytest.raises(UnprovenError) as error:
        verdict(classification(model=Keeps(nn.Linear(4, 3))), settings(removal_mode="mask"))
    assert "\n" not in str(error.value)


def test_what_fails_in_plain_torch_is_refused_in_one_line() -> None:
    """23 less 2 examples in batches of 5 leave a batch of one, of which batch norm has no variance."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with pytest.raises(WorkloadError, match=r"without \[11, 12\] fails in plain torch too: ValueError") as error:
        verdict(classification(model=model), settings(removal_mode="drop"))
    assert "\n" not in str(error.value)


def test_dropout_in_channels_last_is_proven_alone_and_stacked() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Dropout(0.3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    workload = classification(23, 6, model.to(memory_format=torch.channels_last), 2, 4, 4)
    for mode in ("drop", "mask", "reweight"):
        chosen = settings(Optimizer("adamw", lr=0.01), removal_mode=mode)
        assert verdict(workload, chosen, engine=Engine()).lines == ()
