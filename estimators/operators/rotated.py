"""f(G̃) between two sides' gradients, in the eigenbasis of a Kronecker-factored curvature, layer by layer.

Σ_t g_t a_tᵀ is turned by its positions: Q_Bᵀ(Σ_t g_t a_tᵀ)Q_A = Σ_t (Q_Bᵀg_t)(Q_Aᵀa_t)ᵀ costs T·(in² + out²), not
in·out·(in + out). A gradient that is scaled entry by entry is no such sum, and is turned whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fimo.estimators.operators.by_layer import Layerwise
from fimo.estimators.operators.eigenbasis import DenseBlock, Eigenbasis, LayerBlock
from fimo.estimators.operators.gradients import Layout
from fimo.estimators.operators.parts import Dense, Gradients, Outer, Part, tiles


def spectral_products(
    way: Layerwise,
    basis: Eigenbasis,
    pair: tuple[Gradients, Gradients],
    filters: Sequence[Sequence[Tensor]],
    outside: Sequence[float],
    scale: Tensor | None = None,
) -> Tensor:
    """Σ over coordinates of left · f(λ) · right, float64 (steps, b, k).

    Args:
        way: how the gradients were had.
        pair: (left, right).
        filters: for each block of ``basis`` and each step f on its eigenvalues.
        outside: for each step f on the parameters that no block covers.
        scale: what both sides' gradients are multiplied by, (P,).
    """
    like = next(iter(way.params.values()))
    total = torch.zeros(len(outside), *(len(some) for some in pair), dtype=torch.float64, device=like.device)
    names = {s.start: name for name, s in Layout.of(way.params).slices.items()}
    for block, of_steps in zip(basis.blocks, filters, strict=True):
        turned = [_turned(way, block, names, some, scale) for some in pair]
        for of, (left, right) in tiles("", *turned, like=like):
            for place, weights in enumerate(of_steps):
                total[place] += (left * of(weights).to(left)) @ right.T
    if any(outside):
        slices = Layout.of(way.params).slices
        for name in basis.left_out:
            for of, (left, right) in tiles(name, *pair, like=like):
                scaled = left if scale is None else left * of(scale[slices[name]]).to(left).square()
                product = (scaled @ right.T).double()
                for place, weight in enumerate(outside):
                    total[place] += weight * product
    return total


def _turned(way: Layerwise, block: object, names: dict[int, str], some: Gradients, scale: Tensor | None) -> Gradients:
    """One block's gradients in its eigenbasis, under the name ""."""
    assert isinstance(block, LayerBlock | DenseBlock)
    turned = Gradients({"": (len(block.values), 1) if isinstance(block, DenseBlock) else block.sides})
    at = 0
    for count, _ in some.chunks:
        one = Gradients(some.shapes, some.indices[at : at + count], [some.chunks[len(turned.chunks)]])
        at += count
        part = (
            _layer(way, block, names, one, scale) if isinstance(block, LayerBlock) else _small(block, names, one, scale)
        )
        turned.add(one.indices, {"": [part]} if part is not None else {})
    return turned


def _whole(some: Gradients, name: str, like: Tensor) -> Tensor:
    return some.dense(name, 0, some.shapes[name][0], None, like)


def _small(block: DenseBlock, names: dict[int, str], some: Gradients, scale: Tensor | None) -> Part:
    rows = _whole(some, names[block.where.start], block.vectors)
    if scale is not None:
        rows = rows * scale[block.where].to(rows)
    return Dense((rows @ block.vectors)[:, :, None])


def _layer(
    way: Layerwise, block: LayerBlock, names: dict[int, str], some: Gradients, scale: Tensor | None
) -> Part | None:
    weight = names[block.weight.start]
    bias = None if block.bias is None else names[block.bias.start]
    parts = some.chunks[0][1].get(weight, [])
    if not parts:
        return None
    autograd = set(way.recipe.others)
    if scale is None and len(parts) == 1 and isinstance(parts[0], Outer) and bias not in autograd:
        g, a = (parts[0].right, parts[0].left) if block.transposed else (parts[0].left, parts[0].right)
        if bias is not None:
            a = torch.cat([a, torch.ones_like(a[..., :1])], dim=2)
        return Outer(g @ block.left, a @ block.right).kept()
    matrix = _whole(some, weight, block.left)
    matrix = (
        matrix.reshape(len(some), -1, block.out).transpose(1, 2)
        if block.transposed
        else matrix.reshape(len(some), block.out, -1)
    )
    if bias is not None:
        matrix = torch.cat([matrix, _whole(some, bias, block.left)[:, :, None]], dim=2)
    if scale is not None:
        matrix = matrix * block.matrix(scale[None])[0].to(matrix)
    return Dense(block.left.T @ matrix @ block.right)
