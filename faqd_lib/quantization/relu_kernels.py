"""The quantized ReLU's computation: values and gradients; the mathematics is in
:class:`faqd_lib.quantization.relu.QuantizedReLU`.

Everywhere: one operator of torch's registry, which ``torch.compile`` takes as it is, in a few passes over memory, in
pieces that fit into a core's cache. For training on CPUs, where it was asked for: one pass each for values and
gradients, made by ``torch.compile``. Values and gradients to the input are the same either way (but for the sign of
zeros), the step's gradient is to rounding.
"""

import math
import threading
import types
import warnings

import torch
from torch.autograd.function import once_differentiable

SMALLEST_STEP = 1e-6  # a step that training drives below it would turn its layer off for ever

_CHUNK = 2**20  # bytes of a tensor that CPU cores work on at a time: what their own caches hold
_COMPILED_FROM = 2**16  # elements: what takes no time is not worth a compiler's
_PROBE = 2**20  # elements of the first call, by whose size the compiler decides how to share the work among threads


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


def _shaped(flat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What :func:`_flat` took apart, in the shape of ``x``: no view, so that it may be overwritten like any tensor."""
    return torch.empty(0, dtype=flat.dtype, device=flat.device).set_(flat.untyped_storage(), 0, x.shape, _strides(x))


def _middle(highest: int) -> int:
    """The coarse gradient inside the range, 2^(bits−1)."""
    return (highest + 1) // 2


def _root(x: torch.Tensor, highest: int) -> float:
    """√(F·Q), by which LSQ divides the step's gradient."""
    return math.sqrt(max(1, features(x)) * highest)


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


# ---- The operators


@torch.library.custom_op("faqd::quantized_relu", mutates_args=())
def _operator(x: torch.Tensor, step: torch.Tensor, highest: int, coarse: bool) -> torch.Tensor:
    step = _wide(step, x)
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


@_operator.register_fake
def _(x, step, highest, coarse):
    return torch.empty_like(x)


@torch.library.custom_op("faqd::quantized_relu_backward", mutates_args=())
def _operator_backward(
    gradient: torch.Tensor, x: torch.Tensor, y: torch.Tensor, step: torch.Tensor, highest: int, coarse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    # The gradient passes the guard of a step that is too small, so that such a step can recover.
    guarded = _wide(step, x)
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
            total += inside * _middle(highest) + above * highest
        elif narrow:  # y is rounded to fewer digits than y − x needs: α·(Σ g·round(x/α) − Σ g·x/α inside), clipped
            ratio, wide, inside = room
            target.copy_(_inside(wide.copy_(g), ratio.copy_(source), top, out=inside))
            kept = torch.dot(inside, ratio.mul_(steps).clamp_(0, highest))
            total += torch.dot(wide, ratio.round_()) - kept
        else:  # α·(round(x/α) − x/α) = y − x inside, α·Q = y above, 0 = y below
            _inside(g, source, top, out=target)
            kept = _inside(source, source, top, out=room[0])
            total += torch.dot(g, torch.sub(result, kept, out=kept))
    total /= _root(x, highest)
    return to_x, (total if coarse or narrow else total / guarded.squeeze()).to(step.dtype)


@_operator_backward.register_fake
def _(gradient, x, y, step, highest, coarse):
    return torch.empty_like(x), torch.empty_like(step)


def _keep_input(ctx, inputs, output) -> None:
    x, step, ctx.highest, ctx.coarse = inputs
    ctx.save_for_backward(x, output, step)  # the output costs no memory: the next layer keeps it, too


def _both_gradients(ctx, gradient: torch.Tensor):
    x, y, step = ctx.saved_tensors
    return *_operator_backward(gradient, x, y, step, ctx.highest, ctx.coarse), None, None


_operator.register_autograd(_both_gradients, setup_context=_keep_input)


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


class _Kernels:
    """``_values`` and ``_gradients`` compiled for one dtype, gradient and number of threads.

    Each has code objects of its own: torch counts by these how often it compiles, and refuses after eight times.
    """

    def __init__(self, dtype: torch.dtype, coarse: bool) -> None:
        self.values, self.gradients = (
            torch.compile(types.FunctionType(f.__code__.replace(), f.__globals__), dynamic=True, fullgraph=True)
            for f in (_values, _gradients)
        )
        # All that training will call is compiled now, by a call like its own.
        x = torch.zeros(_PROBE, dtype=dtype, device="cpu").unsqueeze(0)
        step = torch.ones((), dtype=torch.promote_types(dtype, torch.float32), device="cpu")
        self.forward(x, step, 15)
        self.backward(torch.zeros_like(x), x, step, 15, coarse)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, step: torch.Tensor, highest: int) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return _shaped(self.values(_flat(x, x).detach(), _wide(step, x).detach(), highest), x)

    @torch.no_grad()
    def backward(
        self, gradient: torch.Tensor, x: torch.Tensor, step: torch.Tensor, highest: int, coarse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        flat = (_flat(tensor, x).detach() for tensor in (gradient, x))
        with torch.autocast("cpu", enabled=False):
            to_x, total = self.gradients(*flat, _wide(step, x).detach(), highest, _middle(highest) if coarse else 0)
        return _shaped(to_x, x), (total / _root(x, highest)).to(step.dtype)


_made: dict[tuple, _Kernels | None] = {}
_making = threading.Lock()


def kernels(dtype: torch.dtype, coarse: bool) -> _Kernels | None:
    """Compiled kernels for inputs of a dtype on the CPU; None where they cannot be made, or were switched off by
    torch's own ``TORCH_COMPILE_DISABLE=1``.

    Made once a process, for each dtype, gradient and number of threads: some fifteen seconds the first time on a
    machine, later two or three.

    Warns:
        UserWarning: compiling fails, as it does without a C++ compiler.
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
                reason = f"{type(error.inner_exception).__name__}: {error.inner_exception}".splitlines()[0]
                warnings.warn(
                    "training with quantized activations goes on without compiled kernels, slower and with the "
                    f"same numbers to rounding, because compiling failed ({reason}): install a C++ compiler (g++ "
                    "or clang) if there is none, or set TORCH_COMPILE_DISABLE=1",
                    stacklevel=2,
                )
        return _made[key]


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, step, highest, coarse, made):
        ctx.save_for_backward(x, step)
        ctx.how = highest, coarse
        ctx.made = made
        return made.forward(x, step, highest)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return *ctx.made.backward(gradient, *ctx.saved_tensors, *ctx.how), None, None, None


class _Traced(torch.autograd.Function):
    """The same inside of a network that is compiled: in one pass with what is computed before and after it."""

    @staticmethod
    def forward(ctx, x, step, highest, coarse):
        ctx.save_for_backward(x, step)
        ctx.how = highest, coarse
        return _values(x, _wide(step, x), highest)

    @staticmethod
    def backward(ctx, gradient):
        (x, step), (highest, coarse) = ctx.saved_tensors, ctx.how
        middle = _middle(highest) if coarse else 0
        to_x, total = _gradients(gradient, x, _wide(step, x), highest, middle)
        return to_x, (total / _root(x, highest)).to(step.dtype), None, None


def _is_plain(x: torch.Tensor) -> bool:
    """Whether compiled kernels can take it: nobody traces, counts or pretends, and it is large enough."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.numel() >= _COMPILED_FROM
    )


def quantized_relu(x: torch.Tensor, step: torch.Tensor, highest: int, coarse: bool, compiled: bool) -> torch.Tensor:
    """``α·round(clip(x/α, 0, highest))`` in the dtype of ``x``, computed in float32 at least, with both gradients.

    Args:
        x: any shape and memory layout; the result has the same.
        step: α, a scalar.
        highest: the highest level.
        coarse: which gradient α gets.
        compiled: use :func:`kernels`, here and in the backward pass, if ``x`` is large and on the CPU.
    """
    if compiled and torch.compiler.is_dynamo_compiling():
        return _Traced.apply(x, step, highest, coarse)
    if compiled and _is_plain(x) and (made := kernels(x.dtype, coarse)):
        return _Compiled.apply(x, step, highest, coarse, made)
    return _operator(x, step, highest, coarse)
