"""Operations that torch cannot ``vmap`` or differentiate forwards, replaced by plain ones with the same numbers.

torch's recurrent layers write in place under ``vmap``. Weight normalisation and embedding bags have no forward-mode
derivative, and the double backward of the former is off by percents. PReLU's backward pass is off by a third under two
nested ``vmap``s. Sparse gradients have no rows. Inside ``PlainOperations`` a model that calls them runs as before, to
rounding, and every derivative that an estimator takes exists.

Covers ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``, except with dropout between layers, projections or packed sequences;
``weight_norm``; ``nn.PReLU``; ``nn.Embedding(sparse=True)``; ``nn.EmbeddingBag`` of two-dimensional input by sum or
mean. Whatever else torch refuses is refused in one line by ``estimating``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import _WeightNorm
from torch.overrides import TorchFunctionMode

Step = Callable[..., tuple[Tensor, ...]]
"""(what the input adds to the gates, the state's weight and bias, *state) -> state, of one layer at one time."""


MODULES = (nn.RNNBase, nn.PReLU, nn.EmbeddingBag, _WeightNorm)
"""Those whose forward calls an operation that is replaced; a sparse embedding does too."""


def plain_operations(module: nn.Module) -> AbstractContextManager[object]:
    """``PlainOperations`` if the module calls one of them; else nothing, for the mode slows every operation."""
    called = any(isinstance(m, MODULES) or (isinstance(m, nn.Embedding) and m.sparse) for m in module.modules())
    return PlainOperations() if called else nullcontext()


class PlainOperations(TorchFunctionMode):
    """Inside this mode torch's own fused operations are made of plain ones."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        plain = REPLACED.get(func)
        if plain is not None:
            result = plain(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / ‖v‖, the norm over all dimensions but ``dim`` (-1: over all)."""
    others = [d for d in range(v.dim()) if d != dim]
    squares = v.square()
    # An empty list of dimensions would sum over all.
    return v * (g / (squares.sum(dim=others, keepdim=True) if others else squares).sqrt())


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not sparse:
        return NotImplemented
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,  # noqa: ARG001
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,  # noqa: ARG001
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,  # noqa: ARG001
    padding_idx: int | None = None,
) -> Any:
    unusual = any(option is not None for option in (offsets, max_norm, per_sample_weights, padding_idx))
    if unusual or scale_grad_by_freq or input.dim() != 2 or mode not in ("sum", "mean"):
        return NotImplemented
    rows = F.embedding(input, weight)
    return rows.sum(dim=1) if mode == "sum" else rows.mean(dim=1)


def _prelu(x: Tensor, weight: Tensor) -> Tensor:
    """x, and on negative entries weight·x, of one weight or of one for each channel (dimension 1)."""
    if weight.numel() > 1 and x.dim() > 1:
        weight = weight.reshape(-1, *[1] * (x.dim() - 2))
    return torch.where(x > 0, x, weight * x)


def _recurrent(step: Step, states: int) -> Callable[..., Any]:
    """A stand-in for torch's fused loop over time, of a step with so many tensors of state."""

    def run(
        x: Tensor,
        hx: Any,
        weights: Any,
        biases: Any,
        layers: Any,
        dropout: Any = None,
        training: Any = None,
        bidirectional: Any = None,
        batch_first: Any = None,
    ) -> Any:
        if not isinstance(biases, bool):  # a packed sequence: (data, batch_sizes, hx, weights, …)
            return NotImplemented
        start = tuple(hx) if states == 2 else (hx,)
        if (training and dropout) or (states == 2 and start[0].shape[-1] != start[1].shape[-1]):
            return NotImplemented
        directions, each = (2 if bidirectional else 1), (4 if biases else 2)
        sequence = x.transpose(0, 1) if batch_first else x
        last: list[tuple[Tensor, ...]] = []
        for layer in range(layers):
            sides = []
            for direction in range(directions):
                place = layer * directions + direction
                own = tuple(weights[place * each : (place + 1) * each])
                state = tuple(s[place] for s in start)
                inputs = F.linear(sequence, own[0], own[2] if biases else None)
                times = range(len(sequence)) if direction == 0 else reversed(range(len(sequence)))
                seen: dict[int, Tensor] = {}
                for time in times:
                    state = step(inputs[time], own[1], own[3] if biases else None, *state)
                    seen[time] = state[0]
                sides.append(torch.stack([seen[time] for time in range(len(sequence))]))
                last.append(state)
            sequence = torch.cat(sides, dim=-1)
        out = sequence.transpose(0, 1) if batch_first else sequence
        return (out, *(torch.stack([state[s] for state in last]) for s in range(states)))

    return run


def _lstm_step(x: Tensor, w: Tensor, b: Tensor | None, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    i, f, g, o = (x + F.linear(h, w, b)).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(x: Tensor, w: Tensor, b: Tensor | None, h: Tensor) -> tuple[Tensor, ...]:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, dim=-1), F.linear(h, w, b).chunk(3, dim=-1)
    update = (xz + hz).sigmoid()
    new = (xn + (xr + hr).sigmoid() * hn).tanh()
    return (new + update * (h - new),)


def _rnn_step(activation: Callable[[Tensor], Tensor]) -> Step:
    return lambda x, w, b, h: (activation(x + F.linear(h, w, b)),)


REPLACED: dict[Any, Callable[..., Any]] = {
    torch._VF.lstm: _recurrent(_lstm_step, 2),
    torch._VF.gru: _recurrent(_gru_step, 1),
    torch._VF.rnn_tanh: _recurrent(_rnn_step(torch.tanh), 1),
    torch._VF.rnn_relu: _recurrent(_rnn_step(torch.relu), 1),
    torch._weight_norm: _weight_norm,
    torch.prelu: _prelu,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
}
