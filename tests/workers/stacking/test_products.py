"""Products by oneDNN are the products, and change no delta beyond rounding."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fimo.workers.definition import train_cell
from fimo.workers.further_training import further_train
from fimo.workers.settings import Optimizer
from fimo.workers.stacking import fused as fusing
from fimo.workers.stacking import products
from fimo.workers.stacking.fused import fused, is_dense
from fimo.workers.stacking.layouts import layout_of, layouts_of
from tests.workers.problems import classification, every_step, make, settings

aten = torch.ops.aten
LANES = [(), (3,), (17,), (22,), (4, 9, 20)]

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")


@pytest.fixture
def gaining(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that gains by oneDNN."""
    monkeypatch.setattr(products, "gains", lambda: True)


def drawn(*shape: int, by_columns: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    if by_columns:
        *batch, rows, columns = shape
        return torch.randn(*batch, columns, rows, generator=generator).transpose(-1, -2)
    return torch.randn(*shape, generator=generator)


@pytest.mark.parametrize("left_by_columns", [False, True])
@pytest.mark.parametrize("right_by_columns", [False, True])
@pytest.mark.parametrize("shape", [(3, 31, 70, 33), (7, 128, 64, 8), (1, 90, 90, 90)])
def test_products_are_the_products_in_every_layout(
    shape: tuple[int, int, int, int], left_by_columns: bool, right_by_columns: bool
) -> None:
    count, rows, inner, columns = shape
    left = drawn(count, rows, inner, by_columns=left_by_columns)
    right = drawn(count, inner, columns, by_columns=right_by_columns)
    truth = left.double() @ right.double()
    batched = fused(layout_of(left), layout_of(right))
    assert batched is not None
    bias = drawn(columns)
    for got, expected in [
        (batched(left, right), truth),
        (products.mm(left[0], right[0]), truth[0]),
        (products.addmm(bias, left[0], right[0]), truth[0] + bias.double()),
    ]:
        assert got.is_contiguous()
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_matrices_that_are_shared_or_have_gaps_are_left_to_torch() -> None:
    assert is_dense(layout_of(drawn(3, 5, 7)))
    assert is_dense(layout_of(drawn(3, 5, 7, by_columns=True)))
    assert not is_dense(layout_of(drawn(5, 7).expand(3, 5, 7)))
    assert not is_dense(layout_of(drawn(3, 5, 9)[:, :, :7]))
    assert not is_dense(layout_of(drawn(5, 3, 7).transpose(0, 1)))
    assert fused(layout_of(drawn(100, 100).expand(3, 100, 100)), layout_of(drawn(3, 100, 100))) is None


def by_dispatch(left: Tensor, right: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A product in a model that trains alone, and in float64."""
    wide = left.double() @ right.double() + (0 if bias is None else bias.double())
    with products._ByOneDnn():
        return (torch.mm(left, right) if bias is None else torch.addmm(bias, left, right)), wide


@pytest.mark.parametrize("bias", [drawn(1).expand(64), drawn(64, 3)[:, 1], drawn(128)[::2]])
def test_a_bias_with_gaps_is_read_as_it_lies(bias: Tensor) -> None:
    """oneDNN reads it as one without: it took the numbers between, or past the end."""
    got, expected = by_dispatch(drawn(128, 256), drawn(256, 64), bias)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "right",
    [
        drawn(128, 9, 384)[:, 0],  # first tokens, as in the gradient of the layer that reads them
        drawn(128, 1).expand(128, 384),  # the gradient of a sum
        drawn(600).as_strided((128, 384), (1, 1)),  # windows, which oneDNN refused
    ],
)
def test_matrices_with_gaps_or_overlaps_are_not_given_to_onednn(right: Tensor, counted: list[str]) -> None:
    """It took a thousand times as long."""
    got, expected = by_dispatch(drawn(384, 128), right)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
    assert not counted


def test_sparse_matrices_are_left_to_torch() -> None:
    """They ended the run."""
    left, right = drawn(90, 90).relu(), drawn(90, 90)
    with products._ByOneDnn():
        got = torch.mm(left.to_sparse(), right)
    torch.testing.assert_close(got, left @ right, rtol=1e-5, atol=1e-4)


def test_only_large_float32_products_of_a_graph_are_replaced(gaining: None) -> None:
    def of(a: Tensor, b: Tensor, c: Tensor, d: Tensor, s: Tensor) -> list[Tensor]:
        large = torch.bmm(a, b)
        wide = torch.bmm(a.double(), b.double())
        shared = torch.bmm(s.expand(4, 90, 90), b)
        return [large, wide, shared, torch.bmm(c, c), torch.mm(d, d), torch.addmm(d[0], d, d), torch.addmm(d, d, d)]

    given = [drawn(4, 90, 90), drawn(4, 90, 80), drawn(4, 6, 6), drawn(90, 90), drawn(90, 90)]
    module = make_fx(of)(*given)
    products.replaced(module, layouts_of(module, given))
    targets = [n.target for n in module.graph.nodes if n.op == "call_function"]
    # One batched product of five is large, float32 and of matrices of their own. An added matrix is no bias.
    assert targets.count(aten.bmm.default) == 3
    assert (targets.count(products.mm), targets.count(products.addmm)) == (1, 1)
    assert (targets.count(aten.mm.default), targets.count(aten.addmm.default)) == (0, 1)
    for got, expected in zip(module(*given), of(*given), strict=True):
        assert got.stride() == expected.stride()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_nothing_is_replaced_on_other_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "gains", lambda: False)
    given = [drawn(90, 90)]
    module = make_fx(lambda a: torch.mm(a, a))(*given)
    products.replaced(module, layouts_of(module, given))
    assert [n.target for n in module.graph.nodes if n.op == "call_function"] == [aten.mm.default]


@pytest.mark.parametrize(
    ("vendor", "capability", "gains"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "AVX512", False),
    ],
)
def test_cpus_that_gain(monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str, gains: bool) -> None:
    monkeypatch.setattr(products, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products.gains.__wrapped__() is gains


@pytest.mark.parametrize(
    "kernel", [lambda left, right: left[:, :1] * right[:1], lambda left, right: torch.ops.no.such(left)]
)
def test_no_cpu_gains_by_a_kernel_that_is_gone_or_another(monkeypatch: pytest.MonkeyPatch, kernel) -> None:
    monkeypatch.setattr(products, "cpu_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(products, "mm", kernel)
    assert products.gains.__wrapped__() is False


def test_without_torchscript_products_stay_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> object:
        raise RuntimeError("TorchScript is gone")

    monkeypatch.setattr(torch.jit, "trace", gone)
    left, right = drawn(2, 77, 78), drawn(2, 78, 79)
    assert fused(layout_of(left), layout_of(right)) is None
    fused.cache_clear()


def test_a_kernel_that_gives_another_product_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "_product", lambda a, b: torch.matmul(a.unsqueeze(0), b.unsqueeze(0)).squeeze(0) * 1.01)
    left, right = drawn(2, 71, 72), drawn(2, 72, 73)
    assert fused(layout_of(left), layout_of(right)) is None
    fused.cache_clear()


def test_users_own_torchscript_is_fused_as_before() -> None:
    was = torch.jit.onednn_fusion_enabled()
    fused(layout_of(drawn(2, 61, 62)), layout_of(drawn(2, 62, 63)))
    assert torch.jit.onednn_fusion_enabled() is was


def test_threads_that_make_products_at_once_leave_the_fuser_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """One turned it off for the other, which made none, and on for good, for all TorchScript of the process."""
    trace, was = torch.jit.trace, torch.jit.onednn_fusion_enabled()

    def slow(*args, **options):
        time.sleep(0.1)
        return trace(*args, **options)

    monkeypatch.setattr(torch.jit, "trace", slow)
    pairs = [(drawn(2, 50 + i, 62), drawn(2, 62, 63)) for i in range(3)]
    with ThreadPoolExecutor(3) as threads:
        made = list(threads.map(lambda pair: fused(*map(layout_of, pair)), pairs))
    fused.cache_clear()
    assert torch.jit.onednn_fusion_enabled() is was
    assert None not in made


def wide(hidden: int = 300) -> nn.Module:
    """Its middle matrix is large enough for a model that trains alone, and its products for a stack."""
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 3))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which of oneDNN's products are called."""
    calls: list[str] = []

    def note(name: str, kernel, *operands: Tensor) -> Tensor:
        calls.append(name)
        return kernel(*operands)

    for name in ("mm", "addmm"):
        monkeypatch.setitem(products.FORMS, getattr(aten, name).default, partial(note, name, getattr(products, name)))
    original = fusing._fuse

    def fuse(left: Tensor, right: Tensor):
        kernel = original(left, right)
        return None if kernel is None else lambda *operands: note("bmm", kernel, *operands)

    monkeypatch.setattr(fusing, "_fuse", fuse)
    fused.cache_clear()
    yield calls
    fused.cache_clear()


@pytest.mark.parametrize(
    ("optimizer", "mode", "size"),
    [
        (Optimizer("sgd", lr=0.05), "drop", 5),
        (Optimizer("sgd", lr=0.05, momentum=0.9), "mask", 2),
        (Optimizer("adamw", lr=1e-3), "reweight", 5),
        (Optimizer("sgd", lr=0.05), "reweight", 1),
        (Optimizer("adamw", lr=1e-3), "drop", 1),
    ],
)
def test_deltas_are_those_of_torchs_products_and_the_definitions(
    optimizer: Optimizer, mode: str, size: int, gaining: None, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 examples in batches of 20: the last of an epoch's three batches is ragged."""
    workload, lanes = classification(50, 12, wide()), LANES[-size:]
    chosen = settings(
        optimizer, precision="float32", batch_size=20, removal_mode=mode, epochs=8, evaluate=every_step(24)
    )
    got = further_train(make(workload, chosen), lanes, 5)
    assert set(counted) >= ({"bmm"} if size > 1 else {"mm", "addmm"})
    again = further_train(make(workload, chosen), lanes, 5)
    assert torch.equal(got.deltas, again.deltas)
    monkeypatch.setattr(products, "gains", lambda: False)
    counted.clear()
    torchs = further_train(make(workload, chosen), lanes, 5)
    assert not counted
    cell = train_cell(workload, chosen, lanes[-1], 5)
    scale = float(got.deltas.abs().max())
    torch.testing.assert_close(got.deltas, torchs.deltas, rtol=0, atol=2e-5 * scale)
    torch.testing.assert_close(got.deltas[-1], cell.deltas, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("size", [1, 5])
def test_float64_is_left_alone(size: int, gaining: None, counted: list[str]) -> None:
    chosen = settings(batch_size=20, epochs=8)
    workload = classification(50, 12, wide())
    got = further_train(make(workload, chosen), LANES[-size:], 5)
    assert not counted
    cell = train_cell(workload, chosen, LANES[-1], 5)
    torch.testing.assert_close(got.deltas[-1], cell.deltas, rtol=1e-9, atol=1e-11)


def test_a_small_model_that_trains_alone_is_not_looked_at(gaining: None) -> None:
    small, large = (make(classification(50, 12, wide(h)), settings(precision="float32")).model for h in (200, 300))
    assert not isinstance(products.multiplied(small), torch.utils._python_dispatch.TorchDispatchMode)
    assert isinstance(products.multiplied(large), torch.utils._python_dispatch.TorchDispatchMode)
