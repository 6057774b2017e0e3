"""A product of parameters, of which the quick tests take a covering set and the slow ones the rest."""

from __future__ import annotations

from collections.abc import Collection
from itertools import product
from typing import Any

import pytest


def covering(*factors: Collection[Any]) -> list[Any]:
    """Every combination of the factors, those beyond a covering set marked ``slow``.

    Each combination of all factors but the last is taken once, with the last going round: it is at the place that is
    the sum of the others' places. So every value comes, and every pair of values of two factors whose other factors
    have together as many values as the last.

    Args:
        factors: each at least two values; the last is the one that matters least.
    """
    *before, last = map(list, factors)
    taken = {(*places, sum(places) % len(last)) for places in product(*(range(len(factor)) for factor in before))}
    every = product(*(range(len(factor)) for factor in (*before, last)))
    return [
        pytest.param(
            *(factor[place] for factor, place in zip((*before, last), places, strict=True)),
            marks=() if places in taken else pytest.mark.slow,
        )
        for places in every
    ]
