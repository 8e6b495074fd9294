"""Dense prediction: the label loss, weights of classes, counts of pixels, and IoU.

Label maps are integers (images, height, width) from 0 to C − 1; :data:`~faqd_lib.data.images.IGNORED` marks pixels
without a label. They count nowhere: not in a loss, not in a measure.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.images import IGNORED


def check_classes(count: int) -> None:
    """Raise ValueError if one of ``count`` classes would be taken for pixels without a label."""
    if count > IGNORED:
        raise ValueError(f"dense logits may have up to {IGNORED} classes, got {count}: {IGNORED} marks ignored pixels")


def dense_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Σ w(y) · (−log p(y)) / Σ w(y) over the labelled pixels of a batch; 0 without a labelled pixel.

    Args:
        logits: (batch, C, height, width).
        labels: int64 (batch, height, width).
        class_weights: w (C,), each above 0; None for 1.

    Raises:
        ValueError: more classes than label maps can hold.
    """
    check_classes(logits.shape[1])
    total = F.cross_entropy(logits, labels, class_weights, ignore_index=IGNORED, reduction="sum")
    known = labels != IGNORED
    weight = known if class_weights is None else class_weights[torch.where(known, labels, 0)] * known
    return total / weight.sum().clamp_min(torch.finfo(logits.dtype).tiny)


def root_median_frequency(labels: Tensor, classes: int) -> Tensor:
    """Weights of classes (C,) for the label loss: the square root of median-frequency balancing.

    The frequency of a class is its share of the labelled pixels in images that have the class. Its weight is √(median
    of the frequencies / frequency), and 1 for a class without pixels. Without the root, the weights are those of Eigen
    and Fergus (2015) and of SegNet. ``labels`` is uint8 (images, height, width).
    """
    _, _, pixels = pixel_counts(labels, labels, classes).double().unbind(1)
    of_images = pixels.sum(1, keepdim=True) * (pixels > 0)
    frequency = pixels.sum(0) / of_images.sum(0)
    found = ~frequency.isnan()
    return torch.where(found, (frequency[found].median() / frequency).sqrt(), 1.0).float()


def pixel_counts(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts of labelled pixels of each class, int64 (images, 3, C): rightly predicted, predicted, true.

    ``predicted`` and ``labels`` are (images, height, width).
    """
    known = labels != IGNORED
    first = classes * torch.arange(len(labels), device=labels.device)[:, None, None]

    def count(of: Tensor, where: Tensor) -> Tensor:
        return torch.bincount((first + of)[where], minlength=classes * len(labels)).view(-1, classes)

    right = known & (predicted == labels)
    return torch.stack([count(labels, right), count(predicted, known), count(labels, known)], 1)


def class_iou(counts: Tensor) -> Tensor:
    """Intersection over union of each class, (…, 3, C) → (…, C), from 0 to 1, from the counts of a set of images.

    NaN for a class that no pixel has, true or predicted.
    """
    right, named, true = counts.double().unbind(-2)
    return right / (named + true - right)


def mean_iou(counts: Tensor) -> float:
    """Mean over classes of :func:`class_iou` in percent, of counts (images, 3, C); NaN classes are left out."""
    return 100 * float(class_iou(counts.sum(0)).nanmean())


def constant_iou(counts: Tensor) -> float:
    """Mean IoU in percent of the best constant prediction: all pixels named as the class with most pixels.

    max_c true_c / Σ true / number of classes with pixels, from counts (images, 3, C); 0 without a labelled pixel.
    """
    true = counts[:, 2].double().sum(0)
    return 100 * float(true.max() / true.sum().clamp_min(1) / (true > 0).sum().clamp_min(1))


def iou_by_image(counts: Tensor) -> Tensor:
    """The share of each image in the mean IoU, (images, 3, C) → (images,), float64; their mean is the mean IoU / 100.

    The linear terms of the ratio (delta method): the mean over classes of IoU + (I − IoU · U) / mean U, where I and U
    are the image's intersection and union. Shares may lie outside [0, 1].
    """
    right, named, true = counts.double().unbind(1)
    union = named + true - right
    iou = class_iou(counts.sum(0))
    return (iou + (right - iou * union) / union.mean(0)).nanmean(1)


class DenseEvaluation(NamedTuple):
    """Mean IoU in percent, mean cross-entropy over labelled pixels, counts (N, 3, C) of :func:`pixel_counts`, int32,
    and the mean log-probability (N,) of the true classes of each image, float32, 0 without a labelled pixel."""

    mean_iou: float
    cross_entropy: float
    counts: Tensor
    log_probabilities: Tensor

    metric = "mean_iou"

    def kept(self, _labels: Tensor) -> dict[str, Any]:
        """What :meth:`faqd_lib.runs.store.RunStore.save` keeps."""
        return {"pixel_counts": self.counts, "log_probabilities": self.log_probabilities}


def dense_evaluation(measured: list[tuple[Tensor, Tensor]]) -> DenseEvaluation:
    """Join what :func:`measure` gave for batches."""
    counts, surprise = (torch.cat(parts).cpu() for parts in zip(*measured, strict=True))
    pixels = counts[:, 2].sum(1)
    log_probability = -surprise / pixels.clamp_min(1)
    cross_entropy = float(surprise.sum() / pixels.sum().clamp_min(1))
    return DenseEvaluation(mean_iou(counts), cross_entropy, counts.int(), log_probability.float())


def measure(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel counts of a batch, and the cross-entropy of each image summed over its pixels, (batch,), float64.

    Raises ValueError for more classes than label maps can hold.
    """
    check_classes(logits.shape[1])
    surprise = F.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="none").double().sum((1, 2))
    return pixel_counts(logits.argmax(1), labels, logits.shape[1]), surprise
