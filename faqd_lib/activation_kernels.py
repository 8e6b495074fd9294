"""The quantized ReLU's computation: values and gradients, as two operators; the mathematics is in
:class:`faqd_lib.quantizers.QuantizedReLU`.

In training on a CPU, large tensors take one pass over memory for the values and one for the gradients, by
:func:`torch.compile`, where the machine has a C++ compiler; everything else takes a few passes in pieces that fit into
a core's cache. Values and gradients to the input are the same bits either way, the step's gradient is to rounding.
"""

import functools
import math
import warnings
from collections.abc import Callable

import torch

SMALLEST_STEP = 1e-6  # a step that training drives below it would turn its layer off for ever

_CHUNK = 2**20  # bytes of a tensor that CPU cores work on at a time: what their own caches hold
_COMPILED_FROM = 2**16  # elements: what takes no time is not worth a compiler's


def features(x: torch.Tensor) -> int:
    """Number of elements for one image of a batch (N, …); all elements of a tensor that has no other dimension."""
    return x[0].numel() if x.ndim > 1 and len(x) else x.numel()


def _strides(x: torch.Tensor) -> tuple[int, ...]:
    """Those of a tensor with the same order of dimensions and without gaps."""
    return torch.empty_like(x, device="meta").stride()


def _flat(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """All elements in the order in which they lie in memory, or would in a tensor like ``like`` without gaps."""
    if x.stride() != _strides(like):
        x = torch.empty_like(like, dtype=x.dtype).copy_(x)
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


def _like(flat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What :func:`_flat` took apart, in the shape of ``x``."""
    return flat.as_strided(x.shape, _strides(x))


def _chunks(*tensors: torch.Tensor):
    """Pieces of flat tensors: small enough for a core's cache on a CPU, whole elsewhere."""
    size = _chunk_size(tensors[0])
    if tensors[0].numel() <= size:
        return [tensors]
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _chunk_size(x: torch.Tensor) -> int:
    return _CHUNK // x.element_size() if x.device.type == "cpu" else x.numel()


def _wide(step: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The step as one element in float32 at least: a scalar would let bfloat16 input be divided in bfloat16."""
    return step.clamp_min(SMALLEST_STEP).to(torch.promote_types(x.dtype, torch.float32)).reshape(1)


def _buffers(number: int, x: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Room for a chunk's numbers: allocated once a call, because memory fresh from the system costs page faults."""
    size = min(_chunk_size(x), x.numel())
    return [torch.empty(size, dtype=dtype, device=x.device) for _ in range(number)]


def _inside(values: torch.Tensor, x: torch.Tensor, top: torch.Tensor | float, out: torch.Tensor) -> torch.Tensor:
    """``values`` where 0 < x < top, 0 elsewhere, also where ``values`` is infinite; written to ``out``.

    Where x is NaN either of the two: the loss is NaN then, and training stops.
    """
    if isinstance(top, float):
        return torch.ops.aten.hardtanh_backward.grad_input(values, x, 0.0, top, grad_input=out)
    return out.copy_(torch.where((x > 0) & (x < top), values, 0))


# ---- By a compiler, in one pass each


def _values(x: torch.Tensor, step: torch.Tensor, highest: int) -> torch.Tensor:
    """α·round(clip(x/α, 0, highest))."""
    return ((x.to(step.dtype) / step).clamp(0, highest).round() * step).to(x.dtype)


def _gradients(
    g: torch.Tensor, x: torch.Tensor, step: torch.Tensor, highest: int, middle: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient to x, and that to α: Σ g times highest above the range, 0 below, and inside ``middle``, or
    round(x/α) − x/α if that is 0."""
    wide = x.to(step.dtype)
    inside = (wide > 0) & (wide < step * highest)
    ratio = wide / step
    slope = float(middle) if middle else ratio.round() - ratio
    slope = torch.where(inside, slope, torch.where(wide > 0, float(highest), 0.0))
    return torch.where(inside, g, 0), (g.to(step.dtype) * slope).sum()


@functools.cache
def compiled() -> tuple[Callable, Callable] | None:
    """``_values`` and ``_gradients`` by :func:`torch.compile`, tried once a process; None where that cannot be.

    The first time on a machine it takes some fifteen seconds, later two. Torch's own switch, the environment variable
    ``TORCH_COMPILE_DISABLE=1``, turns it off.

    Warns:
        UserWarning: there is no working C++ compiler.
    """
    if torch._dynamo.config.disable:
        return None
    made = tuple(torch.compile(function, dynamic=True, fullgraph=True) for function in (_values, _gradients))
    x, step = torch.zeros(_COMPILED_FROM), torch.ones(1)
    try:
        made[0](x, step, 15)
        made[1](x, x, step, 15, 0)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = f"{type(error.inner_exception).__name__}: {error.inner_exception}".splitlines()[0]
        warnings.warn(
            "no C++ compiler works here, so training with quantized activations takes about a tenth longer, with the "
            f"same numbers to rounding ({reason}). Install one (g++ or clang), or set TORCH_COMPILE_DISABLE=1",
            stacklevel=2,
        )
        return None
    return made


def _kernels(x: torch.Tensor, fused: bool) -> tuple[Callable, Callable] | None:
    return compiled() if fused and x.device.type == "cpu" and x.numel() >= _COMPILED_FROM else None


# ---- The operators


def _forward(x: torch.Tensor, step: torch.Tensor, highest: int, coarse: bool, fused: bool) -> torch.Tensor:
    step = _wide(step, x)
    if kernels := _kernels(x, fused):
        with torch.no_grad():
            return _like(kernels[0](_flat(x, x).detach(), step.detach(), highest), x)
    y = torch.empty_like(x)  # without gaps: strides follow x's order of dimensions
    if x.dtype == step.dtype:
        for source, target in _chunks(_flat(x, y), _flat(y, y)):
            torch.div(source, step, out=target).clamp_(0, highest).round_().mul_(step)
        return y
    (work,) = _buffers(1, x, step.dtype)
    for source, target in _chunks(_flat(x, y), _flat(y, y)):
        wide = work[: source.numel()].copy_(source)
        target.copy_(wide.div_(step).clamp_(0, highest).round_().mul_(step))
    return y


def _backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    step: torch.Tensor,
    highest: int,
    coarse: bool,
    fused: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    # The gradient passes the guard of a step that is too small, so that such a step can recover.
    guarded = _wide(step, x)
    middle = round((highest + 1) / 2) if coarse else 0
    root = math.sqrt(max(1, features(x)) * highest)
    if kernels := _kernels(x, fused):
        with torch.no_grad():
            flat = (_flat(tensor, x).detach() for tensor in (gradient, x))
            to_x, total = kernels[1](*flat, guarded.detach(), highest, middle)
        return _like(to_x, x), (total / root).to(step.dtype)
    to_x = torch.empty_like(x)
    total = torch.zeros((), dtype=guarded.dtype, device=x.device)
    # As a number where that costs nothing: elsewhere the host would have to wait for it.
    top = float(guarded) * highest if x.device.type == "cpu" else guarded * highest
    narrow = x.dtype != total.dtype
    steps = guarded.reciprocal()  # a product takes half as long as a quotient, and sums do not feel its last digit
    work = [] if coarse else _buffers(3 if narrow else 1, x, total.dtype)
    for source, result, g, target in _chunks(*(_flat(tensor, to_x) for tensor in (x, y, gradient, to_x))):
        room = work if work and len(work[0]) == len(source) else [buffer[: len(source)] for buffer in work]
        if coarse:
            inside = _inside(g, source, top, out=target).sum(dtype=total.dtype)
            above = torch.where(source.to(total.dtype) >= top, g.to(total.dtype), 0).sum()
            total += inside * middle + above * highest
        elif narrow:  # y is rounded to fewer digits than y − x needs: α·(Σ g·round(x/α) − Σ g·x/α inside), clipped
            ratio, wide, inside = room
            target.copy_(_inside(wide.copy_(g), ratio.copy_(source), top, out=inside))
            kept = torch.dot(inside, ratio.mul_(steps).clamp_(0, highest))
            total += torch.dot(wide, ratio.round_()) - kept
        else:  # α·(round(x/α) − x/α) = y − x inside, α·Q = y above, 0 = y below
            _inside(g, source, top, out=target)
            kept = _inside(source, source, top, out=room[0])
            total += torch.dot(g, torch.sub(result, kept, out=kept))
    total /= root
    return to_x, (total if coarse or narrow else total / guarded.squeeze()).to(step.dtype)


_operator = torch.library.custom_op("faqd::quantized_relu", _forward, mutates_args=())
_operator_backward = torch.library.custom_op("faqd::quantized_relu_backward", _backward, mutates_args=())


@_operator.register_fake
def _(x, step, highest, coarse, fused):
    return torch.empty_like(x)


@_operator_backward.register_fake
def _(gradient, x, y, step, highest, coarse, fused):
    return torch.empty_like(x), torch.empty_like(step)


def _keep_input(ctx, inputs, output) -> None:
    x, step, *ctx.how = inputs
    ctx.save_for_backward(x, output, step)  # the output costs no memory: the next layer keeps it, too


def _both_gradients(ctx, gradient: torch.Tensor, backward: Callable = _operator_backward):
    x, y, step = ctx.saved_tensors
    return *backward(gradient, x, y, step, *ctx.how), None, None, None


_operator.register_autograd(_both_gradients, setup_context=_keep_input)


class _Eager(torch.autograd.Function):
    """The same for calls outside ``torch.compile``: an operator of the registry costs several times as much a call."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _keep_input(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        return _both_gradients(ctx, gradient, _backward)


def quantized_relu(x: torch.Tensor, step: torch.Tensor, highest: int, coarse: bool, fused: bool) -> torch.Tensor:
    """``α·round(clip(x/α, 0, highest))`` in the dtype of ``x``, computed in float32 at least, with both gradients.

    Args:
        x: any shape and memory layout; the result has the same.
        step: α, a scalar.
        highest: the highest level.
        coarse: which gradient α gets.
        fused: whether a compiler may be asked, here and in the backward pass.
    """
    how = _operator if torch.compiler.is_compiling() else _Eager.apply
    return how(x, step, highest, coarse, fused)
