"""The factored curvature against dense blocks of the Gauss-Newton matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fimo.estimators import parse
from fimo.estimators.differentiable import estimating
from fimo.estimators.operators import capture, gradients, kronecker
from fimo.estimators.operators import moments as sums_of
from fimo.estimators.operators.curvature import GaussNewton
from fimo.estimators.operators.kronecker import eigenbasis
from fimo.estimators.operators.pseudo_gradients import PseudoGradients
from fimo.workers.workload import Workload
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


class Conv1D(nn.Module):
    """transformers' Linear with a transposed weight, under its own name."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(0.5 * torch.randn(nx, nf))
        self.bias = nn.Parameter(0.1 * torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Block(nn.Module):
    """A block of GPT-2: norm, causal attention, norm, MLP, all on Conv1D."""

    def __init__(self, kind, width=40):
        super().__init__()
        self.norm, self.attention, self.projection = nn.LayerNorm(width), kind(3 * width, width), kind(width, width)
        self.second, self.up, self.down = nn.LayerNorm(width), kind(2 * width, width), kind(width, 2 * width)
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        q, k, v = (t.unsqueeze(1) for t in self.attention(self.norm(x)).chunk(3, dim=-1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        x = x + self.projection(mixed)
        return self.last((x + self.down(nn.functional.gelu(self.up(self.second(x))))).mean(dim=1))


def of_model(model, positions=3, width=40, n=14):
    data = {"x": torch.randn(n, positions, width, dtype=torch.float64), "label": torch.randint(3, (n,))}
    return problems.problem(Workload(model.double(), data, data, problems.outputs_x, problems.cross_entropy), [[0]])


def moments(p, basis):
    """The Gauss-Newton matrix's second moments in a block's eigenvectors: what its eigenvalues must be."""
    with estimating(p.model):
        rows = torch.eye(gradients.Layout.of(p.model.params).size, dtype=torch.float64)
        for block in basis.blocks:
            vectors = block.coordinates(rows)
            some = vectors[:, :: max(1, vectors.shape[1] // 7)]
            images = GaussNewton(p.model, p.train)(some.T.contiguous())
            yield block.values[:: max(1, vectors.shape[1] // 7)], (some.T * images).sum(dim=1), vectors


def test_conv1d_is_covered_as_a_linear_is():
    torch.manual_seed(0)
    p = of_model(Block(Conv1D, 16), width=16, n=8)
    basis = basis_of(p)
    assert basis.left_out == []
    assert kronecker.coverage(p.model) == basis.coverage(p.model) == 1
    assert sum(isinstance(block, kronecker.LayerBlock) for block in basis.blocks) == 5
    for values, truth, vectors in moments(p, basis):
        torch.testing.assert_close(values, truth, rtol=1e-8, atol=1e-11)
        identity = torch.eye(vectors.shape[1], dtype=torch.float64)
        torch.testing.assert_close(vectors.T @ vectors, identity, rtol=1e-9, atol=1e-10)
    rows = torch.randn(3, gradients.Layout.of(p.model.params).size, dtype=torch.float64)
    torch.testing.assert_close(basis.apply(rows, torch.ones_like), rows, rtol=1e-9, atol=1e-10)


def test_transformers_conv1d_is_the_one_that_is_told_by_its_name():
    module = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4)
    assert capture.is_conv1d(module)
    assert not capture.is_conv1d(nn.Linear(4, 6))
    assert not capture.is_conv1d(nn.Conv1d(4, 6, 1))


def test_one_conv1d_with_one_datum_is_exact():
    torch.manual_seed(0)
    data = {"x": torch.randn(1, 4, dtype=torch.float64), "label": torch.randint(3, (1,))}
    model = Conv1D(3, 4).double()
    p = problems.problem(Workload(model, data, data, problems.outputs_x, problems.cross_entropy), [[0]])
    torch.testing.assert_close(matrix_of(p, basis_of(p)), problems.gauss_newton(p), rtol=1e-9, atol=1e-12)


class PastItsForward(nn.Module):
    """Weights used past their module's forward: attention's projection, a functional call, a call and a functional."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(40, 2, batch_first=True)
        self.functional, self.both, self.last = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 3)

    def forward(self, x):
        x = torch.tanh(self.attention(x, x, x, need_weights=False)[0])
        x = torch.tanh(nn.functional.linear(x, self.functional.weight, self.functional.bias))
        x = torch.tanh(self.both(x)) + x @ self.both.weight
        return self.last(x.mean(dim=1))


def test_a_weight_used_past_its_modules_forward_is_not_taken_for_a_layer():
    torch.manual_seed(0)
    p = of_model(PastItsForward())
    found = basis_of(p)
    large = ["attention.in_proj_weight", "attention.out_proj.weight", "functional.weight", "both.weight"]
    assert sorted(found.left_out) == sorted(large)
    for values, truth, _ in moments(p, found):
        torch.testing.assert_close(values, truth, rtol=1e-7, atol=1e-10)


def test_coverage_is_a_share_of_the_scalars():
    p = problems.classification()
    assert kronecker.coverage(p.model) == 1
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(600, 2), nn.Flatten(), nn.Linear(4, 3))
    data = {"x": torch.randint(600, (5, 2)), "label": torch.randint(3, (5,))}
    p = problems.problem(Workload(model.double(), data, data, problems.outputs_x, problems.cross_entropy), [[0]])
    assert kronecker.coverage(p.model) == pytest.approx(15 / 1215)
    assert parse({"name": "ekfac", "damping": 0.1})[0].estimate(p).notes["coverage"] == pytest.approx(15 / 1215)


def test_a_moment_of_more_columns_than_a_block_is_the_symmetric_whole(monkeypatch):
    monkeypatch.setattr(sums_of, "TOGETHER", 16)
    rows, moment = torch.randn(70, 600, dtype=torch.float64), sums_of.Moment()
    for some in rows.split(9):
        moment.add(some)
    torch.testing.assert_close(moment.mean(70), rows.T @ rows / 70, rtol=1e-12, atol=1e-14)


def test_squares_of_large_matrices_are_those_of_small_ones(monkeypatch):
    monkeypatch.setattr(sums_of, "FLUSHED", 4)
    g, a = torch.randn(11, 3, 5, dtype=torch.float64), torch.randn(11, 3, 7, dtype=torch.float64)
    truth = torch.einsum("bto,bti->boi", g, a).square().sum(dim=0)
    for tile in (1, 2**21):
        monkeypatch.setattr(sums_of, "TILE", tile)
        found = torch.zeros(5, 7, dtype=torch.float64)
        sums = sums_of.SquareSum(found)
        for some in (slice(0, 5), slice(5, 11)):
            sums.add(g[some], a[some])
        sums.flush()
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-14)
