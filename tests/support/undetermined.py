"""Refuses, on a CPU, the kernels of which torch has no deterministic form on a GPU: there they end the run.

After the list of ``torch.use_deterministic_algorithms``; what it says of a tensor that is differentiated is told by the
kernel of its backward.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

REFUSED = frozenset(
    f"aten::{name}"
    for name in (
        *("avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
        *("adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward"),
        *("max_unpool2d", "max_unpool3d", "grid_sampler_2d_backward", "grid_sampler_3d_backward"),
        *("upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward"),
        *("upsample_trilinear3d_backward", "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward"),
        *("reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward"),
        *("_ctc_loss_backward", "put_", "put", "histc"),
    )
)
OF_NUMBERS = {"aten::cumsum", "aten::cumsum_"}
OF_A_SUM = {"aten::nll_loss2d_forward": 3}
"""Where the reduction stands among the arguments; 0 is none."""


class Undetermined(RuntimeError):
    """A kernel that a GPU would refuse."""


class Determined(TorchDispatchMode):
    """Inside it they are refused."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        refused = name in REFUSED or (name == "aten::median" and len(args) > 1)
        if name in OF_NUMBERS:
            out = kwargs.get("dtype") if kwargs else None
            refused = (out or args[0].dtype).is_floating_point
        elif name in OF_A_SUM:
            refused = args[OF_A_SUM[name]] != 0
        elif name == "aten::bincount":
            refused = len(args) > 1 and isinstance(args[1], Tensor)
        if refused:
            raise Undetermined(f"{func} has no deterministic form on a GPU")
        return func(*args, **(kwargs or {}))
