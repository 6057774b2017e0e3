"""Passes on a device that is not there, in a process of their own: ``python -m tests.workers.stacking.pretended``.

torch's autograd counts the devices at its first backward, so that the device must be known before. Prints one line of
JSON: what went wrong, by case.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fimo.workers import further_training
from fimo.workers.amounts import Removal
from fimo.workers.batches import Block
from fimo.workers.settings import Evaluate, Optimizer
from fimo.workers.stacking import replicas
from fimo.workers.stacking.captured import Captured
from fimo.workers.start import Engine, Start
from tests.support import pretend_gpu
from tests.workers import problems

LANES: list[Removal] = [(), (0,), (3, 4), (7,)]
OPTIMIZERS = (Optimizer("sgd", 0.05, momentum=0.9), "float32"), (Optimizer("adamw", 0.01), "float64")
CPU = torch.device("cpu")


def _at(value: Any, device: torch.device) -> Any:
    def one(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)

    return tree_map(one, value)


def _there(start: Start, device: torch.device) -> Start:
    """The start as it would be on the device; g(z, θᶠ) is held on the CPU."""
    model = copy.copy(start.model)
    model.device, model.params, model.fixed = device, _at(model.params, device), _at(model.fixed, device)
    train = copy.copy(start.train)
    train.device, train._tensors = device, _at(train._tensors, device)
    evals = replace(start.evals, blocks=[_at(block, device) for block in start.evals.blocks])
    return replace(start, model=model, train=train, evals=evals, at_final=_at(start.at_final, CPU), graphs=None)


def _steps(start: Start, lanes: Sequence[Removal]) -> list[Sequence[Block]]:
    """The blocks of all steps: they are data, and made where there are numbers."""
    last, schedule = further_training.Record(start, lanes).last, further_training._schedule(start, lanes, [3])
    return [next(schedule) for _ in range(last)]


def run(start: Start, lanes: Sequence[Removal] = LANES, recorded: int = 2) -> None:
    """Train the lanes on the device, where so many bodies at least are recorded (a step's, and the evaluation's).

    They do nothing when they are launched; 0 = nothing is recorded.
    """
    steps, bodies = _steps(start, lanes), list[Callable[[], None]]()

    def recorder(body: Callable[[], None]) -> Callable[[], None]:
        body()
        bodies.append(body)
        return lambda: None

    replicas.places.cache_clear()
    with pretend_gpu.gpu() as device:
        alike = {id(t): _at(t, CPU) for step in steps for b in step for t in (b.indices, b.weights)}

        def without_numbers(*_: object) -> Iterator[Sequence[Block]]:
            for step in steps:
                yield [replace(b, indices=alike[id(b.indices)], weights=alike[id(b.weights)]) for b in step]

        with (
            mock.patch.object(further_training, "_schedule", without_numbers),
            mock.patch.object(further_training, "kept", return_value=contextlib.nullcontext()),
            mock.patch.object(Captured, "_launches_as_it_runs", return_value=True),
        ):
            there = replace(_there(start, device), captures=recorder if recorded else None)
            training = further_training.Training(there, lanes, 3)
            with pretend_gpu.NoWaits():
                training.advance()
            training.state_of(0)
            deltas = training.result().deltas
    assert deltas.device.type == "cpu"
    assert deltas.shape == (len(lanes), start.settings.steps, len(start.at_final))
    assert len(bodies) >= recorded, "a body that is the device's own was not recorded"


class _LeftBehind(nn.Module):
    """Makes a tensor in its forward, on the CPU wherever it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.arange(3.0, dtype=x.dtype)


class _Reads(nn.Module):
    """Reads a number of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * float(x.shape[0] > 0) if float(self.layer.bias.sum()) < 9e9 else self.layer(x)


class _Attends(nn.Module):
    """Attention without dropout, over the four numbers of an example."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        each = x[:, None, :, None] * self.layer.weight[0]
        return self.layer(nn.functional.scaled_dot_product_attention(each, each, each).mean((1, 3)))


class _Fused(TorchFunctionMode):
    """Attention as torch has it on CUDA, which under ``vmap`` keeps nothing for its backward."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fused = func is nn.functional.scaled_dot_product_attention and torch.is_grad_enabled()
        if fused and any(_functorch.is_batchedtensor(t) for t in args):
            raise RuntimeError("LSE is not correctly aligned (strideH)")
        return func(*args, **(kwargs or {}))


def _attended() -> None:
    chosen = problems.settings(batch_size=10, steps=9, evaluate=Evaluate(every_steps=1), removal_mode="drop")
    start = problems.make(problems.classification(model=_Attends()), chosen)
    with _Fused():
        run(start)


def _cases() -> Iterator[tuple[str, Callable[[], None]]]:
    def case(engine: Engine, model: nn.Module | None, lanes: Sequence[Removal] = LANES, **more: Any) -> None:
        optimizer, every = more.pop("optimizer", OPTIMIZERS[0][0]), Evaluate(every_steps=1)
        least = more.pop("least", 2)
        chosen = problems.settings(optimizer, batch_size=10, steps=9, evaluate=every, **more)
        for recorded in (least, 0):
            run(problems.make(problems.classification(model=model), chosen).using(engine), lanes, recorded)

    for mode, (optimizer, precision) in product(("drop", "mask", "reweight"), OPTIMIZERS):
        name = f"{mode} {optimizer.name} {precision}"
        more = {"optimizer": optimizer, "precision": precision, "removal_mode": mode, "clip_norm": 1.0}
        yield name, lambda more=more: case(Engine(), None, **more)
        yield f"{name} not folded", lambda more=more: case(Engine(fold=False), None, **more)
    yield "alone", lambda: case(Engine(), None, [(2,)], removal_mode="drop")
    normed = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    yield "batch norm", lambda: case(Engine(), normed, [(), (0,), (3,), (7,)], removal_mode="drop")
    # Its batches are of other sizes in every step.
    yield "batch norm, masked", lambda: case(Engine(), normed, removal_mode="mask", least=1)
    images = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(8, 3))
    shaped = nn.Sequential(nn.Unflatten(1, (1, 4)), *images)
    yield "side by side", lambda: case(Engine(abreast=True), shaped, [(), (0,), (3,), (7,)], removal_mode="drop")
    yield "attention", _attended
    yield "left behind", lambda: case(Engine(), _LeftBehind(), removal_mode="drop")
    yield "reads", lambda: case(Engine(stack=False), _Reads(), [(2,)], removal_mode="drop")


def main() -> None:
    """Run every case."""
    pretend_gpu.device()
    wrong: dict[str, str | None] = {}
    for name, body in _cases():
        try:
            body()
            wrong[name] = None
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps(wrong))


if __name__ == "__main__":
    main()
