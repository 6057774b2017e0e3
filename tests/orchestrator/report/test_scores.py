"""The score table on a narrow terminal: nothing cut, nothing hidden."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from fimo.orchestrator.report.scores import lay_out, score_table, sure_lines
from fimo.orchestrator.report.show import labels
from fimo.orchestrator.report.sparks import BLOCKS, can_show, sparkline
from fimo.orchestrator.report.trust import trust_lines
from fimo.orchestrator.tables import schemas

STEPS = (8, 16, 24, 40, 72, 128, 240)


def params(**values: Any) -> str:
    from fimo import estimators

    return json.dumps({**estimators.parse("datainf")[0].params(), **values}, sort_keys=True, separators=(",", ":"))


def row(estimator: str, of: str, step: int, score: float | None = 0.5, undefined: int = 0) -> tuple[object, ...]:
    known = score is not None
    plain = (score, 0.01, 0.4, 0.6, 0.9, 0.55) if known else (None,) * 6
    return (estimator, of, "cosine", "baseline", 5, step, *plain, 20 - undefined, undefined)


def shown(rows: list[tuple[object, ...]], width: int = 80, encoding: str = "utf-8") -> str:
    tables = schemas.from_rows(schemas.SCORES, rows), schemas.from_rows(schemas.COSTS, [])
    table = score_table(*tables, width=width, encoding=encoding)
    assert table is not None
    console = Console(width=width, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


@pytest.mark.parametrize("width", [60, 80, 100, 160])
@pytest.mark.parametrize("names", [8, 18, 45])
def test_a_line_holds_what_is_laid_out(width: int, names: int) -> None:
    layout = lay_out(width, names)
    cell = 13 if layout.detailed else 6
    used = 1 + names + 3 + layout.amounts * (cell + 3) + (10 if layout.costs else 0)
    used += layout.curve + 3 if layout.curve else 0
    assert used <= width or (layout.amounts, layout.detailed, layout.costs) == (2, False, False)


def test_at_80_columns_nothing_is_cut_and_every_line_fits() -> None:
    sweep = [params(damping_scale=s) for s in (0.1, 0.01)]
    text = shown([row("datainf", of, step) for of in sweep for step in STEPS])
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for scale in ("0.1", "0.01"):
        assert f"datainf (damping_scale={scale})" in text, "what is swept is shown where it is the default too"
    assert "ceiling" in text
    assert "240" in text


def test_intervals_go_before_a_long_name_is_folded() -> None:
    long = params(training_gradient="corrected", displacement_step=8, damping_scale=0.01)
    text = shown([row("datainf", long, step) for step in STEPS])
    assert all(word in text for word in labels([("datainf", long)])["datainf", long].split())
    assert "0.500" in text
    assert "0.40 to" not in text


def test_undefined_examples_are_marked_and_counted() -> None:
    of = params()
    text = shown([row("datainf", of, 8, undefined=3), row("datainf", of, 16, None, undefined=20)], 120)
    assert "0.500*" in text
    assert "undefined" in text
    assert "up to 20 of 20 evaluation" in " ".join(text.split())
    assert "*" not in shown([row("datainf", of, 8)])


@pytest.mark.parametrize(
    ("values", "curve"),
    [
        ([0.0, 0.124, 0.125, 0.5, 0.874, 0.875, 0.999, 1.0], "▁▁▂▅▇███"),
        ([-0.9, -1e-9, 0.3], "▁▁▃"),
        ([1.0 + 1e-12], "█"),
        ([0.9, None, 0.1], "█ ▁"),
        ([None, None], "  "),
        ([], ""),
    ],
)
def test_a_curve_s_scale_is_from_0_to_1_and_undefined_is_a_space(values: list[float | None], curve: str) -> None:
    assert sparkline(values, 8) == curve


@pytest.mark.parametrize("count", [9, 16, 30, 500])
def test_many_steps_are_resampled_and_none_is_left_out(count: int) -> None:
    falling = [1 - place / (count - 1) for place in range(count)]
    curve = sparkline(falling, 8)
    assert len(curve) == 8
    assert [BLOCKS.index(block) for block in curve] == sorted(map(BLOCKS.index, curve), reverse=True)
    assert (curve[0], curve[-1]) == ("█", "▁")
    # Any one step moves the character that it is in: here from the lowest block to a higher one.
    for place in range(count):
        alone = [0.0] * count
        alone[place] = 0.13 * count
        assert sparkline(alone, 8).count("▁") == 7
    # An undefined step has no part in the mean of its character.
    assert sparkline([0.9, None] * 8, 8) == "█" * 8


def falls(estimator: str) -> list[tuple[object, ...]]:
    return [row(estimator, params(), step, 0.99 - step / 300) for step in STEPS]


def test_a_curve_of_all_steps_stands_last_where_there_is_room() -> None:
    text = shown(falls("datainf"), 140)
    [line] = [line for line in text.splitlines() if "datainf" in line]
    assert line.rstrip("│ ").endswith("│ ███▇▇▅▂"), line
    assert "0 to 1" in text
    assert max(map(len, text.splitlines())) <= 140
    [ceiling] = [line for line in text.splitlines() if "ceiling" in line and "│" in line]
    assert "█" * len(STEPS) in ceiling or "▇" * len(STEPS) in ceiling, ceiling


def without_curve(text: str) -> list[str]:
    """The lines of a table without its last column."""
    lines = [line for line in text.splitlines() if line[:1] in "│┃"]
    return [line[:-1].rpartition(line[0])[0] + line[0] for line in lines]


@pytest.mark.parametrize("width", range(40, 200))
def test_no_width_loses_anything_to_a_curve_nor_is_passed_for_one(width: int) -> None:
    rows = [*falls("datainf"), *falls("grad_dot")]
    text, plain = shown(rows, width), shown(rows, width, encoding="ascii")
    assert not any(block in plain for block in BLOCKS)
    if "0 to 1" not in text:
        assert text == plain
        return
    assert max(map(len, text.splitlines())) <= width
    assert without_curve(text) == [line for line in plain.splitlines() if line[:1] in "│┃"]


def test_at_80_columns_intervals_stay_and_curves_go() -> None:
    text = shown([row("datainf", params(damping_scale=0.01), step) for step in STEPS])
    assert "0.40 to 0.60" in text
    assert "0 to 1" not in text


def test_three_amounts_at_80_columns_leave_room_for_a_curve() -> None:
    text = shown([row("datainf", params(), step) for step in STEPS[:3]])
    assert "▅▅▅" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("encoding", "can"), [("utf-8", True), ("ascii", False), ("latin-1", False), ("cp437", False), ("none", False)]
)
def test_only_an_output_that_has_the_characters_is_given_them(encoding: str, can: bool) -> None:
    assert can_show(encoding) == can
    if encoding == "ascii":
        tables = schemas.from_rows(schemas.SCORES, falls("datainf")), schemas.from_rows(schemas.COSTS, [])
        raw = io.BytesIO()
        console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=160)
        console.print(score_table(*tables, width=160, encoding=console.encoding))
        console.file.flush()
        assert b"0.963" in raw.getvalue()


def test_one_amount_has_no_curve() -> None:
    assert "0 to 1" not in shown([row("datainf", params(), 8)], 160)


def reliability(step: int, value: float | None, seeds: int = 5) -> dict[str, Any]:
    return {
        "step": step,
        "adjust": "baseline",
        "seeds": seeds,
        "measured": True,
        "reliability": value,
        "significant": None if value is None else value / 2,
    }


def test_one_sentence_says_how_sure_a_sweep_is() -> None:
    [line] = trust_lines([reliability(8, 0.9), reliability(16, 0.2), reliability(24, 0.6)])
    assert "0.90 at step 8, 0.60 at step 24 (least 0.20 at step 16)" in line
    assert "45% and 30% of the effects can be told from zero" in line
    [line] = trust_lines([reliability(8, None, seeds=1)])
    assert "one seed" in line


def test_a_sweep_of_one_removal_says_why_there_is_no_score() -> None:
    one = {name: schema.empty_table() for name, schema in schemas.SCHEMAS.items()}
    one["removals"] = schemas.from_rows(schemas.REMOVALS, [(0, "3", [3], None, None)])
    assert sure_lines(one) == [], "nothing is trained and nothing estimated yet"
    one["estimates"] = schemas.from_rows(schemas.ESTIMATES, [("grad_dot", "{}", 0, 0, None, 1.0)])
    one["attribution"] = schemas.from_rows(
        schemas.ATTRIBUTION, [(0, 0, 8, 1.0, None, None, 1, None, False), (0, 0, 16, 1.0, None, None, 1, None, False)]
    )
    [line] = sure_lines(one)
    assert "there is one" in line
    assert "more removals give scores" in line
