"""Further training from θᶠ: the loop that defines the product's number (DESIGN.md section 5).

    a*_i(z, t) = E_ξ [ g(z, θᶠ + Δθ_t(𝒟₋ᵢ, ξ)) − g(z, θᶠ + Δθ_t(𝒟, ξ)) ]      (Wei et al. 2025, eq. 17)

``further_train`` trains a stack of replicas that differ only in their removals, with one seed's randomness ξ, and
records g(z, θᶠ + Δθ_t) − g(z, θᶠ). It does not average, subtract the baseline or store: see ``orchestrator.reduce``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers import batches, replicas
from workers.batches import Removal
from workers.examples import Batch, Examples
from workers.functional import FunctionalModel, Tensors
from workers.settings import FurtherTraining


@dataclass(frozen=True)
class Problem:
    """All that a cell depends on but its removal and seed.

    Attributes:
        model: at θᶠ.
        train: 𝒟, on the model's device and in its dtype.
        evals: the evaluation examples as batches, in order.
        at_final: g(z, θᶠ), float64 (m,).
        settings: the further-training section.
        mutable: buffers that training changes; ``coupled``: whether batch norm mixes the examples of a batch.
    """

    model: FunctionalModel
    train: Examples
    evals: tuple[Batch, ...]
    at_final: Tensor
    settings: FurtherTraining
    mutable: tuple[str, ...]
    coupled: bool


@dataclass(frozen=True)
class Trajectory:
    """What a stack's replicas did.

    Attributes:
        steps: the T steps under which results are recorded.
        deltas: g(z, θᶠ + Δθ_t) − g(z, θᶠ), float64 (R, T, m), on the CPU; not finite where a replica diverged.
        distances: ‖Δθ_t‖₂ over the trainable parameters, float64 (R, T).
    """

    steps: tuple[int, ...]
    deltas: Tensor
    distances: Tensor


def problem(
    model: FunctionalModel,
    train: Examples,
    evals: Examples,
    settings: FurtherTraining,
    eval_batch: int = 1024,
) -> Problem:
    """Prepare what the cells of a sweep share; g(z, θᶠ) is computed here, in eval mode."""
    blocks = tuple(batch for _, batch in evals.batches(eval_batch))
    with torch.no_grad(), model.mode("eval"):
        at_final = torch.cat([model.measure(model.params, b) for b in blocks])
    trains = settings.mode == "train"
    few = train.batch(range(min(len(train), settings.batch_size)))
    mutable = tuple(replicas.mutable_buffers(model, few)) if trains else ()
    coupled = trains and replicas.is_coupled(model)
    return Problem(model, train, blocks, at_final.cpu(), settings, mutable, coupled)


def further_train(
    problem: Problem,
    lanes: Sequence[Removal],
    seed: int,
    watch: Callable[[int, Tensors], None] | None = None,
    last: int | None = None,
) -> Trajectory:
    """Train ``len(lanes)`` replicas from θᶠ with one seed's randomness and record their deltas.

    Args:
        lanes: the replicas' removals, ``()`` = the baseline; results do not depend on the order beyond rounding.
        watch: called after each step with (step, stacked parameters); must not change them.
        last: stop after this step, for timing.
    """
    model, settings, n = problem.model, problem.settings, len(problem.train)
    params = {name: p.requires_grad_() for name, p in replicas.stacked(model.params, len(lanes)).items()}
    buffers = replicas.stacked({name: model.fixed[name] for name in problem.mutable}, len(lanes))
    optimizer = replicas.make_optimizer(settings.optimizer, list(params.values()))
    removed = _removed(problem.train, lanes) if settings.removal_mode == "reweight" else []
    record = _Record(problem, lanes)
    for step, blocks in enumerate(batches.schedule(n, lanes, settings, seed, problem.coupled), start=1):
        with model.mode(settings.mode):
            terms = [_batch_loss(problem, params, buffers, block, seed, step) for block in blocks]
        with model.mode(settings.mode, norm="eval"):
            terms += [-_removed_loss(problem, params, buffers, *group, seed, step) / n for group in removed]
        grads = _gradients(terms, list(params.values()))
        if settings.clip_norm is not None:
            replicas.clip(grads, settings.clip_norm)
        for p, g in zip(params.values(), grads, strict=True):
            p.grad = g
        optimizer.step()
        record.take(step, params, buffers)
        if watch is not None:
            watch(step, params)
        if record.complete or step == last:
            return record.trajectory()
    raise AssertionError("a schedule has no end")


def _gradients(terms: list[Tensor], params: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of the sum of the replicas' losses; None where the model does not use a parameter.

    Replicas share no parameter, so the gradient of the sum is each replica's own. A step in which every example is
    masked has no term: its gradient is zero, and momentum and weight decay go on.
    """
    if not terms:
        return [torch.zeros_like(p) for p in params]
    return list(torch.autograd.grad(torch.stack(terms).sum(), params, allow_unused=True))


