"""The ONNX form of each module and function that :mod:`faqd_lib.export.onnx` knows.

A handler gets the writer, the node of the traced graph and, where the node calls one, the module; it adds nodes to the
writer and returns the name of the value. ``CALLS`` names them all.
"""

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from ..models import SubsampleAndPad
from ..quantization.relu_kernels import SMALLEST_STEP
from ..quantization.weights import QuantizedReLU


class OnnxExportError(ValueError):
    """The network has a part that this exporter does not know, or the packages it needs are not there."""


class Writer(Protocol):
    """What a handler is given to write to.

    ``shapes``: of every tensor, for two images; ``pieces``: shapes of the tensors in a tuple of them; ``names``: of
    values that have one already; ``calls``: how often each layer has been written.
    """

    shapes: dict[fx.Node, tuple[int, ...]]
    pieces: dict[fx.Node, list[tuple[int, ...]]]
    names: dict[fx.Node, str]
    calls: Counter[str]

    def add(self, kind: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        """A new node of one output, whose name is returned."""

    def constant(self, values: Any, name: str = "") -> str:
        """The name of a constant."""

    def of(self, argument: Any) -> str:
        """The name of a value: that of a node, or of a new constant."""

    def weight(self, name: str, label: str, module: nn.Module, factor: torch.Tensor | None) -> str:
        """The name of a layer's weight times ``factor``, in as few bits as it has."""

    def folded_norm(self, node: fx.Node, layer: nn.Module) -> nn.Module | None:
        """The batch normalisation behind a layer, if it can be folded into it."""

    def has_all_images(self, node: fx.Node) -> bool:
        """Whether a value has one part for each image, in its first dimension."""


def _affine_of(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(factor, offset) of a batch normalisation in evaluation mode, in float64."""
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    offset = -norm.running_mean.double() * factor
    return factor, offset if norm.bias is None else offset + norm.bias.detach().double()


def _layer(w: Writer, node: fx.Node, module: nn.Module) -> str:
    """A convolution or a linear layer, with the batch normalisation behind it."""
    norm, factor = w.folded_norm(node, module), None
    # Each call of a layer has a normalisation of its own behind it, or none.
    label = f"{node.target}.call{w.calls[node.target]}" if w.calls[node.target] else str(node.target)
    w.calls[node.target] += 1
    bias = None if module.bias is None else module.bias.detach().double()
    if norm is not None:
        factor, offset = _affine_of(norm)
        bias = offset if bias is None else bias * factor + offset
    inputs = [w.of(node.args[0]), w.weight(node.target, label, module, None if factor is None else factor.float())]
    if bias is not None:
        inputs.append(w.constant(bias.float().numpy(), f"{label}.bias"))
    if isinstance(module, nn.Linear):
        if len(w.shapes[node]) == 2:
            output = w.add("Gemm", inputs, transB=1)
        else:
            output = w.add("MatMul", [inputs[0], w.add("Transpose", [inputs[1]], perm=[1, 0])])
            output = w.add("Add", [output, inputs[2]]) if bias is not None else output
    else:
        if module.padding_mode != "zeros":
            raise OnnxExportError(f"{node.target}: padding_mode {module.padding_mode!r} has no ONNX form here")
        output = w.add(
            "Conv", inputs, kernel_shape=list(module.kernel_size), strides=list(module.stride),
            pads=_pads(module), dilations=list(module.dilation), group=module.groups,
        )  # fmt: skip
    if norm is not None:
        w.names[next(iter(node.users))] = output
    return output


def _pads(module: nn.Conv2d) -> list[int]:
    """Rows and columns of zeros before the map, and after it."""
    if module.padding == "same":  # what is odd goes behind
        total = [dilation * (size - 1) for dilation, size in zip(module.dilation, module.kernel_size, strict=True)]
        return [part // 2 for part in total] + [part - part // 2 for part in total]
    return [0] * 4 if module.padding == "valid" else [*module.padding, *module.padding]


def _norm(w: Writer, node: fx.Node, module: nn.Module) -> str:
    if module.running_mean is None:
        raise OnnxExportError(f"{node.target}: a batch normalisation without running statistics has no ONNX form here")
    factor, offset = (part.float().view(-1, *[1] * (len(w.shapes[node]) - 2)) for part in _affine_of(module))
    scaled = w.add("Mul", [w.of(node.args[0]), w.constant(factor.numpy())])
    return w.add("Add", [scaled, w.constant(offset.numpy())])


def _quantized_relu(w: Writer, node: fx.Node, module: QuantizedReLU) -> str:
    step = np.float32(module.step.detach().clamp_min(SMALLEST_STEP))
    # Min and not Clip: ONNX Runtime takes DequantizeLinear, Conv, Clip, QuantizeLinear for one quantized convolution,
    # and would round its bias to multiples of the product of both scales, far too coarse at few bits.
    clipped = w.add("Min", [w.of(node.args[0]), w.constant(step * module.highest)])
    scale, zero = w.constant(step), w.constant(np.uint8(0))
    levels = w.add("QuantizeLinear", [clipped, scale, zero])
    return w.add("DequantizeLinear", [levels, scale, zero])


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _max_pool(w: Writer, node: fx.Node, module: nn.MaxPool2d | None) -> str:
    module = module or nn.MaxPool2d(*node.args[1:], **node.kwargs)
    if module.return_indices:
        raise OnnxExportError(f"{node.name}: return_indices has no ONNX form here")
    return w.add(
        "MaxPool", [w.of(node.args[0])], kernel_shape=_pair(module.kernel_size), strides=_pair(module.stride),
        pads=_pair(module.padding) * 2, dilations=_pair(module.dilation), ceil_mode=int(module.ceil_mode),
    )  # fmt: skip


def _average_pool(w: Writer, node: fx.Node, module: nn.AvgPool2d | None) -> str:
    module = module or nn.AvgPool2d(*node.args[1:], **node.kwargs)
    if module.divisor_override is not None:
        raise OnnxExportError(f"{node.name}: divisor_override has no ONNX form")
    return w.add(
        "AveragePool", [w.of(node.args[0])], kernel_shape=_pair(module.kernel_size), strides=_pair(module.stride),
        pads=_pair(module.padding) * 2, ceil_mode=int(module.ceil_mode),
        count_include_pad=int(module.count_include_pad),
    )  # fmt: skip


def _global_pool(w: Writer, node: fx.Node, module: nn.AdaptiveAvgPool2d | None) -> str:
    source = node.args[0]
    size = tuple(w.shapes[node][2:])
    height, width = w.shapes[source][2:]
    if size == (1, 1):
        return w.add("GlobalAveragePool", [w.of(source)])
    if height % size[0] or width % size[1]:
        if size[0] % height or size[1] % width:
            raise OnnxExportError(f"{node.name}: pooling {height}×{width} to {size[0]}×{size[1]} has no ONNX form")
        # Fewer pixels than wanted: each is repeated.
        factors = np.array([1, 1, size[0] / height, size[1] / width], np.float32)
        return w.add("Resize", [w.of(source), "", w.constant(factors)], mode="nearest",
                     coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip
    kernel = [height // size[0], width // size[1]]
    return w.add("AveragePool", [w.of(source)], kernel_shape=kernel, strides=kernel)


def _mean(w: Writer, node: fx.Node, _: None) -> str:
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if dims is None:
        raise OnnxExportError(f"{node.name}: a mean over everything, images included, has no place in a network")
    keep = bool(node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False))
    axes = w.constant(np.array([dims] if isinstance(dims, int) else list(dims), np.int64))
    return w.add("ReduceMean", [w.of(node.args[0]), axes], keepdims=int(keep))


def _reshape(w: Writer, node: fx.Node, _: nn.Flatten | None) -> str:
    """Flattening, ``view`` and ``reshape``: whatever was asked for, the shape is known, but for the images."""
    if not w.has_all_images(node) or not w.has_all_images(node.args[0]):
        raise OnnxExportError(f"{node.name}: images would be flattened together")
    return w.add("Reshape", [w.of(node.args[0]), w.constant(np.array([0, *w.shapes[node][1:]], np.int64))])


def _transpose(w: Writer, node: fx.Node, _: None) -> str:
    """``permute`` and ``transpose``."""
    rank = len(w.shapes[node])
    order = list(range(rank))
    if node.target == "transpose" or node.target is torch.transpose:
        first, second = (dim % rank for dim in node.args[1:3])
        order[first], order[second] = second, first
    else:
        dims = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
        order = [dim % rank for dim in dims]
    return w.add("Transpose", [w.of(node.args[0])], perm=order)


def _part(w: Writer, node: fx.Node, _: None) -> str:
    """One of the pieces of ``chunk`` or ``split``."""
    pieces, index = node.args
    name = getattr(pieces.target, "__name__", pieces.target)
    if name not in ("chunk", "split") or pieces not in w.pieces or not isinstance(index, int):
        raise OnnxExportError(f"no ONNX form is known here for getitem of a tensor (node {node.name})")
    source = pieces.args[0]
    rank = len(w.shapes[source])
    dim = pieces.kwargs.get("dim", pieces.args[2] if len(pieces.args) > 2 else 0) % rank
    if dim == 0:
        raise OnnxExportError(f"{pieces.name}: images would be parted")
    sizes = [shape[dim] for shape in w.pieces[pieces]]
    index %= len(sizes)
    ends = (sum(sizes[:index]), sum(sizes[: index + 1]), dim)
    return w.add("Slice", [w.of(source), *(w.constant(np.array([end], np.int64)) for end in ends)])


def _subsample(w: Writer, node: fx.Node, module: SubsampleAndPad) -> str:
    ends = np.array([2**31 - 1] * 2, np.int64)
    steps = np.array([module.stride] * 2, np.int64)
    inputs = [np.zeros(2, np.int64), ends, np.array([2, 3], np.int64), steps]
    sliced = w.add("Slice", [w.of(node.args[0]), *map(w.constant, inputs)])
    before = module.new_channels // 2
    pads = np.array([0, before, 0, 0, 0, module.new_channels - before, 0, 0], np.int64)
    return w.add("Pad", [sliced, w.constant(pads)])


def _same(w: Writer, node: fx.Node, _: Any) -> str:
    return w.of(node.args[0])


def _simple(kind: str) -> Callable[[Writer, fx.Node, Any], str]:
    return lambda w, node, _: w.add(kind, [w.of(node.args[0])])


def _binary(kind: str) -> Callable[[Writer, fx.Node, Any], str]:
    return lambda w, node, _: w.add(kind, [w.of(node.args[0]), w.of(node.args[1])])


def _silu(w: Writer, node: fx.Node, _: Any) -> str:
    return w.add("Mul", [w.of(node.args[0]), w.add("Sigmoid", [w.of(node.args[0])])])


def _hard_sigmoid(w: Writer, node: fx.Node, _: Any) -> str:
    return w.add("HardSigmoid", [w.of(node.args[0])], alpha=1 / 6, beta=0.5)


def _relu6(w: Writer, node: fx.Node, _: Any) -> str:
    return w.add("Clip", [w.of(node.args[0]), w.constant(np.float32(0)), w.constant(np.float32(6))])


def _with_dim(kind: str) -> Callable[[Writer, fx.Node, Any], str]:
    """Softmax and its logarithm."""

    def handler(w: Writer, node: fx.Node, module: nn.Module | None) -> str:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None) if module is None else module.dim
        if dim is None:
            raise OnnxExportError(f"{node.name}: say over which dim")
        return w.add(kind, [w.of(node.args[0])], axis=dim)

    return handler


def _gelu(w: Writer, node: fx.Node, module: nn.GELU | None) -> str:
    how = node.kwargs.get("approximate", "none") if module is None else module.approximate
    return w.add("Gelu", [w.of(node.args[0])], approximate=how)


def _leaky_relu(w: Writer, node: fx.Node, module: nn.LeakyReLU | None) -> str:
    slope = node.kwargs.get("negative_slope", (*node.args, 0.01)[1]) if module is None else module.negative_slope
    return w.add("LeakyRelu", [w.of(node.args[0])], alpha=float(slope))


def _concatenate(w: Writer, node: fx.Node, _: None) -> str:
    parts = node.args[0] if node.args else node.kwargs["tensors"]
    if isinstance(parts, fx.Node):
        raise OnnxExportError(f"{node.name}: give cat a list of tensors, not what chunk or split returned")
    axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    return w.add("Concat", [w.of(part) for part in parts], axis=axis)


ALIASES = (_same, _reshape, _transpose, _part)  # what comes out of them lies where it lay before
KEYWORDS = {
    "dim", "keepdim", "tensors", "inplace", "p", "training", "start_dim", "end_dim", "output_size", "approximate",
    "negative_slope", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "count_include_pad",
    "divisor_override", "return_indices", "_stacklevel",
}  # fmt: skip
CALLS: dict[Any, Callable[[Writer, fx.Node, Any], str]] = {
    nn.Conv2d: _layer, nn.Linear: _layer, nn.BatchNorm1d: _norm, nn.BatchNorm2d: _norm,
    QuantizedReLU: _quantized_relu, nn.ReLU6: _relu6, nn.ReLU: _simple("Relu"), nn.SiLU: _silu, nn.GELU: _gelu,
    nn.LeakyReLU: _leaky_relu, nn.Sigmoid: _simple("Sigmoid"), nn.Tanh: _simple("Tanh"),
    nn.Hardswish: _simple("HardSwish"), nn.Hardsigmoid: _hard_sigmoid,
    nn.Softmax: _with_dim("Softmax"), nn.LogSoftmax: _with_dim("LogSoftmax"),
    nn.MaxPool2d: _max_pool, nn.AvgPool2d: _average_pool, nn.AdaptiveAvgPool2d: _global_pool,
    nn.Flatten: _reshape, nn.Dropout: _same, nn.Dropout2d: _same, nn.Identity: _same, SubsampleAndPad: _subsample,
    operator.add: _binary("Add"), operator.iadd: _binary("Add"), torch.add: _binary("Add"),
    operator.sub: _binary("Sub"), torch.sub: _binary("Sub"),
    operator.mul: _binary("Mul"), operator.imul: _binary("Mul"), torch.mul: _binary("Mul"),
    operator.truediv: _binary("Div"), torch.div: _binary("Div"), operator.getitem: _part,
    F.relu: _simple("Relu"), torch.relu: _simple("Relu"), F.relu6: _relu6, F.silu: _silu, F.gelu: _gelu,
    F.leaky_relu: _leaky_relu, torch.sigmoid: _simple("Sigmoid"), F.sigmoid: _simple("Sigmoid"),
    torch.tanh: _simple("Tanh"), F.tanh: _simple("Tanh"), F.hardswish: _simple("HardSwish"),
    F.hardsigmoid: _hard_sigmoid, F.softmax: _with_dim("Softmax"), torch.softmax: _with_dim("Softmax"),
    F.log_softmax: _with_dim("LogSoftmax"), torch.log_softmax: _with_dim("LogSoftmax"),
    F.max_pool2d: _max_pool, F.avg_pool2d: _average_pool, F.adaptive_avg_pool2d: _global_pool,
    torch.flatten: _reshape, torch.reshape: _reshape, torch.transpose: _transpose, torch.permute: _transpose,
    torch.cat: _concatenate, F.dropout: _same, F.dropout2d: _same, torch.mean: _mean,
    "add": _binary("Add"), "sub": _binary("Sub"), "mul": _binary("Mul"), "div": _binary("Div"),
    "relu": _simple("Relu"), "sigmoid": _simple("Sigmoid"), "tanh": _simple("Tanh"),
    "softmax": _with_dim("Softmax"), "log_softmax": _with_dim("LogSoftmax"),
    "flatten": _reshape, "view": _reshape, "reshape": _reshape, "transpose": _transpose, "permute": _transpose,
    "mean": _mean, "contiguous": _same, "chunk": _same, "split": _same,  # whose pieces are what is written
    "stochastic_depth": _same,  # torchvision's; it does nothing in evaluation mode
}  # fmt: skip


def known_modules() -> list[str]:
    """Names of the modules that have a form here, in alphabetical order."""
    return sorted(kind.__name__ for kind in CALLS if isinstance(kind, type))
