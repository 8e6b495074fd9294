"""Computation of the affinity losses: value and gradient in one pass, a few images at a time.

:func:`affinity_difference` is what losses call. Where torch traces, it is one operator: ``torch.compile`` calls the
operator without looking into it. The mathematics is in :mod:`faqd_lib.affinity.loss`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..utils.tracing import is_traced

EPS = 1e-6  # a pixel vector shorter than this has no direction

_CPU_CHUNK = 2**20  # numbers in a work buffer: 4 MiB of float32, small enough for the cache, large enough for few calls
_GPU_CHUNK = 2**26  # limited by memory alone
_ROWS = 64  # smallest number of rows of D at a time: matrix products of fewer rows are slow


def accumulation_dtype(features: Tensor) -> torch.dtype:
    """The dtype in which the losses compute: float64 for float64 maps, else float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


class MapPair:
    """Factors of D = Q K Qᵀ for a student's and a teacher's map, made for a few images at a time.

    ``images`` is the batch size and ``pixels`` N = height·width. ``channels`` is C_s, and ``width`` is w = C_s + C_t.
    ``shared`` is m, the number of channels that both maps have. ``core`` is K (w, w), and ``to_student`` is T (w, C_s)
    with X = Q T.
    """

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        self.dtype = accumulation_dtype(student)
        self.student, self.teacher = (m.detach().permute(0, 2, 3, 1) for m in (student, teacher))
        self.images, self.channels = student.shape[:2]
        self.pixels = student.shape[2] * student.shape[3]
        teacher_channels = teacher.shape[1]
        self.width = self.channels + teacher_channels
        self.shared = m = min(self.channels, teacher_channels)
        self.rest = self.width - 2 * m
        self.sign = 1 if self.channels > teacher_channels else -1  # sign in D of the further channels
        self.limit = _CPU_CHUNK if student.device.type == "cpu" else _GPU_CHUNK
        one, rest = (torch.eye(size, dtype=self.dtype, device=student.device) for size in (m, self.rest))
        shared = torch.cat((torch.cat((one, -one), 1), torch.cat((-one, torch.zeros_like(one)), 1)))
        self.core = torch.block_diag(shared, self.sign * rest)
        self.to_student = torch.block_diag(torch.cat((-one, one)), rest if self.sign > 0 else rest[:, :0])

    def chunks(self, numbers_an_image: int) -> "Iterator[Chunk]":
        """Chunks of images, so small that a buffer of ``numbers_an_image`` for each image stays in the cache.

        All chunks share one buffer: a chunk is valid until the next one is made.
        """
        size = min(self.images, max(1, self.limit // numbers_an_image))
        widest = max(self.width - self.channels, self.channels)
        q = self.student.new_empty((size, self.pixels, self.width), dtype=self.dtype)
        scratch = self.student.new_empty((size, self.pixels, widest), dtype=self.dtype)
        for start in range(0, self.images, size):
            yield self._chunk(slice(start, start + size), q, scratch)

    def _chunk(self, images: slice, q: Tensor, scratch: Tensor) -> "Chunk":
        """The chunk of these images: fill ``q``, overwrite ``scratch``."""
        m = self.shared
        f, g = (each[images].flatten(1, 2).to(self.dtype) for each in (self.student, self.teacher))
        q, scratch = q[: len(f)], scratch[: len(f)]
        length, length_g = _length(f, scratch), _length(g, scratch)
        alive = length >= EPS
        both_alive = alive & (length_g >= EPS)
        inverse, inverse_g = (each.clamp_min_(EPS).reciprocal_() for each in (length, length_g))
        e, y = q[..., :m], q[..., m : 2 * m]
        torch.mul(g[..., :m], inverse_g, out=y)
        torch.mul(f[..., :m], inverse, out=e)
        torch.sub(y, e, out=e)  # not fused with the line above: equal maps must give E = 0 to the bit
        # |X|² − |Y|² is 0 except for the rounding of the two lengths, an error that all channels of a pixel share. If
        # the maps are close, this error would dominate D. The correction gives X = Y − E the length of Y again.
        radial = torch.sub(e, y, alpha=2, out=scratch[..., :m]).mul_(e).sum(2, keepdim=True)
        if self.rest:
            wider, inverse_of_wider = (f, inverse) if self.sign > 0 else (g, inverse_g)
            rest = q[..., 2 * m :]
            torch.mul(wider[..., m:], inverse_of_wider, out=rest)
            radial += self.sign * torch.mul(rest, rest, out=scratch[..., : self.rest]).sum(2, keepdim=True)
        e.addcmul_(y, torch.where(both_alive, radial, 0), value=0.5)
        return Chunk(images, q, f, inverse, alive, scratch)


class Chunk(NamedTuple):
    """Normalised pixel vectors of a few images of the batch."""

    images: slice
    q: Tensor  # Q (b, N, w) with the columns [E, Y, rest]: E = Y − X over the shared channels, rest from the wider map
    f: Tensor  # the student's map (b, N, C_s), not normalised
    inverse: Tensor  # 1/‖F‖ of the student's pixels (b, N, 1)
    alive: Tensor  # whether a pixel has a direction (b, N, 1)
    scratch: Tensor  # a buffer to overwrite

    def through_normalisation(self, gradient: Tensor, factor: float) -> None:
        """Turn a gradient with respect to X in place into ``factor`` times the gradient with respect to F."""
        along = torch.mul(self.f, gradient, out=self.scratch[..., : self.f.shape[2]]).sum(2, keepdim=True)
        along.mul_(self.inverse).mul_(self.inverse)
        gradient.addcmul_(self.f, along, value=-1)
        gradient.mul_(torch.where(self.alive, self.inverse, 0).mul_(factor))


def _length(f: Tensor, scratch: Tensor) -> Tensor:
    # Faster than vector_norm for short vectors in adjacent memory.
    length = torch.mul(f, f, out=scratch[..., : f.shape[2]]).sum(2, keepdim=True).sqrt_()
    return length.add_(0 * length)  # a vector whose squares overflow becomes NaN instead of a wrong direction


def _gram(pair: MapPair, gradient: Tensor | None) -> Tensor:
    total = pair.student.new_zeros((), dtype=pair.dtype)
    for chunk in pair.chunks(pair.pixels * pair.width):
        core_g = pair.core @ (chunk.q.transpose(1, 2) @ chunk.q)
        total += (core_g * core_g.transpose(1, 2)).sum()
        if gradient is not None:
            torch.bmm(chunk.q, core_g @ pair.to_student, out=gradient[chunk.images])
            chunk.through_normalisation(gradient[chunk.images], 4)
    # If the maps agree, this difference of rounded sums can be negative; a squared norm cannot.
    return total.clamp_min_(0)


def _projection(pair: MapPair, gradient: Tensor | None, z: Tensor) -> Tensor:
    total, k = pair.student.new_zeros((), dtype=pair.dtype), z.shape[1]
    zt = z.T.contiguous()  # products with few long rows are faster than with few long columns
    for chunk in pair.chunks(pair.pixels * (pair.width + k)):
        images = len(chunk.q)
        zq = torch.bmm(zt.expand(images, -1, -1), chunk.q)
        dz = torch.bmm(zq @ pair.core, chunk.q.transpose(1, 2))  # row j: D z_j
        total += dz.square().sum()
        if gradient is not None:
            # ∂‖D z‖²/∂X = 2 (Dz (Xᵀz)ᵀ + z (XᵀDz)ᵀ)
            here = gradient[chunk.images]
            xdz = torch.bmm(dz * chunk.inverse.transpose(1, 2), chunk.f)
            torch.bmm(dz.transpose(1, 2), zq @ pair.to_student, out=here)
            here.baddbmm_(z.expand(images, -1, -1), xdz)
            chunk.through_normalisation(here, 2 / k)
    return total / k


def _pairwise(pair: MapPair, gradient: Tensor | None, norm: str) -> Tensor:
    total, m, n = pair.student.new_zeros((), dtype=pair.dtype), pair.shared, pair.pixels
    rows = min(n, max(_ROWS, pair.limit // n))
    for chunk in pair.chunks(max(n * pair.width, rows * n)):
        q, x = chunk.q, chunk.f * chunk.inverse
        q_core = torch.cat((-x[..., :m], -q[..., :m], q[..., 2 * m :] * pair.sign), dim=2)  # Q K without a product
        for start in range(0, n, rows):
            d = q_core[:, start : start + rows] @ q.transpose(1, 2)
            total += (d.square() if norm == "l2" else d.abs()).sum()
            if gradient is not None:
                weight = d if norm == "l2" else d.sign_()
                torch.bmm(weight, x, out=gradient[chunk.images, start : start + rows])
        if gradient is not None:
            chunk.through_normalisation(gradient[chunk.images], 4 if norm == "l2" else 2)
    return total


def affinity_difference(
    student: Tensor, teacher: Tensor, method: str, norm: str, projections: Tensor | None, with_gradient: bool
) -> Tensor:
    """The sum over images of ‖D‖²_F, of its estimate, or of ‖D‖₁; differentiable where ``with_gradient`` says so."""
    if is_traced(student):
        return affinity_operator(student, teacher, method, norm, projections, with_gradient)[0]
    return _Eager.apply(student, teacher, method, norm, projections, with_gradient)


def _value_and_gradient(
    student: Tensor, teacher: Tensor, method: str, norm: str, projections: Tensor | None, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The sum, and its gradient in the shape of the student's map; the gradient is empty unless ``with_gradient``."""
    # Autocast would compute the products in a lower precision.
    with torch.autocast(student.device.type, enabled=False):
        pair = MapPair(student, teacher)
        gradient = _empty_gradient(student, with_gradient)
        rows = gradient.permute(0, 2, 3, 1).flatten(1, 2) if with_gradient else None
        if method == "gram":
            total = _gram(pair, rows)
        elif method == "pairwise":
            total = _pairwise(pair, rows, norm)
        else:
            total = _projection(pair, rows, projections)
    return total, gradient


def _empty_gradient(student: Tensor, with_gradient: bool) -> Tensor:
    """Empty memory for a gradient, channels-last in any case, because pixel vectors are read and written whole."""
    b, c, h, w = student.shape
    empty = student.new_empty((b, h, w, c) if with_gradient else 0, dtype=accumulation_dtype(student))
    return empty.permute(0, 3, 1, 2) if with_gradient else empty


affinity_operator = torch.library.custom_op("faqd::affinity_difference", _value_and_gradient, mutates_args=())


@affinity_operator.register_fake
def _(student, teacher, method, norm, projections, with_gradient):
    return student.new_empty((), dtype=accumulation_dtype(student)), _empty_gradient(student, with_gradient)


def _keep_gradient(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)  # else autograd would make zeros, as large as a map, for the unused second output
    ctx.student_dtype = inputs[0].dtype


def _scaled_gradient(ctx, of_total: Tensor, of_gradient: Tensor | None):
    if torch.is_grad_enabled():  # create_graph is on: autograd would silently treat the saved gradient as constant
        raise RuntimeError("the affinity loss has no second derivative: call backward without create_graph=True")
    if of_total is None:
        return (None,) * 6
    (gradient,) = ctx.saved_tensors
    # Multiplied before the cast: the loss scale of float16 training alone would overflow float16.
    return (gradient * of_total).to(ctx.student_dtype), *(None,) * 5


affinity_operator.register_autograd(_scaled_gradient, setup_context=_keep_gradient)


class _Eager(torch.autograd.Function):
    """The operator without its wrapper, whose first call imports torch's compiler for seconds."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _value_and_gradient(*inputs)
        _keep_gradient(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, of_total):
        return _scaled_gradient(ctx, of_total, None)


@register_flop_formula(torch.ops.faqd.affinity_difference)
def _flops(student, teacher, method, norm, projections, with_gradient, *_, **__) -> int:
    """Operations of the matrix products, for torch's own counter. The first arguments are shapes."""
    images, channels, height, width = student
    pixels, w = height * width, channels + teacher[1]
    if method == "gram":
        products = w * w * (pixels + w) + with_gradient * w * channels * (w + pixels)
    elif method == "pairwise":
        products = pixels**2 * (w + with_gradient * channels)
    else:
        k = projections[1]
        products = w * k * (2 * pixels + w) + with_gradient * channels * k * (w + 3 * pixels)
    return 2 * images * products
