"""Unlabelled images that are not a dataset's own training split: halves of it by class, noise, other datasets.

``first-half``, ``second-half``   images of the first or last classes (with an odd number of classes, the second half
                                  has one more); labels choose the images and are then dropped
``noise``                         every value of every pixel uniform from 0 to 255, independent
``smooth-noise``                  the same at a quarter of the height and width, enlarged bilinearly
the name of a dataset             its training split, in the size of the own images
"""

import torch
import torch.nn.functional as F

from .batches import stream
from .images import DatasetError, Images, subset

HALVES = ("first-half", "second-half")
NOISE = ("noise", "smooth-noise")
MADE_HERE = (*HALVES, *NOISE)
_COARSER = 4  # pixels of smooth noise between two independent values


def half(images: Images, classes: int, which: str) -> Images:
    """The images of the first ``classes // 2`` classes, or of the others; with their labels."""
    first = images.labels < classes // 2
    return images.take(first if which == "first-half" else ~first)


def noise(name: str, count: int, size: int, seed: int) -> Images:
    """``count`` images of ``size`` × ``size`` pixels, ``"noise"`` or ``"smooth-noise"``; the seed fixes every bit."""
    generator = stream(seed, name)
    if name == "noise":
        return Images(torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8))
    coarse = max(1, size // _COARSER)
    values = 255 * torch.rand((count, 3, coarse, coarse), generator=generator)
    return Images(F.interpolate(values, size=(size, size), mode="bilinear").round().to(torch.uint8))


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
        DatasetError: the source has fewer images, or ``other`` has images of another size than ``own``.
    """
    size = own.pixels.shape[-1]
    if name in NOISE:
        return noise(name, count, size, seed)
    source = half(own, classes, name) if name in HALVES else other
    if count > len(source):
        raise DatasetError(f"{count} images were asked for, and {name} has {len(source)}: ask for fewer")
    if source.pixels.shape[-1] != size:
        raise DatasetError(f"{name} has {source.pixels.shape[-1]} pixels a side, and the own images have {size}")
    return subset(source, count, seed).unlabelled()
