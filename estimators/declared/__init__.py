"""What the shipped estimators declare, for whoever reads a sweep: needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fimo.estimators.declared.base import Declaration
from fimo.estimators.declared.shipped import DECLARED
from fimo.estimators.entries import parse_entry

__all__ = ["DECLARED", "Declaration", "declared", "parse"]


def parse(entry: str | Mapping[str, Any]) -> list[Declaration]:
    """The declarations of one entry of a spec's ``estimators``; a list-valued hyper-parameter sweeps.

    Raises:
        UsageError: see ``fimo.estimators.entries.parse_entry``.
    """
    return parse_entry(DECLARED, entry)


def declared(name: str, params: Mapping[str, Any]) -> Declaration:
    """What the estimator with these hyper-parameters declares; raises UsageError if there is none."""
    [one] = parse({"name": name, **params})
    return one
