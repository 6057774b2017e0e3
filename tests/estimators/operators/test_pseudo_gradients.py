"""Vectors at the outputs against the Hessian that their second moment should be, and language models within memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fimo.estimators import parse
from fimo.estimators.differentiable import estimating
from fimo.estimators.operators import layerwise, pseudo_gradients, spaces, squares
from fimo.estimators.operators.curvature import GaussNewton
from fimo.estimators.operators.output_functions import class_dimension
from fimo.estimators.operators.pseudo_gradients import PseudoGradients
from fimo.estimators.operators.spaces import output_hessians
from fimo.workers.errors import UsageError
from fimo.workers.workload import Workload
from tests.estimators import problems
from tests.estimators.operators.test_kronecker import basis_of, matrix_of

B, T, V = 5, 4, 6


def by_token(out, batch, **options):
    return F.cross_entropy(out.transpose(1, 2), batch["y"], reduction="none", **options)


def distilled(out, batch):
    return -(batch["z"].softmax(-1) * out.log_softmax(-1)).sum(-1).mean(-1)


TOKENWISE = {
    "weights": lambda o, b: (by_token(o, b) * b["w"]).sum(1),
    "smoothed": lambda o, b: by_token(o, b, label_smoothing=0.1).mean(1),
    "distilled": distilled,
    "classes first": lambda o, b: F.cross_entropy(o, b["y_of_t"], reduction="none").sum(1),
}
OTHERS = {
    "squares": lambda o, b: ((o - b["z"]) ** 2).flatten(1).mean(1),
    "log cosh": lambda o, b: torch.log(torch.cosh(o - b["z"])).flatten(1).mean(1),
    "tokens that know of each other": lambda o, b: F.softplus(by_token(o, b).sum(1)),
    "focal": lambda o, b: ((1 - torch.exp(-by_token(o, b))) ** 2 * by_token(o, b)).sum(1),
}


def problem(loss):
    torch.manual_seed(0)
    data = {
        "x": torch.randn(B, T, 3, dtype=torch.float64),
        "y": torch.randint(V, (B, T)),
        "y_of_t": torch.randint(T, (B, V)),
        "w": torch.rand(B, T, dtype=torch.float64) * (torch.arange(T) < 3),
        "z": torch.randn(B, T, V, dtype=torch.float64),
    }
    return problems.problem(Workload(nn.Linear(3, V).double(), data, data, problems.outputs_x, loss), [[0]])


def drawn(p, samples, fisher="sampled"):
    batch = p.train.batch(range(B))
    out = p.model.outputs(p.model.params, batch).detach()
    return list(PseudoGradients(p.model, batch, fisher, samples, 0)(out, batch, range(B))), out, batch


def positive(squares):
    values, vectors = torch.linalg.eigh(squares)
    return vectors * values.clamp(min=0)[:, None] @ vectors.transpose(1, 2)


@pytest.mark.parametrize("name", [*TOKENWISE, *OTHERS])
def test_their_second_moment_is_the_hessian(name):
    p = problem({**TOKENWISE, **OTHERS}[name])
    vectors, out, batch = drawn(p, 3000)
    found = sum(torch.einsum("bi,bj->bij", s.flatten(1), s.flatten(1)) for s in vectors)
    truth = positive(output_hessians(p.model, out, batch))
    assert float((found - truth).norm() / truth.norm()) < 0.1
    exact = sum(torch.einsum("bi,bj->bij", s.flatten(1), s.flatten(1)) for s in drawn(p, 1, "exact")[0])
    torch.testing.assert_close(exact, truth, rtol=1e-9, atol=1e-12)


def test_labels_are_drawn_where_the_loss_is_cross_entropy_by_token_alone():
    for name, loss in {**TOKENWISE, **OTHERS}.items():
        p = problem(loss)
        batch = p.train.batch(range(B))
        out = p.model.outputs(p.model.params, batch).detach()
        expected = {"classes first": 1}.get(name, 2) if name in TOKENWISE else None
        assert class_dimension(p.model, out, batch) == expected


@pytest.mark.parametrize("name", OTHERS)
def test_lanczos_root_is_that_of_eigenvectors(name, monkeypatch):
    p = problem(OTHERS[name])
    dense = drawn(p, 2)[0]
    monkeypatch.setattr(pseudo_gradients, "MANY", 1)
    if name == "focal":  # Indefinite: the root of the positive part is no polynomial, and only approached.
        return
    for a, b in zip(drawn(p, 2)[0], dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


class LanguageModel(nn.Module):
    """Embedding, a mixing of what came before, and a head that is not tied."""

    def __init__(self, words, width=6) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(words, width), nn.LayerNorm(width)
        self.body, self.head = nn.Linear(width, width), nn.Linear(width, words)

    def forward(self, batch):
        hidden = self.tokens(batch["ids"])
        steps = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype)[:, None]
        return self.head(torch.tanh(self.body(self.norm(hidden.cumsum(dim=1) / steps))))


def next_token(out, batch):
    chosen = out[:, :-1].log_softmax(-1).gather(2, batch["ids"][:, 1:, None])[..., 0]
    mask = batch["mask"][:, 1:]
    return -(chosen * mask).sum(1) / mask.sum(1)


def language(tokens, words, n=12, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(tokens) < torch.randint(3, tokens, (n + 4, 1), generator=g)).long()
    ids = torch.randint(words, (n + 4, tokens), generator=g) * mask
    parts = [{"ids": ids[s], "mask": mask[s]} for s in (slice(0, n), slice(n, n + 4))]
    torch.manual_seed(0)
    model = LanguageModel(words).to(dtype)
    workload = Workload(model, *parts, lambda m, b: m(b), next_token, padding="mask")
    return problems.problem(workload, [[i] for i in range(min(n, 8))], dtype=dtype)


def test_many_labels_by_token_come_to_the_exact_factorisation_of_a_language_model():
    p = language(6, 5)
    exact = matrix_of(p, basis_of(p))
    off = [float((matrix_of(p, basis_of(p, "sampled", samples=s)) - exact).norm() / exact.norm()) for s in (1, 400)]
    assert off[1] < 0.1 < off[0] < 3
    blocks = problems.layer_slices(p)[-2:]
    where = slice(blocks[0].start, blocks[1].stop)
    truth = problems.gauss_newton(p)[where, where]
    with estimating(p.model):
        own = GaussNewton(p.model, p.train)(torch.eye(len(problems.gauss_newton(p)), dtype=torch.float64))[where, where]
    torch.testing.assert_close(own, truth, rtol=1e-8, atol=1e-10)
    assert float((exact[where, where] - truth).norm() / truth.norm()) < 0.5


def test_one_label_a_token_is_as_good_a_guide_as_the_exact_fisher():
    """To the influence function with the dense Gauss-Newton matrix."""
    p = language(6, 5, n=40)
    size = len(problems.gauss_newton(p))
    inverse = torch.linalg.inv(problems.gauss_newton(p) + 0.02 * torch.eye(size, dtype=torch.float64))
    truth = problems.removal_sums(p) @ inverse @ problems.eval_gradients(p).T
    scores = []
    for fisher in ("exact", "sampled"):
        values = parse({"name": "ekfac", "damping": 0.02, "fisher": fisher})[0].estimate(p).values
        scores.append(float(problems.columns_cosine(values, truth).mean()))
    assert scores[0] > 0.7
    assert scores[1] > scores[0] - 0.05


@pytest.mark.parametrize("name", ["ekfac", "ekfac_matched"])
def test_nothing_as_large_as_the_square_of_a_language_models_outputs_is_formed(name, monkeypatch):
    from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer

    def refuse(*_, **__):
        raise AssertionError("the outputs' Hessian is formed")

    for module in (spaces, pseudo_gradients):
        monkeypatch.setattr(module, "output_hessians", refuse)
    monkeypatch.setattr(squares, "linearised", refuse)
    p = language(64, 1000, n=5, dtype=torch.float32)
    settings = FurtherTraining(Optimizer("sgd", 0.01), 4, steps=2, evaluate=Evaluate(at_steps=(2,)))
    p = type(p)(p.model, p.train, p.evals, p.removals[:2], further_training=settings)
    found = parse(name)[0].estimate(p)
    assert found.notes["fisher"] == "sampled"
    assert found.notes["sampled"] == "a label for each of an example's 64 tokens"
    assert found.notes["samples"] == 1
    assert found.values.abs().max() > 0
    with pytest.raises(UsageError, match="use fisher sampled"):
        parse({"name": name, "fisher": "exact"})[0].estimate(p)


def test_a_draw_is_the_example_s_own_however_it_is_cut_and_batched(monkeypatch):
    p = language(9, 5, n=11)
    entry = {"name": "ekfac", "damping": 0.05, "fisher": "sampled", "samples": 2}
    truth = parse(entry)[0].estimate(p).values
    assert not torch.equal(truth, parse({**entry, "seed": 1})[0].estimate(p).values)
    monkeypatch.setattr(layerwise, "LARGE", 0)
    monkeypatch.setattr(layerwise, "scalars_at_once", lambda _: 1500)
    p = language(9, 5, n=11)
    with estimating(p.model):
        assert layerwise.layerwise(p.model, p.model.loss, p.train).cuts is not None
    torch.testing.assert_close(parse(entry)[0].estimate(p).values, truth, rtol=1e-6, atol=1e-9)


def test_examples_whose_loss_is_not_that_of_the_first_ones_have_their_own_hessian():
    def by_kind(out, batch):
        return torch.where(
            batch["w"][:, 0] < 1, by_token(out, batch).sum(1), ((out - batch["z"]) ** 2).flatten(1).sum(1)
        )

    p = problem(by_kind)
    batch = p.train.batch(range(B))
    batch["w"][3:] = 1
    with estimating(p.model):
        source = PseudoGradients(p.model, p.train.batch([0, 1]), "sampled", 4000, 0)
        assert source.drawn.startswith("a label")
        outputs = p.model.outputs(p.model.params, batch).detach()
        truth = output_hessians(p.model, outputs, batch)
        found = sum(torch.einsum("bi,bj->bij", *[s.flatten(1)] * 2) for s in source(outputs, batch, range(B)))
    for own, of_truth in zip(found, truth, strict=True):
        assert float((own - of_truth).norm()) < 0.15 * float(of_truth.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_direction_in_which_softmax_has_no_curvature_costs_no_backward_pass(dtype):
    torch.manual_seed(0)
    data = {"x": torch.randn(6, 3, dtype=dtype), "label": torch.randint(4, (6,))}
    workload = Workload(nn.Linear(3, 4).to(dtype), data, data, problems.outputs_x, problems.cross_entropy)
    p = problems.problem(workload, [[0]], dtype=dtype)
    batch = p.train.batch(range(6))
    out = p.model.outputs(p.model.params, batch).detach()
    assert len(list(PseudoGradients(p.model, batch, "exact", 1, 0)(out, batch, range(6)))) == 3


def test_cut_sentences_do_not_turn_the_exact_fisher_on(monkeypatch):
    """Of 9 tokens × 2 words too many outputs are put out, of the shortest sentences few enough."""
    p = language(9, 2, n=11)
    truth = parse({"name": "ekfac", "damping": 0.05})[0].estimate(p)
    assert truth.notes["sampled"] == "a label for each of an example's 9 tokens"
    monkeypatch.setattr(layerwise, "LARGE", 0)
    p = language(9, 2, n=11)
    found = parse({"name": "ekfac", "damping": 0.05})[0].estimate(p)
    assert found.notes["sampled"] == truth.notes["sampled"]
    torch.testing.assert_close(found.values, truth.values, rtol=1e-6, atol=1e-9)
