"""``fimo logs``: what a sweep's job has printed."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fimo.orchestrator.commands.app import JobOption, JsonOption, KnownHeadOption, SweepArgument, app, print_json


@app.command()
def logs(
    sweep: SweepArgument,
    job: JobOption = None,
    address: KnownHeadOption = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What a sweep's job has printed."""
    from fimo.orchestrator.cluster import jobs

    if as_json:
        # One object: with --follow it is whole once the job has ended.
        said: list[str] = []
        named = jobs.logs(sweep, job, address, follow, said.append)
        print_json({"sweep": sweep, "job": named, "text": "".join(said)})
        return

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    jobs.logs(sweep, job, address, follow, write)
