"""A spec's ``estimators`` entries as estimator values: names, hyper-parameters, lists that sweep.

Does not know any estimator: its dataclass fields, with their annotated types, are its hyper-parameters.
"""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fimo.workers.errors import UsageError, nearest

Kind = TypeVar("Kind")


def parse_entry(registry: Mapping[str, type[Kind]], entry: str | Mapping[str, Any]) -> list[Kind]:
    """``"grad_dot"`` or ``{"name": "cg", "damping": [1e-3, 1e-2]}`` as estimators, one for each combination.

    Raises:
        UsageError: an unknown estimator or hyper-parameter, a value of the wrong type or out of range, an
            empty list.
    """
    options = {"name": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UsageError(f"an estimator is a name or a mapping with a name, got {entry!r}")
    if name not in registry:
        raise UsageError(f"unknown estimator '{name}'{nearest(name, registry)}")
    kind: Any = registry[name]
    hints = get_type_hints(kind)
    known = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    for option, value in options.items():
        if option not in known:
            raise UsageError(f"estimator {name}: {_unknown(str(option), known)}")
        if isinstance(value, list | tuple) and not value:
            raise UsageError(f"estimator {name}: {option} is an empty list")
    swept = [v if isinstance(v, list | tuple) else [v] for v in options.values()]
    estimators: list[Kind] = []
    for combination in itertools.product(*swept):
        values = {o: _typed(name, o, v, known[o]) for o, v in zip(options, combination, strict=True)}
        estimator: Kind = kind(**values)
        if estimator not in estimators:
            estimators.append(estimator)
    return estimators


def _unknown(option: str, known: Mapping[str, Any]) -> str:
    if not known:
        return f"unknown hyper-parameter '{option}': it has none"
    return f"unknown hyper-parameter '{option}'{nearest(option, known)}"


def _typed(name: str, option: str, value: Any, hint: Any) -> Any:
    """``value`` as the annotated type, so that 1 and 1.0 are one identity."""
    for kind in _alternatives(hint):
        if kind is type(None) and value is None:
            return None
        if get_origin(kind) is Literal and value in get_args(kind) and not isinstance(value, bool):
            return value
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if kind is float and (number := _number(value)) is not None:
            return number
    raise UsageError(f"estimator {name}: {option} must be {_described(hint)}, got {value!r}")


def _number(value: Any) -> float | None:
    """A finite float, from text too: YAML reads ``1e-3`` as text (it wants ``1.0e-3``)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None


def _alternatives(hint: Any) -> Sequence[Any]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _described(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    parts = []
    for kind in _alternatives(hint):
        parts.append(" | ".join(map(str, get_args(kind))) if get_origin(kind) is Literal else words[kind])
    return " or ".join(parts)
