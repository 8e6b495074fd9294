"""The quantized ReLU: low-bit activations with a learned step."""

import functools
import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..utils.messages import check_choice
from .relu_kernels import SMALLEST_STEP, quantized_relu
from .step_search import best_step
from .weights import ACTIVATION_BITS

torch.fx.wrap("quantized_relu")  # traced by torch.fx, a call of it stays one node

STEP_GRADIENTS = ("lsq", "coarse", "frozen")


@functools.cache
def gaussian_step(highest: int) -> float:
    """The least-squares step of {0..highest} for the positive part of N(0, 1), on 2,001 quantiles."""
    quantiles = torch.linspace(0.5, 1, 2003, dtype=torch.float64)[1:-1]
    return float(best_step((math.sqrt(2) * torch.erfinv(2 * quantiles - 1)).unsqueeze(0), highest))


class QuantizedReLU(nn.Module):
    """A ReLU with 2^bits output values {0..Q}·α, Q = 2^bits − 1, and a learned step α.

    Forward: ``α·round(clip(x/α, 0, Q))``. Rounding is to the nearest level; rounding up would add half a step on
    average. Backward to x: straight through inside (0, Qα), 0 outside. Backward to α, summed over all elements:

    - ``"lsq"`` (Esser et al. 2020): 0 below the range, round(x/α) − x/α inside, Q above. The sum is scaled by
      1/√(F·Q), so that the step learns at the pace of a weight. F is the number of elements of one image. The batch
      size is left out, since the gradient of a mean over images does not grow with it.
    - ``"coarse"`` (Yin et al. 2019): 0 below the range, 2^(bits−1) inside, Q above, with the same scale. Blended coarse
      gradient descent, the paper's line of work, uses these values.
    - ``"frozen"``: no gradient. The step keeps the value from :meth:`fit`, as in the released code.

    Example for 4 bits, α = 0.1 and one image: (−1, 0.26, 9) → (0, 0.3, 1.5). The gradients to α are (0, 0.4, 15) for
    LSQ and (0, 8, 15) for coarse, each times 1/√45.

    ``step`` starts at the least-squares optimum for standard normal input, and :meth:`fit` sets it from data.
    In a network the quantized ReLU stands in place of the module ``replaces``, which dequantizing puts back.

    Raises:
        ValueError: ``bits`` outside 1 to 8, or an unknown ``step_gradient``.
    """

    def __init__(
        self, bits: int, step_gradient: Literal["lsq", "coarse", "frozen"] = "lsq", replaces: nn.Module | None = None
    ) -> None:
        super().__init__()
        check_choice("activation_bits", bits, ACTIVATION_BITS)
        check_choice("step_gradient", step_gradient, STEP_GRADIENTS)
        self.bits, self.step_gradient = bits, step_gradient
        self.highest = 2**bits - 1
        self.compiled = False  # see faqd_lib.quantization.network.compile_activations
        self.step = nn.Parameter(torch.tensor(gaussian_step(self.highest), dtype=torch.float32))
        self.__dict__["replaces"] = nn.ReLU() if replaces is None else replaces  # no submodule: not in use

    @property
    def is_initial(self) -> bool:
        """Whether the step still has its first value: neither fitted nor trained."""
        return bool(self.step.detach().cpu() == torch.tensor(gaussian_step(self.highest), dtype=self.step.dtype))

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.ReLU: callers may give it by name
        step = self.step.detach() if self.step_gradient == "frozen" else self.step
        coarse, compiled = self.step_gradient == "coarse", self.compiled and self.training
        return quantized_relu(input, step, self.highest, coarse, compiled)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set the step to the least-squares optimum for a :func:`sample` of ``x``.

        If no value is positive, any step is right. An initial step then changes in its last digits, so that
        :attr:`is_initial` becomes False.

        Raises:
            ValueError: ``x`` holds NaN or an infinity.
        """
        positive = sample(x).clamp_min(0)
        if bool(positive.any()):
            step = best_step(positive.unsqueeze(0), self.highest).squeeze()
            if not bool(step.isfinite()):
                raise ValueError("cannot fit a step to activations that hold NaN or an infinity")
            self.step.copy_(step.clamp_min(SMALLEST_STEP))
        elif self.is_initial:
            self.step.mul_(1 + 2 * torch.finfo(self.step.dtype).eps)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, step_gradient={self.step_gradient!r}"


def sample(x: Tensor) -> Tensor:
    """All values of ``x``, or a seeded random sample of 65,536 values; flat, float32 at least."""
    values = x.detach().flatten()
    if values.numel() > 2**16:  # a regular pattern would meet the same image columns again and again
        chosen = torch.randint(values.numel(), (2**16,), generator=torch.Generator().manual_seed(0))
        values = values[chosen.to(x.device)]
    return values.to(torch.promote_types(x.dtype, torch.float32))
