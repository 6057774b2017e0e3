"""Nothing that an estimator, or a shipped model, computes is refused on a GPU, where algorithms are deterministic."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from fimo.estimators import REGISTRY, parse
from fimo.estimators.operators import pseudo_gradients
from fimo.orchestrator import starters
from fimo.workers.functional import FunctionalModel
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.workload import Workload
from fimo.workers.workloads import cifar10
from fimo.workers.workloads.images import augment
from tests.estimators import problems
from tests.support.undetermined import Determined, Undetermined
from tests.workers.problems import make

SMALL = {"lissa": {"depth": 20}, "lissa_h": {"depth": 10, "scale": 20}, "trak": {"dimension": 12}}
TRAINING = FurtherTraining(Optimizer("sgd", 0.01), 8, steps=3, evaluate=Evaluate(at_steps=(2, 3)), precision="float64")


def started(name: str) -> Workload:
    file = Path(starters.__file__).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"started_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.workload()


def estimated(name: str, given: problems.Problem, **options: object) -> torch.Tensor:
    (estimator,) = parse({"name": name, **SMALL.get(name, {}), **options})
    with Determined():
        values: torch.Tensor = estimator.estimate(given).values
    return values


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_estimator_is_had_by_kernels_that_are_deterministic_on_a_gpu(name: str) -> None:
    given = problems.classification(further_training=dataclasses.replace(TRAINING, removal_mode="reweight"), seeds=(0,))
    assert estimated(name, given).isfinite().all()


@pytest.mark.parametrize("name", ["ekfac", "grad_dot", "cg", "unrolled"])
def test_so_is_one_of_a_language_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # EK-FAC draws a label for each token, by sums of probabilities.
    monkeypatch.setattr(pseudo_gradients, "FEW", 1)
    monkeypatch.setattr(pseudo_gradients, "is_gpu", lambda _: True)
    chosen = dataclasses.replace(TRAINING, removal_mode="reweight")
    given = problems.problem(started("language_model"), [[0], [3]], further_training=chosen, seeds=(0,))
    assert estimated(name, given).isfinite().all()


@pytest.mark.parametrize("name", ["image", "language_model", "tabular", "text"])
def test_a_starters_model_is_trained_by_them(name: str) -> None:
    from fimo.workers.further_training import further_train

    with Determined():
        start = make(started(name), dataclasses.replace(TRAINING, precision="float32"))
        assert further_train(start, [(), (3,)], 0).deltas.isfinite().all()


def test_the_network_for_images_is_trained_by_them() -> None:
    torch.manual_seed(0)
    data = {"x": torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), "y": torch.arange(4), "index": torch.arange(4)}
    workload = Workload(cifar10.ResNet9(4), data, data, cifar10.outputs, cifar10.cross_entropy)
    model = FunctionalModel(workload)
    params = {n: p.requires_grad_() for n, p in model.params.items()}
    with Determined(), model.mode("train"):
        augment(data["x"], data["index"])
        loss = model.loss(params, data, {n: t.clone() for n, t in model.fixed.items()}).sum()
        torch.autograd.grad(loss, list(params.values()))


@pytest.mark.parametrize("count", [1, 2, 7, 8, 1000])
def test_sums_in_an_order_of_their_own_are_sums(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(3, count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    monkeypatch.setattr(pseudo_gradients, "is_gpu", lambda _: True)
    torch.testing.assert_close(pseudo_gradients.running_sums(x), x.cumsum(1), rtol=1e-13, atol=0)


def test_what_a_gpu_refuses_is_refused_here() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with Determined():
        torch.arange(4).cumsum(0)
        for of in (
            lambda: x.cumsum(0),
            lambda: torch.nn.functional.adaptive_max_pool2d(x, 2).sum().backward(),
            lambda: torch.nn.functional.interpolate(x, 16, mode="bilinear").sum().backward(),
        ):
            with pytest.raises(Undetermined):
                of()
