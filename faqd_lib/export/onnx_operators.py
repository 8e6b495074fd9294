"""The ONNX form of each module and function that :mod:`faqd_lib.export.onnx` can export.

A handler gets the writer, a node of the traced graph, and the module that the node calls, None for a function. It adds
ONNX nodes and returns the name of the value. ``MODULES`` lists handlers by class, ``FUNCTIONS`` by name.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
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


def _affine_of(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(factor, offset) of a batch normalisation in evaluation mode, in float64."""
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    offset = -norm.running_mean.double() * factor
    return factor, offset if norm.bias is None else offset + norm.bias.detach().double()


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
    if isinstance(module, nn.Linear) and w.values[node].ndim == 2:
        output = w.add("Gemm", inputs, transB=1)
    elif isinstance(module, nn.Linear):
        output = w.add("MatMul", [inputs[0], w.add("Transpose", [inputs[1]], perm=[1, 0])])
        output = w.add("Add", [output, inputs[2]]) if bias is not None else output
    else:
        if module.padding_mode != "zeros":
            raise OnnxExportError(f"{node.target}: padding_mode must be 'zeros', got {module.padding_mode!r}")
        transposed = isinstance(module, nn.ConvTranspose2d)
        output = w.add(
            "ConvTranspose" if transposed else "Conv", inputs, kernel_shape=list(module.kernel_size),
            strides=list(module.stride), pads=_pads(module), dilations=list(module.dilation), group=module.groups,
            **({"output_padding": list(module.output_padding)} if transposed else {}),
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


def _norm(w: Writer, node: fx.Node, module: nn.Module) -> str:
    if module.running_mean is None:
        raise OnnxExportError(f"{node.target}: a batch normalisation must have running statistics")
    factor, offset = (part.float().view(-1, *[1] * (w.values[node].ndim - 2)) for part in _affine_of(module))
    scaled = w.add("Mul", [w.name_of(node.args[0]), w.constant(factor.numpy())])
    return w.add("Add", [scaled, w.constant(offset.numpy())])


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
    module = module or nn.MaxPool2d(*node.args[1:], **node.kwargs)
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


def _mean(w: Writer, node: fx.Node, _: None) -> str:
    dims, keep = _argument(node, 1, "dim", None), _argument(node, 2, "keepdim", False)
    if dims is None:
        raise OnnxExportError(f"{node.name}: a mean over all dimensions would mix the images: give it a dim")
    axes = w.constant(np.atleast_1d(np.array(dims, np.int64)))
    return w.add("ReduceMean", [w.name_of(node.args[0]), axes], keepdims=int(keep))


def _reshape(w: Writer, node: fx.Node, _: nn.Flatten | None) -> str:
    """``flatten``, ``view`` and ``reshape``: the shape is known, except for the number of images."""
    if not w.has_all_images(node) or not w.has_all_images(node.args[0]):
        raise OnnxExportError(f"{node.name}: images must stay apart, but would be flattened together")
    return w.add("Reshape", [w.name_of(node.args[0]), w.constant(np.array([0, *w.values[node].shape[1:]], np.int64))])


def _transpose(w: Writer, node: fx.Node, _: None) -> str:
    """``permute`` and ``transpose``."""
    order = list(range(w.values[node].ndim))
    dims = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
    if function_name(node) == "transpose":
        first, second = dims
        order[first], order[second] = order[second], order[first]
    else:
        order = [order[dim] for dim in dims]
    return w.add("Transpose", [w.name_of(node.args[0])], perm=order)


def _part(w: Writer, node: fx.Node, _: None) -> str:
    """One of the pieces of ``chunk`` or ``split``."""
    pieces, index = node.args
    if function_name(pieces) not in ("chunk", "split") or not isinstance(index, int):
        raise OnnxExportError(f"no ONNX form is known for getitem of a tensor (node {node.name})")
    source = pieces.args[0]
    dim = _argument(pieces, 2, "dim", 0) % w.values[source].ndim
    if dim == 0:
        raise OnnxExportError(f"{pieces.name}: images would be parted, give it a dim above 0")
    sizes = [piece.shape[dim] for piece in w.values[pieces]]
    index %= len(sizes)
    ends = (sum(sizes[:index]), sum(sizes[: index + 1]), dim)
    return w.add("Slice", [w.name_of(source), *(w.constant(np.array([end], np.int64)) for end in ends)])


def _subsample(w: Writer, node: fx.Node, module: SubsampleAndPad) -> str:
    starts, ends, axes, steps = np.array([(0, 0), (2**31 - 1,) * 2, (2, 3), (module.stride,) * 2], np.int64)
    sliced = w.add("Slice", [w.name_of(node.args[0]), *map(w.constant, (starts, ends, axes, steps))])
    before = module.new_channels // 2
    pads = np.array([0, before, 0, 0, 0, module.new_channels - before, 0, 0], np.int64)
    return w.add("Pad", [sliced, w.constant(pads)])


def _same(w: Writer, node: fx.Node, _: Any) -> str:
    return w.name_of(node.args[0])


def _elementwise(kind: str, inputs: int = 1, **attributes: Any) -> Handler:
    return lambda w, node, _: w.add(kind, [w.name_of(part) for part in node.args[:inputs]], **attributes)


def _silu(w: Writer, node: fx.Node, _: Any) -> str:
    source = w.name_of(node.args[0])
    return w.add("Mul", [source, w.add("Sigmoid", [source])])


def _relu6(w: Writer, node: fx.Node, _: Any) -> str:
    return w.add("Clip", [w.name_of(node.args[0]), w.constant(np.float32(0)), w.constant(np.float32(6))])


def _softmax(kind: str, w: Writer, node: fx.Node, module: nn.Module | None) -> str:
    """``Softmax`` or ``LogSoftmax``."""
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


ALIASES = (_same, _reshape, _transpose, _part)  # their outputs may share the memory of their inputs
KEYWORDS = {
    "dim", "keepdim", "tensors", "inplace", "p", "training", "start_dim", "end_dim", "output_size", "approximate",
    "negative_slope", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "count_include_pad",
    "divisor_override", "return_indices", "_stacklevel",
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
    **{kind: handler for (kind, _), handler in _BOTH.items()},
}  # fmt: skip
FUNCTIONS: dict[str, Handler] = {
    "add": _ADD, "iadd": _ADD, "sub": _SUB, "mul": _MUL, "imul": _MUL, "div": _DIV, "truediv": _DIV, "mean": _mean,
    "view": _reshape, "reshape": _reshape, "transpose": _transpose, "permute": _transpose, "contiguous": _same,
    "cat": _concatenate, "getitem": _part, "chunk": _same, "split": _same,  # getitem writes each piece
    "stochastic_depth": _same,  # torchvision's: the identity in evaluation mode
    **{name: handler for (_, name), handler in _BOTH.items()},
}  # fmt: skip
