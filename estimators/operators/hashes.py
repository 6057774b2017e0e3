"""Random numbers as hashes of what they are for (splitmix64): any of them is had without those before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15


def uniforms(seed: int, indices: Sequence[int], sample: int, count: int) -> Tensor:
    """Numbers in (0, 1), float64 (B, count), each a hash of (seed, example, sample, place).

    No example's depend on the batch that it is in, nor its first ones on how many there are: a cut sentence's tokens
    draw what the whole one's do.
    """
    key = torch.tensor(list(indices), dtype=torch.int64)[:, None] * _wrapped(GOLDEN)
    key = _mix(key + _wrapped(seed * 0xD1342543DE82EF95 + sample * GOLDEN + 1))
    bits = _mix(key + torch.arange(1, count + 1, dtype=torch.int64) * _wrapped(GOLDEN))
    return (_right(bits, 11).double() + 0.5) / 2**53


def signs(seed: int, start: int, stop: int) -> Tensor:
    """±1 for the places from ``start`` to ``stop``, int8."""
    places = torch.arange(start + 1, stop + 1, dtype=torch.int64)
    bits = _mix(places * _wrapped(GOLDEN) + _wrapped((seed + 1) * 0xD1342543DE82EF95))
    return (_right(bits, 63) * 2 - 1).to(torch.int8)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _right(x, 30)) * _wrapped(0xBF58476D1CE4E5B9)
    x = (x ^ _right(x, 27)) * _wrapped(0x94D049BB133111EB)
    return x ^ _right(x, 31)


def _right(x: Tensor, count: int) -> Tensor:
    """x shifted as an unsigned number."""
    shifted: Tensor = (x >> count) & (2 ** (64 - count) - 1)
    return shifted


def _wrapped(number: int) -> int:
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number
