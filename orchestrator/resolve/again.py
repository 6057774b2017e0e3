"""The workload loaded a second time, in a process of its own, and held against the first.

What is drawn without a seed, or read in the order of a set or folder, comes out otherwise in another process. Workers
would find that out after the cluster was started; ``fimo plan`` says it before anything is spent.

The process reads a spec from stdin and prints the digests that it sees.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fimo.orchestrator.resolve.differences import UNSTABLE, in_words, what_differs
from fimo.orchestrator.resolve.imports import import_to_stay
from fimo.orchestrator.spec.canonical import canonical
from fimo.orchestrator.spec.spec import Spec, parse
from fimo.workers.errors import FimoError, WorkloadError

if TYPE_CHECKING:
    from fimo.orchestrator.sweep.manifest import Manifest

PROGRAM = f"from {__name__} import second; raise SystemExit(second())"


class SecondLoad:
    """A load that goes on beside whatever the process does; ``check`` waits for it.

    Args:
        spec: as written; ``beside``: its folder.

    Attributes:
        seconds: from the start of the process until it had loaded; known after ``check``.
    """

    seconds: float = 0.0

    def __init__(self, spec: Spec, beside: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, str(beside), str(time.time())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        # A process that has ended already says why when it is waited for.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(canonical(spec.canonical()))
            self._process.stdin.close()
        # What ``communicate`` would flush once more.
        self._process.stdin = None
        self._said: tuple[str, str] | None = None

    def check(self, manifest: Manifest) -> None:
        """Refuse a workload that was not the same the second time; may be asked again.

        Raises:
            WorkloadError: it failed, or which of its parts differ.
        """
        if self._said is None:
            self._said = self._process.communicate()
        out, talk = self._said
        if self._process.returncode:
            last = (talk.strip().splitlines() or ["no output"])[-1]
            raise WorkloadError(f"the workload could be loaded once, and not a second time in another process: {last}")
        seen = json.loads(out.splitlines()[-1])
        self.seconds = float(seen["seconds"])
        other = what_differs(dict(manifest.about), seen["about"])
        if other:
            raise WorkloadError(
                f"the workload is not deterministic: loaded twice, {in_words(other)} came out otherwise; {UNSTABLE}"
            )

    def stop(self) -> None:
        """End the process, if nobody waits for it any more."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def second() -> int:
    """The process: the folder and when it was started are its arguments."""
    # The other process starts before it imports torch itself.
    import_to_stay("torch")
    from fimo.orchestrator.resolve.loading import count_evals, digests, load_here

    try:
        spec, beside = parse(json.load(sys.stdin), "the spec"), Path(sys.argv[1])
        workload, state = load_here(spec, beside)
        seen = digests(spec, beside, workload, state, count_evals(spec, workload))
    except FimoError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("\n" + json.dumps({"about": seen.about, "seconds": time.time() - float(sys.argv[2])}) + "\n")
    return 0
