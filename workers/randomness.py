"""Everything random inside a step: one seed for torch, Python and numpy, a function of (seed, step).

All cells of a seed draw alike, so that a removal's effect is not drowned by other dropout masks. A generator of the
forward's own (``numpy.random.default_rng()``) cannot be seeded here; ``fimo.workers.forward`` refuses it.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

Part = Literal["batch", "removed"]
"""Which forward of a step: the batch's, or that of the removed examples in reweight mode."""


class _Here(threading.local):
    records = False


_here = _Here()


def step_seed(seed: int, step: int, part: Part) -> int:
    """The seed of everything random in one forward of step ``step`` ≥ 1; the same for every cell of a seed."""
    digest = hashlib.blake2b(f"{seed}/{step}/{part}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_all(value: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of ``device``, and Python's and numpy's global ones."""
    if _here.records:
        return
    # Not torch.manual_seed, which walks over every kind of device at every step.
    torch.default_generator.manual_seed(value)
    # A generator takes no seed while kernels are recorded: what draws is not recorded.
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        # Not torch.cuda.manual_seed, which seeds whichever GPU is the current one.
        number = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[number].manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)


def states(device: torch.device) -> object:
    """The states of all generators that ``seed_all`` seeds, comparable by ``==``."""
    numpy: Any = np.random.get_state()
    # Past whatever looks at kernels here: these are none of its.
    with _disable_current_modes():
        torchs = [torch.random.get_rng_state()]
        if device.type == "cuda":
            torchs.append(torch.cuda.get_rng_state(device))
        return [state.numpy().tobytes() for state in torchs], random.getstate(), numpy[1].tobytes(), numpy[2:]


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Leave torch's, Python's and numpy's global generators as they were before the body."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def unseeded() -> Iterator[None]:
    """Inside it ``seed_all`` does nothing, in this thread: for a body that is recorded, which must draw nothing."""
    _here.records = True
    try:
        yield
    finally:
        _here.records = False


@contextmanager
def undrawn(device: torch.device) -> Iterator[None]:
    """Refuse a body that draws from these generators, whatever it does with what it has drawn (RuntimeError).

    Inside ``unseeded`` nothing is looked at: there it is whoever records that refuses.
    """
    if _here.records:
        yield
        return

    before = states(device)
    yield
    if states(device) != before:
        raise RuntimeError("random numbers are drawn")
