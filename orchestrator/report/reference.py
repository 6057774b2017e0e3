"""The reference of the spec and its JSON schema, written from what validates it.

``python -m fimo.orchestrator.report.reference`` in the root of the repository writes both; a test holds the files
against what comes out here.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fimo.estimators import REGISTRY
from fimo.orchestrator.spec.schema import WORDS, Schema, spec_schema
from fimo.orchestrator.spec.shipped import SHIPPED

PAGE, SCHEMA = Path("docs/spec.md"), Path("orchestrator/starters/fimo.schema.json")

NUMBER = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"

INTRODUCTION = """# The spec of a sweep

Written from the models that validate a spec (`python -m fimo.orchestrator.report.reference`); a test holds it against
them. `fimo init KIND` writes a spec to begin with, its keys explained.

A spec is a YAML file. An unknown key is refused, and the nearest known one is named. What moves a number is part of a
result's identity: a changed value is a result of its own, and what was computed before stays. More seeds, removals or
estimators compute only what is new; `resources` is no part of it.

**In an editor.** `fimo init` writes `fimo.schema.json` beside the spec, and as the spec's first line

    # yaml-language-server: $schema=fimo.schema.json

by which VS Code with its YAML extension, and any editor with the same language server, completes and checks keys and
values, without a network. For a spec that you have: `fimo schema > fimo.schema.json`, and that line. The schema does
not know rules between keys (exactly one form of `removals`); `fimo plan` tells those.
"""


def page() -> str:
    """The reference, Markdown."""
    schema = schema_values()
    sections = [INTRODUCTION, *_section("The whole", schema)]
    for title, name in (
        ("removals", "RemovalsSection"),
        ("seeds", "Seeds"),
        ("further_training", "FurtherTraining"),
        ("further_training.optimizer: sgd", "SGD"),
        ("further_training.optimizer: adam", "Adam"),
        ("further_training.optimizer: adamw", "AdamW"),
        ("further_training.evaluate", "Evaluate"),
        ("further_training.lora", "Lora"),
        ("resources", "Resources"),
        ("search", "Search"),
        ("search.further_training", "SearchedTraining"),
    ):
        sections += _section(title, schema["$defs"][name])
    sections += ["\n## Estimators\n", *_estimators()]
    sections += ["\n## Shipped workloads\n\n[workloads.md](workloads.md) has their data and recipes.\n"]
    sections += [*(f"- `{name}`: `{SHIPPED[name]}`" for name in sorted(SHIPPED))]
    return "\n".join(sections) + "\n"


def _section(title: str, section: Schema) -> Iterator[str]:
    yield f"\n## {title}\n"
    if title != "The whole":
        yield f"{section['description']}\n"
    yield "| key | value | default | |"
    yield "|---|---|---|---|"
    for name, key in section["properties"].items():
        default = "required" if name in section.get("required", ()) else _shown(key.get("default"))
        if (title, name) == ("seeds", "count"):
            default = "required without `until_reliability`"
        cells = (f"`{name}`", _kind(key), default, key["description"])
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        value = {name: one for name, one in value.items() if one is not None}
        return "see below" if len(value) > 1 else f"`{json.dumps(value)}`".replace('"', "")
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _kind(key: Schema) -> str:
    """What a value may be, in words."""
    if several := key.get("anyOf", key.get("oneOf")):
        kinds = [_kind(kind) for kind in several if kind.get("type") != "null" and kind.get("enum") != WORDS]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in key or "enum" in key:
        return " or ".join(f"`{value}`" for value in key.get("enum", [key.get("const")]))
    kind = key.get("type", "object")
    if kind in ("array", "object"):
        return _list(key) if kind == "array" else _mapping(key)
    if "pattern" in key:
        return "`module:function`" if ":" in key["pattern"] else "letters, digits, `.`, `_` and `-`, at most 100"
    return WORDED[kind] + _bounds(key)


def _list(key: Schema) -> str:
    if "prefixItems" in key:
        return f"a list of {len(key['prefixItems'])} numbers"
    inner = key["items"]
    if "enum" in inner:
        return "a list of them"
    return "a list of names or sections" if "anyOf" in inner else f"a list of {PLURAL[inner['type']]}"


def _mapping(key: Schema) -> str:
    inner = key.get("additionalProperties")
    return f"a section of names, each with {_kind(inner)}" if isinstance(inner, dict) else "a section"


WORDED = {"integer": "a whole number", "number": "a number", "string": "a text", "boolean": "true or false"}
PLURAL = {"integer": "whole numbers", "number": "numbers", "string": "texts"}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _bounds(key: Schema) -> str:
    told = [f"{sign} {key[name]}" for name, sign in BOUNDS.items() if name in key]
    return " " + " and ".join(told) if told else ""


# -- estimators ----------------------------------------------------------------------------------------------------


def schema_values() -> Schema:
    """The JSON schema of a spec with what the estimators take."""
    names, bare = sorted(REGISTRY), {"enum": sorted(REGISTRY)}
    # Not every option once more: the schema would be twice as long for a section that few write.
    searched = {"type": "object", "properties": {"name": bare}, "required": ["name"]}
    return spec_schema([bare, *map(_entry, names)], [bare, searched])


def _fields(name: str) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """Name, alternatives of its type, and default of an estimator's hyper-parameters."""
    kind = REGISTRY[name]
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        several = get_origin(hint) in (Union, types.UnionType)
        yield field.name, get_args(hint) if several else (hint,), field.default


def _entry(name: str) -> Schema:
    properties: dict[str, Schema] = {"name": {"const": name}}
    for option, kinds, default in _fields(name):
        one = [_json(kind) for kind in kinds]
        swept = {"type": "array", "minItems": 1, "items": {"anyOf": one}}
        properties[option] = {"anyOf": [*one, swept], "default": default}
    return {"type": "object", "properties": properties, "required": ["name"], "additionalProperties": False}


def _json(kind: Any) -> Schema:
    if get_origin(kind) is Literal:
        return {"enum": list(get_args(kind))}
    if kind is float:
        return {"anyOf": [{"type": "number"}, {"type": "string", "pattern": NUMBER}]}
    if kind is bool:
        return {"anyOf": [{"type": "boolean"}, {"enum": WORDS}]}
    return {"type": "integer" if kind is int else "null"}


TYPES = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def _estimators() -> Iterator[str]:
    yield "A name, or a section with the name and hyper-parameters; a list of values is tried one by one. What they"
    yield "mean, what each estimator costs and when it fails: [estimators.md](estimators.md).\n"
    yield "| name | hyper-parameters |"
    yield "|---|---|"
    for name in sorted(REGISTRY):
        told = []
        for option, kinds, default in _fields(name):
            worded = [f"`{v}`" for k in kinds if get_origin(k) is Literal for v in get_args(k)]
            worded += [TYPES[k] for k in kinds if k in TYPES and k is not type(None)]
            told.append(f"`{option}`: {' or '.join(worded)} ({'left out' if default is None else _shown(default)})")
        yield f"| `{name}` | {'; '.join(told) or 'none'} |"


def schema_text() -> str:
    """The JSON schema as it is written to files."""
    return json.dumps(schema_values(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    SCHEMA.write_text(schema_text(), encoding="utf-8")
