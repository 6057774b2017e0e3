"""A causal language model: any folder that transformers' AutoModelForCausalLM takes, on text or on blocks of tokens.

Data, for training and for evaluation, is one of:

* ``.txt``: one text, cut into blocks of ``block`` tokens; with ``lines: true`` each line an example, cut to ``block``;
* ``.jsonl``: objects with a prompt and its completion, of which the prompt's tokens are not counted; or with a text;
* ``.safetensors`` or ``.npz``: ``input_ids`` (n, tokens) and, if need be, ``attention_mask`` (1 where a token is, with
  padding at the end) and ``labels`` (−100 where a token is not counted).

Labels are the tokens themselves and are shifted in the loss, as in transformers: the token at t is predicted from those
before it. An example's loss is the mean over its counted tokens; padding is never counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fimo.workers.errors import UsageError
from fimo.workers.examples import Batch
from fimo.workers.settings import Optimizer
from fimo.workers.workload import Workload
from fimo.workers.workloads import pretrained
from fimo.workers.workloads.files import Source
from fimo.workers.workloads.recipe import Recipe, main
from fimo.workers.workloads.text import decoded, padded, tokenise

SOURCE = Source(
    "causal_lm",
    "any text of your own",
    "a .txt file, a .jsonl file of {prompt, completion} or {text}, or input_ids in a .safetensors or .npz file",
)
RECIPE = Recipe(Optimizer("adamw", lr=1e-4, weight_decay=0.0), epochs=3, batch_size=16, clip_norm=1.0)
NOT_COUNTED = -100
"""The label of a token that is not counted, as in transformers."""

Row = tuple[list[int], list[int]]
"""Tokens of an example and their labels."""


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (B, T, vocabulary); those at t are of the token at t + 1."""
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits: Tensor = out.logits
    return logits


