"""SST-2 with BERT, and any other labelled sentences with any encoder of transformers.

Data: GLUE's folder SST-2 (train.tsv with 67,349 sentences, dev.tsv with 872), a folder of ``datasets.save_to_disk``, or
any two tables with the columns sentence (or text) and label. Sentences are tokenised once and cut to ``max_length``
tokens, 128 as in the paper.

The network is the paper's (github.com/IBM/fimoda, fimoda/text): the encoder, and a linear layer on the last hidden
state of its first token. The encoder's dropout is kept, its pooler left out: the paper's is there, and unused.

Final model: ``RECIPE``, the paper's, from the pretrained encoder and a linear layer initialised under the seed: AdamW
at 1e-5 without weight decay, batches of 64, gradients clipped at 1, 19 epochs (the paper kept the best of 30 by its
accuracy on the evaluation sentences, which was the 19th):

    python -m fimo.workers.workloads.sst2 SST-2 --model bert-base-uncased --to sst2.safetensors
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fimo.workers.errors import UsageError
from fimo.workers.examples import Batch
from fimo.workers.settings import Optimizer
from fimo.workers.workload import Workload
from fimo.workers.workloads import pretrained
from fimo.workers.workloads.files import Source
from fimo.workers.workloads.recipe import Recipe, main, network
from fimo.workers.workloads.text import decoded, number_labels, padded, read_parts, tokenise

SOURCE = Source(
    "SST-2",
    "GLUE's SST-2.zip (https://gluebenchmark.com/tasks) and unpack it, or save_to_disk of the data set glue, sst2",
    "a folder with train.tsv and dev.tsv, which have a header with the columns sentence and label",
)
RECIPE = Recipe(Optimizer("adamw", lr=1e-5, weight_decay=0.0), epochs=19, batch_size=64, clip_norm=1.0)


class Classifier(nn.Module):
    """An encoder of transformers with a linear layer on the last hidden state of the first token."""

    def __init__(self, encoder: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.encoder, self.classifier = encoder, classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Tokens and mask, int64 (B, T) -> logits (B, classes)."""
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        logits: Tensor = self.classifier(hidden[:, 0])
        return logits


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (B, classes)."""
    out: Tensor = model(batch["input_ids"], batch["attention_mask"])
    return out


def cross_entropy(outputs: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy per example (B,)."""
    return nn.functional.cross_entropy(outputs, batch["label"], reduction="none")


def encoder(folder: Path, numbers: bool) -> nn.Module:
    """The folder's encoder without a pooler: pretrained, or its architecture alone."""
    # Any seed: its numbers are dropped.
    initial = None if numbers else 0
    try:
        model = pretrained.weights(folder, "AutoModel", initial, add_pooling_layer=False)
    except UsageError as error:
        if "add_pooling_layer" not in str(error):
            raise
        model = pretrained.weights(folder, "AutoModel", initial)  # It has none.
    return model


def sst2(
    data: Path,
    initial: int | None = None,
    model: Path = Path("bert-base-uncased"),
    evals: Path | None = None,
    max_length: int = 128,
    download: bool = False,
) -> Workload:
    """SST-2 (67,349 training, 872 evaluation sentences) with BERT.

    Args:
        data: the folder with train.tsv and dev.tsv, or of ``datasets.save_to_disk``; or the training table.
        initial: None = the spec names a final model; else the pretrained encoder with a linear layer of torch's default
            initialisation under this seed.
        model: the encoder: a folder with config.json, tokenizer and model.safetensors, or a name on the hub.
        evals: the evaluation table, if ``data`` is a table.
        max_length: tokens of a sentence, special ones included; longer ones are cut, as they are at the model's limit.
        download: let the hub's client fetch a model that is neither a folder nor in its cache.

    Raises:
        UsageError: in one line, if data or model are missing or something else.
    """
    parts = read_parts(Path(data), None if evals is None else Path(evals), SOURCE)
    labels = number_labels(parts[0][1], parts[1][1], Path(data), SOURCE)
    folder = pretrained.find(Path(model), download)
    settings, tokenizer = pretrained.config(folder), pretrained.tokenizer(folder)
    if max_length < 3:
        raise UsageError(f"max_length is {max_length}: two of a sentence's tokens are special ones")
    most = min(max_length, getattr(settings, "max_position_embeddings", None) or max_length)
    examples = []
    for (sentences, _), numbers in zip(parts, labels, strict=True):
        ids, mask = padded(tokenise(sentences, tokenizer, most), tokenizer.pad_token_id or 0)
        examples.append({"input_ids": ids, "attention_mask": mask, "label": numbers})
    classes = int(labels[0].max()) + 1
    head = network(lambda: nn.Linear(settings.hidden_size, classes), 0 if initial is None else initial)
    whole = Classifier(encoder(folder, numbers=initial is not None), head).to(torch.float32).eval()
    network_of = pretrained.without_numbers(whole) if initial is None else whole
    render = partial(decoded, tokenizer=tokenizer)
    return Workload(network_of, examples[0], examples[1], outputs=outputs, loss=cross_entropy, render=render)


if __name__ == "__main__":
    main(sst2, RECIPE)
