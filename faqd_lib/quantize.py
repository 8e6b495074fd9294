"""Put quantizers into a network, and take them out again.

Weights go through ``torch.nn.utils.parametrize``: the float (latent) weight stays the learned parameter, the layer
computes with the quantized one, and the gradient passes straight through. Activations: every ``nn.ReLU`` and
``nn.ReLU6`` becomes a :class:`~faqd_lib.quantizers.QuantizedReLU` with a learned step. Everything happens in place and
:func:`dequantize` undoes it. A float network's ``state_dict`` loads into the quantized network unchanged.
"""

import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrize

from .quantizers import (
    ACTIVATION_BITS,
    FLOAT_BITS,
    WEIGHT_BITS,
    QuantizedReLU,
    WeightQuantizer,
    check_bits,
    sample,
    weight_quantizer,
)

if TYPE_CHECKING:
    import pandas as pd

LAYER_POLICIES = ("quantize", "float")
SHORTCUTS = ("shortcut", "downsample")  # parts of module names that mark a residual network's shortcut layers
_WEIGHTED = (nn.Conv2d, nn.Linear)
_RECTIFIERS = (nn.ReLU, nn.ReLU6)
_NOT_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, parametrize.ParametrizationList)


def quantize(
    model: nn.Module,
    weight_bits: int = FLOAT_BITS,
    activation_bits: int = FLOAT_BITS,
    *,
    first_layer: str = "quantize",
    last_layer: str = "float",
    shortcuts: str = "quantize",
    overrides: Mapping[str, int] | None = None,
    per_channel: bool = False,
    step_gradient: str = "lsq",
) -> nn.Module:
    """Quantize the weights of all Conv2d and Linear layers and the ReLUs of a network, in place.

    Args:
        model: any network. Its weights become the latent ones; a float checkpoint may be loaded before or afterwards.
        weight_bits: 1, 2 (ternary), 3 to 8; 32 leaves weights as they are.
        activation_bits: 1 to 8; 32 leaves activations as they are.
        first_layer: ``"quantize"`` or ``"float"``: the first Conv2d or Linear in module order (the stem).
        last_layer: the same for the last one (the classifier). These two defaults follow the authors' released code.
        shortcuts: the same for layers whose name has a part "shortcut" or "downsample".
        overrides: bits by pattern of module names (as in a shell: ``{"layer1.*": 8, "fc": 32}``), for weights or
            activations, whichever a module has; they go before everything above, later ones before earlier ones.
        per_channel: one weight scale for each output channel instead of one for the tensor (the paper).
        step_gradient: of the activation steps, ``"lsq"``, ``"coarse"``, or ``"frozen"`` for none.

    Returns:
        ``model`` itself. Its ``state_dict`` holds the float weights and the steps, not the bits.

    Raises:
        ValueError: bits or policy that are not offered, a pattern that matches nothing, a network that is quantized
            already, layers whose weight is no plain parameter (lazy, weight norm, another parametrization), or nothing
            to quantize. The network is then as it was.
    """
    check_bits("weight_bits", weight_bits, (*WEIGHT_BITS, FLOAT_BITS))
    check_bits("activation_bits", activation_bits, (*ACTIVATION_BITS, FLOAT_BITS))
    for name, policy in (("first_layer", first_layer), ("last_layer", last_layer), ("shortcuts", shortcuts)):
        if policy not in LAYER_POLICIES:
            raise ValueError(f"{name} must be one of {', '.join(LAYER_POLICIES)}, got {policy!r}")
    layers, relus = _quantizable(model)
    if any(map(quantizer_of, layers.values())) or any(_quantized_relus(model)):
        raise ValueError("the network is quantized already: call dequantize(model) first")
    if weight_bits != FLOAT_BITS and not layers:
        raise ValueError("the network has no Conv2d or Linear module whose weights could be quantized")
    if activation_bits != FLOAT_BITS and not relus:
        raise ValueError(
            "the network has no nn.ReLU module to quantize: replace calls of F.relu or torch.relu by modules"
        )
    bits = dict.fromkeys(layers, weight_bits) | dict.fromkeys(relus, activation_bits)
    bits |= dict.fromkeys(_float_by_policy(list(layers), first_layer, last_layer, shortcuts), FLOAT_BITS)
    bits |= _overridden(overrides or {}, layers, relus)
    _check_quantizable(layers, relus, bits, weight_bits, activation_bits)
    made = {}
    for name, module in relus.items():
        if bits[name] != FLOAT_BITS:
            device = next((parameter.device for parameter in model.parameters()), None)
            made[module] = QuantizedReLU(bits[name], step_gradient, replaces=module).to(device)
    for name, layer in layers.items():
        if bits[name] != FLOAT_BITS:
            parametrize.register_parametrization(layer, "weight", weight_quantizer(bits[name], per_channel))
    replace_modules(model, made)
    hooks = model._load_state_dict_pre_hooks.values()
    if all(getattr(hook, "hook", hook) is not _accept_float_network for hook in hooks):  # once, however often quantized
        model.register_load_state_dict_pre_hook(_accept_float_network)
    return model


