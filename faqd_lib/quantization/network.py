"""Put quantizers into a network, take them out again, and read low-bit weights.

Weights are quantized by ``torch.nn.utils.parametrize``. The layer computes with the quantized weight. The gradient
passes straight through to the float (latent) weight, which is learned. Each ``nn.ReLU`` and ``nn.ReLU6`` becomes a
:class:`~faqd_lib.quantization.relu.QuantizedReLU`. A float network's ``state_dict`` loads into the quantized network.
"""

import copy
import fnmatch
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, update_bn

from ..utils.messages import check_choice, kind_of
from .module_calls import RECTIFIERS, WEIGHTED, ActivationCalls, kept_modes
from .relu import QuantizedReLU, sample
from .relu_kernels import kernels
from .weights import ACTIVATION_BITS, FLOAT_BITS, WEIGHT_BITS, WeightQuantizer, low_bit_values, weight_quantizer

WRAPPERS = ("module", "_orig_mod")  # first parts of names in checkpoints of wrapped networks
_NESTED = "_faqd_use_nested_tensor"  # a transformer encoder's ``use_nested_tensor`` before it was quantized
_NEGATIVE = (nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.Tanh)
_FAST = "_faqd_fast_path"  # attribute of a transformer layer: its setting before it was quantized
_UNPACKED = "_faqd_unpacked"  # attribute of a layer whose weight was read from a packed file: (bits, scale)


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
    """Quantize the weights of all Conv2d, ConvTranspose2d and Linear layers and the ReLUs of a network, in place.

    Weights that a network computes with as bare parameters stay float, such as ``in_proj_weight`` of
    ``nn.MultiheadAttention`` (queries, keys and values of torchvision's ViT). timm's ViT has Linear layers there.

    Args:
        model: any network. Its weights become the latent ones; a float checkpoint may be loaded before or afterwards.
        weight_bits: 1, 2 (ternary), 3 to 8; 32 leaves all weights float.
        activation_bits: 1 to 8; 32 leaves all activations float. Activations other than ReLU and ReLU6, such as SiLU,
            GELU and Hardswish, stay float, and :func:`faqd_lib.describe` lists them. A network without any ReLU is
            refused: it would stay float against what was asked for.
        first_layer: ``"quantize"`` or ``"float"``: the first layer with weights in module order (the stem).
        last_layer: the same for the last layer (the classifier). Both defaults follow the authors' released code.
        shortcuts: the same for layers with "shortcut" or "downsample" in their name.
        overrides: bits by module name or shell pattern: ``{"layer1.*": 8, "fc": 32}``. A whole name reaches
            every layer and ReLU. A pattern reaches weights only if ``weight_bits`` is below 32, and activations only if
            ``activation_bits`` is. Overrides take precedence over policies, later overrides over earlier ones.
        per_channel: one weight scale for each output channel instead of one for the tensor (the paper). The groups of a
            transposed convolution share theirs.
        step_gradient: how activation steps learn: ``"lsq"``, ``"coarse"``, or ``"frozen"`` for not at all.

    Returns:
        ``model`` itself. Its ``state_dict`` holds the float weights and the steps, not the bits. In-place ReLUs become
        out-of-place: a network that reads such a ReLU's input again now sees the value before the ReLU.

    Raises:
        ValueError: unknown bits or policy, a pattern that matches nothing, a network that is quantized already, a
            weight that is no plain parameter (lazy, pruned, weight norm, another parametrization), or nothing to
            quantize. The network is left unchanged.
    """
    check_choice("weight_bits", weight_bits, (*WEIGHT_BITS, FLOAT_BITS))
    check_choice("activation_bits", activation_bits, (*ACTIVATION_BITS, FLOAT_BITS))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, WEIGHTED)}
    relus = {name: module for name, module in model.named_modules() if type(module) in RECTIFIERS}
    bits = dict.fromkeys(layers, weight_bits) | dict.fromkeys(relus, activation_bits)
    reached = [name for name, value in bits.items() if value != FLOAT_BITS]
    for setting, policy, names in (
        ("first_layer", first_layer, list(layers)[:1]),
        ("last_layer", last_layer, list(layers)[-1:]),
        ("shortcuts", shortcuts, [name for name in layers if "shortcut" in name or "downsample" in name]),
    ):
        check_choice(setting, policy, ("quantize", "float"))
        if policy == "float":
            bits |= dict.fromkeys(names, FLOAT_BITS)
    if any(map(quantizer_of, layers.values())) or _quantized_relus(model) or _unpacked(model):
        raise ValueError("the network is quantized already: call dequantize(model) first")
    if weight_bits != FLOAT_BITS and not layers:
        raise ValueError("the network has no Conv2d, ConvTranspose2d or Linear module whose weights could be quantized")
    if activation_bits != FLOAT_BITS and not relus:
        raise ValueError(_why_no_relu(model))
    _override(bits, overrides or {}, layers, reached)
    layers, relus = (
        {name: module for name, module in modules.items() if bits[name] != FLOAT_BITS} for modules in (layers, relus)
    )
    _check_quantizable(layers, relus, weight_bits, activation_bits)
    device = next((parameter.device for parameter in model.parameters()), None)
    made = {relu: QuantizedReLU(bits[name], step_gradient, relu).to(device) for name, relu in relus.items()}
    for name, layer in layers.items():
        channel_dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        parametrize.register_parametrization(layer, "weight", weight_quantizer(bits[name], per_channel, channel_dim))
    replace_modules(model, made)
    _hook_once(model, _accept_float_network)
    for module in model.modules():
        if module is not model and quantized_weights(module) and not isinstance(module, WEIGHTED):
            _hook_once(module, _accept_float_part)
    return model


