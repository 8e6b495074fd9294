"""The affinity losses' computation: value and gradient in one pass, a few images at a time, as one operator.

The operator is opaque to ``torch.compile``, which takes it as it is; the mathematics is in
:mod:`faqd_lib.affinity.loss`.
"""

from collections.abc import Iterator

import torch
from torch.utils.flop_counter import register_flop_formula

EPS = 1e-6  # a pixel vector shorter than this has no direction

_CPU_CHUNK = 2**20  # numbers in a work buffer: 4 MiB of float32, which fewer calls and a processor's cache both like
_GPU_CHUNK = 2**26  # there the only limit is memory
_ROWS = 64  # rows of D at a time, at least: fewer make slow matrix products


def accumulation_dtype(features: torch.Tensor) -> torch.dtype:
    """In which the losses compute: float64 for float64 maps, else float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


class Pixels:
    """Normalised pixel vectors of a few images at a time, in buffers that are used again and again.

    ``q`` (b, N, w): columns [E, Y, rest] with E = Y − X over the m channels that both maps have; rest: the further
    channels of the wider map. ``k`` (w, w) and ``t`` (w, C_s): D = Q K Qᵀ and X = Q T. ``inverse`` (b, N, 1): 1/‖F‖
    of the student's pixels, ``alive``: where that is a direction.
    """

    def __init__(self, student: torch.Tensor, teacher: torch.Tensor) -> None:
        self.dtype = accumulation_dtype(student)
        self.student, self.teacher = (m.detach().permute(0, 2, 3, 1) for m in (student, teacher))
        self.images, self.channels = student.shape[:2]
        self.pixels = student.shape[2] * student.shape[3]
        teacher_channels = teacher.shape[1]
        self.width = self.channels + teacher_channels
        self.shared = shared = min(self.channels, teacher_channels)
        self.rest = self.width - 2 * shared
        self.sign = 1 if self.channels > teacher_channels else -1
        new = student.new_zeros
        one = torch.eye(shared, dtype=self.dtype, device=student.device)
        self.k = new((self.width, self.width), dtype=self.dtype)
        self.t = new((self.width, self.channels), dtype=self.dtype)
        self.k[:shared, :shared] = one
        self.k[:shared, shared : 2 * shared] = self.k[shared : 2 * shared, :shared] = -one
        self.t[:shared, :shared] = -one
        self.t[shared : 2 * shared, :shared] = one
        if self.rest:
            rest = torch.eye(self.rest, dtype=self.dtype, device=student.device)
            self.k[2 * shared :, 2 * shared :] = self.sign * rest
            if self.sign > 0:
                self.t[2 * shared :, shared:] = rest

    def buffer(self, *shape: int) -> torch.Tensor:
        return self.student.new_empty(shape, dtype=self.dtype)

    def chunks(self, numbers_an_image: int) -> Iterator[slice]:
        """Slices of images, each small enough for a buffer of ``numbers_an_image`` each; fills ``q`` for it."""
        limit = _CPU_CHUNK if self.student.device.type == "cpu" else _GPU_CHUNK
        step = min(self.images, max(1, limit // numbers_an_image))
        widest = max(self.width - self.channels, self.channels)
        q, squares = self.buffer(step, self.pixels, self.width), self.buffer(step, self.pixels, widest)
        for start in range(0, self.images, step):
            chunk = slice(start, min(start + step, self.images))
            size = chunk.stop - chunk.start
            self.q = q[:size]
            self._scratch = squares[:size]
            self._fill(chunk)
            yield chunk

    def _fill(self, chunk: slice) -> None:
        m = self.shared
        f, g = (
            features[chunk].reshape(-1, self.pixels, features.shape[3]).to(self.dtype)
            for features in (self.student, self.teacher)
        )
        length, length_g = self._length(f), self._length(g)
        self.f, self.alive = f, length >= EPS
        both_alive = self.alive & (length_g >= EPS)
        self.inverse, inverse_g = (each.clamp_min_(EPS).reciprocal_() for each in (length, length_g))
        e, y = self.q[..., :m], self.q[..., m : 2 * m]
        torch.mul(g[..., :m], inverse_g, out=y)
        torch.mul(f[..., :m], self.inverse, out=e)
        torch.sub(y, e, out=e)  # not fused with the line above: equal maps have E = 0 to the bit
        # |X|² − |Y|², which is 0 but for the rounding of the two lengths. That error is common to all channels of a
        # pixel, and would be all that is left of D where the maps are close: X = Y − E is made as long as Y again.
        scratch = self._scratch[..., :m]
        radial = torch.sub(e, y, alpha=2, out=scratch).mul_(e).sum(2, keepdim=True)
        if self.rest:
            wider, inverse = (f, self.inverse) if self.sign > 0 else (g, inverse_g)
            rest = self.q[..., 2 * m :]
            torch.mul(wider[..., m:], inverse, out=rest)
            radial += self.sign * torch.mul(rest, rest, out=self._scratch[..., : self.rest]).sum(2, keepdim=True)
        e.addcmul_(y, torch.where(both_alive, radial, 0), value=0.5)

    def _length(self, f: torch.Tensor) -> torch.Tensor:
        # Twice as fast as vector_norm along few, adjacent numbers.
        length = torch.mul(f, f, out=self._scratch[..., : f.shape[2]]).sum(2, keepdim=True).sqrt_()
        return length.add_(0 * length)  # finite numbers whose squares overflow: NaN rather than a wrong direction

    def through_normalisation(self, gradient: torch.Tensor, factor: float) -> None:
        """In place from the gradient with respect to X to factor · that with respect to F."""
        along = torch.mul(self.f, gradient, out=self._scratch[..., : self.channels]).sum(2, keepdim=True)
        along.mul_(self.inverse).mul_(self.inverse)
        gradient.addcmul_(self.f, along, value=-1)
        gradient.mul_(torch.where(self.alive, self.inverse, 0).mul_(factor))


def _gram(p: Pixels, gradient: torch.Tensor | None) -> torch.Tensor:
    total = p.student.new_zeros((), dtype=p.dtype)
    for chunk in p.chunks(p.pixels * p.width):
        g = p.q.transpose(1, 2) @ p.q
        kg = p.k @ g
        total += (kg * kg.transpose(1, 2)).sum()
        if gradient is not None:
            torch.bmm(p.q, kg @ p.t, out=gradient[chunk])
            p.through_normalisation(gradient[chunk], 4)
    # A difference of rounded sums where the maps agree; a squared norm is not negative.
    return total.clamp_min_(0)


def _projection(p: Pixels, gradient: torch.Tensor | None, z: torch.Tensor) -> torch.Tensor:
    total, k = p.student.new_zeros((), dtype=p.dtype), z.shape[1]
    zt = z.T.contiguous()  # products with few long rows are twice as fast as with few long columns
    for chunk in p.chunks(p.pixels * (p.width + k)):
        images = len(p.q)
        zq = torch.bmm(zt.expand(images, -1, -1), p.q)
        dz = torch.bmm(zq @ p.k, p.q.transpose(1, 2))  # row j: D z_j
        total += dz.square().sum()
        if gradient is not None:
            # ∂‖D z‖²/∂X = 2 (Dz (Xᵀz)ᵀ + z (XᵀDz)ᵀ)
            xdz = torch.bmm(dz * p.inverse.transpose(1, 2), p.f)
            torch.bmm(dz.transpose(1, 2), zq @ p.t, out=gradient[chunk])
            gradient[chunk].baddbmm_(z.expand(images, -1, -1), xdz)
            p.through_normalisation(gradient[chunk], 2 / k)
    return total / k


def _pairwise(p: Pixels, gradient: torch.Tensor | None, norm: str) -> torch.Tensor:
    total, m, n = p.student.new_zeros((), dtype=p.dtype), p.shared, p.pixels
    limit = _CPU_CHUNK if p.student.device.type == "cpu" else _GPU_CHUNK
    rows = min(n, max(_ROWS, limit // n))
    for chunk in p.chunks(max(n * p.width, rows * n)):
        x = p.f * p.inverse
        qk = torch.cat((-x[..., :m], -p.q[..., :m], p.q[..., 2 * m :] * p.sign), dim=2)  # Q K, without a product
        qt = p.q.transpose(1, 2)
        for start in range(0, n, rows):
            d = qk[:, start : start + rows] @ qt
            total += (d.square() if norm == "l2" else d.abs()).sum()
            if gradient is not None:
                weight = d if norm == "l2" else d.sign_()
                torch.bmm(weight, x, out=gradient[chunk, start : start + rows])
        if gradient is not None:
            p.through_normalisation(gradient[chunk], 4 if norm == "l2" else 2)
    return total


@torch.library.custom_op("faqd::affinity_difference", mutates_args=())
def affinity_difference(
    student: torch.Tensor,
    teacher: torch.Tensor,
    method: str,
    norm: str,
    projections: torch.Tensor | None,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ over images of ‖D‖²_F, of its estimate, or of ‖D‖₁; its gradient, as large as the student's map or empty)."""
    # Inside autocast the products must still be computed and summed in float32.
    with torch.autocast(student.device.type, enabled=False):
        p = Pixels(student, teacher)
        gradient = _empty_gradient(student, with_gradient)
        rows = gradient.permute(0, 2, 3, 1).flatten(1, 2) if with_gradient else None
        if method == "gram":
            total = _gram(p, rows)
        elif method == "pairwise":
            total = _pairwise(p, rows, norm)
        else:
            total = _projection(p, rows, projections)
    return total, gradient


