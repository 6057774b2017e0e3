"""``fimo report``: a sweep's tables as one page that needs nothing else, and its figures as files for a paper."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from fimo.orchestrator.report import words
from fimo.orchestrator.report.cards import Dealer
from fimo.orchestrator.report.drawings import Drawing, drawings, of_example
from fimo.orchestrator.report.figures.effects import noise_floor
from fimo.orchestrator.report.figures.scores import entries, of_all_seeds, seconds_of
from fimo.orchestrator.report.figures.style import encode, looks, styled
from fimo.orchestrator.report.gallery import Gallery
from fimo.orchestrator.report.page.fill import inline, page
from fimo.orchestrator.report.show import label, labels, spread
from fimo.orchestrator.report.status import proof_line
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.tables.matrices import Effects, effects_at, steps_of, where
from fimo.orchestrator.tables.top import top
from fimo.workers.errors import StoreError, UsageError

KINDS = ("pdf", "png")
"""Of figure files beside the page, which holds its own as SVG."""
EXAMPLES = 6
"""Evaluation examples that are shown if nobody chooses."""


@dataclass(frozen=True)
class Source:
    """What a report is made from.

    Attributes:
        tables: the sweep's, by name; ``ranking``: of ``fimo rank``, None if there is none.
        complete: whether every cell and estimate is there; ``warnings``: what a reader must be told first.
        proofs: the verdicts on the engine.
        gallery: the examples; None if they are not here.
        left_out: estimators of the default set that have no values, by (name, params), with the reason.
    """

    uri: str
    manifest: Manifest
    tables: Mapping[str, pa.Table]
    complete: bool
    warnings: Sequence[str]
    proofs: Sequence[Mapping[str, Any]]
    ranking: pa.Table | None
    gallery: Gallery | None
    left_out: Mapping[tuple[str, str], str] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """What was written: the page, the figures' files, the evaluation examples shown, and what went wrong in words."""

    page: Path
    figures: list[Path]
    evals: list[int]
    step: int
    lines: list[str]


def write_report(
    source: Source,
    to: Path,
    evals: Sequence[int] | None = None,
    step: int | None = None,
    count: int = 5,
    say: Callable[[str], None] = lambda line: None,
) -> Written:
    """Draw a sweep's figures and write its page.

    Args:
        to: a folder, made if there is none: ``report.html``, and ``figures/NAME.pdf`` and ``.png``.
        evals: evaluation examples whose removals are shown; default: 0 and those with the clearest effects.
        step: the amount; default: the last recorded one.
        count: removals of each sign.
        say: told of every figure.

    Raises:
        UsageError: nothing is trained yet, no such step, or no such evaluation example.
        StoreError: the folder cannot be written.
    """
    steps = steps_of(source.tables["attribution"])
    if not steps:
        raise UsageError(f"{source.uri} has no effects yet: `fimo run` or `fimo resume` trains its cells")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UsageError(f"step {step} is not recorded; the sweep has {', '.join(map(str, steps[:20]))}")
    effects = effects_at(source.tables["attribution"], step)
    shown = chosen(effects, EXAMPLES) if evals is None else list(dict.fromkeys(evals))
    if beyond := [number for number in shown if not 0 <= number < effects.evals]:
        raise UsageError(f"there is no evaluation example {beyond[0]}: the sweep has examples 0 to {effects.evals - 1}")
    return _Report(source, to, effects, count, say).write(shown)


