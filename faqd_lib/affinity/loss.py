"""Feature affinity: how two feature maps relate their pixels to each other, and losses that make them agree.

A feature map (channels C, height H, width W) is read as N = H·W pixel vectors. Row i of X (N×C) is pixel i's vector
divided by its length; the affinity matrix S = X Xᵀ holds the cosines between all pairs of pixels. With X from the
student, Y from the teacher and D = X Xᵀ − Y Yᵀ,

    exact loss (FA, arXiv 2302.10899, eq. for L_fa)     mean over images of ‖D‖²_F / N²
    fast loss (FFA, section IV)                         mean over images of (1/k) Σ_j ‖D z_j‖² / N²

where the z_j are random with mean 0 and identity covariance, so that E ‖D z‖² = ‖D‖²_F.

No N×N matrix is needed, not even for the exact loss. With E = Y − X, Q = [E, Y] (N×2C) and G = QᵀQ,

    D = X Xᵀ − Y Yᵀ = E Eᵀ − E Yᵀ − Y Eᵀ = Q K Qᵀ,   K = [[I, −I], [−I, 0]],
    ‖D‖²_F = tr(K G K G),        ∂‖D‖²_F/∂X = 4 D X = 4 Q K G T,   where X = Q T, T = [−I; I].

(The same identity gives linear CKA its feature-space form, Kornblith et al. 2019.) E is used instead of X because
‖XᵀX‖² + ‖YᵀY‖² − 2‖YᵀX‖² cancels in float32 when the student is close to the teacher: every term of D above is as
small as E. (Where the affinities agree though the maps do not, as after a rotation of the channels, E is large and D
is not: there G's rounding leaves an absolute error of some 1e-8 in the loss, which the N×N form does not have.)
Where one map has more channels than the other, its further channels are further columns of Q.

Gradients are computed by hand in the forward pass, a few images at a time so that the work stays in the processor's
cache, reach the student only, and go through the normalisation by dF = (dX − X⟨X, dX⟩) / ‖F‖. A pixel shorter than
``EPS`` has no direction: it counts as F/EPS in the value and receives no gradient (the derivative of that formula,
1/EPS, would be millions of times larger than any other).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from .kernels import EPS, accumulation_dtype, affinity_difference

METHODS = ("auto", "gram", "pairwise", "projection")
NORMS = ("l2", "l1")
REDUCTIONS = ("mean", "released")
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
    norm: str = "l2",
    reduction: str = "mean",
    k: int | None = None,
    distribution: str = "gaussian",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Mean over images of ‖S_student − S_teacher‖²_F / N², exact or estimated from ``k`` random projections.

    Args:
        student: (batch, C_s, H, W), floating point; receives the gradient.
        teacher: (batch, C_t, H_t, W_t); detached. If its height or width differ, it is resized to the student's
            (bilinear, antialiased), as the paper does. C_t may differ from C_s.
        method: ``"auto"``: the exact form with fewer multiplications, see :func:`cheaper_exact`; ``"gram"``: exact,
            from (C_s+C_t)² products, linear in N; ``"pairwise"``: exact, from the N×N matrix in blocks of rows, never
            whole; ``"projection"``: the paper's fast estimate (FFA).
        norm: ``"l2"``: squared, the paper's; ``"l1"``: Σ|D_ij|, the released code's. L1 has no linear-cost form and
            no unbiased estimate by projections: it is pairwise only.
        reduction: ``"mean"``: over images, as above; ``"released"``: as the released code scales, for comparison:
            with L1 (its default) the sum over images of ‖D‖₁/N², with L2 (its ``order=2``) the root of the sum over
            images, √(Σ‖D‖²_F)/N; with projections the root of that sum's estimate, which is not unbiased.
        k: number of projections, at least 1; 6 if left out (the paper's). For the projection method only: refused
            elsewhere. The relative errors of estimate and gradient fall like 1/√k; the gradient's is larger.
        distribution: of the projections, ``"gaussian"`` (the paper) or ``"rademacher"`` (±1, smaller variance).
        generator: a CPU generator for the projections; None for torch's global one (a training that must repeat
            gives its own, or uses :class:`FastFeatureAffinityLoss`). Every call draws anew; all images of a batch
            share the projections.

    Returns:
        A scalar (float64 if the student is, else float32), never negative; NaN if an input holds NaN, an infinity, or
        numbers whose squares overflow.

    Raises:
        TypeError: an argument is no floating-point tensor, ``k`` no integer, or ``generator`` no generator.
        ValueError: shapes that are not (batch, channels, height, width), unequal or empty batches, ``k`` below 1,
            an unknown method, norm, reduction or distribution, or L1 with another method than pairwise.
        RuntimeError: a second derivative or a forward-mode derivative is asked for; neither exists.
    """
    method = _check_method(method, norm, reduction)
    if k is not None and method != "projection":
        raise ValueError(f"k = {k!r} is a number of projections, but method {method!r} has none: use 'projection'")
    k = 6 if k is None else k
    _check_projection(k, distribution)
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator must be a torch.Generator of the CPU, got {type(generator).__name__}")

    def draw(pixels: int) -> torch.Tensor:
        return draw_projections(pixels, k, distribution, generator)

    return _loss(student, teacher, method, norm, reduction, draw)


