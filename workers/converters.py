"""Workloads from what users of kronfluence and torch-influence have already: a task, an objective.

Neither library is imported: what is used of them is the methods that their users write. Both return one number for a
batch, the sum or the mean of its examples' losses, and fimo needs each example's own. That is what they return for the
example alone, so they are asked for batches of one, all of a batch at once under ``vmap`` where it takes them. A loss
that does not add up over examples (a mean over the tokens of a whole batch, a contrastive loss) has no such parts: it
is refused, told from a few examples, in training mode too if nothing is drawn there.

Not covered: batch norm in train mode under a kronfluence task, which would see batches of one (refused when it trains).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

from fimo.workers.errors import WorkloadError
from fimo.workers.examples import Batch, Dataset, Examples, to
from fimo.workers.randomness import kept, seed_all
from fimo.workers.workload import Workload

TRAIN, EVALS = "train", "evals"
"""The key of a batch's contents, which tells training from evaluation examples."""

LOOK = 5
"""Examples whose losses are added up."""

OfBatch = Callable[[Batch], Tensor]
"""A batch of the user's -> one number."""


class _Part:
    """A user's dataset whose batches are ``{key: batch}``."""

    def __init__(self, dataset: Dataset, collate: Callable[[list[Any]], Any] | None, key: str) -> None:
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise WorkloadError(f"a {type(dataset).__name__} has no examples by number: give a map-style dataset")
        self._dataset, self._key = dataset, key
        self._collate = collate or torch.utils.data.default_collate

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]

    def collate(self, items: list[Any]) -> dict[str, Any]:
        return {self._key: self._collate(items)}


def _part(dataset: Any, collate: Callable[[list[Any]], Any] | None, key: str) -> Any:
    """The dataset as a source of examples: tensors, which train faster, if it is made of nothing else."""
    plain = collate in (None, torch.utils.data.default_collate)
    if type(dataset) is TensorDataset and plain:
        return {f"{key}{place}": tensor for place, tensor in enumerate(dataset.tensors)}
    return _Part(dataset, collate, key)


def _contents(batch: Batch) -> tuple[str, Batch]:
    """Of which kind a batch is, and the user's own batch."""
    key = TRAIN if any(name.startswith(TRAIN) for name in batch) else EVALS
    # As default_collate makes it of a TensorDataset.
    return key, batch[key] if key in batch else [batch[f"{key}{place}"] for place in range(len(batch))]


