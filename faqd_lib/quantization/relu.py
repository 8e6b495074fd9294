"""The quantized ReLU: low-bit activations with a learned step."""

import functools
import math
from typing import Literal

import torch
from torch import nn

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

    Forward: ``α·round(clip(x/α, 0, Q))`` (nearest, not up: rounding up would add half a step on average).
    Backward to x: straight through inside (0, Qα), 0 outside. Backward to α, summed over all elements:

    - ``"lsq"`` (Esser et al. 2020): 0 below the range, round(x/α) − x/α inside, Q above; times 1/√(F·Q), F the number
      of features (elements of one image: all dimensions but the first), so that the step learns at the pace of a
      weight. The images of a batch do not count in F: a loss is their mean, its gradient does not grow with them;
    - ``"coarse"`` (Yin et al. 2019, blended coarse gradient descent; the paper's line of work): three values,
      0 below, 2^(bits−1) inside, Q above; with the same scale;
    - ``"frozen"``: none. The step stays what :meth:`fit` made it, as it does in the released code.

    Example, 4 bits, α = 0.1, one image: (−1, 0.26, 9) → (0, 0.3, 1.5); LSQ's gradients to α (0, 0.4, 15), coarse
    (0, 8, 15), each times 1/√45.

    ``step`` starts at the least-squares optimum for standard normal input; :meth:`fit` sets it from data. In a network
    the quantized ReLU replaces the module ``replaces``, which comes back when the network is dequantized.

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
        self.__dict__["replaces"] = nn.ReLU() if replaces is None else replaces  # not a submodule: it is not in use

    @property
    def is_coarse(self) -> bool:
        """Whether the step has the coarse gradient."""
        return self.step_gradient == "coarse"

    @property
    def is_initial(self) -> bool:
        """Whether the step was neither fitted nor trained."""
        return bool(self.step.detach().cpu() == torch.tensor(gaussian_step(self.highest), dtype=self.step.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = self.step.detach() if self.step_gradient == "frozen" else self.step
        return quantized_relu(x, step, self.highest, self.is_coarse, self.compiled and self.training)

    @torch.no_grad()
    def fit(self, x: torch.Tensor) -> None:
        """Set the step to the least-squares optimum for ``x``; left as it is if nothing in ``x`` is positive.

        Only a sample of many values is used; see :func:`sample`.

        Raises:
            ValueError: ``x`` holds NaN or an infinity.
        """
        positive = sample(x).clamp_min(0)
        if bool(positive.any()):
            step = best_step(positive.unsqueeze(0), self.highest).squeeze()
            if not bool(step.isfinite()):
                raise ValueError("cannot fit a step to activations that hold NaN or an infinity")
            self.step.copy_(step.clamp_min(SMALLEST_STEP))

    def extra_repr(self) -> str:
        return f"bits={self.bits}, step_gradient={self.step_gradient!r}"


def sample(x: torch.Tensor, most: int = 65536) -> torch.Tensor:
    """All values of ``x`` or a seeded random sample of ``most``, flat, float32 at least.

    A regular pattern would meet the same image columns again and again.
    """
    values = x.detach().flatten()
    if values.numel() > most:
        chosen = torch.randint(values.numel(), (most,), generator=torch.Generator().manual_seed(0))
        values = values[chosen.to(x.device)]
    return values.to(torch.promote_types(x.dtype, torch.float32))
