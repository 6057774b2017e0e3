"""Mirrored further training against a plain loop in torch that shares nothing with the engine but seeds and data."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from fimo.workers import further_training, mirror
from fimo.workers.definition import attribution
from fimo.workers.errors import DivergedError, UsageError, WorkloadError
from fimo.workers.examples import Examples
from fimo.workers.further_training import further_train
from fimo.workers.mirror import train_mirrored
from fimo.workers.randomness import seed_all, step_seed
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.stacking import replay
from fimo.workers.start import Engine, Start
from fimo.workers.workload import Workload
from tests.workers.problems import MeanOfWords, classification, make, regression, sentences, settings
from tests.workers.stacking.test_text import text
from tests.workers.test_bert import bert

MOMENTUM = Optimizer("sgd", lr=0.05, momentum=0.9, weight_decay=0.01)
ADAMW = Optimizer("adamw", lr=0.01, weight_decay=0.1)
REMOVALS = [(0,), (22,), (7, 3, 11), (9,), ()]
STEPS = (2, 5, 9)
"""Five steps an epoch, of which the last has 3 examples: two of them are ragged ends."""


@pytest.fixture(autouse=True)
def traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces cost more than these few steps: the tests that are about them ask for them."""
    if "traced" not in request.node.name:
        monkeypatch.setattr(replay, "AFTER", 10**9)


def examples_of(workload: Workload) -> tuple[Examples, Examples]:
    return tuple(Examples(s, workload.collate, dtype=torch.float64) for s in (workload.train, workload.evals))


def order(n: int, chosen: FurtherTraining, seed: int) -> Iterator[list[int]]:
    sampler = RandomSampler(range(n), generator=torch.Generator().manual_seed(seed))
    while True:
        every = list(sampler)
        yield from (every[i : i + chosen.batch_size] for i in range(0, n, chosen.batch_size))


def plain_run(workload: Workload, chosen: FurtherTraining, z: int | None, seed: int, steps: Sequence[int]) -> Tensor:
    """ℓ_i(θ_t) of all training examples, (T, n), with w g(z) / n subtracted."""
    train, evals = examples_of(workload)
    model, g, n = copy.deepcopy(workload.model).double(), workload.measure or workload.loss, len(train)
    trained = chosen.trainable
    for name, p in model.named_parameters():
        p.requires_grad_(trained == "all" or any(name.startswith(t.rstrip("*")) for t in trained))
    optimizer = chosen.optimizer.build([p for p in model.parameters() if p.requires_grad])
    losses = []
    for step, indices in enumerate(order(n, chosen, seed), start=1):
        optimizer.zero_grad()
        model.train(chosen.mode == "train")
        seed_all(step_seed(seed, step, "batch"), torch.device("cpu"))
        batch = train.batch(indices)
        loss = workload.loss(workload.outputs(model, batch), batch).mean()
        if z is not None:
            model.eval()
            batch = evals.batch([z])
            loss = loss - chosen.removal_weight * g(workload.outputs(model, batch), batch).sum() / n
        loss.backward()
        if chosen.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), chosen.clip_norm)
        optimizer.step()
        if step in steps:
            model.eval()
            with torch.no_grad():
                alone = (train.batch([i]) for i in range(n))
                losses.append(torch.cat([workload.loss(workload.outputs(model, b), b) for b in alone]))
        if step == max(steps):
            return torch.stack(losses)
    raise AssertionError


def plain(workload: Workload, chosen: FurtherTraining, removals, seed: int, steps: Sequence[int]) -> Tensor:
    """(T, R, E) by plain runs, one after another."""
    baseline = plain_run(workload, chosen, None, seed, steps)
    count = len(Examples(workload.evals, workload.collate))
    effects = torch.stack([plain_run(workload, chosen, z, seed, steps) - baseline for z in range(count)], dim=-1)
    effects = effects / chosen.removal_weight
    return torch.stack([effects[:, list(removal)].sum(dim=1) for removal in removals], dim=1)


def by_engine(workload: Workload, chosen: FurtherTraining, replicas: int, start: Start | None = None) -> Tensor:
    start = start or make(workload, chosen)
    return train_mirrored(start, examples_of(workload)[1], REMOVALS, 3, STEPS, replicas).values