def each_alone(of_batch: OfBatch, batch: Batch, draws: bool = False) -> Tensor:
    """``of_batch`` of every example of a batch as a batch of one, (B,).

    One after another if vmap refuses, as it does a forward that decides on its data.

    Args:
        draws: one after another in any case, so that each example has random numbers of its own.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    dims = pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)

    def one(example: Batch) -> Tensor:
        return of_batch(pytree.tree_map(lambda leaf: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf, example))

    if not draws:
        with suppress(RuntimeError):
            values: Tensor = vmap(lambda example: one(example).reshape(()), in_dims=(dims,))(batch)
            return values
    parts = [
        of_batch(pytree.tree_map(lambda leaf, i=i: leaf[i : i + 1] if isinstance(leaf, Tensor) else leaf, batch))
        for i in range(len(leaves[0]))
    ]
    return torch.stack([part.reshape(()) for part in parts])


def from_kronfluence(
    task: Any,
    model: nn.Module,
    train: Any,
    evals: Any,
    *,
    collate: Callable[[list[Any]], Any] | None = None,
    outputs: Callable[[nn.Module, Batch], Tensor] | None = None,
    loss: Callable[[Tensor, Batch], Tensor] | None = None,
) -> Workload:
    """The workload of a kronfluence ``Task``: its training loss, and its measurement as g.

    A task does not tell the model's outputs from the loss. Unless you do, by ``outputs`` and ``loss``, the workload's
    outputs *are* the losses: further training and the gradient estimators are the same, and the estimators that need
    curvature in the outputs (CG and LiSSA with Gauss-Newton, EK-FAC) say so and are left out; TRAK takes the loss as
    the model's output. Losses are then computed in the model's precision, not in float64 from its outputs: where they
    are tiny, use ``precision: float64``.

    Args:
        task: has ``compute_train_loss(batch, model)`` and ``compute_measurement(batch, model)``, one number each.
        model: at θᶠ, not wrapped by ``prepare_model``.
        train, evals: map-style datasets, as ``Analyzer`` takes them.
        collate: as ``DataLoaderKwargs(collate_fn=…)``; default torch's.
        outputs: ``outputs(model, batch) -> Tensor (B, …)``, what the task computes its loss from.
        loss: ``loss(outputs, batch) -> Tensor (B,)``, the same losses as the task's, unreduced.

    Raises:
        WorkloadError: in one line: a loss or measurement that is no sum or mean over examples, one of ``outputs`` and
            ``loss`` alone, or losses from them that are not the task's.
    """
    if (outputs is None) != (loss is None):
        raise WorkloadError("outputs and loss go together: the model's outputs, and each example's loss from them")

    draws: list[bool] = []  # Known once it has been looked at, below.

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        _refuse_statistics(model)
        return each_alone(lambda some: task.compute_train_loss(some, model), batch, model.training and draws[0])

    def measurements(model: nn.Module, batch: Batch) -> Tensor:
        return each_alone(lambda some: task.compute_measurement(some, model), batch)

    made = _workload(model, train, evals, (collate, collate), (outputs or losses, loss), measurements)
    with _looked_at(model, made, "the task") as (train_batch, evals_batch):
        of_training = lambda b: task.compute_train_loss(b, model)  # noqa: E731
        draws.append(_draws(model.train(), of_training, train_batch))
        if not draws[0] and not _has_statistics(model):
            _refuse_unless_it_adds_up(of_training, train_batch, "compute_train_loss")
        model.eval()
        _refuse_unless_it_adds_up(of_training, train_batch, "compute_train_loss")
        _refuse_unless_it_adds_up(lambda b: task.compute_measurement(b, model), evals_batch, "compute_measurement")
        if outputs is not None and loss is not None:
            expected, got = losses(model, train_batch), loss(outputs(model, train_batch), train_batch)
            if got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-4, atol=1e-6):
                raise WorkloadError(
                    "loss(outputs(model, batch), batch) is not the task's compute_train_loss of each example alone"
                )
    return made


def from_torch_influence(
    objective: Any,
    model: nn.Module,
    train_loader: DataLoader[Any],
    test_loader: DataLoader[Any],
    *,
    ignore_regularization: bool = False,
) -> Workload:
    """The workload of a torch-influence ``BaseObjective``: its outputs, its loss on them, and ``test_loss`` as g.

    Regularisation is no example's own: it belongs to the optimizer, as weight decay. ``test_loss`` is computed in the
    model's precision, not in float64 from its outputs: where it is tiny, use ``precision: float64``.

    Args:
        objective: has ``train_outputs``, ``train_loss_on_outputs``, ``train_regularization`` and ``test_loss``.
        model: at θᶠ.
        train_loader, test_loader: their dataset and ``collate_fn`` are used; batch size and order are the spec's.
        ignore_regularization: the spec's optimizer has it as ``weight_decay``, or it is to be left out.

    Raises:
        WorkloadError: in one line: a loss that is no mean or sum over examples, a ``train_loss`` of its own, or a
            regularisation that nobody said to ignore.
    """

    def outputs(model: nn.Module, batch: Batch) -> Tensor:
        out: Tensor = objective.train_outputs(model, batch)
        return out

    def loss(outputs: Tensor, batch: Batch) -> Tensor:
        return each_alone(lambda pair: objective.train_loss_on_outputs(pair[0], pair[1]), [outputs, batch])

    named = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def flat(model: nn.Module) -> Tensor:
        own = dict(model.named_parameters(remove_duplicate=False))
        return torch.cat([own[name].reshape(-1) for name in named])

    def measurements(model: nn.Module, batch: Batch) -> Tensor:
        params = flat(model)
        return each_alone(lambda some: objective.test_loss(model, params, some), batch)

    collates = (train_loader.collate_fn, test_loader.collate_fn)
    made = _workload(model, train_loader.dataset, test_loader.dataset, collates, (outputs, loss), measurements)
    with _looked_at(model, made, "the objective") as (train_batch, evals_batch):
        model.eval()
        if not ignore_regularization:
            _refuse_regularization(objective.train_regularization, flat(model))

        params, on = flat(model), [outputs(model, train_batch), train_batch]
        split = objective.train_loss_on_outputs(*on) + objective.train_regularization(params)
        if not torch.allclose(objective.train_loss(model, params, train_batch), split, rtol=1e-4, atol=1e-7):
            raise WorkloadError("train_loss is not train_loss_on_outputs plus train_regularization: write a Workload")
        _refuse_unless_it_adds_up(lambda pair: objective.train_loss_on_outputs(*pair), on, "train_loss_on_outputs")
        _refuse_unless_it_adds_up(lambda b: objective.test_loss(model, params, b), evals_batch, "test_loss")
    return made


def _workload(
    model: nn.Module,
    train: Any,
    evals: Any,
    collates: tuple[Any, Any],
    training: tuple[Callable[[nn.Module, Batch], Tensor], Callable[[Tensor, Batch], Tensor] | None],
    measurements: Callable[[nn.Module, Batch], Tensor],
) -> Workload:
    """A workload whose outputs of evaluation examples are measurements, and of training examples losses or outputs."""
    of_training, loss_of = training

    def outputs(model: nn.Module, batch: Batch) -> Tensor:
        key, contents = _contents(batch)
        return of_training(model, contents) if key == TRAIN else measurements(model, contents)

    def loss(outputs: Tensor, batch: Batch) -> Tensor:
        return outputs if loss_of is None else loss_of(outputs, _contents(batch)[1])

    parts = (_part(train, collates[0], TRAIN), _part(evals, collates[1], EVALS))
    return Workload(model, *parts, outputs=outputs, loss=loss, measure=_as_it_is)


def _as_it_is(outputs: Tensor, _: Batch) -> Tensor:
    return outputs


@contextmanager
def _looked_at(model: nn.Module, made: Workload, whose: str) -> Iterator[tuple[Batch, Batch]]:
    """A few training and evaluation examples, on the model's device; modes and random states are left as they were."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise WorkloadError("the model is on the meta device: give one with the final model's parameters")
    sources = [Examples(source) for source in (made.train, made.evals)]
    was = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with kept(device), torch.no_grad():
            batches = [_contents(to(s.batch(range(min(LOOK, len(s)))), device))[1] for s in sources]
            yield batches[0], batches[1]
    except WorkloadError:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise WorkloadError(f"{whose} fails on a batch of examples: {type(error).__name__}: {said}") from error
    finally:
        for module, training in was.items():
            module.training = training
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


