"""Training batches in seeded order: random crop, random flip and normalisation of a whole batch on the device.

Order and augmentation have separate random streams, derived from (seed, purpose, epoch). An epoch therefore depends
neither on earlier epochs nor on random numbers drawn elsewhere.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..utils.messages import kind_of
from .images import IGNORED, Images, check_pixels

PADDING = 4  # pixels of zeros on each side before the random crop


def stream(seed: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """A CPU generator for one purpose in one epoch, independent of all others."""
    digest = hashlib.sha256(f"{seed}|{purpose}|{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Batch:
    """``images`` float32 (batch, 3, height, width), channels-last; ``labels`` int64 or None.

    Labels are (batch,), or label maps (batch, height, width) with :data:`~faqd_lib.data.images.IGNORED` where a pixel
    has no label.
    """

    images: torch.Tensor
    labels: torch.Tensor | None


class Normalizer:
    """Converts uint8 pixels on ``device`` to float32: (pixels / 255 − mean) / std, in channels-last memory.

    ``mean`` and ``std`` have one value a channel, for pixels in [0, 1]. ``std`` is above 0. Other values raise
    ValueError.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ValueError(f"mean and std must have one value a channel, std above 0, got {mean!r} and {std!r}")
        if max(*mean, *std) > 1:
            raise ValueError(f"mean and std must be for pixels in [0, 1], got {mean!r} and {std!r}: divide them by 255")
        self.device = torch.device(device)
        scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
        self._scale = scale.float().view(1, 1, 1, -1).to(device)
        self._shift = (-torch.tensor(mean, dtype=torch.float64) * 255 * scale).float().view(1, 1, 1, -1).to(device)

    def from_nhwc(self, pixels: torch.Tensor) -> torch.Tensor:
        """(batch, height, width, 3) uint8 → (batch, 3, height, width) float32, channels-last."""
        return torch.addcmul(self._shift, pixels.float(), self._scale).permute(0, 3, 1, 2)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(batch, 3, height, width) uint8 → the same shape, float32, channels-last; ValueError for other pixels."""
        check_pixels(pixels)
        return self.from_nhwc(pixels.permute(0, 2, 3, 1).contiguous())


class Batches:
    """Training batches of a split; images without labels give batches without labels.

    Each epoch draws a new order and drops the images that do not fill a batch. Each image is padded with zeros by
    :data:`PADDING` pixels, cropped at random to its size, and mirrored with probability 1/2 if ``flip`` is set. A label
    map goes the same way as its image; its padding has no label.

    Args:
        images: the split; ``images.unlabelled()`` for label-free training.
        batch_size: 2 to ``len(images)``; batch normalisation needs two images.
        seed: seed of order and augmentation.
        normalizer: mean and deviation of the dataset, on the training device.
        flip: whether images may be mirrored.
        device: where pixels are kept and batches are built; None for the normalizer's device.

    Raises TypeError for other images than :class:`Images`, and ValueError for a ``batch_size`` out of range.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        seed: int,
        normalizer: Normalizer,
        *,
        flip: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(images, Images):
            raise TypeError(f"images must be faqd_lib.data.images.Images, got {kind_of(images)}: use Images(pixels)")
        if not 2 <= batch_size <= len(images):
            allowed = f"between 2, for batch normalisation, and the {len(images)} images of the split"
            raise ValueError(f"batch_size must be {allowed}, got {batch_size}")
        self.batch_size, self.seed, self.flip, self.normalizer = batch_size, seed, flip, normalizer
        self.device = normalizer.device if device is None else torch.device(device)
        self._pixels = images.pixels.permute(0, 2, 3, 1).contiguous().to(self.device)  # NHWC, as batches are built
        self._labels = None if images.labels is None else images.labels.to(self.device)

    def __len__(self) -> int:
        return len(self._pixels) // self.batch_size

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from batch number ``first`` on; seed and epoch determine every bit."""
        count, height, width = self._pixels.shape[:3]
        order = torch.randperm(count, generator=stream(self.seed, "order", epoch)).to(self.device)
        augment = stream(self.seed, "augmentation", epoch)
        shift = torch.randint(0, 2 * PADDING + 1, (2, count), generator=augment).to(self.device)
        mirrored = torch.randint(0, 2, (count,), generator=augment).bool().to(self.device) & self.flip
        row, column = torch.arange(height, device=self.device), torch.arange(width, device=self.device)
        for start in range(first * self.batch_size, len(self) * self.batch_size, self.batch_size):
            chosen = order[start : start + self.batch_size]
            padded = F.pad(self._pixels[chosen], (0, 0, PADDING, PADDING, PADDING, PADDING))
            rows = shift[0, chosen, None] + row
            columns = shift[1, chosen, None] + torch.where(mirrored[chosen, None], width - 1 - column, column)
            every = torch.arange(len(chosen), device=self.device)
            where = every[:, None, None], rows[:, :, None], columns[:, None, :]
            pixels = padded[where]
            labels = None if self._labels is None else self._labels[chosen]
            if labels is not None and labels.ndim > 1:
                labels = F.pad(labels, (PADDING,) * 4, value=IGNORED)[where].long()
            yield Batch(self.normalizer.from_nhwc(pixels), labels)