def _check_quantizable(
    layers: Mapping[str, nn.Module], relus: Mapping[str, nn.Module], bits: Mapping[str, int], weights: int, acts: int
) -> None:
    """Raise ValueError before anything has been changed."""
    for kind, modules, asked in (("Conv2d or Linear", layers, weights), ("ReLU", relus, acts)):
        if asked != FLOAT_BITS and all(bits[name] == FLOAT_BITS for name in modules):
            raise ValueError(f"every {kind} is kept float by policy: nothing would be quantized to {asked} bits")
    if bits.get("", FLOAT_BITS) != FLOAT_BITS and "" in relus:
        raise ValueError("a ReLU that is the whole network cannot be replaced: put it into an nn.Sequential")
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")
        if bits[name] != FLOAT_BITS and (weight is None or nn.parameter.is_lazy(weight)):
            raise ValueError(
                f"the weight of {name or 'the network'} ({type(layer).__name__}) is no plain parameter: run a lazy "
                "layer once, and take weight norm or another parametrization off, before you quantize"
            )


def _quantizable(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """(layers with weights, ReLUs) by name, in module order."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _WEIGHTED)}
    relus = {name: module for name, module in model.named_modules() if type(module) in _RECTIFIERS}
    return layers, relus


def _float_by_policy(layers: list[str], first_layer: str, last_layer: str, shortcuts: str) -> set[str]:
    named = set(layers[:1]) if first_layer == "float" else set()
    if last_layer == "float":
        named |= set(layers[-1:])
    if shortcuts == "float":
        named |= {name for name in layers if any(mark in part for part in name.split(".") for mark in SHORTCUTS)}
    return named


def _overridden(overrides: Mapping[str, int], layers: Iterable[str], relus: Iterable[str]) -> dict[str, int]:
    bits, names = {}, [*layers, *relus]
    for pattern, value in overrides.items():
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ValueError(
                f"the pattern {pattern!r} matches no Conv2d, Linear or ReLU of the network; their names are, among "
                f"others, {', '.join(names[:8])}"
            )
        for name in matched:
            offered = WEIGHT_BITS if name in layers else ACTIVATION_BITS
            check_bits(f"overrides[{pattern!r}]", value, (*offered, FLOAT_BITS))
            bits[name] = value
    return bits


def dequantize(model: nn.Module) -> nn.Module:
    """Take quantization off again, in place: the float (latent) weights and the former ReLUs. Returns ``model``."""
    for module in model.modules():
        if quantizer_of(module) is not None:
            # A deep copy shares its class with the original, and torch takes the property `weight` off that class:
            # without a class of its own, the original would lose its weight.
            shared = type(module)
            own = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(shared.__name__, shared.__bases__, own)
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    replace_modules(model, {relu: relu.replaces for relu in _quantized_relus(model)})
    return model


def join(name: str, key: str) -> str:
    """``name.key``; the root's own name is empty."""
    return f"{name}.{key}" if name else key


def _accept_float_network(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """A float network's ``weight`` is the latent one of a quantized layer; it has no steps, and ours stay."""
    for name in quantized_weights(model):
        weight = prefix + join(name, "weight")
        if weight in state_dict:
            state_dict[prefix + join(name, "parametrizations.weight.original")] = state_dict.pop(weight)
    steps = {
        prefix + join(name, "step"): module.step
        for name, module in model.named_modules(remove_duplicate=False)
        if _is_quantized_relu(module)
    }
    if not any(name in state_dict for name in steps):
        state_dict |= {name: step.detach() for name, step in steps.items()}


@torch.no_grad()
def calibrate(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Fit the step of every quantized ReLU to its input, first layer to last, in one pass over a batch of images.

    The pass runs in training mode, so that batch normalisation works with the batch's own statistics even in a
    freshly initialised network; its running statistics and the network's mode are left as they were.

    Args:
        model: a network with quantized activations (without any, nothing happens).
        images: (batch, …) input of the network, at least 2 images.

    Raises:
        ValueError: an activation holds NaN or an infinity.
    """
    relus = list(_quantized_relus(model))
    if not relus:
        return model
    seen: dict[nn.Module, list[torch.Tensor]] = {relu: [] for relu in relus}

    def fit(relu: QuantizedReLU, inputs: tuple) -> None:
        seen[relu].append(sample(inputs[0]))  # one that is called in several places fits the inputs of all
        relu.fit(torch.cat(seen[relu]))

    handles = [relu.register_forward_pre_hook(fit) for relu in relus]
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


@dataclass(frozen=True)
class LayerBits:
    """One line of :func:`describe`: what a layer computes with."""

    layer: str
    kind: str
    shape: tuple[int, ...]
    bits: int
    levels: int  # in use by the weights; offered by a quantized ReLU; 0 for float
    scale: float  # the step, or the mean of the channels' steps; NaN for float
    size: float  # bytes of weights and scales in storage; 0 for activations


class Description(list[LayerBits]):
    """Rows of :func:`describe`; printed, a table and the bytes of all."""

    def frame(self) -> "pd.DataFrame":
        """The same as a DataFrame, a row a layer."""
        import pandas as pd  # here, so that a packed network can be read where there is no pandas

        return pd.DataFrame([asdict(row) for row in self]).set_index("layer")

    def __str__(self) -> str:
        if not self:
            return "nothing to describe"
        formats = {"scale": "{:.4g}".format, "size": "{:,.0f}".format}
        before = sum(row.size if row.bits == FLOAT_BITS else 4 * math.prod(row.shape) for row in self if row.size)
        total = f"{sum(row.size for row in self):,.0f} bytes of weights and scales ({before:,.0f} in float32)"
        return f"{self.frame().to_string(formatters=formats)}\n{total}"


def describe(model: nn.Module) -> Description:
    """Every layer with weights but normalisations, and every activation: bits, levels in use, scale, size.

    What :func:`quantize` has no quantizer for (Conv1d, Embedding, SiLU, attention, …) is listed with 32 bits, so that
    nothing of the kind stays float unnoticed. Function calls (``F.relu``) are no modules and cannot be seen.
    """
    rows = Description()
    for name, module in model.named_modules():
        kind = type(module).__name__.removeprefix("Parametrized")
        if isinstance(module, _WEIGHTED):
            weight = module.weight.detach()
            bits, scale, in_use = FLOAT_BITS, torch.tensor([]), 0
            if (quantizer := quantizer_of(module)) is not None:
                scale, levels = quantizer.levels(module.parametrizations.weight.original.detach())
                bits, in_use = quantizer.bits, int(levels.add(2**7).int().flatten().bincount().count_nonzero())
            rows.append(
                LayerBits(name, kind, tuple(weight.shape), bits, in_use, float(scale.mean()),
                          (weight.numel() * bits + scale.numel() * FLOAT_BITS) / 8)
            )  # fmt: skip
        elif isinstance(module, QuantizedReLU):
            rows.append(LayerBits(name, kind, (), module.bits, 2**module.bits, float(module.step.detach()), 0.0))
        elif type(module).__module__ == "torch.nn.modules.activation":
            rows.append(LayerBits(name, kind, (), FLOAT_BITS, 0, float("nan"), 0.0))
        elif (own := list(module.parameters(recurse=False))) and not isinstance(module, _NOT_LAYERS):
            shape = tuple(own[0].shape)
            size = sum(parameter.numel() * FLOAT_BITS / 8 for parameter in own)
            rows.append(LayerBits(name, kind, shape, FLOAT_BITS, 0, float("nan"), size))
    return rows


def weight_bytes(model: nn.Module) -> float:
    """Bytes that the parameters need when each quantized weight is stored in its bits, the rest in 32."""
    bits = sum(parameter.numel() * FLOAT_BITS for parameter in model.parameters())
    for quantizer, latent in _once(quantized_weights(model)):
        scales = len(latent) if quantizer.per_channel else 1
        bits += latent.numel() * (quantizer.bits - FLOAT_BITS) + scales * FLOAT_BITS
    return bits / 8


def quantized_weights(model: nn.Module) -> dict[str, tuple[WeightQuantizer, nn.Parameter]]:
    """(quantizer, latent weight) of every layer with quantized weights, by the layer's name or, if shared, names."""
    return {
        name: (quantizer, module.parametrizations.weight.original)
        for name, module in model.named_modules(remove_duplicate=False)
        if (quantizer := quantizer_of(module)) is not None
    }


def quantizer_of(module: nn.Module) -> WeightQuantizer | None:
    """The quantizer of a layer's weight, if it has one; other parametrizations are not ours."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    return next((part for part in module.parametrizations.weight if isinstance(part, WeightQuantizer)), None)


def _once(
    weights: Mapping[str, tuple[WeightQuantizer, nn.Parameter]],
) -> Iterable[tuple[WeightQuantizer, nn.Parameter]]:
    """Each latent weight once, though several layers may share it."""
    return {id(latent): (quantizer, latent) for quantizer, latent in weights.values()}.values()


@torch.no_grad()
def blend(model: nn.Module, share: float) -> None:
    """w ← (1 − share)·w + share·Q(w) for every quantized weight, in place.

    Called between ``backward()`` and ``optimizer.step()``, this makes SGD the blended coarse gradient descent of Yin
    et al. 2019: w ← (1 − ρ)·w + ρ·Q(w) − lr·gradient, with the gradient taken at Q(w).

    Raises:
        ValueError: ``share`` outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, got {share!r}")
    if share:
        for quantizer, latent in _once(quantized_weights(model)):
            latent.lerp_(quantizer(latent), share)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(ordinary parameters, activation steps): weight decay belongs on the first group only."""
    steps = [relu.step for relu in _quantized_relus(model)]
    known = {id(step) for step in steps}
    return [parameter for parameter in model.parameters() if id(parameter) not in known], steps


def _is_quantized_relu(module: nn.Module) -> bool:
    return isinstance(module, QuantizedReLU)


def _quantized_relus(model: nn.Module) -> Iterable[QuantizedReLU]:
    return filter(_is_quantized_relu, model.modules())


def replace_modules(model: nn.Module, by: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the place of some, wherever they stand; one that is used twice stays one."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out a module's second place
            if child in by:
                setattr(parent, name, by[child])
