"""Figures show the tables' numbers, look alike everywhere, and are drawn of sweeps that lack things."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import fimo
from fimo.estimators import REGISTRY
from fimo.orchestrator.notebook import OpenSweep
from fimo.orchestrator.report.drawings import drawings
from fimo.orchestrator.report.figures import scores, style
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables import schemas
from fimo.orchestrator.tables.matrices import where
from tests.support.small_sweep import OWN, make_spec, run_here


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The small sweep, opened."""
    beside, store = tmp_path_factory.mktemp("of") / "spec", MemoryStore()
    shutil.copytree(OWN, beside)
    run_here(make_spec(estimators=["grad_dot", "grad_cos", {"name": "cg", "damping": [0.1, 1.0]}]), beside, store)
    return OpenSweep(Sweep(store, "flowers"))


def lines(ax):
    return {line.get_label(): line.get_xydata() for line in ax.get_lines()}


def test_a_score_s_line_is_its_table_s_row_by_row(swept):
    drawn = lines(fimo.plot.scores(swept))
    own = where(swept.scores(), estimator="grad_cos", metric="cosine", adjust="baseline", seeds=4).sort_by("step")
    assert drawn["grad_cos"].tolist() == [[r["step"], r["score"]] for r in own.to_pylist()]
    ceilings = {r["step"]: r["ceiling"] for r in own.to_pylist()}
    assert drawn["ceiling"].tolist() == [[step, ceilings[step]] for step in sorted(ceilings)]
    ranked = lines(fimo.plot.scores(swept, "spearman"))["grad_cos"]
    own = where(swept.scores(), estimator="grad_cos", metric="spearman", adjust="baseline", seeds=4).sort_by("step")
    assert ranked[:, 1].tolist() == own["score"].to_pylist()


def test_the_law_goes_through_the_sweep_s_own_point_and_keeps_its_share_of_the_ceiling(swept):
    step = max(swept.scores()["step"].to_pylist())
    rows = where(swept.scores(), estimator="grad_dot", metric="cosine", adjust="baseline", step=step).sort_by("seeds")
    ceilings = scores.ceiling_by_seeds(swept.reliability(), step)
    law = dict(scores.by_law(rows.to_pylist(), ceilings))
    last = rows.to_pylist()[-1]
    assert law[4] == pytest.approx(last["score"])
    assert set(law) == set(ceilings)
    assert all(law[k] / ceilings[k] == pytest.approx(last["score"] / ceilings[4]) for k in law)
    assert scores.by_law([{**last, "ceiling": None}], ceilings) == []


def test_a_point_s_mean_by_example_is_the_score(swept):
    ax = fimo.plot.evals(swept)
    step = max(swept.scores()["step"].to_pylist())
    bars = [line.get_xdata()[0] for line in ax.get_lines() if len(line.get_xdata()) == 2]
    rows = where(swept.scores(), metric="cosine", adjust="baseline", seeds=4, step=step).to_pylist()
    assert all(row["undefined"] == 0 for row in rows)
    assert bars == pytest.approx([row["score"] for row in rows], abs=1e-12)
    assert [text.get_text() for text in ax.get_yticklabels()][:2] == ["grad_dot", "grad_cos"]


def test_effects_and_reliability_are_the_tables(swept):
    top = swept.top(2)
    ax = fimo.plot.effects(swept, 2)
    heights = sorted(float(y) for line in ax.get_lines() for y in line.get_ydata() if line.get_linestyle() == "None")
    assert heights == pytest.approx(sorted(e.effect for e in top.effects))
    own = [r for r in swept.reliability().to_pylist() if r["measured"] and r["adjust"] == "baseline"]
    drawn = lines(fimo.plot.reliability_by_amount(swept))["reliability"]
    assert drawn.tolist() == [[r["step"], r["reliability"]] for r in own]
    [line] = fimo.plot.drift(swept).get_lines()
    assert line.get_ydata().tolist() == swept.amounts()["distance"].to_pylist()
    bars = fimo.plot.histogram(swept).patches
    assert sum(bar.get_height() for bar in bars if hasattr(bar, "get_height")) >= len(swept.attribution()) // 4


def test_it_draws_on_the_axes_that_it_is_given(swept):
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    for draw in (fimo.plot.scores, fimo.plot.seeds, fimo.plot.cost, fimo.plot.training_only, fimo.plot.reliability):
        assert draw(swept, ax=ax) is ax


@pytest.mark.parametrize("kind", ["svg", "pdf", "png"])
def test_equal_figures_are_equal_files(swept, kind):
    files = set()
    for _ in range(2):
        with style.styled():
            files.add(style.encode(fimo.plot.similarity(swept).figure, kind))
    assert len(files) == 1


@pytest.mark.parametrize("lacking", ["everything", "estimates", "seeds"])
def test_every_figure_is_drawn_whatever_a_sweep_lacks(swept, lacking):
    tables = {name: swept._table(name) for name in schemas.SCHEMAS}
    empty = {name: table.slice(0, 0) for name, table in tables.items()}
    if lacking == "everything":
        tables = empty
    elif lacking == "estimates":
        tables |= {name: empty[name] for name in ("estimates", "scores", "similarity", "estimator_notes")}
    else:
        tables |= {"reliability": empty["reliability"]}
    step = max(swept.scores()["step"].to_pylist())
    for drawing in drawings(tables, step):
        with style.styled():
            assert style.encode(drawing.draw().figure, "svg").startswith(b"<?xml")


def test_every_estimator_has_a_look_of_its_own_and_strangers_get_one():
    known = style.palette()
    assert set(REGISTRY) <= set(known)
    assert len({marker for _, marker in known.values()}) == len(known)
    found = style.looks([("cg", "a"), ("cg", "b"), ("mine", ""), ("theirs", "")])
    assert found["cg", "a"].colour == found["cg", "b"].colour
    assert found["cg", "a"].line != found["cg", "b"].line
    assert found["mine", ""].colour != found["theirs", ""].colour
    # Beside other estimators too.
    assert style.looks([("trak", ""), ("cg", "a")])["cg", "a"] == found["cg", "a"]


# Machado, Oliveira and Fernandes 2009, table 1, severity 1: linear RGB as a deuteranope and a protanope see it.
BLIND = {
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}


def seen(colour: str, by: str | None) -> np.ndarray:
    """A colour in CIELAB as somebody sees it."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    if by is not None:
        linear = np.clip(np.array(BLIND[by]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("by", [None, "deutan", "protan"])
def test_colours_are_told_apart_by_readers_who_are_colour_blind(by):
    colours = {name: seen(colour, by) for name, (colour, _) in style.palette().items()}
    close = [
        (a, b, round(float(np.linalg.norm(colours[a] - colours[b])), 1))
        for a in colours
        for b in colours
        if a < b and np.linalg.norm(colours[a] - colours[b]) < 8
    ]
    assert not close
