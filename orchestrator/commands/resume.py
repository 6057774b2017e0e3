"""``fimo resume``: what is missing of a sweep in its store, here or as a job."""

from __future__ import annotations

from pathlib import Path

from fimo.orchestrator.commands.app import (
    CodeOption,
    JsonOption,
    RayOption,
    RetryOption,
    SweepArgument,
    TrustOption,
    app,
)
from fimo.orchestrator.commands.run import run_resolved


@app.command()
def resume(
    sweep: SweepArgument,
    address: RayOption = None,
    retry_failed: RetryOption = False,
    code: CodeOption = Path(),
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compute what is missing of a sweep, here or (--address http://HEAD:8265) as a job; the store has the spec."""
    from fimo.orchestrator.resolve.imports import import_to_stay

    import_to_stay("torch")
    from fimo.orchestrator.resolve.at_hand import Own
    from fimo.orchestrator.resolve.resolved import resolve_again
    from fimo.orchestrator.sweep.sweep import open_sweep

    own = Own(code, trust)
    if address is not None and address.startswith(("http://", "https://")):
        from fimo.orchestrator.cluster import jobs
        from fimo.orchestrator.commands.submit import show_submission

        show_submission(jobs.resubmit(sweep, address, retry_failed, own), as_json)
        return
    opened = open_sweep(sweep)
    run_resolved(resolve_again(opened, own), opened.store, address, retry_failed, as_json)
