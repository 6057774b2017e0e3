"""Where trials run: Ray Tune on an embedded Ray. Imports Tune when it is entered, and not before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from fimo.orchestrator.run.pool import connected
from fimo.orchestrator.sweep.manifest import Manifest

Trials = Callable[..., dict[str, str]]
"""``search.tune.run_trials`` but for its ``resources`` and ``together``."""
Place = Callable[[Manifest], contextlib.AbstractContextManager[Trials]]


@contextlib.contextmanager
def on_tune(manifest: Manifest) -> Iterator[Trials]:
    """Trials on an embedded Ray, with the manifest's resources for each.

    Raises:
        ClusterError: Ray cannot be started; UsageError: this machine is too small for a trial.
    """
    with connected(None, manifest) as together:
        from fimo.orchestrator.search.tune import run_trials  # after the environment that Ray reads on import

        yield partial(run_trials, resources=manifest.spec.resources, together=together)
