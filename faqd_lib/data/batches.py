"""Batches: seeded order, random crop and flip for a whole batch at once on the training device, normalisation.

Order and augmentation have random streams of their own, derived from (seed, purpose, epoch): any epoch can be drawn
without the ones before it, and neither the network nor a loss can disturb them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .datasets import Images

PADDING = 4  # pixels of zeros on every side before the random crop


def stream(seed: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """An independent CPU random stream for one purpose of one epoch."""
    digest = hashlib.sha256(f"{seed}|{purpose}|{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Batch:
    """``images`` float32 (batch, 3, height, width), channels-last; ``labels`` int64 (batch) or None."""

    images: torch.Tensor
    labels: torch.Tensor | None


class Normalizer:
    """uint8 images to float32 of mean 0 and deviation 1 per channel, in channels-last memory.

    Args:
        mean, std: of each channel, in [0, 1]; ``std`` above 0.
        device: where the images are made.

    Raises:
        ValueError: a deviation of 0, or other numbers of channels in ``mean`` and ``std``.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ValueError(f"mean and std must have a value for each channel, std above 0; got {mean!r} and {std!r}")
        if max(*mean, *std) > 1:
            raise ValueError(f"mean and std are of pixels in [0, 1], got {mean!r} and {std!r}: divide them by 255")
        self.device = torch.device(device)
        scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
        self._scale = scale.float().view(1, 1, 1, -1).to(device)
        self._shift = (-torch.tensor(mean, dtype=torch.float64) * 255 * scale).float().view(1, 1, 1, -1).to(device)

    def from_nhwc(self, pixels: torch.Tensor) -> torch.Tensor:
        """(batch, height, width, 3) uint8 → (batch, 3, height, width) float32, channels-last."""
        return torch.addcmul(self._shift, pixels.float(), self._scale).permute(0, 3, 1, 2)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(batch, 3, height, width) uint8 → the same shape float32, channels-last.

        Raises:
            ValueError: ``pixels`` are something else.
        """
        if not isinstance(pixels, torch.Tensor) or pixels.dtype != torch.uint8 or pixels.ndim != 4:
            got = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, torch.Tensor) else type(pixels).__name__
            raise ValueError(f"pixels must be a uint8 tensor (batch, channels, height, width), got {got}")
        return self.from_nhwc(pixels.permute(0, 2, 3, 1).contiguous())


class Batches:
    """Training batches of a split; images without labels give batches without labels.

    The last, incomplete batch of an epoch is left out (another one each time, since the order is drawn anew).

    Args:
        images: the split; ``images.unlabelled()`` for label-free training.
        batch_size: at least 2 (batch normalisation), at most ``len(images)``.
        seed: of order and augmentation.
        normalizer: made with the dataset's mean and deviation, on the training device.
        flip: whether half of the images are mirrored.
        device: where the images live and the batches are made; None for the normalizer's device.
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
            raise TypeError(f"images must be faqd_lib.data.images.Images, got {type(images).__name__}")
        if not 2 <= batch_size <= len(images):
            raise ValueError(
                f"batch_size must be between 2 (batch normalisation needs two images) and the {len(images)} images "
                f"of the split, got {batch_size}"
            )
        self.batch_size, self.seed, self.flip, self.normalizer = batch_size, seed, flip, normalizer
        self.device = normalizer.device if device is None else torch.device(device)
        self._pixels = images.pixels.permute(0, 2, 3, 1).contiguous().to(self.device)  # channels last, as used
        self._labels = None if images.labels is None else images.labels.to(self.device)

    def __len__(self) -> int:
        return len(self._pixels) // self.batch_size

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from number ``first`` on; the same seed and epoch give the same bits."""
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
            pixels = padded[every[:, None, None], rows[:, :, None], columns[:, None, :]]
            labels = None if self._labels is None else self._labels[chosen]
            yield Batch(self.normalizer.from_nhwc(pixels), labels)
