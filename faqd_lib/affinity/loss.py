"""Feature affinity: how two feature maps relate their pixels to each other, and losses that make them agree.

A feature map (channels C, height H, width W) is read as N = H·W pixel vectors. The tokens of a transformer (N×C) are N
such vectors already. Row i of X (N×C) is pixel i's vector divided by its length; the affinity matrix S = X Xᵀ holds the
cosines between all pairs of pixels. With X from the student, Y from the teacher and D = X Xᵀ − Y Yᵀ,

    exact loss (FA, arXiv 2302.10899, eq. for L_fa)     mean over images of ‖D‖²_F / N²
    fast loss (FFA, section IV)                         mean over images of (1/k) Σ_j ‖D z_j‖² / N²

The random vectors z_j have mean 0 and identity covariance, so that E ‖D z‖² = ‖D‖²_F.

Neither loss needs an N×N matrix. With E = Y − X, Q = [E, Y] (N×2C) and G = QᵀQ,

    D = X Xᵀ − Y Yᵀ = E Eᵀ − E Yᵀ − Y Eᵀ = Q K Qᵀ,   K = [[I, −I], [−I, 0]],
    ‖D‖²_F = tr(K G K G),        ∂‖D‖²_F/∂X = 4 D X = 4 Q K G T,   where X = Q T, T = [−I; I].

The same identity gives linear CKA its feature-space form (Kornblith et al. 2019). If one map has more channels than
the other, the further channels are further columns of Q.

E stands in Q instead of X for precision. The form ‖XᵀX‖² + ‖YᵀY‖² − 2‖YᵀX‖² cancels in float32 when the student is
close to the teacher, whereas every term of D above is as small as E. After a rotation of the channels, however, E is
large while D is 0. The rounding of G then leaves an absolute error of up to 5e-8 in the loss. The pairwise form
computes D itself and does not have this error.

The forward pass computes the student's gradient by hand, a few images at a time, so that the work stays in the cache.
The normalisation turns dX into dF = (dX − X⟨X, dX⟩) / ‖F‖. A pixel vector shorter than ``EPS`` has no direction. It
counts as F/EPS in the value and receives no gradient: the derivative 1/EPS would be millions of times larger than all
others.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..utils.messages import check_choice, kind_of
from ..utils.tracing import is_traced
from .kernels import EPS, accumulation_dtype, affinity_difference


def affinity_matrix(features: Tensor) -> Tensor:
    """Cosines between all pairs of pixels of a map (batch, channels, height, width), or of tokens (batch, N, channels).

    Returns:
        (batch, N, N) with N = height·width, values in [−1, 1], dtype of ``features``, differentiable. N² numbers an
        image suit small maps only. The losses never form this matrix.

    Raises:
        TypeError, ValueError: see :func:`feature_affinity_loss`.
    """
    (features,) = _as_maps(features=features)
    _check_map("features", features)
    pixels = unit_pixels(features)
    return pixels @ pixels.mT


def unit_pixels(features: Tensor) -> Tensor:
    """Pixel vectors divided by their lengths: (batch, channels, height, width) → (batch, N, channels)."""
    return F.normalize(features.flatten(2).mT, dim=2, eps=EPS)


def feature_affinity_loss(
    student: Tensor,
    teacher: Tensor,
    method: str = "auto",
    *,
    norm: str = "l2",
    reduction: str = "mean",
    k: int | None = None,
    distribution: str = "gaussian",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean over images of ‖S_student − S_teacher‖²_F / N², exact or estimated from ``k`` random projections.

    Args:
        student: (batch, C_s, H, W), or tokens (batch, N, C_s); floating point; receives the gradient.
        teacher: (batch, C_t, H_t, W_t), or tokens (batch, N_t, C_t); detached. C_t may differ from C_s. A map of
            another height or width is resized to the student's (bilinear, antialiased), as in the paper. Tokens are not
            resized to tokens: N_t must be N. Tokens beside a map must be the pixels of a grid, row by row. If N is not
            H·W, the grid h×w must have the map's proportions, h/w = H/W, and the teacher is resized to the student's
            grid. A class token is one too many: give ``tokens[:, 1:]``.
        method: ``"gram"``: exact, from (C_s+C_t)² products, linear in N. ``"pairwise"``: exact, from the N×N matrix in
            blocks of rows. ``"auto"``: the cheaper of these two, see :func:`cheaper_exact`. ``"projection"``: the
            paper's fast estimate (FFA).
        norm: ``"l2"``: the paper's squared norm. ``"l1"``: Σ|D_ij|, as in the released code. L1 needs the pairwise
            method: it has no form of linear cost and no unbiased estimate by projections.
        reduction: ``"mean"``: mean over images, as above. ``"released"``: the scale of the released code, for
            comparisons. With L1, the code's default, the sum over images of ‖D‖₁/N². With L2, its ``order=2``,
            √(Σ‖D‖²_F)/N over all images. With projections this root is biased.
        k: number of projections, at least 1; None for the paper's 6. Only the projection method takes it. The relative
            errors of estimate and gradient fall like 1/√k; that of the gradient is larger.
        distribution: of the projections, ``"gaussian"`` (the paper) or ``"rademacher"`` (±1, smaller variance).
        generator: a CPU generator for the projections; None for torch's global one. Every call draws new projections,
            shared by all images of the batch. A repeatable training needs a seeded generator, such as that
            of :class:`FastFeatureAffinityLoss`.

    Returns:
        A scalar, never negative: float64 if the student is float64, else float32. It is NaN if an input holds NaN, an
        infinity, or numbers whose squares overflow.

    Raises:
        TypeError: a map is not a floating-point tensor, ``k`` not an integer, or ``generator`` not a generator.
        ValueError: shapes that are neither (batch, channels, height, width) nor (batch, N, channels), unequal numbers
            of tokens, unequal or empty batches, ``k`` below 1, an unknown method, norm, reduction or distribution, or
            L1 with another method than pairwise.
        RuntimeError: a second derivative, one in forward mode, or one by ``torch.func`` is asked for. None exists.
    """
    method = _check_method(method, norm, reduction)
    if k is not None and method != "projection":
        raise ValueError(f"k = {k!r} is a number of projections, but method {method!r} has none: use 'projection'")
    k = 6 if k is None else k
    _check_projection(k, distribution)
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator must be a torch.Generator of the CPU, got {type(generator).__name__}")
    return loss_of_maps(
        student, teacher, method, norm, reduction, lambda pixels: draw_projections(pixels, k, distribution, generator)
    )


