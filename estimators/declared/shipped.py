"""The shipped estimators' declarations; the mathematics is in the file of each estimator's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fimo.estimators.declared.base import Declaration
from fimo.estimators.declared.families import Factored, Influence, OwnSeeds, SGDMatched


@dataclass(frozen=True)
class GradDot(Declaration):
    """Grad-Dot.

    Attributes:
        preconditioner: ``optimizer``: ∇g(z, θᶠ)ᵀ D⁻¹ ∇L_i(θᶠ), the same limit under Adam and AdamW, whose step divides
            by D = √v̂ + ε; see ``matching``.
    """

    name: ClassVar[str] = "grad_dot"
    units: ClassVar[str] = "n / (learning rate * step) times an effect"

    preconditioner: Literal["optimizer"] | None = None

    def follows_training(self) -> bool:
        """The optimizer's scale is its own, and that of its batches."""
        return self.preconditioner is not None


@dataclass(frozen=True)
class GradCos(Declaration):
    """Grad-Cos."""

    name: ClassVar[str] = "grad_cos"
    units: ClassVar[str] = "a cosine: of no scale"
    version: ClassVar[int] = 2


@dataclass(frozen=True)
class DataInf(Influence):
    """DataInf, whose damping is positive."""

    name: ClassVar[str] = "datainf"
    default_scale: ClassVar[float] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.damping != 0 and self.damping_scale != 0, "the damping must be positive")


@dataclass(frozen=True)
class TRAK(Influence):
    """TRAK.

    Attributes:
        dimension: d, columns of S; at most n for ΦS to have full rank.
        projection: entries ±1/√d (rademacher), normal with variance 1/d (gaussian), one ±1 a row (sparse: a count
            sketch), or S = I (identity). auto: rademacher if S may be held (``gradients.HELD``), else sparse: a dense S
            of a large model costs many times the gradients that it projects.
        seed: of S.
    """

    name: ClassVar[str] = "trak"
    units: ClassVar[str] = "of no known scale"
    default_scale: ClassVar[float] = 0.0

    dimension: int = 512
    projection: Literal["auto", "rademacher", "gaussian", "sparse", "identity"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.dimension >= 1, "dimension must be at least 1")
        self.require(0 <= self.seed < 2**31, "seed must lie between 0 and 2^31 − 1")


@dataclass(frozen=True)
class EKFAC(Factored, Influence):
    """EK-FAC."""

    name: ClassVar[str] = "ekfac"
    version: ClassVar[int] = 4
    matches: ClassVar[bool] = True


@dataclass(frozen=True)
class CG(Influence):
    """Conjugate gradients.

    Attributes:
        curvature: ``gauss_newton`` (positive semidefinite for convex losses) or ``hessian`` (may be
            indefinite; CG then still solves the system, but without its guarantee: look at the residuals in
            the notes).
        preconditioner: ``ekfac``: iterate with M⁻¹ from EK-FAC (see ``operators.nystrom``), each λ by itself from the
            solution before. The values are the same, the iterations fewer where the damping is small.
        tolerance: a right-hand side stops at ‖v − (C + λI)x‖ ≤ tolerance·‖v‖.
        max_iterations: and at the latest after so many.
    """

    name: ClassVar[str] = "cg"
    version: ClassVar[int] = 3
    matches: ClassVar[bool] = True

    curvature: Literal["gauss_newton", "hessian"] = "gauss_newton"
    preconditioner: Literal["ekfac"] | None = None
    tolerance: float = 1e-8
    max_iterations: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.tolerance < 1, "tolerance must lie between 0 and 1")
        self.require(self.max_iterations >= 1, "max_iterations must be at least 1")


PRECONDITIONED_DEPTH = 100


@dataclass(frozen=True)
class LiSSA(Influence):
    """LiSSA.

    Attributes:
        depth: steps t of the recursion: directions of curvature above s/depth are inverted. None = 5000 (500 for the
            Hessian, which cannot be compressed as the Gauss-Newton matrix can), preconditioned 100.
        repeats: independent runs that are averaged.
        batch_size: examples in a random batch; n or more takes all of 𝒟 at every step, without noise.
        scale: s; None = the largest eigenvalue by power iteration over 𝒟 and the first batches, plus λ (preconditioned:
            the largest of M⁻¹(C + λI)).
        preconditioner: ``ekfac``; see ``fimo.estimators.lissa``.
        seed: of the batches, which are the same for every evaluation example.
    """

    name: ClassVar[str] = "lissa"
    version: ClassVar[int] = 4
    matches: ClassVar[bool] = True
    plain_depth: ClassVar[int] = 5000

    depth: int | None = None
    repeats: int = 1
    batch_size: int = 64
    scale: float | None = None
    preconditioner: Literal["ekfac"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth is None:
            self.settle(depth=PRECONDITIONED_DEPTH if self.preconditioner else self.plain_depth)
        assert self.depth is not None
        self.require(min(self.depth, self.repeats, self.batch_size) >= 1, "depth, repeats and batch_size must be ≥ 1")
        self.require(self.scale is None or self.scale > 0, "scale must be positive")


@dataclass(frozen=True)
class LiSSAH(LiSSA):
    """LiSSA with the Hessian."""

    name: ClassVar[str] = "lissa_h"
    plain_depth: ClassVar[int] = 500


@dataclass(frozen=True)
class EKFACMatched(Factored, SGDMatched):
    """EK-FAC, matched to the amount."""

    name: ClassVar[str] = "ekfac_matched"
    version: ClassVar[int] = 3


@dataclass(frozen=True)
class LiSSAMatched(SGDMatched):
    """LiSSA, matched to the amount.

    Attributes:
        seed: of the batch order, which is that of the sweep's cell with this seed.
    """

    name: ClassVar[str] = "lissa_matched"
    version: ClassVar[int] = 2

    seed: int = 0


@dataclass(frozen=True)
class Unrolled(OwnSeeds):
    """Linearised further training.

    Attributes:
        direction: forward, adjoint (unclipped SGD alone), or auto: whichever needs fewer Hessian-vector products.
    """

    name: ClassVar[str] = "unrolled"
    units: ClassVar[str] = "an effect, in units of g"
    version: ClassVar[int] = 2
    # Forwards, the changes are carried once for all evaluation examples of a block.
    evals_together: ClassVar[int] = 1024
    most_seeds: ClassVar[int | None] = 4

    direction: Literal["auto", "forward", "adjoint"] = "auto"


@dataclass(frozen=True)
class Mirrored(OwnSeeds):
    """Mirrored further training."""

    name: ClassVar[str] = "mirrored"
    units: ClassVar[str] = "an effect, in units of g"
    # With their baseline a stack of 32, or whole stacks of 16, 8, 4.
    evals_together: ClassVar[int] = 31
    trains: ClassVar[bool] = True

    seeds: int | None = 4


DECLARED: dict[str, type[Declaration]] = {
    kind.name: kind
    for kind in (
        GradDot,
        GradCos,
        DataInf,
        TRAK,
        EKFAC,
        CG,
        LiSSA,
        LiSSAH,
        EKFACMatched,
        LiSSAMatched,
        Unrolled,
        Mirrored,
    )
}
"""Declarations by the name that specs and tables use."""
