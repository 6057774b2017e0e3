"""An estimator's values for some removals and a block of evaluation examples, as a Parquet object.

The same promises as a part: whole or absent, verified on read, provenance (cost, notes) beside the rows.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fimo.orchestrator.spec.canonical import SCHEMA_VERSION, canonical, is_sealed, rows_digest, sealed
from fimo.orchestrator.spec.parquet import TooLargeError, read_parquet
from fimo.orchestrator.spec.removals import NamedRemoval
from fimo.orchestrator.sweep.parts import METADATA_KEY, NOT_OURS, BadPartError

SCHEMA = pa.schema(
    [
        pa.field("removal", pa.int32(), nullable=False),
        pa.field("eval", pa.int32(), nullable=False),
        pa.field("step", pa.int32()),
        pa.field("value", pa.float64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class EstimateBlock:
    """A verified block of estimates.

    Attributes:
        params: canonical JSON of the hyper-parameters.
        first: number of the block's first evaluation example.
        steps: what the leading dimension of ``values`` runs over, None if the estimate is one for all amounts.
        values: float64 (R, E), or (S, R, E).
        seed: the one that the values are trained with; None = they are all that there is of the estimator.
    """

    digest: str
    estimator: str
    params: str
    removals: tuple[NamedRemoval, ...]
    first: int
    steps: tuple[int, ...] | None
    values: NDArray[np.float64]
    provenance: Mapping[str, Any]
    seed: int | None = None


def encode_block(block: EstimateBlock) -> tuple[bytes, str]:
    """Parquet bytes (zstd), and the digest of the rows; rows run over steps, removals, evals."""
    values = block.values if block.steps is not None else block.values[None]
    table = _table(block, values)
    rows = _rows(values)
    about = {
        "schema": SCHEMA_VERSION,
        "digest": block.digest,
        "estimator": block.estimator,
        "params": block.params,
        "removals": [[x.number, x.name, list(x.indices)] for x in block.removals],
        "first": block.first,
        "steps": None if block.steps is None else list(block.steps),
        "rows": rows,
        "provenance": dict(block.provenance),
    }
    if block.seed is not None:
        about["seed"] = block.seed
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: canonical(sealed(about))}), sink, compression="zstd")
    return sink.getvalue(), rows


def _table(block: EstimateBlock, values: NDArray[np.float64]) -> pa.Table:
    """Values (S, R, E), S = 1 for every amount, with the removal, evaluation example and step of each."""
    s, r, e = values.shape
    numbers = np.array([x.number for x in block.removals], dtype=np.int32)
    evals = np.arange(block.first, block.first + e, dtype=np.int32)
    steps: list[int | None] = [None] if block.steps is None else [*block.steps]
    return pa.table(
        {
            "removal": np.tile(np.repeat(numbers, e), s),
            "eval": np.tile(evals, s * r),
            "step": pa.array([step for step in steps for _ in range(r * e)], pa.int32()),
            "value": values.reshape(-1),
        },
        schema=SCHEMA,
    )


def decode_block(data: bytes, name: str) -> EstimateBlock:
    """Verify and read a block.

    Raises:
        BadPartError: torn, foreign or altered.
    """
    try:
        table = read_parquet(data)
        table.validate(full=True)
        about = json.loads((table.schema.metadata or {})[METADATA_KEY])
        removals = tuple(NamedRemoval(int(n), str(label), tuple(map(int, i))) for n, label, i in about["removals"])
        steps = None if about["steps"] is None else tuple(map(int, about["steps"]))
        values = table["value"].to_numpy().reshape(len(steps or (0,)), len(removals), -1)
        block = EstimateBlock(
            digest=str(about["digest"]),
            estimator=str(about["estimator"]),
            params=str(about["params"]),
            removals=removals,
            first=int(about["first"]),
            steps=steps,
            values=values if steps is not None else values[0],
            provenance=dict(about["provenance"]),
            seed=None if about.get("seed") is None else int(about["seed"]),
        )
        whole = is_sealed(about) and about.get("schema") == SCHEMA_VERSION and _rows(values) == about["rows"]
        named = table.replace_schema_metadata(None).equals(_table(block, values))
    except TooLargeError as error:
        raise BadPartError(f"estimates {name}: {error}") from error
    except NOT_OURS as error:
        raise BadPartError(f"estimates {name}: torn, or not fimo's") from error
    if not whole:
        raise BadPartError(f"estimates {name}: its rows are not those that it was written with")
    if not named:
        raise BadPartError(f"estimates {name}: its rows are not those that its metadata names")
    if not np.isfinite(values).all():
        raise BadPartError(f"estimates {name}: a value is not finite")
    return block


def _rows(values: NDArray[np.float64]) -> str:
    return rows_digest({"value": values})
