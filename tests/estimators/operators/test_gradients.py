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
