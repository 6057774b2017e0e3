"""A sweep in its store: which keys there are and what they hold. The set of parts is the only truth about progress.

    NAME/sweep.json                                  the spec and what it resolved to, rewritten by every run
    NAME/sets/DIGEST/SET.json                        the removals that the parts named SET hold
    NAME/parts/DIGEST/seed-…/SET.parquet             parts
    NAME/estimates/DIGEST/ESTIMATOR-PARAMS/SET-….parquet   an estimator's values for the removals of SET
    NAME/replicas/DEVICE.json                        the measured number of replicas trained together
    NAME/failed/…json                                tasks set aside, with their traceback
    NAME/jobs/ID.json                                where jobs were submitted (``fimo.orchestrator.cluster.jobs``)
    NAME/rejected/…                                  parts that did not verify
    NAME/tables/…parquet                             the tables, rewritten by every reduction

A set is written before the parts that name it, so whoever lists parts can tell which cells they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fimo.orchestrator.resolve.identity import canonical
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.spec.spec import Spec, parse
from fimo.orchestrator.store import NotFound, Store
from fimo.orchestrator.sweep.parts import BadPartError, Part, decode_part, set_hash
from fimo.workers.errors import StoreError, UsageError

_PART = re.compile(r"seed-(\d{10})/([0-9a-f]{16})\.parquet$")


@dataclass(frozen=True)
class Manifest:
    """What a run resolved its spec to; enough to tell progress and to reduce without the workload.

    Attributes:
        beside: the folder in which the spec's modules and files were found.
        source: digest of the workload's code, held against what a resume finds.
        digest: of all that a delta depends on; ``estimate_digest``: of all that an estimate at θᶠ depends on.
        train, evals: their numbers; ``scalars``: trainable scalars.
        steps: the recorded steps.
        estimators: [name, canonical params] in spec order.
    """

    spec: Spec
    beside: str
    source: str
    digest: str
    estimate_digest: str
    train: int
    evals: int
    scalars: int
    steps: tuple[int, ...]
    removals: tuple[NamedRemoval, ...]
    estimators: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Listed:
    """A part as listed: nothing of it has been read."""

    key: str
    seed: int
    set: str
    size: int
    modified: datetime


class Sweep:
    """A sweep's objects under ``name`` in ``store``."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self._sets: dict[str, list[NamedRemoval]] = {}

    @property
    def uri(self) -> str:
        """STORE/NAME, as commands take it."""
        return f"{self.store.uri.rstrip('/')}/{self.name}"

    def write_manifest(self, manifest: Manifest) -> None:
        """Write what this run resolved its spec to."""
        values = {
            "spec": manifest.spec.canonical(),
            "beside": manifest.beside,
            "source": manifest.source,
            "digest": manifest.digest,
            "estimate_digest": manifest.estimate_digest,
            "train": manifest.train,
            "evals": manifest.evals,
            "scalars": manifest.scalars,
            "steps": list(manifest.steps),
            "removals": [[r.name, list(r.indices)] for r in manifest.removals],
            "estimators": [list(e) for e in manifest.estimators],
        }
        self.store.put(f"{self.name}/sweep.json", canonical(values).encode())

    def read_manifest(self) -> Manifest:
        """What the last run resolved.

        Raises:
            UsageError: there is no such sweep.
            StoreError: the object is not fimo's.
        """
        try:
            values = self._json(f"{self.name}/sweep.json")
        except NotFound as error:
            raise UsageError(
                f"no sweep '{self.name}' in {self.store.uri}; `fimo run` or `fimo submit` starts one"
            ) from error
        try:
            removals = [NamedRemoval(i, str(n), tuple(map(int, x))) for i, (n, x) in enumerate(values["removals"])]
            return Manifest(
                spec=parse(values["spec"], "the stored spec"),
                beside=str(values["beside"]),
                source=str(values["source"]),
                digest=str(values["digest"]),
                estimate_digest=str(values["estimate_digest"]),
                train=int(values["train"]),
                evals=int(values["evals"]),
                scalars=int(values["scalars"]),
                steps=tuple(map(int, values["steps"])),
                removals=tuple(removals),
                estimators=tuple((str(n), str(p)) for n, p in values["estimators"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{self.uri}/sweep.json is not fimo's; move it away and run the spec again") from error

    def _json(self, key: str) -> Any:
        try:
            return json.loads(self.store.get(key))
        except (ValueError, RecursionError) as error:
            raise StoreError(
                f"{self.store.uri}/{key} is not valid JSON; move it away and run the spec again"
            ) from error

    # -- parts ------------------------------------------------------------------------------------------------------

    def write_set(self, digest: str, removals: Sequence[NamedRemoval]) -> str:
        """Make a set of removals known before anything that names it is written; returns its hash."""
        name = set_hash(removals)
        if name not in self._sets:
            body = canonical([[r.number, r.name, list(r.indices)] for r in removals]).encode()
            self.store.create(f"{self.name}/sets/{digest[:32]}/{name}.json", body)
            self._sets[name] = list(removals)
        return name

    def read_set(self, digest: str, name: str) -> list[NamedRemoval]:
        """The removals of a set; raises StoreError where it is missing or foreign."""
        if name not in self._sets:
            rows = self._json(f"{self.name}/sets/{digest[:32]}/{name}.json")
            try:
                removals = [NamedRemoval(int(n), str(label), tuple(map(int, indices))) for n, label, indices in rows]
            except (TypeError, ValueError) as error:
                raise StoreError(f"{self.uri}/sets/{digest[:32]}/{name}.json is not a set of removals") from error
            if set_hash(removals) != name:
                raise StoreError(f"{self.uri}/sets/{digest[:32]}/{name}.json does not hold the set it is named for")
            self._sets[name] = removals
        return self._sets[name]

    def list_parts(self, digest: str) -> list[Listed]:
        """Every part under the digest, by seed and set."""
        found = []
        for entry in self.store.list(f"{self.name}/parts/{digest[:32]}/"):
            match = _PART.search(entry.key)
            if match:
                found.append(Listed(entry.key, int(match[1]), match[2], entry.size, entry.modified))
        return found

    def done(self, digest: str, listed: Sequence[Listed]) -> dict[int, set[tuple[int, ...]]]:
        """Seed -> removed indices that its parts hold; a part whose set cannot be told is read for it."""
        done: dict[int, set[tuple[int, ...]]] = {}
        for part in listed:
            try:
                removals: Sequence[NamedRemoval] = self.read_set(digest, part.set)
            except StoreError:
                try:
                    removals = self.read_part(part, digest).removals
                except BadPartError:
                    continue
            done.setdefault(part.seed, set()).update(r.indices for r in removals)
        return done

    def read_part(self, listed: Listed, digest: str) -> Part:
        """Read and verify a part.

        Raises:
            BadPartError: torn, foreign, altered, or not what its key says.
        """
        part = decode_part(self.store.get(listed.key), listed.key)
        if part.digest != digest or part.seed != listed.seed or set_hash(part.removals) != listed.set:
            raise BadPartError(f"part {listed.key}: it belongs under another key")
        return part

    def reject(self, key: str) -> None:
        """Set a bad object aside under ``rejected/``, so that it is computed again."""
        data = self.store.get(key)
        # One flat name: policies that forbid overwriting under parts/ must not match it.
        flat = key.removeprefix(self.name + "/").replace("/", "_")
        self.store.put(f"{self.name}/rejected/{flat}", data)
        self.store.delete(key)