def _hook_once(module: nn.Module, hook: Callable) -> None:
    """Register a hook unless the module has it already."""
    if all(getattr(one, "hook", one) is not hook for one in module._load_state_dict_pre_hooks.values()):
        module.register_load_state_dict_pre_hook(hook)


def _check_quantizable(
    layers: Mapping[str, nn.Module], relus: Mapping[str, nn.Module], weight_bits: int, activation_bits: int
) -> None:
    """Raise the ValueErrors of :func:`quantize` that depend on the chosen modules."""
    for kind, modules, bits in (("layer with weights", layers, weight_bits), ("ReLU", relus, activation_bits)):
        if bits != FLOAT_BITS and not modules:
            raise ValueError(f"every {kind} is kept float by policy: nothing would be quantized to {bits} bits")
    if "" in relus:
        raise ValueError("a ReLU that is the whole network cannot be replaced: put it into an nn.Sequential")
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")
        if weight is None or nn.parameter.is_lazy(weight):
            raise ValueError(f"the weight of {name or 'the network'} ({type(layer).__name__}) {_how_to_free(layer)}")


def why_not_copied(model: nn.Module) -> str:
    """What keeps :func:`copy.deepcopy` from copying a network, and what to do about it; empty if nothing does.

    torch copies no intermediate results, such as weights that pruning and the old weight norm compute from others.
    """
    for name, module in model.named_modules():
        for part, value in {**vars(module), **module._buffers}.items():
            if isinstance(value, Tensor) and not value.is_leaf:
                which = f"the {part} of {name or 'the network'} ({type(module).__name__})"
                if {f"{part}_orig", f"{part}_g"} & module._parameters.keys():
                    return f"{which} {_how_to_free(module, part)}"
                return f"{which} is an intermediate result with a gradient, which torch cannot copy: detach it"
    return ""


def _how_to_free(layer: nn.Module, part: str = "weight") -> str:
    """What keeps a weight from being a plain parameter, and what to do about it."""
    for kind, own in (("spectral_norm", f"{part}_u"), ("weight_norm", f"{part}_g")):
        if hasattr(layer, own):
            return (
                f"is computed by torch.nn.utils.{kind}: make it a plain parameter first, by "
                f'torch.nn.utils.remove_{kind}(layer, "{part}")'
            )
    if hasattr(layer, f"{part}_orig"):
        return (
            "is pruned by torch.nn.utils.prune: make the zeros permanent first, by "
            f'torch.nn.utils.prune.remove(layer, "{part}"). Quantized to 2 bits or more, small weights may stay zero'
        )
    return (
        "is no plain parameter: run a lazy layer once, and take weight norm or another parametrization off, before you "
        "quantize"
    )


