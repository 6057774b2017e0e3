"""The baseline's own trajectory, one seed's, and the derivatives of its steps.

The losses here are those of ``fimo.workers.further_training``, from the same schedule of batches and weights:

    step s of the baseline    L_s(θ)     = Σ_j w_j ℓ_j(θ)
    of a removal's cell       L_s(θ) + q_s(θ),    q_s(θ) = Σ_j Δw_j ℓ_j(θ)

with Δw the exact difference of the two cells' weights: −w/n on the removed at every step in the reweight mode (w the
removal weight); in the mask mode the batch that has them loses them from its mean; in the drop mode every later batch
of the epoch also slides on. Dropout draws what the sweep's own cells draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from fimo.estimators.operators import gradients, optimizers
from fimo.estimators.operators.gradients import Layout, directional, each_example
from fimo.estimators.operators.optimizers import State
from fimo.workers import batches
from fimo.workers.amounts import BASELINE, Removal, epoch_steps
from fimo.workers.errors import UsageError
from fimo.workers.examples import Batch, Examples, shapes, stack
from fimo.workers.forward import Forward, observe
from fimo.workers.functional import FunctionalModel
from fimo.workers.randomness import seed_all, step_seed
from fimo.workers.settings import FurtherTraining


@dataclass(frozen=True)
class Point:
    """Where the baseline is after ``number`` steps: θ (P,) and the optimizer's rows."""

    number: int
    params: Tensor
    state: State


@dataclass(frozen=True)
class Change:
    """q_s for all R removals: Σ_j weights[r, j] ℓ_j over ``batch``, or reweight's own −w/n Σ ℓ_i (weights None)."""

    batch: Batch
    weights: Tensor | None


@dataclass(frozen=True)
class Step:
    """The data of one step: its batch, the weights (b,) of its loss, and the removals' change of that loss."""

    number: int
    batch: Batch
    weights: Tensor
    change: Change


