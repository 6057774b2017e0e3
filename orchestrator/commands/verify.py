"""``fimo verify``: are the numbers what they should be?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
)


@app.command()
def verify(
    sweep: SweepArgument,
    rerun: Annotated[int, typer.Option("--rerun", min=0, metavar="K", help="Train K random cells again here.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Which cells are chosen.")] = 0,
    code: CodeOption = Path(),
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read every part, and train some cells again: are the numbers what they should be?"""
    from fimo.orchestrator.report.verified import verification_lines
    from fimo.orchestrator.resolve.at_hand import Own
    from fimo.orchestrator.run import verification
    from fimo.orchestrator.sweep.sweep import open_sweep

    verified = verification.verify(open_sweep(sweep), rerun, seed, Own(code, trust))
    if as_json:
        print_json(verified.json())
    else:
        print_lines(verification_lines(verified))
    exit_with(verified.exit_code)
