"""A table of a network's layers: bits, levels in use, scale, size, and which layers stay float."""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .module_calls import WEIGHTED, ActivationCalls, is_activation, kept_modes
from .network import LowBitWeight, low_bit_weights, uncalibrated, unwrapped
from .relu import QuantizedReLU
from .weights import FLOAT_BITS

if TYPE_CHECKING:
    import pandas as pd

_NOT_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, parametrize.ParametrizationList)


@dataclass(frozen=True)
class LayerBits:
    """One row of :func:`describe`, for one layer."""

    layer: str
    kind: str
    shape: tuple[int, ...] = ()
    bits: int = FLOAT_BITS
    levels: int = 0  # in use by the weights; offered by a quantized ReLU; 0 for float
    scale: float = math.nan  # the step, or the mean of the channels' steps; NaN for float
    size: float = 0.0  # bytes of weights and scales in storage; 0 for activations and for weights of an earlier row
    note: str = ""


class Description(list[LayerBits]):
    """Rows of :func:`describe`. Printed, they are a table with the total of the bytes."""

    def frame(self) -> "pd.DataFrame":
        """One row per layer as a DataFrame; the column ``note`` is left out if all notes are empty."""
        import pandas as pd  # imported here: packed networks are read without pandas, too

        frame = pd.DataFrame([asdict(row) for row in self]).set_index("layer")
        return frame if frame["note"].any() else frame.drop(columns="note")

    def __str__(self) -> str:
        if not self:
            return "nothing to describe"
        formats = {"scale": "{:.4g}".format, "size": "{:,.0f}".format}
        before = sum(row.size if row.bits == FLOAT_BITS else 4 * math.prod(row.shape) for row in self if row.size)
        total = f"{sum(row.size for row in self):,.0f} bytes of weights and scales ({before:,.0f} in float32)"
        return f"{self.frame().to_string(formatters=formats)}\n{total}"


def describe(model: nn.Module, images: Tensor | None = None, *others: object, **named: object) -> Description:
    """List every layer with weights except normalisations, and every activation: bits, levels in use, scale, size.

    Layers without a quantizer in :func:`faqd_lib.quantize` (Conv1d, Embedding, SiLU, …) are listed with 32 bits, so
    that none stays float unnoticed. A step that was neither fitted nor trained is noted as not calibrated.

    Args:
        model: quantized, read from a packed file, or float.
        images: (batch, …) input, on which the network runs once in evaluation mode. The table then also lists
            activations that are function calls: ``F.relu`` as ``relu()``, under the name of the calling module.
            Equivalents such as ``clamp`` or ``maximum`` are not found. Modules that run more than once, or never, get
            a note. A quantized ReLU that is called in two places has one step for both.
        others, named: what the network's ``forward`` takes beside the images.

    Raises:
        ValueError: the weight of a layer from a packed file was changed after reading.
    """
    model = unwrapped(model)
    notes, functions = ({}, {}) if images is None else _run(model, images, *others, **named)
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            notes[name] = ["in_proj_weight is no Linear layer and stays float", *notes.get(name, ())]
    for name in uncalibrated(model):
        notes.setdefault(name, []).insert(0, "not calibrated")
    low_bits, first, rows = low_bit_weights(model), {}, Description()

    def add(name: str, kind: str, **values) -> None:
        rows.append(LayerBits(name, kind, note=", ".join(notes.get(name, ())), **values))

    for name, module in model.named_modules():
        kind = type(module).__name__.removeprefix("Parametrized")
        if isinstance(module, WEIGHTED):
            bits, levels, scale = FLOAT_BITS, 0, torch.tensor([])
            low = low_bits.get(name)
            if (owner := first.setdefault(_stored(_weight_of(module), low), name)) != name:
                notes.setdefault(name, []).append(f"the weight of {owner}")
            if low is not None:
                bits, scale = low.bits, low.scale
                levels = int(low.levels.add(2**7).int().flatten().bincount().count_nonzero())
            size = (module.weight.numel() * bits + scale.numel() * FLOAT_BITS) / 8 if owner == name else 0.0
            shape, mean = tuple(module.weight.shape), float(scale.mean())
            add(name, kind, shape=shape, bits=bits, levels=levels, scale=mean, size=size)
        elif isinstance(module, QuantizedReLU):
            add(name, kind, bits=module.bits, levels=2**module.bits, scale=float(module.step.detach()))
        elif (own := list(module.parameters(recurse=False))) and not isinstance(module, _NOT_LAYERS):
            size = sum(parameter.numel() * FLOAT_BITS / 8 for parameter in own)
            add(name, kind, shape=tuple(own[0].shape), size=size)
        elif is_activation(module):
            add(name, kind)
        for (caller, function), count in functions.items():
            if caller == name:
                times = f"{count} calls" if count > 1 else "a call"
                rows.append(LayerBits(name, f"{function}()", note=f"{times}, no module"))
    return rows


def weight_bytes(model: nn.Module) -> float:
    """Bytes of all parameters: low-bit weights in their bits, with their scales in 32, all others in 32."""
    low_bits, stored = low_bit_weights(model), {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        layer, _, part = key.replace("parametrizations.weight.original", "weight").rpartition(".")
        low = low_bits.get(layer) if part == "weight" else None
        bits, scales = (FLOAT_BITS, 0) if low is None else (low.bits, low.scale.numel())
        stored[_stored(parameter, low)] = parameter.numel() * bits + scales * FLOAT_BITS
    return sum(stored.values()) / 8


def _weight_of(layer: nn.Module) -> nn.Parameter:
    """The latent weight of a layer with quantizer, the weight of any other."""
    parametrized = parametrize.is_parametrized(layer, "weight")
    return next(layer.parametrizations.weight.parameters(recurse=False)) if parametrized else layer.weight


def _stored(weight: nn.Parameter, low: LowBitWeight | None) -> tuple[int, object]:
    """Identity of a stored weight: a weight that layers share is stored once for each of its widths."""
    return id(weight), None if low is None else (low.bits, low.scale.shape)


@torch.no_grad()
def _run(
    model: nn.Module, images: Tensor, *others: object, **named: object
) -> tuple[dict[str, list[str]], dict[tuple[str, str], int]]:
    """Notes on how often modules run, by name; and numbers of calls, by module and function."""
    with kept_modes(model), ActivationCalls(model) as calls:
        model.eval()(images, *others, **named)
    counts = {name: calls.modules[module] for name, module in model.named_modules()}
    notes = {
        name: [f"called {count} times" if count else "its forward is not called"]
        for name, count in counts.items()
        if count != 1
    }
    return notes, calls.functions
