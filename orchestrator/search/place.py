"""Where trials run: Ray Tune on an embedded Ray. Imports Tune when it is entered, and not before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from fimo.orchestrator.run.kept import KeptRay
from fimo.orchestrator.sweep.manifest import Manifest

Trials = Callable[..., dict[str, str]]
"""``search.tune.run_trials`` but for its ``resources`` and ``together``."""
Place = Callable[[Manifest], contextlib.AbstractContextManager[Trials]]


@contextlib.contextmanager
def on_tune() -> Iterator[Place]:
    """Trials on an embedded Ray, with the manifest's resources for each: one for all searches of the body.

    Entering the place raises ClusterError if Ray cannot be started, and UsageError if this machine is too small for a
    trial.
    """
    with KeptRay(None) as kept:

        @contextlib.contextmanager
        def place(manifest: Manifest) -> Iterator[Trials]:
            together = kept.open(manifest)
            from fimo.orchestrator.search.tune import run_trials  # after the environment that Ray reads on import

            try:
                yield partial(run_trials, resources=manifest.spec.resources, together=together)
            except BaseException:
                # Trials may be running.
                kept.close()
                raise

        yield place
