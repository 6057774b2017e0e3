"""The eigenvalue-corrected Kronecker-factored approximation of the Gauss-Newton matrix, block by layer.

A layer's gradient is the matrix Σ_t g_t a_tᵀ (out × in, the bias as a further input of 1), t over the positions that
share the weight. K-FAC takes E[aaᵀ] ⊗ E[ggᵀ] for its block; EK-FAC keeps those eigenvectors Q_A, Q_B and takes for
eigenvalues the second moments of the gradient in that basis, Λ = E[(Q_Bᵀ (Σ_t g_t a_tᵀ) Q_A)²], which is the best
diagonal there. E[aaᵀ] is over the positions that have a gradient at all: padding has none. Sources: Martens and
Grosse (2015); George et al. (2018); Grosse et al. (2023), section 3.

Covered: Linear, Conv2d (one group, zero padding) and transformers' Conv1D, if their weight is used by their own forward
alone, which one batch proves. Other trainable tensors of at most ``EXACT`` entries (LayerNorm) get their dense block,
of the same vectors at the outputs as the layers' factors (``squares``). The rest (embeddings, tied weights) are left
out, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fimo.estimators.operators import gradients
from fimo.estimators.operators.by_layer import Layerwise
from fimo.estimators.operators.capture import Recipe, parts_of, watching
from fimo.estimators.operators.eigenbasis import Eigenbasis, LayerBlock, share_covered
from fimo.estimators.operators.guards import apart
from fimo.estimators.operators.layers import layers_of, proven, watched
from fimo.estimators.operators.layerwise import layerwise
from fimo.estimators.operators.moments import Moment, SquareSum
from fimo.estimators.operators.pseudo_gradients import PseudoGradients
from fimo.estimators.operators.squares import Squares, add_by_themselves
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
    way = layerwise(model, model.loss, examples)
    # Of a large model few examples, the shortest: its weights alone show what is asked here.
    few = (
        examples.batch(range(min(8, len(examples)))) if way is None else way.batch(way.order(range(len(examples)))[:2])
    )
    layers, others, together = proven(model, few, layers, others)
    # With all of its padding, for how many outputs there are decides what is drawn.
    source = draw(examples.batch(range(min(8 if way is None else 2, len(examples)))))
    size = min(source.block, gradients.block_size(max([layer.out for layer in layers], default=1) * 512, model.device))
    size = size if together else 1
    small = [name for name in others if model.params[name].numel() <= EXACT]
    seen = [] if way is None else [name for name in small if name not in way.recipe.others]
    squares = Squares({name: model.params[name] for name in seen})
    scales = {id(layer): layer.matrix(scale[None])[0] for layer in layers} if scale is not None else {}
    batches = list(_batches(examples, way, size))
    kept: list[Seen] = []
    first = _keeping(_passes(model, examples, layers, source, batches, way, squares), kept)
    _factor(layers, _sums(layers, first, scales), len(examples), scales)
    if corrected or scales:
        again = _passes(model, examples, layers, source, batches[len(kept) :], way, None)
        _correct(layers, chain(kept, again), len(examples), scales)
    add_by_themselves(model, examples, source, squares, [name for name in small if name not in seen])
    dense = squares.blocks(model, len(examples), scale)
    return Eigenbasis([*layers, *dense], [n for n in others if n not in squares.of], source.fisher, source.drawn)


def sum_factors(model: FunctionalModel, examples: Examples, indices: Sequence[int]) -> None:
    """Both passes over some examples with one vector each, without a decomposition: for their cost alone."""
    layers, _ = layers_of(model)
    way = layerwise(model, model.loss, examples)
    source = PseudoGradients(model, examples.batch(list(indices)[:2]), "sampled", 1, 0)
    size = min(source.block, gradients.BLOCK)
    chosen = [list(indices)] if way is None else list(way.batches(indices))
    batches = [block[start : start + size] for block in chosen for start in range(0, len(block), size)]
    kept: list[Seen] = []
    _sums(layers, _keeping(_passes(model, examples, layers, source, batches, way, None), kept), {})
    for layer in layers:
        _identity(layer)
    _correct(layers, iter(kept), len(indices), {})


def coverage(model: FunctionalModel) -> float:
    """The share of trainable scalars that the approximation covers, told from the model alone."""
    _, others = layers_of(model)
    return share_covered(model, [name for name in others if model.params[name].numel() > EXACT])


Seen = list[tuple[LayerBlock, Tensor, list[Tensor]]]
"""One batch: for each call of a layer its inputs (B, T, in), and gradients (B, T, out), one for each vector s."""


def _passes(
    model: FunctionalModel,
    examples: Examples,
    layers: list[LayerBlock],
    source: PseudoGradients,
    batches: list[list[int]],
    way: Layerwise | None,
    squares: Squares | None,
) -> Iterator[Seen]:
    """Batches; the products of small tensors' gradients are added to ``squares`` on the way, if it is given."""
    recipe = Recipe([], []) if way is None or squares is None else way.recipe.of(set(squares.of))
    for indices in batches:
        batch = examples.batch(indices) if way is None else way.batch(indices)
        with watched(layers) as seen_calls, watching(recipe, len(indices)) as seen_small, torch.enable_grad():
            outputs = model.outputs(model.params, batch)
            # A checkpointed layer is called again by the backward pass.
            calls, small = list(seen_calls), list(seen_small)
            if len(indices) > 1 and not apart(outputs, [out for _, _, out in calls]):
                yield from _passes(model, examples, layers, source, [[i] for i in indices], way, squares)
                continue
            targets = [out for _, _, out in calls] + [call.out for call in small]
            of_calls: list[list[Tensor]] = [[] for _ in calls]
            for s in source(outputs.detach(), batch, indices) if outputs.requires_grad else ():
                grads = torch.autograd.grad(outputs, targets, s, retain_graph=True, allow_unused=True)
                for (layer, _, out), g, into in zip(calls, grads, of_calls, strict=False):
                    slopes = layer.outputs(torch.zeros_like(out) if g is None else g)
                    into.append(slopes.reshape(1, -1, slopes.shape[-1]) if len(indices) == 1 else slopes)
                if squares is not None and small:
                    squares.add(parts_of(small, grads[len(calls) :], len(indices)))
        inputs = [a.reshape(1, -1, a.shape[-1]) if len(indices) == 1 else a for _, a, _ in calls]
        yield [(layer, a, gs) for (layer, _, _), a, gs in zip(calls, inputs, of_calls, strict=True)]


