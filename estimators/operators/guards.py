"""Whether a forward went the way that was proven: what a few examples show need not hold where others go elsewhere.

Two things are asked of every batch, of its graph of autograd. A watched parameter must not be used more often than
hooks saw its modules called: a weight that is also used past its module's forward, for some examples only, has
gradients that no hook sees. And rows of a layer's input must be of the example that they are taken for: a model that
picks tokens out, or sends examples to experts, lays them elsewhere. The first costs a walk through the graph. The
second needs another backward pass, which is made only where rows may have been moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fimo.estimators.operators.capture import Call
from fimo.workers.functional import Tensors

MOVING = ("Index", "Masked", "Scatter", "Gather", "Take", "Sort", "Unbind", "Repeat", "Flip", "Roll")
"""Beginnings of the names of autograd's nodes that may lay rows elsewhere."""

STEPS = 24
"""Powers of two that examples' values are multiplied by in turn: exact in any floating-point type."""


def look(values: Tensor, calls: Sequence[Call], leaves: Tensors, shared: set[int]) -> tuple[bool, bool]:
    """Whether hooks saw every use of the watched parameters, and whether ``each_its_own`` must be asked.

    Args:
        values: (B,), of which the slopes will be taken.
        leaves: the watched parameters, of which ``values`` were computed, requiring gradients.
        shared: modules whose outputs a batch's examples share, by id; see ``Recipe.spread``.
    """
    reached, uses, moved = _walk(values, {id(leaf): name for name, leaf in leaves.items()})
    seen = dict.fromkeys(leaves, 0)
    for call in calls:
        if call.out.grad_fn in reached:
            for name in (call.site.weight, call.site.bias):
                if name is not None:
                    seen[name] += 1
    count = len(values)
    elsewhere = moved or any(len(call.x) != count for call in calls if id(call.site.module) not in shared)
    return all(uses.get(name, 0) <= seen[name] for name in leaves), count > 1 and elsewhere


def apart(outputs: Tensor, outs: Sequence[Tensor]) -> bool:
    """Whether the rows at ``outs`` are each example's own, told by the model's outputs (B, …)."""
    count = len(outputs)
    if count == 1:
        return True
    if any(len(out) != count for out in outs):
        return False
    if not outputs.requires_grad or not _walk(outputs, {})[2]:
        return True
    flat = outputs.flatten(1)
    # Weights of no pattern, because outputs that are normalised have a constant sum.
    values = flat @ torch.arange(1, flat.shape[1] + 1, device=flat.device).to(flat).cos()
    slopes = torch.autograd.grad(values.sum(), list(outs), retain_graph=True, allow_unused=True)
    return each_its_own(values, outs, slopes)


def _walk(values: Tensor, names: dict[int, str]) -> tuple[set[Any], dict[str, int], bool]:
    """All nodes of a graph, how often each leaf is used in it, and whether rows may be moved."""
    reached, uses, moved = {values.grad_fn}, dict[str, int](), False
    waiting: list[Any] = [values.grad_fn]
    while waiting:
        node = waiting.pop()
        # Stacking along the first dimension puts rows of several examples after one another.
        moved |= node.name().startswith(MOVING) or (node.name().startswith("Cat") and node._saved_dim == 0)
        moved |= isinstance(node, torch.autograd.function.BackwardCFunction)  # A function of the model's own.
        for after, _ in node.next_functions:
            if after is None:
                continue
            name = names.get(id(getattr(after, "variable", None)))
            if name is not None:
                uses[name] = uses.get(name, 0) + 1
            elif after not in reached:
                reached.add(after)
                waiting.append(after)
    return reached, uses, moved


def each_its_own(values: Tensor, outs: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> bool:
    """Whether every row's slope is that of its example alone: it grows as the example's value does.

    Args:
        values: (B,), whose graph is still there.
        outs, slopes: the rows, and the slopes of Σ values at them.
    """
    count = len(values)
    if any(out.numel() % count for out in outs):
        return False
    growth = 2.0 ** (torch.arange(count, device=values.device) % STEPS - STEPS // 2)
    grown: tuple[Tensor | None, ...] = torch.autograd.grad(
        (values * growth.to(values)).sum(), list(outs), retain_graph=True, allow_unused=True
    )
    for one, other in zip(slopes, grown, strict=True):
        if one is None or other is None:
            continue
        before, after = (slope.reshape(count, -1).double() for slope in (one, other))
        off = (after / growth.to(before)[:, None] - before).norm(dim=1)
        tolerance = 4 * torch.finfo(one.dtype).eps ** 0.75
        if not bool((off <= tolerance * before.norm(dim=1)).all()):
            return False
    return True