def _of_tokens(outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens that are counted, 0 elsewhere, and which those are: (B, T − 1) twice."""
    labels = batch["labels"][:, 1:]
    counted = labels != NOT_COUNTED
    log_probabilities = outputs[:, :-1].log_softmax(dim=-1)
    chosen = log_probabilities.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(counted, chosen, 0.0), counted


def mean_loss(outputs: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of an example's counted tokens (B,)."""
    chosen, counted = _of_tokens(outputs, batch)
    return -chosen.sum(dim=1) / counted.sum(dim=1)


def log_probability(outputs: Tensor, batch: Batch) -> Tensor:
    """Log-probability of all of an example's counted tokens together (B,), such as of a completion given its prompt."""
    return _of_tokens(outputs, batch)[0].sum(dim=1)


MEASURES = {"loss": mean_loss, "logprob": log_probability}


def read_rows(path: Path, tokenizer: Any, block: int, lines: bool) -> list[Row]:
    """The examples of a ``.txt`` or ``.jsonl`` file.

    Raises:
        UsageError: a line is no such object, or a prompt and its completion do not fit into ``block`` tokens.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SOURCE.refuse(path, "is no text in UTF-8") from error
    if path.suffix == ".jsonl":
        return [_of_object(path, number, line, tokenizer, block) for number, line in _filled(text)]
    if lines:
        return [(ids, list(ids)) for ids in tokenise([line for _, line in _filled(text)], tokenizer, block)]
    with pretrained.quiet():  # It says that the text is longer than the model's context, which is why it is cut.
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    blocks = [ids[start : start + block] for start in range(0, len(ids), block)]
    # A single last token has none before it to be predicted from.
    return [(some, list(some)) for some in blocks if len(some) > 1]


def _filled(text: str) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _of_object(path: Path, number: int, line: str, tokenizer: Any, block: int) -> Row:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise SOURCE.refuse(path, f"has no JSON in line {number}") from error
    keys = value.keys() if isinstance(value, dict) else set()
    if "text" in keys and isinstance(value["text"], str):
        (ids,) = tokenise([value["text"]], tokenizer, block)
        return ids, list(ids)
    if not {"prompt", "completion"} <= keys or not all(isinstance(value[k], str) for k in ("prompt", "completion")):
        raise SOURCE.refuse(path, f"has neither a prompt and completion nor a text in line {number}")
    # Each by itself: where a completion begins must not depend on how it merges with its prompt.
    prompt = tokenizer(value["prompt"])["input_ids"] if value["prompt"] else []
    completion = tokenizer(value["completion"], add_special_tokens=False)["input_ids"]
    if len(prompt) + len(completion) > block:
        length = len(prompt) + len(completion)
        raise _wrong(path, f"has {length} tokens in line {number}, more than block: {block}; raise block or shorten it")
    return prompt + completion, [NOT_COUNTED] * len(prompt) + completion


def read_tensors(path: Path) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` of a file of tensors, int64 (n, tokens); nothing is unpickled.

    Raises:
        UsageError: the file is no such thing.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                read = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        else:
            read = load_file(path)
        ids = read["input_ids"]
    except (SafetensorError, KeyError, ValueError, TypeError, OSError, EOFError) as error:
        raise SOURCE.refuse(path, f"has no input_ids ({type(error).__name__}: {error})") from error
    mask = read.get("attention_mask", torch.ones_like(ids))
    labels = read.get("labels", ids)
    for name, tensor in (("input_ids", ids), ("attention_mask", mask), ("labels", labels)):
        if tensor.dim() != 2 or tensor.shape != ids.shape or tensor.is_floating_point():
            raise SOURCE.refuse(path, f"has {name} as {tensor.dtype} {tuple(tensor.shape)}, not whole (n, tokens)")
    return {"input_ids": ids.long(), "attention_mask": (mask != 0).long(), "labels": labels.long()}


def _wrong(path: Path, what: str) -> UsageError:
    return UsageError(f"causal_lm: {path} {what}")


def as_tensors(rows: Sequence[Row], filler: int) -> dict[str, Tensor]:
    """Examples padded on the right to the longest of them."""
    ids, mask = padded([ids for ids, _ in rows], filler)
    labels, _ = padded([labels for _, labels in rows], NOT_COUNTED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def checked(examples: dict[str, Tensor], path: Path, vocabulary: int) -> dict[str, Tensor]:
    """``examples`` with padding not counted.

    Raises:
        UsageError: a token is outside the vocabulary, padding is not at the end, or an example counts no token, so that
            its loss would be 0/0.
    """
    ids, mask, labels = examples["input_ids"], examples["attention_mask"], examples["labels"]
    if bool((mask.diff(dim=1) > 0).any()):
        raise _wrong(path, "is padded on the left: pad on the right")
    labels = labels.masked_fill(mask == 0, NOT_COUNTED)
    for name, tensor, allowed in (("token", ids, ids >= 0), ("label", labels, (labels >= 0) | (labels == NOT_COUNTED))):
        outside = ((tensor >= vocabulary) | ~allowed).any(dim=1).nonzero().flatten().tolist()
        if outside:
            place = f"in example {outside[0]} outside the model's vocabulary of {vocabulary:,}"
            raise _wrong(path, f"has a {name} {place}: tokenise with the model's own tokenizer")
    bare = (~(labels[:, 1:] != NOT_COUNTED).any(dim=1)).nonzero().flatten().tolist()
    if bare:
        first = f"has {len(bare)} examples in which no token is counted, first example {bare[0]}"
        raise _wrong(path, f"{first}: leave them out (an example's first token is never counted)")
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def causal_lm(
    data: Path,
    model: Path = Path("gpt2"),
    initial: int | None = None,
    evals: Path | None = None,
    block: int | None = None,
    lines: bool = False,
    measure: str = "loss",
    download: bool = False,
) -> Workload:
    """A causal language model on a user's text.

    Args:
        data: training examples; see the module.
        model: a folder with config.json, tokenizer and model.safetensors, or a name on the hub. Its weights are θᶠ
            unless the spec names a final model.
        initial: None = the folder's weights; else its architecture's random initialisation under this seed.
        evals: evaluation examples; default the training examples.
        block: tokens of an example at most; default 128, or the model's limit.
        lines: each line of a ``.txt`` file is an example.
        measure: of an evaluation example: ``loss``, the mean over its counted tokens, or ``logprob``, their sum of
            log-probabilities.
        download: let the hub's client fetch a model that is neither a folder nor in its cache.

    Raises:
        UsageError: in one line, if data or model are missing or something else.
    """
    if measure not in MEASURES:
        raise UsageError(f"measure is '{measure}', not one of {', '.join(MEASURES)}")
    paths = [Path(data), Path(data if evals is None else evals)]
    for path in paths:
        if not path.is_file():
            raise SOURCE.missing(path)
    folder = pretrained.find(Path(model), download)
    settings = pretrained.config(folder)
    most = getattr(settings, "max_position_embeddings", None) or 2**31
    block = min(128, most) if block is None else block
    if not 2 <= block <= most:
        raise UsageError(f"block is {block}; the model takes 2 to {most} tokens")
    parts = [_read(path, folder, block, lines, settings.vocab_size) for path in paths]
    network = pretrained.weights(folder, "AutoModelForCausalLM", initial)
    render = partial(decoded, tokenizer=pretrained.tokenizer(folder)) if all(map(_is_text, paths)) else None
    train, held_out = parts
    return Workload(network, train, held_out, outputs=outputs, loss=mean_loss, measure=MEASURES[measure], render=render)


def _is_text(path: Path) -> bool:
    return path.suffix not in (".safetensors", ".npz")


def _read(path: Path, folder: Path, block: int, lines: bool, vocabulary: int) -> dict[str, Tensor]:
    if not _is_text(path):
        return checked(read_tensors(path), path, vocabulary)
    tokenizer = pretrained.tokenizer(folder)
    filler = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    rows = read_rows(path, tokenizer, block, lines)
    if not rows:
        raise SOURCE.refuse(path, "holds no example")
    return checked(as_tensors(rows, filler), path, vocabulary)


if __name__ == "__main__":
    main(causal_lm, RECIPE)
