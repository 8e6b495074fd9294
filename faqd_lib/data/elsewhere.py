"""Unlabelled images that are not a dataset's own training split: halves of it by class, noise, other datasets.

``first-half``, ``second-half``   images of the first or last classes (with an odd number of classes, the second half
                                  has one more); labels choose the images and are then dropped
``noise``                         every value of every pixel uniform from 0 to 255, independent
``smooth-noise``                  the same at a quarter of the height and width, enlarged bilinearly
the name of a dataset             its training split, in the size of the own images
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .batches import stream
from .images import DatasetError, Images, subset

HALVES = ("first-half", "second-half")
NOISE = ("noise", "smooth-noise")
MADE_HERE = (*HALVES, *NOISE)
_COARSER = 4  # pixels of smooth noise between two independent values


def half(images: Images, classes: int, which: str) -> Images:
    """The images of the first ``classes // 2`` classes, or of the others; with their labels.

    Raises DatasetError for label maps, which have no class of a whole image.
    """
    if images.is_dense:
        raise DatasetError(
            f"{which} is chosen by the class of each image, and these have one for each pixel: use noise"
        )
    first = images.labels < classes // 2
    return images.take(first if which == "first-half" else ~first)


def noise(name: str, count: int, size: Sequence[int], seed: int) -> Images:
    """``count`` images of ``size`` (height, width), ``"noise"`` or ``"smooth-noise"``; the seed fixes every bit."""
    generator = stream(seed, name)
    if name == "noise":
        return Images(torch.randint(0, 256, (count, 3, *size), generator=generator, dtype=torch.uint8))
    coarse = (max(1, side // _COARSER) for side in size)
    values = 255 * torch.rand((count, 3, *coarse), generator=generator)
    return Images(F.interpolate(values, size=tuple(size), mode="bilinear").round().to(torch.uint8))


def unlabelled(name: str, count: int, seed: int, own: Images, classes: int, other: Images | None = None) -> Images:
    """``count`` unlabelled images of a source.

    Args:
        name: one of :data:`MADE_HERE`, or the name of the dataset that ``other`` is from.
        count: number of images; from halves and other datasets, a class-balanced subset.
        seed: of the subset, or of the noise.
        own: the labelled images that halves are taken from, and whose size noise has.
        classes: number of classes of ``own``.
        other: the labelled images of another dataset.

    Raises:
        DatasetError: there are fewer images, those of the other dataset have another size, or halves are asked for
            where each pixel has a class.
    """
    size = own.pixels.shape[2:]
    if name in NOISE:
        return noise(name, count, size, seed)
    source = half(own, classes, name) if name in HALVES else other
    if count > len(source):
        raise DatasetError(f"{count} images were asked for, and {name} has {len(source)}: ask for fewer")
    if source.pixels.shape[2:] != size:
        shown = " and the own images of ".join(f"{width}x{height}" for height, width in (source.pixels.shape[2:], size))
        raise DatasetError(f"{name} has images of {shown}: both must have the same size")
    return subset(source, count, seed).unlabelled()
