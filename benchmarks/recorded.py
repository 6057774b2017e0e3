"""Figures kept in a Markdown file, each program's under a heading of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def told(heading: str, lines: Sequence[str], to: Path | None) -> None:
    """Print the lines under their heading, and keep them in a file if there is one to."""
    print("\n".join(["", f"## {heading}", "", *lines]))
    if to is not None:
        under_heading(to, heading, lines)


def under_heading(path: Path, heading: str, lines: Sequence[str]) -> None:
    """Put ``lines`` in place of what stands under ``## heading``; other headings stay as they are.

    Makes the file, or the heading at its end, if there is none.
    """
    before = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    section = "\n".join([f"## {heading}", "", *lines, ""])
    pattern = re.compile(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if pattern.search(before):
        # Keep a blank line before the heading that follows.
        after = pattern.sub(lambda _: section + "\n", before)
    else:
        after = before.rstrip("\n") + "\n\n" + section
    path.write_text(after.rstrip("\n") + "\n", encoding="utf-8")
