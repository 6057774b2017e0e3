"""How a model's training forward behaves: observed by running it, not guessed from the names of its layers.

What is observed belongs to the estimand: a masked example must leave a batch whose examples are mixed, and each replica
owns the buffers that training changes. Covers what forwards on a few examples show, at θᶠ and away from it (a gate that
is closed at θᶠ is open there).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fimo.workers.adapters import refuse_idle_adapters
from fimo.workers.draws import Draw, Draws
from fimo.workers.errors import UsageError, WorkloadError, in_a_line, of_labels
from fimo.workers.examples import Batch, Examples, shapes, to
from fimo.workers.functional import FunctionalModel, Tensors
from fimo.workers.randomness import kept, seed_all, states
from fimo.workers.settings import FurtherTraining

SOME = 16
"""Examples of a batch that is looked at for mixing."""

COUNTED = 1_000_003
"""Calls after which a forward that counts them is looked at again."""

LARGE = 10_000_000
"""Parameters from which on less is looked at: the sweep's proof sees the rest."""

MOVE = 0.1
"""How far parameters are moved from θᶠ, as a share of each tensor's root mean square."""


@dataclass(frozen=True)
class Forward:
    """How the forward behaves in the mode that further training runs it in.

    Attributes:
        mutable: buffers that it writes to (batch norm's statistics): each replica owns its own.
        mixes: whether one example's loss, or its gradient, depends on the others in its batch (batch norm).
        random: whether it draws random numbers (dropout).
        used: parameters that the loss depends on; torch's optimizers skip the others.
        draws: what its dropout layers draw, in the order of their calls.
    """

    mutable: tuple[str, ...]
    mixes: bool
    random: bool
    used: tuple[str, ...]
    draws: tuple[Draw, ...]


def observe(model: FunctionalModel, train: Examples, settings: FurtherTraining) -> Forward:
    """Run the training forward on a few examples; every random state is left as it was.

    Raises:
        WorkloadError: the loss depends on no trainable parameter, or the forward draws random numbers that no seed
            reaches.
        UsageError: an adapter that the forward passes by.
    """
    batch = train.batch(range(min(len(train), settings.batch_size)))
    with kept(model.device), model.mode(settings.mode):
        try:
            with Draws() as draws:
                losses, mutable, random = _look(model, batch)
        except Exception as error:
            raise WorkloadError(
                f"{of_labels(error) or f'the forward fails in {settings.mode} mode on a batch'}: {in_a_line(error)}"
            ) from error
        counts = _counts(model)
        again = _look(model, batch)[0]
        with _counted_on(model, counts), suppress(Exception):  # one that fails then will say so itself
            again = torch.stack([again, _look(model, batch)[0]])
        if not bool((losses.nan_to_num() == again.nan_to_num()).all()):
            raise WorkloadError(
                "the training forward gives other losses for the same batch and seed: it draws from a generator of its "
                "own, or counts its calls; draw from torch's, Python's or numpy's global generator instead"
            )
        mixes = settings.mode == "train" and _has_batch_norm(model)
        # At the size of a real batch too: a loss may take its negatives from a large batch alone.
        for size in sorted({SOME, max(SOME, min(settings.batch_size, len(train)))}):
            mixes = mixes or _mixes(model, train, random, size)
        refuse_idle_adapters(model, batch)
        used = _used(model, batch)
    return Forward(mutable, mixes, random, used, tuple(draws.draws))


def refuse_mixing(forward: Forward, settings: FurtherTraining) -> None:
    """Refuse reweight for a forward that mixes examples (UsageError).

    The removed example would stay in the statistics of every batch and leave only its loss: another estimand, whose
    effects agree with those of drop at a cosine of 0.26, measured on batch norm.
    """
    if forward.mixes and settings.removal_mode == "reweight":
        raise UsageError(
            "removal_mode reweight leaves the example in the statistics of its batch, and this model's training "
            "forward mixes the examples of a batch (batch norm, or a loss over the batch): use removal_mode drop or "
            "mask, or mode: eval for batch norm"
        )


def _look(model: FunctionalModel, batch: Batch) -> tuple[Tensor, tuple[str, ...], bool]:
    """Losses under seed 0, the buffers that were written to, and whether random numbers were drawn."""
    buffers = {name: tensor.clone() for name, tensor in model.fixed.items()}
    given, versions = dict(buffers), {name: tensor._version for name, tensor in buffers.items()}
    seed_all(0, model.device)
    before = states(model.device)
    with torch.no_grad():
        losses = model.loss(model.params, batch, buffers)
    # A buffer that is given the value that it had will be given another one later. Batch norm bumps no version.
    written = tuple(
        name
        for name, tensor in buffers.items()
        if tensor is not given[name] or tensor._version != versions[name] or not torch.equal(tensor, model.fixed[name])
    )
    # A draw that changed nothing this time (stochastic depth) is a draw.
    drew = states(model.device) != before
    return losses, written, drew


