"""``fimo remove``: a sweep and all its results, deleted."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fimo.orchestrator.commands import places
from fimo.orchestrator.commands.app import JsonOption, SweepArgument, app, exit_with, print_json, tell


@app.command()
def remove(
    sweep: SweepArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete a sweep with all its results from its store, for good; asks before it does."""
    from fimo.orchestrator.run.heartbeat import drivers
    from fimo.orchestrator.sweep import remove as removing
    from fimo.orchestrator.sweep.sweep import open_sweep
    from fimo.workers.errors import UsageError

    opened = open_sweep(sweep)
    entries = removing.contents(opened)
    total = sum(entry.size for entry in entries)
    about = f"{opened.uri}: {len(entries)} objects, {total:,} bytes"
    for driver in drivers(opened):
        if not driver["silent"]:
            raise UsageError(
                f"a run goes on (process {driver.get('pid')} on {driver.get('host')}, heard "
                f"{driver['age_s']:.0f} s ago): end it first, `fimo cancel` a job"
            )
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"nothing is removed: nobody is there to be asked about {about}; give --yes")
        if not typer.confirm(f"Remove {about}, for good{places.source()}?", err=True):
            tell("nothing is removed")
            exit_with(3)
    removing.remove(opened, entries)
    if as_json:
        print_json({"sweep": opened.uri, "objects": len(entries), "bytes": total})
    else:
        tell(f"removed {about}")
