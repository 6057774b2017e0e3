"""Watches a forward, and makes of its activations and their slopes the parts of per-example gradients.

Covers Linear, transformers' Conv1D, Conv2d (one group, zero padding), Embedding, LayerNorm, RMSNorm, and batch norm in
eval mode; whatever else a model is made of is seen by autograd alone (``Recipe.others``). That a parameter's gradient
is the sum of what is seen here is not taken on trust: ``fimo.estimators.operators.layerwise`` proves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fimo.estimators.operators.parts import Dense, Lookup, Outer, Part, Parts
from fimo.workers.functional import FunctionalModel


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a Linear with weight (in, out); told without importing transformers."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if type(module).__name__ != "Conv1D" or not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
        return False
    return weight.dim() == 2 and bias.shape == weight.shape[1:]


def _is_seen(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.scale_grad_by_freq
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.track_running_stats
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # Attention uses it past its forward.
    return is_conv1d(module) or isinstance(module, nn.Linear | nn.LayerNorm) or _is_rms_norm(module)


def _is_rms_norm(module: nn.Module) -> bool:
    """torch's, or transformers' under any model's name."""
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.dim() == 1


def _epsilon(module: nn.Module, x: Tensor) -> float:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(torch.finfo(x.dtype).eps if eps is None else eps)


