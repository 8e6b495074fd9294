"""Low-bit weights and activations for any network, with straight-through gradients to the float values.

Weights go through ``torch.nn.utils.parametrize``: the float (latent) weight stays the learned parameter, the layer
computes with the quantized one, and the gradient passes straight through. Activations: every ``nn.ReLU`` becomes a
:class:`QuantizedReLU` with a learned step. Everything happens in place and :func:`dequantize` undoes it.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

WEIGHT_BITS = (1, 2, 4)
ACTIVATION_BITS = (4,)
FLOAT_BITS = 32
LAYER_POLICIES = ("quantize", "float")


class _StraightThrough(torch.autograd.Function):
    """Forward: the given quantized values. Backward: the gradient unchanged, to the float values."""

    @staticmethod
    def forward(ctx, values, quantized):
        return quantized

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class WeightQuantizer(nn.Module):
    """A map from float weights to at most 2^bits values, one scale per tensor; gradient straight through.

    Subclasses define ``levels``: (scale, integer levels) of a tensor, so that scale·levels is the quantized weight.
    """

    bits: int

    def levels(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale: scalar tensor ≥ 0, integer levels: the shape of ``weight``), both in the dtype of ``weight``."""
        raise TypeError(f"{type(self).__name__} does not define levels")

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale, levels = self.levels(weight)
            quantized = scale * levels
        return _StraightThrough.apply(weight, quantized)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class BinaryWeight(WeightQuantizer):
    """1 bit: ``α·sign(w)`` with α = mean|w|, the least-squares scale (Rastegari et al. 2016, XNOR-Net).

    sign(0) counts as +1, so that there are two values, not three. Example: (−3, 1, 2) → (−2, 2, 2).
    """

    bits = 1

    def levels(self, weight):
        return weight.abs().mean(), torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)


class TernaryWeight(WeightQuantizer):
    """2 bits, values {−s, 0, s}: weights with |w| ≥ 0.7·mean|w| are kept, s = mean|w| over the kept ones.

    That is the least-squares scale for this support (Li et al. 2016, Ternary Weight Networks).
    Example: (−3, 0.2, 1, 2) → threshold 1.085 → (−2.5, 0, 0, 2.5).
    """

    bits = 2

    def levels(self, weight):
        magnitude = weight.abs()
        # `>` or equal: a constant tensor keeps all its weights; an all-zero tensor has scale 0 either way.
        kept = magnitude >= 0.7 * magnitude.mean()
        scale = (magnitude * kept).sum() / kept.sum()
        return scale, weight.sign() * kept


class UniformWeight(WeightQuantizer):
    """b ≥ 3 bits: levels {−L..L}·s, L = 2^(b−1) − 1, with s by least squares.

    Starting from the best scale for Gaussian weights, nearest level and least-squares scale
    s = ⟨w, q⟩ / ⟨q, q⟩ alternate; no step can increase the squared error.
    Example, 4 bits: (−0.7, 0.1, 0.3) → s = 0.1, levels (−7, 1, 3).
    """

    iterations = 8

    def __init__(self, bits: int) -> None:
        super().__init__()
        if bits < 3:
            raise ValueError(f"UniformWeight needs at least 3 bits, got {bits}")
        self.bits = bits
        self.highest = 2 ** (bits - 1) - 1
        self._start = _gaussian_step(self.highest, signed=True)

    def levels(self, weight):
        root_mean_square = weight.square().mean().sqrt()
        # Two starts: the Gaussian one, and the grid that spans the range, which is right for few distinct values.
        fits = []
        for start in (root_mean_square * self._start, weight.abs().amax() / self.highest):
            scale = fit_step(weight, start, -self.highest, self.highest, self.iterations)
            levels = _nearest(weight, scale, -self.highest, self.highest)
            fits.append(((weight - scale * levels).square().sum(), scale, levels))
        (error, scale, levels), (other_error, other_scale, other_levels) = fits
        better = other_error < error
        return torch.where(better, other_scale, scale), torch.where(better, other_levels, levels)


