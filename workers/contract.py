"""A workload's contract, held against a batch: what is wrong with it in one line that names the key and the mend.

Looks at a few examples of either kind, and at all numbers of data that are kept as tensors. Does not train.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fimo.workers.errors import DivergedError, UsageError, WorkloadError, in_a_line, of_labels
from fimo.workers.examples import Batch, Examples, kind_of, leaves_of
from fimo.workers.functional import FunctionalModel
from fimo.workers.workload import Workload

LOOK = 4
"""Examples of either kind that the workload's functions are tried on."""
SUSPECTS = 64
"""Examples with numbers that are not finite whose loss or measure is looked at."""

Name = Literal["loss", "measure"]
KINDS: Mapping[Name, str] = {"loss": "training", "measure": "evaluation"}


def check_contract(model: FunctionalModel, train: Examples, evals: Examples) -> None:
    """Refuse a workload whose data or functions do not keep the contract, told from a few examples.

    Raises:
        UsageError: too few examples.
        WorkloadError: a batch that holds something else than tensors, or a function that fails on it or returns
            something else than one number an example.
        DivergedError: a loss or a measure that is not finite at θᶠ, with the key that holds such a number.
    """
    if len(train) < 2 or len(evals) < 1:
        raise UsageError(f"the workload has {len(train)} training and {len(evals)} evaluation examples: too few")
    sides: tuple[tuple[Name, Examples], ...] = (("loss", train), ("measure", evals))
    for name, examples in sides:
        some = range(min(LOOK, len(examples)))
        check_batch(_fetched(examples, some, KINDS[name]), len(some), KINDS[name])
    known = keys_of(train.batch([0]))
    for name, examples in sides:
        some = range(min(LOOK, len(examples)))
        check(model, examples.batch(some), len(some), [name], known if name == "measure" else ())
        _refuse_suspects(model, examples, name)


def names_of(workload: Workload, n: int) -> dict[str, list[str]]:
    """``ids`` and ``labels`` of the n training examples as texts, those of the two that the workload has.

    Raises:
        WorkloadError: one of them is not a sequence of n values, or two ids are one.
    """
    found: dict[str, list[str]] = {}
    for name, values in (("ids", workload.ids), ("labels", workload.labels)):
        if values is None:
            continue
        if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != n:
            held = len(values) if hasattr(values, "__len__") else kind_of(values)
            raise WorkloadError(f"the workload's {name} must be one for each of the {n} training examples, got {held}")
        plain = values.tolist() if hasattr(values, "tolist") else values
        found[name] = [str(value) for value in plain]
    _refuse_doubles(found.get("ids", []))
    return found


def _refuse_doubles(ids: Sequence[str]) -> None:
    """A key that two rows share leads back to neither."""
    met: dict[str, int] = {}
    for index, own in enumerate(ids):
        if own in met:
            raise WorkloadError(
                f"the workload's ids must differ: training examples {met[own]} and {index} are both '{own}'; put what "
                "they share into labels"
            )
        met[own] = index


def _fetched(examples: Examples, some: Sequence[int], kind: str) -> Batch:
    try:
        return examples.batch(some)
    except Exception as error:
        raise WorkloadError(
            f"the {kind} examples {some[0]} to {some[-1]} cannot be put into a batch: {in_a_line(error)}"
        ) from error


def check_batch(batch: Batch, size: int, kind: str) -> None:
    """Refuse a batch that is not a pytree of tensors whose first dimension runs over its examples.

    Args:
        kind: "training" or "evaluation".

    Raises:
        WorkloadError: in one line, which key holds what.
    """
    for key, leaf in leaves_of(batch):
        what = f"the {kind} batch's {key}" if key else f"the {kind} batch"
        if not isinstance(leaf, Tensor):
            raise WorkloadError(
                f"{what} holds {kind_of(leaf)}, not a tensor: turn numbers into tensors, and leave out what the "
                "model does not read (names and texts of examples go to the Workload's labels)"
            )
        if leaf.dim() == 0 or len(leaf) != size:
            raise WorkloadError(
                f"{what} has shape {tuple(leaf.shape)} for {size} examples: its first dimension must run over them"
            )


def check(
    model: FunctionalModel,
    batch: Batch,
    size: int,
    names: Sequence[Name] = ("loss", "measure"),
    known: Sequence[str] = (),
) -> None:
    """Refuse outputs that are no tensor, and a loss or measure that is not one number an example.

    Args:
        batch: ``size`` examples, at least 2, so that a mean cannot pass for a per-example loss.
        names: which of the two; evaluation examples need not carry what the loss reads.
        known: keys of the training examples, to tell what evaluation examples lack.

    Raises:
        WorkloadError: in one line, what is wrong and what to return instead.
    """
    functions: dict[Name, Callable[..., Any]] = {"loss": model.loss_of_outputs, "measure": model.measure_of_outputs}
    for name in names:
        with torch.no_grad(), model.mode("eval"):
            outputs = _call("outputs", partial(model.outputs, model.params), batch, KINDS[name], known)
            _check_outputs(outputs, size)
            values = _call(name, partial(functions[name], outputs), batch, KINDS[name], known)
        if not isinstance(values, Tensor) or tuple(values.shape) != (size,):
            got = str(tuple(values.shape)) if isinstance(values, Tensor) else kind_of(values)
            raise WorkloadError(
                f"the workload's {name} must return one value per example, shape ({size},), got {got}: "
                "use reduction='none' and drop trailing dimensions"
            )


