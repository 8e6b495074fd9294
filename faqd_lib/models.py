"""Networks, and feature maps tapped from any network by module name."""

import difflib
from collections import OrderedDict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

CIFAR_DEPTHS = (8, 20, 32, 44, 56, 110)


class SubsampleAndPad(nn.Module):
    """Option-A shortcut of He et al. (2016): every second pixel, new channels filled with zeros; no parameters."""

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, new_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut. Each ReLU is a module of its own, so that each can be quantized."""

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2016), section 4.2: 6n+2 layers, stages of 16, 32 and 64 channels.

    Input (batch, 3, height, width), height and width at least 4 and made for 32; output (batch, num_classes).
    Feature maps to tap: ``layer1`` (16 channels, full size), ``layer2`` (32, half), ``layer3`` (64, quarter).
    """

    feature_names = ("layer1", "layer2", "layer3")

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n+2 with n at least 1 (8, 20, 32, 44, 56, 110, …), got {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        in_channels = 16
        for stage, channels in enumerate((16, 32, 64), start=1):
            blocks = []
            for block in range((depth - 2) // 6):
                stride = 2 if stage > 1 and block == 0 else 1
                blocks.append(BasicBlock(in_channels, channels, stride))
                in_channels = channels
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def _resnet18(num_classes: int, image_size: int) -> nn.Module:
    """torchvision's ResNet-18; for images up to 64 pixels the stem is 3×3 with stride 1 and no pooling."""
    from .utils.torchvision_import import torchvision

    class Block(torchvision.models.resnet.BasicBlock):
        """torchvision's block with a ReLU of its own at each of the two places, so that each can be quantized."""

        def __init__(self, inplanes: int, planes: int, *arguments, **options) -> None:
            super().__init__(inplanes, planes, *arguments, **options)
            del self.relu
            self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.relu1(self.bn1(self.conv1(x)))
            identity = x if self.downsample is None else self.downsample(x)
            return self.relu2(self.bn2(self.conv2(out)) + identity)

    model = torchvision.models.ResNet(Block, [2, 2, 2, 2], num_classes=num_classes)
    if image_size <= 64:
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    model.feature_names = ("layer1", "layer2", "layer3", "layer4")
    return model


MODEL_NAMES = tuple(f"resnet{depth}" for depth in CIFAR_DEPTHS) + ("resnet18",)


def build_model(name: str, num_classes: int, *, image_size: int = 32, seed: int = 0) -> nn.Module:
    """A freshly initialised network; the same seed gives the same weights and leaves the global generator alone.

    Args:
        name: one of :data:`MODEL_NAMES`.
        num_classes: size of the output, at least 2.
        image_size: height of the images in pixels (chooses the stem of ResNet-18).
        seed: seed of the initial weights.

    Raises:
        ValueError: unknown name, or fewer than 2 classes.
    """
    if name not in MODEL_NAMES:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODEL_NAMES)}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "resnet18":
            return _resnet18(num_classes, image_size)
        return CifarResNet(int(name.removeprefix("resnet")), num_classes)


def parameter_count(model: nn.Module) -> int:
    """Number of learned values."""
    return sum(parameter.numel() for parameter in model.parameters())


class FeatureTap:
    """Catch the outputs of named modules of any network while it runs.

    >>> model = build_model("resnet20", 10)
    >>> with FeatureTap(model, ["layer1", "layer3"]) as tap:
    ...     logits = model(torch.zeros(2, 3, 32, 32))
    >>> [tuple(feature_map.shape) for feature_map in tap.features]
    [(2, 16, 32, 32), (2, 64, 8, 8)]

    ``features`` lists the maps of the latest forward pass in the order of ``names``; ``clear()`` lets go of them.
    Hooks are removed on exit (or by ``close()``), so a network is never left changed.

    Raises:
        ValueError: a name that the network does not have (close matches are listed), or a name given twice.
        RuntimeError: ``features`` is read before every tapped module has run, or a module behind a tapped one (an
            ``nn.ReLU(inplace=True)``) has overwritten its output.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.names = tuple(names)
        modules = dict(model.named_modules())
        for name in self.names:
            if name not in modules or name == "":
                near = difflib.get_close_matches(name, modules, n=3, cutoff=0.3) or list(modules)[1:6]
                raise ValueError(f"the network has no module {name!r} to tap; did you mean one of {near}?")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"a module is tapped twice in {list(self.names)}")
        self._caught: OrderedDict[str, torch.Tensor] = OrderedDict()
        # All keys from the beginning: compiled code looks at them, and is made anew where there are others.
        self._versions: dict[str, int | None] = dict.fromkeys(self.names)
        self._copies = any(getattr(module, "inplace", False) for module in model.modules())
        self._handles = [modules[name].register_forward_hook(self._catcher(name)) for name in self.names]

    def _catcher(self, name: str):
        def catch(_module: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
            counted = not torch.compiler.is_compiling() and not output.is_inference()
            # A compiler follows no versions: where something might overwrite the map, a copy is kept.
            self._caught[name] = output.clone() if self._copies and torch.compiler.is_compiling() else output
            self._versions[name] = output._version if counted else None

        return catch

    @property
    def features(self) -> list[torch.Tensor]:
        """Feature maps of the latest forward pass, in the order of ``names``."""
        missing = [name for name in self.names if name not in self._caught]
        if missing:
            raise RuntimeError(f"no forward pass has reached {missing} yet: call the network first")
        for name in self.names:
            version = self._versions[name]
            if version is not None and self._caught[name]._version != version:
                raise RuntimeError(
                    f"the output of {name!r} was overwritten by a module behind it (an in-place ReLU?): tap that one, "
                    "or set its inplace=False"
                )
        return [self._caught[name] for name in self.names]

    def clear(self) -> None:
        """Forget the maps, so that their memory can be freed."""
        self._caught.clear()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def __enter__(self) -> "FeatureTap":
        return self

    def __exit__(self, *_exception: object) -> None:
        # The maps stay readable after the block; only the hooks go.
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
