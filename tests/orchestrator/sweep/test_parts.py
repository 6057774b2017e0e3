from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.sweep.keys import set_hash
from fimo.orchestrator.sweep.parts import METADATA_KEY, BadPartError, decode_part, encode_part
from fimo.workers.shard import ShardResult

REMOVALS = (NamedRemoval(0, "a", (3,)), NamedRemoval(4, "pair", (1, 2)))


def result(diverged: bool = False) -> ShardResult:
    g = torch.Generator().manual_seed(0)
    deltas = torch.randn(4, 3, 5, generator=g, dtype=torch.float64)
    distances = torch.rand(4, 3, generator=g, dtype=torch.float64)
    if diverged:
        deltas[1, 2, 0], distances[1, 2] = torch.nan, torch.inf
    return ShardResult(6, (2, 4, 9), deltas, distances, 2, 0.5, 0)


def encoded(diverged: bool = False) -> bytes:
    return encode_part(result(diverged), REMOVALS, "d" * 64, {"device": "x"})[0]


def test_a_part_gives_back_what_was_put_in():
    part = decode_part(encoded(), "key")
    assert (part.seed, part.steps, part.removals, part.digest) == (6, (2, 4, 9), REMOVALS, "d" * 64)
    np.testing.assert_array_equal(part.deltas, result().deltas.numpy())
    np.testing.assert_array_equal(part.distances, result().distances.numpy())
    assert part.diverged == []


def test_a_part_s_rows_are_the_contract_s():
    table = pq.read_table(io.BytesIO(encoded()))
    assert table.column_names == ["removal", "seed", "step", "deltas", "distance"]
    assert table["removal"].to_pylist() == [r for r in (0, 4, -1, -2) for _ in range(3)]
    assert table["deltas"][0].as_py() == result().deltas[0, 0].tolist()
    assert pq.ParquetFile(io.BytesIO(encoded())).metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_diverged_run_is_recorded_as_null_and_reported():
    data = encoded(diverged=True)
    assert pq.read_table(io.BytesIO(data))["deltas"][5].as_py() is None
    part = decode_part(data, "key")
    assert part.diverged == [(1, 9)]
    assert np.isnan(part.deltas[1, 2]).all()
    assert np.isfinite(part.deltas[1, 1]).all()


def test_provenance_is_no_part_of_the_rows_digest():
    one, other = (encode_part(result(), REMOVALS, "d" * 64, {"device_seconds": s}) for s in (1.0, 2.0))
    assert one[0] != other[0]
    assert one[1] == other[1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(encoded()) - 1))
def test_a_part_cut_short_anywhere_is_refused(length):
    with pytest.raises(BadPartError):
        decode_part(encoded()[:length], "key")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(encoded()) - 1), st.integers(1, 255))
def test_a_flipped_byte_never_changes_a_number(place, flip):
    data = bytearray(encoded())
    data[place] ^= flip
    try:
        part = decode_part(bytes(data), "key")
    except BadPartError:
        return
    np.testing.assert_array_equal(part.deltas, result().deltas.numpy())
    np.testing.assert_array_equal(part.distances, result().distances.numpy())


def rewritten(change) -> bytes:
    table = pq.read_table(io.BytesIO(encoded()))
    sink = io.BytesIO()
    pq.write_table(change(table), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.replace_schema_metadata({}),
        lambda t: t.replace_schema_metadata({METADATA_KEY: b"{"}),
        lambda t: t.slice(1),
        lambda t: pa.concat_tables([t, t]),
        lambda t: t.drop_columns(["distance"]),
        lambda t: t.take(list(reversed(range(t.num_rows)))),
        lambda t: t.set_column(1, t.schema.field(1), pa.array([7] * t.num_rows, pa.int64())),
        lambda t: t.set_column(3, t.schema.field(3), pa.array([[0.0] * 5] * t.num_rows, pa.list_(pa.float64()))),
        lambda t: t.set_column(
            3, t.schema.field(3), pa.array([[float("inf")] * 5] * t.num_rows, pa.list_(pa.float64()))
        ),
    ],
)
def test_an_altered_part_is_refused_in_one_line(change):
    with pytest.raises(BadPartError) as caught:
        decode_part(rewritten(change), "key")
    assert "\n" not in str(caught.value)


def test_sets_are_named_by_their_numbers_and_indices():
    assert set_hash(REMOVALS) == set_hash(REMOVALS)
    assert set_hash(REMOVALS) != set_hash(REMOVALS[::-1])
    assert set_hash([NamedRemoval(0, "a", (3,))]) == set_hash([NamedRemoval(0, "another name", (3,))])
