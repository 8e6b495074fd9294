"""Comparisons of networks with one prediction a pixel: bootstrap over test images, and shares of images in a score."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.batches import stream
from ..training.segmentation import class_iou, constant_iou, iou_by_image

RESAMPLES = 2000


def answers(kept: Mapping[str, Tensor]) -> np.ndarray:
    """The share of each test image in a run's score, (N,) float32; their mean is the score / 100.

    For classifiers: 1 where the predicted class is the true one, else 0. For segmentation: the linear terms of the
    mean IoU, :func:`~faqd_lib.training.segmentation.iou_by_image`. ``kept`` comes from
    :meth:`~faqd_lib.runs.store.RunStore.predictions`.
    """
    if "pixel_counts" in kept:
        return iou_by_image(kept["pixel_counts"]).float().numpy()
    return (kept["predicted"] == kept["label"]).numpy().astype(np.float32)


def chance(kept: Mapping[str, Tensor]) -> float:
    """The score in percent of a prediction that ignores the images; ``kept`` as in :func:`answers`.

    Of classes: 100 / their number. Of pixels: the mean IoU of the best constant prediction,
    :func:`~faqd_lib.training.segmentation.constant_iou`.
    """
    if "pixel_counts" in kept:
        return constant_iou(kept["pixel_counts"])
    return 100 / (int(kept["label"].max()) + 1)


class Gain(NamedTuple):
    """A difference in percentage points, and its 95 % interval for other test images."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def gains(ours: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Gain, list[Gain]]:
    """Differences ours − others in mean IoU and in each class's IoU, by a paired bootstrap over images.

    A difference is the mean over pairs of runs. Images are drawn with replacement, :data:`RESAMPLES` times, the same
    for all runs. The interval has the percentiles 2.5 and 97.5. It does not cover other seeds. A class that no pixel
    has, true or predicted, has NaN.

    Args:
        ours, others: pixel counts (N, 3, C) of runs on the same images, pair by pair.

    Returns:
        The gain of the mean IoU, and one gain a class.

    Raises:
        ValueError: unequal numbers of runs.
    """
    if len(ours) != len(others) or not ours:
        raise ValueError(f"runs are compared in pairs, got {len(ours)} and {len(others)}: give as many of both")
    images, classes = len(ours[0]), ours[0].shape[2]
    drawn = torch.randint(images, (RESAMPLES, images), generator=stream(0, "bootstrap"))
    first = images * torch.arange(RESAMPLES)[:, None]
    weights = torch.bincount((first + drawn).flatten(), minlength=RESAMPLES * images).view(RESAMPLES, images)
    weights = torch.cat([torch.ones(1, images), weights]).double()  # the images as they are, then the resamples

    def iou(counts: Tensor) -> Tensor:
        return class_iou((weights @ counts.double().flatten(1)).view(-1, 3, classes))

    of_class, of_mean = [], []
    for one, other in zip(ours, others, strict=True):
        one, other = iou(one), iou(other)
        of_class.append(one - other)
        of_mean.append(one.nanmean(1) - other.nanmean(1))
    means = torch.stack(of_mean).mean(0)
    return _gain(means), [_gain(part) for part in torch.stack(of_class).mean(0).unbind(1)]


def _gain(values: Tensor) -> Gain:
    """The first of the values, and percentiles of the others."""
    low, high = values[1:].nanquantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return Gain(100 * float(values[0]), 100 * low, 100 * high)
