"""Passes through a network by ``torch.compile``: each layer's normalisation, ReLU and sum in one pass over memory.

The numbers are others in the last digits, because what is computed in one go is not rounded in between. They repeat to
the bit all the same, and are those of the network whether it trains alone or beside others.
"""

import types
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from ..quantization.weights import QuantizedReLU


class CompilationError(RuntimeError):
    """A network cannot be compiled here; the message says why and what to do."""


def compiled(model: nn.Module, training: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that calls ``model``, compiled as one whole at its first call, for input of one shape.

    Args:
        model: of static control flow, on its device. Hooks of :class:`~faqd_lib.models.FeatureTap` stay at work.
        training: whether gradients are wanted. If not, there are none, and the network's parameters and statistics must
            stay as they are from the first call on: they are folded into one another.

    The network's quantized ReLUs are marked: they will be part of what is compiled. It can be called as before.

    Raises:
        CompilationError: from here where compiling is switched off, from the first call where there is no compiler.
    """
    if torch._dynamo.config.disable:
        raise CompilationError(
            "the run's passes are to be compiled (compile = true), but TORCH_COMPILE_DISABLE switches that off: unset "
            "it, or set compile = false"
        )
    for module in model.modules():
        if isinstance(module, QuantizedReLU):
            module.compiled = True
    # Seconds, which not every import of this module should cost.
    from torch._inductor import config as inductor
    from torch._inductor.exc import GPUTooOldForTriton, TritonMissing

    # Deterministic: what is chosen by timing candidates may be another one the next time. The number of threads, which
    # sums depend on, is part of what every version of torch looks up in its cache only where it is a setting.
    options = {"deterministic": True, "freezing": not training, "cpp.threads": torch.get_num_threads()}

    def whole(x: torch.Tensor) -> torch.Tensor:
        return model(x)

    work = torch.compile(_own_code(whole), fullgraph=True, dynamic=False, options=options)

    def call(x: torch.Tensor) -> torch.Tensor:
        try:
            # The options reach the backward pass, too, which is compiled later, but come too late for freezing.
            with inductor.patch(freezing=not training), nullcontext() if training else torch.no_grad():
                return work(x)
        except (torch._dynamo.exc.BackendCompilerFailed, TritonMissing, GPUTooOldForTriton) as error:
            inner = getattr(error, "inner_exception", error)
            reason = f"{type(inner).__name__}: {inner}".splitlines()[0]
            raise CompilationError(
                f"{type(model).__name__} cannot be compiled ({reason}): a C++ compiler that works (g++ or clang; the "
                "variable CXX names another) is needed, on CUDA Triton, too; or set compile = false"
            ) from error

    return call


def _own_code(function: Callable) -> Callable:
    """The same with a code object of its own: torch counts by these how often it compiles, and gives up after eight."""
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, closure=function.__closure__
    )
