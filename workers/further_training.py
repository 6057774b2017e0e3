"""Further training of a stack of replicas: the numbers of ``fimo.workers.definition.train_cell``, many cells at once.

``further_train`` trains replicas that differ only in their removals, with one seed's randomness ξ, and records
g(z, θᶠ + Δθ_t) − g(z, θᶠ). It does not average, subtract the baseline or store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor

from fimo.workers import batches
from fimo.workers.batches import Removal
from fimo.workers.examples import Batch
from fimo.workers.functional import Tensors
from fimo.workers.randomness import kept, seed_all, step_seed
from fimo.workers.stacking import replicas
from fimo.workers.stacking.folding import folded
from fimo.workers.stacking.masks import StepMasks
from fimo.workers.stacking.parts import in_parts, part_cost
from fimo.workers.stacking.replay import Replayed
from fimo.workers.stacking.replicas import Gradients, GradientSum
from fimo.workers.stacking.stacked import Masks
from fimo.workers.start import Start, Subtracted

__all__ = ["Deltas", "State", "Training", "further_train"]


@dataclass(frozen=True)
class Deltas:
    """What a stack's replicas did.

    Attributes:
        steps: the T steps under which results are recorded.
        deltas: g(z, θᶠ + Δθ_t) − g(z, θᶠ), float64 (R, T, m), on the CPU; not finite if a replica diverged.
        distances: ‖Δθ_t‖₂ over the trainable parameters, float64 (R, T).
    """

    steps: tuple[int, ...]
    deltas: Tensor
    distances: Tensor


def further_train(
    start: Start,
    lanes: Sequence[Removal],
    seed: int,
    watch: Callable[[int, Tensors], None] | None = None,
    last: int | None = None,
    rates: Sequence[float] | None = None,
) -> Deltas:
    """Train ``len(lanes)`` replicas from θᶠ with one seed's randomness and record their deltas.

    Args:
        lanes: the replicas' removals, ``()`` = the baseline; results do not depend on the order beyond rounding.
        watch: called after each step with (step, stacked parameters); must not change them.
        last: stop after this step, for timing.
        rates: the replicas' own learning rates, in place of the settings'.

    Raises:
        UsageError: a removal is not a set of training indices, or leaves nothing to train on.
        WorkloadError: a buffer changes that did not change in the first forward.
    """
    training = Training(start, lanes, seed, rates=rates)
    training.advance(last, watch)
    return training.result()


class Training:
    """A stack in training, which can be halted after any step, and gone on with.

    Args:
        origin: where the replicas start instead of at θᶠ: all where one of another stack is (``state_of``).
        rates: the replicas' own learning rates, in place of the settings'; without ``origin``. Replicas of one rate
            are stepped together if they are neighbours.
    """

    def __init__(
        self,
        start: Start,
        lanes: Sequence[Removal],
        seed: int,
        origin: State | None = None,
        rates: Sequence[float] | None = None,
    ) -> None:
        settings, n = start.settings, len(start.train)
        self.start, self.step = start, 0 if origin is None else origin.step
        self._stack = _Stack(start, lanes, seed, origin)
        # One optimizer over a stack is one optimizer a replica: SGD, Adam and AdamW are elementwise.
        params = self._stack.params
        self._views = [] if rates is None else _views(params, rates)
        groups: list[Any] = [{"params": list(v.params.values()), "lr": v.rate} for v in self._views]
        foreach = start.model.device.type == "cuda"
        # SGD's fused form has nothing to gain, and refuses a parameter that gets its first gradient late.
        self._fused = not foreach and settings.optimizer.name != "sgd"
        self._optimizer = settings.optimizer.build(groups or list(params.values()), foreach=foreach, fused=self._fused)
        if origin is not None:
            for name, rows in origin.optimizer.items():
                self._optimizer.state[params[name]] = _spread(rows, params[name])
        # What lanes subtract instead of what they remove is in no batch.
        removals = lanes if start.subtracted is None else [batches.BASELINE] * len(lanes)
        self._record = _Record(start, removals, self.step)
        if start.folds:
            apart = start.model.partial
            schedule = folded(n, removals, settings, seed, start.forward.random, apart)
        else:
            schedule = batches.schedule(n, removals, settings, seed, start.forward.mixes)
        self._schedule = islice(schedule, self.step, None)

    def advance(self, until: int | None = None, watch: Callable[[int, Tensors], None] | None = None) -> None:
        """Take steps until ``until``, or until all is recorded; errors as ``further_train``."""
        start, stack = self.start, self._stack
        model, clip_norm = start.model, start.settings.clip_norm
        with torch.no_grad(), kept(model.device), model.mode(start.settings.mode), model.buffers_kept():
            while not self._record.complete and (until is None or self.step < until):
                self.step += 1
                grads = stack.gradients(self.step, next(self._schedule))
                if clip_norm is not None:
                    grads = replicas.clip(grads, clip_norm)
                self._give(grads)
                self._optimizer.step()
                self._record.take(self.step, stack)
                if watch is not None:
                    watch(self.step, stack.params)

    def _give(self, grads: Gradients) -> None:
        """Gradients to what the optimizer steps: the stack, or the rows of each rate."""
        if self._fused:
            # A fused step reads a gradient as if it lay as its parameter does.
            grads = {name: None if grad is None else grad.contiguous() for name, grad in grads.items()}
        if not self._views:
            for name, parameter in self._stack.params.items():
                parameter.grad = grads.get(name)
        for view in self._views:
            for name, parameter in view.params.items():
                grad = grads.get(name)
                parameter.grad = None if grad is None else grad[view.rows]

    def state_of(self, lane: int) -> State:
        """All that the further course of a replica depends on, as it is now; a copy."""
        params, buffers = self._stack.params, self._stack.buffers
        rows = {
            name: {key: _row(value, params[name], lane) for key, value in self._optimizer.state[params[name]].items()}
            for name in params
            if params[name] in self._optimizer.state
        }
        return State(self.step, _lane(params, lane), _lane(buffers, lane), rows, self._stack.calls())

    def result(self) -> Deltas:
        """What was recorded so far."""
        return self._record.result()


@dataclass(frozen=True)
class State:
    """A replica after ``step`` steps.

    Attributes:
        optimizer: its state by parameter and by torch's own names.
        calls: how often each signature was called, which decides what is replayed.
    """

    step: int
    params: Tensors
    buffers: Tensors
    optimizer: dict[str, dict[str, Any]]
    calls: tuple[Counter[object], ...]


@dataclass(frozen=True)
class _View:
    """Neighbouring replicas of one learning rate: their rows of the stacked parameters, as leaves of an optimizer."""

    rate: float
    rows: slice
    params: Tensors


def _views(params: Tensors, rates: Sequence[float]) -> list[_View]:
    """A view for each run of equal rates: torch's SGD, Adam and AdamW are elementwise, and step a view's rows alone."""
    found, first = list[_View](), 0
    for rate, equal in groupby(rates):
        rows = slice(first, first + len(list(equal)))
        found.append(_View(rate, rows, {name: p[rows] for name, p in params.items()}))
        first = rows.stop
    return found


def _lane(tensors: Tensors, lane: int) -> Tensors:
    return {name: t[lane].detach().clone() for name, t in tensors.items()}


def _row(value: Any, parameter: Tensor, lane: int) -> Any:
    """One replica's row of an optimizer's state; the count of steps is not stacked."""
    if not isinstance(value, Tensor):
        return value
    return (value[lane] if value.shape == parameter.shape else value).clone()


def _spread(rows: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """One replica's state for every replica of a stack."""

    def one(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # A parameter that is one number has the shape of the count of steps.
        if key == "step" or value.shape != parameter.shape[1:]:
            return value.clone()
        return value.expand(parameter.shape).clone(memory_format=torch.contiguous_format)

    return {key: one(key, value) for key, value in rows.items()}


class _Stack:
    """Replicas in training: their parameters and buffers (R, …), and the gradients of their losses."""

    def __init__(self, start: Start, lanes: Sequence[Removal], seed: int, origin: State | None) -> None:
        self.start, self.seed, self.size = start, seed, len(lanes)
        model, self.forward = start.model, start.forward
        params, fixed = (model.params, model.fixed) if origin is None else (origin.params, origin.buffers)
        self.params = replicas.stacked(params, self.size)
        self.buffers = replicas.stacked({name: fixed[name] for name in self.forward.mutable}, self.size)
        self._part_cost = part_cost(sum(p.numel() for p in model.params.values()) * self.size, model.device)
        self._subtracted = start.subtracted or Subtracted(start.train, model.loss, start.settings.mode)
        folds_removed = start.folds and start.subtracted is None
        apart = start.settings.removal_mode == "reweight" and not folds_removed
        self.removed = _removed(self._subtracted, lanes, self._part_cost) if apart else []
        # Trace only a forward that vmap has accepted, over replicas here or over examples in the probe: vmap rejects
        # data-dependent branches, which a trace would silently freeze.
        graphs = start.graphs if self.size > 1 or start.folds else None
        gradients = partial(replicas.gradients, model, orders=[draw.order for draw in self.forward.draws])
        self._batch_gradients = Replayed(gradients, "batch", graphs)
        # Names tell functions apart: the sweep's cells and what mirrors them share their traces.
        removed, read = ("removed", "measures") if start.subtracted is None else ("subtracted", "losses")
        alike = graphs if self._subtracted.examples.tensors is not None else None
        self._removed_gradients = Replayed(partial(gradients, of=self._subtracted.value), removed, alike)
        self.measures = Replayed(partial(replicas.measures, model, of=start.reads), read, graphs)
        for replayed, calls in zip(self._replayed(), origin.calls if origin is not None else (), strict=False):
            replayed.calls.update(calls)

    def _replayed(self) -> tuple[Replayed, ...]:
        return self._batch_gradients, self._removed_gradients, self.measures

    def calls(self) -> tuple[Counter[object], ...]:
        """The calls of each signature so far."""
        return tuple(replayed.calls.copy() for replayed in self._replayed())

    def gradients(self, step: int, blocks: Sequence[batches.Block]) -> Gradients:
        """∇ of each replica's loss: the mean over its batch and, in reweight mode, the weighted loss of the removed."""
        total = GradientSum(self.size)
        seeds = step_seed(self.seed, step, "batch"), step_seed(self.seed, step, "removed")
        masks = self.start.masks(seeds)
        for block in in_parts(blocks, self.start.trimming, self._part_cost):
            self._add_batch(total, block, seeds[0], masks)
        for lanes, batch in self.removed:
            self._add_removed(total, lanes, batch, seeds[1])
        idle: list[int] = []
        if sum(len(block.lanes) for block in blocks) < self.size:
            idle = sorted(set(range(self.size)).difference(*(block.lanes for block in blocks)))
            # Every example of these lanes' batches is masked: their loss is 0, and momentum and weight decay go on.
            zeros = {name: torch.zeros_like(self.params[name][idle]) for name in self.forward.used}
            total.add(zeros, tuple(idle))
        return total.result(idle)

    def _add_batch(self, total: GradientSum, block: batches.Block, seed: int, masks: StepMasks | None) -> None:
        own: Masks | None = None
        if masks is not None and block.rows is not None:
            own = partial(masks.at, rows=block.rows, sizes=block.sizes)
        for lanes, batch, weights, shared in replicas.fetch(self.start.train, block, self.start.trimming):
            params, buffers = self.take(lanes)
            seed_all(seed, self.start.model.device)
            part, after = self._batch_gradients(params, buffers, batch, weights, shared, own)
            total.add(part, lanes)
            replicas.put_back(self.buffers, after, lanes)

    def _add_removed(self, total: GradientSum, lanes: tuple[int, ...], batch: Batch, seed: int) -> None:
        """Buffers are read but not updated: the subtracted loss leaves no trace in them."""
        params, buffers = self.take(lanes)
        weight = batches.removed_weight(len(self.start.train), self.start.settings)
        weights = torch.tensor([weight], dtype=torch.float64)
        seed_all(seed, self.start.model.device)
        with self.start.model.mode(self._subtracted.mode):
            part, _ = self._removed_gradients(params, buffers, batch, weights, False)
        total.add(part, lanes)

    def take(self, lanes: tuple[int, ...]) -> tuple[Tensors, Tensors]:
        """Parameters and buffers of the given lanes."""
        return replicas.take(self.params, lanes, self.size), replicas.take(self.buffers, lanes, self.size)


def _removed(subtracted: Subtracted, lanes: Sequence[Removal], part_cost: float) -> list[tuple[tuple[int, ...], Batch]]:
    """What each lane subtracts as batches, lanes of equal shapes together."""
    sizes: dict[int, list[int]] = {}
    for lane, removal in enumerate(lanes):
        if removal:
            sizes.setdefault(len(removal), []).append(lane)
    blocks = [
        batches.Block(tuple(own), torch.tensor([lanes[i] for i in own]), torch.zeros(len(own), size))
        for size, own in sizes.items()
    ]
    examples, trimming = subtracted.examples, subtracted.trimming
    return [
        (own, batch)
        for block in in_parts(blocks, trimming, part_cost)
        for own, batch, _, _ in replicas.fetch(examples, block, trimming)
    ]


class _Record:
    """Evaluates lanes when they are due and keeps the results on the CPU."""

    def __init__(self, start: Start, lanes: Sequence[Removal], after: int = 0) -> None:
        self.start = start
        n, settings = len(start.train), start.settings
        self.steps = batches.steps_recorded(n, settings)
        self.due: dict[int, list[tuple[int, int]]] = {}
        for lane, removal in enumerate(lanes):
            for place, (own_step, _) in enumerate(batches.amounts(n, removal, settings)):
                if own_step > after:
                    self.due.setdefault(own_step, []).append((lane, place))
        shape = (len(lanes), len(self.steps))
        # NaN, not zero: a result that was never written must not pass for a number.
        self.deltas = torch.full((*shape, len(start.at_final)), torch.nan, dtype=torch.float64)
        self.distances = torch.full(shape, torch.nan, dtype=torch.float64)

    @property
    def complete(self) -> bool:
        return not self.due

    def take(self, step: int, stack: _Stack) -> None:
        """Record every lane that is due at its own step ``step``."""
        due = self.due.pop(step, [])
        if not due:
            return
        model = self.start.model
        lanes = tuple(sorted({lane for lane, _ in due}))
        params, buffers = stack.take(lanes)
        with model.mode("eval"):
            blocks = [stack.measures(params, buffers, batch) for batch in self.start.evals.blocks]
            g = self.start.evals.in_order(torch.cat(blocks, dim=1))
        moved = [(p - model.params[n]).reshape(len(p), -1) for n, p in params.items()]
        squares = [torch.linalg.vector_norm(m, dim=1, dtype=torch.float64) ** 2 for m in moved]
        delta, distance = g.cpu() - self.start.at_final, torch.stack(squares).sum(dim=0).sqrt().cpu()
        row = {lane: i for i, lane in enumerate(lanes)}
        for lane, place in due:
            self.deltas[lane, place], self.distances[lane, place] = delta[row[lane]], distance[row[lane]]

    def result(self) -> Deltas:
        return Deltas(tuple(self.steps), self.deltas, self.distances)
