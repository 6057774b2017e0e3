"""``fimo doctor``: what would fail later, found now. One line a check: ok, or what fails and the mend.

Store: credentials, writing, conditional writes, clock. Ray: reachable, the same versions here and on every node, GPUs
that Ray counts and torch sees, and one tiny shard trained twice with the same bits on each device type. Where workers
start from zero, it asks for one and lets it go.

Not here: whether a workload is sound (`fimo plan` loads it) and whether results are right (`fimo verify`).
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn

from fimo.orchestrator.cluster import jobs
from fimo.orchestrator.resolve.identity import tensors_digest
from fimo.orchestrator.run import connect
from fimo.orchestrator.run import nodes as cluster_nodes
from fimo.orchestrator.run.provenance import versions
from fimo.orchestrator.store import Store, open_store
from fimo.orchestrator.store.base import PROBE_PREFIX
from fimo.workers.device import deterministic, device_name, pick_device, prepare_environment
from fimo.workers.errors import FimoError, StoreError
from fimo.workers.examples import Batch, Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.start import start_from
from fimo.workers.workload import Workload

CLOCK_S = 60.0
"""A clock that is off by more makes `fimo status` lie; by 15 minutes, S3 refuses every request."""
NODE_S = 300.0
"""What an autoscaler is given to start a node: a machine, its disk, and an image of several GB."""
SAME_EVERYWHERE = "install the cluster's version here, or give the cluster an image of this one"
MARK = '{\n  "checks"'
"""How the output of `fimo doctor --json` begins, to find it in a job's log."""


@dataclass(frozen=True)
class Check:
    """One check: what, whether it passed, and what was seen or is to be mended."""

    name: str
    ok: bool
    detail: str

    def line(self) -> str:
        """For people."""
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.name}: {' '.join(self.detail.split())}"

    def json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def examine(store: str | None, address: str | None, say: Callable[[str], None] = lambda line: None) -> list[Check]:
    """Every check, in order. A dashboard's address has them run as a job on the cluster itself.

    Args:
        say: told in one line what is waited for.

    Raises:
        UsageError: a malformed store or address.
    """
    checks = [] if store is None else list(store_checks(open_store(store)))
    if address is not None and address.startswith(("http://", "https://")):
        return checks + list(_as_job(store, address, say))
    return checks + list(ray_checks(address, say))


# -- the store ------------------------------------------------------------------------------------------------------


def store_checks(store: Store) -> Iterator[Check]:
    """The store, one operation after another; ends at the first that fails."""
    key = PROBE_PREFIX + uuid.uuid4().hex
    step = "credentials"
    try:
        # List before writing: some servers answer a write to a missing bucket by making the bucket.
        list(store.list(PROBE_PREFIX))
        yield Check(step, True, f"{store.uri} answers and lists")
        step = "store"
        before = datetime.now(UTC)
        store.create(key, b"fimo doctor")
        after = datetime.now(UTC)
        if store.get(key) != b"fimo doctor":
            raise StoreError(f"store {store.uri} gives back other bytes than were written; use another server")
        yield Check(step, True, f"{store.uri} is written and read")
        step = "conditional writes"
        again = store.create(key, b"fimo doctor, again")
        if again or store.get(key) != b"fimo doctor":
            raise StoreError("a second write of the same key was not refused; use a server with If-None-Match")
        yield Check(step, True, "a second write of the same key is refused")
        step = "clock"
        yield _clock(store, key, before, after)
        step = "clean-up"
        store.delete(key)
    except StoreError as error:
        yield Check(step, False, str(error))
        with contextlib.suppress(StoreError):
            store.delete(key)


def _clock(store: Store, key: str, before: datetime, after: datetime) -> Check:
    entries = list(store.list(key))
    if not entries:
        return Check("clock", False, f"store {store.uri} does not list what was just written; use another server")
    # Allow a second, since stores keep whole ones; the write took from `before` to `after`.
    early, late = (before - entries[0].modified).total_seconds() - 1, (entries[0].modified - after).total_seconds()
    off = max(0.0, early, late)
    if off > CLOCK_S:
        return Check("clock", False, f"this machine's clock is {off:.0f} s off the store's: synchronise it (ntp)")
    return Check("clock", True, "this machine's agrees with the store's")


