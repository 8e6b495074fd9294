"""Weight quantizers: modules that map float weights to low-bit ones, with straight-through gradients.

:mod:`faqd_lib.quantization.network` puts them into networks.
"""

import math

import torch
from torch import Tensor, nn

from ..utils.messages import check_choice
from .step_search import best_step, nearest_levels

WEIGHT_BITS = ACTIVATION_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
FLOAT_BITS = 32


class _StraightThrough(torch.autograd.Function):
    """Forward: the given quantized values. Backward: the gradient unchanged, to the float values."""

    generate_vmap_rule = True  # for gradients of single images by torch.func

    @staticmethod
    def forward(values, quantized):
        return quantized

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class WeightQuantizer(nn.Module):
    """A map from float weights to at most 2^bits values s·q, q integer; the gradient passes straight through.

    The tensor has one scale s, as in the paper, or each output channel has one. Output channels lie along
    ``channel_dim``: 0 for Conv2d and Linear, 1 for ConvTranspose2d. Scales are no parameters: :meth:`fit` of the
    subclasses computes them from the weights, in float64. Quantizing quantized weights again leaves them unchanged, in
    float16 and bfloat16 to one unit in the last place.
    """

    bits: int

    def __init__(self, per_channel: bool = False, channel_dim: int = 0) -> None:
        super().__init__()
        self.per_channel, self.channel_dim = per_channel, channel_dim

    def fit(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scale ≥ 0 and integer levels of each row (rows, n), by least squares: (rows, 1) and (rows, n), float64."""
        raise TypeError(f"{type(self).__name__} does not define fit")

    def levels(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and integer levels of a weight tensor; ``scale·levels`` is the quantized weight.

        Both are float32, or float64 for float64 weights. Levels have the shape of ``weight``. The scale is a scalar.
        Per channel it has C_out values along ``channel_dim``, and size 1 along all other dimensions of the weight.

        Raises:
            ValueError: the weight is empty, or holds NaN or an infinity. NaN and infinities are found on the CPU only,
                since elsewhere the check would make every step wait for the device.
        """
        if weight.numel() == 0:
            raise ValueError(f"cannot quantize an empty weight of shape {tuple(weight.shape)}")
        channels = self.per_channel and weight.ndim > 0
        first = weight.movedim(self.channel_dim, 0) if channels else weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        # float64, because rival steps of a uniform grid differ in the last digits of a sum, and squares may overflow.
        scale, levels = self.fit(first.reshape(len(first) if channels else 1, -1).double())
        scale, levels = scale.to(dtype), levels.to(dtype)
        if weight.device.type == "cpu" and not torch.compiler.is_compiling() and not math.isfinite(float(scale.amax())):
            raise ValueError(
                f"cannot quantize a weight of shape {tuple(weight.shape)} that holds NaN or an infinity: the training "
                "diverged (lower the learning rate), or the checkpoint is damaged"
            )
        if not channels:
            return scale.reshape(()), levels.reshape(weight.shape)
        scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
        return scale.movedim(0, self.channel_dim), levels.reshape(first.shape).movedim(0, self.channel_dim).contiguous()

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            if torch.compiler.is_dynamo_compiling() and type(self) in (BinaryWeight, TernaryWeight, UniformWeight):
                quantized = _quantized_weight(weight, self.bits, self.per_channel, self.channel_dim)
            else:
                quantized = low_bit_values(*self.levels(weight), weight.dtype)
        return _StraightThrough.apply(weight, quantized)

    def extra_repr(self) -> str:
        return f"bits={self.bits}{', per channel' if self.per_channel else ''}"


def low_bit_values(scale: Tensor, levels: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale · levels`` in ``dtype``: the weight that a layer computes with."""
    values = scale * levels
    if dtype == torch.float16:  # scale·levels may exceed the range
        values.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return values.to(dtype)


class BinaryWeight(WeightQuantizer):
    """1 bit: ``α·sign(w)`` with α = mean|w|, the least-squares scale (Rastegari et al. 2016, XNOR-Net).

    sign(0) is +1, so that only two values occur. Example: (−3, 1, 2) → (−2, 2, 2).
    """

    bits = 1

    def fit(self, rows):
        return rows.abs().mean(1, keepdim=True), (rows < 0).to(rows.dtype).mul_(-2).add_(1)


class TernaryWeight(WeightQuantizer):
    """2 bits, values {−s, 0, s}: weights with |w| ≥ 0.7·mean|w| are kept, s = mean|w| over the kept ones.

    This s is the least-squares scale for the kept weights (Li et al. 2016, Ternary Weight Networks).
    Example: (−3, 0.2, 1, 2) → threshold 1.085 → (−2.5, 0, 0, 2.5).
    """

    bits = 2

    def fit(self, rows):
        magnitude = rows.abs()
        # With ≥ an all-zero row keeps its weights, so that the scale is 0 and not 0/0.
        kept = magnitude >= 0.7 * magnitude.mean(1, keepdim=True)
        scale = (magnitude * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
        return scale, rows.sign() * kept


class UniformWeight(WeightQuantizer):
    """b bits, 3 to 8: levels {−L..L}·s, L = 2^(b−1) − 1, with the least-squares s of :func:`best_step`.

    Example, 4 bits: (−0.7, 0.1, 0.3) → s = 0.1, levels (−7, 1, 3). Other bits raise ValueError.
    """

    def __init__(self, bits: int, per_channel: bool = False, channel_dim: int = 0) -> None:
        super().__init__(per_channel, channel_dim)
        if not 3 <= bits <= 8:
            raise ValueError(f"UniformWeight has 3 to 8 bits, got {bits}")
        self.bits = bits
        self.highest = 2 ** (bits - 1) - 1

    def fit(self, rows):
        step = best_step(rows.abs(), self.highest)
        levels = nearest_levels(rows, step, -self.highest, self.highest)
        peak = rows.abs().amax(1, keepdim=True)
        unit = rows / torch.where(peak > 0, peak, 1)  # products neither overflow nor vanish
        energy = levels.square().sum(1, keepdim=True)
        return peak * (unit * levels).sum(1, keepdim=True) / energy.clamp_min(1), levels


def weight_quantizer(bits: int, per_channel: bool = False, channel_dim: int = 0) -> WeightQuantizer:
    """The weight quantizer for 1 to 8 bits; ValueError for any other number."""
    check_choice("weight_bits", bits, WEIGHT_BITS)
    if bits <= 2:
        return (BinaryWeight, TernaryWeight)[bits - 1](per_channel, channel_dim)
    return UniformWeight(bits, per_channel, channel_dim)


@torch.library.custom_op("faqd::quantized_weight", mutates_args=())
def _quantized_weight(weight: Tensor, bits: int, per_channel: bool, channel_dim: int = 0) -> Tensor:
    """Quantized weight as one opaque operation, so that compiling a network leaves the values' bits unchanged."""
    return low_bit_values(*weight_quantizer(bits, per_channel, channel_dim).levels(weight), weight.dtype)


@_quantized_weight.register_fake
def _(weight, bits, per_channel, channel_dim=0):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)
