"""A sweep in its store: what is read from it and written to it, under the keys of ``sweep/keys.py``.

Invariant: what a ``read_…`` returns is what its key says: every check of an object stands here or in the decoder
called here, so no reader has checks of its own.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fimo.orchestrator.spec.canonical import canonical, is_sealed, sealed
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.store import LocalStore, NotFound, Store, open_store, split_sweep
from fimo.orchestrator.sweep import keys, records
from fimo.orchestrator.sweep.estimates import EstimateBlock, decode_block
from fimo.orchestrator.sweep.manifest import Manifest, from_json
from fimo.orchestrator.sweep.parts import BadPartError, Part, decode_part
from fimo.workers.errors import StoreError, UsageError, plain
from fimo.workers.garbage import uncollected


@dataclass(frozen=True)
class Listed:
    """A part as listed, nothing of it read: its key, what the key says, bytes, and when it was written (aware)."""

    key: str
    seed: int
    set: str
    size: int
    modified: datetime


class Sweep:
    """A sweep's objects under ``name`` in ``store``. Pickles, and is small: every task gets one."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self._sets: dict[str, list[NamedRemoval]] = {}

    def __reduce__(self) -> tuple[type[Sweep], tuple[Store, str]]:
        return Sweep, (self.store, self.name)

    @property
    def uri(self) -> str:
        """STORE/NAME, as commands take it."""
        return f"{self.store.uri.rstrip('/')}/{self.name}"

    def write_manifest(self, manifest: Manifest) -> None:
        """Write what this run resolved its spec to; raises StoreError."""
        self.store.put(keys.manifest(self.name), canonical(sealed(manifest.json())).encode())

    def read_manifest(self) -> Manifest:
        """What the last run resolved.

        Raises:
            UsageError: there is no such sweep.
            StoreError: the object is not fimo's, not as it was written, or another sweep's.
        """
        key = keys.manifest(self.name)
        try:
            values = self._json(key)
        except NotFound as error:
            raise UsageError(
                f"no sweep '{self.name}' in {self.store.uri}{_no_store(self.store)}; `fimo run` or `fimo submit` "
                "starts one"
            ) from error
        mend = "`fimo run SPEC --replace` writes it anew, and takes the parts that are there"
        try:
            if not is_sealed(values):
                raise StoreError(f"{self.store.uri}/{key} is not as it was written; {mend}")
            manifest = from_json(values)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
            raise StoreError(f"{self.store.uri}/{key} is not a manifest of fimo ({_why(error)}); {mend}") from error
        except UsageError as error:
            raise StoreError(f"{self.store.uri}/{key} is not a manifest of this fimo: {_why(error)}") from error
        if manifest.spec.name != self.name:
            raise StoreError(f"{self.store.uri}/{key} is of the sweep '{manifest.spec.name}', copied here; {mend}")
        return manifest

    def _json(self, key: str) -> Any:
        try:
            return json.loads(self.store.get(key))
        except (ValueError, RecursionError) as error:
            raise StoreError(
                f"{self.store.uri}/{key} is not valid JSON; move it away and run the spec again"
            ) from error

    # -- sets of removals ---------------------------------------------------------------------------------------------

    def write_set(self, digest: str, removals: Sequence[NamedRemoval]) -> str:
        """Make a set of removals known before anything that names it is written; returns its hash."""
        name = keys.set_hash(removals)
        if name not in self._sets:
            body = canonical([[r.number, r.name, list(r.indices)] for r in removals]).encode()
            self.store.create(keys.removal_set(self.name, digest, name), body)
            self._sets[name] = list(removals)
        return name

    def read_set(self, digest: str, name: str) -> list[NamedRemoval]:
        """The removals of a set.

        Raises:
            StoreError: it is missing, not a set, or not the one that it is named for.
        """
        if name not in self._sets:
            key = keys.removal_set(self.name, digest, name)
            rows = self._json(key)
            try:
                removals = [NamedRemoval(int(n), str(label), tuple(map(int, indices))) for n, label, indices in rows]
            except (TypeError, ValueError, OverflowError) as error:
                raise StoreError(f"{self.store.uri}/{key} is not a set of removals") from error
            if keys.set_hash(removals) != name:
                raise StoreError(f"{self.store.uri}/{key} does not hold the set it is named for")
            self._sets[name] = removals
        return self._sets[name]

    # -- parts --------------------------------------------------------------------------------------------------------

    def list_parts(self, digest: str) -> list[Listed]:
        """Every part under the digest, by seed and set."""
        # All of a listing is kept: looks for garbage take a fifth of a long one, and half where torch is loaded.
        with uncollected():
            entries = self.store.list(keys.parts(self.name, digest))
            named = ((entry, keys.read_part_key(entry.key)) for entry in entries)
            return [Listed(entry.key, *of, entry.size, entry.modified) for entry, of in named if of is not None]

    def done(self, manifest: Manifest, listed: Iterable[Listed]) -> dict[int, set[tuple[int, ...]]]:
        """Seed -> removed indices that its parts hold; a part whose set cannot be told is read for it."""
        done: dict[int, set[tuple[int, ...]]] = {}
        for part in listed:
            try:
                removals: Sequence[NamedRemoval] = self.read_set(manifest.digest, part.set)
            except StoreError:
                try:
                    removals = self.read_part(part.key, manifest).removals
                except BadPartError:
                    continue
            done.setdefault(part.seed, set()).update(r.indices for r in removals)
        return done

    def read_part(self, key: str, manifest: Manifest) -> Part:
        """Read and verify a part of the sweep.

        Raises:
            BadPartError: torn, foreign, altered, not what its key says, or of other steps or evaluation examples.
            NotFound: there is none.
        """
        part = decode_part(self.store.get(key), key, len(manifest.steps), manifest.evals)
        if part.digest != manifest.digest or (part.seed, keys.set_hash(part.removals)) != keys.read_part_key(key):
            raise BadPartError(f"part {key}: it belongs under another key")
        return _of_the_sweep(part, key, manifest)

    # -- witnesses ----------------------------------------------------------------------------------------------------

    def list_witnesses(self, digest: str) -> list[int]:
        """The seeds that have witnesses; raises StoreError."""
        found = [keys.read_witness_key(entry.key) for entry in self.store.list(keys.witnesses(self.name, digest))]
        return sorted(seed for seed in found if seed is not None)

    def read_witness(self, seed: int, manifest: Manifest) -> Part:
        """Read and verify a seed's witnesses; errors as ``read_part``."""
        key = keys.witness(self.name, manifest.digest, seed)
        part = decode_part(self.store.get(key), key, len(manifest.steps), manifest.evals)
        if (part.digest, part.seed) != (keys.witness_digest(manifest.digest), seed):
            raise BadPartError(f"witness {key}: it belongs under another key")
        return _of_the_sweep(part, key, manifest)

    # -- estimates ----------------------------------------------------------------------------------------------------

    def read_block(self, key: str, digest: str, estimator: str, params: str) -> EstimateBlock:
        """Read and verify a block of an estimator's values.

        Args:
            digest: of all that the values depend on, 64 hex digits.

        Raises:
            BadPartError: torn, foreign, altered, or not what its key says.
            NotFound: there is none.
        """
        block = decode_block(self.store.get(key), key)
        prefix = keys.estimates(self.name, digest, estimator, params)
        count = block.values.shape[-1]
        own = keys.block(prefix, block.removals, block.first, count, block.seed)
        if (block.digest, block.estimator, block.params, own) != (digest, estimator, params, key):
            raise BadPartError(f"estimates {key}: they belong under another key")
        return block

    # -- what does not verify -----------------------------------------------------------------------------------------

    def proofs(self, digest: str) -> list[dict[str, Any]]:
        """The verdicts on the engine, one for each device type; a record that is not one is passed over."""
        verdicts = []
        for entry in self.store.list(keys.proof(self.name, digest)):
            with contextlib.suppress(NotFound):
                if (found := records.read(records.Verdict, self.store.get(entry.key))) is not None:
                    verdicts.append(found[1])
        return verdicts

    def bad_records(self, digest: str) -> list[str]:
        """The keys of verdicts on the engine and of measured stack sizes that are none; raises StoreError."""
        kinds = (
            (keys.proof(self.name, digest), records.Verdict),
            (keys.replicas(self.name, digest), records.StackSize),
        )
        bad = []
        for prefix, kind in kinds:
            for entry in self.store.list(prefix):
                with contextlib.suppress(NotFound):
                    if records.read(kind, self.store.get(entry.key)) is None:
                        bad.append(entry.key)
        return bad

    def reject(self, key: str) -> None:
        """Move a bad object to ``rejected/``, so that it is computed again; raises StoreError."""
        self.store.put(keys.rejected(self.name, key), self.store.get(key))
        self.store.delete(key)


def _why(error: BaseException) -> str:
    """What is wrong with a record, in a few words without control characters."""
    line = " ".join(plain(str(error)).split())[:160]
    return f"it lacks {line}" if isinstance(error, KeyError) else line or type(error).__name__


def _no_store(store: Store) -> str:
    """Of a folder that is none, or holds no sweep at all: that it is the store that is mistyped."""
    if not isinstance(store, LocalStore):
        return ""
    if not store.root.is_dir():
        return ", which does not exist (is the store mistyped?)"
    with contextlib.suppress(OSError):
        if not any((inner / "sweep.json").is_file() for inner in store.root.iterdir()):
            return ", which holds no sweep (is the store mistyped?)"
    return ""


def _of_the_sweep(part: Part, key: str, manifest: Manifest) -> Part:
    if part.steps != manifest.steps or part.deltas.shape[2] != manifest.evals:
        raise BadPartError(f"part {key}: its steps or evaluation examples are not the sweep's")
    return part


def open_sweep(uri: str) -> Sweep:
    """STORE/NAME as a sweep; touches neither disk nor network. Raises UsageError if it is malformed."""
    store, name = split_sweep(uri)
    return Sweep(open_store(store), name)