# -- Ray ------------------------------------------------------------------------------------------------------------


def ray_checks(address: str | None, say: Callable[[str], None] = lambda line: None) -> Iterator[Check]:
    """Ray from a driver here: an embedded one, or the one at ``address``. Failures are checks, never raised."""
    where = "an embedded Ray" if address is None else f"Ray at {address}"
    try:
        with connect.cluster(address):
            nodes = cluster_nodes.nodes()
            yield Check("ray", True, f"{where} answers, {len(nodes)} node{'s' if len(nodes) != 1 else ''}")
            if address is None or any(node.takes_tasks for node in nodes):
                yield from _node_checks(nodes)
            else:
                yield from _with_a_node(say)
    except FimoError as error:
        yield Check("ray", False, str(error))


def _with_a_node(say: Callable[[str], None]) -> Iterator[Check]:
    """The checks of a cluster whose workers start from zero: on a node that is started for them."""
    say(f"no node takes tasks yet: asked Ray's autoscaler for one, and wait up to {NODE_S:.0f} s")
    with cluster_nodes.asking_for_a_node(NODE_S) as seconds:
        if seconds is None:
            yield Check(
                "workers",
                False,
                f"no node takes tasks, and none came within {NODE_S:.0f} s of asking Ray's autoscaler: add a worker "
                "node, or see what it says (`ray status` on the head)",
            )
        else:
            yield Check("workers", True, f"none was there; the autoscaler started one in {seconds:.0f} s")
        yield from _node_checks(cluster_nodes.nodes())


def _node_checks(nodes: list[cluster_nodes.Node]) -> Iterator[Check]:
    ours = versions()
    devices: dict[str, tuple[cluster_nodes.Node, float]] = {}
    for node in nodes:
        counted = float(node.resources.get("GPU", 0))
        try:
            theirs = cluster_nodes.on_node(node, probe, gpus=min(counted, 1.0))
        except FimoError as error:
            mend = "install the same fimo, Ray and Python there, or look at the node's logs"
            yield Check(f"node {node.name}", False, f"{error}; {mend}")
            continue
        yield _versions(node, ours, theirs["versions"])
        if counted or theirs["gpus"]:
            yield _gpus(node, counted, theirs)
        if node.takes_tasks:
            devices.setdefault(theirs["device"], (node, min(counted, 1.0)))
    for name, (node, gpus) in sorted(devices.items()):
        yield _determinism(name, node, gpus)


def _versions(node: cluster_nodes.Node, ours: Mapping[str, str], theirs: Mapping[str, str]) -> Check:
    name = f"versions on {node.name}"
    differ = [f"{k} {theirs.get(k, 'none')} (driver: {ours.get(k, 'none')})" for k in sorted({*ours, *theirs})]
    differ = [text for k, text in zip(sorted({*ours, *theirs}), differ, strict=True) if ours.get(k) != theirs.get(k)]
    if differ:
        return Check(name, False, f"{', '.join(differ)}: use one image for every node")
    return Check(name, True, ", ".join(f"{k} {v}" for k, v in ours.items()))


def _gpus(node: cluster_nodes.Node, counted: float, theirs: Mapping[str, Any]) -> Check:
    name, seen = f"GPUs on {node.name}", theirs["gpus"]
    if counted and not seen:
        return Check(name, False, f"Ray counts {counted:g}, torch sees none: install CUDA builds and a driver")
    if seen > counted:
        return Check(name, False, f"torch sees {seen}, Ray counts {counted:g}: start the node with --num-gpus={seen}")
    kind = f", accelerator: {node.accelerator}" if node.accelerator else ""
    return Check(name, True, f"{counted:g} × {theirs['device']}; a spec asks for them: resources: {{gpus: 1{kind}}}")


