"""Mirrored further training: subtract an evaluation example's g, and read the losses of training examples.

A removal lowers every step's loss by ℓ_i / n, and a* is what that does to g(z). Mirrored further training lowers it by
g(z) / n, and reads what that does to ℓ_i:

    â_i(z, t)  =  ℓ_i(θᶠ + Δθ_t(L − g(z)/n, ξ)) − ℓ_i(θᶠ + Δθ_t(L, ξ))

To first order a* is ∇gᵀ A ∇ℓ_i and â_i is ∇ℓ_iᵀ A ∇g, with A made of products of I − ηH over the steps. They are equal
where A is symmetric and the gradients stay what they are along the baseline: full batches, SGD, a stationary θᶠ. In the
mean over batch orders they are nearly so elsewhere. Adam's A is not symmetric, and the agreement is poorer. One run
serves every training example.

Here g is what the sweep reads: in eval mode, of outputs in float64, without dropout. ℓ_i is read in the same way. The
step's own batch is trained on as the sweep trains on it, with the sweep's stacks. If the sweep has a removal weight w,
w g(z) / n is subtracted and what is read is divided by w: the sweep's own finite difference, mirrored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fimo.workers.amounts import BASELINE, Removal
from fimo.workers.batches import Block
from fimo.workers.device import deterministic
from fimo.workers.errors import DivergedError, UsageError, WorkloadError
from fimo.workers.examples import Examples
from fimo.workers.forward import Forward, largest, moved
from fimo.workers.functional import FunctionalModel
from fimo.workers.further_training import Deltas
from fimo.workers.randomness import kept
from fimo.workers.settings import Evaluate
from fimo.workers.shard import in_stacks
from fimo.workers.stacking import replicas as stacks
from fimo.workers.stacking.evaluation import fetched
from fimo.workers.stacking.forking import Stack
from fimo.workers.stacking.parts import in_parts
from fimo.workers.stacking.size import measure_stack_size
from fimo.workers.stacking.trimming import Trimming, trimming
from fimo.workers.start import Start, Subtracted

HELD = 2**30
"""Bytes that the losses of the replicas which are trained together may take."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""By how much of its largest entry a gradient of g may differ in a stack, or cut to its length, from that alone."""


@dataclass(frozen=True)
class Mirrored:
    """One seed's mirrored further training.

    Attributes:
        values: float64 (T, R, E), in units of g and of removal weight; positive: removing raises g. A group's is the
            sum over its members.
        replicas: the stack size at the end.
    """

    values: Tensor
    replicas: int


def why_not(model: FunctionalModel, forward: Forward, evals: Examples) -> str | None:
    """Why there is no mirrored further training of a model, in a line; None = there is.

    Args:
        forward: how its training forward behaves.
    """
    if forward.mixes:
        return (
            "subtracts g / n as reweight does, and this model's training forward mixes the examples of a batch (batch "
            "norm, or a loss over the batch): use mode: eval for batch norm"
        )
    if forward.mutable:
        return f"this model's training forward writes to the buffer '{forward.mutable[0]}': use mode: eval"
    params = {name: p.detach().requires_grad_() for name, p in model.params.items()}
    try:
        with torch.enable_grad(), kept(model.device), model.mode("eval"):
            total = model.measure(params, evals.batch([0])).sum()
            grads = torch.autograd.grad(total, list(params.values()), allow_unused=True) if total.requires_grad else ()
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        return f"trains on the measure, which cannot be differentiated: {type(error).__name__}: {line}"
    if all(g is None for g in grads):
        return "trains on the measure, which has no gradient (an accuracy, a rank): give a measure that is smooth"
    return None


