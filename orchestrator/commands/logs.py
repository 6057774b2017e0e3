"""``fimo logs``: what a sweep's job has printed."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fimo.orchestrator.commands.app import JobOption, KnownHeadOption, SweepArgument, app


@app.command()
def logs(
    sweep: SweepArgument,
    job: JobOption = None,
    address: KnownHeadOption = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job ends.")] = False,
) -> None:
    """What a sweep's job has printed."""
    from fimo.orchestrator.cluster import jobs

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    jobs.logs(sweep, job, address, follow, write)