def _refuse_unless_it_adds_up(of_batch: OfBatch, batch: Batch, name: str) -> None:
    """Refuse a number of a batch that is neither the sum nor the mean of its examples' own."""
    whole, alone = of_batch(batch), each_alone(of_batch, batch)
    if whole.numel() != 1:
        raise WorkloadError(f"{name} returns {tuple(whole.shape)} for a batch, not one number")
    both = alone.sum(), alone.mean()
    if not any(torch.allclose(whole.reshape(()), value, rtol=1e-3, atol=1e-6) for value in both):
        raise WorkloadError(
            f"{name} of {len(alone)} examples is {float(whole):.6g}, neither the sum ({float(both[0]):.6g}) nor the "
            f"mean ({float(both[1]):.6g}) of what it is for each alone, so that no example has a loss of its own to be "
            "removed: return the sum over examples (reduction='sum')"
        )


def _draws(model: nn.Module, of_batch: OfBatch, batch: Batch) -> bool:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    values = []
    for seed in (0, 1):
        seed_all(seed, device)
        values.append(of_batch(batch))
    return not torch.equal(values[0], values[1])


def _has_statistics(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())


def _refuse_statistics(model: nn.Module) -> None:
    if _has_statistics(model):
        raise WorkloadError(
            "a task's losses are taken of each example alone, where batch norm has no statistics: freeze them "
            "(further_training: {mode: eval}), or give from_kronfluence the task's outputs and loss"
        )


def _refuse_regularization(regularization: Callable[[Tensor], Any], params: Tensor) -> None:
    """Refuse one that is not 0, and say its weight decay if it is a multiple of ‖θ‖²."""
    places = [params.double(), 2 * params.double(), torch.ones_like(params, dtype=torch.float64)]
    values = [float(regularization(place)) for place in places]
    if not any(values):
        return
    ratios = [value / float(place.square().sum()) for value, place in zip(values, places, strict=True)]
    mend = "what belongs to no example is left out of further training"
    if max(ratios) - min(ratios) <= 1e-6 * abs(max(ratios)):
        mend = f"as {ratios[0]:.4g}·‖θ‖² it is the optimizer's (sgd or adam) weight_decay: {2 * ratios[0]:.4g}"
    raise WorkloadError(
        f"the objective has a train_regularization ({values[0]:.4g} at the final model), which is no example's loss: "
        f"{mend}; say ignore_regularization=True when the spec has it"
    )
