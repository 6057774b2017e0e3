"""float32 is multiplied in float32, by whichever of torch's switches something else was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from fimo.workers.device import PRECISIONS, deterministic

if not hasattr(torch._C, "_get_fp32_precision_getter"):
    pytest.skip("this torch has no newer switches", allow_module_level=True)
read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter


def set_(of: object, name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(of, name, value)


ASKED = {
    "nothing": lambda: None,
    "all of torch": set_(torch.backends, "fp32_precision", "tf32"),
    "all of CUDA": set_(torch.backends.cudnn, "fp32_precision", "tf32"),
    "products on CUDA": set_(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "products on CUDA, by the older switch": set_(torch.backends.cuda.matmul, "allow_tf32", True),
    "products": lambda: torch.set_float32_matmul_precision("medium"),
    "convolutions on CUDA": set_(torch.backends.cudnn.conv, "fp32_precision", "tf32"),
    "no convolutions on CUDA": set_(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "convolutions on CUDA, by the older switch": set_(torch.backends.cudnn, "allow_tf32", True),
    "products on a CPU": lambda: write("mkldnn", "matmul", "bf16"),
    "convolutions on a CPU": lambda: write("mkldnn", "conv", "bf16"),
    "all on a CPU": lambda: write("mkldnn", "all", "tf32"),
}


def status() -> list[object]:
    found: list[object] = [read(*place) for place in PRECISIONS]
    for switch in (torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32):
        try:
            found.append(switch())
        except RuntimeError:
            found.append(None)
    return found


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    raw = []
    for place in PRECISIONS:
        raw.append(read(*place))
        write(*place, "none")
    for place, value in zip(PRECISIONS, raw, strict=True):
        write(*place, value)
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for place, value in zip(PRECISIONS, raw, strict=True):
        write(*place, value)


@pytest.mark.parametrize("what", ASKED)
def test_float32_is_float32_and_what_was_asked_for_is_restored(what: str) -> None:
    ASKED[what]()
    before = status()
    with deterministic(torch.device("cpu")):
        assert {read(*place) for place in PRECISIONS} <= {"none", "ieee"}
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert status() == before
