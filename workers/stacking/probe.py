"""May a step be folded, and may its examples be cut: does the training forward treat examples one by one?

Folding gives examples of a batch weights of its own and adds others to it, which is exact only if each example's loss
and gradient are what they are alone. Proven here on a few examples, at θᶠ and away from it, in losses and in gradients
(``scale_grad_by_freq`` couples gradients alone). What cannot be proven is not done.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from fimo.workers.draws import Draws
from fimo.workers.examples import Batch, Examples
from fimo.workers.forward import SOME, Forward, agree, is_large, losses_and_gradient, moved
from fimo.workers.functional import FunctionalModel, Tensors
from fimo.workers.randomness import kept, seed_all, states
from fimo.workers.settings import FurtherTraining
from fimo.workers.stacking.masks import Calls, StepMasks, learn
from fimo.workers.stacking.stacked import Stacked
from fimo.workers.stacking.trimming import Trimming, trimming

SEVERAL = 4
"""Lengths of the examples that are looked at, if there are so many."""


def tokens(train: Examples, padding: str | None) -> int:
    """Tokens of an example with its padding; 0 if there is nothing like it."""
    mask = train.tensors.get(padding) if isinstance(train.tensors, dict) and padding is not None else None
    return int(mask.shape[1]) if isinstance(mask, Tensor) and mask.dim() == 2 else 0


def proven_cuts(model: FunctionalModel, train: Examples) -> Trimming | None:
    """How training examples are cut, if it is known how and seen to change nothing."""
    cuts = trimming(train, model.padding)
    return cuts if cuts is not None and cuts_nothing(model, train, cuts) else None


def shortest(train: Examples, cuts: Trimming | None, settings: FurtherTraining) -> Examples:
    """What is looked at: short examples of several lengths, cut to the longest of them; all if none can be cut.

    Of a large model on text any others take minutes. Of one length alone, a loss that is divided by the tokens of its
    batch would look like one that mixes nothing.
    """
    if cuts is None or train.tensors is None:
        return train
    count = max(SOME, settings.batch_size) + 2
    ascending = torch.argsort(cuts.lengths, stable=True)
    chosen = ascending[:count]
    longer = ascending[cuts.lengths[ascending] > cuts.lengths[chosen[-1]]]
    if int(cuts.lengths[chosen].unique().numel()) < SEVERAL and len(longer):
        # One of each of the next lengths, last: who looks for mixing puts the last in the place of the first.
        lengths = cuts.lengths[longer]
        firsts = torch.cat([torch.ones(1, dtype=torch.bool), lengths[1:] != lengths[:-1]])
        others = longer[firsts][: SEVERAL - 1]
        chosen = torch.cat([chosen[: count - len(others)], others])
    return Examples(cuts.cut(train.batch(chosen), cuts.longest(chosen)), device=train.device, dtype=train.dtype)


def cuts_nothing(model: FunctionalModel, train: Examples, cuts: Trimming) -> bool:
    """Whether losses and gradients of short examples are the same with and without their padding, in eval mode."""
    ascending = torch.argsort(cuts.lengths, stable=True)
    # Not of those without padding, which are often most of them: nothing of theirs is cut.
    count = int((cuts.lengths < cuts.full).sum())
    chosen = ascending[torch.tensor([0, count // 4, count // 2, count - 1])]
    batch = train.batch(chosen)
    places = torch.arange(len(chosen))
    with kept(model.device), model.mode("eval"):
        for params in (moved(model.params, 3),) if is_large(model) else (model.params, moved(model.params, 3)):
            for wide, tolerance in ((True, 1e-6), (False, 1e-4)):
                try:
                    whole = losses_and_gradient(model, params, batch, places, wide)
                    alone = (cuts.cut(train.batch(i.reshape(1)), int(cuts.lengths[i])) for i in chosen)
                    cut = _one_by_one_gradient(model, params, alone, (places + 1).double(), wide)
                except Exception:
                    if wide:
                        continue  # A forward that fails in float64 is judged in its own precision.
                    return False
                if not agree(whole, cut, tolerance):
                    return False
                break
    return True


def _one_by_one_gradient(
    model: FunctionalModel, params: Tensors, alone: Iterable[Batch], weights: Tensor, wide: bool
) -> tuple[Tensor, Tensors]:
    """Losses of batches of one, and the gradient of their sum with ``weights``."""
    first, losses, total = torch.zeros(1, dtype=torch.long), [], dict[str, Tensor]()
    for batch, weight in zip(alone, weights, strict=True):
        loss, grads = losses_and_gradient(model, params, batch, first, wide, weight.reshape(1))
        losses.append(loss)
        # One sum, not a gradient for each example: a large model's do not fit.
        total = {name: total[name].add_(g) if total else g.clone() for name, g in grads.items()}
    return torch.cat(losses), total


def dropout_calls(model: FunctionalModel, train: Examples, forward: Forward, settings: FurtherTraining) -> Calls | None:
    """The training forward's calls of dropout; none if it draws nothing, None if they cannot be told."""
    if not forward.random:
        return ()
    n, full = len(train), tokens(train, model.padding)
    if train.tensors is None or n < 7 or forward.mixes or forward.mutable:
        return None
    few, more = (train.batch(range(count)) for count in (5, 7))
    shaped = [(few, 5, full), (more, 7, full)]
    try:
        if full > 2:
            whole = Trimming(torch.full((n,), full), full)
            shaped.append((whole.cut(few, full - 1), 5, full - 1))
        # What draws, and not by dropout, draws for other batches than these.
        return learn(model, settings, shaped) or None
    except Exception:
        return None


