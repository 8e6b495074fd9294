"""The networks of the experiments, and feature maps caught from any network by module name."""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .utils.messages import check_choice, did_you_mean, kind_of

MODEL_NAMES = (*(f"resnet{depth}" for depth in (8, 20, 32, 44, 56, 110)), "resnet18")


def stage_names(name: str) -> tuple[str, ...]:
    """Names of the modules of a network of :func:`build_model` whose maps are compared, one a stage."""
    return tuple(f"layer{stage}" for stage in range(1, 5 if name == "resnet18" else 4))


class SubsampleAndPad(nn.Module):
    """Option-A shortcut of He et al. (2016): takes every ``stride``-th pixel and appends channels of zeros.

    (batch, C, height, width) → (batch, C + new_channels, ⌈height/stride⌉, ⌈width/stride⌉).
    """

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, new_channels

    def forward(self, x: Tensor) -> Tensor:
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut. Each ReLU is a separate module, so that each can be quantized."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else SubsampleAndPad(stride, channels - in_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2016), section 4.2: 6n+2 layers, stages of 16, 32 and 64 channels.

    Input: (batch, 3, height, width), designed for 32×32 pixels, at least 4×4. Output: (batch, num_classes).
    Feature maps: ``layer1`` (16 channels, full size), ``layer2`` (32, half), ``layer3`` (64, quarter).

    Raises:
        ValueError: ``depth`` is not 6n+2 with n at least 1.
    """

    feature_names = stage_names("resnet")

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n+2 with n at least 1 (8, 20, 32, 44, 56, 110, …), got {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        for stage, (in_channels, channels, stride) in enumerate(((16, 16, 1), (16, 32, 2), (32, 64, 2)), start=1):
            first = BasicBlock(in_channels, channels, stride)
            others = (BasicBlock(channels, channels, 1) for _ in range((depth - 8) // 6))
            self.add_module(f"layer{stage}", nn.Sequential(first, *others))
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def _resnet18(num_classes: int, image_size: int) -> nn.Module:
    """torchvision's ResNet-18; up to 64 pixels its stem is a 3×3 convolution of stride 1, without pooling."""
    from .utils.torchvision_import import torchvision

    class Block(torchvision.models.resnet.BasicBlock):
        """torchvision's block with two separate ReLUs instead of a shared one, so that each can be quantized."""

        def __init__(self, inplanes: int, planes: int, *arguments, **options) -> None:
            super().__init__(inplanes, planes, *arguments, **options)
            del self.relu
            self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            out = self.relu1(self.bn1(self.conv1(x)))
            identity = x if self.downsample is None else self.downsample(x)
            return self.relu2(self.bn2(self.conv2(out)) + identity)

    model = torchvision.models.ResNet(Block, [2, 2, 2, 2], num_classes=num_classes)
    if image_size <= 64:
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    model.feature_names = stage_names("resnet18")
    return model


def build_model(name: str, num_classes: int, *, image_size: int = 32, seed: int = 0) -> nn.Module:
    """A newly initialised network; the same seed gives the same weights. Torch's global generator is not touched.

    ``image_size``, the height of the images in pixels, chooses the stem of ResNet-18.

    Raises:
        ValueError: the name is none of :data:`MODEL_NAMES`, or there are fewer than 2 classes.
    """
    check_choice("the model's name", name, MODEL_NAMES)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "resnet18":
            return _resnet18(num_classes, image_size)
        return CifarResNet(int(name.removeprefix("resnet")), num_classes)