def train_mirrored(
    start: Start,
    evals: Examples,
    removals: Sequence[Sequence[int]],
    seed: int,
    steps: Sequence[int],
    replicas: int | None = None,
) -> Mirrored:
    """Train on with each evaluation example subtracted, and once with none, and read the removals' losses.

    It is trained until the last of ``steps``: len(evals) + 1 runs.

    Args:
        start: the sweep's, with the engine that may be used; its removal mode does not matter.
        evals: the examples to be subtracted (E).
        removals: training indices of each removal (R); the losses of their union are read, a block at a time.
        steps: after which the losses are read, ascending (T).
        replicas: runs trained together; None = measured.

    Raises:
        UsageError: a removal names no training index, or see ``why_not``.
        WorkloadError: the loss cannot be taken in float64.
        DivergedError: a run is not finite.
    """
    read = _union(removals, len(start.train))
    with deterministic(start.model.device):
        mirror = mirror_of(start, evals, steps, read)
        lanes: list[Removal] = [BASELINE, *((z,) for z in range(len(evals)))]
        size = measure_stack_size(mirror, len(lanes))[0] if replicas is None else replicas
        size = min(size, max(1, HELD // (8 * len(steps) * max(1, len(read)))))
        losses = _Losses(removals, read, len(steps), len(lanes), seed)
        size = in_stacks(mirror, lanes, seed, size, losses.take)
    effects = (losses.values[..., 1:] - losses.values[..., :1]) / mirror.settings.removal_weight
    return Mirrored(effects, size)


def mirror_of(start: Start, evals: Examples, steps: Sequence[int], read: Sequence[int]) -> Start:
    """The start of runs that subtract the measure of ``evals`` and read the losses of training examples ``read``."""
    line = why_not(start.model, start.forward, evals)
    if line is not None:
        raise UsageError(f"mirrored further training {line}")
    last = max(steps)
    settings = replace(
        start.settings, removal_mode="reweight", epochs=None, steps=last, evaluate=Evaluate(at_steps=tuple(steps))
    )
    cuts = trimming(evals, start.model.padding) if start.trimming is not None else None
    mirror = replace(
        start,
        settings=settings,
        evals=fetched(start.train, read, settings.eval_batch, start.trimming),
        at_final=torch.zeros(len(read), dtype=torch.float64),
        reads=start.model.wide_loss,
    )
    _refuse_narrow_loss(start)
    for mend in (cuts, None):
        subtracted = Subtracted(evals, start.model.measure, "eval", mend)
        if _same_together(start, subtracted):
            return replace(mirror, subtracted=subtracted)
    # Where stacks give another gradient of g, they are not used.
    return replace(mirror, subtracted=subtracted, engine=replace(start.engine, stack=False))


def _union(removals: Sequence[Sequence[int]], n: int) -> list[int]:
    read = sorted({index for removal in removals for index in removal})
    if read and not 0 <= read[0] <= read[-1] < n:
        raise UsageError(f"a removal names training index {read[0] if read[0] < 0 else read[-1]} of {n}")
    return read


def _refuse_narrow_loss(start: Start) -> None:
    """A workload with a measure of its own may have a loss that was never taken in float64."""
    model, batch = start.model, start.train.batch([0])
    try:
        with torch.no_grad(), model.mode("eval"), kept(model.device):
            model.wide_loss(model.params, batch)
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise WorkloadError(
            f"the workload's loss fails on outputs in float64, in which it is read: {type(error).__name__}: {line}"
        ) from error


def _same_together(start: Start, subtracted: Subtracted) -> bool:
    """Whether the gradients of g of two examples are in a stack, and cut, what they are alone and whole."""
    model, examples = start.model, subtracted.examples
    lengths = subtracted.trimming.lengths if subtracted.trimming is not None else None
    pair = (0, len(examples) - 1) if lengths is None else (int(lengths.argmin()), int(lengths.argmax()))
    params, weights = moved(model.params, 4), torch.ones(1, dtype=torch.float64)

    def of(indices: Sequence[int], cuts: Trimming | None) -> list[stacks.Gradients]:
        block = Block(tuple(range(len(indices))), torch.tensor(indices)[:, None], torch.zeros(len(indices), 1))
        found: dict[int, stacks.Gradients] = {}
        for part in in_parts([block], cuts, 0.0):
            for lanes, batch, _, _ in stacks.fetch(examples, part, cuts):
                own = stacks.stacked(params, len(lanes))
                grads, _ = stacks.gradients(model, own, {}, batch, weights, False, of=subtracted.value)
                found |= {lane: {n: g if g is None else g[i] for n, g in grads.items()} for i, lane in enumerate(lanes)}
        return [found[lane] for lane in range(len(indices))]

    with model.mode(subtracted.mode), kept(model.device):
        alone = [of([z], None)[0] for z in pair]
        try:
            together = of(pair, subtracted.trimming)
        except Exception:
            # Whatever vmap objects to: a stack that fails in training is trained one at a time.
            return subtracted.trimming is None
    return all(_agree(a, b, TOLERANCE[model.dtype]) for a, b in zip(alone, together, strict=True))


def _agree(one: stacks.Gradients, other: stacks.Gradients, tolerance: float) -> bool:
    scale = max((largest(g) for g in one.values() if g is not None), default=0.0)
    for name, a in one.items():
        b = other[name]
        if (a is None) != (b is None):
            return False
        if a is not None and b is not None and not torch.allclose(a, b, tolerance, tolerance * scale, equal_nan=True):
            return False
    return True


class _Losses:
    """Σ over each removal of the losses that replicas end up with: float64 (T, R, lanes), filled stack by stack."""

    def __init__(
        self, removals: Sequence[Sequence[int]], read: Sequence[int], steps: int, lanes: int, seed: int
    ) -> None:
        place = {index: at for at, index in enumerate(read)}
        self._members = [torch.tensor([place[i] for i in removal], dtype=torch.long) for removal in removals]
        self._singles = all(len(removal) == 1 for removal in removals)
        self._seed = seed
        self.values = torch.full((steps, len(removals), lanes), torch.nan, dtype=torch.float64)

    def take(self, stack: Stack, result: Deltas) -> None:
        """Add up what a stack's replicas (L, T, m) read; refuses what is not finite (DivergedError)."""
        finite = result.deltas.isfinite().all(dim=2)
        if not bool(finite.all()):
            lane, step = (~finite).nonzero()[0].tolist()
            what = (
                f"with evaluation example {stack.lanes[lane][0]} of its block subtracted" if stack.lanes[lane] else ""
            )
            raise DivergedError(
                f"mirrored further training {what or 'on everything'} is not finite after step {result.steps[step]} "
                f"(seed {self._seed}): lower the learning rate, or clip"
            )
        if self._singles:
            summed = result.deltas[..., torch.cat(self._members)] if self._members else result.deltas[..., :0]
        else:
            summed = torch.stack([result.deltas[..., members].sum(dim=-1) for members in self._members], dim=-1)
        self.values[..., list(stack.places)] = summed.permute(1, 2, 0)
