"""Quantizers: low-bit weights and activations as small modules, with straight-through gradients to the float values.

Nothing here knows of networks; :mod:`faqd_lib.quantization.network` puts quantizers into them.
"""

import functools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from .relu_kernels import SMALLEST_STEP, quantized_relu

WEIGHT_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
ACTIVATION_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
FLOAT_BITS = 32
STEP_GRADIENTS = ("lsq", "coarse", "frozen")

_EXACT = 2**13  # values times levels of a row, at most, for an exact search of its step; longer ones are scanned
_EXACT_CUDA = 2**20  # the same of all rows together: there sorting is cheap, and a scan's many small kernels are not
_FOLD = 1024  # numbers that one block of CUDA's sums up
_FEW = 128  # distinct magnitudes, at most, of a longer row that is searched exactly, too: what 8 bits can have
_OCTAVES = 16  # range of the histogram for that, downward from the largest magnitude


class _StraightThrough(torch.autograd.Function):
    """Forward: the given quantized values. Backward: the gradient unchanged, to the float values."""

    @staticmethod
    def forward(ctx, values, quantized):
        return quantized

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class WeightQuantizer(nn.Module):
    """A map from float weights to at most 2^bits values s·q, q integer; its gradient passes straight through.

    One scale s for the tensor (the paper), or one for each output channel (the first dimension). Scales are computed
    in float64 and are no parameters: they follow the weights. Quantized again, quantized weights stay what they are
    (in float16 and bfloat16 to one unit in the last place; with 3 bits or more per channel, in layers of more than some
    hundred thousand weights, on CPUs only: see :class:`UniformWeight`).

    Subclasses define :meth:`fit`.
    """

    bits: int

    def __init__(self, per_channel: bool = False) -> None:
        super().__init__()
        self.per_channel = per_channel

    def fit(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Least-squares scales (rows, 1) ≥ 0 and integer levels (rows, n) of each row of (rows, n); float64."""
        raise TypeError(f"{type(self).__name__} does not define fit")

    def levels(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and integer levels of a weight tensor.

        Returns:
            (scale, levels), float32 (float64 for float64 weights): ``scale·levels`` is the quantized weight. The scale
            is a scalar, or (C_out, 1, …) per channel; levels have the shape of ``weight``.

        Raises:
            ValueError: the weight is empty, or holds NaN or an infinity (looked for on the CPU only: elsewhere the
                look would make every step wait for the device).
        """
        if weight.numel() == 0:
            raise ValueError(f"cannot quantize an empty weight of shape {tuple(weight.shape)}")
        channels = self.per_channel and weight.ndim > 0
        dtype = torch.promote_types(weight.dtype, torch.float32)
        # In float64: rival steps of a uniform grid differ in the last digits of a sum, and squares do not overflow.
        scale, levels = self.fit(weight.reshape(len(weight) if channels else 1, -1).double())
        scale, levels = scale.to(dtype), levels.to(dtype)
        if weight.device.type == "cpu" and not torch.compiler.is_compiling() and not math.isfinite(float(scale.amax())):
            raise ValueError(
                f"cannot quantize a weight of shape {tuple(weight.shape)} that holds NaN or an infinity: the training "
                "diverged (lower the learning rate), or the checkpoint is damaged"
            )
        shape = (len(weight),) + (1,) * (weight.ndim - 1) if channels else ()
        return scale.reshape(shape), levels.reshape(weight.shape)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            if torch.compiler.is_dynamo_compiling() and type(self) in (BinaryWeight, TernaryWeight, UniformWeight):
                quantized = _quantized_weight(weight, self.bits, self.per_channel)
            else:
                quantized = low_bit_values(*self.levels(weight), weight.dtype)
        return _StraightThrough.apply(weight, quantized)

    def extra_repr(self) -> str:
        return f"bits={self.bits}{', per channel' if self.per_channel else ''}"


def low_bit_values(scale: torch.Tensor, levels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``scale · levels`` in ``dtype``: what a layer computes with."""
    values = scale * levels
    if dtype == torch.float16:  # the nearest levels may lie beyond its range
        values.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return values.to(dtype)


class BinaryWeight(WeightQuantizer):
    """1 bit: ``α·sign(w)`` with α = mean|w|, the least-squares scale (Rastegari et al. 2016, XNOR-Net).

    sign(0) counts as +1, so that there are two values, not three. Example: (−3, 1, 2) → (−2, 2, 2).
    """

    bits = 1

    def fit(self, rows):
        return rows.abs().mean(1, keepdim=True), (rows < 0).to(rows.dtype).mul_(-2).add_(1)


class TernaryWeight(WeightQuantizer):
    """2 bits, values {−s, 0, s}: weights with |w| ≥ 0.7·mean|w| are kept, s = mean|w| over the kept ones.

    That is the least-squares scale for this support (Li et al. 2016, Ternary Weight Networks).
    Example: (−3, 0.2, 1, 2) → threshold 1.085 → (−2.5, 0, 0, 2.5).
    """

    bits = 2

    def fit(self, rows):
        magnitude = rows.abs()
        # `>` or equal: a constant row keeps all its weights; an all-zero row has scale 0 either way.
        kept = magnitude >= 0.7 * magnitude.mean(1, keepdim=True)
        scale = (magnitude * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
        return scale, rows.sign() * kept


class UniformWeight(WeightQuantizer):
    """b ≥ 3 bits: levels {−L..L}·s, L = 2^(b−1) − 1, with s by least squares.

    The squared error over s has many minima. It is ‖w‖² − ⟨|w|, q⟩²/⟨q, q⟩ with q the nearest levels, and q changes
    only where s passes some |w_i|/(m − ½), m = 1..L, by one level of one weight: sorted, two cumulative sums give the
    error in every interval, and the best one is the global optimum. Short rows are searched so (on CUDA all but the
    longest), and long ones of few distinct values (up to 128), whose error has narrow minima; for others a grid of
    steps is scanned on a fine histogram, which finds the error of the optimum to 1 % where values are spread, and may
    miss it by more where a few values out of hundreds hold nearly all weights. (Long rows of few values are not
    looked for per channel elsewhere than on CPUs.) So a GPU may find a better step than a CPU: in a trial scales
    differed by up to 4e-4, one level in 2,000. Nearest level and least-squares step then alternate twice on the
    weights.
    Example, 4 bits: (−0.7, 0.1, 0.3) → s = 0.1, levels (−7, 1, 3).

    Raises:
        ValueError: fewer than 3 or more than 8 bits.
    """

    def __init__(self, bits: int, per_channel: bool = False) -> None:
        super().__init__(per_channel)
        if not 3 <= bits <= 8:
            raise ValueError(f"UniformWeight has 3 to 8 bits, got {bits}")
        self.bits = bits
        self.highest = 2 ** (bits - 1) - 1

    def fit(self, rows):
        step = best_step(rows.abs(), self.highest)
        levels = nearest_levels(rows, step, -self.highest, self.highest)
        peak = rows.abs().amax(1, keepdim=True)
        unit = rows / torch.where(peak > 0, peak, 1)  # whose products neither overflow nor vanish
        energy = levels.square().sum(1, keepdim=True)
        return peak * (unit * levels).sum(1, keepdim=True) / energy.clamp_min(1), levels


def weight_quantizer(bits: int, per_channel: bool = False) -> WeightQuantizer:
    """The weight quantizer for 1 to 8 bits.

    Raises:
        ValueError: any other number of bits.
    """
    check_bits("weight_bits", bits, WEIGHT_BITS)
    if bits <= 2:
        return (BinaryWeight, TernaryWeight)[bits - 1](per_channel)
    return UniformWeight(bits, per_channel)


@torch.library.custom_op("faqd::quantized_weight", mutates_args=())
def _quantized_weight(weight: torch.Tensor, bits: int, per_channel: bool) -> torch.Tensor:
    """The same values in a compiled network as in any other: the compiler takes the quantizer as it is."""
    return low_bit_values(*weight_quantizer(bits, per_channel).levels(weight), weight.dtype)


@_quantized_weight.register_fake
def _(weight, bits, per_channel):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def check_bits(name: str, bits: int, offered: tuple[int, ...]) -> None:
    """Raise ValueError unless ``bits`` is one of those offered."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in offered:
        raise ValueError(f"{name} must be one of {', '.join(map(str, offered))}, got {bits!r}")


# ---- Steps by least squares


def nearest_levels(values: torch.Tensor, step: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    """Integer level closest to values/step, within [lowest, highest]; all zero where the step is 0."""
    safe = torch.where(step > 0, step, torch.ones_like(step))
    return (values / safe).round_().clamp_(lowest, highest) * (step > 0)


def best_step(magnitudes: torch.Tensor, highest: int) -> torch.Tensor:
    """The step s (rows, 1) for which levels {0..highest}·s are nearest to ``magnitudes`` (rows, n) ≥ 0, in squares.

    0 for a row of zeros; NaN for a row that holds NaN or an infinity. See :class:`UniformWeight` for the method.
    """
    peak = magnitudes.amax(1, keepdim=True)
    unit = magnitudes.double() / torch.where(peak > 0, peak, 1)
    exact = unit.shape[1] * highest <= _EXACT or (unit.device.type == "cuda" and unit.numel() * highest <= _EXACT_CUDA)
    candidates = (_exact_step if exact else _scanned_steps)(unit, highest)
    step, explained = torch.zeros_like(unit[:, :1]), torch.full_like(unit[:, :1], -1)
    for candidate in candidates.split(1, dim=1):
        for _ in range(2):
            levels = nearest_levels(unit, candidate, 0, highest)
            energy = levels.square().sum(1, keepdim=True)
            gain = (unit * levels).sum(1, keepdim=True)
            candidate = torch.where(energy > 0, gain / energy.clamp_min(1), candidate)
        share = torch.where(energy > 0, gain.square() / energy.clamp_min(1), 0)
        better = share > explained
        step, explained = torch.where(better, candidate, step), torch.where(better, share, explained)
    # NaN is no step that a comparison could reject above.
    return (step * peak + 0 * peak).to(magnitudes.dtype)


def running_sums(rows: torch.Tensor) -> torch.Tensor:
    """Cumulative sums along each row of (rows, n), the same bits at every call.

    CUDA adds a single row in whatever order its blocks get to it; several rows have a block each. So a single one is
    folded into many there.
    """
    if len(rows) != 1 or rows.device.type != "cuda":
        return rows.cumsum(1)
    count = rows.shape[1]
    folded = F.pad(rows, (0, -count % _FOLD)).view(-1, _FOLD).cumsum(1)
    if len(folded) > 1:
        before = folded[:-1, -1].expand(2, -1).contiguous().cumsum(1)[0]
        folded[1:] += before.unsqueeze(1)
    return folded.view(1, -1)[:, :count]


def _exact_step(magnitudes: torch.Tensor, highest: int, counts: torch.Tensor | None = None) -> torch.Tensor:
    """``counts``: how often each of ``magnitudes`` is there, of the same shape; None for once."""
    # Descending: each breakpoint that s passes on its way down raises one value from level m − 1 to m.
    m = torch.arange(1, highest + 1, device=magnitudes.device, dtype=magnitudes.dtype)
    _, order = (magnitudes.unsqueeze(2) / (m - 0.5)).flatten(1).sort(dim=1, descending=True, stable=True)
    counts = torch.ones_like(magnitudes) if counts is None else counts

    def up_to(terms: torch.Tensor) -> torch.Tensor:
        return running_sums(terms.flatten(1).gather(1, order))

    gain = up_to((counts * magnitudes).unsqueeze(2).expand(-1, -1, highest))
    energy = up_to(counts.unsqueeze(2) * (2 * m - 1))
    energy.clamp_min_(1)  # 0 up to the first value that is there at all
    best = (gain.square() / energy).argmax(1, keepdim=True)
    return gain.gather(1, best) / energy.gather(1, best)


def _scanned_steps(magnitudes: torch.Tensor, highest: int) -> torch.Tensor:
    """The best (rows, 1) of fine grids of steps around the best four of a coarse grid over thirteen octaves."""
    # Many rows are channels, each of which costs as much: coarser grids do for them.
    bins, spacing = (2**15, 1 / 96) if len(magnitudes) == 1 else (2**13, 1 / 32)
    peak = magnitudes.amax(1, keepdim=True)
    values, counts, index = _histogram(magnitudes, peak, bins)
    # How many weights, and their sum, lie below each edge between two bins: float64 holds both without rounding that
    # could matter.
    below = F.pad(counts.cumsum(1), (1, 0))
    mass = F.pad(running_sums(values * counts), (1, 0))
    half = torch.arange(highest, device=values.device, dtype=values.dtype) + 0.5

    def scan(steps: torch.Tensor, best: int) -> torch.Tensor:
        edges = steps.unsqueeze(2) * half  # (rows, steps, L): where a value reaches level 1, 2, …
        place = _bin(edges, peak.unsqueeze(2), values.shape[1]).flatten(1) + 1
        place = torch.where(edges.flatten(1) > peak, values.shape[1], place)
        above = (below[:, -1:] - below.gather(1, place)).view_as(edges)
        gain = (mass[:, -1:] - mass.gather(1, place)).view_as(edges).sum(2)
        energy = (above * (2 * half)).sum(2)
        explained = torch.where(energy > 0, gain.square() / energy.clamp_min(1), 0)
        return steps.gather(1, explained.topk(best, dim=1).indices)

    grid = torch.arange(-12.0, 1.0, spacing, device=values.device, dtype=values.dtype)
    coarse = scan(peak.to(values.dtype) / highest * grid.exp2(), best=4)
    fine = torch.linspace(-spacing, spacing, 33, device=values.device, dtype=values.dtype)
    steps = scan((coarse.unsqueeze(2) * fine.exp2()).flatten(1), best=1)

    few = (counts > 0).sum(1) <= _FEW
    searched = torch.arange(len(steps), device=steps.device)
    if magnitudes.device.type == "cpu" and not torch.compiler.is_compiling():
        searched = searched[few]
    elif len(steps) > 1:
        searched = searched[:0]  # it would cost each channel a long sort, to find which are few the host would wait
    for rows in searched.split(64):
        place = counts[rows].gt(0).int().topk(_FEW, dim=1).indices
        largest = torch.zeros_like(counts[rows]).scatter_reduce_(1, index[rows], magnitudes[rows], "amax")
        exact = _exact_step(largest.gather(1, place), highest, counts[rows].gather(1, place))
        steps[rows] = torch.where(few[rows].unsqueeze(1), exact, steps[rows])
    return steps


def _bin(values: torch.Tensor, peak: torch.Tensor, bins: int) -> torch.Tensor:
    """Index of the bin, of ``bins`` that are evenly spaced in the logarithm over sixteen octaves below the peak."""
    position = (values / peak.clamp_min(torch.finfo(values.dtype).tiny)).log2().mul_(bins / _OCTAVES).add_(bins)
    return position.nan_to_num_(0, 0, 0).floor_().clamp_(0, bins - 1).long()


def _histogram(magnitudes: torch.Tensor, peak: torch.Tensor, bins: int) -> tuple[torch.Tensor, ...]:
    """Rows of values at the centres of bins, ascending, how many of ``magnitudes`` lie in each bin (both float64), and
    the bin of each."""
    index = _bin(magnitudes, peak, bins)
    # Whole numbers add up to the same whatever their order, also on devices that add in any order.
    counts = torch.zeros(len(magnitudes), bins, dtype=torch.int64, device=magnitudes.device)
    counts.scatter_add_(1, index, torch.ones_like(index))
    centres = torch.arange(bins, device=magnitudes.device, dtype=torch.float64)
    centres = ((centres + 0.5 - bins) * (_OCTAVES / bins)).exp2()
    return peak.double() * centres, counts.double(), index


@functools.cache
def gaussian_step(highest: int) -> float:
    """The least-squares step of {0..highest} for the positive part of N(0, 1), on 2,001 quantiles."""
    quantiles = torch.linspace(0.5, 1, 2003, dtype=torch.float64)[1:-1]
    return float(best_step((math.sqrt(2) * torch.erfinv(2 * quantiles - 1)).unsqueeze(0), highest))


# ---- Activations


class QuantizedReLU(nn.Module):
    """A ReLU with 2^bits output values {0..Q}·α, Q = 2^bits − 1, and a learned step α.

    Forward: ``α·round(clip(x/α, 0, Q))`` (nearest, not up: rounding up would add half a step on average).
    Backward to x: straight through inside (0, Qα), 0 outside. Backward to α, summed over all elements:

    - ``"lsq"`` (Esser et al. 2020): 0 below the range, round(x/α) − x/α inside, Q above; times 1/√(F·Q), F the number
      of features (elements of one image: all dimensions but the first), so that the step learns at the pace of a
      weight. The images of a batch do not count in F: a loss is their mean, its gradient does not grow with them;
    - ``"coarse"`` (Yin et al. 2019, blended coarse gradient descent; the paper's line of work): three values,
      0 below, 2^(bits−1) inside, Q above; with the same scale;
    - ``"frozen"``: none. The step stays what :meth:`fit` made it (what the released code comes to).

    Example, 4 bits, α = 0.1, one image: (−1, 0.26, 9) → (0, 0.3, 1.5); LSQ's gradients to α (0, 0.4, 15), coarse
    (0, 8, 15), each times 1/√45.

    ``step`` starts at the least-squares optimum for standard normal input; :meth:`fit` takes it from data. In a
    network it stands in the place of ``replaces``, which comes back when the network is dequantized.
    """

    def __init__(
        self, bits: int, step_gradient: Literal["lsq", "coarse", "frozen"] = "lsq", replaces: nn.Module | None = None
    ) -> None:
        super().__init__()
        check_bits("activation_bits", bits, ACTIVATION_BITS)
        if step_gradient not in STEP_GRADIENTS:
            raise ValueError(f"step_gradient must be one of {', '.join(STEP_GRADIENTS)}, got {step_gradient!r}")
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
        """Whether the step is still the one it was made with: neither fitted nor trained."""
        return bool(self.step.detach().cpu() == torch.tensor(gaussian_step(self.highest), dtype=self.step.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = self.step.detach() if self.step_gradient == "frozen" else self.step
        return quantized_relu(x, step, self.highest, self.is_coarse, self.compiled and self.training)

    @torch.no_grad()
    def fit(self, x: torch.Tensor) -> None:
        """Set the step to the least-squares optimum for ``x``; left as it is if nothing in ``x`` is positive.

        Of many values :func:`sample` looks at some.

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

    Random, because a regular pattern would meet the same image columns again and again.
    """
    values = x.detach().flatten()
    if values.numel() > most:
        chosen = torch.randint(values.numel(), (most,), generator=torch.Generator().manual_seed(0))
        values = values[chosen.to(x.device)]
    return values.to(torch.promote_types(x.dtype, torch.float32))
