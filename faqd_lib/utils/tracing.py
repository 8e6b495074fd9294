"""Whether torch only runs operations, or does something else with them."""

import torch
from torch import Tensor


def is_traced(x: Tensor) -> bool:
    """Whether torch records, transforms, counts or imitates operations on ``x`` instead of only running them."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(x) not in (Tensor, torch.nn.Parameter)
    )