def _counts(model: FunctionalModel) -> dict[tuple[nn.Module, str], float]:
    """The plain numbers that the model's modules keep as attributes, where a forward may count its calls."""
    return {
        (module, name): value
        for module in model.module.modules()
        for name, value in vars(module).items()
        if type(value) in (int, float)
    }


@contextmanager
def _counted_on(model: FunctionalModel, before: Mapping[tuple[nn.Module, str], float]) -> Iterator[None]:
    """Numbers that a call has changed, as they will be after very many calls: all cells of a worker share them."""
    now = _counts(model)
    changed = {key: value for key, value in now.items() if value != before.get(key, value)}
    for (module, name), value in changed.items():
        setattr(module, name, value + (value - before[module, name]) * COUNTED)
    try:
        yield
    finally:
        for (module, name), value in changed.items():
            setattr(module, name, value)


def _has_batch_norm(model: FunctionalModel) -> bool:
    kinds = torch.nn.modules.batchnorm._BatchNorm
    return any(isinstance(module, kinds) for module in model.module.modules())


def moved(params: Tensors, number: int) -> Tensors:
    """Parameters away from θᶠ, by ``MOVE``; a tensor of zeros (a closed gate) moves too."""
    generator = torch.Generator().manual_seed(number)
    away = {}
    for name, p in params.items():
        size = float(torch.linalg.vector_norm(p.detach(), dtype=torch.float64)) / max(1, p.numel()) ** 0.5
        step = torch.randn(p.shape, generator=generator, dtype=p.dtype).mul_(MOVE * (size or 1.0))
        away[name] = p + step.to(p.device)
    return away