def cheaper_exact(pixels: int, student_channels: int, teacher_channels: int) -> str:
    """The exact form with fewer multiplications an image: ``"gram"`` or ``"pairwise"``.

    Let w = C_s + C_t. Gram costs N·w² for G, w³ + w²·C_s for K G K and K G T, and N·w·C_s for the gradient. Pairwise
    costs N²·w for D and N²·C_s for the gradient. Gram is cheaper if w·(N + w) ≤ N², that is from N ≈ 1.62·w on.
    """
    width = student_channels + teacher_channels
    return "gram" if width * (pixels + width) <= pixels**2 else "pairwise"


def draw_projections(
    pixels: int, k: int, distribution: str = "gaussian", generator: torch.Generator | None = None
) -> Tensor:
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

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return feature_affinity_loss(student, teacher, self.method, norm=self.norm, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"method={self.method!r}, norm={self.norm!r}, reduction={self.reduction!r}"


class FastFeatureAffinityLoss(nn.Module):
    """Fast feature-affinity loss (FFA) as a module: an unbiased estimate of FA from ``k`` random projections.

    Every call draws new projections from the module's own generator, seeded with ``seed``. The generator's state is
    part of ``state_dict()``, so that an interrupted training goes on with the projections that come next. Replicas of
    ``DataParallel`` share one state: compute the loss outside of them.

    With ``frozen`` every call uses the same projections for maps of one size, as the released code does. The loss
    is then a fixed quadratic form of rank k, for study only.
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
        # The state of a torch.Generator is kept as a tensor, which the compiler can follow, unlike a generator.
        with torch.inference_mode(False):  # a tensor made in inference mode cannot be changed outside it
            self.generator_state = torch.Generator().manual_seed(seed).get_state()
        self._ahead: list[Tensor] = []
        self._ahead_used = 0

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return loss_of_maps(student, teacher, "projection", "l2", self.reduction, self._next)

    def _next(self, pixels: int) -> Tensor:
        if self._ahead_used == len(self._ahead):
            return self._draw(pixels)
        z = self._ahead[self._ahead_used]
        if len(z) != pixels:
            raise ValueError(f"projections were drawn ahead for {len(z)} pixels, and the maps have {pixels}")
        self._ahead_used += 1
        return z

    def _draw(self, pixels: int) -> Tensor:
        state = self.generator_state.clone() if self.frozen else self.generator_state
        draw = _draw_operator if is_traced(state) else _draw_and_advance
        return draw(state, pixels, self.k, self.distribution)

    def predraw(self, pixels: Sequence[int], device: torch.device) -> None:
        """Draw now the projections of the next calls, one call for maps of each size N in ``pixels``.

        A CUDA graph cannot draw. Each ``predraw`` therefore writes float32 projections to the place of the former ones,
        where a replay of the calls reads them. An empty ``pixels`` drops the projections drawn ahead, and calls
        draw for themselves again. Between ``predraw`` and the calls, ``state_dict()`` holds the state after the calls.
        """
        drawn = [self._draw(number) for number in pixels]
        if [(z.shape, z.device.type) for z in self._ahead] != [(z.shape, device.type) for z in drawn]:
            self._ahead = [torch.empty_like(z, device=device) for z in drawn]
        for buffer, z in zip(self._ahead, drawn, strict=True):
            # The host would wait for a copy from memory that is not pinned.
            buffer.copy_(z.pin_memory() if device.type == "cuda" else z, non_blocking=True)
        self._ahead_used = 0

    def get_extra_state(self) -> Tensor:
        """The generator's state, for ``state_dict()``."""
        return self.generator_state.clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from a ``state`` of ``state_dict()``; RuntimeError if ``state`` is not that of a generator."""
        with torch.inference_mode(False):
            copy = state.detach().cpu().clone()
            torch.Generator().set_state(copy)  # raises if it is not a state
            self.generator_state = copy
            self._ahead, self._ahead_used = [], 0

    def extra_repr(self) -> str:
        frozen = ", frozen" if self.frozen else ""
        return f"k={self.k}, distribution={self.distribution!r}, reduction={self.reduction!r}{frozen}"


def projections_needed(relative_error: float, confidence: float) -> int:
    """Number of Gaussian projections k that meets a relative error for any pair of maps.

    Chebyshev's inequality and Var‖Dz‖² = 2‖D²‖²_F ≤ 2‖D‖⁴_F give P(|L_k − L| > εL) ≤ 2 / (k ε²). The bound covers the
    worst spectrum of D, rank one. Real maps need fewer; :func:`faqd_lib.affinity_statistics` computes how many.

    Raises:
        ValueError: ``relative_error`` is not above 0, or ``confidence`` not inside (0, 1).
    """
    check_error_and_confidence(relative_error, confidence)
    return math.ceil(2 / (relative_error**2 * (1 - confidence)))


def check_error_and_confidence(relative_error: float, confidence: float) -> None:
    """Raise ValueError unless ``relative_error`` is above 0 and ``confidence`` inside (0, 1)."""
    if not relative_error > 0 or not 0 < confidence < 1:
        raise ValueError(f"need relative_error > 0 and 0 < confidence < 1, got {relative_error!r} and {confidence!r}")


def _check_map(name: str, features: Tensor) -> None:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {kind_of(features)}")
    if features.ndim != 4 or 0 in features.shape:
        tokens = features.ndim == 3 and 0 not in features.shape
        hint = f"; for tokens (batch, N, channels) use {name}.transpose(1, 2).unsqueeze(3)" if tokens else ""
        raise ValueError(
            f"{name} must be (batch, channels, height, width) with nothing empty, got {tuple(features.shape)}{hint}"
        )


def pixel_count(features: Tensor) -> int:
    """N of a map (batch, channels, height, width), which is height·width, or of tokens (batch, N, channels)."""
    return features.shape[1] if features.ndim == 3 else features.shape[2:].numel()


def _as_maps(**named: Tensor) -> list[Tensor]:
    """Views (batch, C, N, 1) of tokens (batch, N, C). A map beside tokens becomes (batch, C, H·W, 1).

    N = h·w tokens beside a map of another size but the same proportions, h/w = H/W, become (batch, C, h, w). Raises
    ValueError for other unequal numbers of tokens, or of tokens and pixels. Anything else is returned unchanged.
    """
    features = list(named.values())
    if not any(isinstance(one, Tensor) and one.ndim == 3 for one in features):
        return features
    if not all(isinstance(one, Tensor) and one.ndim in (3, 4) for one in features):
        return features  # _check_map raises
    if len(counts := {name: pixel_count(one) for name, one in named.items()}) == 2 and len(set(counts.values())) == 2:
        maps = [one for one in features if one.ndim == 4]
        grids = [one if one.ndim == 4 else _grid(one, maps[0]) for one in features] if len(maps) == 1 else [None]
        if None not in grids:
            return grids
        (first, n), (second, m) = counts.items()
        shapes = " and ".join(f"{name} {tuple(one.shape)}" for name, one in named.items())
        raise ValueError(
            f"{first} and {second} must have the same number of tokens, got {n} and {m} (from {shapes}): tap layers "
            "with the same tokens, and leave class tokens out where the other network has none; beside a map, only a "
            "grid of tokens with the map's proportions is resized"
        )
    return [one.mT.unsqueeze(3) if one.ndim == 3 else one.flatten(2).unsqueeze(3) for one in features]


def _grid(tokens: Tensor, beside: Tensor) -> Tensor | None:
    """Tokens (batch, h·w, C) as the map (batch, C, h, w) with h/w = H/W of the map beside them; None if none has it."""
    count, (height, width) = tokens.shape[1], beside.shape[2:]
    rows = math.isqrt(count * height // max(width, 1))
    if rows == 0 or rows * rows * width != count * height or count % rows:
        return None
    return tokens.mT.unflatten(2, (rows, count // rows))


def check_count(k: int) -> None:
    """Raise TypeError or ValueError unless ``k`` is an integer of at least 1."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an integer, got {k!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1 projection, got {k}")