def _why_no_relu(model: nn.Module) -> str:
    """Why a network without nn.ReLU and nn.ReLU6 has no activations to quantize, and what can be done."""
    negative = {kind.__name__.lower() for kind in _NEGATIVE} | {"swish"}  # timm has modules of these names
    kinds = Counter(
        kind
        for module in model.modules()
        if (kind := type(module).__name__).lower() in negative or isinstance(module, _NEGATIVE)
    )
    derived = {type(module).__name__ for module in model.modules() if isinstance(module, RECTIFIERS)}
    no_relu = "the network has no nn.ReLU module to quantize"
    if derived:
        names = ", ".join(sorted(derived))
        return f"{no_relu}: {names} is a subclass, whose forward may differ; use nn.ReLU or nn.ReLU6"
    if kinds:
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        return (
            f"{no_relu}: its activations are {found}, which have negative values. Leave activation_bits at 32, or "
            "train it with nn.ReLU in their place; calls of F.relu or torch.relu must become modules"
        )
    return f"{no_relu}: replace calls of F.relu or torch.relu by modules"


def _override(bits: dict[str, int], overrides: Mapping[str, int], layers: Iterable[str], reached: list[str]) -> None:
    """Override the bits by module name; ``reached``: the names that patterns choose from."""
    for pattern, value in overrides.items():
        matched = [pattern] if pattern in bits else fnmatch.filter(reached, pattern)
        if not matched:
            raise ValueError(
                f"the pattern {pattern!r} matches no layer with weights and no ReLU that is quantized; names to "
                f"match are, among others, {', '.join(reached[:8])}"
            )
        for name in matched:
            offered = WEIGHT_BITS if name in layers else ACTIVATION_BITS
            check_choice(f"overrides[{pattern!r}]", value, (*offered, FLOAT_BITS))
            bits[name] = value


def dequantize(model: nn.Module) -> nn.Module:
    """Put the float (latent) weights and the former ReLUs back, in place. Returns ``model``."""
    for module in model.modules():
        if quantizer_of(module) is not None:
            _remove_quantizer(module)
    replace_modules(model, {relu: relu.replaces for relu in _quantized_relus(model)})
    for layer in _unpacked(model):
        del layer.__dict__[_UNPACKED]
    return model


def _remove_quantizer(layer: nn.Module) -> None:
    """Make the latent weight the layer's own again.

    torch removes the property ``weight`` from the class, which a deep copy shares with the original. The layer gets a
    separate class first, so that the other one keeps its weight.
    """
    shared = type(layer)
    own = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    layer.__class__ = type(shared.__name__, shared.__bases__, own)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def fix_weights(model: nn.Module, low_bits: Mapping[str, "LowBitWeight"]) -> None:
    """Replace quantizers by their low-bit weights, as ordinary float32 parameters, in place. Activations stay."""
    for name, low in low_bits.items():
        layer = model.get_submodule(name)
        if quantizer_of(layer) is not None:
            _remove_quantizer(layer)
            layer.weight = nn.Parameter(low_bit_values(low.scale, low.levels, torch.float32), requires_grad=False)


def join(name: str, key: str) -> str:
    """``name.key``, or ``key`` for the root, whose name is empty."""
    return f"{name}.{key}" if name else key


