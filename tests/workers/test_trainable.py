"""Further training of a part of the model: parameters by pattern, and low-rank adapters, against the definition."""

from __future__ import annotations

import builtins
import warnings

import pytest
import torch
from torch import Tensor, nn

from fimo.workers.definition import train_cell
from fimo.workers.errors import UsageError
from fimo.workers.examples import Examples
from fimo.workers.final_model import final_copy
from fimo.workers.functional import FunctionalModel
from fimo.workers.further_training import Training, further_train
from fimo.workers.settings import Lora, Optimizer, Trains
from fimo.workers.start import start_from
from fimo.workers.trial import moved_state
from tests.support.covering import covering
from tests.workers.problems import Encoder, classification, make, settings

ADAMW = Optimizer("adamw", lr=0.01, weight_decay=0.1)
LANES = [(), (3,), (4, 9, 20), (17,)]


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 8), nn.Tanh())
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.encoder(x))


PARTS = {
    "last layer": {"trainable": ("classifier.*",)},
    "two patterns": {"trainable": ("*.bias", "encoder.0.*")},
    "adapters": {"lora": Lora(2, ("0", "3"))},
    "adapters and the last layer": {"lora": Lora(2, ("encoder.0",), alpha=4.0), "trainable": ("classifier.*",)},
}


def peft_or_skip(part: str) -> None:
    if "adapters" in part:
        pytest.importorskip("peft")


@pytest.mark.parametrize(("part", "mode", "dropout"), covering(PARTS, ["drop", "mask", "reweight"], [0.0, 0.3]))
def test_the_definitions_numbers(part: str, dropout: float, mode: str) -> None:
    peft_or_skip(part)
    chosen = settings(ADAMW, removal_mode=mode, clip_norm=0.5, **PARTS[part])
    workload = classification(model=Net(dropout))
    got = further_train(make(workload, chosen), LANES, 5)
    for lane, removal in enumerate(LANES):
        cell = train_cell(workload, chosen, removal, 5)
        assert cell.deltas.abs().max() > 1e-3
        torch.testing.assert_close(got.deltas[lane], cell.deltas, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(got.distances[lane], cell.distances, rtol=1e-11, atol=1e-11)


def test_the_last_layer_by_hand() -> None:
    """One step of SGD on the classifier of fixed features, written out."""
    workload, lr = classification(model=Net()), 0.3
    chosen = settings(Optimizer("sgd", lr=lr), steps=1, batch_size=23, removal_mode="mask", trainable=("classifier.*",))
    cell = train_cell(workload, chosen, (4,))
    model = Net().double()
    x, label = workload.train["x"].double(), workload.train["label"]
    stays = torch.arange(23) != 4
    with torch.no_grad():
        features = model.encoder(x)[stays]
        error = (model.classifier(features).softmax(1) - nn.functional.one_hot(label[stays], 3)) / 22
        model.classifier.weight -= lr * error.T @ features
        model.classifier.bias -= lr * error.sum(0)
        after = workload.measure(model(workload.evals["x"].double()), workload.evals)
        before = workload.measure(Net().double()(workload.evals["x"].double()), workload.evals)
    torch.testing.assert_close(cell.deltas[0], after - before, rtol=1e-12, atol=1e-12)


def test_adapters_by_hand_start_at_no_effect_and_are_the_same_in_every_precision() -> None:
    pytest.importorskip("peft")
    trains, x = Trains(lora=Lora(2, ("classifier",), alpha=3.0)), torch.randn(5, 4)
    single, double = (final_copy(Net(), None, "cpu", dtype, trains) for dtype in (torch.float32, torch.float64))
    torch.testing.assert_close(single(x), Net()(x), rtol=0, atol=0)
    layer = double.classifier
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.equal(a.float(), single.classifier.lora_A["default"].weight)
    assert bool((b == 0).all())
    assert not bool((a == 0).any())
    with torch.no_grad():
        b.normal_()
        hidden = double.encoder(x.double())
        own = hidden @ layer.base_layer.weight.T + layer.base_layer.bias
        torch.testing.assert_close(double(x.double()), own + 3.0 / 2 * hidden @ a.T @ b.T)
    assert [name for name, p in double.named_parameters() if p.requires_grad] == [
        "classifier.lora_A.default.weight",
        "classifier.lora_B.default.weight",
    ]


def test_drawing_adapters_leaves_the_generator_and_the_users_model_as_they_were() -> None:
    pytest.importorskip("peft")
    model = Net()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    final_copy(model, None, "cpu", torch.float32, Trains(("classifier.*",), Lora(1, ("0",))))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.requires_grad for p in model.parameters())
    assert isinstance(model.encoder[0], nn.Linear)