@dataclass(frozen=True)
class Site:
    """A module that is watched, and the names under which its trainable parameters are known."""

    module: nn.Module
    weight: str | None
    bias: str | None

    def parts(self, x: Tensor, g: Tensor, count: int) -> Iterator[tuple[str, Part]]:
        """What a call with input ``x`` and slopes ``g`` at its output adds to which parameter of ``count`` examples."""
        module, weight, bias = self.module, self.weight, self.bias
        if isinstance(module, nn.Embedding):
            assert weight is not None
            yield weight, _lookup(module, x, g, count)
            return
        rows, slopes = (t.reshape(count, -1, t.shape[-1]) for t in self._rows(x, g))
        if weight is not None:
            if isinstance(module, nn.Linear | nn.Conv2d):
                yield weight, Outer(slopes, rows).kept()
            elif is_conv1d(module):
                yield weight, Outer(rows, slopes).kept()
            else:
                yield weight, Dense((rows * slopes).sum(dim=1)[:, :, None])
        if bias is not None:
            yield bias, Dense(slopes.sum(dim=1)[:, :, None])

    def _rows(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """What meets the weight at each position, and the slope at what comes of it: (…, in), (…, out)."""
        module = self.module
        if isinstance(module, nn.Conv2d):
            assert not isinstance(module.padding, str)
            unfolded = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
            return unfolded.transpose(1, 2), g.flatten(2).transpose(1, 2)
        if isinstance(module, nn.LayerNorm):
            width = len(module.normalized_shape)
            x, g = x.flatten(-width), g.flatten(-width)
            centred = x - x.mean(-1, keepdim=True)
            return centred * (centred.square().mean(-1, keepdim=True) + module.eps).rsqrt(), g
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            x, g = (t.reshape(*t.shape[:2], -1).transpose(1, 2) for t in (x, g))
            return (x - module.running_mean) * (module.running_var + module.eps).rsqrt(), g
        if _is_rms_norm(module):
            return x * (x.square().mean(-1, keepdim=True) + _epsilon(module, x)).rsqrt(), g
        return x, g


def _lookup(module: nn.Embedding, ids: Tensor, g: Tensor, count: int) -> Lookup:
    ids, slopes = ids.reshape(count, -1), g.reshape(count, -1, g.shape[-1])
    if module.padding_idx is not None:
        slopes = slopes.masked_fill((ids == module.padding_idx)[:, :, None], 0)
    return Lookup(ids, slopes)


@dataclass
class Call:
    """One call of a site: its input, and the output that a slope is to be taken at."""

    site: Site
    x: Tensor
    out: Tensor


@dataclass
class Recipe:
    """How a model is watched.

    Attributes:
        sites: the modules.
        others: trainable parameters that no site has, for autograd.
        spread: embeddings whose output all examples of a batch share (positions): it is made each example's own.
    """

    sites: list[Site]
    others: list[str]
    spread: set[int] = field(default_factory=set)

    @property
    def watched(self) -> list[str]:
        """The parameters that sites have."""
        names = [name for site in self.sites for name in (site.weight, site.bias) if name is not None]
        return list(dict.fromkeys(names))

    def without(self, names: set[str]) -> Recipe:
        """The same with some parameters left to autograd."""
        sites = []
        for site in self.sites:
            weight, bias = (None if name in names else name for name in (site.weight, site.bias))
            if weight is not None or bias is not None:
                sites.append(Site(site.module, weight, bias))
        return Recipe(sites, [*self.others, *sorted(names)], self.spread)

    def of(self, names: set[str]) -> Recipe:
        """What is watched of some parameters alone."""
        every = {name for site in self.sites for name in (site.weight, site.bias) if name is not None}
        return Recipe(self.without(every - names).sites, [], self.spread)


def recipe_of(model: FunctionalModel) -> Recipe:
    """What can be watched of a model; a parameter that several modules share has parts of all of them."""
    canonical = {id(parameter): name for name, parameter in model.module.named_parameters()}
    sites, seen = [], set()
    for module in model.module.modules():
        own = {kind: canonical.get(id(module._parameters.get(kind))) for kind in ("weight", "bias")}
        weight, bias = (name if name in model.params else None for name in (own["weight"], own["bias"]))
        if (weight is None and bias is None) or not _is_seen(module):
            continue
        sites.append(Site(module, weight, bias))
        seen |= {name for name in (weight, bias) if name is not None}
    return Recipe(sites, [name for name in model.params if name not in seen])


@contextmanager
def watching(recipe: Recipe, count: int) -> Iterator[list[Call]]:
    """Collect every call of a forward of ``count`` examples; the hooks are gone afterwards, whatever happens."""
    calls: list[Call] = []

    def watch(site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            # The input may be a view of what is written to later, which must not change what is kept of it.
            x = x.detach().clone()
            # Some batches may have their own after all, where a model asks its data.
            if id(module) in recipe.spread and not (x.dim() > 1 and len(x) == count):
                out = out.expand(count, *(out.shape if x.dim() == 1 else out.shape[1:]))
                x = x.reshape(1, -1).expand(count, -1)
            if not out.requires_grad:
                out = out.detach().requires_grad_()
            calls.append(Call(site, x, out))
            # What follows may work in place, which must not change the tensor that the slope is taken at.
            return out.clone()

        return hook

    handles = [site.module.register_forward_hook(watch(site), with_kwargs=True) for site in recipe.sites]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def leading(recipe: Recipe, forward: Callable[[], object]) -> dict[int, set[tuple[int, int]]]:
    """(dimensions, the first of them) of every site's inputs in a forward, by module."""
    found: dict[int, set[tuple[int, int]]] = {}
    with watching(Recipe(recipe.sites, []), 1) as calls, torch.enable_grad():
        forward()
        for call in calls:
            found.setdefault(id(call.site.module), set()).add((call.x.dim(), call.x.shape[0] if call.x.dim() else 0))
    return found


def parts_of(calls: list[Call], slopes: tuple[Tensor | None, ...], count: int) -> Parts:
    """The parts of ``count`` examples' gradients from the slopes at the calls' outputs."""
    parts: Parts = {}
    for call, slope in zip(calls, slopes, strict=True):
        if slope is None:
            continue
        for name, part in call.site.parts(call.x, slope, count):
            parts.setdefault(name, []).append(part)
    return {name: _merged(some) for name, some in parts.items()}


def _merged(parts: list[Part]) -> list[Part]:
    dense = [part.values for part in parts if isinstance(part, Dense)]
    others = [part for part in parts if not isinstance(part, Dense)]
    return [Dense(sum(dense[1:], start=dense[0])), *others] if len(dense) > 1 else parts
