"""What a part and a block of estimates say of how they were made; no part of the digest of their rows."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fimo.orchestrator.resolve.resolved import Resolved
from fimo.workers.device import device_name
from fimo.workers.stacking.products import multiplies


def provenance(device: torch.device, resolved: Resolved, flags: Mapping[str, object]) -> dict[str, Any]:
    """Software, device and settings; ``flags`` are those of ``fimo.workers.device.deterministic``."""
    return {
        "versions": versions(),
        "device": device_name(device),
        "host": platform.node(),
        "dtype": resolved.spec.further_training.precision,
        "threads": torch.get_num_threads(),
        "determinism": dict(flags),
        "removal_mode": resolved.spec.further_training.removal_mode,
        "removal_weight": resolved.spec.further_training.removal_weight,
        "replay": resolved.spec.resources.replay,
        "products": multiplies(device),
    }


def peak_host_bytes() -> int:
    """The process's largest resident size so far, in bytes."""
    import resource  # not on every platform

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@lru_cache
def versions() -> dict[str, str]:
    """The versions that a part records of the software that made it."""
    known = {"python": platform.python_version()}
    for package in ("fimo", "torch", "numpy", "pyarrow", "ray", "transformers", "peft"):
        with contextlib.suppress(PackageNotFoundError):
            known[package] = version(package)
    return known
