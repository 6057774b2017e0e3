"""θ ↦ outputs, loss, measure as pure functions of the parameters; the user's model is never touched.

The model is copied once and its parameters are passed in on every call (``torch.func.functional_call``), so that the
same code serves one replica, a ``vmap`` over stacked replicas, and derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fimo.workers.errors import WorkloadError
from fimo.workers.examples import Batch, to
from fimo.workers.final_model import final_copy
from fimo.workers.settings import ALL, Trains
from fimo.workers.workload import Workload

Tensors = dict[str, Tensor]
"""Parameters or buffers by the model's own dotted names."""

PerExample = Callable[[Tensors, Batch, Tensors | None], Tensor]
"""(parameters, batch, buffers) -> one number an example, (B,): a ``FunctionalModel``'s loss or measure."""

CHANGED_LATE = (
    "changes during training but not in the first forward: replicas would share it; "
    "update it in every training-mode forward or keep it constant"
)


@contextmanager
def without_short_cut() -> Iterator[None]:
    """Let torch's transformer layers take no short cut in eval mode.

    It rounds otherwise, leaves zeros where padding is, and is taken or not depending on who looks on.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Outputs(nn.Module):
    """The workload's ``outputs`` as a module's forward, so that ``functional_call`` can substitute parameters."""

    def __init__(self, model: nn.Module, workload: Workload) -> None:
        super().__init__()
        self.model = model
        # Hide it in a tuple: an ``outputs`` that is a module itself must not become a part of this one.
        self._outputs = (workload.outputs,)

    def forward(self, batch: Batch) -> Tensor:
        return self._outputs[0](self.model, batch)


class FunctionalModel:
    """A workload's model as functions of its trainable parameters.

    Attributes:
        params: the trainable parameters (``requires_grad``) at θᶠ, each once however often it is tied.
        fixed: everything else that the forward reads: frozen parameters and buffers.
        partial: whether any parameter is frozen, so that replicas share what comes before the trained ones.
        padding: the workload's name of the tensor that masks padding.

    Args:
        workload: the model and its functions; the model is deep-copied.
        state: θᶠ as a state dict; None = the parameters the model carries. See ``fimo.workers.final_model``.
        device, dtype: where and in which floating-point type the copy lives.
        trains: what further training changes (``FurtherTraining.trains``).
    """

    def __init__(
        self,
        workload: Workload,
        state: Mapping[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        trains: Trains = ALL,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self._loss = workload.loss
        self._measure, self.trains = workload.measure or workload.loss, trains
        # In eval mode where nobody gives another: a user's model may come in train mode, in which whoever looks at an
        # output writes to the statistics of batch norm.
        self._module = _Outputs(final_copy(workload.model, state, self.device, dtype, trains), workload).eval()
        named = {n.removeprefix("model."): p for n, p in self._module.named_parameters()}
        self.params: Tensors = {n: p.detach().clone() for n, p in named.items() if p.requires_grad}
        frozen = {n: p.detach().clone() for n, p in named.items() if not p.requires_grad}
        buffers = {n.removeprefix("model."): b.detach().clone() for n, b in self._module.named_buffers()}
        self.fixed: Tensors = {**frozen, **buffers}
        self.partial, self.padding = bool(frozen), workload.padding
        for parameter in self._module.parameters():
            parameter.requires_grad_(False)
        if not self.params:
            raise WorkloadError("the model has no trainable parameter (every requires_grad is False)")

    @property
    def module(self) -> nn.Module:
        """The copied model, for looking at its layers; its own parameters are those of θᶠ."""
        return self._module.model

    @contextmanager
    def mode(self, mode: Literal["train", "eval"], norm: Literal["train", "eval"] | None = None) -> Iterator[None]:
        """Run the body with the copy in train or eval mode; ``norm`` sets batch-norm modules apart."""
        was = {m: m.training for m in self._module.modules()}
        self._module.train(mode == "train")
        if norm is not None:
            for m in self._module.modules():
                if isinstance(m, nn.modules.batchnorm._NormBase):
                    m.train(norm == "train")
        try:
            with without_short_cut():
                yield
        finally:
            for m, training in was.items():
                m.training = training

    @contextmanager
    def buffers_kept(self) -> Iterator[None]:
        """Refuse a body that writes to what all replicas and runs share.

        Raises:
            WorkloadError: on leaving, if a frozen parameter or a buffer was written to.
        """
        before = {name: tensor._version for name, tensor in self.fixed.items()}
        yield
        for name, tensor in self.fixed.items():
            if tensor._version != before[name]:
                raise WorkloadError(f"buffer '{name}' {CHANGED_LATE}")

    def outputs(self, params: Tensors, batch: Batch, fixed: Tensors | None = None) -> Tensor:
        """``outputs(model(θ), batch)``, shape (B, …).

        A training-mode forward leaves the new buffers in ``fixed``: it updates them in place (batch norm), and those
        that it assigns anew replace the entry of the dict.
        """
        given = dict(self.fixed) if fixed is None else fixed
        values = {f"model.{n}": t for n, t in {**given, **params}.items()}
        out: Tensor = functional_call(self._module, values, (batch,))
        for name in given:
            given[name] = values[f"model.{name}"]
        return out

    def loss_of_outputs(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The workload's per-example loss of given outputs, shape (B,)."""
        return self._loss(outputs, batch)

    def measure_of_outputs(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The workload's measure of given outputs, shape (B,), as ``measure`` has it."""
        return _widely(self._measure, outputs, batch)

    def loss(self, params: Tensors, batch: Batch, fixed: Tensors | None = None) -> Tensor:
        """Per-example training losses ℓ_i(θ), shape (B,)."""
        return self._loss(self.outputs(params, batch, fixed), batch)

    def measure(self, params: Tensors, batch: Batch, fixed: Tensors | None = None) -> Tensor:
        """g(z, θ) per evaluation example, shape (B,), float64: the outputs are cast before the measure.

        A float32 loss near 1e-8 loses the small differences that are the product.
        """
        return self._wide(self._measure, params, batch, fixed)

    def wide_loss(self, params: Tensors, batch: Batch, fixed: Tensors | None = None) -> Tensor:
        """ℓ_i(θ) per training example, shape (B,), float64, as the measure has it: for losses that are recorded."""
        return self._wide(self._loss, params, batch, fixed)

    def _wide(
        self, function: Callable[[Tensor, Batch], Tensor], params: Tensors, batch: Batch, fixed: Tensors | None
    ) -> Tensor:
        out = self.outputs(params, batch, fixed)
        return _widely(function, out, batch)


def _widely(function: Callable[[Tensor, Batch], Tensor], outputs: Tensor, batch: Batch) -> Tensor:
    wide = outputs.to(torch.float64) if outputs.is_floating_point() else outputs
    return function(wide, to(batch, dtype=torch.float64))
