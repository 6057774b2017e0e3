"""A causal language model: an example's loss is the mean over its own tokens, g the log-probability of them all."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fimo import Workload


def log_probabilities(logits, batch):
    """Of each token from those before it; 0 for padding, which the mask marks: (B, T − 1)."""
    chosen = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return chosen * batch["attention_mask"][:, 1:]


def text(n=80, tokens=12, words=30):
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(tokens) < torch.randint(5, tokens + 1, (n, 1), generator=g)).long()
    ids = torch.randint(words, (n, 1), generator=g) + torch.arange(tokens) * torch.randint(1, 3, (n, 1), generator=g)
    data = {"input_ids": ids % words * mask, "attention_mask": mask}
    train, evals = ({k: v[part] for k, v in data.items()} for part in (slice(0, -10), slice(-10, None)))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=words, n_positions=tokens, n_embd=16, n_layer=1, n_head=2))
    return Workload(
        model,
        train,
        evals,
        lambda model, batch: model(**batch, use_cache=False).logits,
        lambda out, b: -log_probabilities(out, b).sum(1) / b["attention_mask"][:, 1:].sum(1),
        measure=lambda out, b: log_probabilities(out, b).sum(1),
    )
