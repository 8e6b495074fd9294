"""Variance of the fast affinity loss for a given pair of maps, without the N×N matrix.

Let D = X Xᵀ − Y Yᵀ = Q K Qᵀ as in :mod:`faqd_lib.affinity.loss`, and M = K QᵀQ. Products of w×w matrices, with
w = C_s + C_t, give everything needed:

    tr D² = tr M²,    tr D⁴ = tr M⁴,    (D²)_ii = q_iᵀ (M K) q_i.

The estimate L_k = (1/k) Σ_j ‖D z_j‖² / N² has the mean L = tr D² / N². Its variance, times N⁴, is

    Gaussian z          2 tr D⁴ / k
    Rademacher z (±1)   2 (tr D⁴ − Σ_i (D²)_ii²) / k
    orthogonal z        2 N (N − k) / (k (N − 1) (N + 2)) · (tr D⁴ − (tr D²)² / N)

Orthogonal projections are z_j = √N u_j with a uniformly random orthonormal system u_1…u_k; they are exact at k = N.
Chebyshev's inequality turns a variance into Proposition 4.2: P(|L_k − L| > εL) ≤ Var L_k / (εL)².

The images of a batch share their projections. For the loss of the batch, the mean of D² over the images therefore takes
the place of D². The variance is larger than that of a mean of independent estimates.

These formulas are about the value of the loss. The estimate of its gradient is also unbiased, but far less accurate:
see notebook 02.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..utils.messages import check_choice
from .kernels import MapPair
from .loss import check_count, check_error_and_confidence, check_pair

PROBES = ("gaussian", "rademacher", "orthogonal")


class Traces(NamedTuple):
    """tr A, tr A² and Σ A_ii² of A = D² or of its mean over a batch: float64 tensors of one shape."""

    trace: Tensor
    square: Tensor
    diagonal: Tensor


@dataclass(frozen=True)
class AffinityStatistics:
    """Exact loss and variance of its estimates, for each image and for the batch; from :func:`affinity_statistics`."""

    pixels: int  # N
    images: Traces  # of D² of each image, shape (batch,)
    batch: Traces  # of the mean of D² over the batch, scalars

    @property
    def loss(self) -> float:
        """The exact loss of the batch: mean over images of ‖D‖²_F / N²."""
        return float(self.batch.trace) / self.pixels**2

    @property
    def loss_of_images(self) -> Tensor:
        """Exact loss of each image: (batch,) float64."""
        return self.images.trace / self.pixels**2

    @property
    def directions(self) -> float:
        """Effective number of directions of A, the mean of D²: (tr A)² / tr A², from 1 to N.

        A single Gaussian projection has the relative variance 2/directions. Meaningless if the maps agree.
        """
        return float(self.batch.trace**2 / self.batch.square)

    def variance(self, k: int, probes: str = "gaussian") -> float:
        """Variance of the batch's estimate from ``k`` projections (``"gaussian"``, ``"rademacher"``, ``"orthogonal"``).

        Raises:
            TypeError: k is not an integer.
            ValueError: probes are unknown, k is below 1, or there are more orthogonal probes than pixels.
        """
        return float(_variance(self.batch, self.pixels, k, probes))

    def variance_of_images(self, k: int, probes: str = "gaussian") -> Tensor:
        """Variance of each image's own estimate: (batch,) float64."""
        return _variance(self.images, self.pixels, k, probes)

    def relative_error(self, k: int, probes: str = "gaussian") -> float:
        """Root-mean-square error of the batch's estimate, divided by the loss; 0 if the loss is at most 1e-14."""
        deviation = math.sqrt(self.variance(k, probes))
        # A smaller loss may be the rounding of float64 where all cosines agree.
        return deviation / self.loss if self.loss > 1e-14 else 0.0

    def chebyshev_bound(self, relative_error: float, k: int, probes: str = "gaussian") -> float:
        """Upper bound of P(|L_k − L| > relative_error · L), at most 1. The true probability is far smaller."""
        check_error_and_confidence(relative_error, 0.5)
        return min(1.0, (self.relative_error(k, probes) / relative_error) ** 2)

    def projections_needed(self, relative_error: float, confidence: float, probes: str = "gaussian") -> int:
        """The fewest projections, at least 1, for which Chebyshev's inequality gives this error with this confidence.

        Orthogonal probes need at most N.

        Raises:
            ValueError: ``relative_error`` is not above 0, ``confidence`` not inside (0, 1), or probes are unknown.
        """
        check_error_and_confidence(relative_error, confidence)
        target = relative_error**2 * (1 - confidence)  # the relative variance allowed
        one = self.relative_error(1, probes) ** 2
        if probes == "orthogonal" and self.pixels > 1:
            # Var(k) = Var(1) · (N − k) / (k (N − 1)) ≤ target
            share = one / (self.pixels - 1)
            return max(1, math.ceil(self.pixels * share / (target + share) - 1e-9))
        return max(1, math.ceil(one / target - 1e-9))