def cheaper_exact(pixels: int, student_channels: int, teacher_channels: int) -> str:
    """Which exact form needs fewer multiplications an image: ``"gram"`` or ``"pairwise"``.

    With w = C_s + C_t, gram costs N·w² for G, w³ + w²·C_s for K G K and K G T, and N·w·C_s for the gradient;
    pairwise N²·w for D and N²·C_s for the gradient. So gram is cheaper where w·(N + w) ≤ N²: from N ≈ 1.62·w on.
    """
    width = student_channels + teacher_channels
    return "gram" if width * (pixels + width) <= pixels**2 else "pairwise"


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

    def __init__(self, method: str = "auto", norm: str = "l2", reduction: str = "mean") -> None:
        super().__init__()
        if method == "projection":
            raise ValueError("method 'projection' is not exact: use FastFeatureAffinityLoss")
        _check_method(method, norm, reduction)
        self.method, self.norm, self.reduction = method, norm, reduction

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return feature_affinity_loss(student, teacher, self.method, norm=self.norm, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"method={self.method!r}, norm={self.norm!r}, reduction={self.reduction!r}"


class FastFeatureAffinityLoss(nn.Module):
    """Fast feature-affinity loss (FFA) as a module: an unbiased estimate of FA from ``k`` random projections.

    The projections come from a generator of this module's own, seeded with ``seed``: anew at every call, or, with
    ``frozen``, the same at every call for maps of one size, as in the released code (which turns the loss into a fixed
    quadratic form of rank k; for study only). The generator's state is part of ``state_dict()``, so that a training
    that was interrupted can go on with the projections that come next. (Replicas of ``DataParallel`` share one state:
    compute the loss outside of them.)
    """

    def __init__(
        self,
        k: int = 6,
        distribution: str = "gaussian",
        seed: int = 0,
        *,
        frozen: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _check_projection(k, distribution)
        _check_method("projection", "l2", reduction)
        self.k, self.distribution, self.frozen, self.reduction = k, distribution, frozen, reduction
        # The state of a torch.Generator as a tensor: the compiler cannot follow a generator, but it can a tensor.
        with torch.inference_mode(False):  # a tensor that was made inside could not move on outside
            self.generator_state = torch.Generator().manual_seed(seed).get_state()
        self._ahead: list[torch.Tensor] = []
        self._ahead_used = 0

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        def draw(pixels: int) -> torch.Tensor:
            if self._ahead_used == len(self._ahead):
                return self._draw(pixels)
            z = self._ahead[self._ahead_used]
            if len(z) != pixels:
                raise ValueError(f"projections were drawn ahead for {len(z)} pixels, and the maps have {pixels}")
            self._ahead_used += 1
            return z

        return _loss(student, teacher, "projection", "l2", self.reduction, draw)

    def _draw(self, pixels: int) -> torch.Tensor:
        state = self.generator_state.clone() if self.frozen else self.generator_state
        return _draw_and_advance(state, pixels, self.k, self.distribution)

    def predraw(self, pixels: Sequence[int], device: torch.device) -> None:
        """Draw now what the next calls need, one for maps of each of these sizes in turn (height times width).

        They are put where those of the ``predraw`` before lay, in float32: a CUDA graph of these calls can draw
        nothing itself, but finds new projections there at each replay. With no ``pixels``, what was drawn ahead is
        forgotten, and calls draw for themselves again. Between ``predraw`` and these calls ``state_dict()`` holds
        the state after them.
        """
        drawn = [self._draw(number) for number in pixels]
        places = [(z.shape, z.device.type) for z in self._ahead]
        if places != [(z.shape, device.type) for z in drawn]:
            self._ahead = [torch.empty_like(z, device=device) for z in drawn]
        for buffer, z in zip(self._ahead, drawn, strict=True):
            # From ordinary memory the host would wait for the copy.
            buffer.copy_(z.pin_memory() if device.type == "cuda" else z, non_blocking=True)
        self._ahead_used = 0

    def get_extra_state(self) -> torch.Tensor:
        """The generator's state, for ``state_dict()``."""
        return self.generator_state.clone()

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Go on from a state that ``state_dict()`` held.

        Raises:
            RuntimeError: it is no generator's state.
        """
        with torch.inference_mode(False):
            copy = state.detach().cpu().clone()
            torch.Generator().set_state(copy)  # raises for anything else
            self.generator_state = copy
            self._ahead, self._ahead_used = [], 0

    def extra_repr(self) -> str:
        frozen = ", frozen" if self.frozen else ""
        return f"k={self.k}, distribution={self.distribution!r}, reduction={self.reduction!r}{frozen}"


def projections_needed(relative_error: float, confidence: float) -> int:
    """A number of projections k that meets a wanted relative error for any pair of maps (Gaussian projections).

    From Chebyshev's inequality and Var‖Dz‖² = 2‖D²‖²_F ≤ 2‖D‖⁴_F: P(|L_k − L| > εL) ≤ 2 / (k ε²). The bound holds
    for the worst spectrum of D (rank one); real maps need fewer: :func:`faqd_lib.affinity_statistics` has their own.

    Raises:
        ValueError: ``relative_error`` not above 0, or ``confidence`` not inside (0, 1).
    """
    check_error_and_confidence(relative_error, confidence)
    return math.ceil(2 / (relative_error**2 * (1 - confidence)))


# ---------------------------------------------------------------------------------------------------------------------


def check_error_and_confidence(relative_error: float, confidence: float) -> None:
    """Raise ValueError where either is out of its range."""
    if not relative_error > 0 or not 0 < confidence < 1:
        raise ValueError(f"need relative_error > 0 and 0 < confidence < 1, got {relative_error!r} and {confidence!r}")


def _check_map(name: str, features: torch.Tensor) -> None:
    if not isinstance(features, torch.Tensor) or not features.is_floating_point():
        kind = features.dtype if isinstance(features, torch.Tensor) else type(features).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if features.ndim != 4 or 0 in features.shape:
        tokens = features.ndim == 3 and 0 not in features.shape
        hint = f"; for tokens (batch, N, channels) use {name}.transpose(1, 2).unsqueeze(3)" if tokens else ""
        raise ValueError(
            f"{name} must be (batch, channels, height, width) with nothing empty, got {tuple(features.shape)}{hint}"
        )


def _check_projection(k: int, distribution: str) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an integer, got {k!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1 projection, got {k}")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"unknown distribution {distribution!r}: choose one of {', '.join(DISTRIBUTIONS)}")


def _check_method(method: str, norm: str, reduction: str) -> str:
    """The method, with L1's only one in the place of "auto"."""
    for name, value, known in (
        ("method", method, METHODS), ("norm", norm, NORMS), ("reduction", reduction, REDUCTIONS)
    ):  # fmt: skip
        if value not in known:
            hint = " (the paper's FFA is 'projection')" if value in ("ffa", "fast") else ""
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}{hint}")
    if norm == "l1" and method not in ("auto", "pairwise"):
        raise ValueError(
            f"norm 'l1' has no {method} form, for the sum of |D_ij| needs every entry of D: use method 'pairwise' (its "
            "cost is quadratic in the number of pixels), or norm 'l2'"
        )
    return "pairwise" if norm == "l1" else method


def check_pair(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Check two maps; the teacher's, detached, on the student's device and of its height and width."""
    _check_map("student", student)
    _check_map("teacher", teacher)
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student has {student.shape[0]} images but teacher has {teacher.shape[0]}: feed both the same batch"
        )
    teacher = teacher.detach().to(student.device)
    if teacher.shape[2:] == student.shape[2:]:
        return teacher
    with torch.autocast(student.device.type, enabled=False):  # in full precision
        return F.interpolate(
            teacher.to(accumulation_dtype(student)),
            student.shape[2:], mode="bilinear", align_corners=False, antialias=True,
        )  # fmt: skip


def _loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    method: str,
    norm: str,
    reduction: str,
    draw: Callable[[int], torch.Tensor],
) -> torch.Tensor:
    teacher = check_pair(student, teacher)
    pixels = student.shape[2] * student.shape[3]
    if method == "auto":
        method = cheaper_exact(pixels, student.shape[1], teacher.shape[1])
    projections = None
    if method == "projection":
        projections = draw(pixels).to(student.device, accumulation_dtype(student), non_blocking=True)
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(student).tangent is not None:
        raise RuntimeError("the affinity loss has no forward-mode derivative: use backward() or torch.autograd.grad")
    with_gradient = torch.is_grad_enabled() and student.requires_grad
    total, _ = affinity_difference(student, teacher, method, norm, projections, with_gradient)
    if reduction == "mean":
        return total / (len(student) * pixels**2)
    if norm == "l1":
        return total / pixels**2
    # The root has no derivative at 0, where that of the square is 0: `tiny` keeps 0/0 away.
    return total.clamp_min(torch.finfo(total.dtype).tiny).sqrt() / pixels


@torch.library.custom_op("faqd::draw_projections", mutates_args=("state",))
def _draw_and_advance(state: torch.Tensor, pixels: int, k: int, distribution: str) -> torch.Tensor:
    """Projections from a generator's state (uint8, of a CPU generator), which moves on."""
    generator = torch.Generator()
    generator.set_state(state)
    projections = draw_projections(pixels, k, distribution, generator)
    state.copy_(generator.get_state())
    return projections


@_draw_and_advance.register_fake
def _(state, pixels, k, distribution):
    return torch.empty(pixels, k)
