"""Random crops and flips that belong to (seed, step, example), whatever batch the example is in.

All cells of a seed draw alike in a step (``fimo.workers.randomness``), but by *place* in the batch: if an index is
dropped, later examples slide, and each would get another's crop. So one number is drawn a step, and hashed with the
example's own index. A cell then differs from its baseline by the example that it lacks, and by nothing else.

Made of integer arithmetic and ``gather`` alone: exact, the same on every device, and fit for ``vmap``.
"""

from __future__ import annotations

import torch
from torch import Tensor

PADDING = 4
"""Pixels of black around an image that is cropped."""

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def scramble(numbers: Tensor) -> Tensor:
    """splitmix64's finaliser of int64 numbers, which wrap around (Steele, Lea and Flood 2014)."""
    z = (numbers ^ _shift(numbers, 30)) * _FIRST
    z = (z ^ _shift(z, 27)) * _SECOND
    mixed: Tensor = z ^ _shift(z, 31)
    return mixed


def _shift(numbers: Tensor, by: int) -> Tensor:
    # int64's own shift carries the sign in.
    shifted: Tensor = (numbers >> by) & (2 ** (64 - by) - 1)
    return shifted


def draws(key: Tensor, index: Tensor, count: int) -> list[Tensor]:
    """``count`` numbers in 0 … 2³¹ − 1 for each example, int64 (B,) each.

    Args:
        key: int64 (), a step's own number.
        index: int64 (B,), of the examples.
    """
    state, numbers = scramble(key + _GOLDEN * (index + 1)), []
    for _ in range(count):
        state = state + _GOLDEN
        numbers.append(scramble(state) & 0x7FFFFFFF)
    return numbers


def augment(images: Tensor, index: Tensor) -> Tensor:
    """Crops of the images, padded by ``PADDING`` black pixels on each side, half of them mirrored.

    Draws one number from torch's global generator of the CPU.

    Args:
        images: (B, channels, height, width), of any dtype.
        index: int64 (B,), which example each is.

    Returns:
        Like ``images``.
    """
    key = torch.randint(2**62, (), dtype=torch.int64, device="cpu").to(images.device)
    down, right, mirrored = draws(key, index, 3)
    height, width = images.shape[-2:]
    across = torch.arange(width, device=images.device)
    columns = torch.where((mirrored % 2 == 1).unsqueeze(1), width - 1 - across, across)
    columns = columns + (right % (2 * PADDING + 1) - PADDING).unsqueeze(1)
    rows = torch.arange(height, device=images.device) + (down % (2 * PADDING + 1) - PADDING).unsqueeze(1)
    inside = ((rows >= 0) & (rows < height)).unsqueeze(2) & ((columns >= 0) & (columns < width)).unsqueeze(1)
    shape = images.shape
    taken = images.gather(2, rows.clamp(0, height - 1)[:, None, :, None].expand(shape))
    taken = taken.gather(3, columns.clamp(0, width - 1)[:, None, None, :].expand(shape))
    return taken * inside.unsqueeze(1)
