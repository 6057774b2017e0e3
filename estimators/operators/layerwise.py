"""Per-example gradients of a large model, at the cost of one forward and backward each: layer by layer, many at once.

A batch goes forwards and backwards once; hooks see each layer's activations and the slopes at its output, of which
every example's own gradient is made (Goodfellow, Efficient per-example gradient computations, 2015). Nothing of it is
taken on trust. On a few examples the gradients must be those of ``torch.autograd`` on batches of one with all of their
padding, parameter by parameter; what fails is left to autograd, or not done at all, and the caller has rows instead.
So must examples be cut to their own length only if that is seen to change nothing.

Which way is gone is a function of the model and its data alone: a result can be repeated bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fimo.estimators.operators import gradients
from fimo.estimators.operators.by_layer import Layerwise, plain_gradients, seen_as
from fimo.estimators.operators.capture import Recipe, leading, recipe_of
from fimo.estimators.operators.gradients import Layout, PerExample
from fimo.workers.examples import Examples, to
from fimo.workers.functional import FunctionalModel, Tensors
from fimo.workers.stacking.trimming import Trimming, trimming

LARGE = 2**20
"""Parameters from which on gradients are taken layer by layer: of smaller models ``vmap`` does a block at once, and
rows of them are cheap to keep."""

CHOSEN = 3
"""Examples that a proof looks at."""


def scalars_at_once(device: torch.device) -> int:
    """Scalars that one batch may have captured: what a processor needs to be busy, measured as orders of magnitude."""
    return 2**26 if device.type == "cuda" else 2**22


@dataclass(frozen=True)
class _Known:
    """A proof's outcome, without the model itself, which must not be kept alive by it."""

    examples: weakref.ref[Examples]
    found: tuple[Recipe, Trimming | None, bool, int, int] | None


_PROVEN: weakref.WeakKeyDictionary[FunctionalModel, dict[bool, _Known]] = weakref.WeakKeyDictionary()


def layerwise(
    model: FunctionalModel, function: PerExample, examples: Examples, params: Tensors | None = None, wide: bool = False
) -> Layerwise | None:
    """The way to the gradients of ``function``, proven in eval mode; None = small models that ``vmap`` takes in blocks,
    and those of which none is proven.

    Args:
        function: ``model.loss``, ``model.measure``, or another function of the model's outputs.
        params: where; None = θᶠ.
        wide: whether ``function`` is the measure; else the loss shows what cutting changes.
    """
    at = model.params if params is None else params
    keeps = params is None and function in (model.loss, model.measure)
    known = _PROVEN.setdefault(model, {})
    if not keeps or wide not in known or known[wide].examples() is not examples:
        small = Layout.of(model.params).size < LARGE and _stacks(function, at, examples, model)
        way = None if small else _prove(model, function, examples, at, wide)
        if not keeps:
            return way
        known[wide] = _Known(
            weakref.ref(examples), None if way is None else (way.recipe, way.cuts, way.alone, way.size, way.scalars)
        )
    found = known[wide].found
    return None if found is None else Layerwise(model, function, examples, at, *found)


def _stacks(function: PerExample, params: Tensors, examples: Examples, model: FunctionalModel) -> bool:
    """Whether ``vmap`` takes examples of different lengths together, as it must for rows to be had fast."""
    cuts = trimming(examples, model.padding)
    chosen = {0, len(examples) - 1} if cuts is None else {int(cuts.lengths.argmin()), int(cuts.lengths.argmax())}
    return gradients.stacks(function, params, examples.batch(sorted(chosen)))


def _prove(
    model: FunctionalModel, function: PerExample, examples: Examples, params: Tensors, wide: bool
) -> Layerwise | None:
    cuts = trimming(examples, model.padding)
    chosen = _chosen(examples, cuts)
    layout = Layout.of(params)
    # The first by functorch, as rows are taken, which refuses what plain autograd passes over (a reentrant checkpoint).
    first = layout.tensors(gradients.per_example(function, params, examples.batch(chosen[:1]), layout)[0])
    truths = [first, *(plain_gradients(function, params, examples.batch([i])) for i in chosen[1:])]
    if cuts is not None and not _same_values(model, examples, cuts, chosen, wide):
        cuts = None
    try:
        recipe = _with_leading(model, params, recipe_of(model), examples, chosen)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None
    ways = [Layerwise(model, function, examples, params, recipe, some) for some in dict.fromkeys((cuts, None))]
    for way in ways if not recipe.others else []:
        if _wrong(way, truths, chosen) == set():
            return _sized(way, chosen, batches=True)
    # One at a time, and what is not understood by autograd.
    for tried in ways:
        alone = replace(tried, recipe=recipe_of(model))
        bad = _wrong(alone, truths, chosen, alone=True)
        if bad:
            alone = replace(alone, recipe=alone.recipe.without(bad))
            bad = _wrong(alone, truths, chosen, alone=True)
        if bad == set() and alone.recipe.sites:
            return _sized(alone, chosen, batches=False)
    return None


