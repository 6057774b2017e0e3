"""Further training of a stack of replicas: the numbers of ``fimo.workers.definition.train_cell``, many cells at once.

``further_train`` trains replicas that differ only in their removals, with one seed's randomness ξ, and records
g(z, θᶠ + Δθ_t) − g(z, θᶠ). It does not average, subtract the baseline or store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fimo.workers import batches
from fimo.workers.batches import Removal
from fimo.workers.examples import Batch, Examples
from fimo.workers.functional import Tensors
from fimo.workers.randomness import kept, seed_all, step_seed
from fimo.workers.stacking import replicas
from fimo.workers.stacking.folding import folded
from fimo.workers.stacking.replay import Replayed
from fimo.workers.stacking.replicas import Gradients, GradientSum
from fimo.workers.start import Start

__all__ = ["Deltas", "further_train"]


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
) -> Deltas:
    """Train ``len(lanes)`` replicas from θᶠ with one seed's randomness and record their deltas.

    Args:
        lanes: the replicas' removals, ``()`` = the baseline; results do not depend on the order beyond rounding.
        watch: called after each step with (step, stacked parameters); must not change them.
        last: stop after this step, for timing.

    Raises:
        UsageError: a removal is not a set of training indices, or leaves nothing to train on.
        WorkloadError: a buffer changes that did not change in the first forward.
    """
    settings, n = start.settings, len(start.train)
    stack = _Stack(start, lanes, seed)
    # One optimizer over a stack is one optimizer a replica: SGD, Adam and AdamW are elementwise.
    optimizer = settings.optimizer.build(list(stack.params.values()), foreach=start.model.device.type == "cuda")
    record = _Record(start, lanes)
    if start.folds:
        schedule = folded(n, lanes, settings, seed)
    else:
        schedule = batches.schedule(n, lanes, settings, seed, start.forward.mixes)
    with torch.no_grad(), kept(start.model.device), start.model.mode(settings.mode), start.model.buffers_kept():
        for step, blocks in enumerate(schedule, start=1):
            grads = stack.gradients(step, blocks)
            if settings.clip_norm is not None:
                grads = replicas.clip(grads, settings.clip_norm)
            for name, parameter in stack.params.items():
                parameter.grad = grads.get(name)
            optimizer.step()
            record.take(step, stack)
            if watch is not None:
                watch(step, stack.params)
            if record.complete or step == last:
                break
    return record.result()


class _Stack:
    """Replicas in training: their parameters and buffers (R, …), and the gradients of their losses."""

    def __init__(self, start: Start, lanes: Sequence[Removal], seed: int) -> None:
        self.start, self.seed, self.size = start, seed, len(lanes)
        model, self.forward = start.model, start.forward
        self.params = replicas.stacked(model.params, self.size)
        self.buffers = replicas.stacked({name: model.fixed[name] for name in self.forward.mutable}, self.size)
        subtracted_apart = start.settings.removal_mode == "reweight" and not start.folds
        self.removed = _removed(start.train, lanes) if subtracted_apart else []
        # Trace only a forward that vmap has accepted, over replicas here or over examples in the probe: vmap rejects
        # data-dependent branches, which a trace would silently freeze.
        graphs = start.graphs if self.size > 1 or start.folds else None
        gradients = partial(replicas.gradients, model, orders=self.forward.orders)
        self._batch_gradients = Replayed(gradients, "batch", graphs)
        self._removed_gradients = Replayed(gradients, "removed", graphs)
        self.measures = Replayed(partial(replicas.measures, model), "measures", graphs)

    def gradients(self, step: int, blocks: Sequence[batches.Block]) -> Gradients:
        """∇ of each replica's loss: the mean over its batch and, in reweight mode, the weighted loss of the removed."""
        total = GradientSum(self.size)
        for block in blocks:
            self._add_batch(total, block, step_seed(self.seed, step, "batch"))
        for lanes, batch in self.removed:
            self._add_removed(total, lanes, batch, step_seed(self.seed, step, "removed"))
        idle: list[int] = []
        if sum(len(block.lanes) for block in blocks) < self.size:
            idle = sorted(set(range(self.size)).difference(*(block.lanes for block in blocks)))
            # Every example of these lanes' batches is masked: their loss is 0, and momentum and weight decay go on.
            zeros = {name: torch.zeros_like(self.params[name][idle]) for name in self.forward.used}
            total.add(zeros, tuple(idle))
        return total.result(idle)

    def _add_batch(self, total: GradientSum, block: batches.Block, seed: int) -> None:
        for lanes, batch, weights, shared in replicas.fetch(self.start.train, block):
            params, buffers = self.take(lanes)
            seed_all(seed, self.start.model.device)
            part, after = self._batch_gradients(params, buffers, batch, weights, shared)
            total.add(part, lanes)
            replicas.put_back(self.buffers, after, lanes)

    def _add_removed(self, total: GradientSum, lanes: tuple[int, ...], batch: Batch, seed: int) -> None:
        """Buffers are read but not updated: the subtracted loss leaves no trace in them."""
        params, buffers = self.take(lanes)
        weights = torch.tensor([batches.removed_weight(len(self.start.train))], dtype=torch.float64)
        seed_all(seed, self.start.model.device)
        part, _ = self._removed_gradients(params, buffers, batch, weights, False)
        total.add(part, lanes)

    def take(self, lanes: tuple[int, ...]) -> tuple[Tensors, Tensors]:
        """Parameters and buffers of the given lanes."""
        return replicas.take(self.params, lanes, self.size), replicas.take(self.buffers, lanes, self.size)


def _removed(train: Examples, lanes: Sequence[Removal]) -> list[tuple[tuple[int, ...], Batch]]:
    """The removed examples of each lane as batches, lanes of equal shapes together: what reweight subtracts."""
    sizes: dict[int, list[int]] = {}
    for lane, removal in enumerate(lanes):
        if removal:
            sizes.setdefault(len(removal), []).append(lane)
    blocks = [
        batches.Block(tuple(own), torch.tensor([lanes[i] for i in own]), torch.zeros(len(own), size))
        for size, own in sizes.items()
    ]
    return [(own, batch) for block in blocks for own, batch, _, _ in replicas.fetch(train, block)]


class _Record:
    """Evaluates lanes when they are due and keeps the results on the CPU."""

    def __init__(self, start: Start, lanes: Sequence[Removal]) -> None:
        self.start = start
        n, settings = len(start.train), start.settings
        self.steps = batches.steps_recorded(n, settings)
        self.due: dict[int, list[tuple[int, int]]] = {}
        for lane, removal in enumerate(lanes):
            for place, (own_step, _) in enumerate(batches.amounts(n, removal, settings)):
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
            g = torch.cat([stack.measures(params, buffers, batch) for batch in self.start.evals], dim=1)
        moved = [(p - model.params[n]).reshape(len(p), -1) for n, p in params.items()]
        squares = [torch.linalg.vector_norm(m, dim=1, dtype=torch.float64) ** 2 for m in moved]
        delta, distance = g.cpu() - self.start.at_final, torch.stack(squares).sum(dim=0).sqrt().cpu()
        row = {lane: i for i, lane in enumerate(lanes)}
        for lane, place in due:
            self.deltas[lane, place], self.distances[lane, place] = delta[row[lane]], distance[row[lane]]

    def result(self) -> Deltas:
        return Deltas(tuple(self.steps), self.deltas, self.distances)
