from __future__ import annotations

import io

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from fimo.orchestrator.report.figures.search import search_figure
from fimo.orchestrator.report.search import found_json, found_lines, found_table
from fimo.orchestrator.search.estimators import Found, Tried
from fimo.orchestrator.search.points import Point
from fimo.orchestrator.tables import schemas
from fimo.orchestrator.tables.halves import HalfScore, best_at, best_over
from fimo.workers.errors import UsageError

STEPS = (8, 16, 1024)
DAMPINGS = (1e-4, 0.1234, 1e4)


def found():
    tried = tuple(
        Tried(
            Point("cg", f'{{"damping":{damping}}}'),
            tuple(
                HalfScore(step, 0.9 - 0.1 * abs(place - at), 52, -0.7 + 0.1 * place, 0.1, -0.9, -0.1, 0.995, 50, 1)
                for at, step in enumerate(STEPS)
            ),
            1.5,
            "cpu",
        )
        for place, damping in enumerate(DAMPINGS)
    )
    rows = [one.rows for one in tried]
    best = {step: best_at(rows, step) for step in STEPS}
    return Found("mem://s/x", "cosine", STEPS, tried, 3, 3, best, best_over(rows), 52, 51, 10, 12.0)


def table():
    of = found()
    rows = [
        (
            *("cg", one.point.params, damping, r.step, 1.0, 1 / (0.03 * r.step), r.searched, 52, r.score, 0.1),
            *(-0.9, -0.1, 0.995, None, 50, 1, of.best[r.step] == place, of.overall == place, 1.5, "cpu"),
        )
        for place, (one, damping) in enumerate(zip(of.tried, DAMPINGS, strict=True))
        for r in one.rows
    ]
    return schemas.from_rows(schemas.SEARCH, rows)


def test_the_table_fits_80_columns():
    matched = {step: 1 / (0.03 * step) for step in STEPS}
    sink = io.StringIO()
    Console(file=sink, width=80).print(found_table(found(), matched))
    lines = sink.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in sink.getvalue().replace("-0.90…-0.10", ""), "cut short"
    text = " ".join(found_lines(found()))
    assert "best over 3 steps: cg (damping=0.1234)" in text
    values = found_json(found(), matched)
    assert [row["params"]["damping"] for row in values["best"]] == list(DAMPINGS)
    assert values["best"][0]["score"] == pytest.approx(-0.7)


def test_the_figure_has_both_halves_of_each_step_and_marks_the_matched_damping():
    axes = search_figure(table())
    solid = [line for line in axes.lines if line.get_linestyle() == "-" and line.get_marker() == "None"]
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert (len(solid), len(dashed), len(dotted)) == (3, 3, 3)
    for at, line in enumerate(solid):
        assert list(line.get_xdata()) == list(DAMPINGS)
        assert list(line.get_ydata()) == pytest.approx([0.9 - 0.1 * abs(place - at) for place in range(3)])
    assert list(dashed[0].get_ydata()) == pytest.approx([-0.7, -0.6, -0.5])
    assert [line.get_xdata()[0] for line in dotted] == pytest.approx([1 / (0.03 * step) for step in STEPS])
    assert axes.get_xscale() == "log"
    own = Figure().add_subplot()
    assert search_figure(table(), step=16, ax=own) is own
    with pytest.raises(UsageError, match="step 3 is not in the table"):
        search_figure(table(), step=3)
    with pytest.raises(UsageError, match="no point of the search has a damping"):
        search_figure(table().slice(0, 0))
