"""What a result depends on, as digests: the keys of a sweep's parts hold these and nothing else.

Two sweeps with equal digests have equal deltas, whatever their numbers of seeds, removals, estimators or replicas;
a change of anything that moves a delta (data, θᶠ, the workload's code, the further-training section) gives another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fimo.orchestrator.spec.canonical import SCHEMA_VERSION, digest
from fimo.orchestrator.spec.training import FurtherTraining
from fimo.workers.errors import FimoError, WorkloadError, in_a_line
from fimo.workers.examples import Examples


def tensors_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hex) of tensors by name, dtype, shape and bytes."""
    sha = hashlib.sha256()
    for name, tensor in named:
        t = tensor.detach().to("cpu").contiguous()
        sha.update(f"{name}:{t.dtype}:{tuple(t.shape)};".encode())
        sha.update(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return sha.hexdigest()


def examples_digest(examples: Examples) -> str:
    """SHA-256 (hex) of examples as the workload hands them out, before any cast."""
    if examples.tensors is not None:
        return tensors_digest(sorted(examples.tensors.items()))
    sha = hashlib.sha256(f"{len(examples)};".encode())
    for index in range(len(examples)):
        sha.update(_one(examples, index))
    return sha.hexdigest()


def each_digest(examples: Examples) -> tuple[str, ...]:
    """A digest of every example by itself, 16 hex digits each, in order: equal wherever the example is."""
    return tuple(hashlib.sha256(_one(examples, index)).hexdigest()[:16] for index in range(len(examples)))


def _one(examples: Examples, index: int) -> bytes:
    # Collate one example at a time: in a larger batch its padding would depend on its neighbours.
    try:
        batch = examples.batch([index])
    except FimoError:
        raise
    except Exception as error:
        raise WorkloadError(
            f"example {index} of {len(examples)} cannot be had from the data set: {in_a_line(error)}"
        ) from error
    leaves, tree = pytree.tree_flatten(batch)
    told = [
        tensors_digest([(str(place), leaf)]) if isinstance(leaf, Tensor) else repr(leaf)
        for place, leaf in enumerate(leaves)
    ]
    return "".join([str(tree), *told]).encode()


_PLACES = ("_name_or_path", "transformers_version")
"""Keys of a configuration that say where it came from, not what it is."""


def architecture(model: nn.Module) -> str:
    """SHA-256 (hex) of what a model is beside its tensors and its code: its modules with their settings, as printed,
    and the configurations that transformers keeps.

    A dropout probability may come from a file that no tensor and no code shows.
    """
    printed = re.sub(r" at 0x[0-9a-f]+", "", repr(model))
    owners: list[Any] = [m for m in model.modules() if hasattr(getattr(m, "config", None), "to_dict")]
    kept = {id(owner.config): owner.config.to_dict() for owner in owners}
    configurations = [
        {key: str(value) for key, value in sorted(config.items()) if key not in _PLACES} for config in kept.values()
    ]
    return digest({"modules": printed, "configurations": configurations})


def result_digest(
    *,
    workload: str,
    workload_args: Mapping[str, Any],
    source: str,
    train: str,
    evals: str,
    architecture: str,
    final_model: str,
    further_training: Mapping[str, Any] | None,
) -> str:
    """The digest in the keys of parts (and, without ``further_training``, of the estimates that do not follow it)."""
    return digest(
        {
            "schema": SCHEMA_VERSION,
            "workload": workload,
            "workload_args": dict(workload_args),
            "source": source,
            "train": train,
            "evals": evals,
            "architecture": architecture,
            "final_model": final_model,
            "further_training": further_training,
        }
    )


AT_FINAL = ("precision", "trainable", "lora")
"""Keys of the further-training section that move what is estimated at θᶠ too."""

_NEWER: dict[str, Any] = {"trainable": "all", "lora": None, "removal_weight": 1.0}
"""Keys that older sweeps have not got, at their defaults: left out, so that those sweeps keep their parts."""


def training_identity(section: FurtherTraining) -> dict[str, Any]:
    """The further-training section as it counts for a result: every value, defaults written out."""
    values = section.model_dump(mode="json")
    return {key: value for key, value in values.items() if key not in _NEWER or value != _NEWER[key]}
