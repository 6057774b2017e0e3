"""Arrays that other tools have written: npy, safetensors or Parquet, as data; nothing is unpickled."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from fimo.workers.errors import UsageError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Labelled:
    """An array with the numbers that its removals and evaluation examples go by; None = by their place."""

    values: Array
    removals: tuple[int, ...] | None = None
    evals: tuple[int, ...] | None = None

    def beside(self, effects: Labelled, name: str) -> Array:
        """The values, of the same removals and evaluation examples as effects.

        Raises:
            UsageError: both name them, and name others.
        """
        for what, own, others in (("removals", self.removals, effects.removals), ("evals", self.evals, effects.evals)):
            if own is not None and others is not None and own != others:
                odd = sorted(set(own) ^ set(others))[:5]
                raise UsageError(f"estimates '{name}' are of other {what} than the effects: {', '.join(map(str, odd))}")
        return self.values


def read_effects(path: Path) -> Labelled:
    """Effects (seeds, removals, evals) of a file; NaN where a Parquet table has no row.

    npy or safetensors: one array of three axes. Parquet: columns seed, removal, eval, effect.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    arrays = _read(path, ("seed", "removal", "eval"), "effect")
    if len(arrays) != 1:
        raise UsageError(f"'{path}' holds {len(arrays)} arrays ({', '.join(sorted(arrays))}); effects are one")
    return next(iter(arrays.values()))


def read_estimates(given: str) -> dict[str, Labelled]:
    """Matrices (removals, evals) by name, of FILE or NAME=FILE.

    npy: one matrix, called like the file. safetensors: a matrix for each tensor. Parquet: columns removal, eval, value,
    and estimator if there are several.

    Raises:
        UsageError: as ``read_effects``.
    """
    name, equals, file = given.partition("=")
    path = Path(file if equals else given)
    arrays = _read(path, ("removal", "eval"), "value")
    if len(arrays) == 1:
        return {name if equals else _only(arrays) or path.stem: next(iter(arrays.values()))}
    if equals:
        raise UsageError(f"'{path}' holds {len(arrays)} matrices: leave NAME= away, they have names of their own")
    return arrays


def _only(arrays: dict[str, Labelled]) -> str:
    return next(iter(arrays))


def _read(path: Path, axes: Sequence[str], value: str) -> dict[str, Labelled]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror or error}") from error
    if data[:4] == b"PAR1":
        return _from_parquet(data, path, axes, value)
    if data[:6] == b"\x93NUMPY":
        try:
            return {"": Labelled(np.asarray(np.load(io.BytesIO(data), allow_pickle=False), dtype=np.float64))}
        except (ValueError, TypeError, EOFError, OSError) as error:
            raise UsageError(f"'{path}' is not an npy file of plain numbers") from error
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UsageError(f"'{path}' is neither Parquet nor npy nor safetensors") from error
    if not tensors:
        raise UsageError(f"'{path}' holds no tensor")
    return {name: Labelled(np.asarray(tensor, dtype=np.float64)) for name, tensor in tensors.items()}


def _from_parquet(data: bytes, path: Path, axes: Sequence[str], value: str) -> dict[str, Labelled]:
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
        raise UsageError(f"'{path}': {', '.join(wanted)} must be numbers") from error
    shape = tuple(len(known) for known, _ in places)
    labels = {axis: tuple(known) for axis, (known, _) in zip(axes, places, strict=True)}
    out: dict[str, Labelled] = {}
    chosen = np.array(names, dtype=object)
    for name in dict.fromkeys(names):
        here = chosen == name
        array, at = np.full(shape, np.nan), tuple(place[here] for _, place in places)
        if len(set(zip(*(a.tolist() for a in at), strict=True))) < int(here.sum()):
            raise UsageError(f"'{path}' has two rows for one {', '.join(axes)}")
        array[at] = numbers[here]
        out[str(name)] = Labelled(array, labels["removal"], labels["eval"])
    return out


def _places(column: pa.ChunkedArray) -> tuple[list[int], NDArray[np.int64]]:
    """The values that occur, ascending, and each row's place among them."""
    known, places = np.unique(column.to_numpy().astype(np.int64), return_inverse=True)
    return known.tolist(), places.astype(np.int64)
