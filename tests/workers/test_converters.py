"""Workloads from what users of other libraries have, against ones written by hand: equal losses, equal deltas.

Stand-ins follow the two libraries' own signatures (kronfluence.task.Task, torch_influence.base.BaseObjective), which
are not installed here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fimo
from fimo.estimators import parse
from fimo.estimators.problem import Problem
from fimo.workers.contract import check_contract
from fimo.workers.draws import Draws
from fimo.workers.errors import WorkloadError
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.workload import Workload

TRAINING = FurtherTraining(
    Optimizer("sgd", lr=0.1), 4, steps=3, evaluate=Evaluate(at_steps=(1, 2)), precision="float64", removal_mode="drop"
)
REMOVALS = [[0], [3, 7], [10]]


class KronfluenceTask:
    """As in kronfluence's examples: the loss is summed over the batch, and labels are drawn if ``sample``."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        inputs, labels = batch
        logits = model(inputs)
        if not sample:
            return F.cross_entropy(logits, labels, reduction="sum")
        drawn = torch.multinomial(logits.detach().softmax(-1), num_samples=1).flatten()
        return F.cross_entropy(logits, drawn, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        inputs, labels = batch
        logits = model(inputs)
        places = torch.arange(logits.shape[0])
        correct = logits[places, labels]
        others = logits.clone()
        others[places, labels] = torch.tensor(-torch.inf, dtype=logits.dtype)
        return -(correct - others.logsumexp(dim=-1)).sum()

    def get_influence_tracked_modules(self) -> None:
        return None

    def get_attention_mask(self, batch: Any) -> None:
        return None


class Objective:
    """As ``torch_influence.base.BaseObjective``: means over the batch."""

    weight = 0.0

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])

    def train_regularization(self, params: Tensor) -> Any:
        return self.weight * torch.square(params.norm())

    def train_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        outputs = self.train_outputs(model, batch)
        return self.train_loss_on_outputs(outputs, batch) + self.train_regularization(params)

    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


def network(*more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *more, nn.Tanh(), nn.Linear(6, 3))


def tensors(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def datasets() -> tuple[TensorDataset, TensorDataset]:
    return TensorDataset(*tensors(13, 1)), TensorDataset(*tensors(5, 2))


def loaders(**options: Any) -> tuple[DataLoader[Any], DataLoader[Any]]:
    train, test = datasets()
    return DataLoader(train, batch_size=8, shuffle=True, **options), DataLoader(test, batch_size=2, **options)


def by_hand(model: nn.Module, margin: bool = False) -> Workload:
    (x, y), (x_evals, y_evals) = tensors(13, 1), tensors(5, 2)

    def minus_margin(outputs: Tensor, batch: Any) -> Tensor:
        hot = F.one_hot(batch["y"], 3).bool()
        return outputs.masked_fill(hot, -torch.inf).logsumexp(-1) - outputs[hot].reshape(-1)

    def log_odds(outputs: Tensor, batch: Any) -> Tensor:
        # −log p/(1 − p), by other means than the task's.
        p = outputs.softmax(-1).gather(1, batch["y"][:, None])[:, 0]
        return -(p / (1 - p)).log()

    return Workload(
        model,
        {"x": x, "y": y},
        {"x": x_evals, "y": y_evals},
        outputs=lambda m, batch: m(batch["x"]),
        loss=lambda outputs, batch: F.cross_entropy(outputs, batch["y"], reduction="none"),
        measure=log_odds if margin else None,
    )


class Listed:
    """A map-style dataset that is not made of tensors."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.rows = [dataset[i] for i in range(len(dataset))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def effects(workload: Workload, training: FurtherTraining = TRAINING, stacked: bool = False) -> Tensor:
    found = fimo.attribution(workload, training, REMOVALS, [0, 1], stacked=stacked)
    assert float(found.effects.abs().max()) > 1e-5
    return found.effects


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kind", ["tensors", "listed", "split"])
def test_a_task_has_the_effects_of_the_workload_written_by_hand(kind: str, stacked: bool) -> None:
    model, options = network(), {}
    train, evals = datasets()
    if kind == "listed":
        train, evals = Listed(train), Listed(evals)
    if kind == "split":
        options = {
            "outputs": lambda m, batch: m(batch[0]),
            "loss": lambda outputs, batch: F.cross_entropy(outputs, batch[1], reduction="none"),
        }
    made = fimo.from_kronfluence(KronfluenceTask(), model, train, evals, **options)
    torch.testing.assert_close(
        effects(made, stacked=stacked), effects(by_hand(model, margin=True)), rtol=1e-8, atol=1e-12
    )


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("mode", ["drop", "reweight"])
def test_an_objective_has_the_effects_of_the_workload_written_by_hand(mode: Any, stacked: bool) -> None:
    model, training = network(), replace(TRAINING, removal_mode=mode)
    made = fimo.from_torch_influence(Objective(), model, *loaders())
    torch.testing.assert_close(
        effects(made, training, stacked), effects(by_hand(model), training), rtol=1e-8, atol=1e-12
    )


def test_the_mean_and_the_sum_of_a_batch_are_one_workload() -> None:
    class Mean(KronfluenceTask):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return super().compute_train_loss(batch, model, sample) / len(batch[0])

    model = network()
    made = [fimo.from_kronfluence(task, model, *datasets()) for task in (KronfluenceTask(), Mean())]
    torch.testing.assert_close(effects(made[0]), effects(made[1]), rtol=1e-9, atol=1e-12)


def test_tasks_of_dicts_with_a_collate_that_pads() -> None:
    """As language models have it: a sum over tokens, −100 where padding is."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 9, (int(n),), generator=generator) for n in torch.randint(2, 6, (9,), generator=generator)]

    def collate(items: list[Tensor]) -> dict[str, Tensor]:
        pad = nn.utils.rnn.pad_sequence
        return {"ids": pad(items, True, 0), "labels": pad(items, True, -100)}

    class Task:
        mean = False

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(batch["ids"])[:, :-1]
            reduction = "mean" if self.mean else "sum"
            labels = batch["labels"][:, 1:]
            return F.cross_entropy(logits.reshape(-1, 9), labels.reshape(-1), reduction=reduction)

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return Task().compute_train_loss(batch, model)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 9))
    made = fimo.from_kronfluence(Task(), model, rows, rows[:3], collate=collate)
    expected = [F.cross_entropy(model(row[None])[0, :-1], row[1:], reduction="sum") for row in rows]
    batch = Examples(made.train, made.collate).batch(range(9))
    torch.testing.assert_close(made.loss(made.outputs(model, batch), batch), torch.stack(expected))
    task = Task()
    task.mean = True
    with pytest.raises(
        WorkloadError, match=r"compute_train_loss of 5 examples .* neither the sum .* nor the mean"
    ) as e:
        fimo.from_kronfluence(task, model, rows, rows[:3], collate=collate)
    assert "\n" not in str(e.value)