def _accept_float_network(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Load a float network's ``weight`` as the latent weight. Steps keep their values: a float network has none.

    Names may begin with those of wrappers, as in checkpoints of DataParallel or of a compiled network.
    """
    if not prefix:
        _take_off_wrappers(model, state_dict)
    names = [prefix + join(name, "") for name in quantized_weights(model)]
    if any(f"{name}parametrizations.weight.original" in state_dict for name in names):
        return  # the state of a quantized network: load_state_dict reports missing names
    for name in names:
        if f"{name}weight" in state_dict:
            state_dict[f"{name}parametrizations.weight.original"] = state_dict.pop(f"{name}weight")
    steps = {
        prefix + join(name, "step"): module.step.detach()
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedReLU)
    }
    if not steps.keys() & state_dict.keys():
        state_dict |= steps


def _take_off_wrappers(model: nn.Module, state_dict: dict) -> None:
    """Take a wrapper's name off all keys, in place, unless the network has a part of that name."""
    while True:
        keys = [key for key in state_dict if key != "n_averaged"]  # AveragedModel's count stands beside the network
        first = keys[0].partition(".")[0] if keys else ""
        if first not in WRAPPERS or first in model._modules or not all(key.startswith(f"{first}.") for key in keys):
            return
        state_dict.pop("n_averaged", None)
        for key in keys:
            state_dict[key.removeprefix(f"{first}.")] = state_dict.pop(key)


def _accept_float_part(part: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Call :func:`_accept_float_network` for a part of the network that is loaded alone."""
    if not prefix:
        _accept_float_network(part, state_dict, prefix)


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor, *others: object, **named: object) -> nn.Module:
    """Fit the step of every quantized ReLU to its input, first layer to last, in one pass over a batch of images.

    Batch normalisation uses the batch's statistics, so that a freshly initialised network can be calibrated. Everything
    else, such as dropout, is in evaluation mode. Running statistics and modes are left as they were.

    Args:
        model: a network, which is also returned; left unchanged if it has no quantized activations.
        images: float (batch, …) input of the network, normalised as in training, at least 2 images.
        others, named: further arguments of the network's ``forward``, by position and by name.

    Raises:
        ValueError: ``images`` is no such tensor, or an activation holds NaN or an infinity.

    Warns:
        UserWarning: the network calls ``F.relu`` or ``torch.relu``, which stay float; or it skips a quantized ReLU.
    """
    relus = _quantized_relus(model)
    if not relus:
        return model
    _check_images("images", images)
    seen: dict[nn.Module, list[Tensor]] = {relu: [] for relu in relus}
    network = unwrapped(model)  # hooks need a forward that is not compiled
    calls = ActivationCalls(network)

    def fit(relu: QuantizedReLU, inputs: tuple, named: dict) -> None:
        seen[relu].append(sample(inputs[0] if inputs else named["input"]))  # a ReLU called twice fits all its inputs
        relu.fit(torch.cat(seen[relu]))

    handles = [relu.register_forward_pre_hook(fit, with_kwargs=True) for relu in relus]
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    try:
        with kept_modes(model), calls:
            for module in model.modules():
                module.training = isinstance(module, nn.modules.batchnorm._NormBase)
            network(images, *others, **named)
    finally:
        for handle in handles:
            handle.remove()
        now = dict(model.named_buffers())
        for name, (buffer, before) in buffers.items():
            replaced = now.get(name, buffer)
            if replaced is not buffer and (replaced.shape, replaced.dtype) == (before.shape, before.dtype):
                replaced.copy_(before)  # statistics; a cache of another size stays replaced
            if buffer.layout == torch.strided and not torch.allclose(buffer, before, rtol=0, atol=0, equal_nan=True):
                buffer.copy_(before)
    rectifiers = sum(count for (_, name), count in calls.functions.items() if name.rstrip("_") in ("relu", "relu6"))
    if rectifiers:
        warnings.warn(
            f"{rectifiers} ReLU(s) of {type(model).__name__} are called as functions (F.relu) and stay float: make "
            "them nn.ReLU modules (describe(model, images) lists them)",
            stacklevel=3,  # past torch.no_grad
        )
    if idle := [name for name, module in network.named_modules() if module in seen and not seen[module]]:
        warnings.warn(
            f"{len(idle)} quantized ReLU(s) of {type(model).__name__} were not called ({', '.join(idle[:3])}): the "
            "network skips them, or reads their settings instead of calling them",
            stacklevel=3,
        )
    return model


def compile_activations(model: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    """Compile the quantized activations' kernels by ``torch.compile``, for faster training on a CPU.

    Call it before a training loop of your own, for a network that is not compiled as a whole. Only large tensors in
    training mode use the kernels. Traces do not. A second derivative is refused. The steps' gradients differ in the
    last digits, and no other number does. Compiling takes seconds, the first time on a machine longer.

    Args:
        model: a network with quantized activations.
        dtype: dtype of the activations in training, ``torch.bfloat16`` under autocast.

    Returns:
        Whether kernels were compiled. False on other devices, under ``TORCH_COMPILE_DISABLE=1``, or after the warning.

    Raises:
        ValueError: the network has no quantized activation, or ``dtype`` is not a floating-point type.

    Warns:
        UserWarning: compiling fails, as it does without a C++ compiler. Training works without the kernels.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be that of activations, torch.float32 or torch.bfloat16, got {dtype!r}")
    relus = _quantized_relus(model)
    if not relus:
        raise ValueError("the network has no quantized activations: call quantize(model, activation_bits=…) first")
    for relu in relus:
        relu.compiled = relu.step.device.type == "cpu" and kernels(dtype, relu.step_gradient == "coarse") is not None
    return any(relu.compiled for relu in relus)


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Estimate mean and variance of every batch normalisation again, as plain averages over some batches of images.

    A network that is quantized and not trained any further needs new statistics. Those of the float network can cost
    all accuracy at few bits. Modes and momenta are left as they were (:func:`torch.optim.swa_utils.update_bn`).

    Raises:
        ValueError: there is no batch, or a batch is no float tensor of images. The statistics are left unchanged.
    """
    if isinstance(batches, Tensor):
        raise ValueError(
            f"batches must be batches of images, got one tensor {tuple(batches.shape)}: put it into a list"
        )
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    before = [(norm, norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms]

    def checked() -> Iterator[Tensor]:
        seen = False
        for batch in batches:
            _check_images("a batch", batch)
            seen = True
            yield batch
        if not seen:
            raise ValueError("batches held nothing: give a list of image tensors, or an iterator not used up yet")

    try:
        with kept_modes(model):
            update_bn(given := checked(), model)
            next(given, None)  # update_bn looks at no batch if there is nothing to estimate
    except BaseException:  # update_bn begins by wiping the statistics
        for norm, momentum, state in before:
            norm.momentum = momentum
            norm.load_state_dict(state)
        raise
    return model


def _check_images(name: str, images: Tensor) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim < 2 or len(images) < 2:
        raise ValueError(
            f"{name} must be a float tensor (batch, …) of at least 2 normalised images, got {kind_of(images)}"
        )


def quantized_weights(model: nn.Module) -> dict[str, tuple[WeightQuantizer, nn.Parameter]]:
    """(quantizer, latent weight) of every layer with quantized weights, by name; a shared layer has several names."""
    return {
        name: (quantizer, module.parametrizations.weight.original)
        for name, module in model.named_modules(remove_duplicate=False)
        if (quantizer := quantizer_of(module)) is not None
    }


def quantizer_of(module: nn.Module) -> WeightQuantizer | None:
    """The quantizer of a layer's weight, among all its parametrizations; None if there is none."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    return next((part for part in module.parametrizations.weight if isinstance(part, WeightQuantizer)), None)


@dataclass(frozen=True)
class LowBitWeight:
    """The weight that a layer computes with, as scale and levels; see :func:`low_bit_values`.

    Scale and levels are float32, or float64 for a float64 weight.
    """

    bits: int
    scale: Tensor  # (), or with C_out values along the channel dimension and 1 along all others
    levels: Tensor  # whole numbers, in the shape of the weight
    dtype: torch.dtype  # of the weight


def low_bit_weights(model: nn.Module) -> dict[str, LowBitWeight]:
    """The weight of every layer with a quantizer or from a packed file, by name.

    Raises:
        ValueError: the weight of a layer from a packed file was changed after reading.
    """
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if (quantizer := quantizer_of(module)) is not None:
            latent = module.parametrizations.weight.original.detach()
            found[name] = LowBitWeight(quantizer.bits, *quantizer.levels(latent), latent.dtype)
        elif _UNPACKED in module.__dict__:
            bits, scale = module.__dict__[_UNPACKED]
            weight = module.weight.detach()
            scale = scale.to(weight.device)
            # At 1 bit the sign tells the level. A scale of 0 leaves the signs, too: the values are 0 and −0.
            levels = torch.where(weight.signbit(), -1.0, 1.0).to(scale.dtype) if bits == 1 else (
                (weight.to(scale.dtype) / torch.where(scale > 0, scale, 1)).round()
            )  # fmt: skip
            if not torch.equal(low_bit_values(scale, levels, weight.dtype), weight):
                raise ValueError(
                    f"the weight of {name or 'the network'} was read from a packed file, at {bits} bits, and has been "
                    "changed since: call dequantize(model), then quantize(model, …) anew"
                )
            found[name] = LowBitWeight(bits, scale, levels, weight.dtype)
    return found


def mark_unpacked(layer: nn.Module, bits: int, scale: Tensor) -> None:
    """Note bits and scale of a layer's float weight, for :func:`low_bit_weights`."""
    layer.__dict__[_UNPACKED] = (bits, scale)


def _unpacked(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _UNPACKED in module.__dict__]


def uncalibrated(model: nn.Module) -> list[str]:
    """Names of the quantized ReLUs whose step was neither fitted nor trained."""
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedReLU) and module.is_initial]


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside of DataParallel, DistributedDataParallel, AveragedModel and ``torch.compile``."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's wrapper, whose class is private
            model = model._orig_mod
        else:
            return model