def _check_outputs(outputs: Any, size: int) -> None:
    if isinstance(outputs, Tensor):
        if outputs.dim() == 0 or len(outputs) != size:
            raise WorkloadError(
                f"the workload's outputs must be a tensor (examples, …), got shape {tuple(outputs.shape)} for {size} "
                "examples"
            )
        return
    names = list(outputs) if isinstance(outputs, Mapping) else []
    if names:
        likely = next((n for n in ("logits", "prediction_logits", "out") if n in names), str(names[0]))
        held = f" with {', '.join(map(str, names))}: return one of its tensors, such as outputs(…)['{likely}']"
    else:
        held = ": return the tensor of the model's predictions (logits) alone"
    raise WorkloadError(f"the workload's outputs return {kind_of(outputs)}, not a tensor{held}")


def _call(what: str, function: Callable[[Batch], Any], batch: Batch, kind: str, known: Sequence[str]) -> Any:
    try:
        return function(batch)
    except KeyError as error:
        key = error.args[0] if error.args else ""
        there = keys_of(batch)
        if not isinstance(key, str) or key in there:
            raise WorkloadError(f"the workload's {what} fails on a batch: {in_a_line(error)}{_place(error)}") from error
        mend = f"the {kind} batch has {', '.join(there)}" if there else f"the {kind} batch is not a dict"
        if kind == "evaluation" and key in known:
            mend += (
                f": add '{key}' to the evaluation examples, or give Workload(measure=…) that does without it (the "
                "default measure is the loss)"
            )
        raise WorkloadError(
            f"the workload's {what} fails on a batch: KeyError: '{key}' is not in it{_place(error)}; {mend}"
        ) from error
    except Exception as error:
        mend = ""
        if isinstance(error, TypeError) and isinstance(batch, list | tuple):
            held = f"{type(batch).__name__} of {len(batch)}"
            mend = f"; the batch is a {held}: use batch[0], …, or give a collate that makes a dict"
        elif said := of_labels(error):
            mend = f"; {said}"
        raise WorkloadError(
            f"the workload's {what} fails on a batch of {kind} examples: {in_a_line(error)}{_place(error)}{mend}"
        ) from error


# -- numbers that are not finite -------------------------------------------------------------------------------------


def _refuse_suspects(model: FunctionalModel, examples: Examples, name: Name) -> None:
    """Refuse an example whose number is not finite at θᶠ, among the first and those that hold such a number."""
    first, tensors = list(range(min(LOOK, len(examples)))), examples.tensors
    suspects = [] if tensors is None else _not_finite(tensors)[:SUSPECTS]
    function = model.loss if name == "loss" else model.measure
    # Never one alone: a loss over the batch may need company.
    looked = [first, *([place, *[p for p in first if p != place][:1]] for place in suspects)]
    with torch.no_grad(), model.mode("eval"):
        for places in looked:
            values = function(model.params, examples.batch(places))
            bad = [place for place, finite in zip(places, values.isfinite().tolist(), strict=True) if not finite]
            if not bad:
                continue
            # An example of such numbers may spoil its neighbours'.
            place = next((p for p in bad if not_finite_keys(examples.batch([p]))), bad[0])
            holds = not_finite_keys(examples.batch([place]))
            why = f": its {holds[0]} holds a number that is not finite" if holds else ""
            value = float(values[places.index(place)])
            raise DivergedError(
                f"the {name} of {KINDS[name]} example {place} is {value} at the final model{why}; mend the example or "
                "the model"
            )


def _not_finite(tensors: Batch) -> list[int]:
    """Places of the examples that hold a number that is not finite, ascending."""
    found: set[int] = set()
    for tensor in pytree.tree_leaves(tensors):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            bad = ~tensor.isfinite().reshape(len(tensor), -1).all(dim=1)
            found.update(bad.nonzero().flatten()[:SUSPECTS].tolist())
    return sorted(found)


def not_finite_keys(batch: Batch) -> list[str]:
    """The keys of a batch, as messages name them, whose tensors hold a number that is not finite."""
    return [
        key or "tensor"
        for key, leaf in leaves_of(batch)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(leaf.isfinite().all())
    ]


# -- words -----------------------------------------------------------------------------------------------------------


def keys_of(batch: Batch) -> list[str]:
    """The keys of a batch that is a dict."""
    return [str(key) for key in batch] if isinstance(batch, Mapping) else []


def _place(error: BaseException) -> str:
    """`` (file.py, line 12)``: the innermost line of the error that is the user's own code."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename for part in ("site-packages", "dist-packages", "<frozen", "<string>"))
    ]
    own = [f for f in frames if f.filename != __file__ and not f.filename.endswith("workers/functional.py")]
    if not own:
        return ""
    name = own[-1].filename.replace("\\", "/").rsplit("/", 1)[-1]
    return f" ({name}, line {own[-1].lineno})"
