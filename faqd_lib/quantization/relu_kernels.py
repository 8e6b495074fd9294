"""Values and gradients of the quantized ReLU; :class:`faqd_lib.quantization.relu.QuantizedReLU` has the mathematics.

Eager code works in chunks that fit into the cache of a CPU's core. Compiled code works in one pass: one function for
values, one for gradients. A compiled or traced network absorbs these two functions. For eager training on a CPU,
:func:`kernels` compiles them by themselves.

Values and gradients to the input agree, except for the sign of zeros. The step's gradient agrees to rounding.
``torch.export`` keeps the values and drops the gradients.
"""

import math
import threading
import types
import warnings

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..utils.messages import first_line
from ..utils.tracing import is_traced

SMALLEST_STEP = 1e-6  # training could push a step to 0 or below, which would turn its layer off for ever

_CHUNK = 2**20  # bytes of a tensor that fit into the cache of a CPU core
_COMPILED_FROM = 2**16  # elements of the smallest tensor that compiled kernels are made for
_PROBE = 2**20  # elements of the first call; from its size the compiler decides how threads share the work


def quantized_relu(x: Tensor, step: Tensor, highest: int, coarse: bool, compiled: bool) -> Tensor:
    """``α·round(clip(x/α, 0, highest))`` computed in float32 at least, with both gradients; α is the scalar ``step``.

    The result has the dtype, shape and memory layout of ``x``. ``coarse`` gives α the coarse gradient. ``compiled``
    uses :func:`kernels`, forward and backward, if ``x`` is large and on the CPU.
    """
    middle = (highest + 1) // 2 if coarse else 0  # the coarse gradient inside the range, 2^(bits−1)
    if is_traced(x):
        return _OnePass.apply(x, step, highest, middle, None)
    if compiled and x.device.type == "cpu" and x.numel() >= _COMPILED_FROM and (made := kernels(x.dtype, coarse)):
        return _OnePass.apply(x, step, highest, middle, made)
    return _Chunked.apply(x, step, highest, middle)


def features(x: Tensor) -> int:
    """Number of elements for one image of a batch (N, …); all elements of a tensor that has no other dimension."""
    return x[0].numel() if x.ndim > 1 and len(x) else x.numel()


def _root(x: Tensor, highest: int) -> float:
    """√(F·Q), by which LSQ divides the step's gradient."""
    return math.sqrt(max(1, features(x)) * highest)


def _wide(step: Tensor, x: Tensor) -> Tensor:
    """The step, at least ``SMALLEST_STEP``, as a tensor (1,), float32 at least. A scalar would not widen bfloat16."""
    return step.clamp_min(SMALLEST_STEP).to(torch.promote_types(x.dtype, torch.float32)).reshape(1)


