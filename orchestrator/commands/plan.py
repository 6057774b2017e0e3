"""``fimo plan``: what a sweep consists of and costs, before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fimo.orchestrator.commands.app import JsonOption, SpecArgument, app, print_json, print_lines

TOP = 10
"""Of each sign verified, as `fimo rank` has it by default."""

if TYPE_CHECKING:
    from fimo.orchestrator.resolve.resolved import Resolved
    from fimo.orchestrator.run.plan import Plan


@app.command()
def plan(
    spec: SpecArgument,
    store: Annotated[str | None, typer.Option("--store", help="Subtract what this store holds.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time a few steps: seconds and device-hours.")] = False,
    rank: Annotated[bool, typer.Option("--rank", help="What `fimo rank` would take, in device-hours.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Cells, shards and bytes of a sweep; nothing is written."""
    from fimo.orchestrator.report.show import plan_lines
    from fimo.orchestrator.resolve.resolved import resolve
    from fimo.orchestrator.run import measure as measuring
    from fimo.orchestrator.run.owed import current_plan
    from fimo.orchestrator.run.rank_cost import rank_cost
    from fimo.orchestrator.spec.spec import read_file
    from fimo.orchestrator.store import open_store
    from fimo.orchestrator.sweep.sweep import Sweep

    parsed = read_file(spec)
    resolved = resolve(parsed, spec.resolve().parent)
    sweep = None if store is None else Sweep(open_store(store), parsed.name)
    planned = current_plan(resolved.manifest, sweep)
    values = _plan_json(resolved, planned) | (measuring.measure(resolved, planned) if measure else {})
    if rank:
        values["rank"] = rank_cost(resolved, resolved.manifest.evals, TOP)
    if as_json:
        print_json(values)
    else:
        print_lines(plan_lines(values))


def _plan_json(resolved: Resolved, planned: Plan) -> dict[str, Any]:
    import torch

    from fimo import estimators
    from fimo.orchestrator.report.show import label
    from fimo.orchestrator.run.plan import count_witnesses

    manifest, spec = resolved.manifest, resolved.spec
    kronecker = any(name.startswith("ekfac") for name, _ in manifest.estimators)
    return {
        "name": spec.name,
        "digest": manifest.digest,
        "cells": planned.cells,
        "done": planned.done,
        "shards": len(planned.shards),
        "witnesses": count_witnesses(manifest),
        "removals": len(manifest.removals),
        "seeds": spec.seeds.count,
        "evals": manifest.evals,
        "train": manifest.train,
        "scalars": manifest.scalars,
        "steps": manifest.steps[-1],
        "amounts": len(manifest.steps),
        "bytes": planned.part_bytes,
        "removal_mode": spec.further_training.removal_mode,
        "estimators": [label(*e) for e in manifest.estimators],
        "left_out": dict(manifest.left_out),
        "coverage": estimators.coverage(resolved.model(torch.device("cpu"))) if kronecker else 1.0,
    }