def test_a_contrastive_loss_is_refused() -> None:
    class Contrastive(KronfluenceTask):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            embedded = model(batch[0])
            return F.cross_entropy(embedded @ embedded.T, torch.arange(len(embedded)), reduction="sum")

    with pytest.raises(WorkloadError, match="no example has a loss of its own"):
        fimo.from_kronfluence(Contrastive(), network(), *datasets())

    class Ranking(Objective):
        def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
            return F.cross_entropy(outputs.T, torch.zeros(3, dtype=torch.long))

    with pytest.raises(WorkloadError, match="train_loss_on_outputs of 5 examples"):
        fimo.from_torch_influence(Ranking(), network(), *loaders())


def test_dropout_is_each_example_s_own_and_alike_in_stacks() -> None:
    model = network(nn.Dropout(0.5))
    made = fimo.from_kronfluence(KronfluenceTask(), model, *datasets())
    same = tuple(tensor[:1].expand(8, *tensor.shape[1:]) for tensor in tensors(13, 1))
    batch = {"train0": same[0], "train1": same[1]}
    model.train()
    torch.manual_seed(0)
    with Draws():  # As further training runs a forward.
        assert len(set(made.outputs(model, batch).tolist())) > 1, "one mask for all"
    model.eval()
    assert len(set(made.outputs(model, batch).tolist())) == 1
    torch.testing.assert_close(effects(made, stacked=True), effects(made), rtol=1e-8, atol=1e-12)


def test_batch_norm_sees_whole_batches_or_is_refused() -> None:
    model = network(nn.BatchNorm1d(6))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alone = fimo.from_kronfluence(KronfluenceTask(), model, *datasets())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(WorkloadError, match=r"batch norm has no statistics: freeze them .*mode: eval"):
        fimo.attribution(alone, TRAINING, REMOVALS, [0])
    frozen = replace(TRAINING, mode="eval")
    torch.testing.assert_close(effects(alone, frozen), effects(by_hand(model, True), frozen), rtol=1e-8, atol=1e-12)
    split = fimo.from_torch_influence(Objective(), model, *loaders())
    torch.testing.assert_close(effects(split), effects(by_hand(model)), rtol=1e-8, atol=1e-12)


def test_a_regularisation_is_the_optimizer_s() -> None:
    class Decay(Objective):
        weight = 0.005

    model = network()
    with pytest.raises(WorkloadError, match=r"as 0.005·‖θ‖² it is .* weight_decay: 0.01; say ignore_reg") as caught:
        fimo.from_torch_influence(Decay(), model, *loaders())
    assert "\n" not in str(caught.value)
    made = fimo.from_torch_influence(Decay(), model, *loaders(), ignore_regularization=True)
    decayed = replace(TRAINING, optimizer=Optimizer("sgd", lr=0.1, weight_decay=0.01))
    # Its own loss, regularised and stepped by hand: what the line promises.
    plain = network()
    plain.load_state_dict(model.state_dict())
    plain.double()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    x, y = tensors(13, 1)
    order = list(torch.utils.data.RandomSampler(range(13), generator=torch.Generator().manual_seed(0)))
    for start in (0, 4, 8):
        rows = torch.tensor(order[start : start + 4])
        optimizer.zero_grad()
        params = torch.cat([p.reshape(-1) for p in plain.parameters()])
        Decay().train_loss(plain, params, [x[rows].double(), y[rows]]).backward()
        optimizer.step()
    from fimo.workers.definition import train_cell

    trained = train_cell(made, decayed, (), 0).model
    for got, expected in zip(trained.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)

    class Sparse(Objective):
        def train_regularization(self, params: Tensor) -> Any:
            return 0.01 * params.abs().sum()

    with pytest.raises(WorkloadError, match="belongs to no example is left out"):
        fimo.from_torch_influence(Sparse(), model, *loaders())

    class OfItsOwn(Objective):
        def train_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
            return 2 * super().train_loss(model, params, batch)

    with pytest.raises(WorkloadError, match="train_loss is not train_loss_on_outputs plus"):
        fimo.from_torch_influence(OfItsOwn(), model, *loaders())


