"""The networks of the experiments, and feature maps caught from any network by module name."""

import re
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantization.module_calls import kept_modes
from .utils.messages import check_choice, did_you_mean, kind_of

DENSE_NAMES = ("linknet8", "linknet16")  # one prediction a pixel
MODEL_NAMES = (
    *(f"resnet{depth}" for depth in (8, 20, 32, 44, 56, 110)), "resnet18", "plain20", "mobilenet", "mixer",
    *DENSE_NAMES,
)  # fmt: skip


def stage_names(name: str) -> tuple[str, ...]:
    """Names of the modules of a network of :func:`build_model` whose maps are compared, one a stage.

    Stages 1 to 3 of a dense network are its encoder, 4 to 6 its decoder.
    """
    if name == "mixer":
        return PatchMixer.feature_names
    encoder = tuple(f"layer{stage}" for stage in range(1, 5 if name == "resnet18" else 4))
    return (*encoder, *(f"decoder{stage}" for stage in (3, 2, 1))) if is_dense(name) else encoder


def is_dense(name: str) -> bool:
    """Whether a network of :func:`build_model` predicts a class for each pixel."""
    return name in DENSE_NAMES


def ends_with_relus(name: str) -> bool:
    """Whether a ReLU ends each stage of a network of :func:`build_model`, so that the sum before it can be tapped."""
    return name != "mixer"


def tap_names(model: nn.Module, taps: str = "output") -> tuple[str, ...]:
    """Names for :class:`FeatureTap`, one a stage: its output, or with ``"before ReLU"`` the sum that its ReLU gets.

    Raises:
        ValueError: ``taps`` is unknown, or no ReLU ends a stage, as in a patch mixer.
    """
    check_choice("taps", taps, ("output", "before ReLU"))
    if taps == "output":
        return tuple(model.feature_names)
    return tuple(f"{_last_relu(model, stage)}@input" for stage in model.feature_names)


def _last_relu(model: nn.Module, stage: str) -> str:
    """Name of the ReLU that ends a stage, a sequence of blocks or a decoder's; ValueError if none does."""
    module = model.get_submodule(stage)
    if isinstance(module, DecoderStage):
        return f"{stage}.relu2"
    if isinstance(module, nn.Sequential) and hasattr(module[-1], "relu2"):
        return f"{stage}.{len(module) - 1}.relu2"
    raise ValueError(f"stage {stage!r} of {type(model).__name__} does not end with a ReLU: set taps to 'output'")


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


class PlainBlock(BasicBlock):
    """The block without its shortcut, as in the plain networks of He et al. (2016)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        del self.shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)))


class DepthwiseBlock(PlainBlock):
    """A 3×3 convolution of each channel alone, then a 1×1 convolution (MobileNet, Howard et al. 2017)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, channels, 1, bias=False)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2016), section 4.2: 6n+2 layers, stages of 16, 32 and 64 channels.

    Input: (batch, 3, height, width), designed for 32×32 pixels, at least 4×4. Output: (batch, num_classes).
    Feature maps: ``layer1`` (16 channels, full size), ``layer2`` (32, half), ``layer3`` (64, quarter).
    Another ``block`` is called with the same arguments; ``width`` is the number of channels of the first stage.

    Raises:
        ValueError: ``depth`` is not 6n+2 with n at least 1.
    """

    feature_names = stage_names("resnet")

    def __init__(self, depth: int, num_classes: int = 10, block: type[nn.Module] = BasicBlock, width: int = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n+2 with n at least 1 (8, 20, 32, 44, 56, 110, …), got {depth}")
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        for stage, (before, after, stride) in enumerate(((1, 1, 1), (1, 2, 2), (2, 4, 2)), start=1):
            first = block(before * width, after * width, stride)
            others = (block(after * width, after * width, 1) for _ in range((depth - 8) // 6))
            self.add_module(f"layer{stage}", nn.Sequential(first, *others))
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class DecoderStage(nn.Module):
    """1×1 convolution to the skip's channels, nearest pixels of its size, sum with the skip, 3×3 convolution.

    (batch, in_channels, h, w) and a skip (batch, channels, height, width) → (batch, channels, height, width).
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = F.interpolate(x, size=skip.shape[2:], mode="nearest") + skip
        return self.relu2(self.bn2(self.conv2(x)))