def _chosen(examples: Examples, cuts: Trimming | None) -> list[int]:
    """The shortest, a middling and the longest of those that have padding; else the first, a middle and the last."""
    if cuts is not None:
        ascending = torch.argsort(cuts.lengths, stable=True)
        count = int((cuts.lengths < cuts.full).sum())
        chosen = [0, count // 2, count - 1]
        return list(dict.fromkeys(int(ascending[c]) for c in chosen))
    n = len(examples)
    return sorted({0, n // 2, n - 1})[:CHOSEN]


def _same_values(model: FunctionalModel, examples: Examples, cuts: Trimming, chosen: Sequence[int], wide: bool) -> bool:
    """Whether cut examples have the values of whole ones, in float64 where the model can be run in it."""
    value = model.measure if wide else model.loss
    params, fixed = (
        {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
        for tensors in (model.params, model.fixed)
    )
    for index in chosen[:2]:
        whole = to(examples.batch([index]), dtype=torch.float64)
        cut = cuts.cut(whole, int(cuts.lengths[index]))
        with torch.no_grad():
            try:
                pair = [value(params, batch, dict(fixed)).double() for batch in (whole, cut)]
                tolerance = 1e-9
            except RuntimeError:
                pair = [value(model.params, b).double() for b in (examples.batch([index]),)]
                pair += [value(model.params, cuts.cut(examples.batch([index]), int(cuts.lengths[index]))).double()]
                tolerance = 1e-6
        if not torch.allclose(pair[0], pair[1], rtol=tolerance, atol=tolerance):
            return False
    return True


def _with_leading(
    model: FunctionalModel, params: Tensors, recipe: Recipe, examples: Examples, chosen: Sequence[int]
) -> Recipe:
    """The recipe for batches: which modules see examples along their first dimension, and which see what all share."""
    some = [chosen[0]] * 3
    found = []
    for count in (2, 3):
        batch = examples.batch(some[:count])
        found.append(leading(recipe, lambda batch=batch: model.outputs(params, batch)))  # type: ignore[misc]
    spread, unknown = set(), set()
    for site in recipe.sites:
        seen = [of.get(id(site.module), set()) for of in found]
        if not seen[0] and not seen[1]:
            continue  # Never called, as far as can be seen: the proof says whether its parameters are used.
        if all(len(s) == 1 for s in seen):
            (dims, few), (_, more) = next(iter(seen[0])), next(iter(seen[1]))
            if few * 3 == more * 2:
                continue
            if isinstance(site.module, torch.nn.Embedding) and few == more and (dims == 1 or few == 1):
                spread.add(id(site.module))
                continue
        unknown |= {name for name in (site.weight, site.bias) if name is not None}
    return replace(recipe.without(unknown), spread=spread)


def _wrong(way: Layerwise, truths: Sequence[Tensors], chosen: Sequence[int], alone: bool = False) -> set[str] | None:
    """The parameters whose gradients are not the truth; None if the forward fails, or cannot be done in batches."""
    # One alone, cut to its own length, and the others together.
    blocks = [[place] for place in range(len(chosen))] if alone else [[0], list(range(1, len(chosen)))]
    bad: set[str] = set()
    dtype = way.model.dtype
    tolerance = 1e-4 if dtype is torch.float32 else 1e-8
    if torch.finfo(dtype).eps > 1e-6:
        tolerance = 5e-2
    for places in blocks:
        if not places:
            continue
        try:
            parts = way.differentiate([chosen[place] for place in places], trusting=True) or {}
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None
        for row, place in enumerate(places):
            length = float(torch.stack([t.norm() for t in truths[place].values()]).norm())
            for name, truth in truths[place].items():
                shape = seen_as(truth.shape)
                own = [part.first(row + 1).tile(0, shape[0])[row] for part in parts.get(name, [])]
                found = sum(own[1:], start=own[0]) if own else torch.zeros_like(truth).flatten()
                allowed = tolerance * max(float(truth.norm()), 1e-2 * length)
                if found.shape != truth.flatten().shape or not float((found - truth.flatten()).norm()) <= allowed:
                    bad.add(name)
    return bad


def _sized(way: Layerwise, chosen: Sequence[int], batches: bool) -> Layerwise:
    """With what an example of full length captures, and how many of them make a batch."""
    index = chosen[-1]
    scalars = sum(part.scalars for some in (way.differentiate([index], trusting=True) or {}).values() for part in some)
    if way.cuts is not None:
        scalars = scalars * way.cuts.full // int(way.cuts.lengths[index])
    size = max(1, min(256, scalars_at_once(way.model.device) // max(1, scalars))) if batches else 1
    return replace(way, alone=not batches, size=size, scalars=scalars)
