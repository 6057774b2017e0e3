"""``fimo status``: how far a sweep is, from the store alone."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fimo.orchestrator.commands.app import (
    JsonOption,
    SweepArgument,
    app,
    exit_with,
    print_json,
    print_lines,
    talk,
    tell,
)

if TYPE_CHECKING:
    from fimo.orchestrator.cluster.jobs import Job
    from fimo.orchestrator.sweep.sweep import Sweep

WATCH_EVERY_S = 5.0
ASK_HEAD_EVERY_S = 15.0


@app.command()
def status(
    sweep: SweepArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every few seconds until it is complete.")] = False,
    as_json: JsonOption = False,
) -> None:
    """How far a sweep is, from the store alone."""
    from fimo.orchestrator.report.status import status_lines
    from fimo.orchestrator.sweep.sweep import open_sweep

    opened = open_sweep(sweep)
    values = _watch(opened) if watch and not as_json else _look(opened)
    if as_json:
        print_json(values)
    else:
        print_lines(status_lines(values))
    exit_with(values["exit_code"])


def _look(sweep: Sweep) -> dict[str, Any]:
    """A sweep's status; says on stderr what it waits for."""
    from fimo.orchestrator.run.status import sweep_status
    from fimo.orchestrator.store.watched import WatchedStore
    from fimo.orchestrator.sweep.sweep import Sweep
    from fimo.workers.errors import UsageError

    with WatchedStore(sweep.store, tell) as watched:
        opened = Sweep(watched, sweep.name)
        try:
            return sweep_status(opened)
        except UsageError as error:
            from fimo.orchestrator.cluster import jobs

            if submitted := jobs.recorded(opened):
                raise UsageError(_not_begun(opened, submitted[-1])) from error
            raise


def _watch(sweep: Sweep) -> dict[str, Any]:
    """Show a sweep's status on stderr until it is complete or interrupted.

    Waits for a store that does not answer, and for a job that was submitted and has not begun.

    Raises:
        UsageError: there is no such sweep, and no job of it.
        JobError: its job ended before the sweep was complete.
    """
    from rich.live import Live
    from rich.text import Text

    from fimo.orchestrator.report.status import status_lines
    from fimo.orchestrator.run.status import sweep_status
    from fimo.workers.errors import StoreError, UsageError, plain

    values: dict[str, Any] | None = None
    asked_at = time.monotonic()
    with Live(console=talk, transient=True, auto_refresh=False) as live:
        while True:
            try:
                values = sweep_status(sweep)
                lines = status_lines(values)
            except StoreError as error:
                lines = [f"{error}; trying again"]
            except UsageError:
                lines = [_submitted(sweep)]
            live.update(Text(plain("\n".join(lines))), refresh=True)
            if values is not None and values["complete"]:
                return values
            running = values is not None and any(not driver["silent"] for driver in values["drivers"])
            if not running and time.monotonic() - asked_at > ASK_HEAD_EVERY_S:
                asked_at = time.monotonic()
                _refuse_ended(sweep)
            try:
                time.sleep(WATCH_EVERY_S)
            except KeyboardInterrupt:
                if values is None:
                    raise
                return values


def _submitted(sweep: Sweep) -> str:
    """That a sweep's job has not begun; raises UsageError if there is none."""
    from fimo.orchestrator.cluster import jobs

    submitted = jobs.recorded(sweep)
    if not submitted:
        sweep.read_manifest()
    return _not_begun(sweep, submitted[-1])


def _not_begun(sweep: Sweep, job: Job) -> str:
    return (
        f"job {job.id} of {sweep.uri} was submitted {age_of(job.when)} ago and has not begun: the head installs "
        "its code, or waits for a place to run; `fimo logs` shows what it says"
    )


def _refuse_ended(sweep: Sweep) -> None:
    """Say so if the job has ended and nobody computes the sweep: there is nothing more to watch."""
    from fimo.orchestrator.cluster import jobs
    from fimo.orchestrator.cluster.head import JobError

    latest = jobs.latest_state(sweep)
    if latest is not None and latest[1] in jobs.ENDED and latest[1] != "SUCCEEDED":
        raise JobError(
            f"job {latest[0].id} has ended ({latest[1]}) and the sweep is not complete: `fimo logs {sweep.uri}` shows "
            f"why, `fimo resume {sweep.uri} --address {latest[0].address}` goes on"
        )


def age_of(when: str) -> str:
    """How long ago a moment in ISO 8601 was."""
    from fimo.orchestrator.report.show import duration

    try:
        return duration(max(0.0, (datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds()))
    except (ValueError, TypeError):
        return "some time"
