"""Sweeps as jobs of a Ray cluster: submit, read logs, cancel. All truth about a sweep is in its store.

A job's record says where it was submitted, when, and from which folder here.

Invariant: no credential is in an entry point, a runtime environment, a job's metadata or a record. The store's
credentials on the cluster come from the cluster's own environment, Ray's token from the user's
(``fimo.orchestrator.cluster.head``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fimo.orchestrator.cluster import staging
from fimo.orchestrator.cluster.head import JobError, Telling, check_address, connect, remember, remembered
from fimo.orchestrator.resolve import UPLOADED
from fimo.orchestrator.resolve.at_hand import Own, is_inside, own_folder
from fimo.orchestrator.resolve.code import Staged
from fimo.orchestrator.run.connect import SEE_ALL_GPUS
from fimo.orchestrator.run.heartbeat import drivers
from fimo.orchestrator.spec.canonical import canonical
from fimo.orchestrator.spec.spec import Spec
from fimo.orchestrator.store import open_store
from fimo.orchestrator.store.weather import scrub
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.sweep import Sweep, open_sweep
from fimo.workers.errors import FimoError, StoreError, UsageError, plain

STOP_TIMEOUT_S = 60.0
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")


@dataclass(frozen=True)
class Job:
    """A job as recorded in the store.

    Attributes:
        id: Ray's submission id; ``address``: the head's dashboard.
        when: UTC, ISO 8601.
        beside: the folder here that the code was taken from.
        renamed: file names of the job's spec -> the names that the user wrote.
    """

    id: str
    address: str
    when: str
    beside: str
    renamed: dict[str, str]


@dataclass(frozen=True)
class Submission:
    """What is, or would be, submitted; ``running``: who computes the sweep already, in words."""

    sweep: str
    entrypoint: str
    files: list[Staged]
    job: Job | None
    running: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """For ``--json``."""
        files = [{"path": f.target, "bytes": f.size, "from": str(f.source)} for f in self.files]
        about = {"sweep": self.sweep, "entrypoint": self.entrypoint, "files": files}
        if self.job is None:
            return about
        return about | {"job": self.job.id, "address": self.job.address, "running": list(self.running)}


def submit(
    spec: Spec,
    beside: Path,
    store: str,
    address: str,
    retry_failed: bool = False,
    dry_run: bool = False,
    replace: bool = False,
) -> Submission:
    """Submit ``fimo run`` as a job; with ``dry_run`` only say what would go up.

    Raises:
        UsageError: the store is a directory, an address or a file is wrong.
        StoreError, JobError: one line; nothing was submitted.
    """
    check_address(address)
    opened = open_store(store)
    if not store.startswith("s3://"):
        raise UsageError(f"--store {store} is a directory, which the cluster's machines do not share: use s3://…")
    job_spec, files, renamed = staging.job_files(spec, beside)
    sweep = Sweep(opened, spec.name)
    words = ["fimo", "run", staging.SPEC_FILE, "--store", store, "--address", "auto"]
    words += ["--retry-failed"] * retry_failed + ["--replace"] * replace
    entrypoint = shlex.join(words)
    if dry_run:
        text = staging.spec_text(job_spec).encode()
        files = [Staged(Path(staging.SPEC_FILE), staging.SPEC_FILE, len(text)), *files]
        return Submission(sweep.uri, entrypoint, files, None)
    client = connect(address)
    opened.check()
    running = _running(sweep, client, address)
    number = f"fimo-{spec.name}-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="fimo-job-") as folder:
        staging.write_job(files, Path(folder), job_spec)
        with Telling(address):
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=number,
                runtime_env={"working_dir": folder, "env_vars": SEE_ALL_GPUS | {UPLOADED: "1"}},
                metadata={"sweep": sweep.uri},
            )
    job = Job(number, address, datetime.now(UTC).isoformat(), str(beside), dict(renamed))
    opened.put(keys.job(sweep.name, number), canonical(asdict(job)).encode())
    remember(address)
    return Submission(sweep.uri, entrypoint, files, job, running)


def _running(sweep: Sweep, client: Any, address: str) -> tuple[str, ...]:
    """Who computes the sweep now: drivers that are heard of, and jobs of this head that have not ended."""
    found = [f"a driver on {of.get('host')} (process {of.get('pid')})" for of in drivers(sweep) if not of["silent"]]
    for job in recorded(sweep):
        # A job that the head has forgotten has ended.
        with contextlib.suppress(Exception):
            if job.address == address and str(client.get_job_status(job.id).value) not in ENDED:
                found.append(f"job {job.id}")
    return tuple(found)


def latest_state(sweep: Sweep) -> tuple[Job, str | None] | None:
    """The job that was submitted last, and what its head says of it; None where it cannot be asked.

    Raises:
        StoreError: the store cannot be read.
    """
    jobs = recorded(sweep)
    if not jobs:
        return None
    job, state = jobs[-1], None
    with contextlib.suppress(FimoError):
        at = _trusted(job, None)
        with Telling(at, job.id):
            state = str(connect(at).get_job_status(job.id).value)
    return job, state


def recorded(sweep: Sweep) -> list[Job]:
    """The sweep's jobs, oldest first; a record that is not one is passed over."""
    jobs = []
    for entry in sweep.store.list(keys.job(sweep.name)):
        try:
            values = json.loads(sweep.store.get(entry.key))
            renamed = {str(k): str(v) for k, v in values.get("renamed", {}).items()}
            texts = {name: str(values[name]) for name in ("id", "address", "when", "beside")}
            jobs.append(Job(**texts, renamed=renamed))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, StoreError):
            continue
    return sorted(jobs, key=lambda job: job.when)


