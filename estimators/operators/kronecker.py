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
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fimo.estimators.operators import gradients
from fimo.estimators.operators.eigenbasis import Block, DenseBlock, Eigenbasis, LayerBlock, share_covered
from fimo.estimators.operators.gradients import Layout
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
) -> Eigenbasis:
    """The factorisation with pseudo-gradients of the given kind; see ``PseudoGradients``."""
    return eigenbasis(model, examples, lambda batch: PseudoGradients(model, batch, fisher, samples, seed))


def eigenbasis(
    model: FunctionalModel,
    examples: Examples,
    draw: Callable[[Batch], PseudoGradients],
    corrected: bool = True,
) -> Eigenbasis:
    """Two passes over 𝒟, one for the eigenvectors and one for the eigenvalues.

    Args:
        draw: makes the source of vectors at the outputs, given a first batch.
        corrected: False keeps K-FAC's own eigenvalues, products of those of its factors.
    """
    layers, others = _layers(model)
    layers, others = _proven(model, examples, layers, others)
    size = gradients.block_size(max([layer.out for layer in layers], default=1) * 512)
    source = draw(examples.batch(range(min(8, len(examples)))))
    _factor(layers, _passes(model, examples, layers, source, size), len(examples))
    if corrected:
        source.restart()
        _correct(layers, _passes(model, examples, layers, source, size), len(examples))
    dense, left_out = _dense(model, examples, others)
    return Eigenbasis([*layers, *dense], left_out, source.fisher)


def _layers(model: FunctionalModel) -> tuple[list[LayerBlock], list[str]]:
    """The layers that Kronecker factors cover, and the names of all other trainable tensors."""
    slices = Layout.of(model.params).slices
    owners: dict[int, int] = {}
    for _, parameter in model.module.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layers, covered = [], set()
    for name, module in model.module.named_modules():
        weight, bias = (f"{name}.{part}" if name else part for part in ("weight", "bias"))
        transposed = _is_conv1d(module)
        plain = (
            transposed
            or isinstance(module, nn.Linear)
            or (
                isinstance(module, nn.Conv2d)
                and module.groups == 1
                and module.padding_mode == "zeros"
                and not isinstance(module.padding, str)
            )
        )
        # Attention uses its output projection past the module's forward.
        plain = plain and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        # A tied weight's gradient is a sum over its layers, which is no Kronecker product of either.
        if not plain or weight not in slices or owners[id(module.weight)] > 1:
            continue
        free = bias in slices and owners[id(module.bias)] == 1
        out = module.weight.shape[1 if transposed else 0]
        layers.append(LayerBlock(module, slices[weight], slices[bias] if free else None, out, transposed))
        covered |= {weight, bias} if free else {weight}
    return layers, [name for name in slices if name not in covered]


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a Linear with weight (in, out); told without importing transformers."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if type(module).__name__ != "Conv1D" or not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
        return False
    return weight.dim() == 2 and bias.shape == weight.shape[1:]


def _proven(
    model: FunctionalModel, examples: Examples, layers: list[LayerBlock], others: list[str]
) -> tuple[list[LayerBlock], list[str]]:
    """The layers whose weight's gradient is Σ_t g_t a_tᵀ over the calls that hooks see, and all other names.

    A weight that is also, or only, used past its module's forward (attention's output projection) is none of them.
    """
    batch, generator = examples.batch(range(min(8, len(examples)))), torch.Generator().manual_seed(0)
    params = {name: tensor.detach().requires_grad_() for name, tensor in model.params.items()}
    names = list(params)
    owner = {s.start: name for name, s in Layout.of(params).slices.items()}
    with _watched(layers) as watched, torch.enable_grad():
        outputs = model.outputs(params, batch)
        calls = list(watched)
        s = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
        targets = [params[name] for name in names] + [out for _, _, out in calls]
        slopes: tuple[Tensor | None, ...] = (None,) * len(targets)
        if outputs.requires_grad:
            slopes = torch.autograd.grad(outputs, targets, s, allow_unused=True)
    whole = dict(zip(names, slopes, strict=False))
    seen: dict[int, Tensor] = {}
    for (layer, a, _), g in zip(calls, slopes[len(names) :], strict=True):
        if g is not None:
            own = torch.einsum("bto,bti->oi", layer.outputs(g), a)
            own = own[:, :-1] if layer.bias is not None else own
            seen[id(layer)] = seen.get(id(layer), torch.zeros_like(own)) + own
    kept, names_kept = [], set(others)
    for layer in layers:
        name = owner[layer.weight.start]
        truth, sums = whole[name], seen.get(id(layer))
        if truth is not None:
            truth = (truth.T if layer.transposed else truth).reshape(layer.out, -1)
            if sums is None:
                sums = torch.zeros_like(truth)
            if not torch.allclose(sums, truth, rtol=1e-3, atol=1e-3 * float(truth.abs().max())):
                names_kept |= {name} if layer.bias is None else {name, owner[layer.bias.start]}
                continue
        kept.append(layer)
    return kept, [name for name in names if name in names_kept]


