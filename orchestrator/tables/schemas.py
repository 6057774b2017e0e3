"""The tables that ``pull`` brings: their schemas and their bytes.

Every table but ``costs`` is a pure function of the spec, so its bytes are the same from run to run.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
from pyarrow import compute

from fimo.orchestrator.spec.canonical import canonical
from fimo.orchestrator.spec.parquet import read_parquet
from fimo.workers.errors import StoreError

_INT, _REAL, _TEXT = pa.int32(), pa.float64(), pa.string()

ATTRIBUTION = pa.schema(
    [
        ("removal", _INT),
        ("eval", _INT),
        ("step", _INT),
        ("effect", _REAL),
        ("sem", _REAL),
        ("p", _REAL),
        ("seeds", _INT),
        ("spread", _REAL),
        ("under_floor", pa.bool_()),
    ]
)
TRAINING_ONLY = pa.schema(
    [("eval", _INT), ("step", _INT), ("delta", _REAL), ("sem", _REAL), ("seeds", _INT), ("at_final", _REAL)]
)
AMOUNTS = pa.schema([("step", _INT), ("distance", _REAL), ("sem", _REAL), ("seeds", _INT)])
NOTES = pa.schema(
    [
        ("estimator", _TEXT),
        ("params", _TEXT),
        ("first", _INT),
        ("count", _INT),
        ("seed", pa.int64()),
        ("note", _TEXT),
        ("value", _TEXT),
    ]
)
ESTIMATES = pa.schema(
    [
        ("estimator", _TEXT),
        ("params", _TEXT),
        ("removal", _INT),
        ("eval", _INT),
        ("step", _INT),
        ("value", _REAL),
    ]
)
SCORES = pa.schema(
    [
        ("estimator", _TEXT),
        ("params", _TEXT),
        ("metric", _TEXT),
        ("adjust", _TEXT),
        ("seeds", _INT),
        ("step", _INT),
        ("score", _REAL),
        ("sem", _REAL),
        ("low", _REAL),
        ("high", _REAL),
        ("ceiling", _REAL),
        ("normalised", _REAL),
        ("evals", _INT),
        ("undefined", _INT),
    ]
)
SIMILARITY = pa.schema(
    [
        ("estimator", _TEXT),
        ("params", _TEXT),
        ("other_estimator", _TEXT),
        ("other_params", _TEXT),
        ("step", _INT),
        ("cosine", _REAL),
        ("sem", _REAL),
        ("evals", _INT),
        ("undefined", _INT),
    ]
)
RELIABILITY = pa.schema(
    [
        ("step", _INT),
        ("adjust", _TEXT),
        ("seeds", _INT),
        ("measured", pa.bool_()),
        ("reliability", _REAL),
        ("ceiling", _REAL),
        ("noise_floor", _REAL),
        ("significant", _REAL),
        ("spearman_lower", _REAL),
        ("spearman_upper", _REAL),
    ]
)
REMOVALS = pa.schema(
    [
        ("removal", _INT),
        ("name", _TEXT),
        ("indices", pa.list_(_INT)),
        ("ids", pa.list_(_TEXT)),
        ("labels", pa.list_(_TEXT)),
    ]
)
COMPARISON = pa.schema(
    [
        ("metric", _TEXT),
        ("adjust", _TEXT),
        ("step", _INT),
        ("other_step", _INT),
        ("score", _REAL),
        ("sem", _REAL),
        ("low", _REAL),
        ("high", _REAL),
        ("evals", _INT),
        ("undefined", _INT),
        ("removals", _INT),
        ("seeds", _INT),
        ("other_seeds", _INT),
        ("ceiling", _REAL),
        ("other_ceiling", _REAL),
        ("joint_ceiling", _REAL),
        ("shared", _REAL),
        ("normalised", _REAL),
    ]
)
"""What ``fimo compare`` gives of two sweeps; no table of a sweep."""
RANKING = pa.schema(
    [
        ("eval", _INT),
        ("index", _INT),
        ("estimate", _REAL),
        ("effect", _REAL),
        ("low", _REAL),
        ("high", _REAL),
        ("verified", _REAL),
        ("sem", _REAL),
        ("p", _REAL),
        ("rank", _INT),
        ("id", _TEXT),
        ("label", _TEXT),
    ]
)
"""What ``fimo rank`` writes, ``tables/ranking.parquet``: rows by evaluation example, then rank."""
SEARCH = pa.schema(
    [
        ("estimator", _TEXT),
        ("params", _TEXT),
        ("damping", _REAL),
        ("step", _INT),
        ("epoch", _REAL),
        ("matched", _REAL),
        ("searched", _REAL),
        ("searched_evals", _INT),
        ("score", _REAL),
        ("sem", _REAL),
        ("low", _REAL),
        ("high", _REAL),
        ("ceiling", _REAL),
        ("normalised", _REAL),
        ("evals", _INT),
        ("undefined", _INT),
        ("best", pa.bool_()),
        ("best_overall", pa.bool_()),
        ("seconds", _REAL),
        ("device", _TEXT),
    ]
)
"""What ``fimo search`` writes of estimators, ``tables/search.parquet``: rows by point in spec order, then step."""
SEARCH_TRAINING = pa.schema(
    [
        ("optimizer", _TEXT),
        ("lr", _REAL),
        ("removal_mode", _TEXT),
        ("step", _INT),
        ("epoch", _REAL),
        ("seeds", _INT),
        ("reliability", _REAL),
        ("seconds_per_seed", _REAL),
        ("per_device_second", _REAL),
        ("distance", _REAL),
        ("relative", _REAL),
        ("under_floor", _REAL),
        ("fault", _TEXT),
        ("stopped", pa.bool_()),
        ("best", pa.bool_()),
        ("device", _TEXT),
    ]
)
"""What ``fimo search`` writes of further training, ``tables/search_training.parquet``: by candidate, then step."""
COSTS = pa.schema(
    [
        ("what", _TEXT),
        ("name", _TEXT),
        ("params", _TEXT),
        ("device", _TEXT),
        ("device_seconds", _REAL),
        ("peak_bytes", pa.int64()),
    ]
)


def with_epoch(schema: pa.Schema) -> pa.Schema:
    """A schema that has ``step``, with ``epoch`` (float64: passes over the training examples) beside it."""
    place = schema.get_field_index("step")
    return schema if place < 0 else schema.insert(place + 1, pa.field("epoch", _REAL))


SCHEMAS = {
    name: with_epoch(schema)
    for name, schema in {
        "attribution": ATTRIBUTION,
        "training_only": TRAINING_ONLY,
        "amounts": AMOUNTS,
        "estimates": ESTIMATES,
        "estimator_notes": NOTES,
        "scores": SCORES,
        "similarity": SIMILARITY,
        "reliability": RELIABILITY,
        "removals": REMOVALS,
        "costs": COSTS,
    }.items()
}
"""The tables of a sweep by name, as they are written."""

METADATA_KEY = b"fimo"
"""Of a table's Parquet metadata: JSON with the ``sweep``'s name, its ``digest``, its ``spec`` and the ``table``."""


def metadata(name: str, about: Mapping[str, Any]) -> dict[bytes, bytes]:
    """The Parquet metadata of a table of a sweep; ``about`` as for ``published``."""
    return {METADATA_KEY: canonical({**about, "table": name}).encode()}


def published(tables: Mapping[str, pa.Table], steps_per_epoch: int, about: Mapping[str, Any]) -> dict[str, pa.Table]:
    """Tables as they are written: with epochs beside steps, and with what they are of in their metadata.

    Args:
        steps_per_epoch: optimizer steps of one pass over the training examples.
        about: the sweep's name, digest and spec, as plain values.
    """
    return {
        name: _with_epochs(value, steps_per_epoch).replace_schema_metadata(metadata(name, about))
        for name, value in tables.items()
    }


def _with_epochs(value: pa.Table, steps_per_epoch: int) -> pa.Table:
    place = value.schema.get_field_index("step")
    if place < 0:
        return value
    epochs = compute.divide(value.column(place).cast(_REAL), float(steps_per_epoch))
    return value.add_column(place + 1, pa.field("epoch", _REAL), epochs)


def table(schema: pa.Schema, **columns: Any) -> pa.Table:
    """A table of numpy columns or lists; NaN and None become null."""
    arrays = [
        pa.array(columns[field.name], field.type, from_pandas=True)
        if not isinstance(columns[field.name], pa.Array | pa.ChunkedArray)
        else columns[field.name]
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def from_rows(schema: pa.Schema, rows: Iterable[tuple[object, ...]]) -> pa.Table:
    """A table of rows, which may be none; NaN and None become null."""
    columns = list(zip(*rows, strict=True)) or [() for _ in schema]
    return table(schema, **{field.name: list(c) for field, c in zip(schema, columns, strict=True)})


def encode_table(value: pa.Table) -> bytes:
    """Parquet bytes (zstd); equal tables give equal bytes under one version of pyarrow."""
    sink = io.BytesIO()
    pq.write_table(value, sink, compression="zstd")
    return sink.getvalue()


def decode_table(data: bytes, name: str) -> pa.Table:
    """Read a table back.

    Raises:
        StoreError: the object is not the table that it should be.
    """
    try:
        value = read_parquet(data)
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise StoreError(f"table {name} is torn or foreign; run the sweep again to write it anew") from error
    if not value.schema.equals(SCHEMAS[name]):
        raise StoreError(f"table {name} has foreign columns; run the sweep again to write it anew")
    # Cast to our own name for a list's items: Parquet has another, `equals` overlooks it, and the bytes would differ.
    return value.cast(SCHEMAS[name].with_metadata(value.schema.metadata))


def _joined(row: list[int]) -> str:
    return " ".join(map(str, row))


def encode_csv(value: pa.Table) -> bytes:
    """CSV bytes; lists are written as numbers joined by spaces, of texts as JSON."""
    for place, field in enumerate(value.schema):
        if pa.types.is_list(field.type):
            as_text = json.dumps if pa.types.is_string(field.type.value_type) else _joined
            joined = [None if row is None else as_text(row) for row in value.column(place).to_pylist()]
            value = value.set_column(place, field.name, pa.array(joined, pa.string()))
    sink = io.BytesIO()
    pc.write_csv(value, sink)
    return sink.getvalue()
