"""Low-rank adapters that a model's forward passes by: found by running it, and refused."""

from __future__ import annotations

import torch

from fimo.workers.errors import UsageError
from fimo.workers.examples import Batch
from fimo.workers.functional import FunctionalModel
from fimo.workers.trainable import BASE


def refuse_idle_adapters(model: FunctionalModel, batch: Batch) -> None:
    """Refuse adapters beside weights that a batch's losses depend on while they do not depend on the adapters.

    A forward may take a layer's weight and never call the layer, as torch's attention does. What is trained would then
    be less than what is asked for.

    Raises:
        UsageError: in one line.
    """
    adapters = {name: name.rpartition(".lora_")[0] for name in model.params if ".lora_" in name}
    if not adapters:
        return
    params = {name: p.detach().requires_grad_() for name, p in model.params.items()}
    fixed = {name: t.clone() for name, t in model.fixed.items()}
    weights = {layer: f"{layer}{BASE}weight" for layer in adapters.values()}
    for name in weights.values():
        if name in fixed:
            fixed[name].requires_grad_()
    known = {**fixed, **params}  # a tied weight may have another name
    wanted = {name: known[name] for name in (*adapters, *weights.values()) if name in known}
    try:
        with torch.enable_grad():
            total = model.loss(params, batch, fixed).sum()
        found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    except Exception:
        # Whatever the model objects to, it is told by who asks for its gradients.
        return
    used = {name for name, gradient in zip(wanted, found, strict=True) if gradient is not None}
    idle = sorted({layer for name, layer in adapters.items() if name not in used and weights[layer] in used})
    if idle:
        raise UsageError(
            f"further_training.lora.targets: the model takes a weight past '{idle[0]}' itself, as torch's attention "
            f"does, so that an adapter there does nothing: leave it out, or train the weight (trainable: "
            f"['{idle[0]}.weight'])"
        )
