"""Small problems in float64 whose every derivative is taken here by plain loops over ``torch.autograd``."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fimo.estimators import Problem
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.workload import Workload


def outputs_x(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"])


def scalar_outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]).squeeze(-1)


def squared_error(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (outputs - batch["y"]) ** 2


def cross_entropy(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch["label"], reduction="none")


class Classifier(nn.Module):
    """A tanh MLP with an unused layer (BERT's pooler) and a frozen one (a transferred feature extractor)."""

    def __init__(self, features: int, width: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, width)
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.last = nn.Linear(width, classes)
        self.pooler = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.frozen(torch.tanh(self.first(x)))))


def train_a_little(workload: Workload, steps: int, lr: float = 0.2) -> None:
    trainable = [p for p in workload.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        workload.loss(workload.outputs(workload.model, workload.train), workload.train).mean().backward()
        optimizer.step()


def problem(workload: Workload, removals: Sequence[Sequence[int]], dtype=torch.float64, **options) -> Problem:
    model = FunctionalModel(workload, dtype=dtype)
    train = Examples(workload.train, workload.collate, dtype=dtype)
    evals = Examples(workload.evals, workload.collate, dtype=dtype)
    return Problem(model, train, evals, removals, **options)


def classification(
    n: int = 27, evals: int = 6, removals: Sequence[Sequence[int]] | None = None, steps: int = 60, **options
) -> Problem:
    """Three classes, integer labels in a dict, 117 trainable parameters of which 14 are unused."""
    torch.manual_seed(3)
    model = Classifier(4, 6, 3).double()
    data = [{"x": torch.randn(k, 4, dtype=torch.float64), "label": torch.randint(3, (k,))} for k in (n, evals)]
    workload = Workload(model, data[0], data[1], outputs_x, cross_entropy)
    train_a_little(workload, steps)
    return problem(workload, removals or [[0], [5], [26 % n], [7], [1, 2, 3]], **options)


def regression(
    n: int = 27, evals: int = 6, removals: Sequence[Sequence[int]] | None = None, steps: int = 60, **options
) -> Problem:
    """Squared error of a tanh MLP 3-5-4-1, 49 parameters."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    data = []
    for k in (n, evals):
        x = torch.randn(k, 3, dtype=torch.float64)
        y = torch.sin(x.sum(dim=1)) + 0.3 * torch.randn(k, dtype=torch.float64)
        data.append({"x": x, "y": y})
    workload = Workload(model, data[0], data[1], scalar_outputs, squared_error)
    train_a_little(workload, steps, lr=0.1)
    return problem(workload, removals or [[0], [5], [26 % n], [7], [1, 2, 3]], **options)


# --- dense truth, one scalar at a time ---------------------------------------------------------------------


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def leaves(model: FunctionalModel) -> dict[str, Tensor]:
    return {n: p.clone().requires_grad_() for n, p in model.params.items()}


def gradient(model: FunctionalModel, function: Callable, examples: Examples, index: int) -> Tensor:
    params = leaves(model)
    value = function(params, examples.batch([index]))[0]
    found = torch.autograd.grad(value, list(params.values()), allow_unused=True)
    return flat([torch.zeros_like(p) if g is None else g for g, p in zip(found, params.values(), strict=True)])


def train_gradients(p: Problem) -> Tensor:
    return torch.stack([gradient(p.model, p.model.loss, p.train, i) for i in range(len(p.train))])


def eval_gradients(p: Problem) -> Tensor:
    return torch.stack([gradient(p.model, p.model.measure, p.evals, i) for i in range(len(p.evals))])


def removal_sums(p: Problem) -> Tensor:
    rows = train_gradients(p)
    return torch.stack([rows[list(r)].sum(dim=0) for r in p.removals])


def jacobian(p: Problem, index: int) -> Tensor:
    """∂ outputs / ∂θ of one training example, (outputs, P)."""
    params = leaves(p.model)
    out = p.model.outputs(params, p.train.batch([index])).reshape(-1)
    rows = []
    for value in out:
        found = torch.autograd.grad(value, list(params.values()), retain_graph=True, allow_unused=True)
        pairs = zip(found, params.values(), strict=True)
        rows.append(flat([torch.zeros_like(q) if g is None else g for g, q in pairs]))
    return torch.stack(rows)


def output_hessian(p: Problem, index: int) -> Tensor:
    """∂²ℓ / ∂outputs² of one training example."""
    batch = p.train.batch([index])
    out = p.model.outputs(p.model.params, batch).detach()
    square = torch.autograd.functional.hessian(lambda o: p.model.loss_of_outputs(o, batch).sum(), out)
    return square.reshape(out.numel(), out.numel())


def gauss_newton(p: Problem) -> Tensor:
    """Mean over all training examples of JᵀHJ, (P, P)."""
    found = 0
    for i in range(len(p.train)):
        j = jacobian(p, i)
        found = found + j.T @ output_hessian(p, i) @ j
    return found / len(p.train)


def hessian(p: Problem) -> Tensor:
    """Hessian of the mean training loss, (P, P), row by row."""
    params = leaves(p.model)
    loss = p.model.loss(params, p.train.batch(range(len(p.train)))).mean()
    first = torch.autograd.grad(loss, list(params.values()), create_graph=True, allow_unused=True)
    first = flat([torch.zeros_like(q) if g is None else g for g, q in zip(first, params.values(), strict=True)])
    rows = []
    for entry in first:
        if not entry.requires_grad:
            rows.append(torch.zeros_like(first).detach())
            continue
        second = torch.autograd.grad(entry, list(params.values()), retain_graph=True, allow_unused=True)
        pairs = zip(second, params.values(), strict=True)
        rows.append(flat([torch.zeros_like(q) if g is None else g for g, q in pairs]))
    return torch.stack(rows)


def columns_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over removals for each evaluation example."""
    return F.cosine_similarity(a, b, dim=0)


def layer_slices(p: Problem) -> list[slice]:
    ends = list(itertools.accumulate(t.numel() for t in p.model.params.values()))
    return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def hessian_of(p: Problem, removal: Sequence[int]) -> Tensor:
    """Σ_{i∈removal} ∇²ℓ_i, (P, P)."""
    examples = Examples({k: v[list(removal)] for k, v in p.train.tensors.items()}, dtype=p.model.dtype)
    return hessian(Problem(p.model, examples, p.evals, p.removals)) * len(removal)


def problem_at(p: Problem, moved: dict[str, Tensor]) -> Problem:
    """The same problem with the parameters moved."""
    model = copy.copy(p.model)
    model.params = {n: t + moved[n] for n, t in p.model.params.items()}
    return Problem(model, p.train, p.evals, p.removals)
