"""TRAK with one model (M = 1): a Gauss-Newton matrix of randomly projected output-function gradients.

    P = S (Sᵀ ΦᵀΦ S + nλI)⁺ Sᵀ,    Φ_i = ∇f(z_i, θᶠ)

f is the log-odds of the label for cross-entropy and the output for one output an example; S (P × d) a random matrix
with E[SSᵀ] = I. The training side is the projected loss gradient ∇ℓ_i = (∂ℓ/∂f) Φ_i, which is TRAK's Q weight times
its feature. λ = 0 and no per-example weights (V = I) in the sum ΦᵀΦ by default, as in the paper; note the sum, not the
mean, so the scale is 1/n of the other influence functions'. Source: Park et al., TRAK (ICML 2023), eq. 13 to 17.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fimo.estimators.base import Layered
from fimo.estimators.counts import POSITIONS, Work, dense_size
from fimo.estimators.declared import shipped as declared
from fimo.estimators.differentiable import estimating
from fimo.estimators.influence import Influence, Preconditioner
from fimo.estimators.operators import gradients
from fimo.estimators.operators.gradients import Layout, PerExample
from fimo.estimators.operators.layerwise import layerwise
from fimo.estimators.operators.output_functions import is_cross_entropy, is_scalar, labels, log_odds
from fimo.estimators.operators.products import Sides
from fimo.estimators.operators.rows import loss_gradients
from fimo.estimators.operators.sketch import Sketch
from fimo.estimators.problem import Notes, Problem
from fimo.workers.examples import Batch
from fimo.workers.functional import FunctionalModel, Tensors

TILE = 1024
"""Parameters whose rows of S are drawn together. Part of the definition of S: it decides which numbers are drawn."""

CUTOFF = 1e-10
"""Eigenvalues of SᵀΦᵀΦS below this fraction of the largest are taken as zero if λ = 0."""


UNKNOWN_OUTPUT = (
    "the workload's loss must be cross-entropy of outputs (B, classes), or its outputs one number an example"
)


@dataclass(frozen=True)
class TRAK(declared.TRAK, Influence):
    """TRAK; see the module.

    Cost: n + R + E backward passes and as many projections, of P·d operations, or of P if S is sparse. A dense S is
    drawn again for every block of gradients if it has more than ``gradients.HELD`` entries.
    """

    by_layers: ClassVar[bool] = True

    def unsuited(self, problem: Problem) -> str | None:
        """The output function is not known: neither cross-entropy of classes, nor one output an example."""
        batch = problem.train.batch(range(min(8, len(problem.train))))
        with estimating(problem.model):
            known = is_scalar(problem.model, batch) or is_cross_entropy(problem.model, batch)
        return None if known else UNKNOWN_OUTPUT

    def work(self, problem: Problem) -> Work:
        """A pass of gradients over 𝒟, and the projection of every one."""
        n, size = float(len(problem.train)), Layout.of(problem.model.params).size
        dimension = self.dimension if self.projection != "identity" else size
        kind, small = self._projection(problem).kind, 2.0 * n * dimension**2 + 10.0 * dimension**3
        every = n + len(problem.removals) + len(problem.evals)
        own = Work(gradients=n, flops=small)
        if kind == "identity":
            return super().work(problem) + own
        if kind == "sparse":
            # A gradient is made dense, and its entries added up: memory's time, as that of some products.
            return super().work(problem) + own + Work(inner=2.0 * every * dense_size(problem.model) * 2 * POSITIONS)
        held = size * dimension <= gradients.HELD
        blocks = 1 if held else -(-every // gradients.block_size(size, problem.model.device))
        dense = float(size) * dimension
        return super().work(problem) + own + Work(inner=2.0 * every * dense, draws=blocks * dense)

    def preconditioning(self, problem: Problem, notes: Notes) -> Preconditioner:
        """P; one pass over 𝒟 for ΦᵀΦ."""
        model, project = problem.model, self._projection(problem)
        function = output_function(model, problem.train.batch(range(min(8, len(problem.train)))))
        features = (project(rows) for _, rows in loss_gradients(model, problem.train, loss=function))
        solve = self._solver(problem, notes, features, project)
        return lambda rows: project.back(solve(project(rows)).to(rows))

    def layered(self, problem: Problem, notes: Notes, both: Sides) -> Layered | None:
        """The same, layer by layer; None if S is dense."""
        model, project = problem.model, self._projection(problem)
        sketch = project.sketch
        function = output_function(model, problem.train.batch(range(min(8, len(problem.train)))))
        way = layerwise(model, function, problem.train)
        if sketch is None or way is None or self.training_gradient != "final":
            return None
        every = (
            sketch.features(block)
            for block in way.gradients(range(len(problem.train)), gradients.held(model.device) // 4)
        )
        solve = self._solver(problem, notes, every, project)
        return Layered(lambda left, right: sketch.features(left).double() @ solve(sketch.features(right)).T)

    def _solver(
        self, problem: Problem, notes: Notes, every: Iterator[Tensor], project: Projection
    ) -> Callable[[Tensor], Tensor]:
        """(SᵀΦᵀΦS + nλI)⁺ on projected rows (k, d), float64, from the projected rows of all of 𝒟."""
        size = project.dimension
        gram = torch.zeros(size, size, dtype=torch.float64, device=problem.model.device)
        for features in every:
            gram += features.double().T @ features.double()
        damping = self.resolve_damping(problem)
        values, vectors = torch.linalg.eigh(gram)
        values, ridge = values.clamp(min=0), len(problem.train) * damping
        kept = values > (CUTOFF * values.max() if ridge == 0 else -1)
        inverse = torch.where(kept, 1 / (values + ridge), 0)
        notes.update(damping=damping, rank=int(kept.sum()), dimension=size, projection=project.kind)
        return lambda features: (features.double() @ vectors * inverse) @ vectors.T

    def resolve_damping(self, problem: Problem) -> float:
        """λ; without a pass over 𝒟 if it is 0."""
        return 0.0 if self.damping_scale == 0 else super().resolve_damping(problem)

    def _projection(self, problem: Problem) -> Projection:
        size = Layout.of(problem.model.params).size
        kind = self.projection
        if kind == "auto":
            kind = "rademacher" if size * self.dimension <= gradients.HELD else "sparse"
        return Projection(size, self.dimension, kind, self.seed, problem.model)


def output_function(model: FunctionalModel, batch: Batch) -> PerExample:
    """f for the workload, told from one batch of cross-entropy of classes or of one output an example."""
    if is_cross_entropy(model, batch):

        def odds(params: Tensors, examples: Batch) -> Tensor:
            outputs = model.outputs(params, examples)
            return log_odds(outputs, labels(model, outputs.detach(), examples))

        return odds
    return lambda params, examples: model.outputs(params, examples).flatten()


class Projection:
    """Rows (k, P) -> (k, d) by S, and back by Sᵀ, S never in memory at once if it is large.

    The numbers of S depend on the seed, P and d alone, drawn on the CPU in tiles of ``TILE`` parameters.
    """

    def __init__(
        self,
        size: int,
        dimension: int,
        kind: Literal["rademacher", "gaussian", "sparse", "identity"],
        seed: int,
        model: FunctionalModel,
    ) -> None:
        self.dimension = size if kind == "identity" else dimension
        self.kind: Literal["rademacher", "gaussian", "sparse", "identity"] = kind
        self._size, self._seed, self._model = size, seed, model
        like = next(iter(model.params.values()))
        self.sketch = Sketch(size, dimension, seed, like) if kind == "sparse" else None
        self._kept: list[Tensor] | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows (k, P) times S: (k, d)."""
        if self.kind == "identity":
            return rows
        if self.sketch is not None:
            return self.sketch.project(rows)
        out = torch.zeros(len(rows), self.dimension, dtype=rows.dtype, device=rows.device)
        for where, tile in self._tiles():
            out += rows[:, where] @ tile
        return out

    def back(self, features: Tensor) -> Tensor:
        """Features (k, d) times Sᵀ: (k, P)."""
        if self.kind == "identity":
            return features
        if self.sketch is not None:
            return self.sketch.back(features)
        return torch.cat([features @ tile.T for _, tile in self._tiles()], dim=1)

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        starts = range(0, self._size, TILE)
        if self._kept is None and self._size * self.dimension <= gradients.HELD:
            self._kept = [self._draw(start) for start in starts]
        for number, start in enumerate(starts):
            tile = self._draw(start) if self._kept is None else self._kept[number]
            yield slice(start, start + TILE), tile

    def _draw(self, start: int) -> Tensor:
        width = min(TILE, self._size - start)
        # torch's CPU generator reads 32 bits of a seed; an odd multiplier keeps nearby seeds' tiles apart.
        generator = torch.Generator().manual_seed((self._seed * 0x9E3779B1 + start // TILE) % 2**32)
        draw: dict[str, Callable[[], Tensor]] = {
            "rademacher": lambda: torch.randint(2, (width, self.dimension), generator=generator) * 2 - 1,
            "gaussian": lambda: torch.randn(width, self.dimension, generator=generator),
        }
        return draw[self.kind]().to(self._model.device, self._model.dtype).div_(self.dimension**0.5)