class Trajectory:
    """Steps of the baseline with one seed.

    Raises:
        UsageError: the training forward mixes the examples of a batch (batch norm), or drop shortens an epoch or
            meets dropout, because then the cells' steps do not correspond.
    """

    def __init__(
        self,
        model: FunctionalModel,
        train: Examples,
        settings: FurtherTraining,
        removals: Sequence[Removal],
        seed: int,
    ) -> None:
        forward = observe(model, train, settings)
        self.model, self.train, self.seed = model, train, seed
        self.settings = settings = settings.settled(forward.mixes)
        self.removals, self.layout = [tuple(r) for r in removals], Layout.of(model.params)
        reason = why_not(forward, settings, len(self.train), self.removals)
        if reason is not None:
            raise UsageError(f"estimator unrolled: {reason}")
        self._removed = _removed_batches(model, train, self.removals) if settings.removal_mode == "reweight" else []

    def start(self) -> Point:
        """θᶠ with a fresh optimizer."""
        params = self.layout.rows(self.model.params).clone()
        return Point(0, params, optimizers.fresh_state(self.settings.optimizer, params))

    def steps(self, first: int = 1) -> Iterator[Step]:
        """The steps from number ``first`` on, without end."""
        n, reweight = len(self.train), self.settings.removal_mode == "reweight"
        lanes = [BASELINE] if reweight else [BASELINE, *self.removals]
        for number, blocks in enumerate(batches.schedule(n, lanes, self.settings, self.seed), start=1):
            if number < first:
                continue
            base = next(block for block in blocks if 0 in block.lanes)
            indices = base.indices if base.indices.dim() == 1 else base.indices[base.lanes.index(0)]
            weights = base.weights if base.weights.dim() == 1 else base.weights[base.lanes.index(0)]
            batch = self.train.batch(indices)
            yield Step(number, batch, self._cast(weights), self._change(blocks, batch, indices, len(lanes)))

    def _cast(self, weights: Tensor) -> Tensor:
        return weights.to(self.model.device, self.model.dtype)

    def _change(self, blocks: Sequence[batches.Block], batch: Batch, indices: Tensor, lanes: int) -> Change:
        if self.settings.removal_mode == "reweight":
            return Change(None, None)
        dense = torch.zeros(lanes, len(self.train), dtype=torch.float64)
        for block in blocks:
            rows, shape = list(block.lanes), (len(block.lanes), block.indices.shape[-1])
            dense[rows] = dense[rows].scatter_add(1, block.indices.expand(shape), block.weights.expand(shape))
        difference = dense[1:] - dense[0]
        if self.settings.removal_mode == "mask":
            # The whole batch, so that dropout draws for it what the step itself draws.
            return Change(batch, self._cast(difference[:, indices]))
        # Rounding of equal means must not count as a change.
        changed = (difference.abs() > 1e-12).any(dim=0).nonzero().squeeze(1)
        if not len(changed):
            changed = indices[:1]
        return Change(self.train.batch(changed), self._cast(difference[:, changed]))

    # --- the baseline ------------------------------------------------------------------------------------------

    @contextmanager
    def _forward(self, number: int, what: Literal["batch", "removed"]) -> Iterator[None]:
        """The sweep's training mode and the step's own random numbers."""
        with self.model.mode(self.settings.mode):
            self._reseed(number, what)
            yield

    def _reseed(self, number: int, what: Literal["batch", "removed"]) -> None:
        seed_all(step_seed(self.seed, number, what), self.model.device)

    def slope(self, step: Step) -> Callable[[Tensor], Tensor]:
        """θ (P,) ↦ ∇L_s(θ) (P,)."""

        def loss(row: Tensor) -> Tensor:
            return (self.model.loss(self.layout.tensors(row), step.batch) * step.weights).sum()

        return grad(loss)

    def update(self, number: int) -> Callable[[Tensor, State, Tensor], tuple[Tensor, State]]:
        """(θ, state, ∇L) ↦ (θ', state'): the optimizer."""
        optimizer, max_norm = self.settings.optimizer, self.settings.clip_norm
        return lambda params, state, g: optimizers.step(optimizer, max_norm, number, params, state, g)

    def gradient(self, point: Point, step: Step) -> Tensor:
        """∇L_s at the point, (P,)."""
        with self._forward(step.number, "batch"):
            return self.slope(step)(point.params).detach()

    def advance(self, point: Point, step: Step) -> Point:
        """The baseline after one more step."""
        params, state = self.update(step.number)(point.params, point.state, self.gradient(point, step))
        return Point(step.number, params, state)

    # --- derivatives -------------------------------------------------------------------------------------------

    def curve(self, point: Point, step: Step, rows: Tensor) -> Tensor:
        """∇²L_s at the point times rows (k, P)."""
        slope = self.slope(step)

        def along(row: Tensor) -> Tensor:
            return directional(slope, point.params, row)[1]

        return torch.cat([self._mapped(along, part, step.number) for part in self._parts(rows)])

    def _parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = rows.split(max(1, gradients.stream(rows.device) // self.layout.size))
        return parts

    def _mapped(
        self,
        function: Callable[[Tensor], Tensor],
        rows: Tensor,
        number: int,
        what: Literal["batch", "removed"] = "batch",
    ) -> Tensor:
        with self._forward(number, what):
            return each_example(function, rows, "same", partial(self._reseed, number, what)).detach()

    def change_gradients(self, point: Point, step: Step) -> Tensor:
        """∇q_s at the point for every removal, rows (R, P)."""
        rows = torch.zeros(len(self.removals), self.layout.size, dtype=self.model.dtype, device=self.model.device)
        weights = step.change.weights
        if weights is None:
            slope = grad(self._removed_loss)
            for lanes, batch in self._removed:
                with self._forward(step.number, "removed"):
                    own = partial(slope, point.params)
                    rows[lanes] = each_example(own, batch, "same", partial(self._reseed, step.number, "removed"))
            return rows
        touched = (weights != 0).any(dim=1).nonzero().squeeze(1)
        if len(touched):
            with self._forward(step.number, "batch"):
                _, pull_back, *_ = vjp(self._losses(step.change.batch), point.params)
                rows[touched] = vmap(lambda w: pull_back(w)[0])(weights[touched]).detach()
        return rows

    def change_along(self, point: Point, step: Step, rows: Tensor) -> Tensor:
        """The derivative of every q_s along rows (k, P): (R, k), which is ``change_gradients @ rows.T``."""
        slopes = torch.zeros(len(self.removals), len(rows), dtype=self.model.dtype, device=self.model.device)
        weights = step.change.weights
        if weights is not None:
            return weights @ self._along(self._losses(step.change.batch), point, rows, step.number, "batch").T
        for lanes, batch in self._removed:
            losses = self._removed_losses(batch, step.number)
            slopes[lanes] = self._along(losses, point, rows, step.number, "removed").T
        return slopes

    def _along(
        self,
        losses: Callable[[Tensor], Tensor],
        point: Point,
        rows: Tensor,
        number: int,
        what: Literal["batch", "removed"],
    ) -> Tensor:
        def along(row: Tensor) -> Tensor:
            return directional(losses, point.params, row)[1]

        return torch.cat([self._mapped(along, part, number, what) for part in self._parts(rows)])

    def _losses(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        return lambda row: self.model.loss(self.layout.tensors(row), batch)

    def _removed_loss(self, row: Tensor, examples: Batch) -> Tensor:
        """q_s of one cell in the reweight mode: −w/n Σ ℓ_i over its removal's examples."""
        weight = batches.removed_weight(len(self.train), self.settings)
        return weight * self.model.loss(self.layout.tensors(row), examples).sum()

    def _removed_losses(self, batch: Batch, number: int) -> Callable[[Tensor], Tensor]:
        reseed = partial(self._reseed, number, "removed")
        return lambda row: each_example(partial(self._removed_loss, row), batch, "same", reseed)


def why_not(forward: Forward, settings: FurtherTraining, n: int, removals: Sequence[Removal]) -> str | None:
    """Why the linearisation cannot follow the steps of further training, in a line; None = it can.

    Args:
        settings: their removal mode may be left to the forward.
        n: training examples.
    """
    if forward.mixes:
        return (
            "the model's training forward mixes the examples of a batch (batch norm); set mode: eval in the "
            "further_training section"
        )
    if forward.mutable:
        return f"the model's training forward writes to its buffer '{forward.mutable[0]}'"
    if settings.removal_mode != "drop":
        return None
    if forward.random:
        return "in drop mode dropout differs between the cells of a seed; use reweight or mode: eval"
    steps = epoch_steps(n, BASELINE, settings)
    if any(epoch_steps(n, removal, settings) != steps for removal in removals):
        return "in drop mode a removal shortens the epoch by a batch; use removal_mode: reweight"
    return None


def _removed_batches(
    model: FunctionalModel, train: Examples, removals: Sequence[Removal]
) -> list[tuple[list[int], Batch]]:
    """The removals' examples, (places, batch (places, size, …)), those of equal shapes together, in blocks."""
    alike: dict[object, list[tuple[int, Batch]]] = {}
    for place, removal in enumerate(removals):
        if removal:
            batch = train.batch(list(removal))
            alike.setdefault(shapes(batch), []).append((place, batch))
    size = gradients.block_size(Layout.of(model.params).size, model.device)
    return [
        ([place for place, _ in rows[start : start + size]], stack([b for _, b in rows[start : start + size]]))
        for rows in alike.values()
        for start in range(0, len(rows), size)
    ]
