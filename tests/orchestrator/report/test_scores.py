"""The score table on a narrow terminal: nothing cut, nothing hidden."""

from __future__ import annotations

import json
from typing import Any

import pytest
from rich.console import Console

from fimo.orchestrator.report.scores import lay_out, score_table, sure_lines
from fimo.orchestrator.report.show import labels
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


def shown(rows: list[tuple[object, ...]], width: int = 80) -> str:
    table = score_table(schemas.from_rows(schemas.SCORES, rows), schemas.from_rows(schemas.COSTS, []), width=width)
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