def _nearest(values: torch.Tensor, step: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    """Integer level closest to values/step, within [lowest, highest]; all zero where the step is 0."""
    safe = torch.where(step > 0, step, torch.ones_like(step))
    return (values / safe).round().clamp_(lowest, highest) * (step > 0)


def fit_step(values: torch.Tensor, start: torch.Tensor, lowest: int, highest: int, iterations: int = 8) -> torch.Tensor:
    """Least-squares step of the levels {lowest..highest}·step for ``values``, by alternating from ``start``.

    Returns:
        A scalar tensor ≥ 0; 0 for all-zero values.
    """
    step = start
    for _ in range(iterations):
        levels = _nearest(values, step, lowest, highest)
        energy = levels.square().sum()
        step = torch.where(energy > 0, (values * levels).sum() / energy.clamp_min(1), step)
    return step


@functools.cache
def _gaussian_step(highest: int, signed: bool) -> float:
    """The least-squares step for values from N(0, 1) (through a ReLU unless ``signed``), on 4,001 quantiles."""
    quantiles = torch.linspace(0, 1, 4003, dtype=torch.float64)[1:-1]
    values = math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    lowest = -highest if signed else 0
    return float(fit_step(values, torch.tensor(3.0 / highest, dtype=torch.float64), lowest, highest, 100))


def weight_quantizer(bits: int) -> WeightQuantizer:
    """The weight quantizer for 1, 2 or 4 bits.

    Raises:
        ValueError: any other number of bits.
    """
    _check_bits("weight_bits", bits, WEIGHT_BITS)
    return {1: BinaryWeight, 2: TernaryWeight}.get(bits, lambda: UniformWeight(bits))()


class _QuantizedReLUFunction(torch.autograd.Function):
    """round(clip(x/α, 0, Q))·α; to x: 1 inside (0, Qα), else 0; to α: LSQ's gradient."""

    @staticmethod
    def forward(ctx, x, step, highest):
        # A step that training drove to zero or below would turn the layer off or upside down. The gradient passes
        # this guard, so that such a step can recover.
        step = step.clamp_min(1e-6).to(x.dtype)
        scaled = x / step
        levels = scaled.clamp(0, highest).round_()
        ctx.save_for_backward(scaled, levels)
        ctx.highest = highest
        return levels * step

    @staticmethod
    def backward(ctx, gradient):
        scaled, levels = ctx.saved_tensors
        inside = (scaled > 0) & (scaled < ctx.highest)
        to_x = gradient * inside
        # ∂/∂α: Q above the range, 0 below it, round(x/α) − x/α inside. `levels` is right for the first two.
        to_step = (gradient * torch.where(inside, levels - scaled, levels)).sum(dtype=torch.float32)
        return to_x, to_step / math.sqrt(gradient.numel() * ctx.highest), None


class QuantizedReLU(nn.Module):
    """A ReLU with 2^bits output values {0..Q}·α, Q = 2^bits − 1, and a learned step α (Esser et al. 2020, LSQ).

    Forward: ``α·round(clip(x/α, 0, Q))`` (nearest, not up: rounding up would add half a step on average).
    Backward: straight through inside (0, Qα); the step's gradient is LSQ's, scaled by 1/√(numel·Q).
    Example, 4 bits, α = 0.1: (−1, 0.26, 9) → (0, 0.3, 1.5).

    ``step`` starts at the least-squares optimum for standard normal input; :func:`calibrate` fits it to data.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        _check_bits("activation_bits", bits, ACTIVATION_BITS)
        self.bits = bits
        self.highest = 2**bits - 1
        self.step = nn.Parameter(torch.tensor(_gaussian_step(self.highest, signed=False)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _QuantizedReLUFunction.apply(x, self.step, self.highest)

    @torch.no_grad()
    def fit(self, x: torch.Tensor) -> None:
        """Set the step to the least-squares optimum for ``x``; left as it is if nothing in ``x`` is positive.

        The squared error over the step has several minima: the best of 64 steps around the optimum for a normal
        distribution is refined. Of more than 65,536 values a seeded sample of that many is looked at (a regular
        pattern would meet the same image columns again and again).
        """
        positive = x.detach().float().clamp_min(0).flatten()
        if positive.numel() > 65536:
            sample = torch.randint(positive.numel(), (65536,), generator=torch.Generator().manual_seed(0))
            positive = positive[sample.to(x.device)]
        if bool(positive.any()):
            centre = positive.square().mean().sqrt() * math.sqrt(2) * _gaussian_step(self.highest, signed=False)
            steps = centre * torch.logspace(-1.5, 1.5, 64, base=2, device=x.device).unsqueeze(1)
            errors = ((positive / steps).round().clamp_(0, self.highest) * steps - positive).square().sum(1)
            self.step.copy_(fit_step(positive, steps[errors.argmin(), 0], 0, self.highest, iterations=30))

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


@dataclass(frozen=True)
class LayerBits:
    """One line of :func:`describe`: what a layer computes with."""

    layer: str
    kind: str
    shape: tuple[int, ...]
    bits: int
    levels: int
    scale: float


def quantize(
    model: nn.Module,
    weight_bits: int = FLOAT_BITS,
    activation_bits: int = FLOAT_BITS,
    *,
    first_layer: str = "quantize",
    last_layer: str = "float",
) -> nn.Module:
    """Quantize the weights of all Conv2d and Linear layers and the ReLUs of a network, in place.

    Args:
        model: any network; a float checkpoint is loaded before this call (its weights become the latent ones).
        weight_bits: 1, 2 (ternary) or 4; 32 leaves weights as they are.
        activation_bits: 4; 32 leaves activations as they are.
        first_layer: ``"quantize"`` or ``"float"``: the first Conv2d or Linear in module order (the stem).
        last_layer: the same for the last one (the classifier). The defaults follow the authors' released code.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: bits or policy that are not offered, a network that is quantized already, or nothing to quantize.
    """
    _check_bits("weight_bits", weight_bits, (*WEIGHT_BITS, FLOAT_BITS))
    _check_bits("activation_bits", activation_bits, (*ACTIVATION_BITS, FLOAT_BITS))
    for name, policy in (("first_layer", first_layer), ("last_layer", last_layer)):
        if policy not in LAYER_POLICIES:
            raise ValueError(f"{name} must be one of {', '.join(LAYER_POLICIES)}, got {policy!r}")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    if any(parametrize.is_parametrized(m, "weight") for _, m in layers) or next(_quantized_relus(model), None):
        raise ValueError("the network is quantized already: call dequantize(model) first")
    if weight_bits != FLOAT_BITS and not layers:
        raise ValueError("the network has no Conv2d or Linear module whose weights could be quantized")
    if activation_bits != FLOAT_BITS and not any(type(module) is nn.ReLU for module in model.modules()):
        raise ValueError(
            "the network has no nn.ReLU module to quantize: replace calls of F.relu or torch.relu by modules"
        )
    if weight_bits != FLOAT_BITS:
        for index, (_, module) in enumerate(layers):
            is_first, is_last = index == 0, index == len(layers) - 1
            if (is_first and first_layer == "float") or (is_last and last_layer == "float"):
                continue
            parametrize.register_parametrization(module, "weight", weight_quantizer(weight_bits))
    if activation_bits != FLOAT_BITS:
        device = next((parameter.device for parameter in model.parameters()), None)
        _replace(model, nn.ReLU, lambda relu: QuantizedReLU(activation_bits).to(device))
    return model


def dequantize(model: nn.Module) -> nn.Module:
    """Take quantization off again, in place: the float (latent) weights and plain ReLUs. Returns ``model``."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    return _replace(model, QuantizedReLU, lambda relu: nn.ReLU())


@torch.no_grad()
def calibrate(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Fit the step of every quantized ReLU to its input, first layer to last, in one pass over a batch of images.

    The pass runs in training mode, so that batch normalisation works with the batch's own statistics even in a
    freshly initialised network; its running statistics and the network's mode are left as they were.

    Args:
        model: a network with quantized activations (without any, nothing happens).
        images: (batch, …) input of the network, at least 2 images.
    """
    relus = list(_quantized_relus(model))
    if not relus:
        return model
    handles = [relu.register_forward_pre_hook(lambda module, inputs: module.fit(inputs[0])) for relu in relus]
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        model.train()
        model(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return model


def describe(model: nn.Module) -> list[LayerBits]:
    """One row a layer: Conv2d and Linear weights (scale of the quantized ones) and quantized ReLUs (their step)."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.detach()
            bits, scale = FLOAT_BITS, float("nan")
            if parametrize.is_parametrized(module, "weight"):
                quantizer = module.parametrizations.weight[0]
                bits = quantizer.bits
                scale = float(quantizer.levels(module.parametrizations.weight.original.detach())[0])
            rows.append(
                LayerBits(name, type(module).__name__.removeprefix("Parametrized"), tuple(weight.shape), bits,
                          weight.unique().numel(), scale)
            )  # fmt: skip
        elif isinstance(module, QuantizedReLU):
            rows.append(LayerBits(name, "ReLU", (), module.bits, 2**module.bits, float(module.step.detach())))
    return rows


def weight_bytes(model: nn.Module) -> float:
    """Bytes that the parameters need when each quantized weight is stored in its bits, the rest in 32."""
    bits = sum(parameter.numel() * FLOAT_BITS for parameter in model.parameters())
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            quantizer = module.parametrizations.weight[0]
            count = module.parametrizations.weight.original.numel()
            bits += count * (quantizer.bits - FLOAT_BITS) + FLOAT_BITS  # and one float scale
    return bits / 8


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(ordinary parameters, activation steps): weight decay belongs on the first group only."""
    steps = [relu.step for relu in _quantized_relus(model)]
    known = {id(step) for step in steps}
    return [parameter for parameter in model.parameters() if id(parameter) not in known], steps


def _quantized_relus(model: nn.Module) -> Iterable[QuantizedReLU]:
    return (module for module in model.modules() if isinstance(module, QuantizedReLU))


def _replace(model: nn.Module, kind: type[nn.Module], make) -> nn.Module:
    """Replace every submodule of a kind; a module used in several places stays one module."""
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out a module's second place
            if type(child) is kind:
                made.setdefault(child, make(child))
                setattr(parent, name, made[child])
    return model


def _check_bits(name: str, bits: int, offered: tuple[int, ...]) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in offered:
        raise ValueError(f"{name} must be one of {', '.join(map(str, offered))}, got {bits!r}")
