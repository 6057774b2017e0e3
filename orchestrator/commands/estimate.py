"""``fimo estimate``: a spec's estimators without further training."""

from __future__ import annotations

from fimo.orchestrator.commands.app import (
    JsonOption,
    RayOption,
    ReplaceOption,
    RetryOption,
    SpecArgument,
    StoreOption,
    app,
    tell_store,
)
from fimo.orchestrator.commands.run import run_resolved


@app.command()
def estimate(
    spec: SpecArgument,
    store: StoreOption,
    address: RayOption = None,
    retry_failed: RetryOption = False,
    replace: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a spec's estimators alone; no further training."""
    from fimo.orchestrator.resolve.resolved import resolve
    from fimo.orchestrator.run.suited import refuse_unsuited
    from fimo.orchestrator.spec.spec import read_file
    from fimo.orchestrator.store import open_store
    from fimo.orchestrator.sweep.sweep import Sweep

    opened = open_store(store)
    resolved = resolve(read_file(spec), spec.resolve().parent)
    refuse_unsuited(resolved, Sweep(opened, resolved.spec.name))
    tell_store()
    run_resolved(resolved, opened, address, retry_failed, as_json, shards=False, replace=replace)
