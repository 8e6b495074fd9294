"""The teacher: built from a short name, given its weights, and checked before anything is trained."""

import importlib
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..utils.messages import did_you_mean, first_line, kind_of

SPECS = "timm:NAME, torchvision:NAME, torchvision:NAME:WEIGHTS or package.module:function"
# Arguments of timm's and torchvision's builders that load weights, or download them.
LOADING = ("weights", "pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


class TeacherError(ValueError):
    """A teacher cannot be built, or nothing can be learned from it; the message says what is wrong and what to do."""


def load_teacher(
    spec: str, weights: str | Path | None = None, *, pretrained: bool = False, **arguments: Any
) -> nn.Module:
    """Build a network in evaluation mode, with its weights.

    Args:
        spec: ``timm:NAME``, ``torchvision:NAME``, ``torchvision:NAME:WEIGHTS``, or ``package.module:function`` for a
            function that returns a network.
        weights: a file with the network's ``state_dict``; see :func:`load_weights`.
        pretrained: whether timm or torchvision loads its own weights, which may need a download.
        arguments: of the function, or of timm's and torchvision's builders, such as ``num_classes=10``.

    Raises:
        TeacherError: an unknown name, a function that fails or returns no network, random weights, or weights that do
            not fit.
        FileNotFoundError: there is no file ``weights``.
        ModuleNotFoundError: a ``timm:`` teacher without timm.
        OSError: a download failed.
    """
    if weights is not None and pretrained:
        raise TeacherError("give the teacher's weights by a file or by pretrained, not by both")
    library, _, name = spec.partition(":")
    if not library or not name:
        raise TeacherError(f"a teacher must be {SPECS}, got {spec!r}")
    builder = {"timm": _of_timm, "torchvision": _of_torchvision}.get(library)
    if builder is None:
        model = _called(spec, _function(library, name), arguments)
    elif weights is None and not pretrained:
        raise TeacherError(f"{spec} would have random weights: give a file of weights, or ask for its pretrained ones")
    else:
        model = builder(spec, name, pretrained, arguments)
    if weights is not None:
        load_weights(model, Path(weights))
    return model.eval()


def build_network(spec: str, **arguments: Any) -> nn.Module:
    """Build a network with random weights, to load a packed file into; errors as in :func:`load_teacher`.

    It also raises TeacherError if timm or torchvision is given one of the arguments :data:`LOADING`.
    """
    library, _, name = spec.partition(":")
    builder = {"timm": _of_timm, "torchvision": _of_torchvision}.get(library)
    if builder is None:
        return load_teacher(spec, **arguments)
    if loading := [argument for argument in arguments if argument in LOADING]:
        raise TeacherError(f"{spec} is built with random weights here: leave out {', '.join(loading)}")
    return builder(spec, name, False, arguments).eval()


def _of_timm(spec: str, name: str, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{spec} needs timm, which is not installed: pip install timm") from error
    if not timm.is_model(name.partition(".")[0]):
        raise TeacherError(f"timm has no network {name!r}{did_you_mean(name, timm.list_models())}")
    return _called(spec, timm.create_model, {"model_name": name, "pretrained": pretrained, **arguments})


def _of_torchvision(spec: str, name: str, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    from ..utils.torchvision_import import torchvision

    name, _, weights = name.partition(":")
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise TeacherError(f"torchvision has no classifier {name!r}{did_you_mean(name, known)}")
    offered = [one.name for one in torchvision.models.get_model_weights(name)]
    if weights and weights not in (*offered, "DEFAULT"):
        raise TeacherError(f"torchvision's weights of {name} are {', '.join(offered)}, got {weights!r}")
    chosen = (weights or "DEFAULT") if pretrained else None
    # GoogLeNet and Inception warn of initial weights, which are not kept here.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*default weight initialization", FutureWarning)
        return _called(spec, torchvision.models.get_model, {"name": name, "weights": chosen, **arguments})


def _function(module: str, name: str) -> Callable[..., object]:
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise TeacherError(f"{module} needs the module {error.name!r}, which is not there: install it") from error
        raise TeacherError(
            f"there is no module {error.name!r} to take the teacher from: a teacher is {SPECS}; a module of your own "
            "must be installed, or lie in the working directory"
        ) from error
    found = getattr(imported, name, None)
    if not callable(found):
        names = [one for one, value in vars(imported).items() if callable(value) and not one.startswith("_")]
        raise TeacherError(f"{module} has no function {name!r}{did_you_mean(name, names)}")
    return found


def _called(spec: str, function: Callable[..., object], arguments: Mapping[str, Any]) -> nn.Module:
    try:
        model = function(**arguments)
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise TeacherError(f"{spec} cannot be built ({first_line(error)}): check its arguments") from error
    if not isinstance(model, nn.Module):
        raise TeacherError(f"{spec} must return a torch.nn.Module, got {kind_of(model)}")
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the ``state_dict`` of a float network, which must fit in every name and shape.

    Only ``num_batches_tracked`` of batch normalisations may be missing.

    Args:
        path: a safetensors file, or one of ``torch.save(model.state_dict(), path)``.

    Raises:
        FileNotFoundError: there is no such file.
        TeacherError: the file holds no ``state_dict``, or one that does not fit.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} with the teacher's weights")
    state, own = _state(path), model.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name}: {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the network"
        for name in state
        if name in own and state[name].shape != own[name].shape
    ]
    problems = {"missing in the file": missing, "not in the network": unexpected, "of other shapes": shapes}
    if any(problems.values()):
        parts = "; ".join(f"{what}: {_listed(names)}" for what, names in problems.items() if names)
        hint = ". Build it with the arguments of its training, such as num_classes" if shapes else ""
        raise TeacherError(f"the weights in {path} do not fit {type(model).__name__}: {parts}{hint}")
    model.load_state_dict(state, strict=False)


def _state(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError:
        pass  # perhaps a file of torch.save
    saved = "save weights by torch.save(model.state_dict(), path) or safetensors.torch.save_file"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    # What unpickling raises for a damaged file, by its documentation, and torch's own errors.
    except (
        pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, LookupError, AttributeError, ImportError,
    ) as error:  # fmt: skip
        raise TeacherError(f"{path} is damaged, holds more than tensors, or is no file of weights: {saved}") from error
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        inside = f" with the items {_listed(map(str, found))}" if isinstance(found, Mapping) else ""
        raise TeacherError(f"{path} must hold a state_dict, got {kind_of(found)}{inside}: {saved}")
    return dict(found)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@torch.no_grad()
def check_teacher(model: nn.Module, images: torch.Tensor) -> list[str]:
    """Put a teacher into evaluation mode, and check it on a batch of normalised images (batch, 3, height, width).

    Returns:
        Lines that say what was changed or is remarkable.

    Raises:
        TeacherError: a weight or a logit is not finite, the network does not take the images, it returns no tensor
            (batch, classes) with at least two classes, or it gives all images the same logits.
    """
    notes = []
    if any(module.training for module in model.modules()):
        notes.append("the teacher was in training mode, and was put into evaluation mode")
        model.eval()
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
            raise TeacherError(f"the teacher's {name} holds NaN or an infinity: load intact weights")
    try:
        logits = model(images)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        others = {str(one.dtype)[6:] for one in model.parameters() if one.is_floating_point()} - {"float32"}
        kinds = ", ".join(sorted(others))
        remedy = f"its weights are {kinds}, give teacher.float()" if others else "check the preprocessing"
        raise TeacherError(
            f"the teacher takes no images {tuple(images.shape)} ({first_line(error)}): {remedy}"
        ) from error
    if not isinstance(logits, torch.Tensor):
        inside = f" with the items {', '.join(map(str, logits))}" if isinstance(logits, Mapping) else ""
        raise TeacherError(
            f"the teacher must return a tensor (batch, classes), got {kind_of(logits)}{inside}: wrap it in a module "
            "that returns the logits alone"
        )
    if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
        raise TeacherError(
            f"the teacher must return logits (batch, classes) of at least 2 classes, got {tuple(logits.shape)} for "
            f"{len(images)} images"
        )
    if not bool(logits.isfinite().all()):
        raise TeacherError("the teacher's logits hold NaN or an infinity: check its weights and the preprocessing")
    if bool((logits == logits[0]).all()):
        raise TeacherError("the teacher gives different pictures the same logits: nothing can be learned from it")
    named = len(logits.argmax(1).unique())
    if named == 1:
        notes.append(f"the teacher names one class for all of the first {len(images)} pictures: agreement says little")
    return notes
