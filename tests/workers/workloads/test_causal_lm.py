"""A causal language model on text: blocks and lines, completions, losses as transformers' own, attributed alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fimo
from fimo.orchestrator.spec.spec import parse
from fimo.workers.errors import UsageError
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.workloads import causal_lm, recipe
from tests.support import real_data
from tests.support.small_sweep import run_here
from tests.workers.workloads.tiny import TEXTS, stacks_give_the_definition_s_effects, tiny_gpt2

transformers: Any = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("lm") / "gpt2")


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm") / "lines.txt"
    # Of one word there is nothing to predict.
    path.write_text("\n\n".join(text for text in TEXTS if " " in text) + "\n")
    return path


def test_losses_are_transformers_own_for_each_example_alone(model: Path, lines: Path) -> None:
    made = causal_lm.causal_lm(lines, model=model, lines=True)
    plain = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS if " " in text]
    with torch.no_grad():
        expected = torch.stack([plain(input_ids=some, labels=some).loss for some in ids])
        got = made.loss(made.outputs(made.model, made.train), made.train)
    assert len({some.shape[1] for some in ids}) > 2, "of different lengths"
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_text_is_cut_into_blocks_with_nothing_left_out(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(TEXTS))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = tokenizer(" ".join(TEXTS))["input_ids"]
    made = causal_lm.causal_lm(tmp_path / "text.txt", model=model, block=7)
    kept = made.train["input_ids"][made.train["attention_mask"] == 1].tolist()
    assert kept == ids
    assert made.train["input_ids"].shape == (-(-len(ids) // 7), 7)
    assert bool((made.train["labels"][made.train["attention_mask"] == 0] == -100).all())
    assert causal_lm.causal_lm(tmp_path / "text.txt", model=model).train["input_ids"].shape[1] == 32
    # One token more than blocks of 7 hold has nothing to be predicted from.
    (tmp_path / "odd.txt").write_text(" ".join(["good"] * 15))
    assert causal_lm.causal_lm(tmp_path / "odd.txt", model=model, block=7).train["input_ids"].shape == (2, 7)


def test_of_a_completion_its_own_tokens_alone_are_counted(model: Path, lines: Path, tmp_path: Path) -> None:
    pairs = [("a good", "film and a fine"), ("the plot is", "bad"), ("", "a bad joke")]
    path = tmp_path / "evals.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in pairs))
    plain = transformers.AutoModelForCausalLM.from_pretrained(model).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    expected = []
    with torch.no_grad():
        for prompt, completion in pairs:
            ids = tokenizer(f"{prompt} {completion}".strip(), return_tensors="pt")["input_ids"]
            first = max(1, len(prompt.split()))
            odds = plain(input_ids=ids).logits[0].log_softmax(-1)
            expected.append([float(odds[t - 1, ids[0, t]]) for t in range(first, ids.shape[1])])
    for measure, truth in (("loss", [-np.mean(e) for e in expected]), ("logprob", [np.sum(e) for e in expected])):
        made = causal_lm.causal_lm(lines, model=model, lines=True, evals=path, measure=measure)
        double = made.model.double()
        with torch.no_grad():
            got = made.measure(made.outputs(double, made.evals), made.evals)
        np.testing.assert_allclose(got.numpy(), truth, rtol=1e-9)


@pytest.mark.parametrize("form", ["safetensors", "npz"])
def test_blocks_of_tokens_may_come_as_tensors(form: str, model: Path, tmp_path: Path) -> None:
    tensors = {
        "input_ids": torch.tensor([[3, 4, 5], [6, 7, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    path = tmp_path / f"blocks.{form}"
    if form == "npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        save_file(tensors, path)
    made = causal_lm.causal_lm(path, model=model)
    assert torch.equal(made.train["input_ids"], tensors["input_ids"])
    assert made.train["labels"].tolist() == [[3, 4, 5], [6, 7, -100]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": torch.tensor([[3, 4, 5], [6, -100, -100]])}, "1 examples in which no token is counted, .* 1:"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}, "padded on the left"),
        ({"input_ids": torch.tensor([[3, 4, 5], [6, 999, 7]])}, "has a token in example 1"),
        ({"labels": torch.tensor([[3, 4, 5], [6, -1, 7]])}, "has a label in example 1"),
        ({"labels": torch.ones(2, 3)}, "has labels as torch.float32"),
        ({"input_ids": torch.tensor([3, 4])}, "has input_ids as"),
    ],
)
def test_tensors_that_would_make_wrong_numbers_are_one_line(
    change: dict[str, torch.Tensor], said: str, model: Path, tmp_path: Path
) -> None:
    save_file({"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]]), **change}, tmp_path / "b.safetensors")
    with pytest.raises(UsageError, match=said) as caught:
        causal_lm.causal_lm(tmp_path / "b.safetensors", model=model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.txt", "", "holds no example"),
        ("t.txt", "good", "holds no example"),
        ("t.jsonl", '{"prompt": "good"}', "has neither a prompt and completion nor a text in line 1"),
        ("t.jsonl", "\ngood", "has no JSON in line 2"),
        ("t.jsonl", '{"prompt": "good", "completion": ""}', "no token is counted"),
        (
            "t.jsonl",
            json.dumps({"prompt": "good " * 30, "completion": "bad bad bad"}),
            "has 33 tokens in line 1, more than block",
        ),
        ("t.npz", "good", "has no input_ids"),
    ],
)
def test_texts_that_hold_nothing_of_the_kind_are_one_line(
    name: str, content: str, said: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=said) as caught:
        causal_lm.causal_lm(tmp_path / name, model=model)
    assert "\n" not in str(caught.value)


def test_arguments_that_make_no_sense_are_one_line(model: Path, lines: Path) -> None:
    with pytest.raises(UsageError, match="block is 33; the model takes 2 to 32"):
        causal_lm.causal_lm(lines, model=model, block=33)
    with pytest.raises(UsageError, match="measure is 'odds', not one of loss, logprob"):
        causal_lm.causal_lm(lines, model=model, measure="odds")


def test_another_start_is_the_architecture_under_a_seed(model: Path, lines: Path) -> None:
    own, first, again, other = (causal_lm.causal_lm(lines, model=model, lines=True, initial=s) for s in (None, 2, 2, 3))
    name = "transformer.h.0.attn.c_attn.weight"
    weights = [made.model.state_dict()[name] for made in (own, first, again, other)]
    assert torch.equal(weights[1], weights[2])
    assert len({float(w[0, 0]) for w in weights}) == 3
    assert own.model.lm_head.weight is own.model.transformer.wte.weight


@pytest.mark.parametrize("mode", ["reweight", "drop"])
def test_stacks_give_the_definition_s_effects_of_tied_weights_with_dropout(mode: Any, model: Path, lines: Path) -> None:
    made = causal_lm.causal_lm(lines, model=model, lines=True)
    stacks_give_the_definition_s_effects(made, Optimizer("adamw", lr=1e-3, weight_decay=0.0), mode)


def test_a_sweep_of_log_probabilities_with_estimators(model: Path, lines: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": "a good", "completion": "film"}, {"prompt": "the plot is", "completion": "a joke"}]
    (tmp_path / "evals.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    spec = parse(
        {
            "name": "lm",
            "workload": "causal_lm",
            "workload_args": {
                "data": str(lines),
                "model": str(model),
                "lines": True,
                "evals": "evals.jsonl",
                "measure": "logprob",
            },
            "removals": {"indices": [0, 3, 5]},
            "seeds": 2,
            "further_training": {"optimizer": {"name": "sgd", "lr": 0.05}, "batch_size": 4, "steps": 3},
            "estimators": ["grad_dot", "datainf", "ekfac", "cg"],
        }
    )
    report, _, _ = run_here(spec, tmp_path)
    assert report.exit_code == 0
    rows = report.gathered.tables["scores"].to_pylist()
    assert {row["estimator"] for row in rows} == {"grad_dot", "datainf", "ekfac", "cg"}
    # An estimate of log-probabilities is positive where removing the example makes the completion likelier.
    found = [r for r in rows if (r["estimator"], r["metric"], r["adjust"]) == ("grad_dot", "cosine", "baseline")]
    assert min(row["score"] for row in found) > 0.9


@pytest.mark.slow
def test_a_model_learns_real_text_and_is_attributed(tmp_path: Path) -> None:
    texts = [text for text, _ in real_data.movie_sentences()[:600] if len(text.split()) > 1]
    folder = tiny_gpt2(tmp_path / "gpt2", texts, width=32, context=48, dropout=0.0)
    for name, part in (("train", texts[60:]), ("evals", texts[:60])):
        (tmp_path / f"{name}.txt").write_text("\n".join(part))
    made = causal_lm.causal_lm(
        tmp_path / "train.txt", model=folder, initial=0, evals=tmp_path / "evals.txt", lines=True
    )
    before = recipe.quality(made)
    recipe.train(made, recipe.Recipe(Optimizer("adamw", lr=3e-3), epochs=5, batch_size=32, clip_norm=1.0), 0)
    after = recipe.quality(made)
    assert after["train loss"] < before["train loss"] - 1.5
    assert after["evals loss"] < before["evals loss"] - 0.5
    evals = {name: tensor[:20] for name, tensor in made.evals.items()}
    workload = fimo.Workload(made.model, made.train, evals, made.outputs, made.loss)
    training = FurtherTraining(Optimizer("sgd", lr=0.05), 32, steps=6, evaluate=Evaluate(at_steps=(6,)))
    found = fimo.attribution(workload, training, [[0], [1], [2]], [0, 1], stacked=True)
    assert bool(found.effects.isfinite().all())
    first, second = (e.flatten() for e in found.effects)
    assert float(torch.nn.functional.cosine_similarity(first, second, dim=0)) > 0.5
