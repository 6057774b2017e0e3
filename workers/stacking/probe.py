"""May a step be folded: does the training forward treat examples one by one?

Folding gives examples of a batch weights of its own and adds others to it, which is exact only if each example's loss
and gradient are what they are alone. Proven here on a few examples, at θᶠ and away from it, in losses and in gradients
(``scale_grad_by_freq`` couples gradients alone). What cannot be proven is not folded.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from fimo.workers.examples import Batch, Examples
from fimo.workers.forward import SOME, Forward, agree, losses_and_gradient, moved
from fimo.workers.functional import FunctionalModel, Tensors
from fimo.workers.randomness import kept, python_state, seed_all, torch_state
from fimo.workers.settings import FurtherTraining


def independent(model: FunctionalModel, train: Examples, forward: Forward, settings: FurtherTraining) -> bool:
    """Whether each example's loss and gradient in a batch are proven to be those that it has alone."""
    if forward.mixes or forward.random or forward.mutable:
        return False
    indices = list(range(min(SOME, len(train))))
    # The first example twice: a removed example rides in a batch that may hold it already.
    indices.append(0)
    with kept(model.device), model.mode(settings.mode):
        return (
            _one_by_one(model, train.batch(indices))
            and _at_every_size(model, train, settings.batch_size)
            and all(_adds_up(model, params, train, indices) for params in (model.params, moved(model.params, 2)))
        )


@torch.no_grad()
def _one_by_one(model: FunctionalModel, batch: Batch) -> bool:
    """Whether vmap over examples gives the batch's losses; it refuses decisions that depend on data."""

    def one(example: Batch) -> Tensor:
        alone = pytree.tree_map(lambda t: t.unsqueeze(0), example)
        return model.loss(model.params, alone, dict(model.fixed))[0]

    try:
        alone: Tensor = vmap(one)(batch)
        whole = model.loss(model.params, batch, dict(model.fixed))
    except Exception:
        # Whatever the model objects to, the answer is the same: nothing is proven.
        return False
    return torch.allclose(alone, whole, rtol=1e-4, atol=1e-6, equal_nan=True)


@torch.no_grad()
def _at_every_size(model: FunctionalModel, train: Examples, batch_size: int) -> bool:
    """Whether batches of the sizes that folding makes of whole and ragged ones have one and the same losses.

    A forward may look at the size of its batch, and folding changes it: it appends examples, or fills up with them.
    """
    n = len(train)
    ragged = n % batch_size or batch_size
    sizes = sorted({size + more for size in (min(batch_size, n), ragged) for more in (-1, 0, 1)} - {0})
    losses = []
    for size in sizes:
        seed_all(0, model.device)
        before = torch_state(model.device), python_state()
        losses.append(model.loss(model.params, train.batch([i % n for i in range(size)]), dict(model.fixed)))
        if not torch.equal(torch_state(model.device), before[0]) or python_state() != before[1]:
            return False
    return all(torch.allclose(losses[-1][: len(some)], some, rtol=1e-4, atol=1e-6, equal_nan=True) for some in losses)


def _adds_up(model: FunctionalModel, params: Tensors, train: Examples, indices: list[int]) -> bool:
    """Whether the gradient of a weighted sum over the batch is the weighted sum of gradients of batches of one."""
    weights = torch.linspace(-1.0, 2.0, len(indices), dtype=torch.float64)
    for wide, tolerance in ((True, 1e-6), (False, 1e-4)):
        try:
            whole = losses_and_gradient(model, params, train.batch(indices), torch.arange(len(indices)), wide, weights)
            one = torch.zeros(1, dtype=torch.long)
            alone = [
                losses_and_gradient(model, params, train.batch([i]), one, wide, w.reshape(1))
                for i, w in zip(indices, weights, strict=True)
            ]
        except Exception:
            continue
        losses = torch.cat([losses for losses, _ in alone])
        total = {name: torch.stack([grads[name] for _, grads in alone]).sum(dim=0) for name in whole[1]}
        return agree(whole, (losses, total), tolerance)
    return False
