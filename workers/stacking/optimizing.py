"""One optimizer over a stack, which is one optimizer a replica: torch's SGD, Adam and AdamW are elementwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fimo.workers.functional import Tensors
from fimo.workers.settings import FurtherTraining
from fimo.workers.stacking import replicas
from fimo.workers.stacking.replicas import Gradients

Rows = dict[str, dict[str, Any]]
"""One replica's state of an optimizer, by parameter and by torch's own names."""


@dataclass(frozen=True)
class _View:
    """Neighbouring replicas of one learning rate: their rows of the stacked parameters, as leaves of an optimizer."""

    rate: float
    rows: slice
    params: Tensors


class Optimizing:
    """Steps stacked parameters by stacked gradients, each replica's clipped for itself.

    Args:
        params: stacked (R, …), stepped in place.
        rates: the replicas' own learning rates, in place of the settings'. Replicas of one rate are stepped together if
            they are neighbours.
        launched: kernels are launched, as on a GPU, so that few are better than small ones.
        recorded: a step may be recorded and launched again, so that nothing is counted on the host.
    """

    def __init__(
        self,
        params: Tensors,
        settings: FurtherTraining,
        rates: Sequence[float] | None = None,
        launched: bool = False,
        recorded: bool = False,
    ) -> None:
        self._params, self._clip_norm = params, settings.clip_norm
        self._views = [] if rates is None else _views(params, rates)
        groups: list[Any] = [{"params": list(v.params.values()), "lr": v.rate} for v in self._views]
        # SGD's fused form has nothing to gain, and refuses a parameter that gets its first gradient late.
        adaptive = settings.optimizer.name != "sgd"
        self._fused = adaptive and not launched
        self._writes = launched and settings.optimizer.nesterov
        self._optimizer = settings.optimizer.build(
            groups or list(params.values()), foreach=launched, fused=self._fused, capturable=adaptive and recorded
        )
        if adaptive and recorded:
            self._count_widely()

    def _count_widely(self) -> None:
        """Begin with the state that torch would make at the first step, but for float64 counts.

        torch counts in float32, and 1 − 0.999ᵗ is then off by up to 6e-5 of itself.
        """
        for group in self._optimizer.param_groups:
            names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
            for parameter in group["params"]:
                state = self._optimizer.state[parameter]
                state["step"] = torch.zeros((), dtype=torch.float64, device=parameter.device)
                state.update((name, torch.zeros_like(parameter)) for name in names)

    def step(self, grads: Gradients) -> None:
        """Take a step."""
        if self._clip_norm is not None:
            grads = replicas.clip(grads, self._clip_norm)
        if self._fused:
            # A fused step reads a gradient as if it lay as its parameter does.
            grads = {name: None if grad is None else grad.contiguous() for name, grad in grads.items()}
        if self._writes:
            # torch adds Nesterov's momentum to the gradients where they lie, and autograd gives two parameters that are
            # added up the same tensor.
            grads = {name: None if grad is None else grad.clone() for name, grad in grads.items()}
        if not self._views:
            for name, parameter in self._params.items():
                parameter.grad = grads.get(name)
        for view in self._views:
            for name, parameter in view.params.items():
                grad = grads.get(name)
                parameter.grad = None if grad is None else grad[view.rows]
        self._optimizer.step()

    def tensors(self) -> list[Tensor]:
        """All that it holds of the steps so far, beside the parameters."""
        states = self._optimizer.state.values()
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def rows(self, lane: int) -> Rows:
        """One replica's state; a copy. Without ``rates``."""
        state, params = self._optimizer.state, self._params
        return {
            name: {key: _row(value, parameter, lane) for key, value in state[parameter].items()}
            for name, parameter in params.items()
            if parameter in state
        }

    def spread(self, rows: Rows) -> None:
        """Give every replica one replica's state."""
        for name, row in rows.items():
            self._optimizer.state[self._params[name]] = _spread(row, self._params[name])


def _views(params: Tensors, rates: Sequence[float]) -> list[_View]:
    """A view for each run of equal rates."""
    found, first = list[_View](), 0
    for rate, equal in groupby(rates):
        rows = slice(first, first + len(list(equal)))
        found.append(_View(rate, rows, {name: p[rows] for name, p in params.items()}))
        first = rows.stop
    return found


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
