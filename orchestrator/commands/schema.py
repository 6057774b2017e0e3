"""``fimo schema``: the JSON schema of a spec, for editors."""

from __future__ import annotations

import sys

from fimo.orchestrator.commands.app import JsonOption, app
from fimo.orchestrator.commands.init import SCHEMA, text_of


@app.command()
def schema(_: JsonOption = False) -> None:
    """Print the JSON schema of a spec, by which an editor completes and checks one."""
    # With --json or without: a schema is one JSON object.
    sys.stdout.write(text_of(SCHEMA))
