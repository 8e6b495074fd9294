"""The ONNX form of each module and function that :mod:`faqd_lib.export.onnx` can export.

A handler gets the writer, a node of the traced graph, and the module that the node calls, None for a function. It adds
ONNX nodes and returns the name of the value. ``MODULES`` lists handlers by class, ``FUNCTIONS`` by name.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.utils import _pair

from ..models import SubsampleAndPad
from ..quantization.relu import QuantizedReLU
from ..quantization.relu_kernels import SMALLEST_STEP
from .onnx_writer import OnnxExportError, Writer

Handler = Callable[[Writer, fx.Node, Any], str]


def function_name(node: fx.Node) -> str:
    """Name of the function or method that a node calls; empty if it calls none."""
    return getattr(node.target, "__name__", node.target) if node.op in ("call_function", "call_method") else ""


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An argument of a function, given by name or by position."""
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else default)


def _refuse_dtype(node: fx.Node) -> None:
    if node.kwargs.get("dtype") is not None:
        raise OnnxExportError(f"{function_name(node)} with dtype is not known here (node {node.name})")


def _affine_of(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(factor, offset) of a batch normalisation in evaluation mode, in float64."""
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    offset = -norm.running_mean.double() * factor
    return factor, offset if norm.bias is None else offset + norm.bias.detach().double()


def _affine(w: Writer, inputs: list[str], width: int, flat: bool = False) -> str:
    """x Wᵀ + b of (rows, width), for ``inputs`` x, W and perhaps b; x with more dimensions is flattened first.

    Gemm, not MatMul: ONNX Runtime fuses DequantizeLinear of INT8 and MatMul into one operator, which rounds x, too.
    """
    source = inputs[0] if flat else w.add("Reshape", [inputs[0], w.constant(np.array([-1, width], np.int64))])
    return w.add("Gemm", [source, *inputs[1:]], transB=1)


def _layer(w: Writer, node: fx.Node, module: nn.Module) -> str:
    """A convolution or a linear layer, with the batch normalisation that follows it."""
    norm, factor = w.folded_norm(node, module), None
    # Calls of one layer may be followed by different normalisations: each call has its own scale and bias.
    label = f"{node.target}.call{w.calls[node.target]}" if w.calls[node.target] else str(node.target)
    w.calls[node.target] += 1
    bias = None if module.bias is None else module.bias.detach().double()
    if norm is not None:
        factor, offset = _affine_of(norm)
        bias = offset if bias is None else bias * factor + offset
        factor = factor.float()
    inputs = [w.name_of(node.args[0]), w.weight(node.target, label, module, factor)]
    if bias is not None:
        inputs.append(w.constant(bias.float().numpy(), f"{label}.bias"))
    if isinstance(module, nn.Linear):
        output = _affine(w, inputs, module.in_features, flat=w.values[node].ndim == 2)
        output = output if w.values[node].ndim == 2 else w.reshaped(output, node)
    else:
        if module.padding_mode != "zeros":
            raise OnnxExportError(f"{node.target}: padding_mode must be 'zeros', got {module.padding_mode!r}")
        transposed = isinstance(module, nn.ConvTranspose2d)
        output = w.add(
            "ConvTranspose" if transposed else "Conv", inputs, kernel_shape=list(module.kernel_size),
            strides=list(module.stride), pads=_pads(module), dilations=list(module.dilation), group=module.groups,
            **({"output_padding": _output_padding(w, node, module)} if transposed else {}),
        )  # fmt: skip
    if norm is not None:
        w.names[next(iter(node.users))] = output
    return output


def _pads(module: nn.Conv2d | nn.ConvTranspose2d) -> list[int]:
    """Rows and columns of zeros before the map, then those after it."""
    if module.padding == "same":  # the larger half of an odd number comes after the map
        total = [dilation * (size - 1) for dilation, size in zip(module.dilation, module.kernel_size, strict=True)]
        return [part // 2 for part in total] + [part - part // 2 for part in total]
    return [0] * 4 if module.padding == "valid" else [*module.padding, *module.padding]


def _output_padding(w: Writer, node: fx.Node, module: nn.ConvTranspose2d) -> list[int]:
    """Rows and columns that complete the output: the module's own, or what a call with ``output_size`` needs."""
    return [
        after - ((before - 1) * stride - 2 * padding + dilation * (size - 1) + 1)
        for before, after, stride, padding, dilation, size in zip(
            w.values[node.args[0]].shape[-2:], w.values[node].shape[-2:], module.stride, module.padding,
            module.dilation, module.kernel_size, strict=True,
        )
    ]  # fmt: skip


def _norm(w: Writer, node: fx.Node, module: nn.Module) -> str:
    if module.running_mean is None:
        raise OnnxExportError(f"{node.target}: a batch normalisation must have running statistics")
    return _scaled(w, node, *_affine_of(module))


def _scaled(w: Writer, node: fx.Node, factor: torch.Tensor, offset: torch.Tensor) -> str:
    """x · factor + offset, channel by channel; ``factor`` and ``offset`` are (C,)."""
    factor, offset = (part.float().view(-1, *[1] * (w.values[node].ndim - 2)).numpy() for part in (factor, offset))
    return w.add("Add", [w.add("Mul", [w.name_of(node.args[0]), w.constant(factor)]), w.constant(offset)])


def _quantized_relu(w: Writer, node: fx.Node, module: QuantizedReLU) -> str:
    step = np.float32(module.step.detach().clamp_min(SMALLEST_STEP))
    # Min, not Clip: ONNX Runtime fuses DequantizeLinear, Conv, Clip and QuantizeLinear into one quantized convolution.
    # That convolution rounds its bias to multiples of the product of both scales, which is too coarse at few bits.
    clipped = w.add("Min", [w.name_of(node.args[0]), w.constant(step * module.highest)])
    scale, zero = w.constant(step), w.constant(np.uint8(0))
    levels = w.add("QuantizeLinear", [clipped, scale, zero])
    return w.add("DequantizeLinear", [levels, scale, zero])


def _pool(w: Writer, node: fx.Node, module: nn.MaxPool2d | nn.AvgPool2d, kind: str, **attributes: Any) -> str:
    return w.add(
        kind, [w.name_of(node.args[0])], kernel_shape=_pair(module.kernel_size), strides=_pair(module.stride),
        pads=_pair(module.padding) * 2, ceil_mode=int(module.ceil_mode), **attributes,
    )  # fmt: skip


def _max_pool(w: Writer, node: fx.Node, module: nn.MaxPool2d | None) -> str:
    order = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")  # of the function
    module = module or nn.MaxPool2d(**dict(zip(order, node.args[1:], strict=False)), **node.kwargs)
    if module.return_indices:
        raise OnnxExportError(f"{node.name}: return_indices has no ONNX form")
    return _pool(w, node, module, "MaxPool", dilations=_pair(module.dilation))


def _average_pool(w: Writer, node: fx.Node, module: nn.AvgPool2d | None) -> str:
    module = module or nn.AvgPool2d(*node.args[1:], **node.kwargs)
    if module.divisor_override is not None:
        raise OnnxExportError(f"{node.name}: divisor_override has no ONNX form")
    return _pool(w, node, module, "AveragePool", count_include_pad=int(module.count_include_pad))


def _global_pool(w: Writer, node: fx.Node, module: nn.AdaptiveAvgPool2d | None) -> str:
    source = w.name_of(node.args[0])
    (height, width), (rows, columns) = w.values[node.args[0]].shape[2:], w.values[node].shape[2:]
    if rows == columns == 1:
        return w.add("GlobalAveragePool", [source])
    if height % rows == width % columns == 0:
        kernel = [height // rows, width // columns]
        return w.add("AveragePool", [source], kernel_shape=kernel, strides=kernel)
    if rows % height or columns % width:
        raise OnnxExportError(f"{node.name}: pooling {height}×{width} to {rows}×{columns} has no ONNX form")
    # The output has more pixels than the input: each pixel is repeated.
    factors = w.constant(np.array([1, 1, rows / height, columns / width], np.float32))
    return w.add("Resize", [source, "", factors], mode="nearest", nearest_mode="floor",
                 coordinate_transformation_mode="asymmetric")  # fmt: skip


def _reduce(kind: str, w: Writer, node: fx.Node, _: None) -> str:
    """``mean``, ``sum`` and ``amax``."""
    _refuse_dtype(node)
    dims, keep = _argument(node, 1, "dim", None), _argument(node, 2, "keepdim", False)
    if dims is None:
        raise OnnxExportError(f"{node.name}: a mean or sum over all dimensions would mix the images: give it a dim")
    axes = w.constant(np.atleast_1d(np.array(dims, np.int64)))
    return w.add(kind, [w.name_of(node.args[0]), axes], keepdims=int(keep))


def _reshape(w: Writer, node: fx.Node, _: nn.Flatten | None) -> str:
    """``flatten``, ``view``, ``reshape``, ``unsqueeze`` and others: only the number of images is not known."""
    return w.reshaped(w.name_of(node.args[0]), node)


def _transpose(w: Writer, node: fx.Node, _: None) -> str:
    """``permute``, ``transpose`` and ``mT``."""
    order = list(range(w.values[node].ndim))
    if function_name(node) == "getattr":
        if node.args[1] != "mT":
            raise OnnxExportError(f"no ONNX form is known for the attribute {node.args[1]} (node {node.name})")
        dims = (-2, -1)
    else:
        dims = _argument(node, 1, "dims", ())
        dims = dims if isinstance(dims, tuple | list) else node.args[1:]
    if function_name(node) in ("transpose", "swapaxes", "getattr"):
        first, second = dims
        order[first], order[second] = order[second], order[first]
    else:
        order = [order[dim] for dim in dims]
    return w.add("Transpose", [w.name_of(node.args[0])], perm=order)


def _part(w: Writer, node: fx.Node, _: None) -> str:
    """One of the pieces of ``chunk``, ``split`` or ``unbind``, a slice of a tensor, or what an attention returns."""
    whole, index = node.args
    if isinstance(w.values[whole], torch.Tensor):
        return _slice(w, node, whole, index if isinstance(index, tuple) else (index,))
    if whole.op == "call_module" and isinstance(attention := w.modules[whole.target], nn.MultiheadAttention):
        if index != 0:
            raise OnnxExportError(f"{whole.name}: attention weights have no ONNX form here: use the output only")
        return _multihead_attention(w, whole, attention)
    if function_name(whole) not in ("chunk", "split", "unbind") or not isinstance(index, int):
        raise OnnxExportError(f"no ONNX form is known for getitem of {function_name(whole)} (node {node.name})")
    source, unbound = whole.args[0], function_name(whole) == "unbind"
    dim = _argument(whole, 1 if unbound else 2, "dim", 0) % w.values[source].ndim
    if dim in w.image_dims(source):
        raise OnnxExportError(f"{whole.name}: images would be parted, give it another dim")
    sizes = [1 if unbound else piece.shape[dim] for piece in w.values[whole]]
    index %= len(sizes)
    piece = _sliced(w, w.name_of(source), dim, sum(sizes[:index]), sum(sizes[: index + 1]))
    return w.reshaped(piece, node) if unbound else piece


def _sliced(w: Writer, source: str, dim: int, start: int, end: int, step: int = 1) -> str:
    return w.add("Slice", [source, *(w.constant(np.array([one], np.int64)) for one in (start, end, dim, step))])


def _slice(w: Writer, node: fx.Node, whole: fx.Node, index: tuple) -> str:
    """``x[:, 0]``, ``x[..., 1::2]``, ``x[:, None]``: whole numbers, slices, None and one ellipsis."""
    shape = w.values[whole].shape
    if any(not isinstance(one, int | slice | type(None) | type(...)) or isinstance(one, bool) for one in index):
        raise OnnxExportError(f"no ONNX form is known for getitem with {index} (node {node.name})")
    count = sum(isinstance(one, int | slice) for one in index)
    place = index.index(...) if ... in index else len(index)
    index = (*index[:place], *[slice(None)] * (len(shape) - count), *index[place + 1 :])
    source = w.name_of(whole)
    for dim, one in enumerate(one for one in index if one is not None):
        if one == slice(None):
            continue
        if dim in w.image_dims(whole) or any(isinstance(end, fx.Node) for end in _ends(one)):
            raise OnnxExportError(f"{node.name}: images would be parted")
        start, end, step = slice(one, one + 1 or None).indices(shape[dim]) if isinstance(one, int) else (
            one.indices(shape[dim])
        )  # fmt: skip
        source = _sliced(w, source, dim, start, end, step)
    return source if all(isinstance(one, slice) for one in index) else w.reshaped(source, node)


def _ends(index: int | slice) -> tuple:
    return (index,) if isinstance(index, int) else (index.start, index.stop, index.step)


def _expand(w: Writer, node: fx.Node, _: None) -> str:
    """``expand`` and ``repeat``, where the latter repeats dimensions of size 1 only."""
    before, after = w.values[node.args[0]].shape, w.values[node].shape
    if any(old not in (1, new) for old, new in zip(before[::-1], after[::-1], strict=False)):
        raise OnnxExportError(f"{node.name}: repeating a dimension of more than 1 has no ONNX form here")
    return w.add("Expand", [w.name_of(node.args[0]), w.shape_of(node)])


def _roll(w: Writer, node: fx.Node, _: None) -> str:
    shifts, dims = _argument(node, 1, "shifts", None), _argument(node, 2, "dims", None)
    if dims is None or dims == ():
        raise OnnxExportError(f"{node.name}: give roll its dims")
    source, shape = w.name_of(node.args[0]), w.values[node].shape
    for shift, dim in zip(*np.atleast_1d(shifts, dims), strict=True):
        dim = int(dim) % len(shape)
        if dim in w.image_dims(node):
            raise OnnxExportError(f"{node.name}: images would be rolled")
        cut = -int(shift) % shape[dim]
        parts = [_sliced(w, source, dim, cut, shape[dim]), _sliced(w, source, dim, 0, cut)]
        source = w.add("Concat", parts, axis=dim)
    return source


def _pad(w: Writer, node: fx.Node, _: None) -> str:
    pads, mode = _argument(node, 1, "pad", None), _argument(node, 2, "mode", "constant")
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if mode not in modes or any(not isinstance(one, int) for one in pads):
        raise OnnxExportError(f"{node.name}: padding {pads} of mode {mode!r} has no ONNX form here")
    untouched = [0] * (w.values[node].ndim - len(pads) // 2)
    before, after = untouched + list(pads[::2])[::-1], untouched + list(pads[1::2])[::-1]
    inputs = [w.name_of(node.args[0]), w.constant(np.array(before + after, np.int64))]
    if (value := _argument(node, 3, "value", None)) is not None:
        inputs.append(w.constant(np.float32(value)))
    return w.add("Pad", inputs, mode=modes[mode])


def _stack(w: Writer, node: fx.Node, _: None) -> str:
    parts, dim = _argument(node, 0, "tensors", None), _argument(node, 1, "dim", 0) % w.values[node].ndim
    if isinstance(parts, fx.Node):
        raise OnnxExportError(f"{node.name}: give stack a list of tensors")
    axes = w.constant(np.array([dim], np.int64))
    return w.add("Concat", [w.add("Unsqueeze", [w.name_of(part), axes]) for part in parts], axis=dim)


def _linear(w: Writer, node: fx.Node, _: None) -> str:
    """``F.linear``, also with a layer's quantized weight."""
    weight, bias = _argument(node, 1, "weight", None), _argument(node, 2, "bias", None)
    inputs = [w.name_of(node.args[0]), w.parameter(weight), *([] if bias is None else [w.name_of(bias)])]
    return w.reshaped(_affine(w, inputs, w.values[weight].shape[1]), node)


def _conv2d(w: Writer, node: fx.Node, _: None) -> str:
    """``F.conv2d``, also with a layer's quantized weight."""
    weight, bias = _argument(node, 1, "weight", None), _argument(node, 2, "bias", None)
    stride, padding, dilation, groups = (
        _argument(node, place, name, default)
        for place, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1), (6, "groups", 1))
    )
    kernel = w.values[weight].shape[2:]
    layer = nn.Conv2d(groups, groups, kernel, stride, padding, dilation, groups, device="meta")
    inputs = [w.name_of(node.args[0]), w.parameter(weight), *([] if bias is None else [w.name_of(bias)])]
    return w.add("Conv", inputs, kernel_shape=list(kernel), strides=list(layer.stride), pads=_pads(layer),
                 dilations=list(layer.dilation), group=groups)  # fmt: skip


def _batch_norm(w: Writer, node: fx.Node, _: None) -> str:
    """``F.batch_norm`` in evaluation mode."""
    mean, variance, weight, bias = (
        part if part is None else w.values[part].double()
        for part in (_argument(node, place, name, None) for place, name in
                     ((1, "running_mean"), (2, "running_var"), (3, "weight"), (4, "bias")))
    )  # fmt: skip
    if mean is None or variance is None or _argument(node, 5, "training", False):
        raise OnnxExportError(f"{node.name}: a batch normalisation must have running statistics")
    factor = (variance + _argument(node, 7, "eps", 1e-5)).rsqrt() * (1 if weight is None else weight)
    return _scaled(w, node, factor, (0 if bias is None else bias) - mean * factor)


def _layer_norm(w: Writer, node: fx.Node, _: None) -> str:
    shape = _argument(node, 1, "normalized_shape", None)
    weight, bias = _argument(node, 2, "weight", None), _argument(node, 3, "bias", None)
    inputs = [w.name_of(node.args[0])]
    inputs.append(w.constant(np.ones(shape, np.float32)) if weight is None else w.name_of(weight))
    inputs += [] if bias is None else [w.name_of(bias)]
    eps = float(_argument(node, 4, "eps", 1e-5))
    return w.add("LayerNormalization", inputs, axis=-len(shape), epsilon=eps)


def _group_norm(w: Writer, node: fx.Node, _: None) -> str:
    groups, channels = _argument(node, 1, "num_groups", None), w.values[node].shape[1]
    weight, bias = _argument(node, 2, "weight", None), _argument(node, 3, "bias", None)
    scale = w.constant(np.ones(channels, np.float32)) if weight is None else w.name_of(weight)
    offset = w.constant(np.zeros(channels, np.float32)) if bias is None else w.name_of(bias)
    eps = float(_argument(node, 4, "eps", 1e-5))
    source = [w.name_of(node.args[0]), scale, offset]
    return w.add("GroupNormalization", source, num_groups=groups, epsilon=eps)


def _attention(w: Writer, query: str, key: str, value: str, scale: float, mask: str | None = None) -> str:
    """softmax(scale·q kᵀ + mask)·v of (batch, heads, N, channels)."""
    turned = w.add("Transpose", [key], perm=[0, 1, 3, 2])
    scores = w.add("MatMul", [w.add("Mul", [query, w.constant(np.float32(scale))]), turned])
    scores = scores if mask is None else w.add("Add", [scores, mask])
    return w.add("MatMul", [w.add("Softmax", [scores], axis=-1), value])


def _scaled_dot_product_attention(w: Writer, node: fx.Node, _: None) -> str:
    query, key, value = node.args[:3]
    mask, scale = _argument(node, 3, "attn_mask", None), _argument(node, 6, "scale", None)
    masked = mask is not None and not w.values[mask].is_floating_point()
    if w.values[query].ndim != 4 or masked or _argument(node, 5, "is_causal", False):
        raise OnnxExportError(
            f"{node.name}: attention must be that of (batch, heads, N, channels), with a floating-point mask or none"
        )
    names = (None if part is None else w.name_of(part) for part in (query, key, value))
    scale = w.values[query].shape[-1] ** -0.5 if scale is None else scale
    return _attention(w, *names, scale, None if mask is None else w.name_of(mask))


def _multihead_attention(w: Writer, node: fx.Node, module: nn.MultiheadAttention) -> str:
    """``nn.MultiheadAttention`` without masks; the weight of its output layer in its bits."""
    given = dict(
        zip(("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"), node.args, strict=False)
    )
    given |= node.kwargs
    masked = [name for name in ("key_padding_mask", "attn_mask") if given.get(name) is not None]
    if masked or module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        raise OnnxExportError(
            f"{node.target}: an attention must have no {' or '.join(masked) or 'added keys and kdim'} for ONNX"
        )
    heads, turned = module.num_heads, [0, 1, 2] if module.batch_first else [1, 0, 2]
    bias = module.in_proj_bias if module.in_proj_bias is not None else torch.zeros(3 * module.embed_dim)
    parts = []
    for name, weight, offset in zip(
        ("query", "key", "value"), module.in_proj_weight.detach().chunk(3), bias.detach().chunk(3), strict=True
    ):
        source = w.add("Transpose", [w.name_of(given[name])], perm=turned)
        part = w.add("MatMul", [source, w.constant(weight.mT.contiguous().numpy(), f"{node.target}.{name}.weight")])
        part = w.add("Add", [part, w.constant(offset.numpy(), f"{node.target}.{name}.bias")])
        apart = w.constant(np.array([0, 0, heads, -1], np.int64))
        parts.append(w.add("Transpose", [w.add("Reshape", [part, apart])], perm=[0, 2, 1, 3]))
    output = w.add("Transpose", [_attention(w, *parts, module.head_dim**-0.5)], perm=[0, 2, 1, 3])
    output = w.add("Reshape", [output, w.constant(np.array([0, 0, -1], np.int64))])
    name, bias = f"{node.target}.out_proj", module.out_proj.bias
    inputs = [output, w.weight(name, name, module.out_proj, None)]
    if bias is not None:
        inputs.append(w.constant(bias.detach().numpy(), f"{name}.bias"))
    output = w.add("Reshape", [_affine(w, inputs, module.embed_dim), w.add("Shape", [output])])
    return w.add("Transpose", [output], perm=turned)


def _norm_of(w: Writer, node: fx.Node, _: None) -> str:
    """``norm``: the Euclidean length along given dimensions."""
    _refuse_dtype(node)
    dims, keep = _argument(node, 2, "dim", None), _argument(node, 3, "keepdim", False)
    if _argument(node, 1, "p", "fro") not in (2, "fro") or dims is None:
        raise OnnxExportError(f"{node.name}: a norm must have p = 2, and dims")
    axes = w.constant(np.atleast_1d(np.array(dims, np.int64)))
    return w.add("ReduceL2", [w.name_of(node.args[0]), axes], keepdims=int(keep))


def _add_product(w: Writer, node: fx.Node, _: None) -> str:
    """``addcmul``; its ``value`` must be 1."""
    if node.kwargs.get("value", 1) != 1:
        raise OnnxExportError(f"{node.name}: addcmul must have value = 1")
    source, first, second = map(w.name_of, node.args)
    return w.add("Add", [source, w.add("Mul", [first, second])])


def _einsum(w: Writer, node: fx.Node, _: None) -> str:
    equation, *parts = node.args
    return w.add("Einsum", [w.name_of(part) for part in parts], equation=equation.replace(" ", ""))


def _normalize(w: Writer, node: fx.Node, _: None) -> str:
    """``F.normalize``."""
    if _argument(node, 1, "p", 2.0) != 2:
        raise OnnxExportError(f"{node.name}: normalize must have p = 2")
    source, axes = w.name_of(node.args[0]), w.constant(np.array([_argument(node, 2, "dim", 1)], np.int64))
    length = w.add("ReduceL2", [source, axes], keepdims=1)
    return w.add("Div", [source, w.add("Max", [length, w.constant(np.float32(_argument(node, 3, "eps", 1e-12)))])])


def _clamp(w: Writer, node: fx.Node, _: None) -> str:
    ends = (_argument(node, 1, "min", None), _argument(node, 2, "max", None))
    source, *limits = w.name_of(node.args[0]), *("" if end is None else w.name_of(end) for end in ends)
    if all(getattr(w.values.get(end), "shape", ()) in ((), (1,)) for end in ends):
        return w.add("Clip", [source, *limits])
    for kind, limit in zip(("Max", "Min"), limits, strict=True):  # Clip takes single numbers only
        source = w.add(kind, [source, limit]) if limit else source
    return source


def _float(w: Writer, node: fx.Node, _: None) -> str:
    """``float``, ``to``, ``type_as``: allowed where nothing changes."""
    before, after = w.values[node.args[0]].dtype, w.values[node].dtype
    if before != after:
        raise OnnxExportError(f"{node.name}: a conversion from {before} to {after} has no ONNX form here")
    return w.name_of(node.args[0])


def _interpolate(w: Writer, node: fx.Node, _: None) -> str:
    """Nearest or bilinear, to a size, or by a factor that gives whole pixels."""
    before, after = w.values[node.args[0]].shape[2:], w.values[node].shape[2:]
    size, mode = _argument(node, 1, "size", None), _argument(node, 3, "mode", "nearest")
    factors = np.broadcast_to(_argument(node, 2, "scale_factor", 1), 2)
    if mode not in ("nearest", "bilinear") or any(node.kwargs.get(name) for name in ("align_corners", "antialias")):
        raise OnnxExportError(
            f"{node.name}: interpolate is known here for nearest and bilinear, without align_corners and antialias"
        )
    if size is None and tuple(after) != tuple(factors * before):
        raise OnnxExportError(f"{node.name}: scale_factor {factors.tolist()} gives no whole pixels: give it a size")
    source, how = w.name_of(node.args[0]), {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    if mode == "nearest":
        how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        scale = None if size is not None else tuple(map(float, factors))
        taken = _nearest_pixels(before, None if size is None else tuple(after), scale)
        if any(map(_resize_differs, before, taken)):
            for axis, pixels in enumerate(taken, start=2):
                source = w.add("Gather", [source, w.constant(pixels)], axis=axis)
            return source
    sizes = w.constant(np.array(after, np.int64))
    return w.add("Resize", [source, "", "", sizes], axes=[2, 3], **how)


def _nearest_pixels(before: Sequence[int], size: tuple | None, scale: tuple | None) -> list[np.ndarray]:
    """The rows and the columns that torch's nearest interpolation takes, int64: found by resizing their numbers."""
    numbers = torch.stack(torch.meshgrid(*map(torch.arange, before), indexing="ij")).float()
    rows, columns = F.interpolate(numbers.unsqueeze(0), size, scale)[0].long().numpy()
    return [rows[:, 0], columns[0]]


def _resize_differs(before: int, taken: np.ndarray) -> bool:
    """Whether Resize takes other pixels than ``taken``.

    ONNX Runtime takes ⌊i / (out/in)⌋ and torch ⌊i · (in/out)⌋, both rounded to float32: 14 to 2 gives 6 and 7.
    """
    scale = np.float32(len(taken)) / np.float32(before)
    return not np.array_equal(np.floor(np.arange(len(taken), dtype=np.float32) / scale), taken)


def _subsample(w: Writer, node: fx.Node, module: SubsampleAndPad) -> str:
    starts, ends, axes, steps = np.array([(0, 0), (2**31 - 1,) * 2, (2, 3), (module.stride,) * 2], np.int64)
    sliced = w.add("Slice", [w.name_of(node.args[0]), *map(w.constant, (starts, ends, axes, steps))])
    before = module.new_channels // 2
    pads = np.array([0, before, 0, 0, 0, module.new_channels - before, 0, 0], np.int64)
    return w.add("Pad", [sliced, w.constant(pads)])


def _same(w: Writer, node: fx.Node, _: Any) -> str:
    return w.name_of(node.args[0])


def _elementwise(kind: str, inputs: int = 1, **attributes: Any) -> Handler:
    def write(w: Writer, node: fx.Node, _: Any) -> str:
        if len(node.args) > inputs:
            raise OnnxExportError(
                f"{node.name} must have {inputs} argument(s) by position, got {len(node.args)}: leave the others out"
            )
        return w.add(kind, [w.name_of(part) for part in node.args], **attributes)

    return write


def _copy(w: Writer, node: fx.Node, _: None) -> str:
    """``clone``: the same value. Unlike ``_same``, the result does not share its memory."""
    return w.name_of(node.args[0])


def _softplus(w: Writer, node: fx.Node, _: None) -> str:
    beta, threshold = _argument(node, 1, "beta", 1), _argument(node, 2, "threshold", 20)
    if threshold != 20:
        raise OnnxExportError(f"{node.name}: softplus must have threshold = 20 for ONNX, got {threshold}")
    source = w.name_of(node.args[0])
    if beta == 1:
        return w.add("Softplus", [source])
    factor = w.constant(np.float32(beta))
    return w.add("Div", [w.add("Softplus", [w.add("Mul", [source, factor])]), factor])


def _silu(w: Writer, node: fx.Node, _: Any) -> str:
    source = w.name_of(node.args[0])
    return w.add("Mul", [source, w.add("Sigmoid", [source])])


def _relu6(w: Writer, node: fx.Node, _: Any) -> str:
    return w.add("Clip", [w.name_of(node.args[0]), w.constant(np.float32(0)), w.constant(np.float32(6))])


def _softmax(kind: str, w: Writer, node: fx.Node, module: nn.Module | None) -> str:
    """``Softmax`` or ``LogSoftmax``."""
    _refuse_dtype(node)
    dim = _argument(node, 1, "dim", None) if module is None else module.dim
    if dim is None:
        raise OnnxExportError(f"{node.name}: give it a dim")
    return w.add(kind, [w.name_of(node.args[0])], axis=dim)


def _gelu(w: Writer, node: fx.Node, module: nn.GELU | None) -> str:
    how = node.kwargs.get("approximate", "none") if module is None else module.approximate
    return w.add("Gelu", [w.name_of(node.args[0])], approximate=how)


def _leaky_relu(w: Writer, node: fx.Node, module: nn.LeakyReLU | None) -> str:
    slope = _argument(node, 1, "negative_slope", 0.01) if module is None else module.negative_slope
    return w.add("LeakyRelu", [w.name_of(node.args[0])], alpha=float(slope))


def _concatenate(w: Writer, node: fx.Node, _: None) -> str:
    parts = _argument(node, 0, "tensors", None)
    if isinstance(parts, fx.Node):
        raise OnnxExportError(f"{node.name}: give cat a list of tensors, not the result of chunk or split")
    return w.add("Concat", [w.name_of(part) for part in parts], axis=_argument(node, 1, "dim", 0))


ALIASES = (_same, _reshape, _transpose, _part, _expand, _float)  # their outputs may share the memory of their inputs
KEYWORDS = {
    "dim", "keepdim", "tensors", "inplace", "p", "training", "start_dim", "end_dim", "output_size", "approximate",
    "negative_slope", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "count_include_pad",
    "divisor_override", "return_indices", "_stacklevel", "weight", "bias", "running_mean", "running_var", "eps",
    "momentum", "normalized_shape", "num_groups", "groups", "attn_mask", "dropout_p", "is_causal", "scale", "shifts",
    "dims", "pad", "mode", "value", "min", "max", "dtype", "device", "size", "scale_factor", "align_corners",
    "antialias", "beta", "threshold",
}  # fmt: skip
_ADD, _SUB, _MUL, _DIV = (_elementwise(kind, 2) for kind in ("Add", "Sub", "Mul", "Div"))
_BOTH: dict[tuple[type[nn.Module], str], Handler] = {  # modules, and functions that do the same
    (nn.ReLU, "relu"): _elementwise("Relu"), (nn.ReLU6, "relu6"): _relu6, (nn.LeakyReLU, "leaky_relu"): _leaky_relu,
    (nn.SiLU, "silu"): _silu, (nn.GELU, "gelu"): _gelu, (nn.Tanh, "tanh"): _elementwise("Tanh"),
    (nn.Sigmoid, "sigmoid"): _elementwise("Sigmoid"), (nn.Hardswish, "hardswish"): _elementwise("HardSwish"),
    (nn.Hardsigmoid, "hardsigmoid"): _elementwise("HardSigmoid", alpha=1 / 6, beta=0.5),
    (nn.Softmax, "softmax"): partial(_softmax, "Softmax"),
    (nn.LogSoftmax, "log_softmax"): partial(_softmax, "LogSoftmax"), (nn.MaxPool2d, "max_pool2d"): _max_pool,
    (nn.AvgPool2d, "avg_pool2d"): _average_pool, (nn.AdaptiveAvgPool2d, "adaptive_avg_pool2d"): _global_pool,
    (nn.Flatten, "flatten"): _reshape, (nn.Dropout, "dropout"): _same, (nn.Dropout2d, "dropout2d"): _same,
}  # fmt: skip
MODULES: dict[type[nn.Module], Handler] = {
    nn.Conv2d: _layer, nn.ConvTranspose2d: _layer, nn.Linear: _layer, nn.BatchNorm1d: _norm, nn.BatchNorm2d: _norm,
    QuantizedReLU: _quantized_relu, nn.Identity: _same, SubsampleAndPad: _subsample,
    nn.MultiheadAttention: _multihead_attention,
    **{kind: handler for (kind, _), handler in _BOTH.items()},
}  # fmt: skip
FUNCTIONS: dict[str, Handler] = {
    "add": _ADD, "iadd": _ADD, "sub": _SUB, "mul": _MUL, "imul": _MUL, "div": _DIV, "truediv": _DIV,
    "add_": _ADD, "mul_": _MUL, "div_": _DIV, "sub_": _SUB,
    "matmul": _elementwise("MatMul", 2), "bmm": _elementwise("MatMul", 2), "pow": _elementwise("Pow", 2),
    "neg": _elementwise("Neg"), "exp": _elementwise("Exp"), "sqrt": _elementwise("Sqrt"), "abs": _elementwise("Abs"),
    "softplus": _softplus, "mish": _elementwise("Mish"),
    "mean": partial(_reduce, "ReduceMean"), "sum": partial(_reduce, "ReduceSum"), "amax": partial(_reduce, "ReduceMax"),
    "view": _reshape, "reshape": _reshape, "unsqueeze": _reshape, "squeeze": _reshape, "unflatten": _reshape,
    "transpose": _transpose, "permute": _transpose, "getattr": _transpose, "contiguous": _same, "clone": _copy,
    "detach": _same, "float": _float, "to": _float, "type_as": _float,
    "expand": _expand, "repeat": _expand, "roll": _roll, "pad": _pad, "stack": _stack, "clamp": _clamp,
    "cat": _concatenate, "getitem": _part, "chunk": _same, "split": _same, "unbind": _same,  # getitem writes each piece
    "linear": _linear, "conv2d": _conv2d, "batch_norm": _batch_norm, "layer_norm": _layer_norm,
    "group_norm": _group_norm, "normalize": _normalize, "norm": _norm_of,
    "einsum": _einsum, "addcmul": _add_product, "swapaxes": _transpose,
    "scaled_dot_product_attention": _scaled_dot_product_attention,
    "interpolate": _interpolate,
    "stochastic_depth": _same,  # torchvision's: the identity in evaluation mode
    **{name: handler for (_, name), handler in _BOTH.items()},
}  # fmt: skip
