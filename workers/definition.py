"""The number, defined: further training of one cell in plain torch, and the attribution that it adds up to.

    Δ_i(z, t, ξ)  =  g(z, θᶠ + Δθ_t(𝒟₋ᵢ, ξ)) − g(z, θᶠ)                                  a cell's delta
    a*_i(z, t)    =  E_ξ [ Δ_i(z, t, ξ) − Δ(z, t, ξ) ] / w                                (Wei et al. 2025, eq. 17)
    a*_i − mean over the removals of a*                                                    (eq. 13)

with Δ, without a subscript, the *baseline*: the same training on everything, whose delta is the training-only effect.
ξ is a seed: the batch order and everything that a forward draws. w is the removal weight: in reweight mode w times the
removed losses are subtracted. It is 1 unless the settings say otherwise.

Nothing here is fast: no vmap, no stack, no trace. Batches, losses, gradients and updates are written out here; only the
access to data, the seeds of a step and the steps of evaluation are shared with what is fast. ``fimo.workers.stacking``
must give these numbers to rounding. The tests hold it to that, and so does every sweep on its own model
(``fimo.workers.proof``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from fimo.workers.amounts import Removal, amounts
from fimo.workers.batches import check, removed_weight
from fimo.workers.draws import Draws
from fimo.workers.examples import Batch, Examples, to
from fimo.workers.final_model import final_copy
from fimo.workers.forward import Forward, observe
from fimo.workers.functional import FunctionalModel, without_short_cut
from fimo.workers.randomness import kept, seed_all, step_seed
from fimo.workers.settings import FurtherTraining
from fimo.workers.workload import Workload


@dataclass(frozen=True)
class Cell:
    """One run of further training.

    Attributes:
        steps: the T steps under which results are recorded.
        deltas: g(z, θᶠ + Δθ_t) − g(z, θᶠ), float64 (T, m), on the CPU; NaN for steps that were not reached.
        distances: ‖Δθ_t‖₂ over the trainable parameters, float64 (T,).
        model: the model after the last step.
    """

    steps: tuple[int, ...]
    deltas: Tensor
    distances: Tensor
    model: nn.Module


def train_cell(
    workload: Workload,
    settings: FurtherTraining,
    removal: Removal = (),
    seed: int = 0,
    *,
    state: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    evals: int | None = None,
    forward: Forward | None = None,
    last: int | None = None,
) -> Cell:
    """Train on from θᶠ without ``removal`` and record the deltas.

    Args:
        removal: training indices left out, ``()`` = the baseline.
        state: θᶠ as a state dict, None = the parameters that the workload's model carries.
        evals: how many evaluation examples, the first ones; None = all.
        forward: how the training forward behaves; observed here if it is not given.
        last: stop after this step.

    Raises:
        UsageError: ``removal`` is not a set of training indices, or leaves nothing to train on.
    """
    device, dtype = torch.device(device), getattr(torch, settings.precision)
    train = Examples(workload.train, workload.collate, device, dtype)
    examples = Examples(workload.evals, workload.collate, device, dtype)
    examples = examples.first(len(examples) if evals is None else evals)
    if forward is None:
        forward = observe(FunctionalModel(workload, state, device, dtype, settings.trains), train, settings)
    settings, n = settings.settled(forward.mixes), len(train)
    check(n, removal)

    model = final_copy(workload.model, state, device, dtype, settings.trains)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    origin = {name: p.detach().clone() for name, p in params.items()}
    optimizer = settings.optimizer.build(list(params.values()))
    pairs = amounts(n, removal, settings)
    deltas = torch.full((len(pairs), len(examples)), torch.nan, dtype=torch.float64)
    distances = torch.full((len(pairs),), torch.nan, dtype=torch.float64)

    with kept(device), Draws(), without_short_cut():
        at_final = _evaluate(model, workload, examples, settings)
        for step, indices in enumerate(_batches(n, removal, settings, seed), start=1):
            optimizer.zero_grad()
            buffers = _backward(model, workload, settings, train, indices, removal, (seed, step), forward)
            if settings.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(params.values(), settings.clip_norm)
            optimizer.step()
            for name, buffer in buffers.items():
                model.get_buffer(name).copy_(buffer)
            for place, (own_step, _) in enumerate(pairs):
                if own_step == step:
                    deltas[place] = _evaluate(model, workload, examples, settings) - at_final
                    moved = [(p.detach() - origin[name]).double().square().sum() for name, p in params.items()]
                    distances[place] = torch.stack(moved).sum().sqrt()
            if step in (pairs[-1][0], last):
                break
    return Cell(tuple(step for _, step in pairs), deltas, distances, model)


def _batches(n: int, removal: Removal, settings: FurtherTraining, seed: int) -> Iterator[list[int]]:
    """The training indices of every step: torch's seeded ``RandomSampler``, epoch after epoch, batched in order."""
    sampler = RandomSampler(range(n), generator=torch.Generator().manual_seed(seed))
    while True:
        order = list(sampler)
        if settings.removal_mode == "drop":
            order = [i for i in order if i not in removal]
        for begin in range(0, len(order), settings.batch_size):
            yield order[begin : begin + settings.batch_size]