def find(sweep: Sweep, number: str | None, address: str | None) -> tuple[Job, str]:
    """A job of the sweep, the latest if none is named, and the address to reach it at.

    Raises:
        UsageError: there is none, or its recorded address is one that this machine never submitted to.
    """
    jobs = [job for job in recorded(sweep) if number in (None, job.id)]
    if not jobs:
        what = f"job {number}" if number else "job"
        raise UsageError(f"{sweep.uri} has no {what}; `fimo submit` starts one")
    return jobs[-1], _trusted(jobs[-1], address)


def _trusted(job: Job, address: str | None) -> str:
    if address is not None:
        check_address(address)
        return address
    if job.address not in remembered():
        raise UsageError(
            f"job {job.id} was submitted to {scrub(job.address)} from another machine: if you trust that head, "
            "repeat the command with --address and its address"
        )
    return job.address


def logs(uri: str, number: str | None, address: str | None, follow: bool, write: Callable[[str], None]) -> str:
    """Write a job's output; with ``follow`` go on until the job ends.

    Returns:
        Which job's: its id.

    Raises:
        UsageError, JobError: one line.
    """
    job, at = find(open_sweep(uri), number, address)
    client = connect(at)
    with Telling(at, job.id):
        if not follow:
            write(client.get_job_logs(job.id))
            return job.id

        async def tail() -> None:
            async for lines in client.tail_job_logs(job.id):
                write(lines)

        asyncio.run(tail())
    return job.id


def cancel(uri: str, number: str | None, address: str | None) -> list[tuple[str, str]]:
    """Stop the sweep's jobs (or one) that have not ended and wait until they have; deletes nothing.

    Returns:
        (id, status) of each job that was running.

    Raises:
        UsageError, JobError: one line.
    """
    sweep = open_sweep(uri)
    find(sweep, number, address)  # at least one
    chosen = [job for job in recorded(sweep) if number in (None, job.id)]
    stopped: list[tuple[str, str]] = []
    for place, job in enumerate(chosen):
        latest = place == len(chosen) - 1
        try:
            at = _trusted(job, address)
            client = connect(at)
            with Telling(at, job.id):
                if str(client.get_job_status(job.id).value) in ENDED:
                    continue
                client.stop_job(job.id)
                stopped.append((job.id, _wait_until_ended(client, job.id)))
        except FimoError:
            # Pass over an older job whose cluster is gone; the latest one's must answer.
            if latest:
                raise
    return stopped


def _wait_until_ended(client: Any, number: str, timeout_s: float = STOP_TIMEOUT_S) -> str:
    deadline = time.monotonic() + timeout_s
    while True:
        status = str(client.get_job_status(number).value)
        if status in ENDED or time.monotonic() > deadline:
            return status
        time.sleep(0.5)


def run_and_wait(address: str, words: Sequence[str], name: str, timeout_s: float = 600) -> str:
    """Run a command as a job of its own and return its output.

    Raises:
        UsageError, JobError: one line; it did not end in time.
    """
    check_address(address)
    client = connect(address)
    number = f"{name}-{secrets.token_hex(4)}"
    with Telling(address, number):
        client.submit_job(entrypoint=shlex.join(words), submission_id=number, runtime_env={"env_vars": SEE_ALL_GPUS})
        if _wait_until_ended(client, number, timeout_s) not in ENDED:
            client.stop_job(number)
            raise JobError(f"job {number} at {address} did not end in {timeout_s:.0f} s: look at the head's dashboard")
        return str(client.get_job_logs(number))


def resubmit(uri: str, address: str, retry_failed: bool, own: Own) -> Submission:
    """Submit a sweep again from its store and the user's own code, if its digest is the manifest's.

    Raises:
        UsageError: the code is not here, or a file that the spec names is not.
    """
    sweep = open_sweep(uri)
    manifest = sweep.read_manifest()
    jobs = recorded(sweep)
    beside = own_folder(manifest, own, sweep.store.uri)
    spec = _as_written(manifest.spec, jobs[-1].renamed if jobs else {}, own, sweep.store.uri)
    return submit(spec, beside, sweep.store.uri, address, retry_failed)


def _as_written(spec: Spec, renamed: dict[str, str], own: Own, store: str) -> Spec:
    """The spec with the file names that the user wrote; refuses a name that stands in the store's records alone."""
    for name in (spec.final_model, spec.removals.file):
        if name is not None and (name in renamed or not (own.trust or is_inside(name, store))):
            file = plain(scrub(renamed.get(name, name)))
            raise UsageError(f"the sweep needs your file {file}: `fimo submit` its spec again")
    return spec
