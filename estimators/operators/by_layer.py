"""Gradients of single examples, of what hooks see of each layer: by a recipe that ``layerwise.py`` proves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimo.estimators.operators.capture import Recipe, parts_of, watching
from fimo.estimators.operators.gradients import Layout, PerExample, held
from fimo.estimators.operators.guards import each_its_own, look
from fimo.estimators.operators.parts import Dense, Gradients, Parts
from fimo.workers.examples import Batch, Examples
from fimo.workers.functional import FunctionalModel, Tensors
from fimo.workers.stacking.trimming import Trimming


@dataclass(frozen=True)
class Layerwise:
    """A proven way to the gradients of a function of a model's examples.

    Attributes:
        function: (parameters, batch of B) -> (B,).
        params: where the gradients are taken.
        recipe: what is watched, and which parameters are left to autograd, for which batches are of one.
        cuts: how examples are cut; None = they are not.
        alone: whether a batch is of one example.
        size: examples in a batch of the longest ones.
        scalars: captured of one such example.
    """

    model: FunctionalModel
    function: PerExample
    examples: Examples
    params: Tensors
    recipe: Recipe
    cuts: Trimming | None = None
    alone: bool = True
    size: int = 1
    scalars: int = 0

    def fits(self, count: int) -> bool:
        """Whether so many examples' gradients are held at once, of full length each."""
        return count * self.scalars <= held(self.model.device)

    def order(self, indices: Sequence[int]) -> list[int]:
        """The examples, those of like lengths together."""
        if self.cuts is None:
            return list(indices)
        lengths = self.cuts.lengths
        return sorted(indices, key=lambda i: (int(lengths[i]), i))

    def batch(self, indices: Sequence[int]) -> Batch:
        """Cut to the longest of the examples."""
        batch = self.examples.batch(indices)
        return batch if self.cuts is None else self.cuts.cut(batch, self.cuts.longest(torch.tensor(list(indices))))

    def batches(self, indices: Sequence[int]) -> Iterator[list[int]]:
        """The examples in batches, more of short ones."""
        ordered, block = self.order(indices), list[int]()
        for index in ordered:
            longest = 1 if self.cuts is None else int(self.cuts.lengths[index])
            full = 1 if self.cuts is None else self.cuts.full
            if block and (self.alone or (len(block) + 1) * longest > self.size * full):
                yield block
                block = []
            block.append(index)
        if block:
            yield block

    def gradients(self, indices: Sequence[int], most: int | None = None) -> Iterator[Gradients]:
        """The examples' gradients, as many at a time as ``most`` scalars (``held``) hold."""
        shapes = {name: seen_as(tensor.shape) for name, tensor in self.params.items()}
        kept = Gradients(shapes)
        scalars, limit = 0, held(self.model.device) if most is None else most
        for block in self.batches(indices):
            for indices_of, parts in self._taken(block):
                kept.add(indices_of, parts)
                scalars += sum(part.scalars for some in parts.values() for part in some)
                if scalars >= limit:
                    yield kept
                    kept, scalars = Gradients(shapes), 0
        if len(kept):
            yield kept

    def rows(self, indices: Sequence[int]) -> Tensor:
        """The examples' gradients as rows (len(indices), P), in their order."""
        layout, like = Layout.of(self.params), next(iter(self.params.values()))
        places = {index: place for place, index in enumerate(indices)}
        rows = like.new_zeros(len(indices), layout.size)
        for some in self.gradients(list(places)):
            at = torch.tensor([places[index] for index in some.indices], device=like.device)
            for name, where in layout.slices.items():
                rows[at, where] = some.dense(name, 0, some.shapes[name][0], None, like)
        return rows

    def differentiate(self, indices: Sequence[int], trusting: bool = False) -> Parts | None:
        """The parts of the gradients of one batch; None if it goes another way than what was proven.

        Args:
            trusting: not to ask that: for a proof, which has the truth.
        """
        batch, count = self.batch(indices), len(indices)
        params = {name: tensor.detach() for name, tensor in self.params.items()}
        leaves = {name: params[name].clone().requires_grad_() for name in self.recipe.others}
        # Autograd makes no gradient of those that it is not asked for, but its graph shows their uses.
        seen_leaves = {name: params[name].requires_grad_() for name in self.recipe.watched}
        try:
            with watching(self.recipe, count) as seen, torch.enable_grad():
                values = self.function({**params, **leaves}, batch)
                calls = list(seen)
                targets = [call.out for call in calls] + list(leaves.values())
                if not values.requires_grad:
                    return {}
                known, moved = (True, False) if trusting else look(values, calls, seen_leaves, self.recipe.spread)
                if not known:
                    return None
                slopes = torch.autograd.grad(values.sum(), targets, retain_graph=moved, allow_unused=True)
                if moved and not each_its_own(values, [call.out for call in calls], slopes[: len(calls)]):
                    return None
            parts = parts_of(calls, slopes[: len(calls)], count)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if trusting:
                raise
            return None  # Shapes that fit no batch of so many; a mistake of the workload's is raised without hooks.
        for (name, leaf), slope in zip(leaves.items(), slopes[len(calls) :], strict=True):
            if slope is not None:
                parts[name] = [Dense(slope.detach().to_dense().reshape(count, *seen_as(leaf.shape)))]
        return parts

    def _taken(self, block: list[int]) -> Iterator[tuple[list[int], Parts]]:
        """The block's examples together; those that go unproven ways alone, and at worst by autograd alone."""
        parts = self.differentiate(block)
        if parts is not None:
            yield block, parts
        elif len(block) > 1:
            for index in block:
                yield from self._taken([index])
        else:
            plain = plain_gradients(self.function, self.params, self.examples.batch(block))
            yield block, {name: [Dense(slope.reshape(1, *seen_as(slope.shape)))] for name, slope in plain.items()}


def seen_as(shape: torch.Size) -> tuple[int, int]:
    """(rows, columns) that a parameter tensor is seen as: its first dimension, and the others."""
    rows = shape[0] if shape else 1
    return rows, shape.numel() // max(1, rows)


def plain_gradients(function: PerExample, params: Tensors, batch: Batch) -> Tensors:
    """One example's gradient by autograd alone."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in params.items()}
    with torch.enable_grad():
        values = function(leaves, batch)
        if not values.requires_grad:
            return {name: torch.zeros_like(tensor) for name, tensor in params.items()}
        slopes = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if slope is None else slope.to_dense()
        for (name, tensor), slope in zip(params.items(), slopes, strict=True)
    }
