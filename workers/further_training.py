"""Further training of a stack of replicas: the numbers of ``fimo.workers.definition.train_cell``, many cells at once.

``further_train`` trains replicas that differ only in their removals, with one seed's randomness ξ, and records
g(z, θᶠ + Δθ_t) − g(z, θᶠ). It does not average, subtract the baseline or store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice

import torch
from torch import Tensor

from fimo.workers import batches
from fimo.workers.amounts import BASELINE, Removal
from fimo.workers.device import is_gpu
from fimo.workers.errors import UsageError
from fimo.workers.examples import Batch
from fimo.workers.functional import Tensors
from fimo.workers.randomness import kept, seed_all, step_seed
from fimo.workers.stacking import abreast, replicas
from fimo.workers.stacking.ahead import placed
from fimo.workers.stacking.captured import Captured
from fimo.workers.stacking.folding import folded
from fimo.workers.stacking.masks import StepMasks
from fimo.workers.stacking.optimizing import Optimizing, Rows
from fimo.workers.stacking.parts import in_parts, part_cost
from fimo.workers.stacking.products import multiplied
from fimo.workers.stacking.record import Deltas, Measured, Record, distances
from fimo.workers.stacking.replay import Replayed
from fimo.workers.stacking.replicas import Gradients, GradientSum
from fimo.workers.stacking.several import joined
from fimo.workers.stacking.stacked import Masks
from fimo.workers.start import Start, Subtracted

__all__ = ["Deltas", "State", "Training", "further_train"]


def further_train(
    start: Start,
    lanes: Sequence[Removal],
    seed: int | Sequence[int],
    watch: Callable[[int, Tensors], None] | None = None,
    last: int | None = None,
    rates: Sequence[float] | None = None,
) -> Deltas:
    """Train ``len(lanes)`` replicas from θᶠ with a seed's randomness and record their deltas.

    Args:
        lanes: the replicas' removals, ``()`` = the baseline; results do not depend on the order beyond rounding.
        seed: of all replicas, or the replicas' own, if ``start.joins``.
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
        seed: of all replicas, or the replicas' own: see ``Start.joins``.
        origin: where the replicas start instead of at θᶠ: all where one of another stack is (``state_of``).
        rates: the replicas' own learning rates, in place of the settings'; without ``origin``. Replicas of one rate
            are stepped together if they are neighbours.
    """

    def __init__(
        self,
        start: Start,
        lanes: Sequence[Removal],
        seed: int | Sequence[int],
        origin: State | None = None,
        rates: Sequence[float] | None = None,
    ) -> None:
        self.start, self.step = start, 0 if origin is None else origin.step
        seeds = [seed] * len(lanes) if isinstance(seed, int) else list(seed)
        if len(set(seeds)) > 1 and not start.joins:
            raise UsageError("replicas of several seeds cannot be trained together if their forwards draw")
        # Of several seeds no forward draws, so that any of them seeds it.
        self._stack = _Stack(start, lanes, seeds[0], origin)
        # What lanes subtract instead of what they remove is in no batch.
        removals = lanes if start.subtracted is None else [BASELINE] * len(lanes)
        self._record = Record(start, removals, self.step)
        device = start.model.device
        recorded = start.captures is not None
        launched = recorded or is_gpu(device)
        self._optimizing = Optimizing(self._stack.params, start.settings, rates, launched, recorded)
        if origin is not None:
            self._optimizing.spread(origin.optimizer)
        self._one = _Step(self._stack, self._optimizing)
        self._captured = Captured(self._one, self._one.tensors, start.captures, start.model.dtype)
        self._evaluated = _Evaluated(start, self._stack)
        for counted, calls in zip(self._counted(), origin.calls if origin is not None else (), strict=False):
            counted.update(calls)
        ahead = islice(_schedule(start, removals, seeds), self.step, self._record.last)
        # A dataset is asked for numbers, and where a batch is cut is decided on the CPU.
        there = is_gpu(device) and start.train.tensors is not None and start.trimming is None
        self._schedule = placed(ahead, device) if there else ahead

    def advance(self, until: int | None = None, watch: Callable[[int, Tensors], None] | None = None) -> None:
        """Take steps until ``until``, or until all is recorded; errors as ``further_train``."""
        model, mode = self.start.model, self.start.settings.mode
        products = multiplied(model, self.start.engine.replay)
        with torch.no_grad(), kept(model.device), model.mode(mode), model.buffers_kept(), products:
            while not self._record.complete and (until is None or self.step < until):
                self.step += 1
                self._one.number = self.step
                self._captured(next(self._schedule))
                self._record.take(self.step, self._evaluated)
                if watch is not None:
                    watch(self.step, self._stack.params)

    def _counted(self) -> tuple[Counter[object], ...]:
        """The calls of each signature so far, which decide what is replayed."""
        return self._captured.calls, self._evaluated.calls, *self._stack.calls()

    def state_of(self, lane: int) -> State:
        """All that the further course of a replica depends on, as it is now; a copy."""
        stack, calls = self._stack, tuple(counted.copy() for counted in self._counted())
        return State(
            self.step, _lane(stack.params, lane), _lane(stack.buffers, lane), self._optimizing.rows(lane), calls
        )

    def result(self) -> Deltas:
        """What was recorded so far."""
        return self._record.result()


@dataclass
class _Step:
    """One step of a stack, all of it on the device, and the tensors that it changes; ``number``: which step it is.

    It knows no ``Training``: one that knew itself would keep its memory until the garbage collector comes by.
    """

    stack: _Stack
    optimizing: Optimizing
    number: int = 0

    def __call__(self, blocks: Sequence[batches.Block]) -> None:
        self.optimizing.step(self.stack.gradients(self.number, blocks))

    def tensors(self) -> list[Tensor]:
        return [*self.stack.params.values(), *self.stack.buffers.values(), *self.optimizing.tensors()]


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
    optimizer: Rows
    calls: tuple[Counter[object], ...]


def _lane(tensors: Tensors, lane: int) -> Tensors:
    return {name: t[lane].detach().clone() for name, t in tensors.items()}


def _schedule(start: Start, removals: Sequence[Removal], seeds: Sequence[int]) -> Iterator[Sequence[batches.Block]]:
    """The blocks of every step."""
    if len(set(seeds)) == 1:
        return _of_one_seed(start, removals, seeds[0])
    runs, first = list[tuple[Sequence[int], Iterator[Sequence[batches.Block]]]](), 0
    for seed, equal in groupby(seeds):
        places = range(first, first + len(list(equal)))
        runs.append((places, _of_one_seed(start, [removals[place] for place in places], seed)))
        first = places.stop
    return joined(runs)


def _of_one_seed(start: Start, removals: Sequence[Removal], seed: int) -> Iterator[Sequence[batches.Block]]:
    n, settings, forward = len(start.train), start.settings, start.forward
    if start.folds:
        return folded(n, removals, settings, seed, forward.random, start.model.partial)
    return batches.schedule(n, removals, settings, seed, forward.mixes)


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
        weight = batches.removed_weight(len(start.train), start.settings)
        self._removed_weight = torch.full((1,), weight, dtype=torch.float64, device=model.device)
        # Trace only a forward that vmap has accepted, over replicas here or over examples in the probe: vmap rejects
        # data-dependent branches, which a trace would silently freeze.
        graphs = start.graphs if (self.size > 1 or start.folds) and not start.abreast else None
        how = abreast if start.abreast else replicas
        gradients = partial(how.gradients, model, orders=[draw.order for draw in self.forward.draws])
        self._batch_gradients = Replayed(gradients, "batch", graphs)
        # Names tell functions apart: the sweep's cells and what mirrors them share their traces.
        removed, read = ("removed", "measures") if start.subtracted is None else ("subtracted", "losses")
        alike = graphs if self._subtracted.examples.tensors is not None else None
        self._removed_gradients = Replayed(partial(gradients, of=self._subtracted.value), removed, alike)
        self.measures = Replayed(partial(how.measures, model, of=start.reads), read, graphs)

    def calls(self) -> tuple[Counter[object], ...]:
        """The calls of each signature so far."""
        return self._batch_gradients.calls, self._removed_gradients.calls, self.measures.calls

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
            zeros = {n: self.params[n].new_zeros(len(idle), *self.params[n].shape[1:]) for n in self.forward.used}
            total.add(zeros, tuple(idle))
        return total.result(idle)

    def _add_batch(self, total: GradientSum, block: batches.Block, seed: int, masks: StepMasks | None) -> None:
        own: Masks | None = None
        if masks is not None and block.rows is not None:
            own = partial(masks.at, rows=block.rows, sizes=block.sizes)
        for lanes, batch, weights, shared in replicas.fetch(self.start.train, block, self.start.trimming):
            params, buffers = self.take(lanes)
            seeding = partial(seed_all, seed, self.start.model.device)
            part, after = self._batch_gradients(params, buffers, batch, weights, shared, own, unless_replayed=seeding)
            total.add(part, lanes)
            replicas.put_back(self.buffers, after, lanes)

    def _add_removed(self, total: GradientSum, lanes: tuple[int, ...], batch: Batch, seed: int) -> None:
        """Buffers are read but not updated: the subtracted loss leaves no trace in them."""
        params, buffers = self.take(lanes)
        seeding = partial(seed_all, seed, self.start.model.device)
        with self.start.model.mode(self._subtracted.mode):
            part, _ = self._removed_gradients(
                params, buffers, batch, self._removed_weight, False, unless_replayed=seeding
            )
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


class _Evaluated:
    """g and the distance from θᶠ of a stack's replicas; of all of them by a recorded launch, where there is one."""

    def __init__(self, start: Start, stack: _Stack) -> None:
        self._start, self._stack, self._everyone = start, stack, tuple(range(stack.size))
        device = start.model.device
        # Where a launch leaves its results.
        g = torch.empty(stack.size, len(start.at_final), dtype=torch.float64, device=device)
        far = torch.empty(stack.size, dtype=torch.float64, device=device)
        self._results = g, far
        evaluate = partial(_evaluate, start, stack, g, far)
        self._captured = Captured(evaluate, lambda: [g, far], start.captures, start.model.dtype)

    @property
    def calls(self) -> Counter[object]:
        """How often all of them were evaluated."""
        return self._captured.calls

    def __call__(self, lanes: tuple[int, ...]) -> Measured:
        """g (r, m) and distances (r,) of the given lanes."""
        if lanes != self._everyone or self._start.captures is None:
            return _measured(self._start, self._stack, lanes)
        self._captured()
        return self._results


def _evaluate(start: Start, stack: _Stack, g: Tensor, far: Tensor, _blocks: Sequence[batches.Block]) -> None:
    measured = _measured(start, stack, tuple(range(stack.size)))
    g.copy_(measured[0])
    far.copy_(measured[1])


def _measured(start: Start, stack: _Stack, lanes: tuple[int, ...]) -> Measured:
    params, buffers = stack.take(lanes)
    with start.model.mode("eval"):
        blocks = [stack.measures(params, buffers, batch) for batch in start.evals.blocks]
    g = start.evals.in_order(torch.cat(blocks, dim=1))
    return g, distances(params, start.model.params)
