"""Vectors at the outputs whose second moment is the Hessian of the loss in them: what turns backward passes into G.

For each example Σ_c s_c s_cᵀ = ∂²ℓ/∂outputs² exactly (type-2 Fisher, a vector for every output), or in expectation
(one vector a draw): for cross-entropy with a label sampled from the model, s = softmax(z) − e_ŷ, the true Fisher;
for any other loss s = H^½ε with standard normal ε. Source: Martens (2020), sections 5 and 9; Kunstner et al. (2019)
for why the data's own labels will not do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from fimo.estimators.operators.output_functions import is_cross_entropy
from fimo.estimators.operators.spaces import output_hessians
from fimo.workers.examples import Batch
from fimo.workers.functional import FunctionalModel

FEW = 10
"""Outputs an example up to which the exact Fisher is the default."""


class PseudoGradients:
    """Draws s for batches; seeded, so that a second pass over the same batches sees the same ones.

    Args:
        fisher: exact, sampled, or auto: exact for at most ``FEW`` outputs.
        samples: draws an example if sampled.
    """

    def __init__(
        self,
        model: FunctionalModel,
        batch: Batch,
        fisher: Literal["auto", "exact", "sampled"],
        samples: int,
        seed: int,
    ) -> None:
        self._model, self._samples, self._seed = model, samples, seed
        outputs = model.outputs(model.params, batch)
        few = outputs[0].numel() <= FEW
        self.fisher = ("exact" if few else "sampled") if fisher == "auto" else fisher
        self._classes = self.fisher == "sampled" and is_cross_entropy(model, batch)
        self.restart()

    def restart(self) -> None:
        """Begin the sequence of draws again."""
        self._generator = torch.Generator().manual_seed(self._seed)

    def __call__(self, outputs: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Vectors of the shape of ``outputs`` (B, …); their outer products add up to the Hessian, or its estimate."""
        if self._classes:
            probabilities = outputs.softmax(dim=1)
            on_cpu = probabilities.double().cpu()
            for _ in range(self._samples):
                label = torch.multinomial(on_cpu, 1, generator=self._generator).squeeze(1).to(outputs.device)
                hot = torch.nn.functional.one_hot(label, outputs.shape[1])
                yield (probabilities - hot) / self._samples**0.5
            return
        roots = _roots(output_hessians(self._model, outputs, batch))
        if self.fisher == "exact":
            for column in range(roots.shape[2]):
                yield roots[:, :, column].reshape(outputs.shape).to(outputs)
            return
        for _ in range(self._samples):
            noise = torch.randn(roots.shape[:2], generator=self._generator, dtype=torch.float64).to(roots.device)
            yield (torch.einsum("bij,bj->bi", roots, noise) / self._samples**0.5).reshape(outputs.shape).to(outputs)


def _roots(squares: Tensor) -> Tensor:
    """R (B, o, o), float64, with RRᵀ the positive part of each matrix."""
    values, vectors = torch.linalg.eigh(squares.double())
    roots: Tensor = vectors * values.clamp(min=0).sqrt()[:, None, :]
    return roots
