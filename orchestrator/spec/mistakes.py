"""What a validation says, as one line that names the mistake and the mend."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fimo.workers.errors import nearest

_ALTERNATIVES = {
    "int",
    "float",
    "constrained-int",
    "constrained-float",
    "literal['auto']",
    "str",
    "sgd",
    "adam",
    "adamw",
}
"""What pydantic calls the alternatives of a union, where no section is one."""


def in_one_line(error: ValidationError, root: type[BaseModel]) -> str:
    """What is wrong, where, and the nearest known key; ``root`` is what was validated."""
    errors = error.errors(include_url=False)
    # Tell the unknown key first: a misspelt one is both unknown and missing.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    # Leave out the alternatives that pydantic tried ("sgd", "constrained-int"): no user wrote them.
    path = [str(p) for p in first["loc"] if str(p) not in _ALTERNATIVES and "[" not in str(p)]
    where, kind = ".".join(path), first["type"]
    more = len(errors) - 1
    tail = f" (and {more} more)" if more and not _in_union(first["loc"]) else ""
    if kind == "extra_forbidden":
        known = _known_keys(root, first["loc"])
        return f"unknown key '{where}'{nearest(path[-1], known)}{tail}"
    if kind == "missing":
        return f"'{where}' is missing{tail}"
    if kind == "union_tag_invalid":
        hint = nearest(str(first["ctx"].get("tag")), ["sgd", "adam", "adamw"])
        return f"'{where}.name' must be one of sgd, adam, adamw{hint}"
    if kind in ("model_type", "dict_type"):
        return f"'{where}' must be a mapping of keys to values, got {str(first.get('input'))[:60]!r}{tail}"
    if kind == "union_tag_not_found":
        return f"'{where}' needs a name: sgd, adam or adamw"
    said = re.sub(r"^Value error, ", "", first["msg"])
    if kind == "string_pattern_mismatch" and where == "name":
        said = "use letters, digits, '.', '_' and '-', starting with a letter or digit, at most 100"
    if kind == "string_pattern_mismatch" and where == "workload":
        said = "write it as module:function, or the name of a shipped workload"
    given = first.get("input")
    shown = f", got {str(given)[:60]!r}" if isinstance(given, str | int | float | bool) else ""
    return f"'{where}': {said[:1].lower()}{said[1:]}{shown}{tail}"


def _in_union(location: tuple[int | str, ...]) -> bool:
    return str(location[-1]) in _ALTERNATIVES or "[" in str(location[-1])


def _known_keys(root: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The known keys of the section that an unknown one stands in, which is what its location leads to."""
    sections = [root]
    for place in location[:-1]:
        inside = [one for section in sections for one in _inside(section, place)]
        chosen = [section for section in sections if place in _tags(section)]
        sections = inside or chosen or sections
    return [field.alias or name for section in sections for name, field in section.model_fields.items()]


def _inside(section: type[BaseModel], place: int | str) -> Iterator[type[BaseModel]]:
    for name, field in section.model_fields.items():
        if place in (name, field.alias):
            yield from _sections_of(field.annotation)


def _sections_of(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_of(argument)


def _tags(section: type[BaseModel]) -> tuple[Any, ...]:
    """The names by which a section is chosen among others: ``sgd``."""
    field = section.model_fields.get("name")
    return () if field is None else get_args(field.annotation)
