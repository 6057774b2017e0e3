"""``fimo report``: a sweep as one page, and its figures as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fimo.orchestrator.commands.app import (
    CodeOption,
    JsonOption,
    SweepArgument,
    TrustOption,
    app,
    exit_with,
    print_json,
    print_lines,
    talk,
    tell,
)


@app.command()
def report(
    sweep: SweepArgument,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where report.html and figures/ go.")],
    evals: Annotated[
        list[int] | None, typer.Option("--eval", metavar="K", help="An evaluation example to show; may be repeated.")
    ] = None,
    step: Annotated[int | None, typer.Option("--step", help="The amount; default: the last.")] = None,
    count: Annotated[int, typer.Option("--top", min=1, help="Training examples of each sign.")] = 5,
    code: CodeOption = Path(),
    trust: TrustOption = False,
    render: Annotated[
        str | None,
        typer.Option(
            "--render", metavar="MODULE:FUNCTION", help="Shows an example, in place of the workload's own render."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained page, and its figures as PDF and PNG: what matters, how sure, which estimator."""
    from fimo.orchestrator.report.opened import report_on
    from fimo.orchestrator.resolve.at_hand import Own

    with talk.status("reading the sweep") as status:
        written, complete = report_on(sweep, to, evals, step, count, Own(code, trust), render, tell, status.update)
    for line in written.lines:
        tell(f"fimo: {line}")
    if not complete:
        tell("fimo: the sweep is not complete: the report shows what is there")
    code_ = 0 if complete else 3
    if as_json:
        values: dict[str, Any] = {
            "report": str(written.page),
            "figures": [str(path) for path in written.figures],
            "evals": written.evals,
            "step": written.step,
            "complete": complete,
            "exit_code": code_,
        }
        print_json(values)
    else:
        print_lines([str(written.page)])
    exit_with(code_)
