"""The dropout masks of a step, drawn as the definition draws them and handed out for any part of its batch.

The definition runs one forward on the step's whole batch and, in reweight mode, one on the removed examples. What is
fast runs parts of them: some rows, cut to their longest example. Each part takes its rows and columns of the masks that
the definition would have drawn. For that it must be known which dimension of each mask runs over examples and which
over tokens: ``learn`` finds out by running the forward on batches of several shapes.

Covers forwards whose every random number is a dropout mask with one dimension of examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fimo.workers.draws import Draw, Draws, Order, drawn
from fimo.workers.examples import Batch
from fimo.workers.functional import FunctionalModel
from fimo.workers.randomness import kept, seed_all, states
from fimo.workers.settings import FurtherTraining
from fimo.workers.stacking.stacked import CannotStackError

Extent = int | Literal["rows", "tokens"]


@dataclass(frozen=True)
class Call:
    """One call of dropout: its mask's extents by dimension, the memory order that it is drawn in, and p."""

    extents: tuple[Extent, ...]
    order: Order
    p: float

    def shape(self, rows: int, tokens: int) -> tuple[int, ...]:
        """The mask's shape for a batch of ``rows`` examples of ``tokens`` tokens."""
        sizes = {"rows": rows, "tokens": tokens}
        return tuple(sizes[e] if isinstance(e, str) else e for e in self.extents)

    def draw(self, rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The next mask of the generator, bool."""
        shape = self.shape(rows, tokens)
        mask = drawn([shape[i] for i in self.order], self.p, dtype, device).bool()
        return mask.permute([self.order.index(i) for i in range(len(shape))])


Calls = tuple[Call, ...]


def learn(model: FunctionalModel, settings: FurtherTraining, shaped: Sequence[tuple[Batch, int, int]]) -> Calls | None:
    """The calls of dropout in a forward; None if they, or other draws, cannot be told from batches of several shapes.

    Args:
        shaped: (batch, examples, tokens): three, of which two differ in examples alone and two in tokens alone; or two,
            if there is nothing like tokens.
    """
    with kept(model.device), model.mode(settings.mode), torch.no_grad():
        records = [_record(model, batch) for batch, _, _ in shaped]
        sizes = [(rows, tokens) for _, rows, tokens in shaped]
        if len({len(record) for record in records}) > 1:
            return None
        calls = [_call(draws, sizes) for draws in zip(*records, strict=True)]
        known = tuple(call for call in calls if call is not None)
        if len(known) < len(calls) or not _accounts_for_all(model, known, shaped[0]):
            return None
    return known


def _record(model: FunctionalModel, batch: Batch) -> list[Draw]:
    seed_all(0, model.device)
    draws = Draws()
    with draws:
        model.loss(model.params, batch, {name: t.clone() for name, t in model.fixed.items()})
    return draws.draws


def _call(draws: Sequence[Draw], sizes: Sequence[tuple[int, int]]) -> Call | None:
    if len({(draw.order, draw.p, len(draw.shape)) for draw in draws}) > 1:
        return None
    extents: list[Extent] = []
    for seen in zip(*(draw.shape for draw in draws), strict=True):
        if len(set(seen)) == 1:
            extents.append(seen[0])
        elif list(seen) == [rows for rows, _ in sizes]:
            extents.append("rows")
        elif list(seen) == [tokens for _, tokens in sizes]:
            extents.append("tokens")
        else:
            return None
    return Call(tuple(extents), draws[0].order, draws[0].p) if extents.count("rows") == 1 else None


def _accounts_for_all(model: FunctionalModel, calls: Calls, shaped: tuple[Batch, int, int]) -> bool:
    """Whether drawing the masks alone leaves the generators as the forward leaves them."""
    batch, rows, tokens = shaped
    _record(model, batch)
    after = states(model.device)
    seed_all(0, model.device)
    for call in calls:
        call.draw(rows, tokens, model.dtype, model.device)
    return states(model.device) == after


class StepMasks:
    """The masks of one step.

    Args:
        seeds: of the forward on the batch, and of that on the removed examples.
        tokens: of an example that is not cut.
    """

    def __init__(self, model: FunctionalModel, calls: Calls, seeds: tuple[int, int], tokens: int) -> None:
        self._model, self._calls, self._seeds, self._tokens = model, calls, seeds, tokens
        self._drawn: dict[tuple[int, int], list[Tensor]] = {}

    def at(self, call: int, shape: Sequence[int], p: float, rows: Tensor, sizes: tuple[int, int]) -> Tensor:
        """The mask of a call for a part of the step.

        Args:
            shape: of what is masked.
            rows: (b,), the part's rows: places in the batch, and beyond its size places among the removed.
            sizes: examples in the batch, and removed ones.

        Raises:
            CannotStackError: the call is not the one that was learnt.
        """
        if call >= len(self._calls) or p != self._calls[call].p or len(shape) != len(self._calls[call].extents):
            raise CannotStackError("dropout is called otherwise than in the first forward")
        extents = self._calls[call].extents
        mask = self._whole(sizes)[call].index_select(
            extents.index("rows"), rows.to(self._model.device, non_blocking=True)
        )
        for dim, extent in enumerate(extents):
            if extent == "tokens":
                mask = mask.narrow(dim, 0, min(shape[dim], mask.shape[dim]))
        if mask.shape != tuple(shape):
            raise CannotStackError("dropout is called on another shape than in the first forward")
        return mask

    def _whole(self, sizes: tuple[int, int]) -> list[Tensor]:
        if sizes not in self._drawn:
            forwards = [self._forward(count, seed) for count, seed in zip(sizes, self._seeds, strict=True) if count]
            self._drawn[sizes] = [
                torch.cat(masks, call.extents.index("rows"))
                for call, *masks in zip(self._calls, *forwards, strict=True)
            ]
        return self._drawn[sizes]

    def _forward(self, count: int, seed: int) -> list[Tensor]:
        seed_all(seed, self._model.device)
        return [call.draw(count, self._tokens, self._model.dtype, self._model.device) for call in self._calls]
