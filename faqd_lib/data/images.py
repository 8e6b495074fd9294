"""Images in memory: uint8 splits, with or without labels, and seeded, class-balanced subsets of splits."""

from dataclasses import dataclass

import torch

from ..utils.messages import kind_of

IGNORED = 255  # in label maps: a pixel without a label


class DatasetError(RuntimeError):
    """A dataset is missing, damaged or another than its name says; the message names file, fault and remedy."""


def check_pixels(pixels: object) -> None:
    """Raise ValueError unless ``pixels`` is a uint8 tensor (count, channels, height, width), channels not last."""
    if not isinstance(pixels, torch.Tensor) or pixels.dtype != torch.uint8 or pixels.ndim != 4:
        raise ValueError(f"pixels must be a uint8 tensor (count, channels, height, width), got {kind_of(pixels)}")
    if pixels.shape[1] not in (1, 3) and pixels.shape[3] in (1, 3):
        raise ValueError(
            f"pixels must be (count, channels, height, width), got {tuple(pixels.shape)}: move the channels with "
            "pixels.permute(0, 3, 1, 2)"
        )


@dataclass(frozen=True)
class Images:
    """A split, with a class for each image, a class for each pixel (label maps), or no labels.

    Raises ValueError for pixels that :func:`check_pixels` refuses, for too many or too few labels, and for label maps
    of another type or size than the images.
    """

    pixels: torch.Tensor  # uint8 (count, 3, height, width)
    # int64 (count,); label maps uint8 (count, height, width), IGNORED where a pixel has no label; or None
    labels: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_pixels(self.pixels)
        if self.labels is not None and len(self.labels) != len(self.pixels):
            raise ValueError(f"{len(self.pixels)} images but {len(self.labels)} labels")
        if self.is_dense and (self.labels.dtype, self.labels.shape[1:]) != (torch.uint8, self.pixels.shape[2:]):
            raise ValueError(
                f"label maps must be uint8 (count, height, width) of the images' size {tuple(self.pixels.shape[2:])}, "
                f"got {kind_of(self.labels)}"
            )

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def is_dense(self) -> bool:
        """Whether each pixel has a label."""
        return self.labels is not None and self.labels.ndim > 1

    def unlabelled(self) -> "Images":
        """The same images without labels, for label-free training."""
        return Images(self.pixels)

    def joined(self, other: "Images") -> "Images":
        """These images, then those of ``other``. Both have labels."""
        return Images(torch.cat([self.pixels, other.pixels]), torch.cat([self.labels, other.labels]))

    def take(self, indices: torch.Tensor) -> "Images":
        """The images at ``indices`` (int64, or a mask), with their labels if the split has labels."""
        return Images(self.pixels[indices], None if self.labels is None else self.labels[indices])


@dataclass(frozen=True)
class ImageData:
    """A dataset in memory."""

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    mean: tuple[float, float, float]  # of each channel over the whole training split, in [0, 1]
    std: tuple[float, float, float]
    fingerprint: str  # SHA-256 of pixels, labels and class names
    flip: bool = True  # whether a mirrored image keeps its class; a digit does not
    note: str = ""  # appears in every caption
    source: str = ""  # file or folder

    @property
    def image_size(self) -> int:
        """Height of the images in pixels. Images with one class each are square."""
        return self.train.pixels.shape[-2]


def balanced_indices(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Sorted indices (int64) of a seeded subset of ``count`` images; class sizes differ by as little as possible.

    ``labels`` is int64 (images,), or label maps (images, height, width): the subset is then a plain random one. Raises
    ValueError if ``count`` is not in 1..len(labels).
    """
    if labels.ndim > 1:
        labels = torch.zeros(len(labels), dtype=torch.int64)
    if not 1 <= count <= len(labels):
        raise ValueError(f"cannot take {count} images from {len(labels)}: choose 1 to {len(labels)}")
    # Images are sorted by rank within their class: all n-th images come before all (n+1)-th. Any prefix is balanced.
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty_like(labels)
    for label in labels.unique():
        members = (labels[shuffled] == label).nonzero().squeeze(1)
        rank[members] = torch.arange(len(members))
    return shuffled[rank.argsort(stable=True)[:count]].sort().values


def subset(images: Images, count: int | None, seed: int) -> Images:
    """A seeded, class-balanced subset of ``count`` labelled images; all images if ``count`` is None."""
    if count is None or count == len(images):
        return images
    return images.take(balanced_indices(images.labels, count, seed))


def split_validation(images: Images, count: int, seed: int) -> tuple[Images, Images | None]:
    """(training images, ``count`` class-balanced validation images); the latter is None if ``count`` is 0.

    Raises ValueError if no image would be left for training.
    """
    if count == 0:
        return images, None
    if count >= len(images):
        raise ValueError(f"validation_images={count} leaves nothing to train on: there are {len(images)} images")
    held_out = torch.zeros(len(images), dtype=torch.bool)
    held_out[balanced_indices(images.labels, count, seed)] = True
    return images.take(~held_out), images.take(held_out)
