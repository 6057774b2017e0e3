"""A BERT with an unused pooler, frozen embeddings, SDPA attention and a padding dataset, through every estimator."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fimo.estimators import REGISTRY, parse
from fimo.estimators.differentiable import estimating
from fimo.estimators.operators.curvature import Hessian
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.workload import Workload
from tests.estimators import problems

transformers = pytest.importorskip("transformers")


class Sentences:
    """A map-style dataset of dicts, padded by its collate."""

    def __init__(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 7, (n,), generator=generator)
        self.items = [
            {
                "input_ids": torch.randint(1, 40, (int(length),), generator=generator),
                "label": int(torch.randint(2, (1,), generator=generator)),
            }
            for length in lengths
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        return self.items[index]

    @staticmethod
    def collate(items):
        ids = torch.nn.utils.rnn.pad_sequence([i["input_ids"] for i in items], batch_first=True)
        labels = torch.tensor([i["label"] for i in items])
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": ids != 0, "label": labels})


def outputs(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.fixture(scope="module")
def bert():
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        num_labels=2,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = transformers.BertForTokenClassification(config)

    class Mean(torch.nn.Module):
        """The tokens' mean logits: the pooler of the classification head is there and unused."""

        def __init__(self) -> None:
            super().__init__()
            self.bert, self.pooler = model, torch.nn.Linear(8, 8)

        def forward(self, **arguments):
            out = self.bert(**arguments)
            mask = arguments["attention_mask"][:, :, None]
            out.logits = (out.logits * mask).sum(dim=1) / mask.sum(dim=1)
            return out

    whole = Mean().double()
    for name, parameter in whole.named_parameters():
        if "position_embeddings" in name or "token_type" in name:
            parameter.requires_grad_(False)
    workload = Workload(whole, Sentences(11, 1), Sentences(3, 2), outputs, problems.cross_entropy)
    settings = FurtherTraining(
        Optimizer("adamw", 1e-3), 4, steps=2, evaluate=Evaluate(at_steps=(1, 2)), clip_norm=1.0, precision="float64"
    )
    return problems.problem(workload, [[0], [4, 5]], further_training=settings, seeds=(0,))


OPTIONS = {
    "cg": {"damping": 0.1, "max_iterations": 5},
    "lissa": {"damping": 0.1, "depth": 3, "scale": 20},
    "lissa_h": {"damping": 0.1, "depth": 3, "scale": 20},
    "trak": {"dimension": 4},
}


@pytest.mark.parametrize("name", sorted(set(REGISTRY) - {"ekfac_matched", "lissa_matched"}))
def test_every_estimator_takes_it(bert, name):
    (estimator,) = parse({"name": name, **OPTIONS.get(name, {})})
    assert estimator.applies(bert)
    found = estimator.estimate(bert)
    assert found.values.isfinite().all()
    assert found.values.abs().max() > 0
    if name == "ekfac":
        assert found.notes["left_out"] == []


@pytest.mark.parametrize("name", ["ekfac_matched", "lissa_matched"])
def test_what_is_matched_to_sgd_does_not_apply_to_adamw(bert, name):
    assert not parse(name)[0].applies(bert)


def test_grad_dot_is_the_plain_inner_product(bert):
    with bert.model.mode("eval"):
        truth = problems.removal_sums(bert) @ problems.eval_gradients(bert).T
    torch.testing.assert_close(parse("grad_dot")[0].estimate(bert).values, truth, rtol=1e-9, atol=1e-12)


def test_hessian_products_pass_through_sdpa_attention(bert):
    with bert.model.mode("eval"):
        v = problems.eval_gradients(bert)[:1]
    with estimating(bert.model):
        found = Hessian(bert.model, bert.train)(v)
    with bert.model.mode("eval"), sdpa_kernel(SDPBackend.MATH):
        params = problems.leaves(bert.model)
        loss = torch.stack([bert.model.loss(params, bert.train.batch([i]))[0] for i in range(11)]).mean()
        first = torch.autograd.grad(loss, list(params.values()), create_graph=True, allow_unused=True)
        first = [torch.zeros_like(q) if g is None else g for g, q in zip(first, params.values(), strict=True)]
        second = torch.autograd.grad(problems.flat(first) @ v[0], list(params.values()), allow_unused=True)
    pairs = zip(second, params.values(), strict=True)
    truth = problems.flat([torch.zeros_like(q) if g is None else g for g, q in pairs])
    torch.testing.assert_close(found[0], truth, rtol=1e-8, atol=1e-11)
