"""``fimo`` as from a shell, in this process: its exit code, its results and its talk."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Shell = Callable[..., Ended]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Call it with a command's words."""
    from fimo.orchestrator.commands import places
    from fimo.orchestrator.commands.main import main

    def fimo(*words: object) -> Ended:
        places.forget()
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["fimo", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return Ended(code, said.out, said.err)

    return fimo
