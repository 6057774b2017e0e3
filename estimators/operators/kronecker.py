"""The eigenvalue-corrected Kronecker-factored approximation of the Gauss-Newton matrix, block by layer.

A layer's gradient is the matrix Σ_t g_t a_tᵀ (out × in, the bias as a further input of 1), t over the positions that
share the weight. K-FAC takes E[aaᵀ] ⊗ E[ggᵀ] for its block; EK-FAC keeps those eigenvectors Q_A, Q_B and takes for
eigenvalues the second moments of the gradient in that basis, Λ = E[(Q_Bᵀ (Σ_t g_t a_tᵀ) Q_A)²], which is the best
diagonal there. Sources: Martens and Grosse (2015); George et al. (2018); Grosse et al. (2023), section 3.

Covered: Linear, Conv2d (one group, zero padding) and transformers' Conv1D, if their weight is used by their own forward
alone, which one batch proves. Other trainable tensors of at most ``EXACT`` entries (LayerNorm)
get their exact dense block; the rest (embeddings, tied weights) are left out, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fimo.estimators.operators import gradients
from fimo.estimators.operators.eigenbasis import Block, DenseBlock, Eigenbasis, LayerBlock, share_covered
from fimo.estimators.operators.gradients import Layout
from fimo.estimators.operators.layers import layers_of, proven, watched
from fimo.estimators.operators.pseudo_gradients import PseudoGradients
from fimo.estimators.operators.spaces import linearised
from fimo.workers.examples import Batch, Examples
from fimo.workers.functional import FunctionalModel

EXACT = 1024
"""Entries up to which a tensor that no layer type covers gets a dense block."""


def factorised(
    model: FunctionalModel,
    examples: Examples,
    fisher: Literal["auto", "exact", "sampled"],
    samples: int,
    seed: int,
    scale: Tensor | None = None,
) -> Eigenbasis:
    """The factorisation with pseudo-gradients of the given kind; see ``PseudoGradients`` and ``eigenbasis``."""
    return eigenbasis(model, examples, lambda batch: PseudoGradients(model, batch, fisher, samples, seed), scale=scale)


def eigenbasis(
    model: FunctionalModel,
    examples: Examples,
    draw: Callable[[Batch], PseudoGradients],
    corrected: bool = True,
    scale: Tensor | None = None,
) -> Eigenbasis:
    """Two passes over 𝒟, one for the eigenvectors and one for the eigenvalues.

    Args:
        draw: makes the source of vectors at the outputs, given a first batch.
        corrected: False keeps K-FAC's own eigenvalues, products of those of its factors.
        scale: s (P,): factor sGs instead of G. A gradient scaled entry by entry is no outer product any more, so the
            eigenvectors are those of its two second moments E[MMᵀ] and E[MᵀM], M = s∘(Σ_t g_t a_tᵀ), as in Shampoo
            (Gupta et al. 2018); the eigenvalues are exact in that basis as ever.
    """
    layers, others = layers_of(model)
    layers, others = proven(model, examples, layers, others)
    size = gradients.block_size(max([layer.out for layer in layers], default=1) * 512)
    source = draw(examples.batch(range(min(8, len(examples)))))
    scales = {id(layer): layer.matrix(scale[None])[0] for layer in layers} if scale is not None else {}
    _factor(layers, _passes(model, examples, layers, source, size), len(examples), scales)
    if corrected or scales:
        source.restart()
        _correct(layers, _passes(model, examples, layers, source, size), len(examples), scales)
    dense, left_out = _dense(model, examples, others, scale)
    return Eigenbasis([*layers, *dense], left_out, source.fisher)


def coverage(model: FunctionalModel) -> float:
    """The share of trainable scalars that the approximation covers, told from the model alone."""
    _, others = layers_of(model)
    return share_covered(model, [name for name in others if model.params[name].numel() > EXACT])


Seen = list[tuple[LayerBlock, Tensor, list[Tensor]]]
"""One batch: for each call of a layer its inputs (B, T, in), and gradients (B, T, out), one for each vector s."""


def _passes(
    model: FunctionalModel, examples: Examples, layers: list[LayerBlock], source: PseudoGradients, size: int
) -> Iterator[Seen]:
    for _, batch in examples.batches(size):
        with watched(layers) as seen_calls, torch.enable_grad():
            outputs = model.outputs(model.params, batch)
            # A checkpointed layer is called again by the backward pass.
            calls = list(seen_calls)
            targets = [out for _, _, out in calls]
            of_calls: list[list[Tensor]] = [[] for _ in calls]
            for s in source(outputs.detach(), batch) if outputs.requires_grad else ():
                grads = torch.autograd.grad(outputs, targets, s, retain_graph=True, allow_unused=True)
                for (layer, _, out), g, into in zip(calls, grads, of_calls, strict=True):
                    into.append(layer.outputs(torch.zeros_like(out) if g is None else g))
        yield [(layer, a, gs) for (layer, a, _), gs in zip(calls, of_calls, strict=True)]


@dataclass
class _Factors:
    """Σ aaᵀ and Σ ggᵀ, float64, and how many positions the first is over."""

    inputs: Tensor | float = 0.0
    outputs: Tensor | float = 0.0
    positions: int = 0


Scales: TypeAlias = dict[int, Tensor]
"""What each layer's gradients are multiplied by, (out, in [+ 1]), by the layer's id; empty = nothing."""


def _factor(layers: list[LayerBlock], passes: Iterator[Seen], n: int, scales: Scales) -> None:
    """Set each layer's eigenvectors, and K-FAC's eigenvalues, from its two factors."""
    factors = {id(layer): _Factors() for layer in layers}
    for seen in passes:
        for layer, of_calls in _by_layer(seen):
            own, scale = factors[id(layer)], scales.get(id(layer))
            if scale is not None:
                for g, a in _gradients_of(of_calls):
                    for matrix in _matrices(g, a, scale):
                        own.inputs = own.inputs + torch.einsum("boi,boj->ij", matrix, matrix)
                        own.outputs = own.outputs + torch.einsum("boi,bpi->op", matrix, matrix)
                own.positions = n
                continue
            for a, gs in of_calls:
                flat = a.double().flatten(0, 1)
                own.inputs = own.inputs + flat.T @ flat
                own.positions += len(flat)
                for g in gs:
                    flat = g.double().flatten(0, 1)
                    own.outputs = own.outputs + flat.T @ flat
    for layer in layers:
        own, dtype = factors[id(layer)], layer.weight_of().dtype
        if not isinstance(own.inputs, Tensor) or not isinstance(own.outputs, Tensor):
            _identity(layer)
            continue
        right, layer.right = torch.linalg.eigh(own.inputs / own.positions)
        left, layer.left = torch.linalg.eigh(own.outputs / n)
        layer.values = torch.outer(left.clamp(min=0), right.clamp(min=0)).flatten()
        layer.left, layer.right = layer.left.to(dtype), layer.right.to(dtype)


Calls = list[tuple[Tensor, list[Tensor]]]
"""A layer's calls in one batch: inputs (B, T, in), and gradients (B, T, out), one for each vector s."""