def parameter_count(model: nn.Module) -> int:
    """Number of values in all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


_ITEM = re.compile(r"(?P<module>[^\[]*)(\[(?P<item>.+)\])?", re.DOTALL)  # a module's name, and an item of its output


class FeatureTap:
    """Catches the outputs of named modules of any network while it runs.

    >>> model = build_model("resnet20", 10)
    >>> with FeatureTap(model, ["layer1", "layer3"]) as tap:
    ...     logits = model(torch.zeros(2, 3, 32, 32))
    >>> [tuple(feature_map.shape) for feature_map in tap.features]
    [(2, 16, 32, 32), (2, 64, 8, 8)]

    ``features`` lists the maps of the latest forward pass in the order of ``names``; ``clear()`` drops them. The end of
    the block, or ``close()``, removes the hooks and leaves the network unchanged. Name an item of a module that
    returns a tuple or a dictionary: ``"attention[0]"``, ``"backbone[out]"``. A copy of the network that is made while
    the tap is open does not write into the tap.

    Raises:
        ValueError: the network has no module of that name, or a name is given twice.
        TypeError: in a forward pass, a tapped output or item is no tensor.
        RuntimeError: ``features`` was read before every tapped module had run, or a later in-place module such as
            ``nn.ReLU(inplace=True)`` overwrote a tapped output.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.names = tuple(names)
        modules = {name: module for name, module in model.named_modules() if name}
        parts = {name: _ITEM.fullmatch(str(name)) for name in self.names}
        tapped = {name: part["module"] if part else name for name, part in parts.items()}
        for name in tapped.values():
            if name not in modules:
                hint = did_you_mean(name, modules) or f": it has {', '.join(list(modules)[:5])}, …"
                raise ValueError(f"the network has no module {name!r} to tap{hint}")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"each module can be tapped once, got a name twice in {list(self.names)}")
        self._caught: OrderedDict[str, Tensor] = OrderedDict()
        # All keys exist from the start: compiled code guards on the keys, and new ones would compile it again.
        self._versions: dict[str, int | None] = dict.fromkeys(self.names)
        self._copies = any(getattr(module, "inplace", False) for module in model.modules())
        self._handles = [
            modules[tapped[name]].register_forward_hook(self._catcher(name, modules[tapped[name]], parts[name]["item"]))
            for name in self.names
        ]

    def _catcher(self, name: str, tapped: nn.Module, item: str | None):
        def catch(module: nn.Module, _inputs: tuple, output: object) -> None:
            if module is not tapped:  # a copy of the network took the hook along
                # A shallow copy, such as a replica of DataParallel, has the same dictionary of hooks.
                if not torch.compiler.is_compiling() and module._forward_hooks is not tapped._forward_hooks:
                    for key in [key for key, hook in module._forward_hooks.items() if hook is catch]:
                        module._forward_hooks.pop(key, None)
                return
            output = _tensor_of(name, output, item)
            counted = not torch.compiler.is_compiling() and not output.is_inference()
            # Compiled code has no version counters: copy a map that an in-place module could overwrite.
            self._caught[name] = output.clone() if self._copies and torch.compiler.is_compiling() else output
            self._versions[name] = output._version if counted else None

        return catch

    @property
    def features(self) -> list[Tensor]:
        """Feature maps of the latest forward pass, in the order of ``names``."""
        missing = [name for name in self.names if name not in self._caught]
        if missing:
            raise RuntimeError(f"no forward pass has reached {missing} yet: call the network first")
        for name, version in self._versions.items():
            if version is not None and self._caught[name]._version != version:
                raise RuntimeError(
                    f"the output of {name!r} was overwritten by a later in-place module (a ReLU?): tap that module, or "
                    "build it with inplace=False"
                )
        return [self._caught[name] for name in self.names]

    def clear(self) -> None:
        """Drop the maps, so that their memory can be freed."""
        self._caught.clear()

    def close(self) -> None:
        """Remove the hooks and drop the maps."""
        self.__exit__()
        self.clear()

    def __enter__(self) -> "FeatureTap":
        return self

    def __exit__(self, *_exception: object) -> None:
        # The maps stay readable after the block; only the hooks are removed.
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _tensor_of(name: str, output: object, item: str | None) -> Tensor:
    """The output of a tapped module, or an item of the output; TypeError if it is no tensor."""
    found = output
    if item is not None:
        key = int(item) if isinstance(output, tuple | list) and item.lstrip("-").isdigit() else item
        try:
            found = output[key]
        except (KeyError, IndexError, TypeError):
            found = None
    if isinstance(found, Tensor):
        return found
    if isinstance(output, Mapping):
        inside = f"a dictionary with the items {', '.join(map(str, output))}: tap one of them, such as "
        inside += f"{_ITEM.fullmatch(name)['module']}[{next(iter(output), 'out')}]"
    elif isinstance(output, tuple | list):
        inside = (
            f"a {type(output).__name__} of {len(output)}: tap one of them, such as {_ITEM.fullmatch(name)['module']}[0]"
        )
    else:
        inside = f"{kind_of(output)}: tap a module that returns a tensor"
    raise TypeError(f"{name!r} is to be tapped, and the module returned {inside}")