def affinity_statistics(student: Tensor, teacher: Tensor) -> AffinityStatistics:
    """Exact affinity loss of a pair of maps, and the accuracy of its estimates by projections.

    The maps or tokens are those of :func:`faqd_lib.feature_affinity_loss`. Time is linear in N. Memory is a few
    float64 copies of the two maps. There is no gradient.

    Example:
        >>> statistics = affinity_statistics(student_map, teacher_map)
        >>> statistics.loss, statistics.relative_error(k=6)
        >>> statistics.projections_needed(relative_error=0.1, confidence=0.9)

    Raises:
        TypeError: a map is not a floating-point tensor.
        ValueError: the maps do not fit the loss, or hold NaN or an infinity.
    """
    student, teacher = check_pair(student, teacher)
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        pair = MapPair(student.detach().double(), teacher.double())
        parts = []
        for chunk in pair.chunks(pair.pixels * pair.width):
            q, m = chunk.q.clone(), pair.core @ (chunk.q.transpose(1, 2) @ chunk.q)
            mk, m2 = m @ pair.core, m @ m  # D² = Q (M K) Qᵀ
            diagonal = ((q @ mk) * q).sum(2)
            traces = [(each * each.mT).sum((1, 2)) for each in (m, m2)]
            parts.append((*traces, diagonal.square().sum(1), q, mk, diagonal.sum(0, keepdim=True)))
        *traces, q, mk, diagonals = (torch.cat(part) for part in zip(*parts, strict=True))
        images = Traces(*traces)
        if not bool(images.trace.isfinite().all()):
            raise ValueError("the maps hold NaN or an infinity: there is no loss to estimate")
        batch = Traces(
            images.trace.mean(),
            _square_of_mean(q, mk),
            (diagonals.sum(0) / pair.images).square().sum(),
        )
    return AffinityStatistics(pair.pixels, images, batch)


def _square_of_mean(q: Tensor, mk: Tensor) -> Tensor:
    """‖mean over images of Q (M K) Qᵀ‖²_F, from the smaller Gram matrix; the N×N one in blocks of rows."""
    images, pixels, width = q.shape
    left = (q @ mk).transpose(0, 1).reshape(pixels, images * width)  # factors of all images side by side
    right = q.transpose(0, 1).reshape(pixels, images * width)
    if images * width < pixels:  # ‖L Rᵀ‖² = ⟨LᵀL, RᵀR⟩
        return ((left.T @ left) * (right.T @ right)).sum() / images**2
    blocks = left.split(max(1, 2**22 // pixels))
    return sum((rows @ right.T).square().sum() for rows in blocks) / images**2


def _variance(traces: Traces, pixels: int, k: int, probes: str) -> Tensor:
    check_choice("probes", probes, PROBES)
    check_count(k)
    if probes == "orthogonal" and k > pixels:
        raise ValueError(f"k must be at most the number of pixels, {pixels}, for orthogonal probes, got {k}")
    if probes == "gaussian":
        spread = traces.square
    elif probes == "rademacher":
        spread = traces.square - traces.diagonal
    elif pixels == 1:
        spread = torch.zeros_like(traces.trace)
    else:
        finite = pixels * (pixels - k) / ((pixels - 1) * (pixels + 2))
        spread = finite * (traces.square - traces.trace**2 / pixels)
    # Rounding can make a difference of sums slightly negative.
    return (2 * spread / k).clamp_min(0) / pixels**4