def coverage(model: FunctionalModel) -> float:
    """The share of trainable scalars that the approximation covers, told from the model alone."""
    _, others = _layers(model)
    return share_covered(model, [name for name in others if model.params[name].numel() > EXACT])


Seen = list[tuple[LayerBlock, Tensor, list[Tensor]]]
"""One batch: for each call of a layer its inputs (B, T, in), and gradients (B, T, out), one for each vector s."""


def _passes(
    model: FunctionalModel, examples: Examples, layers: list[LayerBlock], source: PseudoGradients, size: int
) -> Iterator[Seen]:
    for _, batch in examples.batches(size):
        with _watched(layers) as watched, torch.enable_grad():
            outputs = model.outputs(model.params, batch)
            # A checkpointed layer is called again by the backward pass.
            calls = list(watched)
            targets = [out for _, _, out in calls]
            of_calls: list[list[Tensor]] = [[] for _ in calls]
            for s in source(outputs.detach(), batch) if outputs.requires_grad else ():
                grads = torch.autograd.grad(outputs, targets, s, retain_graph=True, allow_unused=True)
                for (layer, _, out), g, into in zip(calls, grads, of_calls, strict=True):
                    into.append(layer.outputs(torch.zeros_like(out) if g is None else g))
        yield [(layer, a, gs) for (layer, a, _), gs in zip(calls, of_calls, strict=True)]


@contextmanager
def _watched(layers: list[LayerBlock]) -> Iterator[list[tuple[LayerBlock, Tensor, Tensor]]]:
    """Collect (layer, inputs, output) of every call; the hooks are gone afterwards, whatever happens."""
    calls: list[tuple[LayerBlock, Tensor, Tensor]] = []

    def watch(layer: LayerBlock) -> Callable[..., Any]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> Tensor:
            if not out.requires_grad:
                out.requires_grad_()
            calls.append((layer, layer.inputs(arguments[0].detach().clone()), out))
            # What follows may work in place, which must not change the tensor that the gradient is taken at.
            return out.clone()

        return hook

    handles = [layer.module.register_forward_hook(watch(layer)) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Factors:
    """Σ aaᵀ and Σ ggᵀ, float64, and how many positions the first is over."""

    inputs: Tensor | float = 0.0
    outputs: Tensor | float = 0.0
    positions: int = 0


def _factor(layers: list[LayerBlock], passes: Iterator[Seen], n: int) -> None:
    """Set each layer's eigenvectors, and K-FAC's eigenvalues, from its two factors."""
    factors = {id(layer): _Factors() for layer in layers}
    for seen in passes:
        for layer, a, gs in seen:
            own, flat = factors[id(layer)], a.double().flatten(0, 1)
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


def _identity(layer: LayerBlock) -> None:
    """A layer that the forward never calls, or that the outputs do not depend on: curvature 0."""
    weight = layer.weight_of()
    inputs = weight.numel() // layer.out + (layer.bias is not None)
    layer.left = torch.eye(layer.out, dtype=weight.dtype, device=weight.device)
    layer.right = torch.eye(inputs, dtype=weight.dtype, device=weight.device)
    layer.values = torch.zeros(layer.out * inputs, dtype=torch.float64, device=weight.device)


def _correct(layers: list[LayerBlock], passes: Iterator[Seen], n: int) -> None:
    """Replace the eigenvalues by the gradients' second moments in the eigenbasis, summed in float64."""
    for layer in layers:
        layer.values = torch.zeros_like(layer.values)
    for seen in passes:
        # A layer that is called several times has one gradient, the sum over its calls.
        calls: dict[int, list[tuple[LayerBlock, Tensor, list[Tensor]]]] = {}
        for call in seen:
            calls.setdefault(id(call[0]), []).append(call)
        for same in calls.values():
            layer = same[0][0]
            a = torch.cat([x @ layer.right for _, x, _ in same], dim=1)
            for gs in zip(*(g for _, _, g in same), strict=True):
                g = torch.cat([x @ layer.left for x in gs], dim=1)
                layer.values += _second_moment(g, a).flatten() / n


def _second_moment(g: Tensor, a: Tensor) -> Tensor:
    """Σ_b (Σ_t g_bt a_btᵀ)², float64 (out, in)."""
    if g.shape[1] == 1:
        return (g[:, 0].square().T @ a[:, 0].square()).double()
    return torch.einsum("bto,bti->boi", g, a).square().sum(dim=0, dtype=torch.float64)


def _dense(model: FunctionalModel, examples: Examples, names: list[str]) -> tuple[list[Block], list[str]]:
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
        values, vectors = torch.linalg.eigh(square / len(examples))
        blocks.append(DenseBlock(slices[name], values.clamp(min=0), vectors.to(model.dtype)))
    return blocks, [name for name in names if name not in small]
