"""Sentences with an encoder: read as users have them, the paper's network, attributed as the definition has it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fimo
from fimo.orchestrator.spec.spec import parse, read
from fimo.workers.errors import UsageError, WorkloadError
from fimo.workers.final_model import check_fits
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.workloads import recipe, sst2, text
from tests.support import real_data
from tests.support.small_sweep import run_here
from tests.workers.workloads.tiny import SENTENCES, stacks_give_the_definition_s_effects, tiny_bert, write_glue

transformers: Any = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[3]
TRAINING = FurtherTraining(
    Optimizer("adamw", lr=1e-3, weight_decay=0.0), 4, steps=3, evaluate=Evaluate(at_steps=(2,)), clip_norm=1.0
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("text") / "bert")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("text") / "SST-2")


def test_the_network_is_the_paper_s(model: Path, data: Path) -> None:
    """Written out as in its code: AutoModel with a pooler, the first token of [0], padded to 128."""
    made = sst2.sst2(data, initial=0, model=model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    encoded = tokenizer([f"{s} " for s, _ in SENTENCES[:8]], padding="max_length", max_length=32, return_tensors="pt")
    plain = transformers.AutoModel.from_pretrained(model).eval()
    assert plain.pooler is not None
    with torch.no_grad():
        expected = made.model.classifier(plain(**encoded)[0][:, 0])
        got = sst2.outputs(made.model.eval(), made.train)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    labels = torch.tensor([label for _, label in SENTENCES[:8]])
    torch.testing.assert_close(
        sst2.cross_entropy(got, made.train), nn.functional.cross_entropy(expected, labels, reduction="none")
    )
    assert not [name for name, _ in made.model.named_parameters() if "pooler" in name]
    # A checkpoint of the paper's code, its names changed as docs/workloads.md has it.
    state = {f"model.{name}": tensor for name, tensor in plain.state_dict().items()}
    state |= {f"classifier.{name}": tensor for name, tensor in made.model.classifier.state_dict().items()}
    named = {name.replace("model.", "encoder.", 1): tensor for name, tensor in state.items() if "pooler" not in name}
    check_fits(made.model, named, "model_final")
    torch.manual_seed(0)
    assert torch.equal(made.model.classifier.weight, nn.Linear(16, 2).weight)


def test_sentences_are_padded_on_the_right_and_a_quote_is_a_letter(model: Path, data: Path) -> None:
    made = sst2.sst2(data, initial=0, model=model)
    assert {name: tuple(t.shape) for name, t in made.train.items()} == {
        "input_ids": (8, 11),
        "attention_mask": (8, 11),
        "label": (8,),
    }
    lengths = made.train["attention_mask"].sum(dim=1)
    assert torch.equal(made.train["attention_mask"], (torch.arange(11) < lengths[:, None]).long())
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(made.train["input_ids"][4, : lengths[4]]) == '[CLS] a " good " cast [SEP]'
    cut = sst2.sst2(data, initial=0, model=model, max_length=5)
    assert cut.train["input_ids"].shape == (8, 5)


def saved(folder: Path) -> Path:
    """As ``datasets.save_to_disk`` writes it (4.x): Arrow streams, in pieces, with state.json."""
    pa: Any = pytest.importorskip("pyarrow")
    for split, rows in (("train", SENTENCES[:-3]), ("validation", SENTENCES[-3:])):
        (folder / split).mkdir(parents=True)
        pieces = [rows[:2], rows[2:]]
        names = [f"data-{i:05}-of-{len(pieces):05}.arrow" for i in range(len(pieces))]
        for name, piece in zip(names, pieces, strict=True):
            columns = {"sentence": [f"{s} " for s, _ in piece], "label": [label for _, label in piece]}
            table = pa.table({**columns, "idx": pa.array(range(len(piece)), pa.int32())})
            with pa.OSFile(str(folder / split / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
        state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": split}
        (folder / split / "state.json").write_text(json.dumps(state))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    return folder


def commas(folder: Path) -> Path:
    folder.mkdir()
    for name, rows in (("train", SENTENCES[:-3]), ("validation", SENTENCES[-3:])):
        quoted = [f'{number},"{s.replace(chr(34), 2 * chr(34))} ",{label}' for number, (s, label) in enumerate(rows)]
        (folder / f"{name}.csv").write_text("\n".join(["id,text,labels", *quoted]))
    return folder


@pytest.mark.parametrize("write", [saved, commas])
def test_other_forms_hold_the_same_sentences(
    write: Callable[[Path], Path], model: Path, data: Path, tmp_path: Path
) -> None:
    made = sst2.sst2(write(tmp_path / "other"), initial=0, model=model)
    for part, own in ((made.train, "train"), (made.evals, "evals")):
        for name, tensor in getattr(sst2.sst2(data, initial=0, model=model), own).items():
            assert torch.equal(part[name], tensor), name


def test_two_tables_and_named_classes(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("label,text\npos,a good film\nneg,bad\nso,a film\n")
    (tmp_path / "b.csv").write_text("label,text\nso,the plot\n")
    made = sst2.sst2(tmp_path / "a.csv", initial=0, model=model, evals=tmp_path / "b.csv")
    assert made.train["label"].tolist() == [1, 0, 2]
    assert made.evals["label"].tolist() == [2]
    assert sst2.outputs(made.model, made.evals).shape == (1, 3)


@pytest.mark.parametrize(
    ("train", "dev", "said"),
    [
        ("sentence\tlabel\nfine\t1\nbad\t0\n", None, "has no dev.tsv or validation.tsv"),
        ("sentence\tlabel\nfine\t1\nbad\n", "", "is cut short in row 1"),
        ("words\tlabel\nfine\t1\n", "", "has no column 'sentence'"),
        ("sentence\tlabel\nfine\t1\nbad\t-1\n", "sentence\tlabel\nfine\t1\n", "has the labels -1, 1 …, not 0, 1"),
        ("sentence\tlabel\nfine\t1\nbad\t0\n", "sentence\tlabel\nfine\t2\n", "evaluation label that no training .*'2'"),
        ("sentence\tlabel\nfine\t0\nbad\t0\n", "sentence\tlabel\nfine\t0\n", "has 1 classes"),
    ],
)
def test_what_is_no_such_data_is_one_line(train: str, dev: str | None, said: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(train)
    if dev is not None:
        (tmp_path / "dev.tsv").write_text(dev)
    with pytest.raises(UsageError, match=rf"SST-2: .*{said}.*; get GLUE's .*; it holds") as caught:
        sst2.sst2(tmp_path, initial=0, model=model)
    assert "\n" not in str(caught.value)


def test_nothing_is_downloaded_unless_it_is_asked_for(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket would be a download."""

    def connect(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    with pytest.raises(UsageError, match=r"nor in the cache.*download: true") as caught:
        sst2.sst2(data, initial=0, model=Path("nobody/no-such-model"))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="cannot be downloaded"):
        sst2.sst2(data, initial=0, model=Path("nobody/no-such-model"), download=True)


