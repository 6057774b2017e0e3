"""The pages under ``docs/`` say what the code has: estimators, their hyper-parameters, commands, tables and columns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fimo import estimators
from fimo.orchestrator.tables import schemas

DOCS = Path(__file__).parent.parent / "docs"


def sections(page: str, level: str = "##") -> dict[str, str]:
    """A page's sections by their titles."""
    parts = re.split(rf"^{level} (.+)$", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> list[list[str]]:
    """The cells of every table row whose first cell is code."""
    lines = re.findall(r"^\|( `.+)\|$", text, re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


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


# -- docs/contract.md ------------------------------------------------------------------------------------------------


def test_every_command_is_named_with_its_help_and_no_other() -> None:
    import typer.main

    from fimo.orchestrator.commands.main import app

    told = {cells[0].strip("`"): cells[1] for cells in rows(sections("contract.md")["Commands"]) if len(cells) > 2}
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert told == {name: (command.help or "").strip().splitlines()[0] for name, command in commands.items()}


TABLES = {
    **schemas.SCHEMAS,
    "ranking": schemas.RANKING,
    "comparison": schemas.COMPARISON,
}


@pytest.mark.parametrize("name", TABLES)
def test_every_table_and_every_column_is_named_and_no_other(name: str) -> None:
    text = sections("contract.md", "###")[name]
    told = [column for cells in rows(text.partition("\n## ")[0]) for column in re.findall(r"`(\w+)`", cells[0])]
    assert sorted(told) == sorted(TABLES[name].names)


def test_no_table_is_told_that_there_is_not() -> None:
    assert set(sections("contract.md", "###")) == set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_a_column_that_is_neither_int32_nor_float64_nor_text_says_its_type(name: str) -> None:
    text = sections("contract.md", "###")[name]
    for field in TABLES[name]:
        said = next(cells[1] for cells in rows(text) if f"`{field.name}`" in cells[0])
        for kind in ("bool", "int64"):
            assert (kind in said) == (str(field.type) == kind), (field.name, said)
        assert ("list" in said) == str(field.type).startswith("list"), (field.name, said)


def test_the_workload_s_arguments_are_the_dataclass_s() -> None:
    import dataclasses

    from fimo import Workload

    table = rows(sections("contract.md")["Workload"])
    told = [argument for cells in table for argument in re.findall(r"`(\w+)`", cells[0])]
    assert told == [field.name for field in dataclasses.fields(Workload)]


def test_the_names_of_the_package_are_all_told() -> None:
    import fimo

    text = sections("contract.md")["Workload"]
    assert all(f"`{name}`" in text for name in fimo.__all__)