def test_a_split_that_is_not_the_task_s_is_refused() -> None:
    train, evals = datasets()
    outputs = lambda m, batch: m(batch[0])  # noqa: E731
    smoothed = lambda out, b: F.cross_entropy(out, b[1], reduction="none", label_smoothing=0.1)  # noqa: E731
    with pytest.raises(WorkloadError, match="is not the task's compute_train_loss"):
        fimo.from_kronfluence(KronfluenceTask(), network(), train, evals, outputs=outputs, loss=smoothed)
    with pytest.raises(WorkloadError, match="outputs and loss go together"):
        fimo.from_kronfluence(KronfluenceTask(), network(), train, evals, outputs=outputs)


def problem(workload: Workload) -> Problem:
    model = FunctionalModel(workload, dtype=torch.float64)
    train, evals = (Examples(s, dtype=torch.float64) for s in (workload.train, workload.evals))
    return Problem(model, train, evals, REMOVALS, TRAINING, (0, 1))


def test_estimators_that_need_the_outputs_say_so_and_the_others_agree() -> None:
    model = network()
    task, split = KronfluenceTask(), {}
    whole, hand = problem(fimo.from_kronfluence(task, model, *datasets())), problem(by_hand(model, True))
    for name in ("cg", "ekfac", "lissa"):
        (estimator,) = parse(name)
        assert "no curvature in the outputs" in (estimator.refuses(whole) or "")
    for entry in ("grad_dot", "grad_cos", {"name": "datainf", "damping": [0.1]}):
        (estimator,) = parse(entry)
        torch.testing.assert_close(
            estimator.estimate(whole).values, estimator.estimate(hand).values, rtol=1e-7, atol=1e-12
        )
    split = {
        "outputs": lambda m, batch: m(batch[0]),
        "loss": lambda outputs, batch: F.cross_entropy(outputs, batch[1], reduction="none"),
    }
    made = (
        fimo.from_kronfluence(task, model, *datasets(), **split),
        fimo.from_torch_influence(Objective(), model, *loaders()),
    )
    for workload, truth in zip(made, (hand, problem(by_hand(model))), strict=True):
        for entry in ({"name": "cg", "damping": [0.1]}, {"name": "ekfac", "damping": [0.1]}, "trak"):
            (estimator,) = parse(entry)
            found = estimator.estimate(problem(workload)).values
            torch.testing.assert_close(found, estimator.estimate(truth).values, rtol=1e-6, atol=1e-10)


def test_mistakes_are_one_line() -> None:
    class Broken(KronfluenceTask):
        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return model(batch["input_ids"])

    class ForEach(KronfluenceTask):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    train, evals = datasets()
    for task, said in ((Broken(), "the task fails on a batch"), (ForEach(), r"returns \(5,\) for a batch")):
        with pytest.raises(WorkloadError, match=said) as caught:
            fimo.from_kronfluence(task, network(), train, evals)
        assert "\n" not in str(caught.value)
    with pytest.raises(WorkloadError, match="give a map-style dataset"):
        fimo.from_kronfluence(KronfluenceTask(), network(), iter([1]), evals)
    with pytest.raises(WorkloadError, match="meta device"):
        fimo.from_kronfluence(KronfluenceTask(), network().to("meta"), train, evals)


@pytest.mark.parametrize("given", ["task", "task with outputs", "objective"])
def test_a_run_s_look_at_the_workload_passes(given: str) -> None:
    """Every run looks at a few examples first; of training examples, whose outputs are not g, g is not to be asked."""
    model, kronfluence = network(), KronfluenceTask()
    if given == "objective":
        made = fimo.from_torch_influence(Objective(), model, *loaders())
    else:
        split = {
            "outputs": lambda m, batch: m(batch[0]),
            "loss": lambda out, batch: F.cross_entropy(out, batch[1], reduction="none"),
        }
        made = fimo.from_kronfluence(kronfluence, model, *datasets(), **(split if "outputs" in given else {}))
    look = FunctionalModel(made, None, torch.device("cpu"), torch.float32)
    check_contract(look, Examples(made.train, made.collate), Examples(made.evals, made.collate))