def test_a_folder_that_is_no_model_is_one_line(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config\.json"):
        sst2.sst2(data, initial=0, model=tmp_path)
    bare = tiny_bert(tmp_path / "bare")
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    with pytest.raises(UsageError, match="cannot be loaded") as caught:
        sst2.sst2(data, initial=0, model=bare)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="max_length is 2"):
        sst2.sst2(data, initial=0, model=bare, max_length=2)


def test_encoders_without_a_choice_of_pooler(data: Path, tmp_path: Path) -> None:
    bert = tiny_bert(tmp_path / "bert")
    config = transformers.DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
    transformers.DistilBertModel(config).save_pretrained(tmp_path / "distil")
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "distil")
    made = sst2.sst2(data, initial=0, model=tmp_path / "distil")
    assert sst2.outputs(made.model, made.evals).shape == (3, 2)


def test_the_bare_architecture_takes_its_final_model_and_nothing_less(model: Path, data: Path, tmp_path: Path) -> None:
    bare, whole = sst2.sst2(data, model=model), sst2.sst2(data, initial=0, model=model)
    assert all(p.is_meta for p in bare.model.parameters())
    with pytest.raises(WorkloadError, match="name a final model"):
        fimo.attribution(bare, TRAINING, [[0]], [0])
    recipe.save(whole.model, tmp_path / "final.safetensors")
    state = load_file(tmp_path / "final.safetensors")
    check_fits(bare.model, state, "final.safetensors")
    given = fimo.attribution(bare, TRAINING, [[0]], [0], state=state)
    own = fimo.attribution(whole, TRAINING, [[0]], [0])
    assert torch.equal(given.effects, own.effects)
    assert float(own.effects.abs().max()) > 0


@pytest.mark.parametrize("mode", ["reweight", "drop"])
def test_stacks_give_the_definition_s_effects_with_dropout(mode: Any, model: Path, data: Path) -> None:
    made = sst2.sst2(data, initial=0, model=model)
    stacks_give_the_definition_s_effects(made, TRAINING.optimizer, mode)


