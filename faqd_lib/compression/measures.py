"""What is measured of a student on held-out pictures: agreement, calibration, differences, latency."""

import math
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ..data.batches import Normalizer
from ..data.pictures import PictureSet
from ..training.loop import EVALUATED_PIXELS
from ..utils.measure import exact_kernels, take_turns

NORMAL_95 = 1.959964  # 97.5 % quantile of the standard normal distribution
BINS = 10  # of confidence, from 0 to 1


class Share(NamedTuple):
    """A number of cases out of a total."""

    count: int
    total: int

    @property
    def percent(self) -> float:
        """The share in percent; NaN if ``total`` is 0."""
        return 100 * self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, in percent; 0 to 100 if ``total`` is 0."""
        if not self.total:
            return 0.0, 100.0
        share, z2 = self.count / self.total, NORMAL_95**2
        centre = (share + z2 / (2 * self.total)) / (1 + z2 / self.total)
        spread = math.sqrt(share * (1 - share) / self.total + z2 / (4 * self.total**2))
        half = NORMAL_95 * spread / (1 + z2 / self.total)
        return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.percent:.1f} % ({low:.1f} to {high:.1f} %) of {self.total:,}"


class Bin(NamedTuple):
    """Pictures on which the student's confidence lies in one range."""

    low: float
    high: float
    confidence: float  # mean, 0 to 1
    agreement: Share


class Latency(NamedTuple):
    """Milliseconds for one picture: number of calls, median, and the quartiles."""

    rounds: int
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ms ({self.low:.2f} to {self.high:.2f}, n = {self.rounds})"


@exact_kernels()
@torch.no_grad()
@parametrize.cached()  # weights are quantized once, not for every chunk
def logits_of(model: nn.Module, pictures: PictureSet, normalizer: Normalizer) -> torch.Tensor:
    """Logits (len(pictures), classes) of a network in evaluation mode, float32 on the CPU."""
    chunk = max(1, min(500, EVALUATED_PIXELS // pictures.image_size**2))
    return torch.cat(
        [model(normalizer(pixels.to(normalizer.device))).float().cpu() for pixels in pictures.chunks(chunk)]
    )


def agreement(student: torch.Tensor, teacher: torch.Tensor) -> Share:
    """How often two tensors of logits (pictures, classes) have their largest value in the same place."""
    return Share(int((student.argmax(1) == teacher.argmax(1)).sum()), len(teacher))


def agreement_by_class(student: torch.Tensor, teacher: torch.Tensor) -> dict[int, Share]:
    """The agreement on the pictures of each class that the teacher names, by the class's number."""
    said, named = student.argmax(1), teacher.argmax(1)
    return {
        int(number): Share(int((said[named == number] == number).sum()), int((named == number).sum()))
        for number in named.unique()
    }


def calibration(student: torch.Tensor, teacher: torch.Tensor) -> tuple[list[Bin], float]:
    """The student's confidence against its agreement with the teacher, and the expected calibration error.

    The confidence is the largest softmax probability. The error is the mean over pictures of |confidence − agreement|
    of their bin, from 0 to 1. Empty bins are left out.
    """
    confidence, said = F.softmax(student, 1).max(1)
    agrees = said == teacher.argmax(1)
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    bins = [
        Bin(
            number / BINS,
            (number + 1) / BINS,
            float(confidence[place == number].mean()),
            Share(int(agrees[place == number].sum()), int((place == number).sum())),
        )
        for number in place.unique().tolist()
    ]
    errors = [one.agreement.total * abs(one.confidence - one.agreement.percent / 100) for one in bins]
    return bins, sum(errors) / len(said)


def latencies(calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Latency]:
    """The time of each call, all taking turns; see :func:`faqd_lib.utils.measure.take_turns`."""
    found = {}
    for name, seconds in take_turns(calls, rounds, device).items():
        low, median, high = (1000 * value for value in statistics.quantiles(seconds, n=4))
        found[name] = Latency(rounds, median, low, high)
    return found
