"""Rivals of the fast affinity loss, for comparisons. Training does not use them.

Every estimator takes (student, teacher, budget, generator). The maps are those of
:func:`faqd_lib.feature_affinity_loss`; the generator is on the CPU, None for torch's global one. The result is a
scalar with a gradient for the student. All images of a batch share the random choice. A budget out of its range raises
ValueError.

The quantity to estimate is the exact loss L, the mean over images of ‖D‖²_F / N².
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import EPS, accumulation_dtype
from .loss import check_pair, draw_projections, feature_affinity_loss, loss_of_maps, unit_pixels


def orthogonal_probes(student: Tensor, teacher: Tensor, k: int, generator: torch.Generator | None = None) -> Tensor:
    """Mean of ‖D z_j‖²/N² over ``k`` projections of length √N, orthogonal to each other. ``k`` is from 1 to N.

    The estimate is unbiased, and exact at k = N.
    Yu et al. (2016, "Orthogonal random features") use such projections for kernels. The QR decomposition costs O(N k²).
    """

    def draw(pixels: int) -> Tensor:
        if not 1 <= k <= pixels:
            raise ValueError(f"k must be from 1 to the number of pixels, {pixels}, got {k}")
        q, r = torch.linalg.qr(draw_projections(pixels, k, generator=generator).double())
        # Mezzadri (2007): with these signs the orthonormal system is uniformly distributed. Squares ignore the signs.
        return q * r.diagonal().sign() * pixels**0.5

    return loss_of_maps(student, teacher, "projection", "l2", "mean", draw)


def hutch_plus_plus(
    student: Tensor, teacher: Tensor, products: int, generator: torch.Generator | None = None
) -> Tensor:
    """Hutch++ (Meyer et al. 2021) for tr D²: exact on a sketched range, by random projections outside it. Unbiased.

    The sketch S has m = ⌊products/4⌋ random columns. An orthonormal basis V of D²S costs 2m products with D, ‖DV‖²_F
    costs m, and ‖Dg‖² of m projections g orthogonal to V costs m. These ‖Dg‖² estimate the trace outside V.
    ``products``, the number of products of D with a vector, is at least 4. The gradient treats V as constant. It is
    unbiased because the estimate is unbiased for every V.
    """
    student, teacher = check_pair(student, teacher)
    if products < 4:
        raise ValueError(f"Hutch++ needs at least 4 products with D, got {products}")
    pixels = student.shape[2] * student.shape[3]
    m = min(products // 4, pixels)
    dtype, device = accumulation_dtype(student), student.device
    s, g = (draw_projections(pixels, m, generator=generator).to(device, dtype) for _ in range(2))
    with torch.autocast(device.type, enabled=False):
        x, y = unit_pixels(student.to(dtype)), unit_pixels(teacher.to(dtype))

        def times_d(v: Tensor) -> Tensor:
            return x @ (x.mT @ v) - y @ (y.mT @ v)

        with torch.no_grad():
            v = torch.linalg.qr(times_d(times_d(s)))[0]
            g = g - v @ (v.mT @ g)
        total = times_d(v).square().sum() + times_d(g).square().sum() / m
    return total / (len(student) * pixels**2)


def pixel_subset(student: Tensor, teacher: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """The exact loss of ``count`` randomly chosen pixels, from 2 to N, scaled so that it is unbiased.

    Pairs of different pixels have the weight N(N−1)/(count(count−1)). Entries of the diagonal have the weight N/count;
    only pixels without direction have an entry other than 0.
    """
    student, teacher = check_pair(student, teacher)
    pixels = student.shape[2] * student.shape[3]
    if not 2 <= count <= pixels:
        raise ValueError(f"count must be from 2 to the number of pixels, {pixels}, got {count}")
    chosen = torch.randperm(pixels, generator=generator)[:count].to(student.device)
    some = [m.flatten(2)[:, :, chosen].unsqueeze(3) for m in (student, teacher)]
    squares = feature_affinity_loss(*some) * count**2  # mean over images of Σ over chosen pairs of D_ij²
    with torch.no_grad():
        lengths = [(m.double().norm(dim=1) / EPS).clamp_max(1).square() for m in some]
        diagonal = (lengths[0] - lengths[1]).square().sum((1, 2)).mean().to(squares.dtype)
    pairs = pixels * (pixels - 1) / (count * (count - 1))
    return ((squares - diagonal) * pairs + diagonal * pixels / count) / pixels**2


def average_pooling(student: Tensor, teacher: Tensor, size: int, generator: torch.Generator | None = None) -> Tensor:
    """The exact loss of both maps after average pooling to at most size × size pixels: deterministic and biased.

    Of tokens, which have no second direction, neighbours in their order are pooled to at most ``size`` tokens.
    """
    student, teacher = check_pair(student, teacher)
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    target = [min(size, length) for length in student.shape[2:]]
    return feature_affinity_loss(F.adaptive_avg_pool2d(student, target), F.adaptive_avg_pool2d(teacher, target))
