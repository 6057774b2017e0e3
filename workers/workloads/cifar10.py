"""CIFAR-10 with ResNet-9, batch norm and augmentation.

Data: the archive's folder ``cifar-10-batches-py`` (https://www.cs.toronto.edu/~kriz/cifar.html), whose pickles are read
by an unpickler that makes numpy arrays and nothing else; or a ``.safetensors`` or ``.npz`` file of tensors x, y, x_test
and y_test, images uint8 as (n, 3, h, w) or (n, h, w, 3) with h and w multiples of 8 from 16 on.

In training mode each image is cropped and mirrored by (seed, step, example) (``fimo.workers.workloads.images``); in
eval mode (evaluation, estimators, ``mode: eval``) it is as it stands. Pixels are normalised inside the model, so that
data stays uint8. Batch norm in train mode mixes the examples of a batch: removal modes are mask (the default) and drop.

The network is the ResNet-9 of DAWNBench (D. Page 2018), widths 64 to 512, logits times 0.125. Final model: ``RECIPE``,
its usual training: SGD with Nesterov momentum 0.9, weight decay 0.0005, batches of 512, the rate up to 0.4 over a fifth
of 24 epochs and down to 0, seed 0. It is *not* the paper's, whose image code was not at hand:

    python -m fimo.workers.workloads.cifar10 cifar-10-batches-py --to cifar10.safetensors
"""

from __future__ import annotations

import io
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fimo.workers.examples import Batch
from fimo.workers.settings import Optimizer
from fimo.workers.workload import Workload
from fimo.workers.workloads.files import Source
from fimo.workers.workloads.images import augment
from fimo.workers.workloads.recipe import Recipe, main, network
from fimo.workers.workloads.tabular import cross_entropy

SOURCE = Source(
    "CIFAR-10",
    "cifar-10-python.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html) and unpack it",
    "the folder cifar-10-batches-py with data_batch_1 to data_batch_5 and test_batch; a .safetensors or .npz file of "
    "x, y, x_test, y_test (images uint8) will do too",
)
RECIPE = Recipe(
    Optimizer("sgd", lr=0.4, momentum=0.9, nesterov=True, weight_decay=5e-4), epochs=24, batch_size=512, peak=0.2
)
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of the channels over the training images, of pixels in 0 … 1."""
TENSORS = ("x", "y", "x_test", "y_test")


class ResNet9(nn.Module):
    """Nine layers with two residual blocks; (B, 3, h, w) uint8 or float pixels in 0 … 255 -> logits (B, classes)."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("deviation", 255 * torch.tensor(DEVIATION).view(3, 1, 1))
        self.prep = block(3, width)
        self.layer1 = nn.Sequential(block(width, 2 * width), nn.MaxPool2d(2))
        self.residual1 = nn.Sequential(block(2 * width, 2 * width), block(2 * width, 2 * width))
        self.layer2 = nn.Sequential(block(2 * width, 4 * width), nn.MaxPool2d(2))
        self.layer3 = nn.Sequential(block(4 * width, 8 * width), nn.MaxPool2d(2))
        self.residual3 = nn.Sequential(block(8 * width, 8 * width), block(8 * width, 8 * width))
        self.linear = nn.Linear(8 * width, classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        x = (images.to(self.mean.dtype) - self.mean) / self.deviation
        x = self.layer1(self.prep(x))
        x = self.layer2(x + self.residual1(x))
        x = self.layer3(x)
        x = x + self.residual3(x)
        # The largest of each channel; torch's adaptive pooling has no deterministic gradient on CUDA.
        x = nn.functional.max_pool2d(x, list(x.shape[2:])).flatten(1)
        logits: Tensor = 0.125 * self.linear(x)
        return logits


def block(channels_in: int, channels_out: int) -> nn.Sequential:
    """Convolution 3 × 3, batch norm, ReLU."""
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (B, classes), of augmented images in training mode."""
    images = batch["x"]
    if model.training and "index" in batch:
        images = augment(images, batch["index"])
    out: Tensor = model(images)
    return out


class _ArraysAlone(pickle.Unpickler):
    """What CIFAR-10's batches are made of: dicts, lists, text, numbers and numpy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a batch of images")


def read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, 3, 32, 32) and labels int64 (n,) of one file of the archive; nothing in it is run.

    Raises:
        UsageError: the file is missing, or is something else.
    """
    if not path.is_file():
        raise SOURCE.missing(path)
    try:
        read = _ArraysAlone(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels = np.array(read[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
        labels = np.array(read[b"labels"], dtype=np.int64)
    except Exception as error:  # a broken pickle raises what it likes
        raise SOURCE.refuse(path, f"is no batch of CIFAR-10 ({type(error).__name__}: {error})") from error
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def read_images(path: Path) -> dict[str, Tensor]:
    """x, y, x_test and y_test of the archive's folder or of a file of tensors; images uint8 (n, 3, h, w).

    Raises:
        UsageError: in one line, if it is missing or is something else.
    """
    if path.is_dir():
        inner = path / "cifar-10-batches-py"
        folder = inner if inner.is_dir() else path
        batches = [read_batch(folder / f"data_batch_{number}") for number in range(1, 6)]
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return dict(zip(TENSORS, (images, labels, *read_batch(folder / "test_batch")), strict=True))
    if not path.is_file():
        raise SOURCE.missing(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                read = {name: torch.from_numpy(arrays[name]) for name in TENSORS}
        else:
            read = load_file(path)
        return {name: _images(read[name]) if name.startswith("x") else read[name].long() for name in TENSORS}
    except (SafetensorError, KeyError, ValueError, TypeError, OSError, EOFError) as error:
        raise SOURCE.refuse(path, f"is no file of images ({type(error).__name__}: {error})") from error


def _images(images: Tensor) -> Tensor:
    if images.dim() == 4 and images.shape[-1] == 3 and images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2).contiguous()
    if images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8 or any(s % 8 for s in images.shape[2:]):
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, not uint8 (n, 3, h, w)")
    return images


def cifar10(data: Path, initial: int | None = None, width: int = 64) -> Workload:
    """CIFAR-10 (50,000 training, 10,000 evaluation images) with ResNet-9 (6.6 million parameters).

    Args:
        data: the folder ``cifar-10-batches-py`` or the one around it, or a file of tensors.
        initial: None = the spec names a final model; else torch's default initialisation under this seed.
        width: channels of the first layer; the others' in proportion.

    Raises:
        UsageError: in one line, if the data is missing or is something else.
    """
    found = read_images(Path(data))
    classes = max(10, int(torch.cat([found["y"], found["y_test"]]).max()) + 1)
    train = {"x": found["x"], "y": found["y"], "index": torch.arange(len(found["y"]))}
    evals = {"x": found["x_test"], "y": found["y_test"]}
    model = network(partial(ResNet9, width, classes), initial)
    return Workload(model, train=train, evals=evals, outputs=outputs, loss=cross_entropy)


if __name__ == "__main__":
    main(cifar10, RECIPE)
