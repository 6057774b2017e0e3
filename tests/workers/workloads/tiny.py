"""Tiny models of transformers with their tokenizers, saved in a folder as real ones are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import fimo
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.workload import Workload

SENTENCES = [
    ("a good film and a fine cast", 1),
    ("bad", 0),
    ("the plot is a bad joke", 0),
    ("fine", 1),
    ('a "good" cast', 1),
    ("the film is bad and the joke is bad", 0),
    ("good plot", 1),
    ("the cast is a joke", 0),
    ("a fine film", 1),
    ("bad cast and bad plot", 0),
    ("the good film", 1),
]
TEXTS = [text for text, _ in SENTENCES]


def words(texts: Iterable[str]) -> list[str]:
    return sorted({word for text in texts for word in text.lower().replace('"', ' " ').split()})


def tiny_bert(folder: Path, dropout: float = 0.1) -> Path:
    """Two layers of BERT, 16 wide, with the pooler that saved BERTs have, and a WordPiece tokenizer."""
    transformers: Any = pytest.importorskip("transformers")
    folder.mkdir(parents=True)
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words(TEXTS)]
    (folder / "vocab.txt").write_text("\n".join(known) + "\n")
    config = transformers.BertConfig(
        vocab_size=len(known),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(1)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def tiny_gpt2(
    folder: Path, texts: Iterable[str] = TEXTS, width: int = 16, context: int = 32, dropout: float = 0.1
) -> Path:
    """Two layers of GPT-2, its output weights tied to its embeddings, and a tokenizer of words."""
    transformers: Any = pytest.importorskip("transformers")
    tokenizers: Any = pytest.importorskip("tokenizers")
    known = ["<unk>", "<end>", *words(texts)]
    config = transformers.GPT2Config(
        vocab_size=len(known),
        n_embd=width,
        n_layer=2,
        n_head=4,
        n_positions=context,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(1)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    table = tokenizers.models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(table)
    made.normalizer, made.pre_tokenizer = (
        tokenizers.normalizers.Lowercase(),
        tokenizers.pre_tokenizers.WhitespaceSplit(),
    )
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<end>")
    wrapped.save_pretrained(folder)
    return folder


def write_glue(folder: Path, evals: int = 3) -> Path:
    """The sentences as GLUE's train.tsv and dev.tsv; the last ``evals`` are for evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", SENTENCES[:-evals]), ("dev", SENTENCES[-evals:])):
        lines = ["sentence\tlabel", *(f"{text} \t{label}" for text, label in rows)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def stacks_give_the_definition_s_effects(made: Workload, optimizer: Optimizer, mode: Any) -> None:
    training = FurtherTraining(
        optimizer,
        4,
        steps=3,
        evaluate=Evaluate(at_steps=(2,)),
        clip_norm=1.0,
        removal_mode=mode,
        precision="float64",
    )
    plain = fimo.attribution(made, training, [[0], [3, 5]], [0, 1])
    stacked = fimo.attribution(made, training, [[0], [3, 5]], [0, 1], stacked=True)
    assert float(plain.effects.abs().max()) > 1e-6
    torch.testing.assert_close(stacked.effects, plain.effects, rtol=1e-5, atol=1e-10)
