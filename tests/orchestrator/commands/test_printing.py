"""What commands print can be copied: no terminal is so narrow that a path or a command is folded in the middle."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from fimo.orchestrator.commands import app
from fimo.orchestrator.commands import pull as pulling
from fimo.orchestrator.store import open_store
from tests.support.small_sweep import make_spec, run_here


@pytest.fixture
def narrow(monkeypatch) -> io.StringIO:
    """A terminal of 40 columns, for results and for talk."""
    text = io.StringIO()
    for name in ("out", "talk"):
        monkeypatch.setattr(app, name, Console(file=text, width=40, force_terminal=True, no_color=True))
    return text


def test_a_pulled_file_and_the_command_that_goes_on_are_one_line_each(beside, tmp_path, narrow):
    turns = iter([None] * 5 + ["stopped"] * 99)
    store = tmp_path / "a-folder-whose-name-is-longer-than-the-terminal-is-wide"
    run_here(make_spec(), beside, open_store(str(store)), should_stop=lambda: next(turns))
    to = tmp_path / "another-folder-whose-name-is-longer-than-the-terminal"
    with pytest.raises(app.typer.Exit):
        pulling.pull(f"{store}/flowers", to, "csv", False)
    lines = narrow.getvalue().splitlines()
    assert f"{to}/attribution.csv" in lines
    assert any(f"`fimo resume {store}/flowers` computes the rest" in line for line in lines)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_lacks_a_character_ends_no_command_with_a_traceback(encoding):
    done = subprocess.run(
        [sys.executable, "-c", "from fimo.orchestrator.commands.main import main; main()", "schema"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode(encoding)
    assert json.loads(text)["properties"]
    # The schema has the word for the final model's parameters, and no terminal but one of UTF-8 does.
    assert ("\N{GREEK SMALL LETTER THETA}" in text) == (encoding == "utf-8")
