"""Arrays that other tools have written, as npy or safetensors: read as data, nothing is unpickled."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from fimo.workers.errors import UsageError

Array = NDArray[np.float64]
PARQUET, NPY = b"PAR1", b"\x93NUMPY"
"""How files of the two kinds begin."""


def from_npy(data: bytes, name: str) -> Array:
    """The array of an npy file called ``name``, float64; UsageError if it is not one of real numbers."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        if array.dtype.kind not in "biuf":
            raise ValueError(array.dtype)
        return np.asarray(array, dtype=np.float64)
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise UsageError(f"'{name}' is not an npy file of plain numbers") from error


def from_safetensors(data: bytes, name: str) -> dict[str, Array]:
    """The tensors of a file called ``name``, float64, by their names in order; UsageError if it is no such file."""
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UsageError(f"'{name}' is neither Parquet nor npy nor safetensors") from error
    # The file's own order is not kept on reading.
    return {key: np.asarray(tensors[key], dtype=np.float64) for key in sorted(tensors)}
