"""The factored curvature against dense blocks of the Gauss-Newton matrix."""

from __future__ import annotations

import torch
from fimo.estimators.base import estimating
from fimo.estimators.operators.kronecker import eigenbasis
from fimo.estimators.operators.pseudo_gradients import PseudoGradients

from tests.estimators import problems


def basis_of(p, fisher="exact", corrected=True, samples=1, seed=0):
    with estimating(p.model):
        return eigenbasis(p.model, p.train, lambda b: PseudoGradients(p.model, b, fisher, samples, seed), corrected)


def matrix_of(p, basis):
    """The approximation as a dense matrix."""
    size = sum(t.numel() for t in p.model.params.values())
    return basis.apply(torch.eye(size, dtype=torch.float64), lambda values: values)


def test_eigenvalues_are_second_moments_in_the_eigenbasis():
    p = problems.regression()
    basis = basis_of(p)
    g = problems.gauss_newton(p)
    for block in basis.blocks:
        identity = torch.eye(len(g), dtype=torch.float64)
        vectors = block.coordinates(identity)  # columns: the block's eigenvectors among the P parameters
        torch.testing.assert_close((vectors.T @ g @ vectors).diagonal(), block.values, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            vectors.T @ vectors, torch.eye(vectors.shape[1], dtype=torch.float64), rtol=1e-9, atol=1e-12
        )


def test_sampled_labels_average_to_the_exact_fisher():
    p = problems.classification()
    exact = basis_of(p)
    sampled = basis_of(p, fisher="sampled", samples=600)
    difference = (matrix_of(p, sampled) - matrix_of(p, exact)).norm() / matrix_of(p, exact).norm()
    assert difference < 0.12


def test_sampled_vectors_of_a_loss_that_is_not_cross_entropy_average_to_its_hessian():
    p = problems.regression()
    exact, sampled = matrix_of(p, basis_of(p)), matrix_of(p, basis_of(p, fisher="sampled", samples=600))
    assert (sampled - exact).norm() / exact.norm() < 0.12
