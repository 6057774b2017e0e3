"""The console script: every command, and one line for each error that is the user's to mend."""

from __future__ import annotations

import gc
import io
import sys
from typing import Any

import typer

# isort: off
from fimo.orchestrator.commands import (  # noqa: F401  (each puts itself on the app, in the order of `fimo --help`)
    init,
    plan,
    run,
    resume,
    status,
    top,
    list_sweeps,
    pull,
    report,
    compare,
    rank,
    amount,
    search,
    submit,
    logs,
    cancel,
    doctor,
    verify,
    estimate,
    import_scores,
    audit,
    remove,
    schema,
)

# isort: on
from fimo.orchestrator.commands import places
from fimo.orchestrator.commands.app import app
from fimo.workers.errors import FimoError, WorkloadError, plain


def main() -> None:
    """Run ``fimo``; never a traceback for a user's mistake, nor for a terminal that lacks a character."""
    gc.set_threshold(COLLECT_EVERY)
    for stream in (sys.stdout, sys.stderr):
        # UTF-8 is left as it is: names of files that are not text go through it unharmed.
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")
    try:
        code = app(standalone_mode=False)
    except FimoError as error:
        # Where the store comes from has nothing to do with what is wrong with a workload.
        named = "" if isinstance(error, WorkloadError) else places.source()
        _say(f"{error}{named}")
        sys.exit(error.exit_code)
    except _Mistake as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            _say(_mistake(error))
        sys.exit(2)
    except typer.Abort:
        _say("nothing is done")
        sys.exit(1)
    if code == INTERRUPTED:
        _say("interrupted")
        sys.exit(3)
    sys.exit(code or 0)


COLLECT_EVERY = 10_000
"""Objects made between two looks for garbage. By Python's 700 a tenth of an import of torch goes into them."""
INTERRUPTED = 130
"""What Typer makes of a KeyboardInterrupt."""
# Typer's own name for it changes with its version.
_Mistake: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _mistake(error: Any) -> str:
    """What is wrong with a command's words, and where it is told what they can be."""
    said, context = str(error.format_message()).rstrip("."), getattr(error, "ctx", None)
    if context is None:
        return said
    sweep = any(getattr(param, "metavar", None) == "SWEEP" for param in context.command.params)
    of_store = "; a sweep is STORE/NAME" if sweep and ("--store" in said or "SWEEP" in said) else ""
    return f"{said[:1].lower()}{said[1:]}{of_store}; see `{context.command_path} --help`"


def _say(line: str) -> None:
    sys.stderr.write(f"fimo: {plain(' '.join(line.split()))}\n")
