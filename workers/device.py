"""Devices and determinism: what a gold-standard run must fix before it computes anything."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic

from fimo.workers.memory import keep_freed_memory

torch_deterministic: Any = torch.utils.deterministic


def pick_device(gpus: float) -> torch.device:
    """CUDA if the task was given a GPU and there is one, else the CPU."""
    return torch.device("cuda", 0) if gpus > 0 and torch.cuda.is_available() else torch.device("cpu")


def is_gpu(device: torch.device) -> bool:
    """Whether kernels run apart from the host, which waits for them only when it reads."""
    return device.type not in ("cpu", "meta")


def device_name(device: torch.device) -> str:
    """The device type a result depends on: the GPU's name, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{_cpu_name()} ({torch.get_num_threads()} threads)"


def clock(device: torch.device) -> Callable[[], float]:
    """What to read seconds of a device from: twice, the difference is what was spent.

    On a CPU with one thread the process's own CPU time: wall time would count the machine's other processes. A GPU must
    be synchronized before it is read.
    """
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time
    return time.perf_counter


def memory(device: torch.device) -> int:
    """Bytes of a GPU that this process may fill, whatever is there now; 0 on a CPU. The same on GPUs of one type."""
    if device.type != "cuda":
        return 0
    total = torch.cuda.get_device_properties(device).total_memory
    return int(total * torch.cuda.get_per_process_memory_fraction(device))


def forget_peak(device: torch.device) -> None:
    """Measure a GPU's ``peak`` and ``peak_reserved`` anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """The most bytes that this process's tensors have taken on a GPU since ``forget_peak``; 0 on a CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


def peak_reserved(device: torch.device) -> int:
    """As ``peak``, with what torch holds for recorded steps and between tensors; 0 on a CPU."""
    return int(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else 0


def room(device: torch.device) -> int:
    """Bytes that this process's tensors can take on a GPU, those that they have taken among them; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return int(min(free + torch.cuda.memory_reserved(device), share * total))


def free(device: torch.device) -> int:
    """Bytes that tensors to come can take on a GPU: what torch holds between tensors is as good as free; 0 on a CPU."""
    return max(0, room(device) - torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0


def cpu_vendor() -> str:
    """The CPU's maker as the CPU says it, such as "GenuineIntel"; empty where it is not known."""
    return _cpu_line("vendor_id")


def _cpu_name() -> str:
    return _cpu_line("model name") or platform.processor() or platform.machine() or "CPU"


def _cpu_line(what: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(what)), "")


def prepare_environment() -> None:
    """Set what must be set early: CUDA reads its variable once, when it starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    keep_freed_memory()


PRECISIONS = (
    ("generic", "all"),
    *((backend, part) for backend in ("cuda", "mkldnn") for part in ("all", "matmul", "conv", "rnn")),
)
"""Where torch's newer switches say in what float32 is multiplied, whoever is asked first, first."""


@contextmanager
def _full_float32() -> Iterator[None]:
    """No product or convolution of float32 in TF32 or bfloat16, by whichever switches they were asked for.

    torch has older switches, and newer ones that only they who never touched the older can read.
    """
    matmul = _older(torch.get_float32_matmul_precision, "highest")
    cudnn = _older(lambda: torch.backends.cudnn.allow_tf32, True)
    switches: Any = torch._C
    newer = list[tuple[tuple[str, str], str]]()
    for place in PRECISIONS if hasattr(switches, "_set_fp32_precision_setter") else ():
        # A place where nothing is said is read as what it is in: that is emptied first.
        newer.append((place, switches._get_fp32_precision_getter(*place)))
        switches._set_fp32_precision_setter(*place, "none")
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
        for place, value in newer:
            switches._set_fp32_precision_setter(*place, value)


def _older(read: Callable[[], Any], usual: Any) -> Any:
    """An older switch, which torch refuses to read where a newer one says otherwise: it then is as it was at first."""
    try:
        return read()
    except RuntimeError:
        return usual


@contextmanager
def deterministic(device: torch.device) -> Iterator[dict[str, object]]:
    """Deterministic algorithms, no TF32, no autotuning and a private random state inside the body; restored after.

    Yields:
        The flags as recorded in a part's provenance.
    """
    prepare_environment()
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    fill = torch_deterministic.fill_uninitialized_memory
    devices = [device.index or 0] if device.type == "cuda" else []
    try:
        torch.use_deterministic_algorithms(True)
        # Do not fill fresh memory: it costs a write of every tensor and changes no result.
        torch_deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = False
        with _full_float32(), torch.random.fork_rng(devices=devices):
            yield {"deterministic_algorithms": True, "tf32": False, "cudnn_benchmark": False}
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        torch_deterministic.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark
