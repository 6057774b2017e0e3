"""Arrays that other tools have written: npy, safetensors or Parquet, as data; nothing is unpickled.

The rows of a Parquet table say which removal and evaluation example they are of. Effects and estimates are matched by
that; an npy file or a tensor has places alone: 0, 1, 2 … or, beside a table, its ids in ascending order.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fimo.orchestrator.sweep.foreign import NPY, PARQUET, from_npy, from_safetensors
from fimo.workers.errors import UsageError

Array = NDArray[np.float64]


Ids = tuple[tuple[int, ...], ...]
"""What each axis of an array is of, ascending."""


@dataclass(frozen=True)
class Effects:
    """Effects of a file.

    Attributes:
        values: float64 (seeds, removals, evals), NaN where a Parquet table has no row.
        ids: of the removals and of the evaluation examples; None if the file does not say.
    """

    values: Array
    ids: Ids | None


def read_effects(path: Path) -> Effects:
    """Effects of a file.

    npy or safetensors: one array of three axes. Parquet: columns seed, removal, eval, effect.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    arrays, ids = _read(path, ("seed", "removal", "eval"), "effect")
    if len(arrays) != 1:
        raise UsageError(f"'{path}' holds {len(arrays)} arrays ({', '.join(sorted(arrays))}); effects are one")
    return Effects(next(iter(arrays.values())), ids and ids[1:])


def read_estimates(given: str, effects: Effects) -> dict[str, Array]:
    """Matrices (removals, evals) by name, of FILE or NAME=FILE, with the rows and columns of the effects.

    npy: one matrix, called like the file. safetensors: a matrix for each tensor. Parquet: columns removal, eval, value,
    and estimator if there are several.

    Raises:
        UsageError: as ``read_effects``; or a table is of other removals or evaluation examples than the effects.
    """
    name, equals, file = given.partition("=")
    path = Path(file if equals else given)
    arrays, ids = _read(path, ("removal", "eval"), "value")
    if ids is not None:
        _same_ids(path, ids, effects)
    if len(arrays) == 1:
        return {name if equals else _only(arrays) or path.stem: next(iter(arrays.values()))}
    if equals:
        raise UsageError(f"'{path}' holds {len(arrays)} matrices: leave NAME= away, they have names of their own")
    return arrays


def _same_ids(path: Path, ids: Ids, effects: Effects) -> None:
    of = effects.ids or tuple(tuple(range(count)) for count in effects.values.shape[1:])
    for axis, own, wanted in zip(("removal", "eval"), ids, of, strict=False):
        if own != wanted:
            lacking = sorted({*wanted} ^ {*own})[0]
            which = "the effects have it" if lacking in wanted else "the effects do not"
            there = "has no" if lacking in wanted else "has"
            numbered = "" if effects.ids else f" (an array without ids has {axis} 0 to {len(wanted) - 1})"
            raise UsageError(f"'{path}' {there} {axis} {lacking}, {which}{numbered}: give both the same {axis}s")


def _only(arrays: dict[str, Array]) -> str:
    return next(iter(arrays))


def _read(path: Path, axes: Sequence[str], value: str) -> tuple[dict[str, Array], Ids | None]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror or error}") from error
    if data.startswith(PARQUET):
        return _from_parquet(data, path, axes, value)
    if data.startswith(NPY):
        return {"": from_npy(data, str(path))}, None
    tensors = from_safetensors(data, str(path))
    if not tensors:
        raise UsageError(f"'{path}' holds no tensor")
    return tensors, None


def _from_parquet(data: bytes, path: Path, axes: Sequence[str], value: str) -> tuple[dict[str, Array], Ids]:
    try:
        table = pq.read_table(io.BytesIO(data), use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(f"'{path}' is torn, or not Parquet") from error
    wanted = [*axes, value]
    lacking = [name for name in wanted if name not in table.column_names]
    if lacking:
        raise UsageError(f"'{path}' has no column {lacking[0]}: it needs {', '.join(wanted)}")
    if "step" in table.column_names and len(set(table["step"].to_pylist())) > 1:
        raise UsageError(f"'{path}' has several steps: keep the rows of one")
    names = table["estimator"].to_pylist() if "estimator" in table.column_names else [""] * table.num_rows
    if "params" in table.column_names:
        names = [
            f"{n} {p}" if p not in ("{}", None) else n for n, p in zip(names, table["params"].to_pylist(), strict=True)
        ]
    try:
        places = [_places(table[axis]) for axis in axes]
        numbers = table[value].to_numpy().astype(np.float64)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise UsageError(f"'{path}': {', '.join(wanted)} must be numbers, {' and '.join(axes)} whole ones") from error
    shape = tuple(len(known) for known, _ in places)
    out: dict[str, Array] = {}
    chosen = np.array(names, dtype=object)
    for name in dict.fromkeys(names):
        here = chosen == name
        array, at = np.full(shape, np.nan), tuple(place[here] for _, place in places)
        if len(set(zip(*(a.tolist() for a in at), strict=True))) < int(here.sum()):
            raise UsageError(f"'{path}' has two rows for one {', '.join(axes)}")
        array[at] = numbers[here]
        out[str(name)] = array
    return out, tuple(tuple(known) for known, _ in places)


def _places(column: pa.ChunkedArray) -> tuple[list[int], NDArray[np.int64]]:
    """The values that occur, ascending, and each row's place among them."""
    given = column.to_numpy()
    if not np.isfinite(given).all() or not np.array_equal(ids := given.astype(np.int64), given):
        raise ValueError("ids that are missing, or no whole numbers")
    known, places = np.unique(ids, return_inverse=True)
    return known.tolist(), places.astype(np.int64)
