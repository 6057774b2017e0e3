"""Vectors at the outputs whose second moment is the Hessian of the loss in them: what turns backward passes into G.

For each example Σ_c s_c s_cᵀ = ∂²ℓ/∂outputs² exactly (type-2 Fisher, a vector for every output), or in expectation,
one vector s a draw:

    cross-entropy     s_t = √w_t (softmax(z_t) − e_ŷ), a label ŷ drawn from the model for every token t at once: the
                      draws of different tokens are independent and have mean 0, so what they have in common cancels
    any other loss    s = H^½ ε with standard normal ε, H^½ from its eigenvectors if the outputs are few, else
                      by Lanczos' iteration, which needs products with H alone

so that nothing of size outputs × outputs is formed if the outputs are many. Sources: Martens (2020), sections 5 and 9;
Grosse et al. (2023), section 3, for labels by token; Chow and Saad (2014) for H^½ε by Lanczos; Kunstner et al. (2019)
for why the data's own labels will not do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fimo.estimators.operators import gradients
from fimo.estimators.operators.gradients import directional
from fimo.estimators.operators.hashes import uniforms
from fimo.estimators.operators.output_functions import class_dimension, loss_slope, token_weights
from fimo.estimators.operators.spaces import output_hessians
from fimo.workers.device import is_gpu
from fimo.workers.examples import Batch
from fimo.workers.functional import FunctionalModel

FEW = 10
"""Outputs an example up to which the exact Fisher is the default."""

MANY = 256
"""Outputs an example from which on their Hessian is not formed to sample from it."""

LANCZOS = 48
"""Steps of Lanczos' iteration at most."""


class PseudoGradients:
    """Draws s for batches; a draw is a function of the seed and the example's index alone.

    Args:
        batch: a few examples, to tell what the loss is.
        fisher: exact, sampled, or auto: exact for at most ``FEW`` outputs.
        samples: draws an example if sampled.

    Attributes:
        fisher: exact or sampled.
        drawn: what is drawn, for a reader; empty if nothing is.
        block: examples that may be asked for at once.
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
        outputs = model.outputs(model.params, batch).detach()
        self._count = outputs[0].numel()
        self.fisher = ("exact" if self._count <= FEW else "sampled") if fisher == "auto" else fisher
        self._dim = class_dimension(model, outputs, batch) if self.fisher == "sampled" else None
        self.drawn, scalars = "", self._count**2
        if self._dim is not None:
            tokens = self._count // outputs.shape[self._dim]
            self.drawn = (
                "a label for each example" if tokens == 1 else f"a label for each of an example's {tokens} tokens"
            )
            scalars = 8 * self._count
        elif self.fisher == "sampled":
            self.drawn = "the square root of the outputs' Hessian times noise"
            scalars = self._count * (self._count if self._count <= MANY else LANCZOS)
        self.block = gradients.block_size(scalars, model.device)

    def __call__(self, outputs: Tensor, batch: Batch, indices: Sequence[int]) -> Iterator[Tensor]:
        """Vectors of the shape of ``outputs`` (B, …); their outer products add up to the Hessian, or its estimate."""
        if self._dim is not None:
            weights, close = token_weights(self._model, outputs, batch, self._dim)
            # The first batch's loss need not be that of all: what is no cross-entropy is drawn as any other loss.
            if bool(close.all()):
                yield from self._labels(outputs, weights, indices)
                return
        if self.fisher == "exact":
            values, vectors = _eigen(output_hessians(self._model, outputs, batch))
            roots = vectors * values.sqrt()[:, None, :]
            rounding = 10 * torch.finfo(outputs.dtype).eps
            for column in range(roots.shape[2]):
                # Softmax has a direction without curvature, which would cost a backward pass for rounding.
                if not bool((values[:, column] > rounding * values[:, -1]).any()):
                    continue
                yield roots[:, :, column].reshape(outputs.shape).to(outputs)
            return
        count = outputs[0].numel()
        few = count <= MANY
        if few:
            values, vectors = _eigen(output_hessians(self._model, outputs, batch))
        for sample in range(self._samples):
            noise = _normal(uniforms(self._seed, indices, sample, count)).to(outputs.device)
            if few:
                inside = torch.einsum("bij,bi->bj", vectors, noise) * values.sqrt()
                drawn = torch.einsum("bij,bj->bi", vectors, inside)
            else:
                drawn = _lanczos_root(self._model, outputs, batch, noise)
            yield (drawn / self._samples**0.5).reshape(outputs.shape).to(outputs)

    def _labels(self, outputs: Tensor, weights: Tensor, indices: Sequence[int]) -> Iterator[Tensor]:
        assert self._dim is not None
        weights = weights.clamp(min=0).sqrt().unsqueeze(-1)
        probabilities = outputs.movedim(self._dim, -1).softmax(dim=-1)
        below = running_sums(probabilities.double())
        tokens = below[0, ..., 0].numel()
        for sample in range(self._samples):
            u = uniforms(self._seed, indices, sample, tokens).to(outputs.device).reshape(*below.shape[:-1], 1)
            label = torch.searchsorted(below, u * below[..., -1:], right=True).clamp(max=below.shape[-1] - 1)
            s = probabilities.scatter_add(-1, label, -torch.ones_like(label, dtype=probabilities.dtype))
            yield (s * weights / self._samples**0.5).movedim(-1, self._dim)


def running_sums(x: Tensor) -> Tensor:
    """Sums along the last dimension up to each place, in an order that is the same each time."""
    if not is_gpu(x.device):
        return x.cumsum(dim=-1)
    # torch's own has no such order on a GPU, and is refused there. Each pass doubles how far a place has looked back.
    reach = 1
    while reach < x.shape[-1]:
        x = torch.cat([x[..., :reach], x[..., reach:] + x[..., :-reach]], dim=-1)
        reach *= 2
    return x


def _normal(u: Tensor) -> Tensor:
    return torch.erfinv(2 * u - 1) * 2**0.5


def _eigen(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, o), those below 0 as 0, and eigenvectors (B, o, o), float64."""
    values, vectors = torch.linalg.eigh(squares.double())
    return values.clamp(min=0), vectors