def chosen(effects: Effects, count: int) -> list[int]:
    """Evaluation example 0, and those whose effects stand out most clearly from the noise of the seeds."""
    noise = np.sqrt(np.nanmean(np.square(effects.sem), axis=0)) if np.isfinite(effects.sem).any() else np.ones(1)
    size = np.sqrt(np.nanmean(np.square(effects.mean), axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        clear = np.nan_to_num(size / np.maximum(noise, effects.floor), nan=0.0, posinf=0.0)
    return list(dict.fromkeys([0, *map(int, np.argsort(-clear, kind="stable"))]))[:count]


class _Report:
    def __init__(self, source: Source, to: Path, effects: Effects, count: int, say: Callable[[str], None]) -> None:
        self.source, self.to, self.effects, self.count, self._say = source, to, effects, count, say
        self.step = effects.step
        self.named = entries(source.tables["estimates"])
        ranking = source.ranking if source.ranking is not None and _step_of(source.ranking) == self.step else None
        self._ranked = ranking is not None
        self._dealer = Dealer(effects, source.tables["estimates"], self.named, source.gallery, ranking)
        self._files: list[Path] = []

    def write(self, evals: Sequence[int]) -> Written:
        values = self._values(evals)
        html = page(values)
        path = self.to / "report.html"
        self._put(path, html.encode())
        lines = list(self._dealer.wrong)
        return Written(path, self._files, list(evals), self.step, lines)

    def _values(self, evals: Sequence[int]) -> dict[str, Any]:
        tables, manifest = self.source.tables, self.source.manifest
        drawn = [(d, self._draw(d)) for d in drawings(tables, self.step)]
        look, names = looks(self.named), labels(self.named)
        return {
            "name": manifest.spec.name,
            "step": self.step,
            "lead": self._lead(),
            "warnings": self._warnings(),
            "estimators": [{"name": names[one], "colour": look[one].colour} for one in self.named],
            "examples": [self._example(number) for number in evals],
            "agreement": [f for d, f in drawn if d.section == "agreement"],
            "trust": [f for d, f in drawn if d.section == "trust"],
            "scores": score_rows(tables),
            "provenance": list(provenance(self.source)),
            "spec": yaml.safe_dump(manifest.spec.canonical(), sort_keys=False, allow_unicode=True),
            "notes": _notes(tables["estimator_notes"], names),
            "left_out": [f"{label(*named)}: {why}" for named, why in self.source.left_out.items()],
            "unguarded": self.source.gallery is not None and self.source.gallery.unguarded,
        }

    def _lead(self) -> list[tuple[str, str]]:
        tables = self.source.tables
        rest = words.covered(self.source.manifest, self._ranked)
        return [
            ("What was asked.", words.asked(self.source.manifest, self.step)),
            ("How sure it is.", words.sure(tables, self.step)),
            ("What comes close.", words.closest(tables, self.step)),
            ("To be surer.", words.surer(tables, self.step)),
            *([("What was not looked at.", rest)] if rest else []),
        ]

    def _warnings(self) -> list[str]:
        incomplete = [] if self.source.complete else ["The sweep is not complete: this is what is there."]
        return [*incomplete, *self.source.warnings]

    def _example(self, number: int) -> dict[str, Any]:
        tables = self.source.tables
        found = top(tables, number, self.step)
        hand = self._dealer.deal(found, self.count)
        drawing = of_example(found, noise_floor(tables["reliability"], self.step))
        return {
            "number": number,
            "shown": self._dealer.show_eval(number),
            "lines": words.about_example(found, hand, self.count),
            "hand": hand,
            "figure": self._draw(drawing),
        }

    def _draw(self, drawing: Drawing) -> dict[str, Any]:
        """Draw a figure, write its files, and give it as the page takes it."""
        self._say(f"drawing {drawing.name}")
        with styled():
            figure = drawing.draw().figure
            for kind in KINDS:
                path = self.to / "figures" / f"{drawing.name}.{kind}"
                self._put(path, encode(figure, kind))
                self._files.append(path)
            svg = inline(encode(figure, "svg"), drawing.name, drawing.title)
        return {"name": drawing.name, "title": drawing.title, "caption": drawing.caption, "svg": svg}

    def _put(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            raise StoreError(f"cannot write to {path}: {error.strerror or error}") from error


def _step_of(ranking: pa.Table) -> int | None:
    """The step that a ranking is of, from its metadata."""
    try:
        return int(json.loads((ranking.schema.metadata or {})[b"fimo"])["step"])
    except (KeyError, ValueError, TypeError):
        return None


def score_rows(tables: Mapping[str, pa.Table]) -> dict[str, Any]:
    """The score table of the page: cosines of all seeds at a few steps, the ceiling last."""
    rows = of_all_seeds(tables["scores"], "cosine", "baseline").to_pylist()
    seeds = max((r["seeds"] for r in rows), default=0)
    steps = spread(sorted({r["step"] for r in rows}))
    named = list(dict.fromkeys((r["estimator"], r["params"]) for r in rows))
    look, names, spent = looks(entries(tables["estimates"])), labels(named), seconds_of(tables["costs"])
    share = coverage(tables["estimator_notes"])
    by = {(r["estimator"], r["params"], r["step"]): r for r in rows}
    shown = [
        {
            "name": names[one] + (f", covers {share[one]:.0%}" if share.get(one, 1.0) < 1 else ""),
            "colour": look[one].colour if one in look else None,
            "cells": [_cell(by.get((*one, step))) for step in steps],
            "seconds": f"{spent[one]:.1f}" if one in spent else "",
            "ceiling": False,
        }
        for one in named
    ]
    ceilings = {r["step"]: r["ceiling"] for r in reversed(rows) if r["ceiling"] is not None}
    if shown and ceilings:
        cells = [(f"{ceilings[s]:.3f}" if s in ceilings else "–", "") for s in steps]
        shown.append({"name": "ceiling", "colour": None, "cells": cells, "seconds": "", "ceiling": True})
    most = max((r["undefined"] for r in rows), default=0)
    note = f"Up to {most} evaluation examples are in no mean: their effects are constant or under the noise floor."
    return {"rows": shown, "steps": steps, "seeds": seeds, "note": note if most else ""}


def coverage(notes: pa.Table) -> dict[tuple[str, str], float]:
    """The share of the trainable scalars that an estimator's curvature covers, of those that say so."""
    rows = where(notes, note="coverage").to_pylist()
    return {(r["estimator"], r["params"]): float(r["value"]) for r in rows}


def _cell(row: Mapping[str, Any] | None) -> tuple[str, str]:
    if row is None or row["score"] is None:
        return "–", ""
    interval = "" if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"
    return f"{row['score']:.3f}", interval


def _notes(table: pa.Table, names: Mapping[tuple[str, str], str]) -> list[tuple[str, str, str]]:
    rows = table.to_pylist()
    found = [(names.get((r["estimator"], r["params"]), r["estimator"]), r["note"], r["value"]) for r in rows]
    return list(dict.fromkeys(found))


def provenance(source: Source) -> Iterable[tuple[str, str]]:
    """What the numbers are of, and how they were made."""
    manifest, tables = source.manifest, source.tables
    yield "sweep", source.uri
    yield "workload", manifest.spec.workload
    yield "digest of all that an effect depends on", manifest.digest
    for part, of in manifest.about:
        yield f"digest of {part}", of
    yield "parameters trained", f"{manifest.scalars:,}"
    yield "training and evaluation examples", f"{manifest.train:,} and {manifest.evals:,}"
    seeds = pc.max(tables["attribution"]["seeds"]).as_py() or 0
    yield "removals, seeds, cells", f"{len(manifest.removals):,}, {seeds:,}, {len(manifest.removals) * seeds:,}"
    costs = tables["costs"].to_pylist()
    devices = sorted({str(r["device"]) for r in costs})
    yield "devices", ", ".join(devices) or "not recorded"
    spent = sum(r["device_seconds"] or 0.0 for r in costs if r["what"] != "estimator")
    yield "device-seconds of further training", f"{spent:,.1f}"
    for proof in source.proofs:
        about = proof.get("about")
        software = about.get("software") if isinstance(about, Mapping) else None
        yield "engine", proof_line(proof)
        if isinstance(software, Mapping):
            yield "software", ", ".join(f"{name} {version}" for name, version in software.items())