def test_a_final_model_is_named_as_the_model_without_adapters_and_a_moved_one_as_with_them() -> None:
    """The proof moves θᶠ by rounding; what it moves must arrive in the definition's copy."""
    pytest.importorskip("peft")
    chosen = settings(lora=Lora(2, ("0",)), trainable=("classifier.*",))
    state = {name: t + 1 for name, t in Net().state_dict().items()}
    model = FunctionalModel(classification(model=Net()), state, dtype=torch.float64, trains=chosen.trains)
    torch.testing.assert_close(model.fixed["encoder.0.base_layer.weight"], state["encoder.0.weight"].double())
    torch.testing.assert_close(model.params["classifier.bias"], state["classifier.bias"].double())
    start = make(classification(model=Net()), chosen)
    moved = moved_state(start)
    copied = dict(final_copy(Net(), moved, "cpu", torch.float64, chosen.trains).named_parameters())
    for name, p in start.model.params.items():
        assert torch.equal(copied[name], moved[name]), name
        if bool((p != 0).any()):
            assert not torch.equal(copied[name], p), name


def test_only_what_is_trained_is_stacked() -> None:
    start = make(classification(model=Net()), settings(ADAMW, trainable=("classifier.*",)))
    training = Training(start, LANES, 0)
    training.advance(2)
    assert {name: tuple(p.shape) for name, p in training._stack.params.items()} == {
        "classifier.weight": (4, 3, 8),
        "classifier.bias": (4, 3),
    }
    kept = [t for t in training._optimizing.tensors() if t.dim()]
    assert sum(t.numel() for t in kept) == 2 * 4 * (24 + 3)


def test_frozen_layers_run_once_for_all_replicas() -> None:
    seen: list[tuple[int, ...]] = []

    class Counted(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.encoder(x)
            seen.append((int(torch._C._functorch.is_batchedtensor(hidden)), len(hidden)))
            return self.classifier(hidden)

    start = make(classification(model=Counted()), settings(ADAMW, removal_mode="reweight", trainable=("classifier.*",)))
    seen.clear()
    further_train(start.using(start.engine.__class__(replay=False)), LANES, 0, last=1)
    assert (0, 5) in seen, "the batch that replicas share goes through the frozen layers unstacked"
    assert not any(batched and rows > 3 for batched, rows in seen), "only removed examples are stacked there"


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ({"trainable": ("clasifier.*",)}, "no parameter is called 'clasifier.*'"),
        ({"lora": Lora(2, ("clasifier",))}, "no linear layer is called 'clasifier'"),
        ({"lora": Lora(2, ("encoder",))}, "no linear layer is called 'encoder'"),
    ],
)
def test_what_names_nothing_is_refused_in_one_line(part: dict[str, object], line: str) -> None:
    pytest.importorskip("peft")
    with pytest.raises(UsageError) as caught:
        make(classification(model=Net()), settings(**part))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("targets", [("out_proj",), ("linear1", "out_proj")])
def test_an_adapter_that_the_forward_passes_by_is_refused_in_one_line(targets: tuple[str, ...]) -> None:
    """torch's attention takes its output projection's weight, and never calls the layer."""
    pytest.importorskip("peft")
    workload = classification(23, 6, Encoder(), 2, 4)
    with pytest.raises(UsageError, match=r"past 'layer\.self_attn\.out_proj' itself") as caught:
        make(workload, settings(lora=Lora(2, targets)))
    assert "\n" not in str(caught.value)
    make(workload, settings(lora=Lora(2, ("linear1",)), trainable=("*out_proj.weight",)))


def test_an_adapter_on_a_layer_that_is_not_used_at_all_does_no_harm() -> None:
    pytest.importorskip("peft")
    model = Net()
    model.pooler = nn.Linear(8, 2)
    start = make(classification(model=model), settings(lora=Lora(2, ("classifier", "pooler"))))
    assert [name.split(".")[0] for name in start.forward.used] == ["classifier", "classifier"]


@pytest.mark.parametrize("part", [{"rank": 0, "targets": ("a",)}, {"rank": 2, "targets": ()}])
def test_adapters_of_nothing_are_refused(part: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="rank of at least 1"):
        Lora(**part)


def test_without_peft_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    right = builtins.__import__

    def refuse(name: str, *more: object) -> object:
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return right(name, *more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r"fimo\[lora\]"):
        make(classification(model=Net()), settings(lora=Lora(2, ("0",))))


def test_a_model_made_for_other_parameters_is_refused() -> None:
    workload = classification(model=Net())
    train, evals = Examples(workload.train, dtype=torch.float64), Examples(workload.evals, dtype=torch.float64)
    with pytest.raises(UsageError, match=r"settings\.trains"):
        start_from(FunctionalModel(workload, dtype=torch.float64), train, evals, settings(trainable=("classifier.*",)))


@pytest.mark.filterwarnings("error")
def test_adapters_on_attention_of_transformers() -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from tests.workers.stacking.test_text import chosen, hold, text  # here: it needs transformers
    from tests.workers.test_bert import bert

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        workload = text(bert(attention="sdpa", dropout=0.2))
        for mode in ("reweight", "drop"):
            training = chosen(mode, lora=Lora(2, ("query", "value")), trainable=("classifier.*",))
            hold(make(workload, training), workload, training, [(), (3,), (5,)], 1e-11)
