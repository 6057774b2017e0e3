"""The commands about clusters: submit, logs, cancel, doctor, verify; registered on the same app as ``cli``'s."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from fimo.orchestrator.commands.cli import (
    JsonOption,
    SpecArgument,
    StoreOption,
    SweepArgument,
    app,
    out,
    print_json,
    read_spec,
    talk,
)

HeadOption = Annotated[
    str, typer.Option("--address", metavar="URL", help="The head's dashboard, http://HEAD:8265.", envvar="FIMO_ADDRESS")
]
KnownHeadOption = Annotated[
    str | None, typer.Option("--address", metavar="URL", help="The head's dashboard; default: as submitted.")
]
JobOption = Annotated[str | None, typer.Option("--job", metavar="ID", help="Default: the sweep's latest.")]


@app.command()
def submit(
    spec: SpecArgument,
    store: StoreOption,
    address: HeadOption,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go up; submit nothing.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try tasks again that were set aside.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a sweep as a job of a Ray cluster; submitting it again continues it.

    Up go the spec, the workload's module with the modules beside it that it imports, and the files that the spec
    names. Data, `.git` and environments do not: the workload finds its data on the cluster. The store's credentials
    on the cluster come from the cluster's own environment (a role, or its AWS variables), never from here.
    Ray's token comes from RAY_AUTH_TOKEN or ~/.ray/auth_token with RAY_AUTH_MODE=token.
    """
    from fimo.orchestrator.cluster import jobs

    found = jobs.submit(read_spec(spec), spec.resolve().parent, store, address, retry_failed, dry_run)
    show_submission(found, as_json)


def show_submission(found: Any, as_json: bool) -> None:
    """A submission on stdout, and on stderr what to type next."""
    if as_json:
        return print_json(found.json())
    if found.job is None:
        for file in found.files:
            _print(f"{file.size:>10}  {file.target}")
        return talk.print(f"would run: {found.entrypoint}", highlight=False, markup=False, soft_wrap=True)
    _print(found.job.id)
    for command in ("status --watch", "logs --follow", "cancel", "pull --to DIR"):
        verb, _, options = command.partition(" ")
        line = f"fimo {verb} {found.sweep} {options}".rstrip()
        talk.print(f"next: {line}", highlight=False, markup=False, soft_wrap=True)
    return None


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


@app.command()
def cancel(
    sweep: SweepArgument, job: JobOption = None, address: KnownHeadOption = None, as_json: JsonOption = False
) -> None:
    """Stop a sweep's jobs; deletes nothing, `fimo resume` goes on."""
    from fimo.orchestrator.cluster import jobs

    found = jobs.cancel(sweep, job, address)
    if as_json:
        return print_json({"stopped": [{"job": number, "status": status} for number, status in found]})
    for number, status in found:
        _print(f"{number} {status}")
    if not found:
        talk.print("no job of this sweep is running", highlight=False)
    return None


@app.command()
def doctor(
    store: Annotated[str | None, typer.Option("--store", metavar="STORE", help="Check this store.")] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="Check this Ray (http://HEAD:8265 from outside, auto on a node); else here."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What would fail later, found now."""
    from fimo.orchestrator.cluster import doctor as checks

    found = checks.examine(store, address)
    if as_json:
        print_json({"checks": [check.json() for check in found], "ok": all(check.ok for check in found)})
    else:
        for check in found:
            _print(check.line())
    if not all(check.ok for check in found):
        raise typer.Exit(1)


@app.command()
def verify(
    sweep: SweepArgument,
    rerun: Annotated[int, typer.Option("--rerun", min=0, metavar="K", help="Train K random cells again here.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Which cells are chosen.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Read every part, and train some cells again: are the numbers what they should be?"""
    from fimo.orchestrator.run import verification

    found = verification.verify(sweep, rerun, seed)
    if as_json:
        print_json(found.json())
    else:
        for line in found.lines():
            _print(line)
    if found.exit_code:
        raise typer.Exit(found.exit_code)


def _print(line: str) -> None:
    out.print(line, highlight=False, markup=False, soft_wrap=True)
