"""Sentences with a classifier: the module of text.yaml. Replace what it draws by your own data and model."""

import torch
from torch import nn

from fimo import Workload


class Classifier(nn.Module):
    """One layer of a transformer over word vectors, their mean, and a linear head; padding is masked."""

    def __init__(self, words=40, width=16):
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids, attention_mask):
        """Logits (B, 2) of tokens and their mask, both (B, T)."""
        hidden = self.layer(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        return self.head((hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))


def sentences(n=150, longest=12, words=40):
    """Tokens padded to one length, 0 in the mask where there is padding, and a label. Yours, with transformers:

    tokens = AutoTokenizer.from_pretrained(…)(texts, padding=True, truncation=True, return_tensors="pt")
    """
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(longest) < torch.randint(4, longest + 1, (n, 1), generator=g)).long()
    ids = torch.randint(1, words, (n, longest), generator=g) * mask
    return {"input_ids": ids, "attention_mask": mask, "label": ((ids > 30).sum(1) > 2).long()}


def workload():
    """What fimo calls, in every process and with the same result: no random number without a seed."""
    data = sentences()
    torch.manual_seed(0)
    # Your final model: AutoModelForSequenceClassification.from_pretrained(…), whose outputs end in .logits below.
    model = Classifier()
    return Workload(
        model,
        train={name: values[:-30] for name, values in data.items()},
        evals={name: values[-30:] for name, values in data.items()},
        outputs=lambda model, batch: model(batch["input_ids"], attention_mask=batch["attention_mask"]),
        loss=lambda out, batch: nn.functional.cross_entropy(out, batch["label"], reduction="none"),
        # The tensor that is 0 where there is padding: fimo cuts batches to their longest sentence by it.
        padding="attention_mask",
        # How a report shows an example: yours, tokenizer.decode(example["input_ids"], skip_special_tokens=True).
        render=lambda example: " ".join(f"word{i}" for i in example["input_ids"].tolist() if i),
    )
