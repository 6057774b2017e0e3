"""``fimo amount``: how much further training, computed, with reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fimo.orchestrator.commands.app import (
    CodeOption,
    JsonOption,
    RayOption,
    SweepArgument,
    TrustOption,
    app,
    exit_with,
    out,
    print_json,
    print_lines,
    talk,
    tell,
)
from fimo.orchestrator.commands.run import stop_on_signal


@app.command()
def amount(
    sweep: SweepArgument,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Train a few cells at other removal weights.")
    ] = True,
    address: RayOption = None,
    code: CodeOption = Path(),
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """How much further training: what each recorded amount is worth, and which to take."""
    from fimo.orchestrator.report.amount import advice_lines, amounts_json, amounts_tables, legend
    from fimo.orchestrator.report.progress import ProgressReport
    from fimo.orchestrator.resolve.at_hand import Own
    from fimo.orchestrator.run.amount import how_much
    from fimo.orchestrator.run.pool import on_ray
    from fimo.orchestrator.sweep.sweep import open_sweep

    opened, stop = open_sweep(sweep), stop_on_signal()
    with ProgressReport(talk) as progress, on_ray(address, progress.say) as where:
        found = how_much(opened, where, progress.listener, train, stop, Own(code, trust))
    values = amounts_json(found)
    if as_json:
        print_json(values)
    else:
        for table in amounts_tables(found):
            out.print(table)
        print_lines(legend(found))
        print_lines(["", *advice_lines(found)])
    for line in found.notes:
        tell(f"fimo: {line}")
    exit_with(values["exit_code"])
