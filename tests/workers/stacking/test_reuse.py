"""Kernels that write over what nothing reads any more change no bit, and never write over what is still read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fimo.workers.definition import train_cell
from fimo.workers.further_training import further_train
from fimo.workers.settings import Optimizer
from fimo.workers.stacking import replay
from fimo.workers.stacking.layouts import layouts_of
from fimo.workers.stacking.reuse import reuse
from tests.workers.problems import classification, every_step, make, regression, settings

OPTIMIZERS = {
    "sgd": Optimizer("sgd", lr=0.05),
    "nesterov": Optimizer("sgd", lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": Optimizer("adam", lr=0.01, weight_decay=0.05),
    "adamw": Optimizer("adamw", lr=0.01, weight_decay=0.1, amsgrad=True),
}
LANES = [(), (3,), (17,), (22,), (4, 9, 20)]


@pytest.mark.parametrize(
    ("optimizer", "mode", "precision", "size"),
    [
        ("sgd", "drop", "float32", 1),
        ("nesterov", "reweight", "float32", 5),
        ("adam", "reweight", "float64", 2),
        ("adamw", "drop", "float32", 5),
    ],
)
def test_deltas_are_those_of_fresh_memory_bit_for_bit_and_the_definitions(
    optimizer: str, mode: str, precision: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """23 examples in batches of 5: the last of the five batches of an epoch is ragged; three epochs are replayed."""
    workload, lanes = regression(), LANES[-size:]
    chosen = settings(
        OPTIMIZERS[optimizer], precision=precision, removal_mode=mode, clip_norm=2.0, epochs=7, evaluate=every_step(35)
    )
    start = make(workload, chosen)
    reused = further_train(start, lanes, 5)
    assert any(graph is not None for graph in start.graphs.values())
    monkeypatch.setattr(replay, "reuse", lambda module, layouts: None)
    fresh = further_train(make(workload, chosen), lanes, 5)
    assert torch.equal(reused.deltas, fresh.deltas)
    assert torch.equal(reused.distances, fresh.distances)
    tight = {"float64": 1e-11, "float32": 2e-5}[precision]
    cell = train_cell(workload, chosen, lanes[-1], 5)
    torch.testing.assert_close(reused.deltas[-1], cell.deltas, rtol=tight, atol=tight)


def _rewritten(function: Callable[..., object], *given: Tensor) -> tuple[torch.fx.GraphModule, int]:
    """The graph with reuse, and how many of its kernels write in place."""
    module = make_fx(function)(*given)
    reuse(module, layouts_of(module, given))
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    return module, sum(node.target._schema.is_mutable for node in nodes)


def _read_later(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    product = torch.mm(a, b)
    return (product.relu() + product,)


def _given_out(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    product = torch.mm(a, b)
    return product, product.relu()


def _viewed(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    product = torch.mm(a, b)
    turned = product.t()
    return product.relu(), turned.exp()


def _own_view(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    product = torch.mm(a, b)
    return (product + product.t(),)


def _spread(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return (torch.mm(a, b).sum(0, keepdim=True) + a,)


def _smaller(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return (torch.mm(a[:1], b) + a,)


def _wider(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return (torch.mm(a, b) * b.double(),)


def _argument(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return a.relu(), torch.mul(b, a)


def _otherwise_laid(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return (torch.mm(a, b).t() + a,)


def _backward_read(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    product = torch.mm(a, b)
    return torch.ops.aten.threshold_backward(product, b, 0), product * 2


@pytest.mark.parametrize(
    "function",
    [
        _read_later,
        _given_out,
        _viewed,
        _own_view,
        _spread,
        _smaller,
        _wider,
        _argument,
        _otherwise_laid,
        _backward_read,
    ],
)
def test_what_is_read_again_is_not_written_over(function: Callable[..., tuple[Tensor, ...]]) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 6, generator=generator) for _ in range(2))
    was, expected = (a.clone(), b.clone()), [t.clone() for t in function(a, b)]
    module, _ = _rewritten(function, a, b)
    for _ in range(2):
        for got, value in zip(module(a, b), expected, strict=True):
            assert torch.equal(got, value)
    assert torch.equal(a, was[0])
    assert torch.equal(b, was[1])


def test_a_layer_and_its_gradient_write_in_place() -> None:
    """A bias on either side, the rectifier and its gradient: four kernels of the six."""

    def layer(x: Tensor, weight: Tensor, bias: Tensor, back: Tensor) -> Tensor:
        hidden = (bias + torch.bmm(x, weight)).relu()
        return torch.ops.aten.threshold_backward(torch.bmm(back, weight) * bias, hidden, 0)

    given = [torch.randn(3, 5, 5), torch.randn(3, 5, 5), torch.randn(3, 1, 5), torch.randn(3, 5, 5)]
    expected = layer(*given)
    module, in_place = _rewritten(layer, *given)
    assert in_place == 4
    assert torch.equal(module(*given), expected)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_gradients_that_lie_otherwise_than_their_parameters_are_not_misread(name: str) -> None:
    """torch's fused step on a CPU reads them as if they did, and says nothing."""
    chosen = settings(Optimizer(name, lr=0.01), epochs=8, removal_mode="drop", precision="float32")
    for workload in (regression(), classification()):
        got = further_train(make(workload, chosen), [(), (3,)], 1)
        cell = train_cell(workload, chosen, (3,), 1)
        torch.testing.assert_close(got.deltas[1], cell.deltas, rtol=2e-5, atol=2e-5)