def _backward(
    model: nn.Module,
    workload: Workload,
    settings: FurtherTraining,
    train: Examples,
    indices: list[int],
    removal: Removal,
    at: tuple[int, int],
    forward: Forward,
) -> dict[str, Tensor]:
    """Leave the gradient of the step's loss in the parameters.

    Returns:
        Buffers to be restored after the step: the forward that reweight subtracts must leave no trace in them.
    """
    model.train(settings.mode == "train")
    masked = set(removal) if settings.removal_mode == "mask" else set()
    stays = [i for i in indices if i not in masked]
    if forward.mixes:
        # The loss of the others depends on a masked example until it has left the batch itself.
        indices = stays
    if not indices:
        loss = sum((0.0 * p).sum() for name, p in model.named_parameters() if name in forward.used)
    else:
        seed_all(step_seed(*at, "batch"), train.device)
        losses = _losses(model, workload, train.batch(indices))
        loss = losses[[i in stays for i in indices]].sum() / max(1, len(stays))
    buffers: dict[str, Tensor] = {}
    if settings.removal_mode == "reweight" and removal:
        buffers = {name: b.clone() for name, b in model.named_buffers() if name in forward.mutable}
        seed_all(step_seed(*at, "removed"), train.device)
        weight = removed_weight(len(train), settings)
        loss = loss + weight * _losses(model, workload, train.batch(list(removal))).sum()
    assert isinstance(loss, Tensor)
    loss.backward()
    return buffers


def _losses(model: nn.Module, workload: Workload, batch: Batch) -> Tensor:
    losses: Tensor = workload.loss(workload.outputs(model, batch), batch)
    return losses


@torch.no_grad()
def _evaluate(model: nn.Module, workload: Workload, evals: Examples, settings: FurtherTraining) -> Tensor:
    """g(z, θ) in eval mode, float64 (m,), on the CPU: the outputs are cast before the measure is taken."""
    model.eval()
    measure, values = workload.measure or workload.loss, []
    for _, batch in evals.batches(settings.eval_batch):
        outputs = workload.outputs(model, batch)
        wide = outputs.double() if outputs.is_floating_point() else outputs
        values.append(measure(wide, to(batch, dtype=torch.float64)))
    g: Tensor = torch.cat(values).double().cpu()
    return g


@dataclass(frozen=True)
class Attribution:
    """a*, the gold standard.

    Attributes:
        steps: the T amounts of further training.
        effects: every seed's effects, per unit of removal weight, float64 (S, R, T, m); not finite if a run diverged.
        training_only: the baselines' deltas, float64 (S, T, m).
    """

    steps: tuple[int, ...]
    effects: Tensor
    training_only: Tensor

    @property
    def effect(self) -> Tensor:
        """The mean effect over seeds (eq. 17), float64 (R, T, m)."""
        return self.effects.mean(dim=0)

    @property
    def sem(self) -> Tensor:
        """The standard error of that mean, float64 (R, T, m); NaN with one seed."""
        sem: Tensor = self.effects.std(dim=0) / len(self.effects) ** 0.5
        return sem

    @property
    def centred(self) -> Tensor:
        """The mean effect less its mean over the removals (eq. 13), float64 (R, T, m)."""
        return self.effect - self.effect.mean(dim=0)


def attribution(
    workload: Workload,
    settings: FurtherTraining,
    removals: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    state: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    stacked: bool = False,
) -> Attribution:
    """The attribution of ``removals`` by further training, in this process.

    Args:
        removals: the training indices that each removal leaves out (R).
        seeds: one baseline and R cells are trained for each (S).
        state, device: see ``train_cell``.
        stacked: train the cells of a seed together: the same numbers to rounding, several times faster.

    Raises:
        UsageError: a removal is not a set of training indices, or leaves nothing to train on.
    """
    sets = [tuple(removal) for removal in removals]
    if stacked:
        from fimo.workers.stacking.together import train_together

        steps, deltas = train_together(workload, settings, sets, seeds, state, device)
    else:
        cells = [
            [train_cell(workload, settings, removal, seed, state=state, device=device) for removal in ((), *sets)]
            for seed in seeds
        ]
        steps = cells[0][0].steps
        deltas = torch.stack([torch.stack([cell.deltas for cell in of_seed]) for of_seed in cells])
    baseline, without = deltas[:, :1], deltas[:, 1:]
    return Attribution(steps, (without - baseline) / settings.removal_weight, baseline[:, 0])
