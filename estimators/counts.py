"""What an estimator has to do, counted before it is done; ``rates`` makes seconds of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch

from fimo.estimators.operators import gradients, layerwise
from fimo.estimators.operators.gradients import Layout
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel


class Counted(Protocol):
    """What is looked at of a ``Problem``."""

    @property
    def model(self) -> FunctionalModel:
        """At θᶠ."""

    @property
    def train(self) -> Examples:
        """𝒟."""

    @property
    def evals(self) -> Examples:
        """The evaluation examples."""

    @property
    def removals(self) -> Sequence[Sequence[int]]:
        """Training indices of each removal."""


ITERATIONS = 100
"""Conjugate gradients' iterations, for want of anything better before they are run."""


@dataclass(frozen=True)
class Work:
    """Counts.

    Attributes:
        gradients: of one example each.
        products: of one example's Hessian with one row.
        gauss: of one example's Gauss-Newton matrix with one row.
        passes: examples that go forwards and backwards as part of a batch.
        steps: of one replica in a stack of the sweep's engine.
        flops: of dense linear algebra in float64.
        bytes: held at once beside the model.
        inner: flops of inner products and projections of gradients, in the model's dtype.
        factors: examples that go through both passes for Kronecker factors, and again for each vector at their outputs.
        draws: random numbers, on the CPU.
        calls: iterations of a solver, for what they take beside their arithmetic.
    """

    gradients: float = 0
    products: float = 0
    passes: float = 0
    steps: float = 0
    flops: float = 0
    bytes: float = 0
    inner: float = 0
    factors: float = 0
    draws: float = 0
    calls: float = 0
    gauss: float = 0

    def __add__(self, other: Work) -> Work:
        """Both, one after the other: what they hold is the larger of the two."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Work(**{**sums, "bytes": max(self.bytes, other.bytes)})


PROOF = 20
"""Gradients that it takes to prove that a large model's may be had layer by layer."""

SETTING_UP = 20
"""Solver's iterations that it takes to look at a problem and its model before anything is done."""

POSITIONS = 32
"""Tokens of an example, for want of anything better before they are seen."""


def is_large(model: FunctionalModel) -> bool:
    """Whether gradients are kept layer by layer, and made dense once for every inner product."""
    return Layout.of(model.params).size >= layerwise.LARGE


def dense_size(model: FunctionalModel) -> int:
    """Parameters that an example's gradient is made dense in: of a large model's embedding few rows are looked up."""
    size = Layout.of(model.params).size
    if not is_large(model):
        return size
    tables = [m.weight for m in model.module.modules() if isinstance(m, torch.nn.Embedding)]
    others = {
        id(p) for m in model.module.modules() if not isinstance(m, torch.nn.Embedding) for p in m._parameters.values()
    }
    names = {id(p): name for name, p in model.module.named_parameters()}
    return size - sum(t.numel() for t in tables if id(t) not in others and names.get(id(t)) in model.params)


def of_products(model: FunctionalModel, left: int, right: int) -> Work:
    """Inner products of so many gradients with so many others."""
    dense = POSITIONS * (left + right) if is_large(model) else 0
    return Work(inner=2.0 * (float(left) * right + dense) * dense_size(model))


def of_gradients(problem: Counted) -> Work:
    """Both sides' gradients and their inner products, as most estimators need them."""
    size, evals = Layout.of(problem.model.params).size, len(problem.evals)
    unique = len({index for removal in problem.removals for index in removal})
    device = problem.model.device
    held = min(4 * evals * size, 4 * gradients.held(device)) + 4 * gradients.stream(device)
    proof = PROOF if is_large(problem.model) else 0
    own = Work(gradients=evals + unique + proof, bytes=held, calls=SETTING_UP)
    return own + of_products(problem.model, unique, evals)


def of_passes(problem: Counted, vectors: int = 1) -> Work:
    """A pass over 𝒟 with so many backward passes an example."""
    return Work(passes=float(len(problem.train)) * vectors)


def of_curvature(problem: Counted, outputs: int, products: float) -> Work:
    """``products`` of C over all of 𝒟, or of batches that add up to as many examples, with every evaluation gradient.

    As ``make_curvature`` does them: compressed if the outputs' Jacobian may be held, else through the model.

    Args:
        outputs: o, scalars that the model puts out for an example; 0 = the Hessian, through the model in any case.
    """
    size, n, evals = Layout.of(problem.model.params).size, len(problem.train), len(problem.evals)
    rank = n * outputs
    if outputs and rank * size * 2 <= gradients.HELD and min(rank, size) <= gradients.LARGEST_RANK:
        # Householder's QR, at less than half of a product's speed.
        flops = 10.0 * min(rank, size) ** 2 * max(rank, size) + 2.0 * products * evals * min(rank, size) ** 2
        return Work(gradients=float(rank), flops=flops, bytes=24.0 * rank * size)
    through, held = products * n * evals, 32.0 * min(evals * size, gradients.held(problem.model.device))
    return Work(gauss=through, bytes=held) if outputs else Work(products=through, bytes=held)
