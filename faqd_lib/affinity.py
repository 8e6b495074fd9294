"""Feature affinity: how two feature maps relate their pixels to each other, and losses that make them agree.

A feature map (channels C, height H, width W) is read as N = H·W pixel vectors. Row i of X (N×C) is pixel i's vector
divided by its length; the affinity matrix S = X Xᵀ holds the cosines between all pairs of pixels. With X from the
student, Y from the teacher and D = X Xᵀ − Y Yᵀ,

    exact loss (FA, arXiv 2302.10899, eq. for L_fa)     mean over images of ‖D‖²_F / N²
    fast loss (FFA, section IV)                         mean over images of (1/k) Σ_j ‖D z_j‖² / N²

where the z_j are random with mean 0 and identity covariance, so that E ‖D z‖² = ‖D‖²_F.

No N×N matrix is needed, not even for the exact loss. With Q = [X−Y, X+Y] (N×2C) and K = [[0, I], [I, 0]],
D = ½ Q K Qᵀ, hence with G = QᵀQ (2C×2C)

    ‖D‖²_F = ¼ tr(K G K G),        ∂‖D‖²_F/∂X = 4 D X = 2 Q K QᵀX,        QᵀX = ½ (G's first C + its last C columns).

(The same identity gives linear CKA its feature-space form, Kornblith et al. 2019.) Differences and sums are used
instead of X and Y because ‖XᵀX‖² + ‖YᵀY‖² − 2‖YᵀX‖² cancels in float32 when the student is close to the teacher.

Gradients are computed by hand in the forward pass, reach the student only, and go through the normalisation by
dF = (dX − X⟨X, dX⟩) / ‖F‖. A pixel shorter than ``EPS`` has no direction: it counts as F/EPS in the value and
receives no gradient (the derivative of that formula, 1/EPS, would be millions of times larger than any other).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6
METHODS = ("auto", "gram", "pairwise", "projection")
DISTRIBUTIONS = ("gaussian", "rademacher")


def affinity_matrix(features: torch.Tensor) -> torch.Tensor:
    """Cosines between all pairs of pixels.

    Args:
        features: (batch, channels, height, width), floating point.

    Returns:
        (batch, N, N) with N = height·width, values in [−1, 1], the dtype of ``features``, differentiable. It takes
        N² numbers an image: made for looking at small maps. The losses never form it.
    """
    _check_map("features", features)
    pixels = features.flatten(2).transpose(1, 2)
    pixels = pixels / pixels.norm(dim=2, keepdim=True).clamp_min(EPS)
    return pixels @ pixels.transpose(1, 2)


def feature_affinity_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    method: str = "auto",
    *,
    k: int = 6,
    distribution: str = "gaussian",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Mean over images of ‖S_student − S_teacher‖²_F / N², exact or estimated from ``k`` random projections.

    Args:
        student: (batch, C_s, H, W), floating point; receives the gradient.
        teacher: (batch, C_t, H_t, W_t); detached. If its height or width differ, it is resized to the student's
            (bilinear, antialiased), as the paper does. C_t may differ from C_s.
        method: ``"auto"``: the cheaper exact form (gram if min(C_s, C_t) pays, see :func:`cheaper_exact`);
            ``"gram"``: exact, from 2C×2C products; ``"pairwise"``: exact, from the N×N matrix, one image at a time;
            ``"projection"``: the paper's fast estimate (FFA).
        k: number of projections, at least 1 (projection only). The estimate's relative error falls like 1/√k.
        distribution: of the projections, ``"gaussian"`` (the paper) or ``"rademacher"`` (±1, smaller variance).
        generator: a CPU generator for the projections; None for torch's global one. Every call draws anew.

    Returns:
        A scalar (float64 if the student is, else float32), never negative; NaN if an input holds a NaN.

    Raises:
        TypeError: an argument is not a floating-point tensor, or ``k`` is not an integer.
        ValueError: shapes that are not (batch, channels, height, width), unequal or empty batches, ``k`` below 1,
            an unknown method or distribution.
    """
    _check_map("student", student)
    _check_map("teacher", teacher)
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student has {student.shape[0]} images but teacher has {teacher.shape[0]}: feed both the same batch"
        )
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if method == "projection":
        _check_projection(k, distribution)
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    # Inside autocast the products below must still accumulate in float32.
    with torch.autocast(student.device.type, enabled=False):
        teacher = teacher.detach().to(student.device, dtype)
        if teacher.shape[2:] != student.shape[2:]:
            teacher = F.interpolate(teacher, student.shape[2:], mode="bilinear", align_corners=False, antialias=True)
        pixels = student.shape[2] * student.shape[3]
        if method == "auto":
            method = cheaper_exact(pixels, student.shape[1], teacher.shape[1])
        projections = None
        if method == "projection":
            projections = draw_projections(pixels, k, distribution, generator).to(student.device, dtype)
        return _AffinityLoss.apply(student, teacher, method, projections)


