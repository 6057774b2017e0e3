"""The console script: every command, and one line for each error that is the user's to mend."""

from __future__ import annotations

import io
import sys

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
from fimo.workers.errors import FimoError, WorkloadError


def main() -> None:
    """Run ``fimo``; never a traceback for a user's mistake, nor for a terminal that lacks a character."""
    for stream in (sys.stdout, sys.stderr):
        # UTF-8 is left as it is: names of files that are not text go through it unharmed.
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")
    try:
        app(standalone_mode=True)
    except FimoError as error:
        # Where the store comes from has nothing to do with what is wrong with a workload.
        named = "" if isinstance(error, WorkloadError) else places.source()
        sys.stderr.write(f"fimo: {' '.join(str(error).split())}{named}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("fimo: interrupted\n")
        sys.exit(3)
