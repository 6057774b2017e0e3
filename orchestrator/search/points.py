"""The points of a search over estimators: its entries, ranges spread out, as estimators with their parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from fimo import estimators
from fimo.orchestrator.spec.canonical import canonical
from fimo.orchestrator.spec.search import Search, spread
from fimo.workers.errors import UsageError, nearest


@dataclass(frozen=True)
class Point:
    """An estimator with all its hyper-parameters, ``params`` as canonical JSON."""

    estimator: str
    params: str


def points_of(search: Search) -> tuple[Point, ...]:
    """Every combination, in the order of the spec, each once.

    Raises:
        UsageError: an unknown estimator or hyper-parameter, or a value that it cannot have.
    """
    found: dict[Point, None] = {}
    for entry in search.estimators or ():
        for one in estimators.parse(_spread_out(entry)):
            found[Point(one.name, canonical(one.params()))] = None
    return tuple(found)


def _spread_out(entry: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """An entry with its ranges as lists; of whole numbers where the hyper-parameter is one."""
    if isinstance(entry, str):
        return entry
    kind = estimators.REGISTRY.get(str(entry.get("name")))
    return {option: _values(kind, option, value) for option, value in entry.items()}


def _values(kind: type[Any] | None, option: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    values = spread(value)
    if kind is None or option not in (known := {f.name for f in dataclasses.fields(kind)}):
        if kind is not None:
            raise UsageError(f"estimator {kind.name}: unknown hyper-parameter '{option}'{nearest(option, known)}")
        return values
    kinds = set(get_args(hint := get_type_hints(kind)[option]) or (hint,))
    if float in kinds:
        return values
    if int in kinds:
        return list(dict.fromkeys(round(number) for number in values))
    raise UsageError(f"estimator {kind.name}: {option} is no number, so that it has no range: list its values")


def damping_of(point: Mapping[str, Any]) -> Iterator[float]:
    """The damping of a point's parameters, if it is a number."""
    value = point.get("damping")
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)
