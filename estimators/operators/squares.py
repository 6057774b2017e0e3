"""Dense blocks of the Gauss-Newton matrix, of tensors that are too small or too odd for Kronecker factors."""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.estimators.operators import gradients
from fimo.estimators.operators.by_layer import seen_as
from fimo.estimators.operators.eigenbasis import Block, DenseBlock
from fimo.estimators.operators.gradients import Layout
from fimo.estimators.operators.parts import Parts
from fimo.estimators.operators.pseudo_gradients import PseudoGradients
from fimo.estimators.operators.spaces import linearised, outputs_of
from fimo.workers.examples import Batch, Examples
from fimo.workers.functional import FunctionalModel, Tensors


class Squares:
    """E[rrᵀ] of small tensors' gradients r, float64, which are their exact blocks of G.

    Args:
        small: the tensors by name.
    """

    def __init__(self, small: Tensors) -> None:
        self.of = {
            name: torch.zeros(t.numel(), t.numel(), dtype=torch.float64, device=t.device) for name, t in small.items()
        }
        self._shapes = {name: t.shape for name, t in small.items()}

    def add(self, parts: Parts) -> None:
        """The gradients of some examples for one vector s."""
        for name, some in parts.items():
            if name in self.of:
                tiles = [part.tile(0, seen_as(self._shapes[name])[0]) for part in some]
                rows = sum(tiles[1:], start=tiles[0])
                # A batch's sum in the model's dtype, the batches' in float64.
                self.of[name] += rows.T @ rows

    def blocks(self, model: FunctionalModel, n: int, scale: Tensor | None) -> list[Block]:
        """The blocks, scaled on both sides."""
        slices, blocks = Layout.of(model.params).slices, list[Block]()
        for name, square in self.of.items():
            own = torch.ones(len(square)).to(square) if scale is None else scale[slices[name]]
            values, vectors = torch.linalg.eigh(square * torch.outer(own, own) / n)
            blocks.append(DenseBlock(slices[name], values.clamp(min=0), vectors.to(model.dtype)))
        return blocks


def add_by_themselves(
    model: FunctionalModel, examples: Examples, source: PseudoGradients, squares: Squares, names: list[str]
) -> None:
    """Add the blocks of tensors that no hook sees: one more pass."""
    small = {name: model.params[name] for name in names}
    if not small:
        return
    layout, outputs = Layout.of(small), outputs_of(model, examples)
    squares_of = Squares(small).of
    if source.fisher == "exact":
        for _, batch in examples.batches(min(source.block, gradients.block_size(layout.size * outputs, model.device))):
            jacobian, weights = linearised(model, batch, small)
            for name, where in layout.slices.items():
                j = jacobian[:, where].double().reshape(*weights.shape[:2], -1)
                squares_of[name] += torch.einsum("boi,bop,bpj->ij", j, weights.double(), j)
    else:

        def along(params: Tensors, both: Batch) -> Tensor:
            out = model.outputs({**model.params, **params}, both["batch"])
            value: Tensor = (out * both["s"]).flatten(1).sum(dim=1)
            return value

        for indices, batch in examples.batches(min(source.block, gradients.block_size(layout.size, model.device))):
            with torch.no_grad():
                out = model.outputs(model.params, batch)
            for s in source(out, batch, indices):
                rows = gradients.per_example(along, small, {"batch": batch, "s": s}, layout).double()
                for name, where in layout.slices.items():
                    squares_of[name] += rows[:, where].T @ rows[:, where]
    squares.of.update(squares_of)
