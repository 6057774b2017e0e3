"""A small BERT of transformers with AdamW and clipping against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fimo.workers.further_training import further_train
from fimo.workers.settings import Evaluate, Optimizer
from fimo.workers.workload import Workload
from tests.workers.problems import Sentences, cross_entropy, make, settings
from tests.workers.test_against_definition import hold

transformers = pytest.importorskip("transformers")
ADAMW = Optimizer("adamw", lr=1e-3, weight_decay=0.1)


def bert(
    kind: str = "BertForSequenceClassification", attention: str = "eager", dropout: float = 0.0, positions: int = 16
) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=positions,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation=attention,
    )
    return getattr(transformers, kind)(config)


def text(model: nn.Module, logits=lambda out: out.logits, n: int = 23) -> Workload:
    return Workload(
        model,
        Sentences(n, 1),
        Sentences(5, 2),
        outputs=lambda m, batch: logits(m(input_ids=batch["tokens"], attention_mask=batch["mask"].long())),
        loss=cross_entropy,
    )


@pytest.mark.parametrize("mode", ["drop", "reweight"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert_with_adamw_and_clipping(attention: str, dropout: float, mode: str) -> None:
    chosen = settings(
        ADAMW, removal_mode=mode, clip_norm=1.0, steps=7, evaluate=Evaluate(at_steps=(3, 6)), batch_size=8
    )
    hold(text(bert(attention=attention, dropout=dropout)), chosen, [(), (3,), (17,)])


def test_bert_in_float32() -> None:
    chosen = settings(ADAMW, clip_norm=1.0, steps=5, batch_size=8, precision="float32")
    hold(text(bert(attention="sdpa", dropout=0.1)), chosen, [(), (3,), (17,)])


def test_an_unused_pooler_is_skipped_as_torch_skips_it() -> None:
    workload = text(bert("BertModel"), lambda out: out.last_hidden_state[:, 0, :3])
    chosen = settings(ADAMW, clip_norm=1.0, steps=4, batch_size=8, removal_mode="drop")
    hold(workload, chosen, [(), (3,)])
    start, seen = make(workload, chosen), {}
    further_train(start, [(), (3,)], 0, watch=lambda step, params: seen.update(params))
    name = "pooler.dense.weight"
    assert name not in start.forward.used
    assert torch.equal(seen[name][1], start.model.params[name]), "no weight decay without a gradient"


def test_tied_embeddings_are_trained_as_one() -> None:
    model = bert("BertForMaskedLM")
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    workload = text(model, lambda out: out.logits[:, 0, :3])
    hold(workload, settings(ADAMW, steps=4, batch_size=8, removal_mode="drop"), [(), (3,)])
