"""The folder of an embedded Ray: its own, so that it never meets another Ray's, and the last one's logs can be read.

Ray keeps a folder for each session and never removes one. Here each embedded cluster has a folder that its process
holds a lock on; whoever starts the next one removes those that nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

LOCK = "lock"
LONGEST = 20
"""Bytes of the folder for temporary files; Ray and this module add 87."""


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """A new folder for an embedded Ray, held for the body; it stays until the next one is made."""
    root = _root()
    root.mkdir(mode=0o700, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="", dir=root))
    lock = os.open(folder / "new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Only now under its name: what nobody holds is removed.
        os.rename(folder / "new", folder / LOCK)
        _remove_left(root, folder)
        yield folder
    finally:
        os.close(lock)


def _remove_left(root: Path, own: Path) -> None:
    """Remove the folders whose processes have ended."""
    for folder in root.iterdir():
        if folder == own:
            continue
        with contextlib.suppress(OSError):
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _root() -> Path:
    """Where the folders lie: short, since Ray puts sockets into them, whose paths may have 107 bytes."""
    wanted = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    return (wanted if len(os.fsencode(wanted)) <= LONGEST else Path("/tmp")) / f"fimo-ray-{os.getuid()}"
