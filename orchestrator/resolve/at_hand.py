"""A sweep's workload, if its code and data are here as they were: to show examples as what they are.

A store does not choose what code runs. The workload is a shipped one, or a module in the folder that the user names,
and its code has the recorded digest; no other folder is looked at, whatever the store says.
"""

from __future__ import annotations

from pathlib import Path

from fimo.orchestrator.resolve import identity
from fimo.orchestrator.resolve.code import source_digest
from fimo.orchestrator.spec.shipped import SHIPPED
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.workers.errors import FimoError, WorkloadError
from fimo.workers.examples import Examples
from fimo.workers.workload import Workload, find_module, load_workload


def at_hand(manifest: Manifest, folder: Path) -> Workload:
    """The sweep's workload from ``folder``, with the code and the examples that its numbers are of.

    Raises:
        WorkloadError: one line: it is not here, cannot be loaded, or is not what it was.
    """
    spec = manifest.spec
    try:
        shipped = spec.workload in SHIPPED.values()
        if not shipped and find_module(spec.workload, folder)[2] is None:
            raise WorkloadError(f"workload {spec.workload} is not in {folder}")
        # What lies beside it is no part of a shipped workload.
        beside = folder / "nothing" if shipped else folder
        if source_digest(spec.workload, beside) != manifest.source:
            where = "this fimo" if shipped else str(folder)
            raise WorkloadError(f"the code of workload {spec.workload} in {where} is not what it was")
        workload = load_workload(spec.workload, spec.workload_args, folder)
        evals = Examples(workload.evals, workload.collate).first(manifest.evals)
        same = identity.examples_digest(Examples(workload.train, workload.collate)) == manifest.train_digest
        if not same or identity.each_digest(evals) != manifest.eval_digests:
            raise WorkloadError(f"the examples of workload {spec.workload} are not what they were")
    except WorkloadError:
        raise
    except FimoError as error:
        raise WorkloadError(str(error)) from error
    except Exception as error:
        raise WorkloadError(f"workload {spec.workload} cannot be loaded here: {type(error).__name__}") from error
    return workload