@torch.no_grad()
def blend(model: nn.Module, share: float) -> None:
    """w ← (1 − share)·w + share·Q(w) for every quantized weight, in place.

    Called between ``backward()`` and ``optimizer.step()``, ``blend`` turns SGD into the blended coarse gradient descent
    of Yin et al. 2019: w ← (1 − ρ)·w + ρ·Q(w) − lr·gradient, with the gradient taken at Q(w).

    Raises:
        ValueError: ``share`` outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, got {share!r}")
    if share:
        # Each latent weight once, though several layers may share it.
        for latent, quantizer in {latent: quantizer for quantizer, latent in quantized_weights(model).values()}.items():
            latent.lerp_(quantizer(latent), share)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(ordinary parameters, activation steps). Weight decay belongs on the ordinary parameters only."""
    steps = [relu.step for relu in _quantized_relus(model)]
    known = set(steps)
    return [parameter for parameter in model.parameters() if parameter not in known], steps


def _quantized_relus(model: nn.Module) -> list[QuantizedReLU]:
    return [module for module in model.modules() if isinstance(module, QuantizedReLU)]


def replace_modules(model: nn.Module, by: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules wherever they stand. A module that stands in two places is replaced by one module."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out a module's second place
            if child in by:
                setattr(parent, name, by[child])
    _choose_paths(model)


def _choose_paths(model: nn.Module) -> None:
    """Let transformer layers call their activations where these are quantized.

    In evaluation without gradients torch takes a fast path. It does not call the activation's module, but computes with
    the kind of activation that the layer noted when it was built. An encoder that uses nested tensors for padding works
    on the fast path only.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            if isinstance(module.activation, QuantizedReLU):
                module.__dict__.setdefault(_FAST, module.activation_relu_or_gelu)
                module.activation_relu_or_gelu = 0
            elif _FAST in module.__dict__:
                module.activation_relu_or_gelu = module.__dict__.pop(_FAST)
        elif isinstance(module, nn.TransformerEncoder):
            if any(isinstance(getattr(layer, "activation", None), QuantizedReLU) for layer in module.layers):
                module.__dict__.setdefault(_NESTED, module.use_nested_tensor)
                module.use_nested_tensor = False
            elif _NESTED in module.__dict__:
                module.use_nested_tensor = module.__dict__.pop(_NESTED)


def float_state_dict(model: nn.Module, *, rounded: bool = False) -> dict[str, Tensor]:
    """The ``state_dict`` of the float network that was quantized: its weights, without steps of activations.

    A quantized network's own ``state_dict`` does not load into a float network. To get float weights from a saved
    quantized ``state_dict``, load it into ``quantize(network, …)`` first.

    Args:
        model: quantized by :func:`quantize`, or loaded from a packed file.
        rounded: True for the quantized weights, which the network computes with; False for the latent weights.
    """
    model = unwrapped(model)
    low_bits = low_bit_weights(model) if rounded else {}
    state = {}
    for key, value in model.state_dict().items():
        layer, _, part = key.rpartition(".")
        owner = layer.removesuffix("parametrizations.weight").removesuffix(".")
        if part == "original" and quantizer_of(model.get_submodule(owner)) is not None:
            layer, low = owner, low_bits.get(owner)
            key = join(layer, "weight")
            value = value if low is None else low_bit_values(low.scale, low.levels, low.dtype)
        if not isinstance(model.get_submodule(layer), QuantizedReLU):
            state[key] = value.detach().clone() if isinstance(value, Tensor) else value
    return state
