"""Labelled sentences as users have them, and lists of tokens as tensors.

Read are tables with a header (``.tsv`` as GLUE writes them, where a quote is a letter; ``.csv``) and folders written by
``datasets.save_to_disk``, of which pyarrow reads the Arrow files; the package datasets is not needed.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fimo.workers.errors import UsageError
from fimo.workers.workloads.files import Source, extra

TEXT, LABEL = ("sentence", "text"), ("label", "labels")
"""Names that the two columns may have."""

SPLITS = (("train",), ("dev", "validation", "valid"))
"""Names of the training and of the evaluation part."""

Labelled = tuple[list[str], list[str]]
"""Sentences and their labels, as they stand in the file."""


def read_parts(data: Path, evals: Path | None, source: Source) -> tuple[Labelled, Labelled]:
    """The training and the evaluation sentences.

    Args:
        data: a folder with train.tsv and dev.tsv (or validation.tsv, or .csv), or one of ``datasets.save_to_disk``;
            or the training table alone.
        evals: the evaluation table, if ``data`` is a table.

    Raises:
        UsageError: in one line, what is missing or is something else.
    """
    if data.is_dir():
        if evals is not None:
            raise UsageError(f"evals goes with a training table, and data is the folder {data}")
        first, second = (_part(data, names, source) for names in SPLITS)
        return first, second
    if not data.is_file():
        raise source.missing(data)
    if evals is None:
        raise UsageError(f"data is the table {data}: name the evaluation table (workload_args: {{evals: FILE}})")
    if not evals.is_file():
        raise source.missing(evals)
    return read_table(data, source), read_table(evals, source)


def _part(folder: Path, names: Sequence[str], source: Source) -> Labelled:
    for name in names:
        for ending in (".tsv", ".csv"):
            if (folder / f"{name}{ending}").is_file():
                return read_table(folder / f"{name}{ending}", source)
        if (folder / name / "state.json").is_file():
            return read_arrow(folder / name, source)
    raise source.refuse(folder, f"has no {' or '.join(f'{name}.tsv' for name in names)}")


def read_table(path: Path, source: Source) -> Labelled:
    """Sentences and labels of a table with a header, tab-separated unless it is a ``.csv``.

    Raises:
        UsageError: a column is missing, or a row is cut short.
    """
    by_tab = path.suffix != ".csv"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # In GLUE's files a quote is a letter of the sentence.
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if by_tab else csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise source.refuse(path, f"cannot be read ({type(error).__name__})") from error
    header = [name.strip() for name in rows[0]] if rows else []
    places = [_place(header, names, path, source) for names in (TEXT, LABEL)]
    rows = [row for row in rows[1:] if any(cell.strip() for cell in row)]
    for number, row in enumerate(rows):
        if len(row) <= max(places):
            raise source.refuse(path, f"is cut short in row {number}")
    return [row[places[0]] for row in rows], [row[places[1]].strip() for row in rows]


def read_arrow(folder: Path, source: Source) -> Labelled:
    """Sentences and labels of one split that ``datasets.save_to_disk`` wrote: Arrow streams that state.json lists.

    Raises:
        UsageError: a column is missing, the files cannot be read, or pyarrow is not installed.
    """
    extra("pyarrow", "text")
    import pyarrow as pa

    try:
        listed = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
        tables = []
        for file in listed:
            with pa.memory_map(str(folder / file["filename"])) as mapped, pa.ipc.open_stream(mapped) as stream:
                tables.append(stream.read_all())
        table = pa.concat_tables(tables)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise source.refuse(folder, f"is no split of a saved data set ({type(error).__name__})") from error
    columns = [table.column(_place(table.column_names, names, folder, source)).to_pylist() for names in (TEXT, LABEL)]
    return [str(text) for text in columns[0]], [str(label) for label in columns[1]]


def _place(header: Sequence[str], names: Sequence[str], path: Path, source: Source) -> int:
    for name in names:
        if name in header:
            return list(header).index(name)
    raise source.refuse(path, f"has no column '{names[0]}'")


def number_labels(train: Sequence[str], evals: Sequence[str], where: Path, source: Source) -> tuple[Tensor, Tensor]:
    """Classes 0, 1, … as int64 (n,) and (m,): the labels themselves if they are numbers, else names in their order.

    Raises:
        UsageError: a number is below 0, there is one class alone, or an evaluation label is in no training row.
    """
    known = set(train)
    if strangers := sorted(set(evals) - known):
        raise source.refuse(where, f"has an evaluation label that no training row has: '{strangers[0]}'")
    if len(known) < 2:
        raise source.refuse(where, f"has {len(known)} classes in its training rows, not 2 or more")
    try:
        numbers = {label: int(label) for label in known}
    except ValueError:
        numbers = {label: number for number, label in enumerate(sorted(known))}
    if sorted(numbers.values()) != list(range(len(known))):
        labels = ", ".join(str(number) for number in sorted(numbers.values())[:4])
        raise source.refuse(where, f"has the labels {labels} …, not 0, 1 and so on (unlabelled rows have −1)")
    first, second = (torch.tensor([numbers[label] for label in labels]) for labels in (train, evals))
    return first, second


def tokenise(texts: Sequence[str], tokenizer: Any, most: int) -> list[list[int]]:
    """Tokens of each text with the model's special ones, cut to ``most``."""
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=most)["input_ids"]
    return ids


def padded(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as int64 (n, longest), padded on the right, and their mask: 1 where a token is."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), filler, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(longest) < lengths[:, None]).long()


def decoded(example: Mapping[str, Tensor], tokenizer: Any) -> dict[str, Any]:
    """An example's tokens as the text that a reader is shown, and the rest of it that is one number."""
    mask = example.get("attention_mask")
    ids = example["input_ids"] if mask is None else example["input_ids"][mask.bool()]
    others = {name: value for name, value in example.items() if value.dim() == 0}
    return {"text": tokenizer.decode(ids.tolist(), skip_special_tokens=True), **others}
