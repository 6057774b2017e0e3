"""Gradients of losses and measures in blocks of rows (b, P), however they are had: by ``vmap``, or layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fimo.estimators.operators import gradients
from fimo.estimators.operators.gradients import Layout, PerExample, block_size, incidence, unique, units
from fimo.estimators.operators.layerwise import layerwise
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel, Tensors


def loss_gradients(
    model: FunctionalModel,
    examples: Examples,
    indices: Sequence[int] | None = None,
    params: Tensors | None = None,
    loss: PerExample | None = None,
    along: Tensors | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """∇ℓ_j in blocks (indices, rows (b, P)), at ``params`` (or θᶠ), of ``loss`` (or the workload's).

    ``along``: see ``per_example``.
    """
    layout, at = Layout.of(model.params), model.params if params is None else params
    size, function = block_size(layout.size, model.device), model.loss if loss is None else loss
    if params is None and loss is None and along is None:
        yield from _rows(model, function, examples, list(range(len(examples)) if indices is None else indices), size)
        return
    for block, batch in examples.batches(size, indices):
        yield block, gradients.per_example(function, at, batch, layout, along)


def _rows(
    model: FunctionalModel,
    function: PerExample,
    examples: Examples,
    indices: Sequence[int],
    size: int,
    wide: bool = False,
) -> Iterator[tuple[list[int], Tensor]]:
    """Blocks of gradients at θᶠ, layer by layer where that is proven."""
    layout, way = Layout.of(model.params), layerwise(model, function, examples, wide=wide)
    for start in range(0, len(indices), size):
        block = list(indices[start : start + size])
        if way is not None and len(set(block)) == len(block):
            yield block, way.rows(block)
        else:
            yield block, gradients.per_example(function, model.params, examples.batch(block), layout)


def measure_gradients(
    model: FunctionalModel, evals: Examples, indices: Sequence[int] | None = None, params: Tensors | None = None
) -> Tensor:
    """∇g(z) of the evaluation examples at ``params`` (or θᶠ), rows (len(indices), P); the measure in float64."""
    layout, at = Layout.of(model.params), model.params if params is None else params
    size = block_size(layout.size, model.device)
    if params is None:
        chosen = list(range(len(evals)) if indices is None else indices)
        blocks = [rows for _, rows in _rows(model, model.measure, evals, chosen, size, wide=True)]
    else:
        blocks = [gradients.per_example(model.measure, at, batch, layout) for _, batch in evals.batches(size, indices)]
    return torch.cat(blocks) if blocks else torch.empty(0, layout.size, dtype=model.dtype, device=model.device)


def removal_gradients(
    model: FunctionalModel,
    train: Examples,
    removals: Sequence[Sequence[int]],
    params: Tensors | None = None,
    along: Tensors | None = None,
    unit: bool = False,
) -> Iterator[tuple[range, Tensor]]:
    """Σ_{i∈removal} ∇ℓ_i for blocks of removals: (which, rows (b, P)).

    An index is differentiated once a block. ``along``: see ``per_example``. ``unit``: each ∇ℓ_i at norm 1.
    """
    layout = Layout.of(model.params)
    size = block_size(layout.size, model.device)
    for start in range(0, len(removals), size):
        which = range(start, min(start + size, len(removals)))
        groups = [removals[r] for r in which]
        rows = torch.zeros(len(groups), layout.size, dtype=model.dtype, device=model.device)
        for indices, some in loss_gradients(model, train, unique(groups), params, along=along):
            here = set(indices)
            inside = [[i for i in group if i in here] for group in groups]
            rows += incidence(inside, indices).to(rows) @ (units(some) if unit else some)
        yield which, rows


def mean_square(model: FunctionalModel, examples: Examples) -> Tensor:
    """Mean over all training examples of the mean squared entry of each layer's gradient, float64 (layers,).

    A layer is one parameter tensor. The mean over all P entries is ``(mean_square * sizes).sum() / P``.
    """
    slices = list(Layout.of(model.params).slices.values())
    total = torch.zeros(len(slices), dtype=torch.float64, device=model.device)
    for _, rows in loss_gradients(model, examples):
        total += torch.stack([rows[:, s].double().square().mean(dim=1).sum() for s in slices])
    return total / len(examples)
