"""Which parameters further training changes: all, those that patterns name, or low-rank adapters.

Adapters are peft's (an optional extra). Their A is drawn from seed 0, the same for every sweep, and their B is 0: at θᶠ
the model computes what it computed without them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fimo.workers.errors import UsageError, nearest
from fimo.workers.settings import Lora, Trains

ADAPTER = "default"
"""peft's name of the one adapter."""

SOME = 8
"""Names in an error."""

BASE = ".base_layer."
"""peft's name of a layer that has an adapter."""


def restrict(model: nn.Module, trains: Trains) -> None:
    """Let the parameters that are trained, and no others, require a gradient; put adapters in. In place.

    Raises:
        UsageError: a pattern or a target that names nothing, or peft is not installed.
    """
    if trains.parameters == "all" and trains.lora is None:
        return
    chosen = _matched(model, () if trains.parameters == "all" else trains.parameters)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    if trains.lora is not None:
        _adapt(model, trains.lora)


def without_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict by the names that the model's own tensors have where there are no adapters."""
    return {name.replace(BASE, "."): tensor for name, tensor in state.items()}


def named(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the model without adapters, by the names that its tensors have with them."""
    own = model.state_dict(keep_vars=True)
    renamed = {name.replace(BASE, "."): name for name in own}
    return {name if name in own else renamed.get(name, name): tensor for name, tensor in state.items()}


def _matched(model: nn.Module, patterns: tuple[str, ...]) -> set[str]:
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    chosen: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise UsageError(f"further_training.trainable: no parameter is called '{pattern}'{_among(pattern, names)}")
        chosen.update(matched)
    return chosen


def _among(name: str, known: list[str]) -> str:
    """The nearest of the known names, or some of them: a large model has hundreds."""
    hint = nearest(name, known)
    return hint if "mean" in hint or len(known) <= SOME else f" (the model has {', '.join(known[:SOME])}, …)"


def _adapt(model: nn.Module, lora: Lora) -> None:
    try:
        import peft
    except ImportError as error:
        raise UsageError("further_training.lora needs peft: pip install 'fimo[lora]'") from error
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            last = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise UsageError(
                f"further_training.lora.targets: no linear layer is called '{target}'{_among(target, last)}"
            )
    kept = {name for name, p in model.named_parameters() if p.requires_grad}
    alpha: Any = lora.rank if lora.alpha is None else lora.alpha
    config: Any = peft.LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=list(lora.targets))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        peft.inject_adapter_in_model(config, model, ADAPTER)
    # peft freezes everything else, and names what it wraps anew.
    for name, parameter in model.named_parameters():
        if name.replace(BASE, ".") in kept:
            parameter.requires_grad_(True)
