"""Text with a causal language model: the module of language_model.yaml. Replace its data and model by your own."""

import torch
from torch import nn

from fimo import Workload


class LanguageModel(nn.Module):
    """Word and place vectors, one causal layer of a transformer, and the words' logits."""

    def __init__(self, words=30, longest=12, width=16):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(longest, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, input_ids):
        """Logits (B, T, words) of tokens (B, T); padding is on the right, where no token before it looks."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        later = places[None, :] > places[:, None]
        return self.head(self.layer(self.words(input_ids) + self.places(places), src_mask=later))


def texts(n=100, longest=12, words=30):
    """Tokens padded to one length on the right, and 0 in the mask where there is padding. Yours, with transformers:

    tokens = AutoTokenizer.from_pretrained(…)(texts, padding=True, truncation=True, return_tensors="pt")
    """
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(longest) < torch.randint(5, longest + 1, (n, 1), generator=g)).long()
    begin, step = torch.randint(words, (n, 1), generator=g), torch.randint(1, 3, (n, 1), generator=g)
    return {"input_ids": (begin + torch.arange(longest) * step) % words * mask, "attention_mask": mask}


def token_losses(logits, batch):
    """Of each token from those before it, 0 for padding: (B, T − 1)."""
    tokens, mask = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:]
    return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens, reduction="none") * mask


def workload():
    """What fimo calls, in every process and with the same result: no random number without a seed."""
    data = texts()
    torch.manual_seed(0)
    # Your final model: AutoModelForCausalLM.from_pretrained(…), with .logits in outputs and use_cache=False.
    # Large ones: train adapters alone (further_training: {lora: {rank: 8, targets: [q_proj, v_proj]}}).
    model = LanguageModel()
    return Workload(
        model,
        train={name: values[:-20] for name, values in data.items()},
        evals={name: values[-20:] for name, values in data.items()},
        outputs=lambda model, batch: model(batch["input_ids"]),
        # The mean over an example's own tokens: a mean over the whole batch would be no example's loss.
        loss=lambda out, batch: token_losses(out, batch).sum(1) / batch["attention_mask"][:, 1:].sum(1),
        padding="attention_mask",
    )
