"""Canonical JSON and its digests: one text for equal values, so that a digest may stand in a key.

Pure; needs neither torch nor a store. What the digests are taken of is said in ``fimo.orchestrator.resolve.identity``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

SCHEMA_VERSION = 2
"""Raised when objects of a sweep change their form: digests differ, so nothing written before is read by mistake."""


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, floats by their shortest exact form.

    Raises:
        ValueError: a float is not finite.
        TypeError: the value is not plain JSON.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 (64 hex digits) of canonical JSON; raises as ``canonical`` does."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def rows_digest(columns: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """SHA-256 (64 hex digits) of a table's values, column by column; provenance is not part of it."""
    sha = hashlib.sha256()
    for name in sorted(columns):
        values = np.ascontiguousarray(columns[name])
        sha.update(f"{name}:{values.dtype.str}:{values.shape};".encode())
        sha.update(values.data)
    return sha.hexdigest()


SEAL = "seal"


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with a digest of all of them, so that a change of any, by a disk or a hand, is seen when they are read.

    A seal is no signature: who may write to a store can seal what they like.
    """
    return {**values, SEAL: digest(dict(values))}


def is_sealed(values: Mapping[str, Any]) -> bool:
    """Whether values are as they were sealed; those from before there were seals are taken as they are.

    Raises:
        ValueError: a float is not finite, which nothing of ours is.
    """
    if SEAL not in values:
        return True
    return bool(values[SEAL] == digest({key: value for key, value in values.items() if key != SEAL}))
