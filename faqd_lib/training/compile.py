"""Networks compiled by ``torch.compile``: normalisation, ReLU and sum of a layer in one pass over memory.

Results differ from those of an ordinary network in the last digits, because fused operations do not round in between.
They still repeat to the bit, alone and in a cohort.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from ..utils.messages import first_line


class CompilationError(RuntimeError):
    """A network cannot be compiled on this machine; the message says why and what to do."""


def compile_network(model: nn.Module, training: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that calls ``model``, compiled as a whole at its first call, for input of one shape.

    The network's quantized ReLUs become part of what is compiled. The network itself can still be called.

    Args:
        model: of static control flow, on its device. Hooks of :class:`~faqd_lib.models.FeatureTap` keep working.
        training: whether the function computes gradients. Without gradients, parameters and statistics are folded at
            the first call; they must not change afterwards.

    Raises:
        CompilationError: compiling is switched off; or, from the first call, there is no compiler.
    """
    if torch._dynamo.config.disable:
        raise CompilationError(
            "the run asks for compiled passes (compile = true), but TORCH_COMPILE_DISABLE switches compiling off: "
            "unset it, or set compile = false"
        )
    # Imported here because it takes seconds.
    from torch._inductor import config as inductor
    from torch._inductor.exc import GPUTooOldForTriton, TritonMissing

    # Deterministic, because a choice of kernels by timing may change from run to run. Sums depend on the number of
    # threads. As a setting that number is part of the key of every torch version's cache.
    options = {"deterministic": True, "freezing": not training, "cpp.threads": torch.get_num_threads()}

    def whole(x: torch.Tensor) -> torch.Tensor:
        return model(x)

    # A code object of its own: torch counts compilations by code object, and gives up after eight.
    whole.__code__ = whole.__code__.replace()
    compiled = torch.compile(whole, fullgraph=True, dynamic=False, options=options)

    def call(x: torch.Tensor) -> torch.Tensor:
        try:
            # The options come too late for freezing, hence the patch. They do reach the backward pass, compiled later.
            with inductor.patch(freezing=not training), nullcontext() if training else torch.no_grad():
                return compiled(x)
        except (torch._dynamo.exc.BackendCompilerFailed, TritonMissing, GPUTooOldForTriton) as error:
            reason = first_line(getattr(error, "inner_exception", error))
            raise CompilationError(
                f"{type(model).__name__} cannot be compiled ({reason}): install a C++ compiler (g++ or clang; the "
                "variable CXX names another one), on CUDA also Triton; or set compile = false"
            ) from error

    return call