def hold(workload: Workload, chosen: FurtherTraining, stacks: Sequence[int] = (3,)) -> None:
    expected = plain(workload, chosen, REMOVALS, 3, STEPS)
    assert expected[:, :4].abs().amax(dim=(1, 2)).min() > 1e-6
    for replicas in stacks:
        got = by_engine(workload, chosen, replicas)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def with_other_evals() -> Workload:
    """Evaluation examples of other names, width and labels than the training ones, and a measure of their own."""
    base = classification()
    other = {"features": base.evals["x"][:, :3], "margin": torch.tensor([1, 0, 2, 1, 0, 0])}

    def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if "features" in batch:
            return model(nn.functional.pad(batch["features"], (0, 1)))
        return model(batch["x"])

    def measure(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        assert outputs.dtype is torch.float64
        return torch.tanh(outputs.gather(1, batch["margin"][:, None]).squeeze(1)) - outputs.mean(dim=1)

    return replace(base, evals=other, outputs=outputs, measure=measure)


@pytest.mark.parametrize(
    ("optimizer", "more"), [(MOMENTUM, {}), (ADAMW, {"clip_norm": 0.3}), (ADAMW, {"trainable": ("4*",)})]
)
def test_it_is_the_plain_loop_in_every_stack(optimizer: Optimizer, more: dict) -> None:
    hold(regression(), settings(optimizer, epochs=2, **more), stacks=(1, 3, 5))


@pytest.mark.parametrize(("optimizer", "w"), [(MOMENTUM, 0.5), (MOMENTUM, 8.0), (ADAMW, 8.0)])
def test_a_removal_weight_is_subtracted_and_divided_by(optimizer: Optimizer, w: float) -> None:
    hold(regression(), settings(optimizer, epochs=2, removal_weight=w), stacks=(1, 3))


def test_traced_it_is_the_plain_loop_and_the_sweep_s_own_cells_stay_what_they_are() -> None:
    workload, chosen = with_other_evals(), settings(MOMENTUM, removal_mode="reweight", epochs=9, batch_size=12)
    start, steps, removals = make(workload, chosen), tuple(range(1, 18)), [(0,), (7, 3)]
    before = further_train(start, [(), (0,), (4,)], 3).deltas
    got = train_mirrored(start, start.examples, removals, 3, steps, 4).values
    torch.testing.assert_close(got, plain(workload, chosen, removals, 3, steps), rtol=1e-9, atol=1e-12)
    assert {name for name, *_ in start.graphs} >= {"batch", "measures", "subtracted", "losses"}
    assert all(graph is not None for graph in start.graphs.values())
    torch.testing.assert_close(further_train(start, [(), (0,), (4,)], 3).deltas, before, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_the_sweep_s_removal_mode_and_length_do_not_matter(mode: str) -> None:
    chosen = settings(MOMENTUM, removal_mode=mode, steps=30, evaluate=Evaluate(every_steps=4))
    hold(regression(), chosen)


@pytest.mark.parametrize("engine", [Engine(), Engine(replay=False, fold=False)])
def test_other_names_shapes_and_a_measure_of_the_evaluation_examples_own(engine: Engine) -> None:
    workload, chosen = with_other_evals(), settings(ADAMW, epochs=2)
    got = by_engine(workload, chosen, 4, make(workload, chosen).using(engine))
    torch.testing.assert_close(got, plain(workload, chosen, REMOVALS, 3, STEPS), rtol=1e-9, atol=1e-12)


class TwoHeads(nn.Module):
    """The loss reads the one head and the measure the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.loss, self.measure = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return torch.stack([self.loss(hidden), self.measure(hidden)], dim=-1)


def test_a_parameter_that_g_alone_depends_on_is_trained_in_the_runs_that_subtract_it_alone() -> None:
    workload = replace(
        classification(model=TwoHeads()),
        loss=lambda outputs, batch: nn.functional.cross_entropy(outputs[..., 0], batch["label"], reduction="none"),
        measure=lambda outputs, batch: outputs[..., 1].square().sum(dim=1),
    )
    hold(workload, settings(ADAMW, epochs=2, clip_norm=0.5), stacks=(1, 4))


class Rows:
    """Tensors as a map-style dataset."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.tensors.items()}


@pytest.mark.parametrize("which", ["train", "evals"])
def test_either_side_may_be_a_dataset(which: str) -> None:
    base = with_other_evals()
    hold(replace(base, **{which: Rows(getattr(base, which))}), settings(MOMENTUM, epochs=2), stacks=(4,))


def test_a_dataset_whose_batches_differ_in_shape() -> None:
    hold(sentences(), settings(ADAMW, epochs=2), stacks=(1, 4))


@pytest.mark.parametrize("engine", [Engine(), Engine(fold=False)])
def test_dropout_is_the_sweep_s_in_the_batch_and_none_in_g(engine: Engine) -> None:
    workload, chosen = regression(middle=nn.Dropout(0.4)), settings(MOMENTUM, epochs=2)
    expected = plain(workload, chosen, REMOVALS, 3, STEPS)
    for replicas in (1, 3):
        got = by_engine(workload, chosen, replicas, make(workload, chosen).using(engine))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_padded_text_is_cut_and_gives_what_it_gives_whole() -> None:
    torch.manual_seed(0)
    words = replace(text(MeanOfWords()), outputs=lambda m, batch: m(batch["tokens"], batch["attention_mask"]))
    for workload, stacks in ((words, (1, 4)), (text(bert(dropout=0.1)), (3,))):
        chosen = settings(ADAMW, epochs=2)
        made = mirror.mirror_of(make(workload, chosen), examples_of(workload)[1], STEPS, range(23))
        assert made.trimming is not None
        assert made.subtracted.trimming is not None
        assert made.evals.places is not None
        hold(workload, chosen, stacks)


def test_float32_agrees_with_float64() -> None:
    narrow, wide = (settings(MOMENTUM, epochs=2, precision=p) for p in ("float32", "float64"))
    workload = regression()
    start = make(workload, narrow)
    evals = Examples(workload.evals, dtype=torch.float32)
    got = train_mirrored(start, evals, REMOVALS, 3, STEPS, 3).values
    expected = by_engine(workload, wide, 3)
    assert (got - expected).abs().max() < 1e-3 * expected.abs().max()


def linear_losses(n: int = 12, evals: int = 4) -> Workload:
    """Losses and measure that are linear in θ; weight decay is the quadratic that all share."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda k: torch.randn(k, 6, dtype=torch.float64, generator=generator)  # noqa: E731
    torch.manual_seed(1)
    model = nn.Linear(6, 1, bias=False).double()
    return Workload(
        model,
        {"x": draw(n), "scale": torch.rand(n, dtype=torch.float64, generator=generator)},
        {"x": draw(evals)},
        outputs=lambda model, batch: model(batch["x"]).squeeze(-1),
        loss=lambda outputs, batch: outputs * batch["scale"],
        measure=lambda outputs, batch: 3.0 * outputs,
    )


def test_it_is_the_attribution_where_gradients_are_affine_with_one_hessian() -> None:
    workload = linear_losses()
    optimizer = Optimizer("sgd", lr=0.1, momentum=0.8, weight_decay=0.3)
    chosen = settings(optimizer, batch_size=12, removal_mode="reweight", steps=9, evaluate=Evaluate(at_steps=STEPS))
    removals = [(0,), (5,), (2, 3)]
    truth = attribution(workload, chosen, removals, [3]).effect.transpose(0, 1)
    got = train_mirrored(make(workload, chosen), examples_of(workload)[1], removals, 3, STEPS, 3).values
    torch.testing.assert_close(got, truth, rtol=1e-8, atol=0)


def to_minimum(workload: Workload, decay: float) -> None:
    """θᶠ is stationary: no gradient changes along the baseline."""
    x = torch.cat([workload.train["x"], torch.ones(len(workload.train["x"]), 1)], dim=1).double()
    normal = 2 * x.T @ x / len(x) + decay * torch.eye(5, dtype=torch.float64)
    found = torch.linalg.solve(normal, 2 * x.T @ workload.train["y"].double() / len(x))
    with torch.no_grad():
        workload.model.weight.copy_(found[None, :4])
        workload.model.bias.copy_(found[4:])


def test_its_error_on_least_squares_shrinks_as_one_over_n() -> None:
    errors = []
    for copies in (4, 8, 16):
        base = regression(n=16)
        workload = replace(
            base,
            model=nn.Linear(4, 1).double(),
            train={k: v.repeat(copies, *[1] * (v.dim() - 1)) for k, v in base.train.items()},
        )
        to_minimum(workload, decay=0.05)
        chosen = settings(
            Optimizer("sgd", lr=0.1, weight_decay=0.05),
            batch_size=16 * copies,
            removal_mode="reweight",
            steps=12,
            evaluate=Evaluate(at_steps=(12,)),
        )
        removals = [(0,), (3,), (9,)]
        truth = attribution(workload, chosen, removals, [1]).effect.transpose(0, 1)
        got = train_mirrored(make(workload, chosen), examples_of(workload)[1], removals, 1, (12,), 4).values
        errors.append(float((got - truth).norm() / truth.norm()))
    assert errors[0] < 0.3
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.2)


def test_lack_of_memory_halves_the_stack_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    workload, chosen = regression(), settings(MOMENTUM, epochs=2)
    expected, right, tried = by_engine(workload, chosen, 8), further_training.Training.__init__, []

    def limited(self, start, lanes, *more, **options):
        tried.append(len(lanes))
        if len(lanes) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        right(self, start, lanes, *more, **options)

    monkeypatch.setattr(further_training.Training, "__init__", limited)
    run = train_mirrored(make(workload, chosen), examples_of(workload)[1], REMOVALS, 3, STEPS, 8)
    assert run.replicas == 2
    assert max(tried) == 8
    torch.testing.assert_close(run.values, expected, rtol=1e-9, atol=1e-12)


def test_the_memory_that_losses_take_bounds_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    workload, chosen = regression(), settings(MOMENTUM, epochs=2)
    expected = by_engine(workload, chosen, 8)
    monkeypatch.setattr(mirror, "HELD", 2 * 8 * len(STEPS) * 6)
    run = train_mirrored(make(workload, chosen), examples_of(workload)[1], REMOVALS, 3, STEPS, 8)
    assert run.replicas == 2
    torch.testing.assert_close(run.values, expected, rtol=1e-9, atol=1e-12)


def test_activations_do_not_grow_with_the_examples_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    workload, chosen = regression(n=700), settings(MOMENTUM, steps=2)
    read, right = [], Examples.batch

    def batch(self, indices):
        read.append(len(indices))
        return right(self, indices)

    start, evals = make(workload, chosen), examples_of(workload)[1]
    monkeypatch.setattr(Examples, "batch", batch)
    got = train_mirrored(start, evals, [(i,) for i in range(700)], 0, (2,), 8).values
    assert got.shape == (1, 700, 7)
    assert max(read) <= chosen.eval_batch


def test_nothing_is_trained_beyond_the_last_wanted_step(monkeypatch: pytest.MonkeyPatch) -> None:
    workload, chosen = regression(), settings(MOMENTUM, epochs=50)
    start, evals = make(workload, chosen), examples_of(workload)[1]
    steps, right = [], further_training._Stack.gradients

    def gradients(self, step, blocks):
        steps.append(step)
        return right(self, step, blocks)

    monkeypatch.setattr(further_training._Stack, "gradients", gradients)
    train_mirrored(start, evals, REMOVALS, 3, (2, 4), 4)
    assert steps == [1, 2, 3, 4] * 2


def test_a_stack_that_gives_another_gradient_of_g_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    workload, chosen = regression(), settings(MOMENTUM, epochs=2)
    expected, right = by_engine(workload, chosen, 4), mirror.stacks.gradients

    def broken(model, params, buffers, batch, *more, **options):
        grads, after = right(model, params, buffers, batch, *more, **options)
        count = len(next(iter(params.values())))
        return ({n: g * 1.001 for n, g in grads.items()} if count > 1 and "of" in options else grads), after

    monkeypatch.setattr(mirror.stacks, "gradients", broken)
    run = train_mirrored(make(workload, chosen), examples_of(workload)[1], REMOVALS, 3, STEPS, 4)
    torch.testing.assert_close(run.values, expected, rtol=1e-9, atol=1e-12)


def test_what_diverges_is_refused_in_one_line() -> None:
    workload = replace(regression(), model=nn.Linear(4, 1))
    chosen = settings(Optimizer("sgd", lr=1e200), epochs=2)
    start, evals = make(workload, chosen), examples_of(workload)[1]
    with pytest.raises(DivergedError, match=r"not finite after step \d \(seed 3\)") as caught:
        train_mirrored(start, evals, REMOVALS, 3, STEPS, 4)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_mirrored_is_refused_in_one_line() -> None:
    def refused(workload: Workload, error: type[Exception], match: str, **more: object) -> None:
        chosen = settings(MOMENTUM, **more)
        start = make(workload, chosen)
        with pytest.raises(error, match=match) as caught:
            train_mirrored(start, start.examples, REMOVALS, 3, STEPS, 4)
        assert "\n" not in str(caught.value)

    accuracy = lambda outputs, batch: (outputs.argmax(dim=1) == batch["label"]).double()  # noqa: E731
    refused(replace(classification(), measure=accuracy), UsageError, "no gradient")
    norm = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    refused(classification(model=norm), UsageError, "mode: eval for batch norm")

    def weighed(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch["label"], torch.ones(3), reduction="none")

    refused(replace(classification(), loss=weighed), WorkloadError, "fails on outputs in float64", precision="float32")
    start = make(regression(), settings(MOMENTUM))
    with pytest.raises(UsageError, match="training index 23 of 23"):
        train_mirrored(start, examples_of(regression())[1], [(23,)], 3, STEPS, 4)
