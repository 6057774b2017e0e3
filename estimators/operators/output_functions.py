"""Tells what a workload's loss is, by evaluating it: the functions of the outputs that TRAK and the Fisher need.

A workload gives ``outputs`` and ``loss`` and no name for either, so cross-entropy of integer classes is recognised by
its gradients: softmax(z) − e_y at any outputs z, hence 1/C − e_y at z = 0, which shows the label y.
"""

from __future__ import annotations

from functools import partial
from itertools import chain

import torch
from torch import Tensor
from torch.func import grad

from fimo.estimators.operators import gradients
from fimo.workers.examples import Batch, Examples
from fimo.workers.functional import FunctionalModel


def loss_slope(model: FunctionalModel, outputs: Tensor, batch: Batch) -> Tensor:
    """∂ℓ/∂outputs of every example, the shape of ``outputs``."""
    slope: Tensor = grad(lambda out: model.loss_of_outputs(out, batch).sum())(outputs)
    return slope


def labels(model: FunctionalModel, outputs: Tensor, batch: Batch) -> Tensor:
    """The class labels (B,) of a cross-entropy over outputs (B, C)."""
    return loss_slope(model, torch.zeros_like(outputs), batch).argmin(dim=-1)


def is_cross_entropy(model: FunctionalModel, batch: Batch) -> bool:
    """Whether the loss is −log softmax(outputs)[label] of outputs (B, C), C ≥ 2, on this batch."""
    outputs = model.outputs(model.params, batch).detach()
    if outputs.dim() != 2 or outputs.shape[1] < 2 or not outputs.is_floating_point():
        return False
    hot = torch.nn.functional.one_hot(labels(model, outputs, batch), outputs.shape[1])
    # Also at outputs that are not the model's, because a scaled or smoothed loss shows there.
    rising = torch.arange(1, outputs.shape[1] + 1).to(outputs).expand_as(outputs).contiguous()
    places = [torch.zeros_like(outputs), outputs, rising]
    expected = [place.softmax(dim=1) - hot for place in places]
    slopes = [loss_slope(model, place, batch) for place in places]
    return all(torch.allclose(s, e, atol=1e-5) for s, e in zip(slopes, expected, strict=True))


def token_weights(model: FunctionalModel, outputs: Tensor, batch: Batch, dim: int) -> tuple[Tensor, Tensor]:
    """w_t of a loss Σ_t w_t · cross-entropy of token t, the classes along ``dim``: the outputs' shape without it.

    Of any targets, smoothed ones too: the slope w_t (softmax(z_t) − target) changes by w_t (softmax(z_t) − 1/C) from
    z = 0 on.

    Returns:
        w, and whether each example's slope changes so (B,): else its loss is another one, and has no such weights.
    """
    ramp = _ramp(outputs, dim)
    change, expected = _slope_change(model, ramp, batch), _softmax_change(ramp, dim)
    weights = (change * expected).sum(dim=dim) / expected.square().sum(dim=dim)
    expected = expected * weights.unsqueeze(dim)
    return weights, _close(change, expected)


def _close(change: Tensor, expected: Tensor) -> Tensor:
    """Of each example (B,)."""
    off, length = ((some.flatten(1)).double().norm(dim=1) for some in (change - expected, expected))
    close: Tensor = off <= 1e-3 * length
    return close


def class_dimension(model: FunctionalModel, outputs: Tensor, batch: Batch) -> int | None:
    """The dimension of the classes of a loss that is cross-entropy token by token; None = it is another loss.

    Outputs are (B, C), (B, …, C), or (B, C, …) as torch's ``cross_entropy`` has them. Seen by how the loss's slope
    changes with the outputs, at two places beside 0.
    """
    if not outputs.is_floating_point() or outputs.dim() < 2:
        return None
    for dim in dict.fromkeys((outputs.dim() - 1, 1)):
        if outputs.shape[dim] < 2:
            continue
        weights, close = token_weights(model, outputs, batch, dim)
        place = outputs + _ramp(outputs, dim).flip(dim)
        beside = _close(_slope_change(model, place, batch), weights.unsqueeze(dim) * _softmax_change(place, dim))
        if bool(weights.any()) and bool((close & beside).all()):
            return dim
    return None


def _ramp(outputs: Tensor, dim: int) -> Tensor:
    """Outputs at which the softmax is far from uniform, whatever the number of classes."""
    count = outputs.shape[dim]
    ramp = torch.linspace(0, 8, count, dtype=outputs.dtype, device=outputs.device)
    shape = [count if d == dim else 1 for d in range(outputs.dim())]
    return ramp.reshape(shape).expand_as(outputs).contiguous()


def _slope_change(model: FunctionalModel, outputs: Tensor, batch: Batch) -> Tensor:
    return loss_slope(model, outputs, batch) - loss_slope(model, torch.zeros_like(outputs), batch)


def _softmax_change(outputs: Tensor, dim: int) -> Tensor:
    return outputs.softmax(dim=dim) - 1 / outputs.shape[dim]


FEW = 32
"""Examples whose outputs are held at once: those of a language model are many."""


def _slope_of(model: FunctionalModel, batch: Batch, outputs: Tensor) -> Tensor:
    return loss_slope(model, outputs, batch)


def is_flat(model: FunctionalModel, examples: Examples) -> bool:
    """Whether ∂²ℓ/∂outputs² is zero for every example: then so is the Gauss-Newton matrix.

    Told from its product with a random vector, which no other matrix sends to zero. The first example that is curved
    ends the pass.
    """
    generator = torch.Generator().manual_seed(0)
    # Most often the first example is curved.
    rest = range(1, len(examples))
    for _, batch in chain(examples.batches(1, [0]), examples.batches(min(FEW, gradients.BLOCK), rest)):
        outputs = model.outputs(model.params, batch).detach()
        along = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
        image: Tensor = gradients.directional(partial(_slope_of, model, batch), outputs, along)[1]
        if bool((image != 0).any()):
            return False
    return True


def is_scalar(model: FunctionalModel, batch: Batch) -> bool:
    """Whether the model puts out one number for each example."""
    outputs = model.outputs(model.params, batch)
    return outputs.is_floating_point() and outputs.numel() == len(outputs)


def log_odds(outputs: Tensor, label: Tensor) -> Tensor:
    """log p_y/(1 − p_y) = z_y − log Σ_{c≠y} exp z_c (B,), of outputs z (B, C); exact even if p_y rounds to 1."""
    of_label = label[:, None] == torch.arange(outputs.shape[1], device=outputs.device)
    others = outputs.masked_fill(of_label, -torch.inf)
    return outputs.masked_fill(~of_label, 0).sum(dim=1) - others.logsumexp(dim=1)