def test_a_sweep_by_bare_name_removes_by_label_and_estimates(model: Path, data: Path, tmp_path: Path) -> None:
    whole = sst2.sst2(data, initial=0, model=model)
    recipe.save(whole.model, tmp_path / "final.safetensors")
    spec = parse(
        {
            "name": "tiny",
            "workload": "sst2",
            "workload_args": {"data": str(data), "model": str(model)},
            "final_model": "final.safetensors",
            "removals": {"indices": [0, 3, 5]},
            "seeds": 2,
            "further_training": {
                "optimizer": {"name": "adamw", "lr": 0.001, "weight_decay": 0},
                "batch_size": 4,
                "steps": 3,
                "clip_norm": 1.0,
            },
            "estimators": ["grad_dot", "ekfac", "datainf"],
        }
    )
    report, _, _ = run_here(spec, tmp_path)
    assert report.exit_code == 0
    scored = {row["estimator"] for row in report.gathered.tables["scores"].to_pylist()}
    assert scored == {"grad_dot", "ekfac", "datainf"}


def test_the_paper_s_setting() -> None:
    spec = read((ROOT / "examples" / "sst2-paper.yaml").read_text())
    training = spec.further_training
    drawn = np.sort(np.random.default_rng(0).choice(67_349, 50)).tolist()
    assert list(spec.removals.indices or ()) == drawn
    assert (spec.evals, training.batch_size, training.epochs, training.clip_norm) == (100, 64, 1, 1.0)
    optimizer = training.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("adamw", 1e-6, 0)
    assert training.removal_mode == "reweight"
    steps = -(-67_349 // 64)
    # Its loop counts from 0 and evaluates after b = 5, 10, …, then after the last.
    expected = [b + 1 for b in range(steps) if (b > 0 and b % 5 == 0) or b == steps - 1]
    at = sorted({*training.evaluate.at_steps, steps})
    assert at == expected


@pytest.mark.long
def test_a_real_encoder_learns_some_real_sentences(tmp_path: Path) -> None:
    """Those that it is trained on; what it makes of others takes minutes, see below."""
    folder = real_data.write_sentences(tmp_path / "movies", 160, held_out=0.2)
    made = sst2.sst2(folder, initial=0, model=real_data.encoder(), max_length=24)
    before = recipe.quality(made)
    short = recipe.Recipe(Optimizer("adamw", lr=2e-4, weight_decay=0.0), epochs=5, batch_size=32, clip_norm=1.0)
    recipe.train(made, short, 0)
    after = recipe.quality(made)
    assert before["train accuracy"] < 0.65
    assert after["train accuracy"] > 0.8
    assert after["train loss"] < before["train loss"] - 0.2


@pytest.mark.slow
def test_a_real_encoder_is_fine_tuned_to_four_fifths_and_more(tmp_path: Path) -> None:
    """By the command of docs/workloads.md."""
    real_data.write_sentences(tmp_path / "movies")
    command = [sys.executable, "-m", "fimo.workers.workloads.sst2", "movies", "--model", str(real_data.encoder())]
    options = ["--epochs", "1", "--lr", "5e-5", "--batch-size", "32", "--to", "movies.safetensors", "--device", "cpu"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.rpartition("evals accuracy ")[2]) > 0.8


def test_the_recipe_trims_and_clips_as_a_plain_loop_does(tmp_path: Path, data: Path) -> None:
    """Against batches with all their padding; dropout would draw otherwise for other lengths."""
    calm = tiny_bert(tmp_path / "calm", dropout=0.0)
    made, plain = (sst2.sst2(data, initial=0, model=calm) for _ in range(2))
    recipe.train(made, recipe.Recipe(Optimizer("sgd", lr=0.5), epochs=2, batch_size=2, clip_norm=0.1), 5)
    order = torch.utils.data.RandomSampler(range(8), generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.SGD(plain.model.parameters(), lr=0.5)
    plain.model.train()
    for _ in range(2):
        for rows in torch.tensor(list(order)).split(2):
            batch = {name: tensor[rows] for name, tensor in plain.train.items()}
            optimizer.zero_grad()
            sst2.cross_entropy(sst2.outputs(plain.model, batch), batch).mean().backward()
            norm = nn.utils.clip_grad_norm_(plain.model.parameters(), 0.1)
            assert float(norm) > 0.1, "nothing was clipped"
            optimizer.step()
    for got, expected in zip(made.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_cut_tokens_are_those_of_the_longest_example() -> None:
    ids, mask = text.padded([[5, 6, 7], [8]], 9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