def _lanczos_root(model: FunctionalModel, outputs: Tensor, batch: Batch, noise: Tensor) -> Tensor:
    """H₊^½ ε for noise (B, o), H each example's ∂²ℓ/∂outputs², by at most ``LANCZOS`` products with it."""
    slope = partial(loss_slope, model)

    def product(v: Tensor) -> Tensor:
        along = v.reshape(outputs.shape).to(outputs)
        image: Tensor = directional(lambda out: slope(out, batch), outputs, along)[1]
        return image.double().flatten(1)

    length = noise.norm(dim=1, keepdim=True)
    basis, diagonal, beside = [noise / length], [], []
    for step in range(min(LANCZOS, noise.shape[1])):
        image = product(basis[-1])
        diagonal.append((image * basis[-1]).sum(dim=1))
        q = torch.stack(basis, dim=1)
        for _ in range(2):  # Twice is enough (Kahan): a basis that is not orthogonal finds eigenvalues again.
            image = image - torch.einsum("bmo,bm->bo", q, torch.einsum("bmo,bo->bm", q, image))
        size = image.norm(dim=1)
        largest = torch.stack(diagonal).abs().amax(dim=0)
        beside.append(torch.where(size > 1e-6 * largest, size, 0))
        if step + 1 == LANCZOS or not bool(beside[-1].any()):
            break
        basis.append(image * torch.where(beside[-1] > 0, 1 / size, 0)[:, None])
    count = len(diagonal)
    matrix = torch.diag_embed(torch.stack(diagonal, dim=1))
    for place in range(count - 1):
        matrix[:, place, place + 1] = matrix[:, place + 1, place] = beside[place]
    values, vectors = _eigen(matrix)
    coefficients = torch.einsum("bij,bj->bi", vectors, values.sqrt() * vectors[:, 0])
    root: Tensor = length * torch.einsum("bm,bmo->bo", coefficients, torch.stack(basis[:count], dim=1))
    return root
