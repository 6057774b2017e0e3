"""Scores of another library, taken into a sweep's scoring: any matrix over removals or all training examples.

Read from Parquet, npy, safetensors or CSV; nothing is unpickled. Positive must mean that removing the example raises g;
a library that counts the other way is negated on import, never afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fimo.estimators.declared import DECLARED
from fimo.orchestrator.spec.parquet import read_parquet
from fimo.orchestrator.sweep import keys
from fimo.orchestrator.sweep.csv import LONG, from_csv
from fimo.orchestrator.sweep.estimates import EstimateBlock, decode_block, encode_block
from fimo.orchestrator.sweep.foreign import NPY, PARQUET, from_npy, from_safetensors
from fimo.orchestrator.sweep.layouts import Wanted, check_layout, lay_out, refuse_disorder
from fimo.orchestrator.sweep.manifest import Manifest
from fimo.orchestrator.sweep.parts import BadPartError
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.errors import UsageError

PARAMS = '{"imported":true}'
Matrix = NDArray[np.float64]


def read_matrix(
    data: bytes, name: str, manifest: Manifest, layout: str | None = None
) -> tuple[Matrix, tuple[int, ...] | None, str | None]:
    """A removal × eval matrix, (R, m), or (S, R, m) with its steps; and how it was read, if not as it lies.

    Parquet or CSV: columns removal, eval, value (and step), as in ``estimates.parquet``; or rows of numeric columns.
    npy and safetensors (one tensor): a matrix. Matrices may lie any way of ``fimo.orchestrator.sweep.layouts``.

    Raises:
        UsageError: no layout or two fit the shape, values that are missing or not finite, rows or columns numbered out
            of order, no recorded step, or another kind of file.
    """
    wanted = Wanted(manifest.removals, manifest.evals, manifest.train)
    check_layout(layout)
    steps, told = None, None
    alone = all(len(removal.indices) == 1 for removal in manifest.removals)
    matrix = _read_file(data, name, [removal.indices[0] for removal in manifest.removals] if alone else [])
    if isinstance(matrix, pa.Table):
        if layout is not None:
            raise UsageError(f"'{name}' says of each value what it is of: leave --layout out")
        values, steps = _from_long(matrix, name, wanted.shape)
        if steps is not None and set(steps).isdisjoint(manifest.steps):
            recorded = ", ".join(map(str, manifest.steps[:10]))
            raise UsageError(f"'{name}' has values for step {steps[0]}, none for those that are recorded: {recorded}")
    else:
        values, told = lay_out(matrix, name, wanted, layout)
    if not np.isfinite(values).all():
        raise UsageError(f"'{name}' holds values that are missing or not finite")
    return values, steps, told


def _read_file(data: bytes, name: str, known: Sequence[int]) -> Matrix | pa.Table:
    """A matrix as it lies, or a table of the long form; ``known`` as for ``refuse_disorder``."""
    if data.startswith(NPY):
        return from_npy(data, name)
    if data.startswith(PARQUET):
        try:
            table = read_parquet(data)
        except (pa.ArrowException, OSError, ValueError, TypeError, LookupError) as error:
            raise UsageError(f"'{name}' is not a Parquet file of numbers") from error
    elif name.lower().endswith(".csv"):
        table = from_csv(data, name, known)
    else:
        return _only_tensor(data, name)
    return table if set(LONG) <= set(table.column_names) else _wide(table, name, known)


def _only_tensor(data: bytes, name: str) -> Matrix:
    tensors = from_safetensors(data, name)
    if len(tensors) != 1:
        raise UsageError(f"'{name}' holds {len(tensors)} tensors; give a file with one")
    return next(iter(tensors.values()))


def _wide(table: pa.Table, name: str, known: Sequence[int]) -> Matrix:
    # pandas keeps the index of a frame as a column, the last one.
    told = table.schema.pandas_metadata or {}
    index = [of for of in told.get("index_columns", []) if isinstance(of, str) and of in table.column_names]
    for of in index:
        refuse_disorder(table[of].to_pylist(), "rows", name, known)
    table = table.drop_columns(index)
    refuse_disorder(table.column_names, "columns", name, known)
    try:
        columns = [_numbers(column) for column in table.columns]
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise UsageError(f"'{name}' is not a table of numbers") from error
    return np.stack(columns, axis=1) if columns else np.zeros((0, 0))


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    if pa.types.is_temporal(column.type):
        raise ValueError("dates and times are no scores")
    out: NDArray[np.float64] = column.to_numpy().astype(np.float64)
    return out


def _from_long(table: pa.Table, name: str, shape: tuple[int, int]) -> tuple[Matrix, tuple[int, ...] | None]:
    try:
        removal, example = (_whole(table[c]) for c in ("removal", "eval"))
        value = _numbers(table["value"])
        by_step = "step" in table.column_names and table["step"].null_count < table.num_rows
        step = _whole(table["step"]) if by_step else np.zeros(len(value), dtype=np.int64)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise UsageError(f"'{name}': removal, eval, step and value must be numbers, the first three whole") from error
    inside = (removal >= 0) & (removal < shape[0]) & (example >= 0) & (example < shape[1])
    if not inside.all():
        raise UsageError(f"'{name}' names removals or evaluation examples that the sweep does not have")
    steps = sorted(set(step.tolist()))
    places = {s: i for i, s in enumerate(steps)}
    values = np.full((len(steps), *shape), np.nan)
    cells = (np.array([places[s] for s in step.tolist()], dtype=np.int64), removal, example)
    if len(set(zip(*(k.tolist() for k in cells), strict=True))) != len(value):
        raise UsageError(f"'{name}' gives a removal and evaluation example twice")
    values[cells] = value
    return (values, tuple(steps)) if by_step else (values[0] if steps else np.full(shape, np.nan), None)


def _whole(column: pa.ChunkedArray) -> NDArray[np.int64]:
    given = column.to_numpy()
    if not np.isfinite(given).all() or not np.array_equal(whole := given.astype(np.int64), given):
        raise ValueError("missing, or no whole numbers")
    out: NDArray[np.int64] = whole
    return out


def import_scores(
    sweep: Sweep,
    manifest: Manifest,
    data: bytes,
    file: str,
    name: str,
    negate: bool,
    layout: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> EstimateBlock:
    """Keep a matrix beside the sweep's own estimates, under a name of its own; replaces an earlier import of the name.

    Args:
        layout: which way round it lies; None = told by its shape.
        say: told how it was read, if not as it lies.

    Raises:
        UsageError: a name that is an estimator's or no name, or see ``read_matrix``.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UsageError(f"'{name}' is no name for scores: use letters, digits, '.', '_' and '-'")
    if name in DECLARED:
        raise UsageError(f"'{name}' is one of fimo's own estimators; choose another name")
    values, steps, told = read_matrix(data, file, manifest, layout)
    if told is not None:
        say(f"'{file}' {told}")
    block = EstimateBlock(
        digest=manifest.estimate_digest,
        estimator=name,
        params=PARAMS,
        removals=manifest.removals,
        first=0,
        steps=steps,
        values=-values if negate else values,
        provenance={"imported_from": file.rsplit("/", 1)[-1], "negated": negate, "read": told},
    )
    sweep.store.put(keys.imported(sweep.name, name), encode_block(block)[0])
    return block


def imported(sweep: Sweep, manifest: Manifest) -> tuple[list[EstimateBlock], list[tuple[str, str]], list[str]]:
    """The sweep's imported matrices by name, (key, why) of those that do not verify, the names of those of other data.

    Raises:
        StoreError: the store cannot be read.
    """
    blocks: list[EstimateBlock] = []
    bad: list[tuple[str, str]] = []
    others: list[str] = []
    for key in imported_keys(sweep):
        try:
            block = decode_block(sweep.store.get(key), key)
            if key != keys.imported(sweep.name, block.estimator):
                raise BadPartError(f"scores {key}: they belong under another key")
        except BadPartError as error:
            bad.append((key, str(error)))
            continue
        if block.digest == manifest.estimate_digest:
            blocks.append(block)
        else:
            others.append(block.estimator)
    return blocks, bad, others


def imported_keys(sweep: Sweep) -> Sequence[str]:
    """The keys of all imported matrices."""
    return [entry.key for entry in sweep.store.list(keys.imported(sweep.name))]
