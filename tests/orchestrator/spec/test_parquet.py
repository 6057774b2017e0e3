"""Parquet that stands for far more than it has bytes is refused before it is decoded, whatever its footer says."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fimo.orchestrator.spec.parquet import TooLargeError, read_parquet

ROWS = 10_000_000


def written(table: pa.Table, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def zigzag(value: int, length: int = 0) -> bytes:
    """A number as Thrift's compact protocol has it, in at least so many bytes."""
    value, out = value * 2, bytearray()
    while value > 127 or len(out) + 1 < length:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


@pytest.mark.parametrize(
    "options", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {"row_group_size": 7}]
)
def test_what_fits_is_read_as_it_was_written(options):
    generator = np.random.default_rng(0)
    table = pa.table(
        {
            "whole": pa.array(generator.integers(0, 9, 50), pa.int32()),
            "real": generator.normal(size=50),
            "text": ["ä" * (i % 4) if i % 7 else None for i in range(50)],
            "list": [list(range(i % 5)) if i % 3 else None for i in range(50)],
            "yes": [i % 2 == 0 for i in range(50)],
        }
    ).replace_schema_metadata({b"fimo": b"{}"})
    for codec in ("zstd", "snappy", "none"):
        read = read_parquet(written(table, compression=codec, **options))
        assert read.equals(table)
        assert read.schema.metadata[b"fimo"] == b"{}"


def bombs() -> dict[str, bytes]:
    flat = written(pa.table({"x": pa.DictionaryArray.from_arrays(np.zeros(ROWS, np.int32), [0.0])}))
    row = pa.table({"x": pa.ListArray.from_arrays([0, ROWS], np.zeros(ROWS))})
    honest = written(row, compression="zstd", data_page_size=2**30)
    # Its footer says of a list of ten million that it is one of seven.
    start = len(honest) - 8 - int.from_bytes(honest[-8:-4], "little")
    said = zigzag(ROWS)
    assert said in honest[start:]
    lying = honest[:start] + honest[start:].replace(said, zigzag(7, len(said)))
    texts = pa.DictionaryArray.from_arrays(np.zeros(100_000, np.int32), ["x" * 100_000])
    return {"flat": flat, "list": honest, "lying": lying, "texts": written(pa.table({"x": texts}), store_schema=False)}


@pytest.mark.parametrize("kind", ["flat", "list", "lying", "texts"])
def test_a_few_bytes_that_stand_for_many_are_refused_before_they_are_decoded(kind):
    data = bombs()[kind]
    assert len(data) < 300_000
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    with pytest.raises(TooLargeError):
        read_parquet(data, 2**24 if kind != "texts" else None)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    assert pa.total_allocated_bytes() - before < 2**22


def test_no_flipped_byte_is_worse_than_an_error_that_its_readers_know():
    data = written(pa.table({"x": np.arange(20), "t": ["a"] * 20}))
    for place in range(len(data)):
        for flip in (0xFF, 0x01):
            bad = bytearray(data)
            bad[place] ^= flip
            try:
                read_parquet(bytes(bad))
            except (pa.ArrowException, OSError, ValueError, LookupError):
                continue
