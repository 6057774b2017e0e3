"""Where a store or a sweep of the command line is, if ``FIMO_STORE`` says part of it: the default of every STORE.

A SWEEP that is a bare NAME lies in that store, unless a sweep of the name lies in the current folder. Whoever is told
of the store is told that the variable named it.
"""

from __future__ import annotations

import os

import typer

VARIABLE = "FIMO_STORE"

# Of the command that runs: one a process.
_named: list[str] = []


def store_of(ctx: typer.Context, param: typer.CallbackParam, value: str | None) -> str | None:
    """A STORE as given, noted if it comes from the variable."""
    source = ctx.get_parameter_source(param.name or "")
    # By name: which module's enumeration it is depends on typer's version.
    if source is not None and source.name == "ENVIRONMENT":
        _note(value)
    return value


def sweep_of(value: str | None) -> str | None:
    """SWEEP as STORE/NAME: a bare NAME in the store of the variable, if there is one."""
    store = os.environ.get(VARIABLE)
    if not store or not value or "/" in value or ":" in value:
        return value
    if os.path.isfile(os.path.join(value, "sweep.json")):
        return value
    _note(store)
    return f"{store.rstrip('/')}/{value}"


def _note(store: str | None) -> None:
    _named[:] = [store] if store else []


def source() -> str:
    """ " (STORE is FIMO_STORE's)" for a line about a store that the variable named; empty otherwise."""
    return f" ({_named[0]} is {VARIABLE}'s)" if _named else ""


def forget() -> None:
    """A new command begins."""
    _named.clear()
