"""``fimo``: results on stdout, talk on stderr, exit 0 complete, 1 failed, 2 usage, 3 incomplete.

Each command reads its arguments, calls one function of the package, and prints; no command computes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from fimo.workers.errors import FimoError, UsageError
from rich.console import Console
from rich.text import Text

app = typer.Typer(
    name="fimo",
    help="Further training at cluster scale: the gold standard of training-data attribution for a final model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Where nobody watches (a file, a pipe), tables are not folded to a terminal's 80 columns.
out = Console(width=None if sys.stdout.isatty() else 160)
talk = Console(stderr=True)

SpecArgument = Annotated[Path, typer.Argument(metavar="SPEC", help="The sweep's spec, a YAML file.")]
SweepArgument = Annotated[str, typer.Argument(metavar="SWEEP", help="STORE/NAME.")]
StoreOption = Annotated[str, typer.Option("--store", metavar="STORE", help="A directory or s3://bucket/prefix.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def read_spec(path: Path) -> Any:
    """A spec file; raises UsageError."""
    from fimo.orchestrator.spec.spec import read
    from fimo.orchestrator.spec.yaml import MAX_BYTES

    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"spec {path} cannot be read: {reason}") from error
    return read(text, str(path))


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


@app.command()
def plan(
    spec: SpecArgument,
    store: Annotated[str | None, typer.Option("--store", help="Subtract what this store holds.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time a few steps: seconds and device-hours.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Cells, shards and bytes of a sweep; nothing is written."""
    from fimo.orchestrator.commands import commands
    from fimo.orchestrator.report import show

    found = commands.plan(read_spec(spec), spec.resolve().parent, store, measure)
    if as_json:
        return print_json(found)
    for line in show.plan_lines(found):
        out.print(line, highlight=False, soft_wrap=True)
    return None


@app.command()
def run(
    spec: SpecArgument,
    store: StoreOption,
    address: Annotated[str | None, typer.Option("--address", help="A running Ray; default: an embedded one.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try tasks again that were set aside.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Plan, train, estimate, reduce and score; prints the score table. Run again to compute what is missing."""
    from fimo.orchestrator.run import driver as runs
    from fimo.orchestrator.store import open_store

    opened = open_store(store)
    resolved = runs.resolve(read_spec(spec), spec.resolve().parent)
    finish(resolved, opened, address, retry_failed, as_json)


@app.command()
def resume(
    sweep: SweepArgument,
    address: Annotated[str | None, typer.Option("--address", help="A running Ray; default: an embedded one.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try tasks again that were set aside.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compute what is missing of a sweep, here or (--address http://HEAD:8265) as a job; the store has the spec."""
    from fimo.orchestrator.commands import commands

    if address is not None and address.startswith(("http://", "https://")):
        from fimo.orchestrator.cluster import jobs
        from fimo.orchestrator.commands import cli_cluster

        return cli_cluster.show_submission(jobs.resubmit(sweep, address, retry_failed), as_json)
    opened, resolved = commands.resume(sweep)
    finish(resolved, opened, address, retry_failed, as_json)
    return None


def finish(
    resolved: Any, store: Any, address: str | None, retry_failed: bool, as_json: bool, shards: bool = True
) -> None:
    """Run a resolved sweep with progress, print how it ended, and exit by it."""
    from fimo.orchestrator.commands import commands
    from fimo.orchestrator.report.progress import ProgressReport
    from fimo.orchestrator.run import driver as runs
    from fimo.orchestrator.run.pool import on_ray

    stop = _stop_on_signal()
    with ProgressReport(talk) as progress:
        report = runs.run(resolved, store, progress.listener, stop, on_ray(address), retry_failed, shards)
    if as_json:
        print_json(commands.report_json(resolved.manifest, store, report))
    else:
        commands.print_report(out, report)
    for line in commands.complaints(resolved.manifest, store, report):
        talk.print(line, highlight=False, markup=False, soft_wrap=True)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _stop_on_signal() -> Callable[[], str | None]:
    """SIGTERM and the first SIGINT end a run in good order: nothing more is started, what is committed stays."""
    seen: list[str] = []

    def note(number: int, _frame: object) -> None:
        if seen:
            os._exit(3)
        seen.append(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return lambda: f"stopped by {seen[0]}" if seen else None


@app.command()
def status(
    sweep: SweepArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every few seconds until it is complete.")] = False,
    as_json: JsonOption = False,
) -> None:
    """How far a sweep is, from the store alone."""
    from fimo.orchestrator.commands import commands
    from fimo.orchestrator.report import show

    found = _watch(sweep) if watch and not as_json else commands.status(sweep)
    if as_json:
        print_json(found)
    else:
        for line in show.status_lines(found):
            out.print(line, highlight=False, markup=False, soft_wrap=True)
    if found["exit_code"]:
        raise typer.Exit(found["exit_code"])


WATCH_EVERY_S = 5.0


def _watch(sweep: str) -> dict[str, Any]:
    """Show a sweep's status on stderr until it is complete or interrupted; a silent store is waited for."""
    from fimo.orchestrator.commands import commands
    from fimo.orchestrator.report import show
    from fimo.workers.errors import StoreError
    from rich.live import Live

    found = commands.status(sweep)
    with Live(console=talk, transient=True, auto_refresh=False) as live:
        while not found["complete"]:
            live.update(Text("\n".join(show.status_lines(found))), refresh=True)
            try:
                time.sleep(WATCH_EVERY_S)
                found = commands.status(sweep)
            except StoreError as error:
                live.update(Text(f"{error}; trying again"), refresh=True)
            except KeyboardInterrupt:
                break
    return found


@app.command()
def pull(
    sweep: SweepArgument,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where the tables go.")],
    form: Annotated[str, typer.Option("--format", help="parquet or csv.")] = "parquet",
    as_json: JsonOption = False,
) -> None:
    """Bring a sweep's tables, reduced anew where parts have come since."""
    from fimo.orchestrator.commands import commands

    found = commands.pull(sweep, to, form, lambda line: talk.print(line, highlight=False, markup=False))
    if as_json:
        print_json(found)
    else:
        for path in found["tables"].values():
            out.print(path, highlight=False, markup=False, soft_wrap=True)
    if found["exit_code"]:
        raise typer.Exit(found["exit_code"])


from fimo.orchestrator.commands import (
    cli_cluster,  # noqa: F401  (they register commands on the app above)
    cli_scores,  # noqa: F401  (they register commands on the app above)
)


def main() -> None:
    """The console script: one line for every error that is the user's to mend."""
    try:
        app(standalone_mode=True)
    except FimoError as error:
        sys.stderr.write(f"fimo: {' '.join(str(error).split())}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("fimo: interrupted\n")
        sys.exit(3)
