"""``fimo cancel``: stop a sweep's jobs."""

from __future__ import annotations

from fimo.orchestrator.commands.app import (
    JobOption,
    JsonOption,
    KnownHeadOption,
    SweepArgument,
    app,
    print_json,
    print_lines,
    tell,
)


@app.command()
def cancel(
    sweep: SweepArgument, job: JobOption = None, address: KnownHeadOption = None, as_json: JsonOption = False
) -> None:
    """Stop a sweep's jobs; deletes nothing, `fimo resume` goes on."""
    from fimo.orchestrator.cluster import jobs

    stopped = jobs.cancel(sweep, job, address)
    if as_json:
        print_json({"stopped": [{"job": number, "status": status} for number, status in stopped]})
        return
    print_lines(f"{number} {status}" for number, status in stopped)
    if not stopped:
        tell("no job of this sweep is running")
