"""Every object of a sweep lies under a key of ``sweep/keys.py`` and is what its key says."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from fimo.orchestrator.resolve.resolved import resolve
from fimo.orchestrator.run.blocks import value_digest
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.sweep import estimates, imported, keys
from fimo.orchestrator.sweep.parts import BadPartError
from fimo.orchestrator.sweep.sweep import Sweep
from tests.support.small_sweep import make_spec, run_here

ONE = (NamedRemoval(3, "x", (7,)),)
D = "d" * 64


def test_keys_of_parts_and_blocks_are_read_back():
    assert keys.read_part_key(keys.part("s", D, 12, ONE)) == (12, keys.set_hash(ONE))
    prefix = keys.estimates("s", D, "cg", '{"damping":0.1}')
    assert keys.read_block_key(keys.block(prefix, ONE, 128, 7), prefix) == (None, keys.set_hash(ONE), 128, 7)
    of_seed = keys.block(prefix, ONE, 128, 7, seed=12)
    assert of_seed.startswith(f"{prefix}seed-0000000012/")
    assert keys.read_block_key(of_seed, prefix) == (12, keys.set_hash(ONE), 128, 7)
    assert keys.part("s", D, 12, ONE).startswith(keys.parts("s", D))
    assert keys.read_witness_key(keys.witness("s", D, 12)) == 12
    assert keys.read_part_key(keys.witness("s", D, 12)) is None
    assert keys.read_witness_key(keys.part("s", D, 12, ONE)) is None
    for foreign in ("s/parts/x", "s/tables/costs.parquet", ""):
        assert keys.read_part_key(foreign) is None
        assert keys.read_block_key(foreign, prefix) is None


def test_a_rejected_key_is_one_flat_name():
    key = keys.rejected("s", keys.part("s", D, 0, ONE))
    assert key.startswith("s/rejected/parts_")
    assert key.count("/") == 2


@pytest.mark.usefixtures("proven")
def test_everything_that_a_sweep_writes_has_a_key_of_its_own(beside):
    _, store, _ = run_here(make_spec(resources={"replicas": "auto", "witnesses": "auto"}), beside)
    sweep, manifest = Sweep(store, "flowers"), resolve(make_spec(), beside).manifest
    imported.import_scores(sweep, manifest, _npy(np.ones((5, 7))), "x.npy", "theirs", False)
    digest = manifest.digest
    known = (
        keys.manifest("flowers"),
        keys.removal_set("flowers", digest, "").rpartition("/")[0],
        keys.parts("flowers", digest),
        keys.witnesses("flowers", digest),
        *(keys.estimates("flowers", value_digest(manifest, *e), *e) for e in manifest.estimators),
        keys.imported("flowers"),
        keys.replicas("flowers", digest, "").rpartition("-")[0],
        keys.proof("flowers", digest),
        keys.table("flowers", "").rpartition("/")[0],
    )
    for entry in store.list(""):
        assert entry.key.startswith(known), entry.key
    for start in known:
        assert any(entry.key.startswith(start) for entry in store.list("")), start


def _npy(values: np.ndarray) -> bytes:
    import io

    sink = io.BytesIO()
    np.save(sink, values)
    return sink.getvalue()


@pytest.fixture
def swept(beside):
    _, store, _ = run_here(make_spec(), beside)
    sweep = Sweep(store, "flowers")
    return sweep, sweep.read_manifest()


def test_a_part_that_is_not_what_its_key_and_the_manifest_say_is_refused(swept):
    sweep, manifest = swept
    first, second = (part.key for part in sweep.list_parts(manifest.digest)[:2])
    assert sweep.read_part(first, manifest).seed == 0
    for other in (
        replace(manifest, steps=(*manifest.steps, 99)),
        replace(manifest, evals=6),
        replace(manifest, digest=D),
    ):
        with pytest.raises(BadPartError):
            sweep.read_part(first, other)
    sweep.store.put(second, sweep.store.get(first))
    with pytest.raises(BadPartError, match="another key"):
        sweep.read_part(second, manifest)


def test_a_block_that_is_not_what_its_key_says_is_refused(swept):
    sweep, manifest = swept
    (estimator, params), (other, _) = manifest.estimators
    digest = value_digest(manifest, estimator, params)
    prefix = keys.estimates(sweep.name, digest, estimator, params)
    [entry] = sweep.store.list(prefix)
    block = sweep.read_block(entry.key, digest, estimator, params)
    changed = (
        replace(block, digest=D),
        replace(block, estimator=other),
        replace(block, params='{"x":1}'),
        replace(block, first=1),
        replace(block, removals=block.removals[::-1]),
        replace(block, values=block.values[:, :3]),
    )
    for wrong in changed:
        sweep.store.put(entry.key, estimates.encode_block(wrong)[0])
        with pytest.raises(BadPartError, match="another key"):
            sweep.read_block(entry.key, digest, estimator, params)


def test_scores_under_another_name_are_bad(swept):
    sweep, manifest = swept
    imported.import_scores(sweep, manifest, _npy(np.ones((5, 7))), "x.npy", "theirs", False)
    sweep.store.put(keys.imported(sweep.name, "mine"), sweep.store.get(keys.imported(sweep.name, "theirs")))
    blocks, bad, _ = imported.imported(sweep, manifest)
    assert [block.estimator for block in blocks] == ["theirs"]
    assert [key for key, _ in bad] == [keys.imported(sweep.name, "mine")]


def test_a_sweep_pickles_without_what_it_has_read(swept):
    sweep, manifest = swept
    sweep.read_set(manifest.digest, sweep.list_parts(manifest.digest)[0].set)
    fresh = pickle.loads(pickle.dumps(sweep))
    assert (fresh.uri, fresh._sets) == (sweep.uri, {})
