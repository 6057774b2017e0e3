"""The pages under ``docs/`` say what the code has: estimators, their hyper-parameters, commands, tables and columns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fimo import estimators

DOCS = Path(__file__).parent.parent / "docs"


def sections(page: str, level: str = "##") -> dict[str, str]:
    """A page's sections by their titles."""
    parts = re.split(rf"^{level} (.+)$", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> list[list[str]]:
    """The cells of every table row whose first cell is code."""
    lines = re.findall(r"^\| (`.+) \|$", text, re.MULTILINE)
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


# -- docs/estimators.md ----------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    return "–" if value is None else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def test_every_registered_estimator_has_a_section_and_no_other() -> None:
    titles = list(sections("estimators.md"))
    assert titles[0] == "What all of them share"
    assert titles[-1] == "Another library's"
    assert sorted(titles[1:-1]) == sorted(estimators.REGISTRY)


@pytest.mark.parametrize("name", sorted(estimators.REGISTRY))
def test_the_documented_hyperparameters_and_defaults_are_the_dataclass_s(name: str) -> None:
    text = sections("estimators.md")[name]
    [plain] = estimators.parse(name)
    documented = {option.strip("`"): default for option, default, *_ in rows(text)}
    assert documented == {option: shown(value) for option, value in plain.params().items()}
    assert documented or "It has no hyper-parameters." in text


@pytest.mark.parametrize("name", sorted(estimators.REGISTRY))
def test_a_section_says_what_it_assumes_its_units_its_cost_and_when_it_fails(name: str) -> None:
    text = " ".join(sections("estimators.md")[name].split())
    for word in ("**Assumes**", "**Cost**", "**When it fails.**"):
        assert word in text, word
    kind = estimators.REGISTRY[name]
    assert f"**Units**: {kind.units.replace('*', '·')}" in text


def test_the_default_set_is_the_registry_s() -> None:
    table = rows(sections("estimators.md")["What all of them share"])
    told = {name: cells[-1] == "yes" for cells in table for name in re.findall(r"`(\w+)`", cells[0])}
    assert told == {name: name in estimators.DEFAULTS for name in estimators.REGISTRY}