def cheaper_exact(pixels: int, student_channels: int, teacher_channels: int) -> str:
    """Which exact form needs fewer multiplications: ``"gram"`` (6·N·C² with C the larger count) or ``"pairwise"``.

    Per image, gram forms a 2C×2C product of 2C×N factors and multiplies N×2C by 2C×C; pairwise forms two N×N
    products over C channels and multiplies N×N by N×C.
    """
    channels = max(student_channels, teacher_channels)
    gram = 6 * pixels * channels**2
    pairwise = pixels**2 * (2 * student_channels + teacher_channels)
    return "gram" if gram <= pairwise else "pairwise"


def draw_projections(
    pixels: int, k: int, distribution: str = "gaussian", generator: torch.Generator | None = None
) -> torch.Tensor:
    """Random projections z_1…z_k as the columns of an (N, k) float32 matrix: mean 0, identity covariance."""
    _check_projection(k, distribution)
    if distribution == "gaussian":
        return torch.randn(pixels, k, generator=generator)
    return torch.randint(0, 2, (pixels, k), generator=generator).float().mul_(2).sub_(1)


class FeatureAffinityLoss(nn.Module):
    """Exact feature-affinity loss (FA) as a module: ``FeatureAffinityLoss()(student_map, teacher_map)``.

    ``method`` is ``"auto"``, ``"gram"`` or ``"pairwise"``; see :func:`feature_affinity_loss`.
    """

    def __init__(self, method: str = "auto") -> None:
        super().__init__()
        if method not in METHODS or method == "projection":
            raise ValueError(f"unknown exact method {method!r}: choose auto, gram or pairwise")
        self.method = method

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return feature_affinity_loss(student, teacher, self.method)

    def extra_repr(self) -> str:
        return f"method={self.method!r}"


class FastFeatureAffinityLoss(nn.Module):
    """Fast feature-affinity loss (FFA) as a module: an unbiased estimate of FA from ``k`` random projections.

    The projections are drawn anew at every call from a generator of this module's own, seeded with ``seed``.
    """

    def __init__(self, k: int = 6, distribution: str = "gaussian", seed: int = 0) -> None:
        super().__init__()
        _check_projection(k, distribution)
        self.k, self.distribution = k, distribution
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return feature_affinity_loss(
            student, teacher, "projection", k=self.k, distribution=self.distribution, generator=self.generator
        )

    def extra_repr(self) -> str:
        return f"k={self.k}, distribution={self.distribution!r}"


# ---------------------------------------------------------------------------------------------------------------------


def _check_map(name: str, features: torch.Tensor) -> None:
    if not isinstance(features, torch.Tensor) or not features.is_floating_point():
        kind = features.dtype if isinstance(features, torch.Tensor) else type(features).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if features.ndim != 4 or 0 in features.shape:
        raise ValueError(
            f"{name} must be (batch, channels, height, width) with nothing empty, got {tuple(features.shape)}"
        )


