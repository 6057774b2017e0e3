"""Further training written plainly: one run, one model, torch's own modules, optimizers and samplers.

This is what ``fimo.workers.further_training`` is held against. It shares with it the settings, the definition of the
dropout seed and nothing else: no stacking, no vmap, no functional call.
"""

from __future__ import annotations

import copy

import torch
from fimo.workers.further_training import dropout_seed
from fimo.workers.settings import FurtherTraining, Optimizer
from fimo.workers.workload import Workload
from torch import Tensor, nn
from torch.utils.data import RandomSampler


def make_optimizer(model: nn.Module, o: Optimizer) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    if o.name == "sgd":
        return torch.optim.SGD(
            params,
            lr=o.lr,
            momentum=o.momentum,
            dampening=o.dampening,
            weight_decay=o.weight_decay,
            nesterov=o.nesterov,
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[o.name]
    return kind(params, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, amsgrad=o.amsgrad)


def take(source, collate, indices, dtype):
    """The batch of ``indices``, floating-point tensors in ``dtype``."""
    if isinstance(source, dict):
        batch = {name: tensor[indices] for name, tensor in source.items()}
    else:
        collate = collate or getattr(source, "collate", None) or torch.utils.data.default_collate
        batch = collate([source[i] for i in indices])
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.items()}


def widened(batch):
    return {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}


@torch.no_grad()
def evaluate(model: nn.Module, workload: Workload, dtype) -> Tensor:
    training = model.training
    model.eval()
    batch = take(workload.evals, workload.collate, range(length(workload.evals)), dtype)
    outputs = workload.outputs(model, batch).double()
    model.train(training)
    return (workload.measure or workload.loss)(outputs, widened(batch))


def length(source) -> int:
    return len(next(iter(source.values()))) if isinstance(source, dict) else len(source)


def norms(model: nn.Module):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def train_one(
    workload: Workload, settings: FurtherTraining, removal: tuple[int, ...], seed: int, evaluate_at: list[int]
) -> tuple[Tensor, Tensor, nn.Module]:
    """Deltas (T, m) and distances (T,) of one run, evaluated after the steps ``evaluate_at``, and the model."""
    dtype = getattr(torch, settings.precision)
    n = length(workload.train)
    model = copy.deepcopy(workload.model).to(dtype)
    start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    at_final = evaluate(model, workload, dtype)
    model.train(settings.mode == "train")
    optimizer = make_optimizer(model, settings.optimizer)
    sampler = RandomSampler(range(n), generator=torch.Generator().manual_seed(seed))
    deltas, distances, step = [], [], 0
    while True:
        order = list(sampler)
        if settings.removal_mode == "drop":
            order = [i for i in order if i not in removal]
        for begin in range(0, len(order), settings.batch_size):
            step += 1
            indices = order[begin : begin + settings.batch_size]
            stays = [i for i in indices if settings.removal_mode != "mask" or i not in removal]
            if norms(model) and model.training:
                # A masked example is not in the batch norm's statistics either.
                indices = stays
            optimizer.zero_grad()
            if stays:
                batch = take(workload.train, workload.collate, indices, dtype)
                torch.manual_seed(dropout_seed(seed, step, "batch"))
                losses = workload.loss(workload.outputs(model, batch), batch)
                loss = losses[[i in stays for i in indices]].mean()
                if settings.removal_mode == "reweight" and removal:
                    removed = take(workload.train, workload.collate, list(removal), dtype)
                    torch.manual_seed(dropout_seed(seed, step, "removed"))
                    frozen = [m for m in norms(model) if m.training]
                    for m in frozen:
                        m.eval()
                    loss = loss - workload.loss(workload.outputs(model, removed), removed).sum() / n
                    for m in frozen:
                        m.train()
                loss.backward()
            else:
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
            if settings.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
            if step in evaluate_at:
                deltas.append(evaluate(model, workload, dtype) - at_final)
                now = [p for p in model.parameters() if p.requires_grad]
                squares = [((a.double() - b.double()) ** 2).sum() for a, b in zip(now, start, strict=True)]
                distances.append(torch.stack(squares).sum().sqrt().detach())
            if step == max(evaluate_at):
                return torch.stack(deltas), torch.stack(distances), model
