"""The layers that Kronecker factors cover: found, proven by one batch, and watched while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fimo.estimators.operators.capture import is_conv1d
from fimo.estimators.operators.eigenbasis import LayerBlock
from fimo.estimators.operators.gradients import Layout
from fimo.workers.examples import Batch
from fimo.workers.functional import FunctionalModel


def layers_of(model: FunctionalModel) -> tuple[list[LayerBlock], list[str]]:
    """The layers that Kronecker factors cover, and the names of all other trainable tensors."""
    slices = Layout.of(model.params).slices
    owners: dict[int, int] = {}
    for _, parameter in model.module.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layers, covered = [], set()
    for name, module in model.module.named_modules():
        weight, bias = (f"{name}.{part}" if name else part for part in ("weight", "bias"))
        transposed = is_conv1d(module)
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


def proven(
    model: FunctionalModel, batch: Batch, layers: list[LayerBlock], others: list[str]
) -> tuple[list[LayerBlock], list[str], bool]:
    """The layers whose weight's gradient is Σ_t g_t a_tᵀ over the calls that hooks see, and all other names.

    A weight that is also, or only, used past its module's forward (attention's output projection) is none of them.

    Args:
        batch: at least two examples, if there are as many.

    Returns:
        The layers, the other names, and whether examples run along the first dimension of every layer's input. If not
        (time does, or what all examples share), they can only be told apart one at a time.
    """
    generator = torch.Generator().manual_seed(0)
    params = {name: tensor.detach().requires_grad_() for name, tensor in model.params.items()}
    names = list(params)
    owner = {s.start: name for name, s in Layout.of(params).slices.items()}
    with watched(layers) as seen_calls, torch.enable_grad():
        outputs = model.outputs(params, batch)
        calls = list(seen_calls)
        apart = all(len(a) == len(outputs) for _, a, _ in calls)
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
    return kept, [name for name in names if name in names_kept], apart


@contextmanager
def watched(layers: list[LayerBlock]) -> Iterator[list[tuple[LayerBlock, Tensor, Tensor]]]:
    """Collect (layer, inputs, output) of every call; the hooks are gone afterwards, whatever happens."""
    calls: list[tuple[LayerBlock, Tensor, Tensor]] = []

    def watch(layer: LayerBlock) -> Callable[..., Any]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor], out: Tensor) -> Tensor:
            if not out.requires_grad:
                out.requires_grad_()
            x = arguments[0] if arguments else next(iter(named.values()))
            calls.append((layer, layer.inputs(x.detach().clone()), out))
            # What follows may work in place, which must not change the tensor that the gradient is taken at.
            return out.clone()

        return hook

    handles = [layer.module.register_forward_hook(watch(layer), with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