def _empty_gradient(student: torch.Tensor, with_gradient: bool) -> torch.Tensor:
    """Channels-last, whatever the student's own layout: pixel vectors are what everything here reads and writes."""
    b, c, h, w = student.shape
    dtype = accumulation_dtype(student)
    if not with_gradient:
        return student.new_empty(0, dtype=dtype)
    return student.new_empty((b, h, w, c), dtype=dtype).permute(0, 3, 1, 2)


@affinity_difference.register_fake
def _(student, teacher, method, norm, projections, with_gradient):
    return student.new_empty((), dtype=accumulation_dtype(student)), _empty_gradient(student, with_gradient)


def _keep_gradient(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)  # nobody differentiates the gradient: zeros as large as a map would be made for it
    ctx.student_dtype = inputs[0].dtype


def _scaled_gradient(ctx, of_total: torch.Tensor, of_gradient: torch.Tensor | None):
    if torch.is_grad_enabled():  # only under create_graph: the saved gradient would silently count as constant
        raise RuntimeError("the affinity loss has no second derivative: call backward without create_graph=True")
    if of_total is None:
        return (None,) * 6
    (gradient,) = ctx.saved_tensors
    # Multiplied before the cast: the scale of float16 training does not fit into float16 by itself.
    return (gradient * of_total).to(ctx.student_dtype), None, None, None, None, None


affinity_difference.register_autograd(_scaled_gradient, setup_context=_keep_gradient)


@register_flop_formula(torch.ops.faqd.affinity_difference)
def _flops(student, teacher, method, norm, projections, with_gradient, *_, **__) -> int:
    """Of the matrix products, for torch's own counter, which cannot see into the operator. Arguments are shapes."""
    images, channels, pixels = student[0], student[1], student[2] * student[3]
    w = channels + teacher[1]
    if method == "gram":
        products = w * w * (pixels + w) + with_gradient * w * channels * (w + pixels)
    elif method == "pairwise":
        products = pixels**2 * (w + with_gradient * channels)
    else:
        k = projections[1]
        products = w * k * (2 * pixels + w) + with_gradient * channels * k * (w + 3 * pixels)
    return 2 * images * products
