"""A workload's training tensor by its name: one value for each training example, to group removals by."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fimo.workers.errors import UsageError, nearest
from fimo.workers.examples import Batch, Examples

LABELS = ("label", "labels", "y")
"""What ``label`` may stand for, in this order: a tensor that is called so itself comes first."""


def read_column(train: Examples, name: str) -> NDArray[np.generic]:
    """The training tensor ``name`` as (n,), bool, integer or float.

    A dataset is read item by item, each collated alone. ``label`` is the first of ``LABELS`` that there is.

    Args:
        train: the training examples as the workload hands them out, before any cast.

    Raises:
        UsageError: there is no such tensor, or it has not one number for each example.
    """
    first = train.tensors if train.tensors is not None else train.batch([0])
    held = {key: value for key, value in first.items() if isinstance(value, Tensor)} if isinstance(first, dict) else {}
    found = name if name in held else next((n for n in LABELS if n in held), name) if name == "label" else name
    if found not in held:
        columns = [key for key, value in held.items() if value.dim() == 1]
        known = nearest(name, columns) if columns else "; none of theirs has one value for each example"
        raise UsageError(f"removals.by: the training examples have no tensor '{name}'{known}")
    shape, kind = tuple(held[found].shape), held[found].dtype
    if len(shape) != 1 or kind.is_complex:
        what = "complex" if kind.is_complex else f"of shape {('n', *shape[1:])}".replace("'", "")
        raise UsageError(f"removals.by: the tensor '{found}' is {what}; a grouping has one number for each example")
    values = held[found] if train.tensors is not None else _one_by_one(train, found)
    # numpy has no bfloat16.
    return (values.float() if values.is_floating_point() and values.element_size() < 4 else values).cpu().numpy()


def _one_by_one(train: Examples, name: str) -> Tensor:
    def value(batch: Batch) -> Tensor:
        tensor: Tensor = batch[name]
        return tensor

    return torch.cat([value(train.batch([index])) for index in range(len(train))])