def same_in_parts(
    model: FunctionalModel, train: Examples, calls: Calls, settings: FurtherTraining, cuts: Trimming | None
) -> bool:
    """Whether a batch that draws has the losses and gradients of its parts with the masks that it would have drawn."""
    if not calls:
        return True
    n = min(6, len(train))
    indices, full = torch.arange(n), tokens(train, model.padding)
    if cuts is not None:
        # Short ones in the first part and long ones in the second: parts that are not cut show nothing of cutting.
        ascending = torch.argsort(cuts.lengths, stable=True)
        indices = ascending[torch.tensor([0, len(train) // 2, 1, -1, 2, -2])] if n == 6 else indices
    shuffled = torch.tensor([4, 2, 0, 1, 5, 3])
    with kept(model.device), model.mode(settings.mode):
        try:
            with Draws():
                whole = losses_and_gradient(model, model.params, train.batch(indices), torch.arange(n), wide=False)
            masks = StepMasks(model, calls, (0, 0), full)
            got, total = torch.empty_like(whole[0]), {name: torch.zeros_like(g) for name, g in whole[1].items()}
            for rows in shuffled[shuffled < n].split(3):
                batch = train.batch(indices[rows])
                if cuts is not None:
                    batch = cuts.cut(batch, cuts.longest(indices[rows]))
                with Stacked((), partial(masks.at, rows=rows, sizes=(n, 0))):
                    weights = (rows + 1).double()
                    losses, grads = losses_and_gradient(
                        model, model.params, batch, torch.arange(len(rows)), False, weights
                    )
                got[rows.to(got.device)] = losses
                total = {name: total[name] + grads[name] for name in total}
        except Exception:
            return False
    return agree(whole, (got, total), 1e-9 if model.dtype is torch.float64 else 1e-4)


def independent(model: FunctionalModel, train: Examples, forward: Forward, settings: FurtherTraining, n: int) -> bool:
    """Whether each example's loss and gradient in a batch are proven to be those that it has alone.

    A forward that draws is looked at in eval mode, without its dropout.

    Args:
        train: some of the ``n`` training examples.
    """
    if forward.mixes or forward.mutable:
        return False
    large = is_large(model)
    indices = list(range(min(2 if large else SOME, len(train))))
    # The first example twice: a removed example rides in a batch that may hold it already.
    indices.append(0)
    with kept(model.device), model.mode("eval" if forward.random else settings.mode):
        return (
            _one_by_one(model, train, indices)
            and _at_every_size(model, train, settings.batch_size, n, large)
            and (large or _adds_up(model, model.params, train, indices))
            and _adds_up(model, moved(model.params, 2), train, indices)
        )


@torch.no_grad()
def _one_by_one(model: FunctionalModel, train: Examples, indices: list[int]) -> bool:
    """Whether vmap over examples gives the batch's losses; it refuses decisions that depend on data.

    Examples without padding share their mask, about which a forward may decide: transformers asks whether it is whole.
    """
    batch = _without_padding(model, train, indices)
    mask = batch.get(model.padding)
    shares = isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask == mask[:1]).all())

    def one(example: Batch) -> Tensor:
        alone = {
            name: value[:1] if shares and name == model.padding else pytree.tree_map(lambda t: t.unsqueeze(0), value)
            for name, value in example.items()
        }
        return model.loss(model.params, alone, dict(model.fixed))[0]

    dims = {name: None if shares and name == model.padding else 0 for name in batch}
    try:
        with Stacked(decides=False):
            alone: Tensor = vmap(one, in_dims=(dims,))(batch)
        whole = model.loss(model.params, batch, dict(model.fixed))
    except Exception:
        # Whatever the model objects to, the answer is the same: nothing is proven.
        return False
    return torch.allclose(alone, whole, rtol=1e-4, atol=1e-6, equal_nan=True)


def _without_padding(model: FunctionalModel, train: Examples, indices: list[int]) -> Batch:
    """Examples of a batch cut to the shortest of them, so that there is no padding."""
    batch, cuts = train.batch(indices), trimming(train, model.padding)
    return batch if cuts is None else cuts.cut(batch, int(cuts.lengths[indices].min()))


@torch.no_grad()
def _at_every_size(model: FunctionalModel, train: Examples, batch_size: int, n: int, large: bool) -> bool:
    """Whether batches of the sizes that folding makes of whole and ragged ones have one and the same losses.

    A forward may look at the size of its batch, and folding changes it: it appends examples, or fills up with them.
    """
    ragged = n % batch_size or batch_size
    around = (0, 1) if large else (-1, 0, 1)
    sizes = sorted({size + more for size in (min(batch_size, n), ragged) for more in around} - {0})
    losses = []
    for size in sizes:
        seed_all(0, model.device)
        before = states(model.device)
        losses.append(model.loss(model.params, train.batch([i % len(train) for i in range(size)]), dict(model.fixed)))
        if states(model.device) != before:
            return False
    return all(torch.allclose(losses[-1][: len(some)], some, rtol=1e-4, atol=1e-6, equal_nan=True) for some in losses)


def _adds_up(model: FunctionalModel, params: Tensors, train: Examples, indices: list[int]) -> bool:
    """Whether the gradient of a weighted sum over the batch is the weighted sum of gradients of batches of one."""
    weights = torch.linspace(-1.0, 2.0, len(indices), dtype=torch.float64)
    for wide, tolerance in ((True, 1e-6), (False, 1e-4)):
        try:
            whole = losses_and_gradient(model, params, train.batch(indices), torch.arange(len(indices)), wide, weights)
            alone = _one_by_one_gradient(model, params, (train.batch([i]) for i in indices), weights, wide)
        except Exception:
            continue
        return agree(whole, alone, tolerance)
    return False
