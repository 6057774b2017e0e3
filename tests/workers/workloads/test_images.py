"""An image's crop and flip depend on (seed, step, example) alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fimo.workers.randomness import seed_all, step_seed
from fimo.workers.workloads.images import PADDING, augment, draws, scramble

CPU = torch.device("cpu")


def images(count: int, height: int = 16, width: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def augmented(index: list[int], seed: int = 0, step: int = 1, x: Tensor | None = None) -> Tensor:
    x = images(40) if x is None else x
    seed_all(step_seed(seed, step, "batch"), CPU)
    return augment(x[index], torch.tensor(index))


def test_the_hash_is_splitmix64() -> None:
    """The published first outputs of the generator with state 1234567."""
    state, found = torch.tensor(1234567), []
    for _ in range(3):
        state = state + (0x9E3779B97F4A7C15 - 2**64)
        found.append(int(scramble(state)) % 2**64)
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_an_example_is_augmented_alike_in_any_batch() -> None:
    whole = augmented(list(range(40)))
    for batch in ([7], [3, 7, 39], [39, 7, 0, 1, 2]):
        assert torch.equal(augmented(batch), whole[batch])
    assert torch.equal(augmented([7, 7])[0], augmented([7, 7])[1])


def test_other_steps_seeds_and_examples_are_augmented_otherwise() -> None:
    same = images(1).expand(40, -1, -1, -1)
    index = list(range(40))
    first = augmented(index, x=same)
    for other in (augmented(index, step=2, x=same), augmented(index, seed=1, x=same), first.roll(1, 0)):
        differ = (other != first).flatten(1).any(dim=1)
        assert differ.double().mean() > 0.9


def test_under_vmap_each_replica_has_its_own_batch_and_the_same_crops() -> None:
    x, batches = images(40), torch.tensor([[0, 1, 2], [0, 2, 3], [5, 6, 7]])
    seed_all(step_seed(0, 1, "batch"), CPU)
    together = torch.vmap(augment, randomness="same")(x[batches], batches)
    for got, batch in zip(together, batches.tolist(), strict=True):
        assert torch.equal(got, augmented(batch))


def test_a_crop_is_the_padded_image_moved_and_perhaps_mirrored() -> None:
    """Against numpy's padding, slicing and reversing."""
    x, index = images(40), list(range(40))
    out = augmented(index, x=x)
    seed_all(step_seed(0, 1, "batch"), CPU)
    key = torch.randint(2**62, (), dtype=torch.int64)
    for i, down, right, mirrored in zip(index, *(n.tolist() for n in draws(key, torch.tensor(index), 3)), strict=True):
        padded = np.pad(x[i].numpy(), [(0, 0), (PADDING, PADDING), (PADDING, PADDING)])
        top, left = down % 9, right % 9
        crop = padded[:, top : top + 16, left : left + 24]
        np.testing.assert_array_equal(out[i].numpy(), crop[:, :, ::-1] if mirrored % 2 else crop)


def test_all_crops_and_flips_come_up_alike_and_independently() -> None:
    down, right, mirrored = draws(torch.tensor(5), torch.arange(81_000), 3)
    counts = torch.bincount((down % 9 * 9 + right % 9) * 2 + mirrored % 2, minlength=162).double()
    # Chi-square with 161 degrees of freedom: mean 161, deviation 18.
    assert float(((counts - 500) ** 2 / 500).sum()) < 161 + 5 * 18


def test_floats_are_augmented_as_they_are() -> None:
    x = images(8).double() / 255
    whole = list(range(8))
    assert torch.equal((augmented(whole, x=x) * 255).round().to(torch.uint8), augmented(whole, x=images(8)))
