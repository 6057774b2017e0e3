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
from workers.errors import DivergedError, WorkloadError
from workers.examples import Batch, Examples
from workers.functional import FunctionalModel, Tensors, check
from workers.probe import Traits, traits
from workers.replicas import Gradients
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
        traits: how the training forward behaves.
        folds: reweight takes the removed examples into the batch with weight −1/n, one forward instead of two; done
            where examples are proven independent and nothing is drawn: the same mathematics.
    """

    model: FunctionalModel
    train: Examples
    evals: tuple[Batch, ...]
    at_final: Tensor
    settings: FurtherTraining
    traits: Traits
    folds: bool


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
    eval_batch: int | None = None,
) -> Problem:
    """Prepare what the cells of a sweep share, and refuse what cannot be trained further.

    g(z, θᶠ) is computed here, in eval mode, in batches of ``eval_batch`` (default: a training batch, at least 128,
    so that evaluation needs no more memory than training).

    Raises:
        WorkloadError: a loss or measure that is not one number an example, or fails, or depends on no parameter.
        DivergedError: a loss or a measure at θᶠ is not finite.
    """
    size = min(len(train), settings.batch_size)
    check(model, train.batch(range(size)), size, ["loss"])
    blocks = tuple(batch for _, batch in evals.batches(eval_batch or max(128, settings.batch_size)))
    check(model, blocks[0], min(len(evals), eval_batch or max(128, settings.batch_size)), ["measure"])
    with torch.no_grad(), model.mode("eval"):
        at_final = torch.cat([model.measure(model.params, b) for b in blocks]).cpu()
        # A dataset may be long to read, so that of its examples only the first batch is looked at.
        looked_at = train.batches(1024, range(len(train) if train.tensors is not None else size))
        losses = torch.cat([model.loss(model.params, b) for _, b in looked_at])
    _refuse_not_finite(losses, "loss of training example")
    _refuse_not_finite(at_final, "measure of evaluation example")
    found = traits(model, train, size, settings.mode)
    folds = settings.removal_mode == "reweight" and train.tensors is not None and found.independent
    return Problem(model, train, blocks, at_final, settings, found, folds)


def _refuse_not_finite(values: Tensor, what: str) -> None:
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        more = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
        value = float(values[bad[0]])
        raise DivergedError(f"the {what} {bad[0]}{more} is {value} at the final model: mend the example or the model")


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

    Raises:
        UsageError: a removal is not a set of training indices, or leaves nothing to train on.
        WorkloadError: a buffer changes that did not change in the first forward.
    """
    model, settings, n = problem.model, problem.settings, len(problem.train)
    params = replicas.stacked(model.params, len(lanes))
    buffers = replicas.stacked({name: model.fixed[name] for name in problem.traits.mutable}, len(lanes))
    optimizer = replicas.make_optimizer(settings.optimizer, list(params.values()))
    apart = settings.removal_mode == "reweight" and not problem.folds
    removed = _removed(problem.train, lanes) if apart else []
    record = _Record(problem, lanes)
    fixed = {name: tensor._version for name, tensor in model.fixed.items()}
    schedule = batches.schedule(n, lanes, settings, seed, problem.traits.coupled, problem.folds)
    for step, blocks in enumerate(schedule, start=1):
        grads: Gradients = {}
        for block in blocks:
            _add_batch(problem, params, buffers, grads, block, dropout_seed(seed, step, "batch"))
        for own, batch in removed:
            _subtract_removed(problem, params, buffers, grads, own, batch, dropout_seed(seed, step, "removed"))
        if not blocks:
            # Every example is masked: the loss is 0, and momentum and weight decay go on.
            grads = {name: torch.zeros_like(params[name]) for name in problem.traits.used}
        if settings.clip_norm is not None:
            grads = replicas.clip(grads, settings.clip_norm)
        for name, p in params.items():
            p.grad = grads.get(name)
        optimizer.step()
        record.take(step, params, buffers)
        if watch is not None:
            watch(step, params)
        if record.complete or step == last:
            break
    _refuse_late_changes(model, fixed)
    return record.trajectory()


def _add_batch(
    problem: Problem, params: Tensors, buffers: Tensors, grads: Gradients, block: batches.Block, seed: int
) -> None:
    """Add ∇ Σ_j w_j ℓ_j of the block's replicas on their batches; their ``buffers`` move on."""
    model, count = problem.model, stack_size(params)
    for lanes, batch, weights, shared in replicas.fetch(problem.train, block):
        own, own_buffers = replicas.take(params, lanes, count), replicas.take(buffers, lanes, count)
        torch.manual_seed(seed)
        with model.mode(problem.settings.mode):
            part, after = replicas.gradients(model, own, own_buffers, batch, weights, shared)
        replicas.add(grads, part, lanes, count)
        replicas.put_back(buffers, after, lanes)


def _subtract_removed(
    problem: Problem,
    params: Tensors,
    buffers: Tensors,
    grads: Gradients,
    lanes: tuple[int, ...],
    batch: Batch,
    seed: int,
) -> None:
    """Subtract ∇ Σ_{i∈removal} ℓ_i / n of the lanes; batch-norm statistics are read but not updated."""
    model, count = problem.model, stack_size(params)
    own, own_buffers = replicas.take(params, lanes, count), replicas.take(buffers, lanes, count)
    weights = torch.tensor([-1.0 / len(problem.train)], dtype=torch.float64)
    torch.manual_seed(seed)
    with model.mode(problem.settings.mode, norm="eval"):
        part, _ = replicas.gradients(model, own, own_buffers, batch, weights, shared=False)
    replicas.add(grads, part, lanes, count)


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


def _refuse_late_changes(model: FunctionalModel, versions: dict[str, int]) -> None:
    for name, tensor in model.fixed.items():
        if tensor._version != versions[name]:
            raise WorkloadError(f"buffer '{name}' {replicas.CHANGED_LATE}")


def stack_size(params: Tensors) -> int:
    """R of stacked parameters (R, …)."""
    return next(iter(params.values())).shape[0]


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
        model, count = self.problem.model, stack_size(params)
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
