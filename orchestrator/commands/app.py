"""The Typer app, the arguments that several commands take, and printing.

Results go to stdout, talk to stderr; exit 0 complete, 1 failed, 2 usage, 3 incomplete. A command reads its arguments,
calls the package and prints; it imports what computes inside its own function, so that `fimo --help` needs no torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from fimo.orchestrator.commands import places
from fimo.orchestrator.commands.console import make_console

app = typer.Typer(
    name="fimo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

# In a file or a pipe, tables are not folded to a terminal's 80 columns.
out = make_console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
talk = make_console(stderr=True)

SpecArgument = Annotated[Path, typer.Argument(metavar="SPEC", help="The sweep's spec, a YAML file.")]
SWEEP_HELP = "STORE/NAME, or NAME alone in the store FIMO_STORE."
SweepArgument = Annotated[str, typer.Argument(metavar="SWEEP", help=SWEEP_HELP, callback=places.sweep_of)]
StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="STORE",
        help="A directory or s3://bucket/prefix.",
        envvar=places.VARIABLE,
        callback=places.store_of,
    ),
]
RayOption = Annotated[str | None, typer.Option("--address", help="A running Ray; default: an embedded one.")]
RetryOption = Annotated[bool, typer.Option("--retry-failed", help="Try tasks again that were set aside.")]
ReplaceOption = Annotated[
    bool, typer.Option("--replace", help="Take the place of a sweep of this name that differs; its parts stay.")
]
CodeOption = Annotated[
    Path,
    typer.Option("--code", metavar="DIR", help="Where the workload's module and the sweep's files lie; default: here."),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust", help="Take an installed workload, and files outside that folder, where the stored sweep names them."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
HeadOption = Annotated[
    str, typer.Option("--address", metavar="URL", help="The head's dashboard, http://HEAD:8265.", envvar="FIMO_ADDRESS")
]
KnownHeadOption = Annotated[
    str | None, typer.Option("--address", metavar="URL", help="The head's dashboard; default: as submitted.")
]
JobOption = Annotated[str | None, typer.Option("--job", metavar="ID", help="Default: the sweep's latest.")]


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_lines(lines: Iterable[str]) -> None:
    """Lines of results on stdout, as they are."""
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def tell(line: str) -> None:
    """One line of talk on stderr, as it is."""
    talk.print(line, highlight=False, markup=False, soft_wrap=True)


def tell_store() -> None:
    """Say which store is used if nobody named it on the command line."""
    if said := places.source():
        tell(f"fimo: {said.strip(' ()')}")
        # An error does not say it again.
        places.forget()


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print_lines([f"fimo {version('fimo')}"])
        raise typer.Exit


@app.callback()
def begin(
    _: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Further training at cluster scale: the gold standard of training-data attribution for a final model."""
    places.forget()


def exit_with(code: int) -> None:
    """End the command with its exit code; 0 returns."""
    if code:
        raise typer.Exit(code)