def _check_projection(k: int, distribution: str) -> None:
    check_count(k)
    check_choice("distribution", distribution, ("gaussian", "rademacher"))


def _check_method(method: str, norm: str, reduction: str) -> str:
    """Check the choices; return the method, "pairwise" for L1."""
    if method in ("ffa", "fast"):
        raise ValueError(f"method {method!r} is unknown: the paper's FFA is 'projection'")
    check_choice("method", method, ("auto", "gram", "pairwise", "projection"))
    check_choice("norm", norm, ("l2", "l1"))
    check_choice("reduction", reduction, ("mean", "released"))
    if norm == "l1" and method not in ("auto", "pairwise"):
        raise ValueError(
            f"norm 'l1' has no {method} form, because the sum of |D_ij| needs every entry of D: use method 'pairwise', "
            "whose cost is quadratic in the number of pixels, or norm 'l2'"
        )
    return "pairwise" if norm == "l1" else method


def check_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Check both maps, or tokens, and return them as maps: the student's, and the teacher's fitted to it.

    The teacher's map is detached and gets the device, height and width of the student's.
    """
    student, teacher = _as_maps(student=student, teacher=teacher)
    _check_map("student", student)
    _check_map("teacher", teacher)
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student has {student.shape[0]} images but teacher has {teacher.shape[0]}: feed both the same batch"
        )
    teacher = teacher.detach().to(student.device)
    if teacher.shape[2:] == student.shape[2:]:
        return student, teacher
    with torch.autocast(student.device.type, enabled=False):  # in full precision
        return student, F.interpolate(
            teacher.to(accumulation_dtype(student)),
            student.shape[2:], mode="bilinear", align_corners=False, antialias=True,
        )  # fmt: skip


def loss_of_maps(
    student: Tensor, teacher: Tensor, method: str, norm: str, reduction: str, draw: Callable[[int], Tensor]
) -> Tensor:
    """:func:`feature_affinity_loss` with checked choices; ``draw`` makes the projections (N, k) for N pixels."""
    student, teacher = check_pair(student, teacher)
    pixels = student.shape[2] * student.shape[3]
    if method == "auto":
        method = cheaper_exact(pixels, student.shape[1], teacher.shape[1])
    projections = None
    if method == "projection":
        projections = draw(pixels).to(student.device, accumulation_dtype(student), non_blocking=True)
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(student).tangent is not None:
        raise RuntimeError("the affinity loss has no forward-mode derivative: use backward() or torch.autograd.grad")
    if not torch.compiler.is_compiling() and torch._C._functorch.is_gradtrackingtensor(student):
        raise RuntimeError("torch.func cannot differentiate the affinity loss: use backward() or torch.autograd.grad")
    with_gradient = torch.is_grad_enabled() and student.requires_grad
    total = affinity_difference(student, teacher, method, norm, projections, with_gradient)
    if reduction == "mean":
        return total / (len(student) * pixels**2)
    if norm == "l1":
        return total / pixels**2
    # The root has no derivative at 0, and there the derivative of the total is 0: `tiny` avoids 0/0.
    return total.clamp_min(torch.finfo(total.dtype).tiny).sqrt() / pixels


def _draw_and_advance(state: Tensor, pixels: int, k: int, distribution: str) -> Tensor:
    """Draw projections from the state (uint8) of a CPU generator, and advance the state."""
    generator = torch.Generator()
    generator.set_state(state)
    projections = draw_projections(pixels, k, distribution, generator)
    state.copy_(generator.get_state())
    return projections


# Its first call imports torch's compiler, so it is for traces only.
_draw_operator = torch.library.custom_op("faqd::draw_projections", _draw_and_advance, mutates_args=("state",))


@_draw_operator.register_fake
def _(state, pixels, k, distribution):
    return torch.empty(pixels, k)
