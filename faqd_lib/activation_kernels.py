"""The quantized ReLU's computation: values and gradients in few passes over memory, as two operators.

``torch.compile`` takes the operators as they are; the mathematics is in :class:`faqd_lib.quantizers.QuantizedReLU`.
"""

import math

import torch

SMALLEST_STEP = 1e-6  # a step that training drives below it would turn its layer off for ever

_CHUNK = 2**20  # bytes of a tensor that CPU cores work on at a time: what their own caches hold
_HALF_CHUNK = 2 * _CHUNK  # of one in half precision, whose passes are shorter: fewer of them, for each has its cost
_LANES = 256  # sums that are added up side by side


def features(x: torch.Tensor) -> int:
    """Number of elements for one image of a batch (N, …); all elements of a tensor that has no other dimension."""
    return x[0].numel() if x.ndim > 1 and len(x) else x.numel()


def _flat(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """All elements in the order in which they lie in memory, that of ``like``, which has no gaps."""
    if x.stride() != like.stride():
        x = torch.empty_like(like, dtype=x.dtype).copy_(x)
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


def _chunks(*tensors: torch.Tensor):
    """Pieces of flat tensors: small enough for a core's cache on a CPU, whole elsewhere."""
    size = _chunk_size(tensors[0])
    if tensors[0].numel() <= size:
        return [tensors]
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _chunk_size(x: torch.Tensor) -> int:
    if x.device.type != "cpu":
        return x.numel()
    return (_HALF_CHUNK if x.element_size() == 2 else _CHUNK) // x.element_size()


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


def _half_dot(a: torch.Tensor, b: torch.Tensor, mean: float = 0.0) -> torch.Tensor:
    """Σ a·(b − mean) in float32 of two flat tensors in half precision, on the CPU.

    One pass and no wide copy of either: the gradient of a batch normalisation's weight, of one whose deviation is 1.
    No other operator of torch adds up such products in float32.
    """
    lanes = min(_LANES, a.numel())
    rows = a.numel() // max(1, lanes)
    whole = rows * lanes
    one, means = torch.ones(lanes), torch.full((lanes,), mean)
    total = torch.ops.aten.native_batch_norm_backward(
        a[:whole].view(rows, lanes), b[:whole].view(rows, lanes), one, means, one, None, None, False, 0.0,
        [False, True, False],
    )[1].sum()  # fmt: skip
    return total if whole == a.numel() else total + _half_dot(a[whole:], b[whole:], mean)


@torch.library.custom_op("faqd::quantized_relu", mutates_args=())
def quantized_relu(x: torch.Tensor, step: torch.Tensor, highest: int, coarse: bool) -> torch.Tensor:
    """``α·round(clip(x/α, 0, highest))`` in the dtype of ``x``, computed in float32 at least; strides follow ``x``'s.

    ``coarse`` says which gradient α gets.
    """
    y = torch.empty_like(x)
    step = _wide(step, x)
    work = [] if x.dtype == step.dtype else _buffers(1, x, step.dtype)
    for source, target in _chunks(_flat(x, y), _flat(y, y)):
        wide = work[0][: len(source)].copy_(source).div_(step) if work else torch.div(source, step, out=target)
        wide.clamp_(0, highest).round_().mul_(step)
        if work:
            target.copy_(wide)
    return y


@quantized_relu.register_fake
def _(x, step, highest, coarse):
    return torch.empty_like(x)


@torch.library.custom_op("faqd::quantized_relu_backward", mutates_args=())
def _quantized_relu_backward(
    gradient: torch.Tensor, x: torch.Tensor, y: torch.Tensor, step: torch.Tensor, highest: int, coarse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    to_x = torch.empty_like(x)
    # The gradient passes the guard of a step that is too small, so that such a step can recover.
    guarded = _wide(step, x)
    wide, cpu = guarded.dtype, x.device.type == "cpu"
    total = torch.zeros((), dtype=wide, device=x.device)
    # As a number where that costs nothing: elsewhere the host would have to wait for it.
    top = float(guarded) * highest if cpu else guarded * highest
    narrow = x.dtype != wide
    # From here on, and up to twice as much, half precision has nothing but integers: to add it is to round. Levels can
    # be told so from y, rounded three times on the way, unless they are the many of 7 or 8 bits in bfloat16.
    origin = 1 / torch.finfo(x.dtype).eps
    light = narrow and cpu and 2 * highest < origin
    work = [] if coarse or (narrow and not light) else _buffers(1, x, x.dtype)
    for source, result, g, target in _chunks(*(_flat(tensor, to_x) for tensor in (x, y, gradient, to_x))):
        _inside(g, source, top, out=target)
        room = work[0][: len(source)] if work else None
        if coarse:
            inside = target.sum(dtype=wide)
            above = torch.where(source.to(wide) >= top, g.to(wide), 0).sum()
            total += inside * 2.0 ** round(math.log2(highest + 1) - 1) + above * highest
        elif not narrow:  # α·(round(x/α) − x/α) = y − x inside, α·Q = y above, 0 = y below
            kept = _inside(source, source, top, out=room)
            total += torch.dot(g, torch.sub(result, kept, out=kept))
        # y is rounded to fewer digits than y − x needs: Σ g·round(x/α), clipped, − Σ g·x/α inside
        elif light:
            inside = _half_dot(target, source)
            if not inside.isfinite():  # 0·∞
                inside = _half_dot(g, _inside(source, source, top, out=room))
            levels = torch.add(source.new_full((1,), origin), result, alpha=1 / float(guarded), out=room)
            total += _half_dot(g, levels, origin) - inside / guarded.squeeze()
        else:
            ratio = source.to(wide).div_(guarded).clamp_(0, highest)
            total -= torch.dot(target.to(wide), ratio)
            total += torch.dot(g.to(wide), ratio.round_())
    total /= math.sqrt(max(1, features(x)) * highest)
    return to_x, (total if coarse or narrow else total / guarded.squeeze()).to(step.dtype)


@_quantized_relu_backward.register_fake
def _(gradient, x, y, step, highest, coarse):
    return torch.empty_like(x), torch.empty_like(step)


def _keep_input(ctx, inputs, output) -> None:
    x, step, ctx.highest, ctx.coarse = inputs
    ctx.save_for_backward(x, output, step)  # the output costs no memory: the next layer keeps it, too


def _both_gradients(ctx, gradient: torch.Tensor):
    x, y, step = ctx.saved_tensors
    return *_quantized_relu_backward(gradient, x, y, step, ctx.highest, ctx.coarse), None, None


quantized_relu.register_autograd(_both_gradients, setup_context=_keep_input)
