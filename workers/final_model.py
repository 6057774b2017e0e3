"""θᶠ: read from a ``.safetensors`` state dict, held against the model, put into a copy; nothing is unpickled."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from fimo.workers.errors import WorkloadError
from fimo.workers.settings import ALL, Trains
from fimo.workers.trainable import named, restrict, without_adapters


def read_final_model(data: bytes, name: str) -> dict[str, Tensor]:
    """Parse safetensors bytes.

    Raises:
        WorkloadError: the bytes are something else (a pickle renamed, a torn download).
    """
    try:
        return load(data)
    except (SafetensorError, ValueError, OverflowError, KeyError) as error:
        raise WorkloadError(f"final model {name} is not a valid safetensors file; save it with safetensors") from error


def check_fits(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Refuse a θᶠ whose names or shapes are not the model's; tied parameters may be given once.

    Raises:
        WorkloadError: names the first missing, unexpected or misshapen parameter.
    """
    own = model.state_dict(keep_vars=True)
    unexpected = sorted(set(state) - set(own))
    if unexpected:
        raise WorkloadError(f"final model {name} does not fit: the model has no '{unexpected[0]}'{_more(unexpected)}")
    given = {id(own[key]) for key in state}
    missing = sorted(key for key, tensor in own.items() if key not in state and id(tensor) not in given)
    if missing:
        raise WorkloadError(f"final model {name} does not fit: it lacks '{missing[0]}'{_more(missing)}")
    first: dict[int, str] = {}
    for key, tensor in state.items():
        tied = first.setdefault(id(own[key]), key)
        if tied != key and not torch.equal(tensor, state[tied]):
            raise WorkloadError(f"final model {name} does not fit: '{key}' and '{tied}' are one parameter, and differ")
        if tensor.shape != own[key].shape:
            shapes = f"{tuple(tensor.shape)}, the model's is {tuple(own[key].shape)}"
            raise WorkloadError(f"final model {name} does not fit: '{key}' has shape {shapes}")
        if tensor.is_floating_point() != own[key].is_floating_point():
            raise WorkloadError(f"final model {name} does not fit: '{key}' is {tensor.dtype}, not {own[key].dtype}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise WorkloadError(f"final model {name} has values in '{key}' that are not finite")


def final_copy(
    model: nn.Module,
    state: Mapping[str, Tensor] | None,
    device: torch.device | str,
    dtype: torch.dtype,
    trains: Trains = ALL,
) -> nn.Module:
    """A copy of the user's model at θᶠ; the user's own is never touched.

    Args:
        state: θᶠ, None = the parameters that the model carries.
        device, dtype: of the copy's floating-point tensors.
        trains: what further training changes: it alone requires a gradient, adapters are put in.

    Raises:
        WorkloadError: the copy would be another model: complex numbers lose their imaginary part in the cast, and
            the hooks of a parameter (a gradient mask) stay behind. Or it cannot be made (TorchScript). Or the model
            is an architecture alone, on torch's meta device, and ``state`` does not have all its numbers.
    """
    _refuse_what_a_copy_loses(model)
    state = None if state is None else without_adapters(state)
    absent = _absent(model, state)
    # weight_norm and spectral_norm leave a computed tensor on their module, which deepcopy does not take.
    computed = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    # One new tensor for each absent one, however often it is tied.
    memo = absent | {id(t): t.detach().clone() for t in computed}
    copied = copy.deepcopy(model, memo)
    # Put adapters in before the cast: a float64 sweep starts from the same ones.
    restrict(copied, trains)
    copied.to(device=device, dtype=dtype)
    for module in copied.modules():
        # Ask for dense gradients, the same with their zeros: vmap and most optimizers take no others.
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False
    if state is not None:
        # Load after the cast: a float64 θᶠ must not be rounded through the model's own float32.
        copied.load_state_dict(named(copied, state), strict=False)
    return copied


def _absent(model: nn.Module, state: Mapping[str, Tensor] | None) -> dict[int, Tensor]:
    """Room for the tensors that a model on the meta device has the shapes of and no numbers for, by their ids."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    absent = {name: tensor for name, tensor in own.items() if tensor.is_meta}
    if absent and state is None:
        raise WorkloadError(
            "the workload's model is an architecture without parameters (meta device): name a final model "
            "(final_model: FILE.safetensors, in Python state=), or start a shipped workload from scratch "
            "(workload_args: {initial: SEED})"
        )
    every = model.state_dict(keep_vars=True)
    given = {id(every[name]) for name in state or {} if name in every}
    missing = [name for name, tensor in absent.items() if id(tensor) not in given]
    if missing:
        raise WorkloadError(f"'{missing[0]}'{_more(missing)} is on the meta device and not in the final model")
    room: dict[int, Tensor] = {}
    for tensor in absent.values():
        empty = torch.empty_like(tensor, device="cpu")
        as_parameter = isinstance(tensor, nn.Parameter)
        room[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if as_parameter else empty
    return room


def _refuse_what_a_copy_loses(model: nn.Module) -> None:
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise WorkloadError("a TorchScript module cannot be given other parameters: bring the module it was made from")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_complex():
            raise WorkloadError(
                f"'{name}' is complex: further training is of real parameters and buffers; keep real and imaginary "
                "part apart (torch.view_as_complex in the forward)"
            )
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            raise WorkloadError(
                f"'{name}' has a hook on its gradient, which no copy of the model keeps: do it in the forward "
                "(a mask times the parameter), or freeze the parameter"
            )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
