"""fimo's exceptions: each message is one line that names the mistake and the mend."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Control characters but line breaks and tabs, and what turns the direction of text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class FimoError(Exception):
    """Base of everything that fimo raises on purpose; the CLI prints it in one line and exits 1."""

    exit_code = 1


class UsageError(FimoError):
    """What the user wrote (a spec, an argument) is wrong; exit 2."""

    exit_code = 2


class WorkloadError(FimoError):
    """The workload, its data or its final model does not keep the contract."""


class StoreError(FimoError):
    """The store cannot be reached, read or written, or holds something foreign."""


class DivergedError(FimoError):
    """A number that must be finite is not."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the nearest known name, whatever its case, or the list of known names."""
    names = sorted(known)
    folded = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    return f" (did you mean '{folded[close[0]]}'?)" if close else f" (known: {', '.join(names)})"


def plain(text: str) -> str:
    """Text of somebody else's without the characters that move a terminal's cursor, colour it or turn its text."""
    return _CONTROL.sub("", text)


def of_labels(error: BaseException) -> str:
    """Of a loss that finds a class that the model has not: that it is this; empty for any other error."""
    out = isinstance(error, IndexError | RuntimeError) and "Target" in str(error) and "out of bounds" in str(error)
    return "a label is of no class that the model's outputs have (classes count from 0)" if out else ""


def in_a_line(error: BaseException) -> str:
    """The kind of an error that is not ours, and the first line of what it says."""
    first = (str(error).strip().splitlines() or [""])[0]
    return plain(f"{type(error).__name__}: {first}")
