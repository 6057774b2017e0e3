"""What a stack's replicas did: evaluated when they are due, held where they are until they are asked for.

On a GPU the deltas stay there: bringing each evaluation to the CPU would make the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.workers.amounts import Removal, amounts, steps_recorded
from fimo.workers.functional import Tensors
from fimo.workers.stacking import replicas
from fimo.workers.start import Start

HELD = 2**30
"""Bytes of deltas that stay on a GPU; more go to the CPU evaluation by evaluation."""

Measured = tuple[Tensor, Tensor]
"""g(z, θ_r), float64 (r, m), and ‖θ_r − θᶠ‖, float64 (r,), of some replicas."""


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


def distances(params: Tensors, final: Tensors) -> Tensor:
    """‖θ_r − θᶠ‖₂ of stacked parameters (r, …), float64 (r,)."""
    moved = [(p - final[name]).reshape(len(p), -1) for name, p in params.items()]
    squares = [torch.linalg.vector_norm(m, dim=1, dtype=torch.float64) ** 2 for m in moved]
    return torch.stack(squares).sum(dim=0).sqrt()


class Record:
    """The deltas of a stack, each taken when its replica is due.

    Args:
        lanes: the replicas' removals, as their batches have them.
        after: steps taken already, of which nothing is recorded.
    """

    def __init__(self, start: Start, lanes: Sequence[Removal], after: int = 0) -> None:
        n, settings = len(start.train), start.settings
        self.steps = steps_recorded(n, settings)
        # Lanes by own step and place: those that are due together are written together.
        self._due: dict[int, dict[int, list[int]]] = {}
        for lane, removal in enumerate(lanes):
            for place, (own_step, _) in enumerate(amounts(n, removal, settings)):
                if own_step > after:
                    self._due.setdefault(own_step, {}).setdefault(place, []).append(lane)
        shape = (len(lanes), len(self.steps), len(start.at_final))
        where = start.model.device if 8 * shape[0] * shape[1] * shape[2] <= HELD else torch.device("cpu")
        self._at_final = start.at_final.to(where)
        # NaN, not zero: a result that was never written must not pass for a number.
        self._deltas = torch.full(shape, torch.nan, dtype=torch.float64, device=where)
        self._distances = torch.full(shape[:2], torch.nan, dtype=torch.float64, device=where)

    @property
    def complete(self) -> bool:
        """Whether nothing is due any more."""
        return not self._due

    @property
    def last(self) -> int:
        """The last step at which a replica is due."""
        return max(self._due, default=0)

    def take(self, step: int, measure: Callable[[tuple[int, ...]], Measured]) -> None:
        """Record the replicas that are due at their own step ``step``, as ``measure`` has them."""
        due = self._due.pop(step, None)
        if due is None:
            return
        lanes = tuple(sorted({lane for some in due.values() for lane in some}))
        g, distance = (values.to(self._deltas.device) for values in measure(lanes))
        delta, row = g - self._at_final, {lane: i for i, lane in enumerate(lanes)}
        for place, some in due.items():
            into = replicas.places(tuple(some), self._deltas.device)
            out = replicas.places(tuple(row[lane] for lane in some), self._deltas.device)
            self._deltas[into, place], self._distances[into, place] = delta[out], distance[out]

    def result(self) -> Deltas:
        """What was recorded so far."""
        return Deltas(tuple(self.steps), self._deltas.cpu(), self._distances.cpu())