def _by_layer(seen: Seen) -> Iterator[tuple[LayerBlock, Calls]]:
    """A layer that is called several times has one gradient, the sum over its calls."""
    calls: dict[int, tuple[LayerBlock, Calls]] = {}
    for layer, a, gs in seen:
        calls.setdefault(id(layer), (layer, []))[1].append((a, gs))
    return iter(calls.values())


def _gradients_of(calls: Calls) -> Iterator[tuple[Tensor, Tensor]]:
    """For each vector s the positions of all calls: gradients (B, ΣT, out) and inputs (B, ΣT, in)."""
    a = torch.cat([inputs for inputs, _ in calls], dim=1)
    for gs in zip(*(gs for _, gs in calls), strict=True):
        yield torch.cat(gs, dim=1), a


def _matrices(g: Tensor, a: Tensor, scale: Tensor) -> Iterator[Tensor]:
    """s∘(Σ_t g_bt a_btᵀ) in blocks, float64 (b, out, in)."""
    together = max(1, gradients.STREAM // scale.numel())
    for some_g, some_a in zip(g.split(together), a.split(together), strict=True):
        yield torch.einsum("bto,bti->boi", some_g.double(), some_a.double()) * scale


def _identity(layer: LayerBlock) -> None:
    """A layer that the forward never calls, or that the outputs do not depend on: curvature 0."""
    weight = layer.weight_of()
    inputs = weight.numel() // layer.out + (layer.bias is not None)
    layer.left = torch.eye(layer.out, dtype=weight.dtype, device=weight.device)
    layer.right = torch.eye(inputs, dtype=weight.dtype, device=weight.device)
    layer.values = torch.zeros(layer.out * inputs, dtype=torch.float64, device=weight.device)


def _correct(layers: list[LayerBlock], passes: Iterator[Seen], n: int, scales: Scales) -> None:
    """Replace the eigenvalues by the gradients' second moments in the eigenbasis, summed in float64."""
    for layer in layers:
        layer.values = torch.zeros_like(layer.values)
    for seen in passes:
        for layer, of_calls in _by_layer(seen):
            scale = scales.get(id(layer))
            if scale is not None:
                left, right = layer.left.double(), layer.right.double()
                for g, a in _gradients_of(of_calls):
                    for matrix in _matrices(g, a, scale):
                        layer.values += (left.T @ matrix @ right).square().sum(dim=0).flatten() / n
                continue
            turned = [(a @ layer.right, [g @ layer.left for g in gs]) for a, gs in of_calls]
            for g, a in _gradients_of(turned):
                layer.values += _second_moment(g, a).flatten() / n


def _second_moment(g: Tensor, a: Tensor) -> Tensor:
    """Σ_b (Σ_t g_bt a_btᵀ)², float64 (out, in)."""
    if g.shape[1] == 1:
        return (g[:, 0].square().T @ a[:, 0].square()).double()
    return torch.einsum("bto,bti->boi", g, a).square().sum(dim=0, dtype=torch.float64)


def _dense(
    model: FunctionalModel, examples: Examples, names: list[str], scale: Tensor | None
) -> tuple[list[Block], list[str]]:
    """Exact blocks of the small tensors among ``names``, and the names of the others."""
    slices = Layout.of(model.params).slices
    small = {name: model.params[name] for name in names if model.params[name].numel() <= EXACT}
    squares = {name: torch.zeros((), dtype=torch.float64, device=model.device) for name in small}
    layout = Layout.of(small)
    if small:
        for _, batch in examples.batches(gradients.block_size(layout.size)):
            jacobian, weights = linearised(model, batch, small)
            for name, where in layout.slices.items():
                j = jacobian[:, where].double().reshape(*weights.shape[:2], -1)
                squares[name] = squares[name] + torch.einsum("boi,bop,bpj->ij", j, weights.double(), j)
    blocks: list[Block] = []
    for name, square in squares.items():
        own = torch.ones(len(square)).to(square) if scale is None else scale[slices[name]]
        values, vectors = torch.linalg.eigh(square * torch.outer(own, own) / len(examples))
        blocks.append(DenseBlock(slices[name], values.clamp(min=0), vectors.to(model.dtype)))
    return blocks, [name for name in names if name not in small]
