"""The part: one shard's results as a Parquet object, encoded in memory, verified on every read.

A part is whole or absent (the store's conditional write) and says itself what it is: the digest of all that its
deltas depend on, its removals with their indices, and a digest of its rows. Provenance (host, device, timings) is
metadata beside the rows and no part of that digest.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fimo.orchestrator.spec.canonical import SCHEMA_VERSION, canonical, is_sealed, rows_digest, sealed
from fimo.orchestrator.spec.parquet import TooLargeError, read_about, read_parquet
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.workers.errors import FimoError

if TYPE_CHECKING:
    from fimo.workers.shard import ShardResult

BASELINE_ROW, FLOOR_ROW = -1, -2
"""Numbers of the baselines in a part's column of removals."""

SCHEMA = pa.schema(
    [
        pa.field("removal", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("deltas", pa.list_(pa.float64())),
        pa.field("distance", pa.float64()),
    ]
)
METADATA_KEY = b"fimo"
NOT_OURS = (
    *(pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    RecursionError,
)
"""What anything at all that somebody wrote may raise as it is read."""


class BadPartError(FimoError):
    """A part is torn, foreign or altered: it is set aside and computed again."""


@dataclass(frozen=True)
class Part:
    """A verified part.

    Attributes:
        removals: the part's removals in row order (numbers as the spec counted them when it was written).
        steps: the T recorded steps.
        deltas: float64 (C + 2, T, m): removals, then the baseline, then the second baseline; NaN if diverged.
        distances: float64 (C + 2, T).
        rows: the digest of the rows and the scale.
        scale: the root mean square of g(z, θᶠ) over evaluation examples.
        provenance: versions, device, dtype, flags, timings.
        at_final: g(z, θᶠ), float64 (m,); None in a part from before it was kept.
    """

    digest: str
    seed: int
    removals: tuple[NamedRemoval, ...]
    steps: tuple[int, ...]
    deltas: NDArray[np.float64]
    distances: NDArray[np.float64]
    rows: str
    provenance: Mapping[str, Any]
    scale: float = 0.0
    at_final: NDArray[np.float64] | None = None

    @property
    def diverged(self) -> list[tuple[int, int]]:
        """(row, step) of every run that is not finite, in row order."""
        if np.isfinite(self.deltas).all():
            return []
        rows, places = np.nonzero(~np.isfinite(self.deltas).all(axis=2))
        return [(int(r), self.steps[int(p)]) for r, p in zip(rows, places, strict=True)]


def encode_part(
    result: ShardResult, removals: Sequence[NamedRemoval], result_digest: str, provenance: Mapping[str, Any]
) -> tuple[bytes, str]:
    """A shard's results as Parquet bytes (zstd), and the digest of the rows.

    Rows run over removals (the baseline −1 and the second baseline −2 last), then steps. The deltas of a run that
    diverged are null.
    """
    deltas, distances = result.deltas.numpy(), result.distances.numpy()
    numbers = np.array([*(r.number for r in removals), BASELINE_ROW, FLOOR_ROW], dtype=np.int32)
    steps = np.array(result.steps, dtype=np.int32)
    at_final = None if result.at_final is None else result.at_final.numpy()
    rows = _rows(numbers, steps, deltas, distances, result.scale, at_final)
    flat = deltas.reshape(-1, deltas.shape[2])
    finite = np.isfinite(flat).all(axis=1)
    offsets = np.concatenate([[0], np.cumsum(np.where(finite, flat.shape[1], 0))]).astype(np.int32)
    table = pa.table(
        {
            "removal": np.repeat(numbers, len(steps)),
            "seed": np.full(len(flat), result.seed, dtype=np.int64),
            "step": np.tile(steps, len(numbers)),
            "deltas": pa.ListArray.from_arrays(offsets, flat[finite].reshape(-1), mask=pa.array(~finite)),
            "distance": pa.array(distances.reshape(-1), mask=~(finite & np.isfinite(distances.reshape(-1)))),
        },
        schema=SCHEMA,
    )
    about = {
        "schema": SCHEMA_VERSION,
        "digest": result_digest,
        "seed": result.seed,
        "steps": list(result.steps),
        "evals": int(deltas.shape[2]),
        "removals": [[r.number, r.name, list(r.indices)] for r in removals],
        "scale": result.scale,
        **({} if at_final is None else {"at_final": at_final.tolist()}),
        "rows": rows,
        "provenance": dict(provenance),
    }
    sink = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata({METADATA_KEY: canonical(sealed(about))}),
        sink,
        compression="zstd",
        use_dictionary=False,
    )
    return sink.getvalue(), rows


def decode_part(data: bytes, key: str, steps: int | None = None, evals: int | None = None) -> Part:
    """Verify and read a part.

    Args:
        steps, evals: how many the sweep has; a part of others is not decoded. None = whatever it says.

    Raises:
        BadPartError: one line saying what is wrong with it: torn, of another schema, rows missing or altered.
    """
    about = _about(data, key)
    try:
        removals = tuple(NamedRemoval(int(n), str(name), tuple(map(int, idx))) for n, name, idx in about["removals"])
        named, m, seed = tuple(map(int, about["steps"])), int(about["evals"]), int(about["seed"])
        expected, result_digest = str(about["rows"]), str(about["digest"])
        scale, provenance = float(about["scale"]), dict(about["provenance"])
        at_final = np.array(about["at_final"], dtype=np.float64) if "at_final" in about else None
    except NOT_OURS as error:
        raise BadPartError(f"part {key}: its metadata is not fimo's") from error
    shape = (len(removals) + 2, len(named))
    if evals not in (None, m) or steps not in (None, len(named)):
        raise BadPartError(f"part {key}: its steps or evaluation examples are not the sweep's")
    table = _read(data, key, shape[0] * shape[1], m)
    if m < 0 or table.num_rows != shape[0] * shape[1]:
        raise BadPartError(f"part {key}: {table.num_rows} rows instead of {shape[0] * shape[1]}")
    deltas, distances = _values(table, shape, m, key)
    numbers = np.array([*(r.number for r in removals), BASELINE_ROW, FLOOR_ROW], dtype=np.int32)
    same_rows = np.array_equal(table["removal"].to_numpy(), np.repeat(numbers, len(named))) and np.array_equal(
        table["step"].to_numpy(), np.tile(np.array(named, dtype=np.int32), len(numbers))
    )
    if not same_rows or table["seed"].unique().to_pylist() != [seed]:
        raise BadPartError(f"part {key}: its rows are not those that its metadata names")
    if at_final is not None and at_final.shape != (m,):
        raise BadPartError(f"part {key}: g at the final model is not {m} numbers")
    if _rows(numbers, np.array(named, dtype=np.int32), deltas, distances, scale, at_final) != expected:
        raise BadPartError(f"part {key}: its rows do not have the digest that it was written with")
    return Part(result_digest, seed, removals, named, deltas, distances, expected, provenance, scale, at_final)


def _rows(
    numbers: NDArray[np.int32],
    steps: NDArray[np.int32],
    deltas: NDArray[np.float64],
    distances: NDArray[np.float64],
    scale: float,
    at_final: NDArray[np.float64] | None = None,
) -> str:
    whole = bool(np.isfinite(deltas).all())
    finite: Any = whole or np.isfinite(deltas).all(axis=2)
    # Digest every diverged run as the same NaN: it is stored as null, which keeps no bits.
    clean = deltas if whole else np.where(finite[:, :, None], deltas, np.nan)
    kept = np.where(finite & np.isfinite(distances), distances, np.nan)
    columns = {"removal": numbers, "step": steps, "deltas": clean, "distance": kept, "scale": np.array([scale])}
    # Parts from before it was kept have digests without it.
    return rows_digest(columns if at_final is None else {**columns, "at_final": at_final})


def _read(data: bytes, key: str, rows: int, evals: int) -> pa.Table:
    try:
        # Values twice as wide as they are: pages say more than values.
        table = read_parquet(data, 2 * rows * (8 * evals + 64) + 2**20)
        table.validate(full=True)
    except TooLargeError as error:
        raise BadPartError(f"part {key}: {error}") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadPartError(f"part {key}: torn, or not Parquet") from error
    if not table.schema.equals(SCHEMA):
        raise BadPartError(f"part {key}: its columns are not a part's")
    return table


def _about(data: bytes, key: str) -> dict[str, Any]:
    try:
        held = read_about(data)
    except NOT_OURS as error:
        raise BadPartError(f"part {key}: torn, or not Parquet") from error
    try:
        about = json.loads(held[METADATA_KEY])
        whole = not isinstance(about, dict) or is_sealed(about)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise BadPartError(f"part {key}: it carries no metadata of fimo") from error
    if not whole:
        raise BadPartError(f"part {key}: its metadata is not as it was written")
    if not isinstance(about, dict) or about.get("schema") != SCHEMA_VERSION:
        raise BadPartError(f"part {key}: it was written under another schema version")
    return about


def _values(
    table: pa.Table, shape: tuple[int, int], m: int, key: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    column = table["deltas"].combine_chunks()
    present = column.is_valid().to_numpy(zero_copy_only=False)
    values = column.flatten().to_numpy(zero_copy_only=False)
    lengths = column.value_lengths().drop_null().to_numpy(zero_copy_only=False)
    if bool(np.any(lengths != m)) or not np.isfinite(values).all():
        raise BadPartError(f"part {key}: a row's deltas are not {m} finite numbers")
    deltas = values.reshape(-1, m)
    if not present.all():
        deltas = np.full((shape[0] * shape[1], m), np.nan)
        deltas[present] = values.reshape(-1, m)
    distances = table["distance"].to_numpy().astype(np.float64)
    return deltas.reshape(*shape, m), distances.reshape(shape)
