"""``fimo top``: the removals that matter most for an evaluation example."""

from __future__ import annotations

from typing import Annotated

import typer

from fimo.orchestrator.commands.app import JsonOption, SweepArgument, app, out, print_json, print_lines, tell


@app.command()
def top(
    sweep: SweepArgument,
    number: Annotated[int, typer.Option("--eval", metavar="K", min=0, help="The evaluation example, from 0.")] = 0,
    step: Annotated[int | None, typer.Option("--step", help="The amount; default: the last.")] = None,
    count: Annotated[int, typer.Option("--top", min=1, help="Removals of each sign.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """The most helpful and harmful removals of an evaluation example: removing a helpful one raises g."""
    from fimo.orchestrator.report.top import top_json, top_lines, top_table
    from fimo.orchestrator.run.gather import current_tables
    from fimo.orchestrator.sweep.sweep import open_sweep
    from fimo.orchestrator.tables.top import top as found

    opened = open_sweep(sweep)
    tables, _ = current_tables(opened, opened.read_manifest(), tell)
    effects = found(tables, number, step)
    if as_json:
        print_json(top_json(effects, count))
        return
    print_lines(top_lines(effects))
    out.print(top_table(effects, count))
    if any(e.told is not True for part in effects.shown(count) for e in part):
        print_lines(["?: cannot be told from zero"])
