"""The small JSON records of a sweep, as models: what does not fit is no record, whoever wrote it.

A record decides little, and is shown: one that is none is passed over by whoever lists them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError


class _Record(BaseModel):
    """Of exact types, with numbers that are finite; more than it names is kept."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)


Number = Annotated[float, Field(ge=0, le=1e18)]
Whole = Annotated[int, Field(ge=0, le=2**53)]
Text = Annotated[str, Field(max_length=100_000)]


class Verdict(_Record):
    """How the engine compared with the definition on a device, or why it is refused there."""

    device: Text
    about: dict[str, Any] = {}
    refused: Text | None = None
    path: Text = ""
    replicas: Annotated[int, Field(ge=1, le=2**31)] = 1
    precisions: dict[str, dict[str, Number | None]] = {}
    lines: list[Text] = []
    engine: dict[str, bool] = {}


class Running(_Record):
    """A task that a driver has going."""

    task: Text
    seconds: Number


class Waits(_Record):
    """What a driver waits for."""

    what: Text = Field(alias="for")
    seconds: Number


class Said(_Record):
    """What a running driver says of itself."""

    cells: Whole
    done: Whole
    left: dict[str, Whole]
    running: list[Running]
    waits: Waits | None = None
    host: Text = ""
    pid: Whole = 0
    cells_per_second: Number | None = None
    finish_in_s: Number | None = None


class StackSize(_Record):
    """The stack size that was measured on a device type, and the way."""

    replicas: Annotated[int, Field(ge=1, le=2**31)]
    abreast: bool = False


class GivenUp(_Record):
    """A task that was given up; of a shard it has a seed, of witnesses too, of estimates an estimator."""

    task: Text
    error: Text
    final: bool
    seed: Whole | None = None
    witness: Whole | None = None
    asked: Whole | Text | None = None
    estimator: Text | None = None
    params: Text | None = None
    removals: list[list[Whole]] | None = None
    block: Text | None = None
    budget: Number | Text | None = None


_Kind = TypeVar("_Kind", bound=_Record)


def read(kind: type[_Kind], data: bytes) -> tuple[_Kind, dict[str, Any]] | None:
    """A record and its plain values; None if the bytes are none of the kind."""
    try:
        values = json.loads(data)
        return kind.model_validate(values), values
    except (ValidationError, ValueError, RecursionError):
        return None


MOST_TOGETHER = 2**16
"""Replicas of one stack that a part's provenance may name: nobody vouches for what stands there."""

_Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]
_Set = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$", strict=True)]
_Together = Annotated[list[tuple[_Seed, _Set]], Field(max_length=MOST_TOGETHER)]
_TOGETHER: TypeAdapter[list[tuple[int, str]]] = TypeAdapter(_Together)


def together(provenance: Mapping[str, Any]) -> list[tuple[int, str]]:
    """(seed, set of removals) of the shards that a part says it was trained with in one stack, its own among them.

    Raises:
        ValueError: it says nothing of it, or nothing that can be.
    """
    return _TOGETHER.validate_python(provenance.get("together"))
