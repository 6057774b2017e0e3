"""The ``search`` section of a spec: which estimators' hyper-parameters, and which further training, are tried.

It is part of no result's identity, and of no manifest: ``Spec.canonical`` leaves it out. What estimators there are is
not known here; ``fimo.orchestrator.search`` reads their entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from fimo.orchestrator.spec.section import Count, Section
from fimo.orchestrator.spec.training import Rate
from fimo.workers.errors import nearest

RANGE = ("from", "to", "count")
DIGITS = 4
"""Significant digits of the values within a range, so that they can be typed."""
RANGE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "from": {"type": "number", "exclusiveMinimum": 0},
        "to": {"type": "number", "exclusiveMinimum": 0},
        "count": {"type": "integer", "minimum": 2},
    },
    "required": list(RANGE),
    "additionalProperties": False,
}


def spread(given: Any) -> list[float]:
    """``{from: 1.0e-4, to: 1.0e+4, count: 40}`` as numbers, evenly spaced on a log scale, both ends among them.

    Raises:
        ValueError: not such a mapping.
    """
    if not isinstance(given, Mapping):
        raise ValueError("a range is {from: a number, to: a number, count: how many}")
    for key in given:
        if key not in RANGE:
            raise ValueError(f"unknown key '{key}' in a range{nearest(str(key), RANGE)}")
    if missing := [key for key in RANGE if key not in given]:
        raise ValueError(f"a range needs from, to and count: {missing[0]} is missing")
    first, last, count = (given[key] for key in RANGE)
    if not isinstance(count, int) or isinstance(count, bool) or count < 2:
        raise ValueError(f"count of a range is a whole number from 2 on, got {count!r}")
    ends = [_positive(first), _positive(last)]
    inner = (ends[0] * (ends[1] / ends[0]) ** (place / (count - 1)) for place in range(1, count - 1))
    return [ends[0], *(float(f"{value:.{DIGITS}g}") for value in inner), ends[1]]


def _positive(value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else 0.0
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"a range lies between two numbers above 0, got {value!r}")
    return number


def _numbers(value: Any) -> Any:
    """A range, a list or a single value as a list."""
    if isinstance(value, Mapping):
        return tuple(spread(value))
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _ranges_hold(entries: Any) -> Any:
    """Look at the ranges within entries, so that a mistake is told when the spec is read."""
    for entry in entries if isinstance(entries, list | tuple) else ():
        for option, value in entry.items() if isinstance(entry, Mapping) else ():
            if isinstance(value, Mapping):
                try:
                    spread(value)
                except ValueError as error:
                    raise ValueError(f"{option}: {error}") from error
    return entries


def _several(one: dict[str, Any], *others: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [one, {"type": "array", "items": one, "minItems": 1}, *others]})


Rates = Annotated[
    tuple[Rate, ...],
    BeforeValidator(_numbers),
    Field(min_length=1),
    _several({"type": "number", "exclusiveMinimum": 0}, RANGE_SCHEMA),
]
Optimizers = Annotated[
    tuple[Literal["sgd", "adam", "adamw"], ...],
    BeforeValidator(_listed),
    Field(min_length=1),
    _several({"enum": ["sgd", "adam", "adamw"]}),
]
Modes = Annotated[
    tuple[Literal["drop", "mask", "reweight"], ...],
    BeforeValidator(_listed),
    Field(min_length=1),
    _several({"enum": ["drop", "mask", "reweight"]}),
]
Steps = Annotated[
    tuple[Count, ...],
    BeforeValidator(_listed),
    Field(min_length=1),
    _several({"type": "integer", "minimum": 1}, {"const": "all"}),
]


class SearchedTraining(Section):
    """Which further training is tried: every combination of what is listed, with the rest of `further_training`.

    A key that is not given stands for the spec's own value. All recorded steps are amounts.
    """

    lr: Rates | None = Field(
        default=None, description="Learning rates: a number, a list, or a range `{from, to, count}` on a log scale."
    )
    optimizer: Optimizers | None = Field(
        default=None,
        description="One or a list of `sgd`, `adam`, `adamw`; another than the spec's has torch's defaults.",
    )
    removal_mode: Modes | None = Field(default=None, description="One or a list of `drop`, `mask`, `reweight`.")
    seeds: Annotated[int, Field(ge=2, strict=True)] = Field(
        default=8, description="Seeds that a candidate gets at most: 2, then 4, 8 … if it is among the better half."
    )


class Search(Section):
    """What `fimo search` tries; `estimators`, `further_training`, or both. No part of any result's identity."""

    estimators: (
        Annotated[tuple[str | dict[str, Any], ...], BeforeValidator(_ranges_hold), Field(min_length=1)] | None
    ) = Field(
        default=None,
        description="Estimators with hyper-parameters: single values, lists, or ranges on a log scale, `{name: cg, "
        "damping: {from: 1.0e-4, to: 1.0e+4, count: 40}}`; every combination is tried.",
    )
    metric: Literal["cosine", "spearman"] = Field(default="cosine", description="By which estimators are chosen.")
    steps: Steps | None = Field(
        default=None,
        description="The recorded steps at which estimators are chosen. Without it, or `all`: all of them.",
    )
    further_training: SearchedTraining | None = Field(
        default=None, description="Further training that is tried for reliability per device-second."
    )

    @field_validator("steps", mode="before")
    @classmethod
    def _all_steps(cls, value: Any) -> Any:
        return None if value == "all" else value

    @model_validator(mode="after")
    def _something(self) -> Search:
        if self.estimators is None and self.further_training is None:
            raise ValueError("give estimators, further_training, or both")
        return self
