"""``fimo plan``: what a sweep consists of and costs, before anything is computed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fimo.orchestrator.commands import places
from fimo.orchestrator.commands.app import JsonOption, app, exit_with, print_json, print_lines, tell, tell_store

RELIABILITY = 0.95
"""Wanted of a sweep's seeds, if nothing is said."""
TOP = 10
"""Of each sign verified, as `fimo rank` has it by default."""

if TYPE_CHECKING:
    from fimo.orchestrator.resolve.resolved import Resolved
    from fimo.orchestrator.run.plan import Plan
    from fimo.orchestrator.spec.spec import Spec
    from fimo.orchestrator.sweep.sweep import Sweep


@app.command()
def plan(
    spec: Annotated[Path | None, typer.Argument(metavar="SPEC", help="The sweep's spec, a YAML file.")] = None,
    store: Annotated[
        str | None,
        typer.Option(
            "--store", help="Subtract what this store holds.", envvar=places.VARIABLE, callback=places.store_of
        ),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time a shard and every estimator: device-hours.")] = False,
    rank: Annotated[bool, typer.Option("--rank", help="What `fimo rank` would take, in device-hours.")] = False,
    of: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="SWEEP",
            help="Seeds that this sweep needs, instead of a spec's plan.",
            callback=places.sweep_of,
        ),
    ] = None,
    reliability: Annotated[float | None, typer.Option(help="With --from: wanted; default .95, or no --sem.")] = None,
    sem: Annotated[float | None, typer.Option(help="With --from: standard error wanted, in units of g.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Cells, shards, bytes and faults of a sweep, or how many seeds it needs; nothing is written."""
    if of is not None:
        _seeds(of, spec, reliability, sem, as_json)
        return
    from fimo.orchestrator.spec.spec import read_file
    from fimo.workers.errors import UsageError

    if spec is None:
        raise UsageError("give a SPEC, or --from SWEEP for the seeds that a sweep needs")
    if reliability is not None or sem is not None:
        raise UsageError("--reliability and --sem go with --from SWEEP")
    values = _planned(read_file(spec), spec.resolve().parent, store, measure, rank)
    values["exit_code"] = 2 if values["unsuited"] or values["too_large"] else 0
    tell_store()
    if as_json:
        print_json(values)
    else:
        from fimo.orchestrator.report.planned import plan_lines

        print_lines(plan_lines(values))
    for name, why in values["unsuited"].items():
        tell(f"fimo: estimator {name} does not apply: {why}; leave it out of the spec's estimators")
    for name, why in values["too_large"].items():
        tell(f"fimo: estimator {name} is {why}: leave it out, or plan where the sweep will run")
    exit_with(values["exit_code"])


def _planned(spec: Spec, beside: Path, store: str | None, measure: bool, rank: bool) -> dict[str, Any]:
    """All that a plan says, for ``--json``; the workload is loaded twice, the second time in another process."""
    from fimo.orchestrator.resolve.again import SecondLoad

    again = SecondLoad(spec, beside)
    try:
        # Only now: torch is imported here and there at the same time.
        from fimo.orchestrator.resolve.imports import import_to_stay

        import_to_stay("torch")
        from fimo.orchestrator.report.show import label
        from fimo.orchestrator.resolve.resolved import resolve
        from fimo.orchestrator.run.owed import current_plan
        from fimo.orchestrator.run.suited import judged
        from fimo.orchestrator.store import open_store
        from fimo.orchestrator.sweep.sweep import Sweep

        resolved = resolve(spec, beside)
        check = partial(again.check, resolved.manifest)
        try:
            sweep = None if store is None else Sweep(open_store(store), spec.name)
            planned = current_plan(resolved.manifest, sweep)
            if resolved.manifest.estimators:
                # What torch.func.grad imports when it is first called.
                import_to_stay("torch._dynamo")
            found = judged(resolved, before_memory=check)
        except Exception:
            # A workload that is not the same twice is told first, whatever came of it here.
            check()
            raise
    finally:
        again.stop()
    values, named = _plan_json(resolved, planned), spec.estimators is not None
    values["unsuited"] = {label(*of): why for of, why in found.unsuited.items()}
    values["too_large"] = {label(*of): why for of, why in found.too_large.items()} if named else {}
    if not named:
        values["left_out"] |= {label(*of): why for of, why in found.too_large.items()}
    values["unused"] = {} if sweep is None else _unused(resolved, sweep)
    if measure and not found.unsuited:
        from fimo.orchestrator.run.measure import measure as timed
        from fimo.orchestrator.run.measure import measured_json

        values |= measured_json(timed(resolved, planned, sweep, tell), again.seconds)
    if rank:
        from fimo.orchestrator.run.rank_cost import rank_cost

        values["rank"] = rank_cost(resolved, resolved.manifest.evals, TOP)
    return values


def _unused(resolved: Resolved, sweep: Sweep) -> dict[str, Any]:
    """Parts that the store holds of another digest, and what has changed since; empty if there are none."""
    from fimo.orchestrator.resolve.differences import since
    from fimo.workers.errors import FimoError

    try:
        there = sweep.read_manifest()
    except FimoError:
        return {}
    if there.digest == resolved.manifest.digest:
        return {}
    cells = sum(len(held) for held in sweep.done(there, sweep.list_parts(there.digest)).values())
    return {"cells": cells, "changed": since(there, resolved.manifest)}


def _seeds(uri: str, spec: Path | None, reliability: float | None, sem: float | None, as_json: bool) -> None:
    from fimo.orchestrator.report.planned import seeds_lines
    from fimo.orchestrator.run.seeds import needed_seeds
    from fimo.orchestrator.sweep.sweep import open_sweep
    from fimo.workers.errors import UsageError

    if spec is not None:
        raise UsageError("give a SPEC or --from SWEEP, not both")
    if reliability is not None and not 0 < reliability < 1:
        raise UsageError(f"--reliability lies between 0 and 1, not {reliability:g}")
    if sem is not None and not sem > 0:
        raise UsageError(f"--sem is above 0, not {sem:g}")
    wanted = RELIABILITY if reliability is None and sem is None else reliability
    values = needed_seeds(open_sweep(uri), wanted, sem)
    if as_json:
        print_json(values)
    else:
        print_lines(seeds_lines(values))


def _plan_json(resolved: Resolved, planned: Plan) -> dict[str, Any]:
    import torch

    from fimo import estimators
    from fimo.orchestrator.report.planned import until
    from fimo.orchestrator.report.show import labels
    from fimo.orchestrator.run.witness_plan import count_witnesses, witness_share

    manifest, spec = resolved.manifest, resolved.spec
    kronecker = any(name.startswith("ekfac") for name, _ in manifest.estimators)
    return {
        "name": spec.name,
        "digest": manifest.digest,
        "cells": planned.cells,
        "done": planned.done,
        "shards": len(planned.shards),
        "witnesses": count_witnesses(manifest),
        "witness_share": witness_share(manifest),
        "removals": len(manifest.removals),
        "seeds": spec.seeds.count,
        "until": until(spec.seeds),
        "evals": manifest.evals,
        "train": manifest.train,
        "scalars": manifest.scalars,
        "steps": manifest.steps[-1],
        "amounts": len(manifest.steps),
        "bytes": planned.part_bytes,
        "removal_mode": spec.further_training.removal_mode,
        "removal_weight": spec.further_training.removal_weight,
        "idle_gpus": torch.cuda.device_count() if torch.cuda.is_available() and not spec.resources.gpus else 0,
        "estimators": list(labels(manifest.estimators).values()),
        "left_out": dict(manifest.left_out),
        "coverage": estimators.coverage(resolved.model(torch.device("cpu"))) if kronecker else 1.0,
    }