class LinkNet(nn.Module):
    """A small encoder-decoder after LinkNet (Chaurasia and Culurciello 2017), for one prediction a pixel.

    A stem of stride 2 with ``width`` channels; an encoder of three stages of two residual blocks, with 2, 4 and 8 times
    ``width`` channels at a quarter, an eighth and a sixteenth of the size; a decoder of three stages that add the map
    of the encoder of the same size; a 1×1 classifier at half size, and bilinear logits of full size.

    Input: (batch, 3, height, width) of any size. Output: (batch, num_classes, height, width).
    Feature maps: ``layer1`` (2·width channels, a quarter of the size), ``layer2``, ``layer3`` of the encoder;
    ``decoder3`` (4·width channels, an eighth of the size), ``decoder2``, ``decoder1`` of the decoder.
    """

    feature_names = stage_names(DENSE_NAMES[0])

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        channels = [width * 2**stage for stage in range(4)]
        for stage in (1, 2, 3):
            before, after = channels[stage - 1 : stage + 1]
            self.add_module(f"layer{stage}", nn.Sequential(BasicBlock(before, after, 2), BasicBlock(after, after, 1)))
        for stage in (3, 2, 1):
            self.add_module(f"decoder{stage}", DecoderStage(channels[stage], channels[stage - 1]))
        self.classifier = nn.Conv2d(width, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.relu(self.bn1(self.conv1(x)))
        first = self.layer1(stem)
        second = self.layer2(first)
        out = self.decoder3(self.layer3(second), second)
        out = self.decoder1(self.decoder2(out, first), stem)
        return F.interpolate(self.classifier(out), size=x.shape[2:], mode="bilinear", align_corners=False)


class MixerBlock(nn.Module):
    """Mixes tokens, then channels, each by two linear layers with a ReLU between (MLP-Mixer, Tolstikhin et al. 2021).

    (batch, N, width) → the same shape.
    """

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens1, self.relu1, self.tokens2 = nn.Linear(tokens, tokens), nn.ReLU(), nn.Linear(tokens, tokens)
        self.channels1, self.relu2 = nn.Linear(width, 2 * width), nn.ReLU()
        self.channels2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens2(self.relu1(self.tokens1(self.norm1(x).mT))).mT
        return x + self.channels2(self.relu2(self.channels1(self.norm2(x))))


class PatchMixer(nn.Module):
    """An MLP-Mixer with ReLUs on patches of 4×4 pixels: six blocks, 96 channels, no convolution.

    Input: (batch, 3, height, width), both multiples of 4; the size is fixed by ``image_size``. Output: (batch,
    num_classes). Its maps are tokens (batch, N, 96), row by row, after the second, fourth and sixth block. For 32×32
    pixels N = 64, the 8×8 grid of a CIFAR ResNet's last stage.

    Raises:
        ValueError: ``image_size`` is not a multiple of 4.
    """

    feature_names = ("blocks.1", "blocks.3", "blocks.5")
    patch, width = 4, 96

    def __init__(self, num_classes: int = 10, image_size: int = 32) -> None:
        super().__init__()
        if image_size < 1 or image_size % self.patch:
            raise ValueError(f"image_size must be a multiple of {self.patch} for a patch mixer, got {image_size}")
        tokens = (image_size // self.patch) ** 2
        self.embed = nn.Linear(3 * self.patch**2, self.width)
        self.blocks = nn.Sequential(*(MixerBlock(tokens, self.width) for _ in range(6)))
        self.norm = nn.LayerNorm(self.width)
        self.fc = nn.Linear(self.width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))  # (batch, 3, H/4, 4, W/4, 4)
        tokens = rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return self.fc(self.norm(self.blocks(self.embed(tokens))).mean(1))


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

    ``image_size``, the height of the images in pixels, chooses the stem of ResNet-18 and the tokens of the mixer.
    ``plain20`` is ResNet-20 without shortcuts; ``mobilenet`` has its depth with depthwise convolutions, and 32, 64 and
    128 channels.

    Raises:
        ValueError: the name is none of :data:`MODEL_NAMES`, there are fewer than 2 classes, or the mixer does not fit
            the images.
    """
    check_choice("the model's name", name, MODEL_NAMES)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "resnet18":
            return _resnet18(num_classes, image_size)
        if is_dense(name):
            return LinkNet(int(name.removeprefix("linknet")), num_classes)
        if name == "mixer":
            return PatchMixer(num_classes, image_size)
        if name in ("plain20", "mobilenet"):
            block, width = (PlainBlock, 16) if name == "plain20" else (DepthwiseBlock, 32)
            return CifarResNet(20, num_classes, block, width)
        return CifarResNet(int(name.removeprefix("resnet")), num_classes)


def parameter_count(model: nn.Module) -> int:
    """Number of values in all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


# A module's name, an item of its output, and a mark: channels come last, or the input is meant.
_ITEM = re.compile(r"(?P<module>[^\[@]*)(\[(?P<item>.+?)\])?(?P<mark>@bhwc|@input)?", re.DOTALL)


class FeatureTap:
    """Catches the outputs of named modules of any network while it runs.

    >>> model = build_model("resnet20", 10)
    >>> with FeatureTap(model, ["layer1", "layer3"]) as tap:
    ...     logits = model(torch.zeros(2, 3, 32, 32))
    >>> [tuple(feature_map.shape) for feature_map in tap.features]
    [(2, 16, 32, 32), (2, 64, 8, 8)]

    ``features`` lists the maps of the latest forward pass in the order of ``names``; ``clear()`` drops them. The end of
    the block, or ``close()``, removes the hooks and leaves the network unchanged. Name an item of a module that
    returns a tuple or a dictionary: ``"attention[0]"``, ``"backbone[out]"``. The suffix ``@bhwc`` marks a map (batch,
    height, width, channels), as in Swin transformers: ``"features.1@bhwc"`` gives a view (batch, channels, height,
    width). The suffix ``@input`` takes what the module gets, such as the sum before a ReLU. A copy of the network that
    is made while the tap is open does not write into the tap.

    Raises:
        ValueError: the network has no module of that name, a name is given twice, or a module with ``@input``
            overwrites its input.
        TypeError: in a forward pass, a tapped output or item is no tensor, one with ``@bhwc`` has no 4 dimensions, or a
            module with ``@input`` gets no input by position and not one by keyword.
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
        for name, module in tapped.items():
            if parts[name] and parts[name]["mark"] == "@input" and getattr(modules[module], "inplace", False):
                raise ValueError(f"{module!r} overwrites its input, which {name!r} is to tap: build it inplace=False")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"each module can be tapped once, got a name twice in {list(self.names)}")
        self._caught: OrderedDict[str, Tensor] = OrderedDict()
        # All keys exist from the start: compiled code guards on the keys, and new ones would compile it again.
        self._versions: dict[str, int | None] = dict.fromkeys(self.names)
        self._copies = any(getattr(module, "inplace", False) for module in model.modules())
        self._handles = [
            modules[tapped[name]].register_forward_hook(
                self._catcher(name, modules[tapped[name]], parts[name]["item"], parts[name]["mark"]), with_kwargs=True
            )
            for name in self.names
        ]

    def _catcher(self, name: str, tapped: nn.Module, item: str | None, mark: str | None):
        def catch(module: nn.Module, inputs: tuple, named: dict, output: object) -> None:
            if module is not tapped:  # a copy of the network took the hook along
                # A shallow copy, such as a replica of DataParallel, has the same dictionary of hooks.
                if not torch.compiler.is_compiling() and module._forward_hooks is not tapped._forward_hooks:
                    for key in [key for key, hook in module._forward_hooks.items() if hook is catch]:
                        module._forward_hooks.pop(key, None)
                        module._forward_hooks_with_kwargs.pop(key, None)
                return
            output = _tensor_of(name, _input_of(name, inputs, named) if mark == "@input" else output, item)
            if mark == "@bhwc":
                if output.ndim != 4:
                    raise TypeError(f"{name!r} must be a map (batch, height, width, channels), got {kind_of(output)}")
                output = output.permute(0, 3, 1, 2)
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


def _input_of(name: str, inputs: tuple, named: dict) -> object:
    """The first input of a tapped module, or its only one by keyword; TypeError if there is neither."""
    if not inputs and len(named) != 1:
        given = f"several by keyword, {', '.join(named)}" if named else "none"
        raise TypeError(
            f"{name!r} is to be tapped, which needs one input, and the module got {given}: give it by position, or tap "
            "the module that returns it"
        )
    return inputs[0] if inputs else next(iter(named.values()))


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


@dataclass(frozen=True)
class _Output:
    """What one module returned in the forward pass of :func:`stage_taps`."""

    name: str
    pixels: int  # of a map, or tokens
    tokens: bool
    channels_last: bool | None  # None: both layouts fit
    storage: int  # the same for modules that return the same tensor
    intact: bool = True  # False: overwritten later in place


@torch.no_grad()
def stage_taps(model: nn.Module, example_images: Tensor) -> list[str]:
    """Names for :class:`FeatureTap`: the last map of every resolution, before the resolution falls.

    One forward pass in evaluation mode finds them, in the order of execution. Maps are outputs of modules, of at least
    2 pixels. The end of a block or stage is preferred to modules inside the block that lowers the resolution. A map
    that a later in-place module overwrites is left out. After a fall, maps of higher resolution are left out, such as
    those of a U-Net's decoder.

    If fewer than two resolutions are found and modules return tokens (batch, N, channels), the network is taken for a
    transformer. Its taps are then the outputs of the blocks at one third, two thirds and the end. Class tokens stay in.

    Examples, of torchvision: ``["relu", "layer1", "layer2", "layer3", "layer4"]`` of ResNet-18; ``["features.1@bhwc",
    "features.3@bhwc", …]`` of a Swin transformer, whose maps are (batch, height, width, channels).

    Args:
        model: any network; modes, buffers and hooks are left as they were.
        example_images: (batch, channels, height, width), the network's input. Give at least 2 images: outputs whose
            first dimension is not the batch, such as windows, are then recognised and left out. The proportions of the
            images tell the layout of a map.

    Raises:
        ValueError: ``example_images`` has other dimensions, or no module returns a map or tokens.
    """
    if not isinstance(example_images, Tensor) or example_images.ndim != 4 or 0 in example_images.shape:
        raise ValueError(
            f"example_images must be (batch, channels, height, width) with nothing empty, got {kind_of(example_images)}"
        )
    outputs = _without_dips(_outputs(model, example_images))
    maps = [output for output in outputs if not output.tokens]
    names = _last_of_each_resolution(maps)
    if len(names) < 2 and (tokens := [output for output in outputs if output.tokens and output.pixels > 1]):
        return _thirds(model, tokens)
    if not names:
        raise ValueError(
            f"no module of {type(model).__name__} returns a map (batch, channels, height, width) of at least 2 pixels, "
            f"or tokens, for images {tuple(example_images.shape)}: give larger images, or name the taps yourself"
        )
    return names


def _outputs(model: nn.Module, images: Tensor) -> list[_Output]:
    """The last output of every module that returns a map or tokens, in the order of execution."""
    caught: dict[str, tuple[Tensor, int | None]] = {}

    def hook(name: str):
        def catch(_module: nn.Module, _inputs: tuple, output: object) -> None:
            if isinstance(output, Tensor):
                caught.pop(name, None)
                caught[name] = output, None if output.is_inference() else output._version

        return catch

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if name and "parametrizations" not in name.split(".")
    ]
    try:
        # Tensors of the inference mode would not tell which of them are overwritten.
        with kept_modes(model), torch.inference_mode(False), torch.no_grad():
            model.eval()(images.clone() if images.is_inference() else images)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, (output, version) in caught.items():
        if output.ndim not in (3, 4) or len(output) != len(images) or not output.is_floating_point():
            continue
        last = _channels_last(output, images) if output.ndim == 4 else False
        pixels = (
            output.shape[1] if output.ndim == 3 else output.shape[1:3].numel() if last else output.shape[2:].numel()
        )
        intact = version is None or output._version == version
        found.append(_Output(name, pixels, output.ndim == 3, last, output.data_ptr(), intact))
    return found


def _channels_last(output: Tensor, images: Tensor) -> bool | None:
    """Whether a map is (batch, height, width, channels), by the images' proportions; None if both layouts fit."""
    height, width = images.shape[2:]

    def misfit(rows: int, columns: int) -> float:
        return abs(rows * width - columns * height) / max(rows * width, columns * height)

    first, last = misfit(*output.shape[2:]), misfit(*output.shape[1:3])
    return None if first == last else last < first


def _above(name: str) -> list[str]:
    """Names of the modules that a module stands in: ``"a.b.c"`` → ``["a", "a.b"]``."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _without_dips(outputs: list[_Output]) -> list[_Output]:
    """The outputs that have no fewer pixels than the modules they stand in, unlike those of an attention's pooling."""
    sizes = {output.name: output.pixels for output in outputs}
    return [one for one in outputs if all(sizes.get(name, 0) <= one.pixels for name in _above(one.name))]


def _last_of_each_resolution(maps: list[_Output]) -> list[str]:
    """Names of the last map before each fall of the number of pixels."""
    sizes = {output.name: output.pixels for output in maps}
    inside = defaultdict(set)  # resolutions in a module, by its name
    for output in maps:
        for name in (*_above(output.name), output.name):
            inside[name].add(output.pixels)
    # A module whose modules fall more than once is a sequence of stages, and no stage.
    sequences = {name for name, resolutions in inside.items() if len(resolutions) > 2}

    def in_a_falling_module(output: _Output) -> bool:
        above = [name for name in _above(output.name) if name not in sequences]
        return any(sizes.get(name, output.pixels) < output.pixels for name in above)

    stages: list[list[_Output]] = []
    for output in maps:
        if output.pixels == 1:  # a pooled map, or a stage that is too small: its affinity is always 0
            continue
        if not stages or output.pixels < stages[-1][0].pixels:
            stages.append([output])
        elif output.pixels == stages[-1][0].pixels:
            stages[-1].append(output)
    chosen = []
    for stage in stages:
        intact = [output for output in stage if output.intact]
        ends = [output for output in intact if not in_a_falling_module(output)] or intact
        if not ends:
            continue
        same = [output for output in ends if output.storage == ends[-1].storage]
        whole = [output for output in same if output.name not in sequences] or same
        chosen.append(min(whole, key=lambda output: output.name.count(".")))
    layouts = [output.channels_last for output in chosen if output.channels_last is not None]
    usual = sum(layouts) * 2 > len(layouts)
    return [
        output.name + ("@bhwc" if (usual if output.channels_last is None else output.channels_last) else "")
        for output in chosen
    ]


def _thirds(model: nn.Module, tokens: list[_Output]) -> list[str]:
    """Names of the blocks at one third, two thirds and the end; blocks are alike and stand in one container."""
    modules, alike = dict(model.named_modules()), defaultdict(list)
    for output in tokens:
        if modules[output.name]._modules:
            alike[output.name.rpartition(".")[0], type(modules[output.name]), output.pixels].append(output.name)
    blocks = max(alike.values(), key=len, default=[tokens[-1].name])
    return list(dict.fromkeys(blocks[-(-len(blocks) * third // 3) - 1] for third in (1, 2, 3)))
