"""``fimo submit``: a sweep as a job of a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fimo.orchestrator.commands.app import (
    HeadOption,
    JsonOption,
    ReplaceOption,
    RetryOption,
    SpecArgument,
    StoreOption,
    app,
    print_json,
    print_lines,
    tell,
    tell_store,
)

if TYPE_CHECKING:
    from fimo.orchestrator.cluster.jobs import Submission


@app.command()
def submit(
    spec: SpecArgument,
    store: StoreOption,
    address: HeadOption,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go up; submit nothing.")] = False,
    retry_failed: RetryOption = False,
    replace: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a sweep as a job of a Ray cluster; submitting it again continues it.

    Up go the spec, the workload's module with the modules beside it that it imports, and the files that the spec
    names. Data, `.git` and environments do not: the workload finds its data on the cluster. The store's credentials
    on the cluster come from the cluster's own environment (a role, or its AWS variables), never from here.
    Ray's token comes from RAY_AUTH_TOKEN or ~/.ray/auth_token with RAY_AUTH_MODE=token.
    """
    from fimo.orchestrator.cluster import jobs
    from fimo.orchestrator.spec.spec import read_file

    parsed = read_file(spec)
    tell_store()
    submission = jobs.submit(parsed, spec.resolve().parent, store, address, retry_failed, dry_run, replace)
    show_submission(submission, as_json)


def show_submission(submission: Submission, as_json: bool) -> None:
    """A submission on stdout, and on stderr what to type next."""
    if as_json:
        print_json(submission.json())
        return
    if submission.job is None:
        print_lines(f"{file.size:>10}  {file.target}" for file in submission.files)
        tell(f"would run: {submission.entrypoint}")
        return
    print_lines([submission.job.id])
    if submission.running:
        tell(f"fimo: {' and '.join(submission.running)} computes this sweep already: they share what is left of it")
    for command in ("status --watch", "logs --follow", "cancel", "pull --to DIR"):
        verb, _, options = command.partition(" ")
        tell(f"next: fimo {verb} {submission.sweep} {options}".rstrip())
