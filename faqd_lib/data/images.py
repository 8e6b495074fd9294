"""Images in memory: uint8 splits, with labels or without any, and seeded class-balanced subsets of them."""

from dataclasses import dataclass

import torch


class DatasetError(RuntimeError):
    """A dataset is missing, damaged or not what its name says; the message names what, where and what to do."""


@dataclass(frozen=True)
class Images:
    """A split: ``pixels`` uint8 (count, 3, height, width) and ``labels`` int64 (count), or None if it has none."""

    pixels: torch.Tensor
    labels: torch.Tensor | None = None

    def __post_init__(self) -> None:
        pixels = self.pixels
        if not isinstance(pixels, torch.Tensor) or pixels.dtype != torch.uint8 or pixels.ndim != 4:
            got = type(pixels).__name__
            if isinstance(pixels, torch.Tensor):
                got = f"{pixels.dtype} {tuple(pixels.shape)}"
            raise ValueError(f"pixels must be a uint8 tensor (count, channels, height, width), got {got}")
        if pixels.shape[1] not in (1, 3) and pixels.shape[3] in (1, 3):
            raise ValueError(
                f"pixels must be (count, channels, height, width), got {tuple(pixels.shape)}: channels come second, "
                "use pixels.permute(0, 3, 1, 2)"
            )
        if self.labels is not None and len(self.labels) != len(self.pixels):
            raise ValueError(f"{len(self.pixels)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.pixels)

    def unlabelled(self) -> "Images":
        """The same images without labels: what label-free training is given."""
        return Images(self.pixels)

    def take(self, indices: torch.Tensor) -> "Images":
        """The images at ``indices`` (int64), with their labels if there are any."""
        return Images(self.pixels[indices], None if self.labels is None else self.labels[indices])


@dataclass(frozen=True)
class ImageData:
    """A dataset in memory.

    ``mean`` and ``std`` are per channel of the whole training split, in [0, 1]. ``flip`` says whether a mirrored
    picture keeps its meaning (it does not for digits). ``fingerprint`` is the SHA-256 of content and class names;
    ``note`` goes into every caption.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str
    flip: bool = True
    note: str = ""
    source: str = ""

    @property
    def image_size(self) -> int:
        """Height of the images in pixels (they are square)."""
        return self.train.pixels.shape[-1]


def balanced_indices(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Indices (sorted) of a seeded subset with as many images of each class as possible.

    Raises:
        ValueError: ``count`` is not in 1..len(labels).
    """
    if not 1 <= count <= len(labels):
        raise ValueError(f"cannot take {count} images from {len(labels)}: choose 1 to {len(labels)}")
    generator = torch.Generator().manual_seed(seed)
    # The n-th image of every class comes before the (n+1)-th of any: the first `count` are as balanced as can be.
    shuffled = torch.randperm(len(labels), generator=generator)
    rank = torch.empty_like(labels)
    for label in labels.unique():
        members = (labels[shuffled] == label).nonzero().squeeze(1)
        rank[members] = torch.arange(len(members))
    return shuffled[rank.argsort(stable=True)[:count]].sort().values


def subset(images: Images, count: int | None, seed: int) -> Images:
    """A class-balanced, seeded subset of labelled images; all of them if ``count`` is None."""
    if count is None or count == len(images):
        return images
    return images.take(balanced_indices(images.labels, count, seed))


def split_validation(images: Images, count: int, seed: int) -> tuple[Images, Images | None]:
    """(training images, class-balanced held-out images); the second is None if ``count`` is 0."""
    if count == 0:
        return images, None
    if count >= len(images):
        raise ValueError(f"validation_images={count} leaves nothing to train on: there are {len(images)} images")
    held_out = torch.zeros(len(images), dtype=torch.bool)
    held_out[balanced_indices(images.labels, count, seed)] = True
    return images.take((~held_out).nonzero().squeeze(1)), images.take(held_out.nonzero().squeeze(1))