def _determinism(name: str, node: cluster_nodes.Node, gpus: float) -> Check:
    try:
        # Two tasks: if they land in two processes, those are compared too.
        digests = [d for _ in range(2) for d in cluster_nodes.on_node(node, tiny_shard_twice, gpus=gpus)]
    except FimoError as error:
        return Check(f"determinism on {name}", False, f"{error}; no shard can be trained there")
    if len(set(digests)) > 1:
        return Check(f"determinism on {name}", False, "a shard trained twice gave other bits: exclude this device")
    return Check(f"determinism on {name}", True, "a shard trained four times gave the same bits")


def probe() -> dict[str, Any]:
    """What a worker is: versions, device, and GPUs that torch sees."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"versions": versions(), "gpus": gpus, "device": device_name(pick_device(gpus))}


def tiny_shard_twice() -> list[str]:
    """Digests of two trainings of one tiny shard in this process."""
    prepare_environment()
    device = pick_device(1)
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 1))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    data = {"x": torch.randn(70, 6, generator=generator), "y": torch.randn(70, generator=generator)}
    workload = Workload(model, data, data, _outputs, _loss)
    settings = FurtherTraining(
        Optimizer(name="sgd", lr=0.05, momentum=0.9), batch_size=16, epochs=2, evaluate=Evaluate(every_epochs=1)
    )
    with deterministic(device):
        examples = Examples(data, None, device, torch.float32)
        shared = start_from(FunctionalModel(workload, None, device, torch.float32), examples, examples, settings)
        results = [run_shard(shared, [(0,), (5,), (11, 12)], 3, 4) for _ in range(2)]
    return [tensors_digest([("deltas", r.deltas), ("distances", r.distances)]) for r in results]


def _outputs(model: nn.Module, batch: Batch) -> Tensor:
    outputs: Tensor = model(batch["x"])
    return outputs.squeeze(-1)


def _loss(outputs: Tensor, batch: Batch) -> Tensor:
    target: Tensor = batch["y"]
    return (outputs - target) ** 2


def same_as_here(theirs: Mapping[str, str] | None) -> Check:
    """What decides whether a job of this machine runs there as here: fimo, Ray, and Python but for its patch."""
    ours, name = versions(), "this machine"
    if theirs is None:
        return Check(name, False, f"fimo {ours.get('fimo')} here, another on the cluster: {SAME_EVERYWHERE}")
    differ = [
        f"{package} {ours.get(package, 'none')} here, {theirs.get(package, 'none')} on the cluster"
        for package in ("fimo", "ray", "python")
        if _minor(package, ours) != _minor(package, theirs)
    ]
    if differ:
        return Check(name, False, f"{'; '.join(differ)}: {SAME_EVERYWHERE}")
    told = ", ".join(f"{package} {ours.get(package)}" for package in ("fimo", "ray", "python"))
    return Check(name, True, f"{told}, as on the cluster")


def _minor(package: str, of: Mapping[str, str]) -> str:
    version = of.get(package, "")
    return version.rpartition(".")[0] if package == "python" else version


def _as_job(store: str | None, address: str, say: Callable[[str], None]) -> Iterator[Check]:
    """The same checks run on the cluster by a job of this command, with the cluster's own credentials."""
    say(f"the checks run on the cluster; if its workers start from zero, they wait up to {NODE_S:.0f} s for one")
    words = ["fimo", "doctor", "--address", "auto", "--json", *(["--store", store] if store else [])]
    try:
        text = jobs.run_and_wait(address, words, "fimo-doctor", timeout_s=600 + NODE_S)
        yield Check("head", True, f"{address} answers and runs jobs")
        values = json.JSONDecoder().raw_decode(text[text.rindex(MARK) :])[0]
        theirs = values.get("versions")
        checks = [same_as_here({str(k): str(v) for k, v in theirs.items()} if theirs is not None else None)]
        checks += [Check(f"cluster: {c['name']}", bool(c["ok"]), str(c["detail"])) for c in values["checks"]]
    except FimoError as error:
        yield Check("head", False, str(error))
    except (ValueError, KeyError, TypeError, AttributeError):
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "nothing")
        yield Check("cluster", False, f"fimo does not run there (is it installed in the image?); it said: {last[:200]}")
    else:
        yield from checks
