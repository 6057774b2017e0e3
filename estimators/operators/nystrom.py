"""A preconditioner for C + λI from EK-FAC: the Nyström approximation of G sketched by EK-FAC's leading eigenvectors.

    Ĝ = GQ (QᵀGQ)⁻¹ QᵀG = U Λ Uᵀ,    M⁻¹ = U (Λ + λ)⁻¹ Uᵀ + (I − UUᵀ) / (Λ_k + λ),

Q the k eigenvectors to which EK-FAC gives the largest eigenvalues. EK-FAC itself as M has curvature where G, whose rank
is at most that of the data, has none, and does not see how layers act together: on Concrete it takes 2.4 times *more*
iterations than no preconditioner, where this one with k = 128 takes a quarter. The k products with G are shared by all
right-hand sides and every λ. Source: Frangella, Tropp and Udell, Randomized Nyström preconditioning (2023), with a
sketch that knows the model instead of a random one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fimo.estimators.operators import gradients
from fimo.estimators.operators.eigenbasis import Eigenbasis
from fimo.estimators.operators.spaces import Space

RANK = 256


class Nystrom:
    """M⁻¹ of C + λI for every λ > 0; symmetric and positive.

    Args:
        space: of the Gauss-Newton matrix, a coordinate for every parameter (``Curvature.whole``).
        basis: EK-FAC's, in the same coordinates.
        dtype: of the model, whose rounding the products with G have.
        rank: k, fewer if k rows of float64 are more than a quarter of ``gradients.HELD``.
    """

    def __init__(self, space: Space, basis: Eigenbasis, dtype: torch.dtype, rank: int = RANK) -> None:
        size = space.start.shape[1]
        rank = max(1, min(rank, size, gradients.HELD // (8 * size)))
        sketch = leading(basis, rank, size, dtype)
        image = space.apply(sketch)
        values, vectors = torch.linalg.eigh((image @ sketch.T + sketch @ image.T) / 2)
        # What rounding alone could have made is no direction of G.
        kept = values > 10 * torch.finfo(dtype).eps * float(values.max().clamp_min(0)) * len(values)
        self.vectors = space.start.new_zeros(size, 0)
        self.values = space.start.new_zeros(0)
        if bool(kept.any()):
            root = (vectors[:, kept] / values[kept].sqrt()).T @ image
            self.vectors, singular, _ = torch.linalg.svd(root.T, full_matrices=False)
            self.values = singular.square()

    def inverse(self, rows: Tensor, damping: float) -> Tensor:
        """M⁻¹ for λ = ``damping`` on rows (k, P), float64."""
        if not len(self.values):
            return rows / damping
        beyond = 1 / (self.values[-1] + damping)
        inside = rows @ self.vectors
        return rows * beyond + inside * (1 / (self.values + damping) - beyond) @ self.vectors.T


def leading(basis: Eigenbasis, count: int, size: int, dtype: torch.dtype) -> Tensor:
    """The eigenvectors (``dtype``) of the ``count`` largest eigenvalues over all blocks, orthonormal (≤ count, P)."""
    values = torch.cat([block.values for block in basis.blocks])
    owners = torch.cat([torch.full((len(b.values),), place) for place, b in enumerate(basis.blocks)])
    places = torch.cat([torch.arange(len(block.values)) for block in basis.blocks])
    chosen = values.argsort(descending=True)[:count].cpu()
    rows = torch.zeros(len(chosen), size, dtype=torch.float64, device=values.device)
    for number, block in enumerate(basis.blocks):
        mine = (owners[chosen] == number).nonzero().squeeze(1)
        if len(mine):
            unit = torch.zeros(len(mine), len(block.values), dtype=dtype, device=values.device)
            unit[torch.arange(len(mine)), places[chosen[mine]]] = 1
            into = torch.zeros(len(mine), size, dtype=dtype, device=values.device)
            block.restore(unit, into)
            rows[mine] = into.double()
    return rows