def _check_projection(k: int, distribution: str) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an integer, got {k!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1 projection, got {k}")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"unknown distribution {distribution!r}: choose one of {', '.join(DISTRIBUTIONS)}")


def _pixels(features: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel vectors divided by their lengths (B, N, C), and the lengths (B, N, 1) in ``dtype``.

    Free of copies for channels-last maps of that dtype.
    """
    vectors = features.to(dtype).permute(0, 2, 3, 1).flatten(1, 2)
    lengths = torch.linalg.vector_norm(vectors, dim=2, keepdim=True)
    return vectors / lengths.clamp_min(EPS), lengths


def _widen(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Zero channels change no inner product."""
    return x if x.shape[2] == channels else F.pad(x, (0, channels - x.shape[2]))


# Each of the three returns (sum over images of the squared norm, its gradient with respect to X or None).
_Term = tuple[torch.Tensor, torch.Tensor | None]


def _difference_and_sum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    channels = max(x.shape[2], y.shape[2])
    x, y = _widen(x, channels), _widen(y, channels)
    return torch.cat((x - y, x + y), dim=2)


def _gram(x: torch.Tensor, y: torch.Tensor, _projections: None, with_gradient: bool) -> _Term:
    q = _difference_and_sum(x, y)
    c = q.shape[2] // 2
    gram = q.transpose(1, 2) @ q
    # tr(K G K G) = 2 (⟨AᵀA, BᵀB⟩ + tr((BᵀA)²)) with A = X − Y, B = X + Y.
    aa, ab, bb = gram[:, :c, :c], gram[:, :c, c:], gram[:, c:, c:]
    value = ((aa * bb).sum() + (ab * ab.transpose(1, 2)).sum()) / 2
    if not with_gradient:
        return value, None
    qx = gram[:, :, :c] + gram[:, :, c:]
    return value, q @ torch.cat((qx[:, c:], qx[:, :c]), dim=1)[:, :, : x.shape[2]]


def _pairwise(x: torch.Tensor, y: torch.Tensor, _projections: None, with_gradient: bool) -> _Term:
    value = x.new_zeros(())
    gradient = torch.empty_like(x) if with_gradient else None
    for image in range(len(x)):
        difference = x[image] @ x[image].T
        difference.addmm_(y[image], y[image].T, alpha=-1)
        value += difference.square().sum()
        if with_gradient:
            torch.mm(difference, x[image], out=gradient[image]).mul_(4)
    return value, gradient


def _projection(x: torch.Tensor, y: torch.Tensor, projections: torch.Tensor, with_gradient: bool) -> _Term:
    q = _difference_and_sum(x, y)
    c, k = q.shape[2] // 2, projections.shape[1]
    # D z = ½ Q K (Qᵀz); the two halves of Qᵀz change places.
    qz = q.transpose(1, 2) @ projections
    dz = q @ torch.cat((qz[:, c:], qz[:, :c]), dim=1) / 2
    value = dz.square().sum() / k
    if not with_gradient:
        return value, None
    # ∂‖D z‖²/∂X = 2 (Dz (zᵀX) + z (Dz)ᵀX)
    xz, xd = x.transpose(1, 2) @ projections, x.transpose(1, 2) @ dz
    return value, (dz @ xz.transpose(1, 2) + projections @ xd.transpose(1, 2)) * (2 / k)


_TERMS: dict[str, Callable[..., _Term]] = {"gram": _gram, "pairwise": _pairwise, "projection": _projection}


class _AffinityLoss(torch.autograd.Function):
    """Value and gradient in one pass; what is kept for the backward pass is one map, the gradient itself."""

    @staticmethod
    def forward(ctx, student, teacher, method, projections):
        x, lengths = _pixels(student, teacher.dtype)
        y, _ = _pixels(teacher, teacher.dtype)
        with_gradient = ctx.needs_input_grad[0]
        value, gradient = _TERMS[method](x, y, projections, with_gradient)
        scale = 1 / (len(x) * x.shape[1] ** 2)
        if with_gradient:
            # Through the normalisation: dF = (dX − X⟨X, dX⟩) / ‖F‖, nothing for pixels without direction.
            gradient.addcmul_(x, (x * gradient).sum(2, keepdim=True), value=-1)
            gradient.mul_(torch.where(lengths < EPS, 0.0, scale / lengths.clamp_min(EPS)))
            ctx.save_for_backward(gradient.unflatten(1, student.shape[2:]).permute(0, 3, 1, 2))
            ctx.student_dtype = student.dtype
        # The gram form is a difference of rounded sums where the maps agree; a squared norm is not negative.
        return (value * scale).clamp_min(0)

    @staticmethod
    def backward(ctx, gradient_of_loss):
        if torch.is_grad_enabled():  # only under create_graph: the saved gradient would silently count as constant
            raise RuntimeError("the affinity loss has no second derivative: call backward without create_graph=True")
        (gradient,) = ctx.saved_tensors
        # Multiplied before the cast: the scale of float16 training does not fit into float16 by itself.
        return (gradient * gradient_of_loss).to(ctx.student_dtype), None, None, None


def projections_needed(relative_error: float, confidence: float) -> int:
    """A number of projections k that meets a wanted relative error for any pair of maps (Gaussian projections).

    From Chebyshev's inequality and Var‖Dz‖² = 2‖D²‖²_F ≤ 2‖D‖⁴_F: P(|L_k − L| > εL) ≤ 2 / (k ε²). The bound holds
    for the worst spectrum of D (rank one); real maps need far fewer.

    Raises:
        ValueError: ``relative_error`` not above 0, or ``confidence`` not inside (0, 1).
    """
    if not relative_error > 0 or not 0 < confidence < 1:
        raise ValueError(f"need relative_error > 0 and 0 < confidence < 1, got {relative_error!r} and {confidence!r}")
    return math.ceil(2 / (relative_error**2 * (1 - confidence)))
