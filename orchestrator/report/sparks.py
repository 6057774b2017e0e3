"""A curve in a few characters, for a narrow column of a table; text only, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"
"""Eighths of the scale from 0 to 1."""


def sparkline(values: Sequence[float | None], most: int) -> str:
    """Scores as at most ``most`` blocks on the scale from 0 to 1, however many there are.

    Neighbours that share a character are averaged, those that are undefined left out; a character without any defined
    value is a space. What is negative is the lowest block.
    """
    count = min(most, len(values))
    edges = [len(values) * place // count for place in range(count + 1)] if count else []
    return "".join(_block(values[first:last]) for first, last in pairwise(edges))


def _block(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return " "
    mean = sum(known) / len(known)
    return BLOCKS[max(0, min(len(BLOCKS) - 1, int(mean * len(BLOCKS))))]


def can_show(encoding: str) -> bool:
    """Whether an output of this encoding has every block."""
    try:
        BLOCKS.encode(encoding)
    except (UnicodeError, LookupError):
        return False
    return True