def _batches(examples: Examples, way: Layerwise | None, size: int) -> Iterator[list[int]]:
    every = range(len(examples))
    for indices in [list(every)] if way is None else way.batches(every):
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _keeping(passes: Iterator[Seen], kept: list[Seen]) -> Iterator[Seen]:
    """The batches, the first ones of which are kept for the second pass."""
    scalars = 0
    for seen in passes:
        scalars += sum(a.numel() + sum(g.numel() for g in gs) for _, a, gs in seen)
        if seen and scalars < gradients.held(seen[0][1].device):
            kept.append(seen)
        yield seen


@dataclass
class _Factors:
    """The two second moments of a layer."""

    inputs: Moment = field(default_factory=Moment)
    outputs: Moment = field(default_factory=Moment)


Scales: TypeAlias = dict[int, Tensor]
"""What each layer's gradients are multiplied by, (out, in [+ 1]), by the layer's id; empty = nothing."""


def _sums(layers: list[LayerBlock], passes: Iterator[Seen], scales: Scales) -> dict[int, _Factors]:
    """The two second moments of every layer, by its id."""
    factors = {id(layer): _Factors() for layer in layers}
    for seen in passes:
        for layer, of_calls in _by_layer(seen):
            own, scale = factors[id(layer)], scales.get(id(layer))
            if scale is not None:
                for g, a in _gradients_of(of_calls):
                    for matrix in _matrices(g, a, scale):
                        own.inputs.add(matrix.flatten(0, 1))
                        own.outputs.add(matrix.transpose(1, 2).flatten(0, 1))
                continue
            for a, gs in of_calls:
                own.inputs.add(_with_gradient(a, gs))
                for g in gs:
                    own.outputs.add(g.flatten(0, 1))
    return factors


def _factor(layers: list[LayerBlock], factors: dict[int, _Factors], n: int, scales: Scales) -> None:
    """Set each layer's eigenvectors, and K-FAC's eigenvalues, from its two factors."""
    for layer in layers:
        own, dtype = factors[id(layer)], layer.weight_of().dtype
        # Of whole examples if they are scaled, of positions if not.
        inputs = own.inputs.mean(n if id(layer) in scales else max(1, own.inputs.positions))
        outputs = own.outputs.mean(n)
        if inputs is None or outputs is None:
            _identity(layer)
            continue
        right, layer.right = torch.linalg.eigh(inputs)
        left, layer.left = torch.linalg.eigh(outputs)
        layer.values = torch.outer(left.clamp(min=0), right.clamp(min=0)).flatten()
        layer.left, layer.right = layer.left.to(dtype), layer.right.to(dtype)


def _with_gradient(a: Tensor, gs: list[Tensor]) -> Tensor:
    """The inputs (positions, in) of those positions at which any vector has a gradient; all, if there is but one."""
    if a.shape[1] == 1 or not gs:
        return a.flatten(0, 1)
    some = torch.stack([(g != 0).any(dim=2) for g in gs]).any(dim=0)
    return a[some]


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
    """s∘(Σ_t g_bt a_btᵀ) in blocks, (b, out, in) in the model's dtype."""
    together, scale = max(1, gradients.stream(g.device) // scale.numel()), scale.to(g.dtype)
    for some_g, some_a in zip(g.split(together), a.split(together), strict=True):
        yield torch.einsum("bto,bti->boi", some_g, some_a) * scale


def _identity(layer: LayerBlock) -> None:
    """A layer that the forward never calls, or that the outputs do not depend on: curvature 0."""
    weight = layer.weight_of()
    inputs = weight.numel() // layer.out + (layer.bias is not None)
    layer.left = torch.eye(layer.out, dtype=weight.dtype, device=weight.device)
    layer.right = torch.eye(inputs, dtype=weight.dtype, device=weight.device)
    layer.values = torch.zeros(layer.out * inputs, dtype=torch.float64, device=weight.device)


def _correct(layers: list[LayerBlock], passes: Iterator[Seen], n: int, scales: Scales) -> None:
    """Replace the eigenvalues by the gradients' second moments in the eigenbasis, summed in float64."""
    sums = {}
    for layer in layers:
        layer.values = torch.zeros_like(layer.values)
        sums[id(layer)] = SquareSum(layer.values.view(len(layer.left), len(layer.right)))
    for seen in passes:
        for layer, of_calls in _by_layer(seen):
            scale, squares = scales.get(id(layer)), sums[id(layer)]
            if scale is not None:
                for g, a in _gradients_of(of_calls):
                    for matrix in _matrices(g, a, scale):
                        turned = layer.left.T @ matrix @ layer.right
                        squares.add_sum(turned.square_().sum(dim=0), len(turned))
                continue
            of_turned = [(a @ layer.right, [g @ layer.left for g in gs]) for a, gs in of_calls]
            for g, a in _gradients_of(of_turned):
                squares.add(g, a)
    for layer in layers:
        sums[id(layer)].flush()
        layer.values /= n
