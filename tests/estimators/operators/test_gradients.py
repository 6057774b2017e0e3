"""Blocks of gradients: as large as a device's memory allows, and alike on devices of one type."""

from __future__ import annotations

import torch

from fimo.estimators.operators import gradients


def test_blocks_grow_with_a_gpus_memory_and_are_the_same_on_every_cpu(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(gradients, "memory", lambda device: 128 * 2**30 if device.type == "cuda" else 0)
    assert (gradients.held(cpu), gradients.stream(cpu)) == (gradients.HELD, gradients.STREAM)
    # An eighth of 128 GiB, in scalars of 4 bytes.
    assert gradients.held(gpu) == 2**32
    assert gradients.stream(gpu) == 16 * gradients.STREAM
    scalars = 2**20
    assert gradients.block_size(scalars, gpu) == 16 * gradients.block_size(scalars, cpu)
    assert [gradients.block_size(1, device) for device in (cpu, gpu)] == [gradients.BLOCK, 16 * gradients.BLOCK]
    assert len(gradients.held_blocks(1000, 2**24, cpu)) == 63
    assert len(gradients.held_blocks(1000, 2**24, gpu)) == 4
    # A small GPU keeps no less than a CPU.
    monkeypatch.setattr(gradients, "memory", lambda device: 4 * 2**30)
    assert gradients.held(gpu) == gradients.HELD


def test_a_block_that_does_not_fit_is_taken_in_halves_with_the_same_draws():
    sizes, batch = [], {"x": torch.arange(21.0).reshape(7, 3), "name": "kept"}

    def squares(example):
        sizes.append(batch_size := torch._C._functorch.get_unwrapped(example["x"]).shape[0])
        if batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"sum": example["x"].square().sum(), "noise": torch.rand(2)}

    def reseed():
        torch.manual_seed(3)

    got = gradients.each_example(squares, batch, "same", reseed)
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    assert torch.equal(got["sum"], batch["x"].square().sum(dim=1))
    reseed()
    assert torch.equal(got["noise"], torch.rand(2).expand(7, 2))
