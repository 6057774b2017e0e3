"""What was altered in a store is refused, repaired or told: never taken for what was written."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from fimo.orchestrator.notebook import OpenSweep
from fimo.orchestrator.run.gather import current_tables
from fimo.orchestrator.run.status import sweep_status
from fimo.orchestrator.run.verification import verify
from fimo.orchestrator.spec.canonical import canonical, is_sealed, sealed
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.store import MemoryStore
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.estimates import EstimateBlock, decode_block, encode_block
from fimo.orchestrator.sweep.parts import METADATA_KEY, BadPartError
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.orchestrator.tables import schemas
from fimo.workers.errors import StoreError
from tests.support.small_sweep import OWN, make_spec, run_here, table_bytes

BLOCK = EstimateBlock(
    digest="a" * 64,
    estimator="cg",
    params='{"damping":1.0}',
    removals=(NamedRemoval(0, "3", (3,)), NamedRemoval(1, "5", (5,))),
    first=2,
    steps=(4, 8, 9),
    values=np.arange(18, dtype=np.float64).reshape(3, 2, 3) / 7,
    provenance={"notes": {"units": "of g", "coverage": 0.5}, "seconds": 1.25},
)


def altered(data: bytes, **changes: object) -> bytes:
    """The object with metadata changed and not sealed again, its rows as they are."""
    table = pq.read_table(io.BytesIO(data))
    about = json.loads(table.schema.metadata[METADATA_KEY]) | changes
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: canonical(about)}), sink, compression="zstd")
    return sink.getvalue()


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": [8, 4, 9]},
        {"first": 3},
        {"removals": [[0, "3", [4]], [1, "5", [5]]]},
        {"removals": [[1, "5", [5]], [0, "3", [3]]]},
        {"estimator": "lissa"},
        {"params": '{"damping":2.0}'},
        {"provenance": {"notes": {"units": "of g", "coverage": 0.9}, "seconds": 1.25}},
        {"seed": 0},
        {"removals": {"0": 1}},
        {"steps": 7},
        {"first": -5},
    ],
    ids=str,
)
def test_a_block_with_altered_metadata_is_refused(changes):
    data, _ = encode_block(BLOCK)
    assert decode_block(data, "k").values.tolist() == BLOCK.values.tolist()
    with pytest.raises(BadPartError):
        decode_block(altered(data, **changes), "k")


@pytest.mark.parametrize("changes", [{"steps": [8, 4, 9]}, {"first": 3}, {"removals": [[7, "3", [3]], [1, "5", [5]]]}])
def test_rows_are_held_against_metadata_even_if_somebody_seals_it_again(changes):
    data, _ = encode_block(BLOCK)
    about = json.loads(pq.read_table(io.BytesIO(data)).schema.metadata[METADATA_KEY]) | changes
    about.pop("seal")
    with pytest.raises(BadPartError, match="not those that its metadata names"):
        decode_block(altered(data, **sealed(about)), "k")


@pytest.mark.parametrize("first", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_no_flipped_byte_of_a_block_gives_another_block(first):
    """Every third byte, a bit of each."""
    data, _ = encode_block(BLOCK)
    taken = []
    for place in range(first, len(data), 3):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        try:
            block = decode_block(bytes(flipped), "k")
        except BadPartError:
            continue
        # The name of the seal itself may be flipped: then it is a block from before there were seals, and whole.
        if replace(block, values=BLOCK.values) != BLOCK or (block.values != BLOCK.values).any():
            taken.append(place)
    assert not taken


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("of") / "spec"
    shutil.copytree(OWN, root)
    store = MemoryStore()
    run_here(make_spec(), root, store)
    return root, store


@pytest.fixture
def store(made):
    copy = MemoryStore()
    for entry in made[1].list(""):
        copy.put(entry.key, made[1].get(entry.key))
    return copy


def test_a_manifest_with_another_learning_rate_is_told_and_trains_nothing(store, made):
    key = keys.manifest("flowers")
    values = json.loads(store.get(key))
    values["spec"]["further_training"]["optimizer"]["lr"] = 0.2
    store.put(key, canonical(values).encode())
    for reads in (sweep_status, verify, lambda sweep: sweep.read_manifest()):
        with pytest.raises(StoreError, match=r"not as it was written; `fimo run SPEC --replace` writes it anew"):
            reads(Sweep(store, "flowers"))
    report, _, heard = run_here(make_spec(), made[0], store, replace_other=True)
    assert (report.exit_code, len(heard.results)) == (0, 0)


def test_a_manifest_of_another_name_is_told(store, made):
    run_here(make_spec(name="other", seeds=2), made[0], store)
    store.put(keys.manifest("flowers"), store.get(keys.manifest("other")))
    with pytest.raises(StoreError, match="of the sweep 'other', copied here"):
        sweep_status(Sweep(store, "flowers"))


def test_a_manifest_of_another_digest_is_told_beside_the_parts_that_it_does_not_name(store, made):
    other = MemoryStore()
    run_here(make_spec(further_training={"epochs": 1}), made[0], other)
    store.put(keys.manifest("flowers"), other.get(keys.manifest("flowers")))
    assert sweep_status(Sweep(store, "flowers"))["parts_of_others"] == 12


def test_a_table_that_is_not_the_one_that_was_written_is_made_anew(store):
    sweep = Sweep(store, "flowers")
    true = table_bytes(store)
    for name in ("attribution", "scores"):
        table = schemas.decode_table(store.get(keys.table("flowers", name)), name)
        column = "effect" if name == "attribution" else "score"
        place = table.schema.get_field_index(column)
        changed = table.set_column(place, column, [[value and -value for value in table[column].to_pylist()]])
        store.put(keys.table("flowers", name), schemas.encode_table(changed.cast(table.schema)))
    tables, complete = current_tables(sweep, sweep.read_manifest())
    assert complete
    assert {keys.table("flowers", n): schemas.encode_table(t) for n, t in tables.items() if n != "costs"} == true
    wanted = schemas.decode_table(true[keys.table("flowers", "scores")], "scores")
    assert OpenSweep(sweep).scores().equals(wanted)


def test_tables_of_two_drivers_are_no_whole(store, made):
    """One that was stopped early writes between two tables of one that finished."""
    early = MemoryStore()
    run_here(make_spec(seeds=2), made[0], early)
    store.put(keys.table("flowers", "attribution"), early.get(keys.table("flowers", "attribution")))
    sweep = Sweep(store, "flowers")
    tables, _ = current_tables(sweep, sweep.read_manifest())
    assert set(tables["attribution"]["seeds"].to_pylist()) == {4}


def test_a_seal_is_of_every_value():
    about = sealed({"a": 1, "b": [0.1, {"c": None}]})
    assert is_sealed(json.loads(canonical(about)))
    assert not is_sealed({**about, "b": [0.1, {"c": 0}]})
    assert not is_sealed({**about, "d": 0})
    assert is_sealed({"a": 1})
