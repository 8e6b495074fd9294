"""What a network expects of its pictures: size, crop, interpolation, mean and deviation. Reads files in that form."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..utils.messages import check_choice
from .batches import Normalizer
from .decoding import decode_rgb
from .images import DatasetError

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX, "hamming": Image.Resampling.HAMMING,
}  # fmt: skip


@dataclass(frozen=True)
class Preprocessing:
    """How pictures are brought to a network.

    The short side becomes ``resize_size`` pixels, and a square of ``image_size`` is cut from the centre. Aspect is kept
    unless ``squeeze`` is set: then both sides become ``resize_size``.

    Raises ValueError for values out of range.
    """

    image_size: int  # height and width of the network's input, pixels
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of each channel, for pixels in [0, 1]; ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resize_size: int = 0  # pixels, at least image_size; 0 for image_size
    interpolation: str = "bilinear"  # a key of INTERPOLATIONS; antialiased, as Pillow does it
    squeeze: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "resize_size", self.resize_size or self.image_size)
        for name in ("mean", "std"):  # JSON gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not 1 <= self.image_size <= self.resize_size:
            raise ValueError(
                f"image_size must be 1 to resize_size, got image_size={self.image_size}, "
                f"resize_size={self.resize_size}: raise resize_size, or set it to 0"
            )
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        if len(self.mean) != 3:
            raise ValueError(f"mean and std must have three values, got {self.mean!r}: networks of RGB pictures only")
        self.normalizer("cpu")  # raises ValueError for other values

    @property
    def geometry(self) -> dict[str, Any]:
        """What determines the pixels of a picture; mean and std do not."""
        names = ("image_size", "resize_size", "interpolation", "squeeze")
        return {name: getattr(self, name) for name in names}

    def normalizer(self, device: torch.device | str) -> Normalizer:
        """Mean and std, ready for pixels on ``device``."""
        return Normalizer(self.mean, self.std, torch.device(device))

    def fit(self, picture: Image.Image) -> np.ndarray:
        """Resize and crop an RGB picture: uint8 (image_size, image_size, 3).

        The pixels are those of torchvision's ``Resize`` and ``CenterCrop``, up to Pillow's rounding between its two
        passes. Only the crop is computed: a picture of 20,000 by 2 pixels needs no more memory than another.
        """
        short = min(picture.size)
        box = []
        for side in picture.size:
            resized = self.resize_size if self.squeeze else int(self.resize_size * side / short)
            start = round((resized - self.image_size) / 2)
            box.append((start * side / resized, (start + self.image_size) * side / resized))
        (left, right), (top, bottom) = box
        square = (self.image_size, self.image_size)
        return np.asarray(picture.resize(square, INTERPOLATIONS[self.interpolation], (left, top, right, bottom)))

    def read(self, path: str | os.PathLike) -> tuple[np.ndarray, list[str]]:
        """Decode and fit one file: uint8 (image_size, image_size, 3), and the notes of :func:`decoding.decode_rgb`.

        Raises DatasetError if the file cannot be decoded.
        """

        def content() -> bytes:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise DatasetError(f"{path} is not a regular file: remove it")
            return Path(path).read_bytes()

        picture, notes = decode_rgb(os.fspath(path), content)
        return self.fit(picture), notes

    def tensor(self, path: str | os.PathLike) -> torch.Tensor:
        """One file as uint8 (3, image_size, image_size), with the pixels that the cache of a folder holds."""
        return torch.from_numpy(self.read(path)[0].copy()).permute(2, 0, 1)


def preprocessing_of(model: nn.Module, spec: str) -> Preprocessing:
    """The preprocessing with which a network of timm or torchvision was trained.

    Args:
        model: the network; only timm's is looked at.
        spec: ``timm:NAME``, ``torchvision:NAME`` (its default weights) or ``torchvision:NAME:WEIGHTS``.

    Raises:
        ValueError: the spec is of another kind, or the configuration is none that :class:`Preprocessing` can hold.
        ModuleNotFoundError: timm is not installed.
    """
    library, _, name = spec.partition(":")
    if library == "timm":
        return _of_timm(model)
    if library == "torchvision" and name:
        return _of_torchvision(*name.partition(":")[::2])
    raise ValueError(
        f"{spec!r} does not say how its pictures are prepared: it is neither timm:NAME nor torchvision:NAME. Give a "
        "Preprocessing with image_size, mean and std"
    )


def _of_timm(model: nn.Module) -> Preprocessing:
    try:
        from timm.data import resolve_data_config
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a timm: network needs timm, which is not installed: pip install timm") from error
    found = resolve_data_config(model.pretrained_cfg, model=model)
    channels, height, width = found["input_size"]
    if (channels, height) != (3, width) or found["crop_mode"] not in ("center", "squash"):
        raise ValueError(
            f"timm prepares pictures of {found['input_size']} with crop_mode {found['crop_mode']!r}: give a "
            "Preprocessing, which is for square RGB pictures, cropped at the centre or squashed"
        )
    interpolation = "bicubic" if found["interpolation"] == "random" else found["interpolation"]
    return Preprocessing(
        height, tuple(found["mean"]), tuple(found["std"]), max(height, int(height / found["crop_pct"])), interpolation,
        found["crop_mode"] == "squash",
    )  # fmt: skip


def _of_torchvision(name: str, weights: str) -> Preprocessing:
    from ..utils.torchvision_import import torchvision

    known = torchvision.models.get_model_weights(name)  # ValueError for an unknown name
    check_choice(f"weights of {name}", weights or "DEFAULT", ["DEFAULT", *(one.name for one in known)])
    found = known[weights or "DEFAULT"].transforms()
    if not all(hasattr(found, field) for field in ("crop_size", "resize_size", "mean", "std", "interpolation")):
        raise ValueError(f"{name} is no classifier of pictures, its transforms are {found}: give a Preprocessing")
    return Preprocessing(
        found.crop_size[0], tuple(found.mean), tuple(found.std), max(found.crop_size[0], found.resize_size[0]),
        found.interpolation.value,
    )  # fmt: skip
