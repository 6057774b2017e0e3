"""``fimo run``: a sweep from its spec to its tables, here."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from fimo.orchestrator.commands.app import (
    JsonOption,
    RayOption,
    ReplaceOption,
    RetryOption,
    SpecArgument,
    StoreOption,
    app,
    exit_with,
    out,
    print_json,
    print_lines,
    talk,
    tell,
    tell_store,
)

if TYPE_CHECKING:
    from fimo.orchestrator.resolve.resolved import Resolved
    from fimo.orchestrator.store import Store


@app.command()
def run(
    spec: SpecArgument,
    store: StoreOption,
    address: RayOption = None,
    retry_failed: RetryOption = False,
    replace: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Plan, train, estimate, reduce and score; prints the score table. Run again to compute what is missing."""
    from fimo.orchestrator.resolve.imports import import_to_stay
    from fimo.orchestrator.spec.spec import read_file
    from fimo.orchestrator.store import open_store

    opened = open_store(store)
    parsed = read_file(spec)
    # Only now: a mistake in the spec is told before torch is imported.
    import_to_stay("torch")
    from fimo.orchestrator.resolve.resolved import resolve
    from fimo.orchestrator.run.suited import refuse_unsuited
    from fimo.orchestrator.sweep.sweep import Sweep

    resolved = resolve(parsed, spec.resolve().parent)
    tell_store()
    if parsed.further_training.removal_mode is None and resolved.spec.further_training.removal_mode == "mask":
        tell("removal mode mask: this model's training forward mixes the examples of a batch")
    refuse_unsuited(resolved, Sweep(opened, parsed.name))
    run_resolved(resolved, opened, address, retry_failed, as_json, replace=replace)


def run_resolved(
    resolved: Resolved,
    store: Store,
    address: str | None,
    retry_failed: bool,
    as_json: bool,
    shards: bool = True,
    replace: bool = False,
) -> None:
    """Run a resolved sweep with progress, print how it ended, and exit by it."""
    from fimo.orchestrator.report.ending import complaints, listed_tables, report_json
    from fimo.orchestrator.report.progress import ProgressReport
    from fimo.orchestrator.report.scores import score_tables, sure_lines
    from fimo.orchestrator.run import driver
    from fimo.orchestrator.run.pool import on_ray

    stop = stop_on_signal()
    with ProgressReport(talk, cells=shards) as progress, on_ray(address, progress.say) as where:
        report = driver.run(resolved, store, progress.listener, stop, where, retry_failed, shards, replace)
    if as_json:
        print_json(report_json(report))
    else:
        print_lines(report.gathered.warnings)
        tables, weight = report.gathered.tables, resolved.spec.further_training.removal_weight
        print_lines(sure_lines(tables))
        coverage = report.gathered.coverage
        for table in score_tables(tables["scores"], tables["costs"], coverage, weight, out.width, out.encoding):
            out.print(table)
        print_lines(listed_tables(report))
    for line in complaints(report):
        tell(f"fimo: {line}")
    exit_with(report.exit_code)


def stop_on_signal() -> Callable[[], str | None]:
    """SIGTERM and the first SIGINT end a run in good order: nothing more is started, what is committed stays."""
    seen: list[str] = []

    def note(number: int, _frame: object) -> None:
        if seen:
            os._exit(3)
        seen.append(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return lambda: f"stopped by {seen[0]}" if seen else None
