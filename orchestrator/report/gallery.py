"""Training and evaluation examples shown as what they are: a text, the row of a table, an image.

What an example is, its workload says (``Workload.render``), or a function that the user names; else its tensors tell.
Only the user's own code is run, and nothing is computed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fimo.workers.errors import WorkloadError, in_a_line
from fimo.workers.examples import leaves_of
from fimo.workers.workload import Workload

LONGEST, CELLS, SIDE = 700, 24, 512
"""Characters of a text, cells of a row, and pixels of an image's side that are shown at most."""
SMALLEST = 6
"""Pixels that a side of an image has at least: a smaller array is a table."""

Render = Callable[[Any], Any]


@dataclass(frozen=True)
class Shown:
    """An example for a reader; any of them may be lacking.

    Attributes:
        text: in words.
        row: (name, value) of each cell.
        image: a PNG as a data URI; ``pixels``: its width and height.
    """

    text: str | None = None
    row: tuple[tuple[str, str], ...] = ()
    image: str | None = None
    pixels: tuple[int, int] = (0, 0)


class Gallery:
    """The examples of a workload.

    Args:
        render: of one example, as ``train[i]`` (of a mapping, that of each of its tensors): its text, a mapping (the
            row of a table) or an image (H, W), (H, W, 1 or 3) or (1 or 3, H, W); default: the workload's own.
    """

    def __init__(self, workload: Workload, render: Render | None = None) -> None:
        self._of = {"train": workload.train, "evals": workload.evals}
        self._render, self._padding = render or workload.render, workload.padding

    @property
    def unguarded(self) -> bool:
        """Whether more may be shown than was trained on: of a data set, what its ``collate`` leaves out."""
        return not all(isinstance(of, Mapping) for of in self._of.values())

    def train(self, index: int) -> Shown:
        """A training example; raises WorkloadError, one line, if the user's function fails on it."""
        return self._shown("train", index)

    def eval(self, index: int) -> Shown:
        """An evaluation example; errors as ``train``."""
        return self._shown("evals", index)

    def _shown(self, kind: str, index: int) -> Shown:
        of = self._of[kind]
        try:
            item = _row(of, index) if isinstance(of, Mapping) else of[index]
            if self._render is not None:
                return shown(self._render(item), True)
            return shown(_unpadded(item, self._padding), False)
        except Exception as error:
            what = "training" if kind == "train" else "evaluation"
            raise WorkloadError(
                f"{what} example {index} cannot be shown: {in_a_line(error)}; a workload's render takes "
                "one example and returns a text, a mapping or an image"
            ) from error


def _row(tensors: Any, index: int) -> Any:
    if isinstance(tensors, Mapping):
        return {name: _row(value, index) for name, value in tensors.items()}
    return tensors[index]


def _unpadded(item: Any, padding: str | None) -> Any:
    """An example without its padding, and without the mask that says where that is."""
    mask = item.get(padding) if isinstance(item, Mapping) and padding is not None else None
    if not isinstance(mask, Tensor) or mask.dim() != 1:
        return item
    kept = mask.bool()
    return {
        name: value[kept] if isinstance(value, Tensor) and value.shape[:1] == mask.shape else value
        for name, value in item.items()
        if name != padding
    }


def shown(value: Any, rendered: bool) -> Shown:
    """An example as text, row or image.

    Args:
        rendered: it is what a user's function returned, so that a text is a text and a mapping a row.
    """
    if isinstance(value, str):
        return Shown(text=_cut(value))
    if not isinstance(value, Mapping | tuple | list):
        array = _array(value)
        picture = None if array is None else _picture(array)
        return _image(picture) if picture is not None else Shown(row=tuple(_cells([("value", value)])))
    leaves = list(value.items()) if rendered and isinstance(value, Mapping) else leaves_of(value)
    cells, found = list[tuple[str, Any]](), Shown()
    for name, leaf in leaves:
        array = None if isinstance(leaf, str) else _array(leaf)
        picture = None if array is None or found.image is not None else _picture(array)
        if picture is not None:
            found = _image(picture)
        else:
            cells.append((str(name).strip("'"), leaf))
    texts = [name for name, leaf in cells if isinstance(leaf, str) and (not rendered or name == "text")]
    if len(texts) == 1:
        [text] = [leaf for name, leaf in cells if name == texts[0]]
        rest = [(name, leaf) for name, leaf in cells if name != texts[0]]
        return Shown(_cut(text), tuple(_cells(rest)), found.image, found.pixels)
    return Shown(None, tuple(_cells(cells)), found.image, found.pixels)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1].rstrip() + "…"


def _cells(values: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Names and texts of a row's cells; a vector is a cell for each number, if there are few."""
    cells: list[tuple[str, str]] = []
    for name, value in values:
        array = None if isinstance(value, str) else _array(value)
        if array is None:
            cells.append((name, _cut(str(value))))
        elif array.ndim == 0 or array.size == 1:
            cells.append((name, _number(array.reshape(-1)[0])))
        elif array.ndim == 1 and array.size <= CELLS and array.dtype.kind == "f":
            cells += [(f"{name}[{i}]", _number(v)) for i, v in enumerate(array)]
        else:
            first = ", ".join(_number(v) for v in array.reshape(-1)[:CELLS])
            cells.append((name, first + (", …" if array.size > CELLS else "")))
    more = len(cells) - CELLS
    return cells if more <= 0 else [*cells[:CELLS], ("…", f"{more} more")]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def _array(value: Any) -> NDArray[Any] | None:
    """Numbers as an array; None if it holds none."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().double().numpy() if value.is_floating_point() else value.detach().cpu().numpy()
    array = np.asarray(value)
    return array if array.dtype.kind in "fiub" else None


def _picture(array: NDArray[Any]) -> NDArray[np.uint8] | None:
    """An array as pixels (H, W) or (H, W, 3); None if it is no image.

    Numbers between 0 and 1, and whole ones between 0 and 255, are taken as they are. Others are spread over the range
    that they have, all channels alike.
    """
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if not shaped or min(array.shape[:2]) < SMALLEST:
        return None
    if array.dtype == np.uint8:
        return array
    values = np.nan_to_num(array.astype(np.float64))
    least, most = float(values.min()), float(values.max())
    whole = array.dtype.kind in "iu"
    if whole and least >= 0 and most <= 255:
        return values.astype(np.uint8)
    if not (least >= 0 and most <= 1):
        values = (values - least) / ((most - least) or 1.0)
    return np.asarray(np.rint(values * 255), dtype=np.uint8)


def _image(pixels: NDArray[np.uint8]) -> Shown:
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    sink = io.BytesIO()
    image.save(sink, format="PNG", optimize=True)
    data = base64.b64encode(sink.getvalue()).decode()
    return Shown(image=f"data:image/png;base64,{data}", pixels=image.size)
