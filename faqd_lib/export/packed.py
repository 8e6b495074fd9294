"""Packed files of quantized networks: a weight of n bits takes n bits. Reading needs torch and safetensors only.

A packed file is a safetensors file with these parts:

- ``<layer>.levels``: uint8, the layer's integer levels at ``bits`` bits each, lowest bit first, without gaps. 1 bit
  stores the sign, 2 bits a ternary level.
- ``<layer>.scale``: one number, or one an output channel.
- ``<batch norm>.batch_norm``: (4, C), the rows weight, bias, running mean, running variance.
- Every other parameter and buffer under its own name, such as the activation steps ``<relu>.step``.
- Metadata, JSON under ``"faqd"``: bits and shape of every quantized layer, bits of every quantized ReLU, names of
  channels-last tensors, tied parameters, the architecture to build, a digest, and the user's metadata.
"""

import inspect
import json
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..models import build_model
from ..quantization.module_calls import RECTIFIERS
from ..quantization.network import (
    LowBitWeight,
    join,
    low_bit_weights,
    mark_unpacked,
    replace_modules,
    uncalibrated,
    unwrapped,
)
from ..quantization.relu import QuantizedReLU
from ..quantization.weights import low_bit_values
from ..utils.files import atomic_write, canonical_json, tensors_digest

FORMAT = "faqd-packed-1"
_HEADER = {"format", "layers", "activations", "channels_last", "architecture", "metadata", "digest"}
_LATENT = "parametrizations.weight.original"
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


