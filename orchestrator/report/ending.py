"""How a run ended: as plain values for ``--json``, and as the lines that a reader of the tables must know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fimo.orchestrator.report.show import label
from fimo.orchestrator.run.driver import Report

SHOWN = 3
"""Tasks set aside that are told one by one."""


def report_json(report: Report) -> dict[str, Any]:
    """A run's end as plain values, with the scores against all seeds."""
    gathered = report.gathered
    scores = gathered.tables["scores"].to_pylist()
    seeds = max((r["seeds"] for r in scores), default=0)
    return {
        "sweep": report.sweep,
        "cells": gathered.cells,
        "done": gathered.done,
        "computed": sum(r.cells for r in report.outcome.receipts),
        "complete": report.complete,
        "warnings": gathered.warnings,
        "diverged": len(gathered.diverged),
        "failed": [failure.line for failure in report.failures.aside],
        "left_out": {name: why for (name, _), why in report.failures.left_out.items()},
        "witnesses_left_out": {str(seed): why for seed, why in report.failures.witnesses.items()},
        "stopped": report.outcome.stopped,
        "lacking": report.lacking,
        "part_of_a_larger": report.larger,
        "tables": report.written,
        "scores": [r for r in scores if r["seeds"] == seeds],
        "exit_code": report.exit_code,
    }


def complaints(report: Report) -> Iterator[str]:
    """One line for each thing that a reader of the tables must know; the last says how to go on, if that can help."""
    gathered, outcome = report.gathered, report.outcome
    if report.larger:
        yield (
            f"{report.sweep} holds more than this spec asks for, and its tables stay as they are: the scores of this "
            "run are of this spec's part alone (--replace makes the sweep as small)"
        )
    for named, why in report.failures.left_out.items():
        yield f"{label(*named)} is left out of the default estimators: {why}"
    if outcome.broken:
        kept = f"; what is committed stays, and once that is mended `{again(report)}` goes on" if gathered.done else ""
        yield f"stopped: {outcome.stopped}{kept}"
    elif outcome.stopped:
        yield f"{outcome.stopped}; `{again(report)}` goes on"
    yield from _set_aside(report)
    if gathered.diverged:
        number, seed, step = gathered.diverged[0]
        who = "the baseline" if number < 0 else f"removal {number}"
        yield (
            f"{len(gathered.diverged)} results are not finite and were left out, the first: {who}, seed {seed}, "
            f"step {step}; lower the learning rate or clip"
        )
    if len(gathered.devices) > 1:
        devices = ", ".join(gathered.devices)
        yield f"parts come from several devices ({devices}): differences between them are noise"
    if not report.shards and gathered.done < gathered.cells:
        yield (
            f"estimates alone: {gathered.cells - gathered.done} cells are not trained, without which nothing is "
            f"scored; `fimo run SPEC --store {report.sweep.rpartition('/')[0]}` trains them"
        )
    cells, estimators, witnesses = report.owed_cells, report.owed_estimators, report.owed_witnesses
    if report.lacking:
        yield report.lacking
    elif (cells or estimators or witnesses) and not outcome.broken:
        owed = (f"{cells} cells and " if report.shards else "") + f"{estimators} estimators"
        owed += f" and {witnesses} witnesses" if witnesses else ""
        yield f"incomplete: {owed} are missing; `{again(report)}` computes them"


def again(report: Report) -> str:
    """The command that goes on: a resume would also train the cells of a sweep that was only to be estimated."""
    if report.shards:
        return f"fimo resume {report.sweep}"
    return f"fimo estimate SPEC --store {report.sweep.rpartition('/')[0]}"


def listed_tables(report: Report) -> list[str]:
    """The URIs of the tables that have rows."""
    return [uri for name, uri in report.written.items() if report.gathered.tables[name].num_rows]


def _set_aside(report: Report) -> Iterator[str]:
    aside = report.failures.aside
    for failure in aside[:SHOWN]:
        yield f"set aside: {failure.line}"
    if len(aside) > SHOWN:
        yield f"and {len(aside) - SHOWN} more set aside"
    if any(failure.final for failure in aside):
        yield (
            "an estimator that cannot give values for this model fails the same way every time: change its "
            "hyper-parameters in the spec, or take it out"
        )
    others = [failure for failure in aside if not failure.final]
    if others and all(failure.memory for failure in others):
        yield (
            "what ran out of memory does so again on the same machine: give it more, or train fewer cells together "
            f"(resources: {{replicas: 1}}), and only then `{again(report)} --retry-failed`"
        )
    elif others:
        yield f"the traceback is under {report.sweep}/failed; `{again(report)} --retry-failed` tries again"
