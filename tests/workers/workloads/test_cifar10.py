"""ResNet-9 on images: read from the archive or from tensors, augmented in pairs, further trained alike one by one."""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fimo
from fimo.orchestrator.spec.spec import parse
from fimo.orchestrator.sweep.sweep import Sweep
from fimo.workers.device import deterministic
from fimo.workers.errors import UsageError
from fimo.workers.examples import Examples
from fimo.workers.functional import FunctionalModel
from fimo.workers.randomness import seed_all, step_seed
from fimo.workers.settings import Evaluate, FurtherTraining, Optimizer
from fimo.workers.shard import run_shard
from fimo.workers.stacking.together import start_of
from fimo.workers.workload import Workload
from fimo.workers.workloads import cifar10, recipe
from tests.support import real_data
from tests.support.small_sweep import run_here

TRAINING = FurtherTraining(
    Optimizer("sgd", lr=0.02), 24, epochs=1, removal_mode="drop", evaluate=Evaluate(every_epochs=1), precision="float64"
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real digits as 3 × 32 × 32: 240 for training, 40 for evaluation."""
    x, y = real_data.digits(280)
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, x=x[:240], y=y[:240], x_test=x[240:], y_test=y[240:])
    return path


@pytest.fixture(scope="module")
def trained(digits: Path) -> Workload:
    made = cifar10.cifar10(digits, initial=0, width=4)
    recipe.train(made, replace(cifar10.RECIPE, epochs=15, batch_size=24), 0)
    return made


def few(workload: Workload, count: int) -> Workload:
    train = {name: tensor[:count] for name, tensor in workload.train.items()}
    return Workload(workload.model, train, workload.evals, workload.outputs, workload.loss)


class PythonTwo(pickle._Pickler):  # type: ignore[name-defined]
    """Writes bytes as Python 2's text, as the archive's files have it."""

    dispatch: ClassVar[Any] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)

    dispatch[bytes] = save_bytes


def write_archive(folder: Path, rows: int = 20) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(0)
    data, labels = rng.integers(0, 256, (6 * rows, 3072), dtype=np.uint8), rng.integers(0, 10, 6 * rows).tolist()
    folder.mkdir()
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part, file = slice(number * rows, (number + 1) * rows), io.BytesIO()
        batch = {b"batch_label": b"a part", b"labels": labels[part], b"data": data[part], b"filenames": [b"a.png"]}
        PythonTwo(file, protocol=2).dump(batch)
        # numpy's module as it was called when the archive was written.
        (folder / name).write_bytes(file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    return data, labels


def test_the_archive_is_read_image_by_image(tmp_path: Path) -> None:
    data, labels = write_archive(tmp_path / "cifar-10-batches-py")
    for path in (tmp_path, tmp_path / "cifar-10-batches-py"):
        made = cifar10.cifar10(path, initial=0)
        assert made.train["x"].shape == (100, 3, 32, 32)
        assert made.train["index"].tolist() == list(range(100))
        assert [*made.train["y"].tolist(), *made.evals["y"].tolist()] == labels
    # A row is 1,024 reds, then greens, then blues, each row by row (the archive's own page).
    assert int(made.train["x"][3, 1, 2, 5]) == data[3, 1024 + 2 * 32 + 5]
    assert made.train["x"].dtype == torch.uint8
    assert pickle.loads((path / "test_batch").read_bytes(), encoding="bytes")[b"labels"] == labels[100:]


class Evil:
    def __init__(self, call: tuple[Any, ...]) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def test_a_pickle_of_anything_else_is_refused_and_not_run(tmp_path: Path) -> None:
    write_archive(tmp_path / "c")
    touched = tmp_path / "touched"
    for evil in (Evil((os.system, (f"touch {touched}",))), Evil((np.load, ("x",))), Evil((eval, ("1",)))):
        (tmp_path / "c" / "data_batch_2").write_bytes(pickle.dumps({b"data": evil, b"labels": [1]}, protocol=2))
        with pytest.raises(
            UsageError, match=r"data_batch_2 is no batch of CIFAR-10 \(UnpicklingError: .*no place"
        ) as e:
            cifar10.cifar10(tmp_path / "c")
        assert "\n" not in str(e.value)
    assert not touched.exists()
    (tmp_path / "c" / "data_batch_2").unlink()
    with pytest.raises(UsageError, match=r"data_batch_2 is neither .* get cifar-10-python\.tar\.gz"):
        cifar10.cifar10(tmp_path / "c")


def test_tensors_of_either_order_are_the_same_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.integers(0, 256, (6, 3, 16, 24), dtype=np.uint8))
    labels = torch.arange(6)
    first = {"x": x, "y": labels, "x_test": x[:2].clone(), "y_test": labels[:2].clone()}
    last = {n: t.permute(0, 2, 3, 1).contiguous() if n.startswith("x") else t for n, t in first.items()}
    save_file(last, tmp_path / "a.safetensors")
    np.savez(tmp_path / "b.npz", **{name: tensor.numpy() for name, tensor in first.items()})
    for name in ("a.safetensors", "b.npz"):
        made = cifar10.cifar10(tmp_path / name, initial=0, width=4)
        assert torch.equal(made.train["x"], x)
        assert made.outputs(made.model, made.evals).shape == (2, 10)
    for broken in ({"x": x}, {**first, "x": x.float()}, {**first, "x": x[:, :, :15].contiguous()}):
        save_file(broken, tmp_path / "c.safetensors")
        with pytest.raises(UsageError, match="is no file of images") as caught:
            cifar10.cifar10(tmp_path / "c.safetensors")
        assert "\n" not in str(caught.value)


def test_the_network_is_resnet_9() -> None:
    with torch.device("meta"):
        model = cifar10.ResNet9()
        assert model(torch.empty(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) == 6_573_120
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [64, 128, 128, 128, 256, 512, 512, 512]


def test_a_training_forward_augments_by_example_and_an_evaluation_does_not(trained: Workload) -> None:
    seen: list[Tensor] = []
    hook = trained.model.register_forward_hook(lambda model, args, out: seen.append(args[0]))
    try:
        for rows, training in (([1, 2, 3], True), ([3, 9], True), ([1, 2, 3], False)):
            trained.model.train(training)
            seed_all(step_seed(0, 5, "batch"), torch.device("cpu"))
            trained.outputs(trained.model, Examples(trained.train).batch(rows))
    finally:
        hook.remove()
        trained.model.eval()
    whole, other, plain = seen
    assert torch.equal(whole[2], other[0]), "example 3 is cropped alike in another batch"
    assert not torch.equal(whole, plain)
    assert torch.equal(plain, trained.train["x"][[1, 2, 3]])


def test_the_recipe_learns_real_digits(trained: Workload) -> None:
    found = recipe.quality(trained)
    assert found["train accuracy"] > 0.85
    assert found["evals accuracy"] > 0.7


def test_its_forward_is_random_and_mixes_so_that_mask_is_the_default(trained: Workload) -> None:
    start = start_of(few(trained, 48), replace(TRAINING, removal_mode=None))
    assert (start.forward.random, start.forward.mixes, start.settings.removal_mode) == (True, True, "mask")
    assert {name.rsplit(".", 1)[1] for name in start.forward.mutable} >= {"running_mean", "running_var"}
    with pytest.raises(UsageError, match="reweight leaves the example in the statistics"):
        start_of(few(trained, 48), replace(TRAINING, removal_mode="reweight"))


@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_cells_of_a_stack_are_the_definition_s(trained: Workload, mode: Any) -> None:
    """Three replicas under vmap, although a CPU would rather train them one by one."""
    workload, settings, removals = few(trained, 48), replace(TRAINING, removal_mode=mode), [(0,), (5, 17)]
    plain = fimo.attribution(workload, settings, removals, seeds=[3])
    with deterministic(torch.device("cpu")):
        shard = run_shard(start_of(workload, settings), removals, 3, 3)
    assert shard.replicas == 3
    effects = shard.deltas[:2] - shard.deltas[2]
    assert float(plain.effects.abs().max()) > 1e-4
    torch.testing.assert_close(effects, plain.effects[0], rtol=1e-6, atol=1e-10)
    together = fimo.attribution(workload, settings, removals, seeds=[3], stacked=True)
    torch.testing.assert_close(together.effects, plain.effects, rtol=1e-6, atol=1e-10)


def test_pairs_are_worth_it(trained: Workload) -> None:
    """If crops went by place in the batch, a dropped index would give all later examples another's."""
    workload = few(trained, 48)
    by_place = {**workload.train, "index": torch.zeros(48, dtype=torch.int64)}

    def shifted(model: Any, batch: Any) -> Tensor:
        return cifar10.outputs(model, {**batch, "index": torch.arange(len(batch["y"]))})

    def spread(made: Workload) -> float:
        effects = fimo.attribution(made, TRAINING, [[0]], seeds=range(4), stacked=True).effects
        return float(effects.square().mean().sqrt())

    placed = Workload(workload.model, by_place, workload.evals, shifted, workload.loss)
    assert spread(workload) < spread(placed)


@pytest.mark.slow
def test_a_sweep_proves_its_engine_on_it_and_is_scored(digits: Path, trained: Workload, tmp_path: Path) -> None:
    recipe.save(trained.model, tmp_path / "digits.safetensors")
    spec = parse(
        {
            "name": "digits",
            "workload": "cifar10",
            "workload_args": {"data": str(digits), "width": 4},
            "final_model": "digits.safetensors",
            "removals": {"indices": [0, 17, 100]},
            "seeds": 2,
            "evals": 20,
            "further_training": {"optimizer": {"name": "sgd", "lr": 0.02}, "batch_size": 48, "epochs": 1},
            "estimators": ["grad_dot", "datainf"],
        }
    )
    report, store, heard = run_here(spec, tmp_path)
    assert report.exit_code == 0, heard.lines
    assert Sweep(store, "digits").read_manifest().spec.further_training.removal_mode == "mask"
    scores = report.gathered.tables["scores"].to_pylist()
    assert {row["estimator"] for row in scores} == {"grad_dot", "datainf"}
    assert all(-1 <= row["score"] <= 1 for row in scores if row["score"] is not None)


def test_estimators_see_images_as_they_stand(trained: Workload) -> None:
    from fimo.estimators import Problem, parse

    workload = few(trained, 24)
    problem = Problem(
        FunctionalModel(workload),
        Examples(workload.train),
        Examples(workload.evals).first(5),
        [[0], [3]],
        further_training=replace(TRAINING, precision="float32"),
        seeds=(0,),
    )
    [dot] = parse("grad_dot")
    values = dot.estimate(problem).values
    own = Examples(workload.train).batch([0])
    gradients = []
    workload.model.eval()
    for batch in (own, Examples(workload.evals).batch([2])):
        workload.model.zero_grad()
        workload.loss(workload.outputs(workload.model, batch), batch).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in workload.model.parameters()]))
    assert float(values[0, 2]) == pytest.approx(float(gradients[0] @ gradients[1]), rel=1e-3)
