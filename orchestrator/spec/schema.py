"""The spec as a JSON schema, from the models that validate it: what editors complete and check.

It accepts what the validator accepts, short forms too, and says nothing of rules between keys. Stricter in one thing: a
number in quotes, which fimo reads, is marked. Needs no torch: what the estimators take is handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fimo.orchestrator.spec.shipped import SHIPPED
from fimo.orchestrator.spec.spec import Spec

Schema = dict[str, Any]

WORDS = ["on", "off", "yes", "no"]
"""Truth values of fimo's YAML that an editor's (YAML 1.2) takes for text."""


def spec_schema(entries: Sequence[Schema], searched: Sequence[Schema]) -> Schema:
    """The schema of a spec (JSON Schema 2020-12), as plain values.

    Args:
        entries: schemas of what may stand in the list ``estimators``, one of them at least.
        searched: the same of ``search``'s ``estimators``.
    """
    schema = Spec.model_json_schema(by_alias=True)
    for section in [schema, *schema["$defs"].values()]:
        section["description"] = " ".join(section.get("description", "").replace("``", "`").split())
        for name, key in section["properties"].items():
            section["properties"][name] = _plain(key)
    keys = schema["properties"]
    _alternative(keys["removals"], {"const": "all"})
    _alternative(keys["seeds"], {"type": "integer", "minimum": 1})
    keys["evals"]["anyOf"].append({"const": "all"})
    written_out = {"type": "string", "pattern": keys["workload"].pop("pattern").partition("|")[0]}
    del keys["workload"]["type"]
    keys["workload"]["anyOf"] = [{"enum": sorted(SHIPPED)}, written_out]
    for section, allowed in ((keys, entries), (schema["$defs"]["Search"]["properties"], searched)):
        listed = next(kind for kind in section["estimators"]["anyOf"] if kind.get("type") == "array")
        listed["items"] = {"anyOf": list(allowed)}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "A sweep of fimo"}


def _plain(key: Schema) -> Schema:
    """A key's schema without pydantic's titles, and with the words that stand for true and false."""
    key = {name: value for name, value in key.items() if name != "title"}
    if key.get("type") == "boolean":
        del key["type"]
        key["anyOf"] = [{"type": "boolean"}, {"enum": WORDS}]
    return key


def _alternative(key: Schema, other: Schema) -> None:
    """Let a key that is a section be something shorter too."""
    key["anyOf"] = [other, {"$ref": key.pop("$ref")}]