# ---- Memory order


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of a tensor without gaps whose dimensions have the same order as those of ``x``."""
    return torch.empty_like(x, device="meta").stride()


def _flat(x: Tensor, like: Tensor) -> Tensor:
    """All elements of ``x`` (n,), in the memory order of ``like``; a view where ``x`` lies in that order."""
    if x.stride() != _strides(like):
        x = torch.empty_like(like, dtype=x.dtype).copy_(x)
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


def _shaped(flat: Tensor, x: Tensor) -> Tensor:
    """The inverse of :func:`_flat`. The result is no view, so that it may be overwritten like any tensor."""
    return torch.empty(0, dtype=flat.dtype, device=flat.device).set_(flat.untyped_storage(), 0, x.shape, _strides(x))


# ---- In chunks


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, step, highest, middle):
        y = torch.empty_like(x)  # without gaps: strides follow the order of the dimensions of x
        wide_step = _wide(step, x)
        narrow = x.dtype != wide_step.dtype
        for room, source, target in _chunks(_flat(x, y), _flat(y, y), buffers=int(narrow), dtype=wide_step.dtype):
            if narrow:
                wide = room[0].copy_(source)
                target.copy_(wide.div_(wide_step).clamp_(0, highest).round_().mul_(wide_step))
            else:
                torch.div(source, wide_step, out=target).clamp_(0, highest).round_().mul_(wide_step)
        ctx.save_for_backward(x, y, step)  # y costs no memory: the next layer keeps it, too
        ctx.highest, ctx.middle = highest, middle
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        # Both gradients pass the guard of a step that is too small, so that such a step can recover.
        (x, y, step), highest, middle = ctx.saved_tensors, ctx.highest, ctx.middle
        wide_step = _wide(step, x)
        to_x = torch.empty_like(x)
        total = torch.zeros((), dtype=wide_step.dtype, device=x.device)
        # On a CPU a number. Elsewhere a tensor, since the host would have to wait for the number.
        top = float(wide_step) * highest if x.device.type == "cpu" else wide_step * highest
        narrow = x.dtype != total.dtype
        inverse = wide_step.reciprocal()  # twice as fast as a quotient; the sum does not feel the last digit
        flat = (_flat(tensor, to_x) for tensor in (x, y, gradient, to_x))
        buffers = 3 if narrow else 1  # the coarse gradient needs none
        for room, source, result, g, target in _chunks(*flat, buffers=0 if middle else buffers, dtype=total.dtype):
            if middle:
                inside = _inside(g, source, top, out=target).sum(dtype=total.dtype)
                above = torch.where(source.to(total.dtype) >= top, g.to(total.dtype), 0).sum()
                total += inside * middle + above * highest
            elif narrow:
                # y − x would lack digits, for y is rounded: Σ g·round(x/α) − Σ g·x/α inside, both clipped.
                ratio, wide, inside = room
                target.copy_(_inside(wide.copy_(g), ratio.copy_(source), top, out=inside))
                kept = torch.dot(inside, ratio.mul_(inverse).clamp_(0, highest))
                total += torch.dot(wide, ratio.round_()) - kept
            else:
                # α·(round(x/α) − x/α) = y − x inside, α·Q = y above, 0 = y below.
                _inside(g, source, top, out=target)
                kept = _inside(source, source, top, out=room[0])
                total += torch.dot(g, torch.sub(result, kept, out=kept))
        total /= _root(x, highest)
        return to_x, (total if middle or narrow else total / wide_step.squeeze()).to(step.dtype), None, None


def _chunks(*tensors: Tensor, buffers: int, dtype: torch.dtype):
    """(buffers, chunk of each flat tensor), chunk by chunk; whole outside the CPU."""
    x = tensors[0]
    size = min(_CHUNK // x.element_size(), x.numel()) if x.device.type == "cpu" else x.numel()
    # Allocated once, for all chunks: memory fresh from the system costs page faults.
    room = [torch.empty(size, dtype=dtype, device=x.device) for _ in range(buffers)]
    for chunks in zip(*(tensor.split(size) for tensor in tensors), strict=True):
        yield [buffer[: len(chunks[0])] for buffer in room], *chunks


def _inside(values: Tensor, x: Tensor, top: Tensor | float, out: Tensor) -> Tensor:
    """``values`` where 0 < x < top, 0 elsewhere, even where ``values`` is infinite; written to ``out``.

    Where x is NaN it may be either. The loss is NaN then, and training stops.
    """
    if isinstance(top, float):
        return torch.ops.aten.hardtanh_backward.grad_input(values, x, 0.0, top, grad_input=out)
    return out.copy_(torch.where((x > 0) & (x < top), values, 0))


# ---- In one pass


def _values(x: Tensor, step: Tensor, highest: int) -> Tensor:
    """α·round(clip(x/α, 0, highest))."""
    return ((x.to(step.dtype) / step).clamp(0, highest).round() * step).to(x.dtype)


def _gradients(g: Tensor, x: Tensor, step: Tensor, highest: int, middle: int) -> tuple[Tensor, Tensor]:
    """The gradient to x, and Σ g·slope for α.

    The slope is 0 below the range, ``highest`` above, and ``middle`` inside, or round(x/α) − x/α if ``middle`` is 0.
    """
    wide = x.to(step.dtype)
    inside = (wide > 0) & (wide < step * highest)
    ratio = wide / step
    slope = float(middle) if middle else ratio.round() - ratio
    slope = torch.where(inside, slope, torch.where(wide > 0, float(highest), 0.0))
    return torch.where(inside, g, 0), (g.to(step.dtype) * slope).sum()


class _OnePass(torch.autograd.Function):
    """``_values`` and ``_gradients``, compiled if ``made`` is given."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, step, highest, middle, made):
        return (made.values if made else _values)(x, _wide(step, x), highest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, step, ctx.highest, ctx.middle, ctx.made = inputs
        ctx.save_for_backward(x, step)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, step = ctx.saved_tensors
        gradients = ctx.made.gradients if ctx.made else _gradients
        to_x, total = gradients(gradient, x, _wide(step, x), ctx.highest, ctx.middle)
        return to_x, (total / _root(x, ctx.highest)).to(step.dtype), None, None, None


class _Kernels:
    """``_values`` and ``_gradients`` compiled for one dtype, gradient and number of threads."""

    def __init__(self, dtype: torch.dtype, coarse: bool) -> None:
        # Each kernel gets its own code object: torch compiles a code object at most eight times.
        self._values, self._gradients = (
            torch.compile(types.FunctionType(f.__code__.replace(), f.__globals__), dynamic=True, fullgraph=True)
            for f in (_values, _gradients)
        )
        # A call like those of training, so that everything is compiled now.
        x = torch.zeros(_PROBE, dtype=dtype, device="cpu").unsqueeze(0)
        step = torch.ones(1, dtype=torch.promote_types(dtype, torch.float32), device="cpu")
        self.values(x, step, 15)
        self.gradients(torch.zeros_like(x), x, step, 15, 8 if coarse else 0)

    @torch.no_grad()
    def values(self, x: Tensor, step: Tensor, highest: int) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return _shaped(self._values(_flat(x, x).detach(), step.detach(), highest), x)

    @torch.no_grad()
    def gradients(self, g: Tensor, x: Tensor, step: Tensor, highest: int, middle: int) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", enabled=False):
            flat = (_flat(tensor, x).detach() for tensor in (g, x))
            to_x, total = self._gradients(*flat, step.detach(), highest, middle)
        return _shaped(to_x, x), total


_made: dict[tuple, _Kernels | None] = {}
_making = threading.Lock()


def kernels(dtype: torch.dtype, coarse: bool) -> _Kernels | None:
    """Compiled kernels for inputs of a dtype on the CPU, made once a process for each gradient and number of threads.

    None where torch's own ``TORCH_COMPILE_DISABLE=1`` switches compiling off; None and a UserWarning where it fails.
    """
    if torch._dynamo.config.disable:
        return None
    key = (dtype, coarse, torch.get_num_threads())
    with _making:
        if key not in _made:
            try:
                _made[key] = _Kernels(dtype, coarse)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                _made[key] = None
                warnings.warn(
                    "training with quantized activations goes on without compiled kernels, slower and with the same "
                    f"numbers to rounding, because compiling failed ({first_line(error.inner_exception)}): install a "
                    "C++ compiler (g++ or clang) if there is none, or set TORCH_COMPILE_DISABLE=1",
                    stacklevel=2,
                )
        return _made[key]
