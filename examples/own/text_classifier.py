"""A text classifier: sentences of different lengths, padded on the right and masked, with dropout."""

import torch
from torch import nn

from fimo import Workload


class Classifier(nn.Module):
    def __init__(self, words=40, width=16):
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, ids, mask):
        hidden = self.layer(self.embed(ids), src_key_padding_mask=mask == 0)
        return self.head((hidden * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True))


def sentences(n=120, tokens=12):
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(tokens) < torch.randint(4, tokens + 1, (n, 1), generator=g)).long()
    ids = torch.randint(1, 40, (n, tokens), generator=g) * mask
    data = {"ids": ids, "attention_mask": mask, "label": ((ids > 30).sum(1) > 2).long()}
    train, evals = ({k: v[part] for k, v in data.items()} for part in (slice(0, -20), slice(-20, None)))
    torch.manual_seed(0)
    return Workload(
        Classifier(),
        train,
        evals,
        lambda model, b: model(b["ids"], b["attention_mask"]),
        lambda out, b: nn.functional.cross_entropy(out, b["label"], reduction="none"),
    )