def _batch_loss(
    problem: Problem, params: Tensors, buffers: Tensors, block: batches.Block, seed: int, step: int
) -> Tensor:
    """Σ over the block's replicas of their batch losses Σ_j w_j ℓ_j."""
    count, total = (
        next(iter(params.values())).shape[0],
        torch.zeros((), dtype=problem.model.dtype, device=problem.model.device),
    )
    for lanes, batch, weights, shared in replicas.fetch(problem.train, block):
        own, own_buffers = replicas.take(params, lanes, count), replicas.take(buffers, lanes, count)
        torch.manual_seed(dropout_seed(seed, step, "batch"))
        each = replicas.losses(problem.model, own, own_buffers, batch, shared)
        total = total + (each * weights.to(each)).sum()
        replicas.put_back(buffers, own_buffers, lanes)
    return total


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


def _removed_loss(
    problem: Problem,
    params: Tensors,
    buffers: Tensors,
    lanes: tuple[int, ...],
    batch: Batch,
    seed: int,
    step: int,
) -> Tensor:
    """Σ over the lanes of Σ_{i∈removal} ℓ_i, with batch-norm statistics read but not updated."""
    count = next(iter(params.values())).shape[0]
    own = replicas.take(params, lanes, count)
    read_only = {n: t.clone() for n, t in replicas.take(buffers, lanes, count).items()}
    torch.manual_seed(dropout_seed(seed, step, "removed"))
    return replicas.losses(problem.model, own, read_only, batch, shared=False).sum()


def dropout_seed(seed: int, step: int, what: str) -> int:
    """The seed of everything random inside step ``step``: a function of (seed, step), the same for every replica."""
    digest = hashlib.blake2b(f"{seed}/{step}/{what}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class _Record:
    """Evaluates lanes when they are due and keeps the results on the CPU."""

    def __init__(self, problem: Problem, lanes: Sequence[Removal]) -> None:
        self.problem = problem
        n, settings = len(problem.train), problem.settings
        self.steps = batches.steps_recorded(n, settings)
        self.due: dict[int, list[tuple[int, int]]] = {}
        for lane, removal in enumerate(lanes):
            for place, (own_step, _) in enumerate(batches.amounts(n, removal, settings)):
                self.due.setdefault(own_step, []).append((lane, place))
        shape = (len(lanes), len(self.steps))
        # NaN, not zero: a result that was never written must not pass for a number.
        self.deltas = torch.full((*shape, len(problem.at_final)), torch.nan, dtype=torch.float64)
        self.distances = torch.full(shape, torch.nan, dtype=torch.float64)

    @property
    def complete(self) -> bool:
        return not self.due

    @torch.no_grad()
    def take(self, step: int, params: Tensors, buffers: Tensors) -> None:
        """Record every lane that is due at its own step ``step``."""
        due = self.due.pop(step, [])
        if not due:
            return
        model, count = self.problem.model, next(iter(params.values())).shape[0]
        lanes = tuple(sorted({lane for lane, _ in due}))
        own = {n: p.detach() for n, p in replicas.take(params, lanes, count).items()}
        own_buffers = replicas.take(buffers, lanes, count)
        with model.mode("eval"):
            g = torch.cat([replicas.measures(model, own, own_buffers, b) for b in self.problem.evals], dim=1)
        squares = [((p.double() - model.params[n].double()) ** 2).flatten(1).sum(dim=1) for n, p in own.items()]
        delta, distance = g.cpu() - self.problem.at_final, torch.stack(squares).sum(dim=0).sqrt().cpu()
        row = {lane: i for i, lane in enumerate(lanes)}
        for lane, place in due:
            self.deltas[lane, place], self.distances[lane, place] = delta[row[lane]], distance[row[lane]]

    def trajectory(self) -> Trajectory:
        return Trajectory(tuple(self.steps), self.deltas, self.distances)