def _mixes(model: FunctionalModel, train: Examples, random: bool, most: int = SOME) -> bool:
    """Whether replacing, or leaving out, one example of a batch changes the losses or gradients of the others.

    Never judged on one example: a loss over the batch is no mixing in a batch of one.
    """
    size = min(most, max(2, len(train) - 1))
    if len(train) < 2:
        return False
    rest = torch.arange(1, size)
    whole = train.batch(range(size))
    others = [train.batch([i, *range(1, size)]) for i in {len(train) - 1, len(train) // 2} if i >= size]
    alike = [(other, rest) for other in others if shapes(other) == shapes(whole)]
    if not random and size > 2:
        # Not under dropout, which draws other masks for a smaller batch; and a batch of one proves nothing.
        alike.append((train.batch(range(1, size)), rest - 1))
    away = moved(model.params, 1)
    return any(not _same(model, params, (whole, rest), alike) for params in (model.params, away)) or _leans(
        model, away, train, random, size
    )


def is_large(model: FunctionalModel) -> bool:
    """Whether looking at it is dear."""
    return sum(p.numel() for p in model.params.values()) >= LARGE


def _halves(size: int) -> list[Sequence[int]]:
    """Halves of a batch's places: of any two places there is a half that holds the first and not the second."""
    bits = range((size - 1).bit_length())
    return [[p for p in range(size) if p >> bit & 1 == side] for bit in bits for side in (0, 1)]


@torch.no_grad()
def _leans(model: FunctionalModel, params: Tensors, train: Examples, random: bool, size: int) -> bool:
    """Whether the losses of half a batch are others without the other half, or with others in its place.

    An example may lean on a few of its batch alone: on those of its class, or of its user.
    """
    for wide, tolerance in ((True, 1e-7), (False, 1e-3)):
        try:
            whole = _losses(model, params, train.batch(range(size)), wide)
            scale = largest(whole)
            for rest in _halves(size):
                other = _without(train, random, size, rest)
                if other is not None:
                    batch, places = other
                    losses = _losses(model, params, batch, wide)[places.to(model.device)]
                    if not close(whole[torch.tensor(rest, device=model.device)], losses, tolerance, scale):
                        return True
            return False
        except Exception:
            # As in ``_same``.
            continue
    return False


def _without(train: Examples, random: bool, size: int, rest: Sequence[int]) -> tuple[Batch, Tensor] | None:
    """A batch in which only the places ``rest`` are as they were, and where they are in it; None if there is none."""
    if not random:
        return (train.batch(rest), torch.arange(len(rest))) if len(rest) > 1 else None
    # A smaller batch would draw otherwise: one example takes all the places, of which one keeps the batch's shape.
    shape = shapes(train.batch(range(size)))
    for place in dict.fromkeys((len(train) - 1, *(p for p in range(size) if p not in rest))):
        batch = train.batch([p if p in rest else place for p in range(size)])
        if shapes(batch) == shape:
            return batch, torch.tensor(rest)
    return None


def _losses(model: FunctionalModel, params: Tensors, batch: Batch, wide: bool) -> Tensor:
    dtype = torch.float64 if wide else None
    own = {n: p.to(dtype or p.dtype) for n, p in params.items()}
    seed_all(0, model.device)
    return model.loss(own, to(batch, dtype=dtype), {n: _cast(b, dtype) for n, b in model.fixed.items()})


def _same(
    model: FunctionalModel, params: Tensors, one: tuple[Batch, Tensor], others: Sequence[tuple[Batch, Tensor]]
) -> bool:
    for wide, tolerance in ((True, 1e-7), (False, 1e-3)):
        try:
            first = losses_and_gradient(model, params, *one, wide=wide)
            return all(
                agree(first, losses_and_gradient(model, params, *other, wide=wide), tolerance) for other in others
            )
        except Exception:
            # A forward that fails in float64 is judged in its own precision.
            continue
    return True


def agree(one: tuple[Tensor, Tensors], other: tuple[Tensor, Tensors], tolerance: float) -> bool:
    """Whether losses and gradients agree, each relative to its largest entry; NaN agrees with NaN.

    The largest entry is that of all gradients together: one that is zero but for rounding has no scale of its own.
    """
    scale = max((largest(g) for g in one[1].values()), default=0.0)
    return close(one[0], other[0], tolerance, largest(one[0])) and all(
        close(one[1][name], other[1][name], tolerance, scale) for name in one[1]
    )


def largest(tensor: Tensor) -> float:
    """The largest size of a finite entry; 0 of none."""
    return float(tensor.abs().nan_to_num(0, 0, 0).max()) if tensor.numel() else 0.0


def close(a: Tensor, b: Tensor, tolerance: float, scale: float) -> bool:
    """Whether two tensors agree to a tolerance, relative to their entries or to ``scale``; NaN agrees with NaN."""
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def losses_and_gradient(
    model: FunctionalModel,
    params: Tensors,
    batch: Batch,
    places: Tensor,
    wide: bool,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensors]:
    """The losses at ``places`` of a batch, and the gradient of their weighted sum by parameter, under seed 0.

    Args:
        wide: in float64, whatever the model's own precision.
        weights: of the losses, (len(places),); default: 1, 2, 3, …, so that no two examples are alike.
    """
    dtype = torch.float64 if wide else None
    own = {n: p.detach().to(dtype or p.dtype).requires_grad_() for n, p in params.items()}
    fixed = {n: _cast(b, dtype) for n, b in model.fixed.items()}
    seed_all(0, model.device)
    with torch.enable_grad():
        losses = model.loss(own, to(batch, dtype=dtype), fixed)[places.to(model.device)]
        chosen = torch.arange(1, len(losses) + 1) if weights is None else weights
        total = (losses * chosen.to(losses)).sum()
    grads = torch.autograd.grad(total, list(own.values()), allow_unused=True)
    by_name = zip(own.items(), grads, strict=True)
    return losses.detach(), {name: torch.zeros_like(p) if g is None else g for (name, p), g in by_name}


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype, copy=True) if dtype is not None and tensor.is_floating_point() else tensor.clone()


def _used(model: FunctionalModel, batch: Batch) -> tuple[str, ...]:
    params = {n: p.detach().requires_grad_() for n, p in model.params.items()}
    with torch.enable_grad():
        total = model.loss(params, batch, {n: t.clone() for n, t in model.fixed.items()}).sum()
    grads: tuple[Tensor | None, ...] = (None,) * len(params)
    if total.requires_grad:
        try:
            grads = torch.autograd.grad(total, list(params.values()), allow_unused=True)
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            raise WorkloadError(
                f"the training loss has no gradient that can be taken: {type(error).__name__}: {line}"
            ) from error
    used = tuple(n for n, g in zip(params, grads, strict=True) if g is not None)
    if not used:
        raise WorkloadError(
            "the loss depends on no trainable parameter: outputs(model, batch) must call the model that it is given"
        )
    return used