class PackedFileError(ValueError):
    """A file is not a packed network, is damaged, or does not fit the network to load it into."""


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integers from 0 to 2^bits − 1 without gaps, lowest bit first: uint8 (⌈numel·bits/8⌉,).

    Example: (1, 0, 1, 1) at 1 bit → 13, which is 1101 in binary.
    """
    single = ((codes.flatten().to(torch.uint8).unsqueeze(1) >> torch.arange(bits, dtype=torch.uint8)) & 1).flatten()
    bytewise = torch.cat((single, single.new_zeros(-single.numel() % 8))).view(-1, 8)
    return (bytewise << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` integers that :func:`pack_bits` packed: uint8 (count,)."""
    single = ((packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[: count * bits]
    return (single.view(count, bits) << torch.arange(bits, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def save_packed(
    model: nn.Module,
    path: str | Path,
    *,
    architecture: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a quantized network to a packed file, atomically, and return ``path``.

    A UserWarning names activation steps that are neither calibrated nor trained.

    Args:
        model: a network quantized by :func:`faqd_lib.quantize` or loaded from a packed file. Float layers are stored
            unchanged. Wrappers, such as DataParallel and that of ``torch.compile``, are left out.
        path: path of the file, by convention ``*.safetensors``.
        architecture: arguments of :func:`faqd_lib.build_model`, such as ``{"name": "resnet20", "num_classes": 10}``.
            With them :func:`load_packed` builds the network itself.
        metadata: JSON values that belong to the network, such as class names and normalisation.

    Raises:
        ValueError: nothing in the network is quantized, a weight was changed after it was loaded from a packed file,
            a parameter has a name that the file needs (see :func:`check_names`), ``architecture`` builds a different
            network, or the metadata is not JSON.
        OSError: the file could not be written.
    """
    model = unwrapped(model)
    layers = low_bit_weights(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    relus = {name: module for name, module in modules.items() if isinstance(module, QuantizedReLU)}
    if not layers and not relus:
        raise ValueError("nothing in the network is quantized: call quantize(model, …) first")
    warn_of_uncalibrated(model)
    if architecture is not None:
        _check_architecture(model, architecture)
    check_json("metadata", metadata)
    tied = _tied(model, layers)
    tensors, described, channels_last, done = {}, {}, [], set(tied)
    for name, low in layers.items():
        done |= {join(name, _LATENT), join(name, "weight")}
        if join(name, "weight") in tied:
            continue
        levels = low.levels.cpu()
        codes = levels > 0 if low.bits == 1 else levels + (2 ** (low.bits - 1) - 1)  # from 0 on
        tensors[join(name, "levels")], tensors[join(name, "scale")] = pack_bits(codes, low.bits), low.scale.cpu()
        described[name] = {"bits": low.bits, "shape": list(levels.shape), "dtype": str(low.dtype)[6:]}
    check_names(model, described)
    for name, module in modules.items():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine and module.track_running_stats:
            rows = [getattr(module, part).detach().cpu() for part in _BATCH_NORM]
            tensors[join(name, "batch_norm")] = torch.stack(rows)
            done |= {join(name, part) for part in (*_BATCH_NORM, "num_batches_tracked")}
    for name, value in model.state_dict().items():
        if name in done:
            continue
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}: a packed file can store tensors only")
        tensors[name] = value.cpu()
        if value.ndim == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last):
            channels_last.append(name)
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    header = {
        "format": FORMAT,
        "layers": described,
        "activations": {name: {"bits": relu.bits, "step_gradient": relu.step_gradient} for name, relu in relus.items()},
        "channels_last": channels_last,
        "tied": tied,
        "architecture": dict(architecture) if architecture else None,
        "metadata": dict(metadata or {}),
    }
    header["digest"] = tensors_digest(tensors, canonical_json(header))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    return atomic_write(Path(path), lambda temporary: save_file(tensors, temporary, {"faqd": text}))


def check_names(model: nn.Module, layers: Collection[str]) -> None:
    """Raise ValueError if a parameter or buffer has a name under which a packed file stores something else.

    Such names are ``levels`` and ``scale`` in the ``layers`` with low-bit weights, and ``batch_norm`` everywhere.
    """
    for key in model.state_dict():
        owner, _, name = key.rpartition(".")
        if name == "batch_norm" or (name in ("levels", "scale") and owner in layers):
            raise ValueError(
                f"a packed file stores something else under the name {key}: rename this parameter or buffer, for "
                f"example to own_{name}"
            )


def _tied(model: nn.Module, layers: Mapping[str, LowBitWeight]) -> dict[str, str]:
    """Map each further name of a shared parameter to the name under which it is stored; names as after loading."""
    first: dict[object, str] = {}
    tied = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        name = key.replace(_LATENT, "weight")
        layer, _, part = name.rpartition(".")
        # A latent weight that two layers quantize differently becomes two weights after loading.
        how = (layers[layer].bits, layers[layer].scale.shape) if part == "weight" and layer in layers else None
        if (owner := first.setdefault((id(parameter), how), name)) != name:
            tied[name] = owner
    return tied


def _check_architecture(model: nn.Module, architecture: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``architecture`` builds this network: loading may have nothing else to build it from."""
    check_json("architecture", architecture)
    known = inspect.signature(build_model).parameters
    for name in architecture:
        if name not in known:
            raise ValueError(f"architecture has {name!r}, which build_model does not take; it takes {', '.join(known)}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in architecture:
            raise ValueError(
                f"architecture lacks {name!r}, which build_model needs; leave architecture out for your own network"
            )
    with torch.random.fork_rng(devices=[]):
        built = build_model(**architecture)
    own = {name.replace(_LATENT, "weight"): tensor.shape for name, tensor in model.state_dict().items()}
    for name, tensor in built.state_dict().items():
        if own.get(name) != tensor.shape:
            raise ValueError(
                f"architecture {dict(architecture)} builds another network than this: its {name} is "
                f"{tuple(tensor.shape)}, here it is {tuple(own[name]) if name in own else 'not there'}"
            )


def check_json(what: str, value: Mapping[str, Any] | None) -> None:
    """Raise ValueError unless ``value`` is None or a dictionary that JSON preserves."""
    if value is None:
        return
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{what} must be a dictionary whose keys are text, got {value!r}")
    for key, part in value.items():
        try:
            text = json.dumps(part)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{what}[{key!r}] is not JSON ({error}): use .tolist() or float() of arrays") from error
        if json.loads(text) != (list(part) if isinstance(part, tuple) else part):
            raise ValueError(f"{what}[{key!r}] would come back from JSON as {text}: use text as keys, and lists")


def warn_of_uncalibrated(model: nn.Module) -> None:
    """Warn if activation steps still have their initial values, which fit no images."""
    if names := uncalibrated(model):
        warnings.warn(
            f"{len(names)} activation step(s) were neither calibrated nor trained ({', '.join(names[:3])}"
            f"{', …' if len(names) > 3 else ''}): call calibrate(model, images) first",
            stacklevel=3,
        )


def read_header(path: str | Path) -> dict[str, Any]:
    """The header of a packed file: ``format``, ``layers``, ``activations``, ``architecture``, ``metadata``, ``digest``.

    Raises FileNotFoundError if there is no such file, and PackedFileError if it is not a packed network.
    """
    return _read(Path(path))[0]


def load_packed(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load the network of a packed file, in evaluation mode; its outputs equal those of the saved network bit for bit.

    Weights become ordinary float parameters of the file's precision: the network is small on disk, not in memory.
    Quantized ReLUs replace the ReLUs. The network can be described, saved and exported. To train it with quantizers,
    call ``dequantize`` and ``quantize`` first. The number of batches that a batch normalisation has seen is not stored.

    Names, shapes and kinds of activations are checked against ``model``. Other settings, such as stride and padding,
    cannot be checked.

    Args:
        path: path of the file.
        model: a newly built float network of the same architecture, changed in place; it stays on its device and in
            its wrappers, such as DataParallel. None builds the architecture that the file names.

    Raises:
        FileNotFoundError: there is no such file.
        PackedFileError: the file is not a packed network, is damaged, or does not fit ``model``.
    """
    header, tensors = _read(Path(path))
    digest = header.pop("digest")
    if tensors_digest(tensors, canonical_json(header)) != digest:
        raise PackedFileError(f"{path} is damaged: its digest does not match its content")
    if model is None:
        if header["architecture"] is None:
            raise PackedFileError(f"{path} names no architecture: give load_packed a float network")
        model = build_model(**header["architecture"])
    wrapped, model = model, unwrapped(model)
    if low_bit_weights(model) or any(isinstance(module, QuantizedReLU) for module in model.modules()):
        raise PackedFileError("the network to load into is quantized: give load_packed a float one")
    state, scales = {}, {}
    for name, layer in header["layers"].items():
        bits, shape = layer["bits"], layer["shape"]
        scale = scales[name] = tensors.pop(join(name, "scale"))
        codes = unpack_bits(tensors.pop(join(name, "levels")), bits, torch.Size(shape).numel())
        codes = codes.view(shape).to(scale.dtype)
        levels = 2 * codes - 1 if bits == 1 else codes - (2 ** (bits - 1) - 1)
        state[join(name, "weight")] = low_bit_values(scale, levels, getattr(torch, layer["dtype"]))
    for name in [name for name in tensors if name.split(".")[-1] == "batch_norm"]:
        rows = tensors.pop(name).unbind()
        state |= {f"{name.removesuffix('batch_norm')}{part}": row for part, row in zip(_BATCH_NORM, rows, strict=True)}
    # The last bits of a convolution depend on its weight's memory format. Quantized weights are always contiguous.
    state |= {
        name: tensor.contiguous(memory_format=torch.channels_last) if name in header["channels_last"] else tensor
        for name, tensor in tensors.items()
    }
    # A shared batch normalisation is stored under each of its names.
    tied = {name: owner for name, owner in header.get("tied", {}).items() if name not in state}
    state |= {name: state[owner] for name, owner in tied.items()}
    for reason in _misfits(header, state, model):
        raise PackedFileError(f"{path} does not fit the network: {reason}")
    modules = dict(model.named_modules(remove_duplicate=False))
    new = {modules[name]: QuantizedReLU(**relu, replaces=modules[name]) for name, relu in header["activations"].items()}
    replace_modules(model, new)
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), torch.device("cpu"))
    # Assigned, not copied: the network takes the precision of the file.
    model.load_state_dict(state, strict=False, assign=True)
    for name, scale in scales.items():
        mark_unpacked(modules[name], header["layers"][name]["bits"], scale)
    for name, owner in tied.items():
        (place, _, key), (source, _, source_key) = name.rpartition("."), owner.rpartition(".")
        setattr(model.get_submodule(place), key, getattr(model.get_submodule(source), source_key))
        if source in scales and key == "weight":
            mark_unpacked(model.get_submodule(place), header["layers"][source]["bits"], scales[source])
    return wrapped.to(device).eval()


def _misfits(header: dict[str, Any], state: Mapping[str, torch.Tensor], model: nn.Module) -> Iterator[str]:
    """What the file and the float network do not have in common."""
    own, modules = model.state_dict(), dict(model.named_modules(remove_duplicate=False))
    for name in header["activations"]:
        if name not in modules:
            yield f"it has no module {name!r}"
        elif not isinstance(modules[name], RECTIFIERS):
            yield f"{name} is a ReLU in the file, a {type(modules[name]).__name__} in the network"
    steps = {join(name, "step") for name in header["activations"]}
    for name, tensor in state.items():
        if name not in own and name not in steps:
            yield f"it has no {name!r}"
        elif name in own and own[name].shape != tensor.shape:
            yield f"{name} is {tuple(tensor.shape)} in the file, {tuple(own[name].shape)} in the network"
    for name in own:
        if name not in state and not name.endswith("num_batches_tracked"):
            yield f"the file has no {name!r}"


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("faqd", "{}"))
            if not isinstance(header, dict) or (header.get("format") == FORMAT and not header.keys() >= _HEADER):
                raise PackedFileError(f"{path} is damaged: its header is incomplete")
            # A copy is aligned, unlike a tensor in the file. The last bits of a product depend on the alignment.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise PackedFileError(f"{path} is damaged or not a safetensors file: {error}") from error
    if header.get("format") != FORMAT:
        raise PackedFileError(f"{path} must be a packed network, format {FORMAT}, got {header.get('format')!r}")
    return header, tensors
