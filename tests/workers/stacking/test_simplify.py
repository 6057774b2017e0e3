"""A graph without what computes nothing gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fimo.workers.stacking.simplify import simplify

ODD = torch.tensor([[1.5, -0.0, float("nan")], [float("inf"), -2.25, 1e-40]])


def names_after(function: Callable[..., object], *given: Tensor) -> list[str]:
    """The kernels that are left, whose results are the function's bit for bit."""
    module = make_fx(function)(*given)
    simplify(module.graph)
    module.recompile()
    got, expected = module(*given), function(*given)
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(a.signbit(), b.signbit())
    return [node.target._opname for node in module.graph.nodes if node.op == "call_function"]


def test_the_loss_itself_is_not_computed_where_its_gradient_is_asked_for() -> None:
    def gradient(w: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Any, ...]:
        w = w.detach().requires_grad_()
        with torch.enable_grad():
            total = ((((x * w).sum(-1) - y) ** 2) * weights).sum()
        return torch.autograd.grad(total, [w])

    left = names_after(gradient, torch.randn(3), torch.randn(5, 3), torch.randn(5), torch.rand(5))
    # x w, its sum, less y; twice that, weighted, spread over x: no power, no sum of losses, no ones.
    assert not {"pow", "ones", "ones_like", "expand_as"} & set(left)
    assert left.count("sum") == 2
    assert left.count("mul") == 4


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda a: [a**1], []),
        (lambda a: [a * 1], []),
        (lambda a: [torch.ones_like(a) * a], []),
        (lambda a: [a * torch.ones_like(a[:1, :1]).expand(2, 3)], []),
        # It broadcasts, or becomes another dtype, or is another number.
        (lambda a: [a[:1] * torch.ones_like(a)], ["slice", "ones", "mul"]),
        (lambda a: [a * torch.ones_like(a, dtype=torch.float64)], ["ones", "mul"]),
        (lambda a: [a.t() * torch.ones_like(a).t().contiguous()], ["t", "ones", "t", "clone", "mul"]),
        (lambda a: [a**2], ["pow"]),
        (lambda a: [torch.ones_like(a) + a], ["ones", "add"]),
    ],
)
def test_only_what_is_equal_bit_for_bit_is_left_out(
    function: Callable[[Tensor], list[Tensor]], left: list[str]
) -> None:
    assert names_after(function, ODD) == left


def test_whole_numbers_to_a_power_that_is_not_whole_become_real() -> None:
    assert names_after(lambda a: [a**1.0], torch.arange(4)) == ["pow"]
