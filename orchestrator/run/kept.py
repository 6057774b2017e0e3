"""A connection to Ray for a whole command: opened when a pool is first asked for, kept until the command ends.

A run may have many rounds. An embedded Ray takes seconds to start, and its workers as long again to load torch, the
model and the data.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from types import TracebackType

from fimo.orchestrator.resolve.code import code_files, write_files
from fimo.orchestrator.run import placement
from fimo.orchestrator.run.connect import cluster
from fimo.orchestrator.run.nodes import slots
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.workers.errors import UsageError


class KeptRay:
    """An embedded Ray, or the one at ``address``; use as a context manager. Nothing is imported before ``open``."""

    def __init__(self, address: str | None) -> None:
        self._address = None if address == "local" else address
        self._opened: contextlib.ExitStack | None = None

    def __enter__(self) -> KeptRay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self, manifest: Manifest) -> int:
        """Connect, unless it is connected, with the workload's code on the nodes; how many tasks can run at once.

        Raises:
            ClusterError: Ray cannot be reached; UsageError: the embedded one is too small for a task.
        """
        if self._opened is None:
            with contextlib.ExitStack() as opening:
                code = None
                if self._address is not None:
                    code = Path(opening.enter_context(tempfile.TemporaryDirectory(prefix="fimo-code-")))
                    write_files(code_files(manifest.spec.workload, Path(manifest.beside)), code)
                opening.enter_context(cluster(self._address, code))
                self._opened = opening.pop_all()
        here, resources = slots(manifest.spec.resources), manifest.spec.resources
        if self._address is None and here < 1:
            # On a cluster a node may still come; here none will.
            raise UsageError(
                f"resources ask for {placement.in_words(resources)} a task, more than this machine has: ask for "
                "less, or use `fimo submit`"
            )
        return here

    def close(self) -> None:
        """Disconnect, and end an embedded Ray with all that still runs there; ``open`` connects anew."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            opened.close()
