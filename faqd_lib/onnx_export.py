"""A quantized network as ONNX: batch normalisation folded, weights stored in their bits, activations as Q/DQ pairs.

Needs the packages onnx and ml_dtypes. Weights become low-bit initialisers behind a
``DequantizeLinear``: INT2 for 1 and 2 bits (opset 25), INT4 for 3 and 4 (opset 21), INT8 for 5 to 8; what follows
computes in float32. A batch normalisation behind a convolution is folded: its factors into the scales (one for each
output channel then), its offsets into the bias. A quantized ReLU becomes ``Min``, ``QuantizeLinear`` and
``DequantizeLinear`` (UINT8, which holds every level of up to 8 bits).

The network is traced with ``torch.fx``. It may consist of the modules and functions named in ``_CALLS`` below, which
is what the classification networks of torchvision and this project are made of; anything else is an error that names
it.
"""

import copy
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from .files import atomic_write
from .models import SubsampleAndPad
from .quantize import quantized_weights
from .quantizers import SMALLEST_STEP, QuantizedReLU, WeightQuantizer

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class OnnxExportError(ValueError):
    """The network has a part that this exporter does not know, or the packages it needs are not there."""


def _packages():
    try:
        import ml_dtypes
        import onnx
    except ImportError as error:
        raise OnnxExportError(f"ONNX export needs onnx and ml_dtypes ({error}): pip install onnx ml_dtypes") from error
    return onnx, ml_dtypes


def export_onnx(model: nn.Module, path: str | Path, image_shape: Sequence[int]) -> Path:
    """Write a network to an ONNX file, whole or not at all. The network itself is left as it is.

    Args:
        model: quantized or float; exported in evaluation mode.
        path: of the file, by convention ``*.onnx``.
        image_shape: (channels, height, width) of one input image. The batch size stays free.

    Returns:
        ``path``. The graph has one input ``images`` (N, channels, height, width) and one output ``logits``, float32.

    Raises:
        OnnxExportError: a module or function that is not known here (named), control flow that depends on data, or
            missing packages.
    """
    onnx, _ = _packages()
    model = copy.deepcopy(model).cpu().float().eval()
    try:
        graph = _Tracer().trace(model)
    except (fx.proxy.TraceError, TypeError) as error:
        raise OnnxExportError(f"the network cannot be traced: {error}") from error
    if not all(isinstance(node.args[0], fx.Node) for node in graph.nodes if node.op == "output"):
        raise OnnxExportError("the network returns something else than one tensor")
    writer = _Writer(model, graph)
    with torch.no_grad():
        # Shapes of everything in between, from one image.
        shapes = _Shapes(fx.GraphModule(model, graph))
        shapes.run(torch.zeros(1, *image_shape))
        writer.write(shapes.found)
    h = onnx.helper
    made = h.make_graph(
        writer.nodes,
        type(model).__name__,
        [h.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["N", *image_shape])],
        [h.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", *shapes.result.shape[1:]])],
        writer.initializers,
    )
    opset = 25 if writer.uses_int2 else 21
    file = h.make_model(made, opset_imports=[h.make_opsetid("", opset)], producer_name="faqd", ir_version=11)
    if writer.uses_int2:
        file.ir_version = 13
    onnx.checker.check_model(file)
    return atomic_write(Path(path), lambda temporary: temporary.write_bytes(file.SerializeToString()))


class _Tracer(fx.Tracer):
    """Every module that has a handler is one node; all others are looked into."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return _kind_of(module) is not None


def _kind_of(module: nn.Module) -> type | None:
    """The known class that a module behaves as; a subclass with a ``forward`` of its own behaves as itself."""
    for kind in _CALLS:
        if isinstance(kind, type) and isinstance(module, kind) and type(module).forward is kind.forward:
            return kind
    return None


class _Shapes(fx.Interpreter):
    """Runs the graph once and remembers the shape of every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, tuple[int, ...]] = {}
        self.result: torch.Tensor | None = None

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if isinstance(value, torch.Tensor):
            self.found[node] = tuple(value.shape)
            self.result = value
        return value


class _Writer:
    """Turns the nodes of a traced graph into nodes and initialisers of ONNX, in order."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.onnx, self.dtypes = _packages()
        self.graph, self.modules = graph, dict(model.named_modules())
        self.quantized = quantized_weights(model)
        self.nodes, self.initializers = [], []
        self.names: dict[fx.Node, str] = {}
        self.stored: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.uses_int2 = False

    def write(self, shapes: dict[fx.Node, tuple[int, ...]]) -> None:
        self.shapes = shapes
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.names[node] = "images"
            elif node.op == "output":
                (result,) = node.args
                self.add("Identity", [self.names[result]], output="logits")
            elif node not in self.names:  # a folded batch normalisation has its name already
                self.names[node] = self._call(node)

    def _handler(self, node: fx.Node) -> Callable | None:
        if node.op == "call_module":
            return _CALLS[_kind_of(self.modules[node.target])]
        if node.op in ("call_function", "call_method"):
            return _CALLS.get(node.target) or _CALLS.get(getattr(node.target, "__name__", node.target))
        return None

    def _names_of(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that stand for one piece of memory: what comes out of a dropout or a flattening is what went in."""
        while self._handler(node) in (_same, _flatten):
            (node, *_) = node.all_input_nodes
        found = [node]
        for name in found:
            found += [user for user in name.users if self._handler(user) in (_same, _flatten)]
        return found

    def _call(self, node: fx.Node) -> str:
        handler = self._handler(node)
        if node.op == "call_module":
            module = self.modules[node.target]
            what, inplace = type(module).__name__, getattr(module, "inplace", False)
        elif node.op in ("call_function", "call_method"):
            module, what = None, getattr(node.target, "__name__", node.target)
            inplace = node.kwargs.get("inplace", False) or node.target in (operator.iadd, operator.imul)
            unknown = node.kwargs.keys() - _KEYWORDS
            if unknown:
                raise OnnxExportError(f"{what} with {', '.join(sorted(unknown))} is not known here (node {node.name})")
        else:
            module, what, inplace = None, f"{node.op} {node.target}", False
        if handler is None:
            raise OnnxExportError(f"no ONNX form is known here for {what} (node {node.name})")
        source = node.args[0] if node.args else None
        if inplace and handler is not _same and isinstance(source, fx.Node):
            names = self._names_of(source)
            others = {user for name in names for user in name.users} - {node, *names}
        else:
            others = set()
        if others:
            raise OnnxExportError(
                f"{what} (node {node.name}) overwrites a value that others read: make it not in place"
            )
        return handler(self, node, module)

    # ---- pieces

    def add(self, kind: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        output = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def constant(self, values: Any, name: str = "") -> str:
        if name in self.stored:  # a layer that is called twice
            return name
        name = name or f"constant_{len(self.initializers)}"
        self.stored.add(name)
        self.initializers.append(self.onnx.numpy_helper.from_array(np.asarray(values), name))
        return name

    def of(self, argument: Any) -> str:
        """The name of a value: that of a node, or of a new constant."""
        if isinstance(argument, fx.Node):
            return self.names[argument]
        return self.constant(np.float32(argument))

    def weight(self, name: str, label: str, module: nn.Module, factor: torch.Tensor | None) -> str:
        """The layer's weight times ``factor`` (one for each output channel, or None), in as few bits as it has.

        ``label`` names what ``factor`` changes; the levels belong to the layer, however often it is called.
        """
        if name not in self.quantized:
            weight = module.weight.detach().float()
            if factor is not None:
                weight = weight * factor.view(-1, *[1] * (weight.ndim - 1))
            return self.constant(weight.numpy(), f"{label}.weight")
        quantizer, latent = self.quantized[name]
        scale, levels = quantizer.levels(latent.detach().float())
        codes = self.constant(levels.numpy().astype(self._type_of(quantizer)), f"{name}.levels")
        scale = scale.flatten()
        if factor is not None:
            scale = scale * factor
        scales = self.constant((scale if scale.numel() > 1 else scale.squeeze()).numpy(), f"{label}.scale")
        # Without an axis a scalar scale belongs to the whole tensor.
        return self.add("DequantizeLinear", [codes, scales], **({"axis": 0} if scale.numel() > 1 else {}))

    def _type_of(self, quantizer: WeightQuantizer):
        if quantizer.bits <= 2:
            self.uses_int2 = True
            return self.dtypes.int2
        return self.dtypes.int4 if quantizer.bits <= 4 else np.int8

    def folded_norm(self, node: fx.Node, layer: nn.Module) -> nn.Module | None:
        """The batch normalisation that is the only reader of a layer's node, which then takes the node's name."""
        (reader, *more) = node.users or [None]
        if more or reader is None or reader.op != "call_module":
            return None
        module = self.modules[reader.target]
        if not isinstance(module, _NORMS) or module.running_mean is None:
            return None
        # The normalisation's features are the second dimension, a linear layer's own the last.
        return module if len(self.shapes[node]) == (2 if isinstance(layer, nn.Linear) else 4) else None


def _affine_of(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(factor, offset) of a batch normalisation in evaluation mode, in float64."""
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    offset = -norm.running_mean.double() * factor
    return factor, offset if norm.bias is None else offset + norm.bias.detach().double()


def _layer(w: _Writer, node: fx.Node, module: nn.Module) -> str:
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
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            raise OnnxExportError(
                f"{node.target}: padding {module.padding!r}, {module.padding_mode!r} is not known here"
            )
        output = w.add(
            "Conv", inputs, kernel_shape=list(module.kernel_size), strides=list(module.stride),
            pads=[*module.padding, *module.padding], dilations=list(module.dilation), group=module.groups,
        )  # fmt: skip
    if norm is not None:
        w.names[next(iter(node.users))] = output
    return output


def _norm(w: _Writer, node: fx.Node, module: nn.Module) -> str:
    if module.running_mean is None:
        raise OnnxExportError(f"{node.target}: a batch normalisation without running statistics has no ONNX form here")
    factor, offset = (part.float().view(-1, *[1] * (len(w.shapes[node]) - 2)) for part in _affine_of(module))
    scaled = w.add("Mul", [w.of(node.args[0]), w.constant(factor.numpy())])
    return w.add("Add", [scaled, w.constant(offset.numpy())])


def _quantized_relu(w: _Writer, node: fx.Node, module: QuantizedReLU) -> str:
    step = np.float32(module.step.detach().clamp_min(SMALLEST_STEP))
    # Min and not Clip: ONNX Runtime takes DequantizeLinear, Conv, Clip, QuantizeLinear for one quantized convolution,
    # and would round its bias to multiples of the product of both scales, far too coarse at few bits.
    clipped = w.add("Min", [w.of(node.args[0]), w.constant(step * module.highest)])
    scale, zero = w.constant(step), w.constant(np.uint8(0))
    levels = w.add("QuantizeLinear", [clipped, scale, zero])
    return w.add("DequantizeLinear", [levels, scale, zero])


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _max_pool(w: _Writer, node: fx.Node, module: nn.MaxPool2d) -> str:
    return w.add(
        "MaxPool", [w.of(node.args[0])], kernel_shape=_pair(module.kernel_size), strides=_pair(module.stride),
        pads=_pair(module.padding) * 2, dilations=_pair(module.dilation), ceil_mode=int(module.ceil_mode),
    )  # fmt: skip


def _average_pool(w: _Writer, node: fx.Node, module: nn.AvgPool2d) -> str:
    if module.divisor_override is not None:
        raise OnnxExportError(f"{node.target}: divisor_override has no ONNX form")
    return w.add(
        "AveragePool", [w.of(node.args[0])], kernel_shape=_pair(module.kernel_size), strides=_pair(module.stride),
        pads=_pair(module.padding) * 2, ceil_mode=int(module.ceil_mode),
        count_include_pad=int(module.count_include_pad),
    )  # fmt: skip


def _global_pool(w: _Writer, node: fx.Node, module: nn.AdaptiveAvgPool2d | None) -> str:
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


def _mean(w: _Writer, node: fx.Node, _: None) -> str:
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if dims is None:
        raise OnnxExportError(f"{node.name}: a mean over everything, images included, has no place in a network")
    keep = bool(node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False))
    axes = w.constant(np.array([dims] if isinstance(dims, int) else list(dims), np.int64))
    return w.add("ReduceMean", [w.of(node.args[0]), axes], keepdims=int(keep))


def _flatten(w: _Writer, node: fx.Node, module: nn.Flatten | None) -> str:
    shape, source = w.shapes[node], w.shapes[node.args[0]]
    if shape[0] != source[0] or len(shape) > len(source):
        raise OnnxExportError(f"{node.name}: images would be flattened together")
    return w.add("Reshape", [w.of(node.args[0]), w.constant(np.array([0, *shape[1:]], np.int64))])


def _subsample(w: _Writer, node: fx.Node, module: SubsampleAndPad) -> str:
    ends = np.array([2**31 - 1] * 2, np.int64)
    steps = np.array([module.stride] * 2, np.int64)
    inputs = [np.zeros(2, np.int64), ends, np.array([2, 3], np.int64), steps]
    sliced = w.add("Slice", [w.of(node.args[0]), *map(w.constant, inputs)])
    before = module.new_channels // 2
    pads = np.array([0, before, 0, 0, 0, module.new_channels - before, 0, 0], np.int64)
    return w.add("Pad", [sliced, w.constant(pads)])


def _same(w: _Writer, node: fx.Node, _: Any) -> str:
    return w.of(node.args[0])


def _simple(kind: str) -> Callable[[_Writer, fx.Node, Any], str]:
    return lambda w, node, _: w.add(kind, [w.of(node.args[0])])


def _binary(kind: str) -> Callable[[_Writer, fx.Node, Any], str]:
    return lambda w, node, _: w.add(kind, [w.of(node.args[0]), w.of(node.args[1])])


def _silu(w: _Writer, node: fx.Node, _: Any) -> str:
    return w.add("Mul", [w.of(node.args[0]), w.add("Sigmoid", [w.of(node.args[0])])])


def _hard_sigmoid(w: _Writer, node: fx.Node, _: Any) -> str:
    return w.add("HardSigmoid", [w.of(node.args[0])], alpha=1 / 6, beta=0.5)


def _relu6(w: _Writer, node: fx.Node, _: Any) -> str:
    return w.add("Clip", [w.of(node.args[0]), w.constant(np.float32(0)), w.constant(np.float32(6))])


def _concatenate(w: _Writer, node: fx.Node, _: None) -> str:
    parts = node.args[0] if node.args else node.kwargs["tensors"]
    axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    return w.add("Concat", [w.of(part) for part in parts], axis=axis)


_KEYWORDS = {"dim", "keepdim", "tensors", "inplace", "p", "training", "start_dim", "end_dim", "output_size"}
_CALLS: dict[Any, Callable[[_Writer, fx.Node, Any], str]] = {
    nn.Conv2d: _layer, nn.Linear: _layer, nn.BatchNorm1d: _norm, nn.BatchNorm2d: _norm,
    QuantizedReLU: _quantized_relu, nn.ReLU6: _relu6, nn.ReLU: _simple("Relu"), nn.SiLU: _silu,
    nn.Sigmoid: _simple("Sigmoid"), nn.Hardswish: _simple("HardSwish"), nn.Hardsigmoid: _hard_sigmoid,
    nn.MaxPool2d: _max_pool, nn.AvgPool2d: _average_pool, nn.AdaptiveAvgPool2d: _global_pool,
    nn.Flatten: _flatten, nn.Dropout: _same, nn.Identity: _same, SubsampleAndPad: _subsample,
    operator.add: _binary("Add"), operator.iadd: _binary("Add"), torch.add: _binary("Add"),
    operator.mul: _binary("Mul"), torch.mul: _binary("Mul"),
    F.relu: _simple("Relu"), torch.relu: _simple("Relu"), torch.flatten: _flatten, torch.cat: _concatenate,
    F.adaptive_avg_pool2d: _global_pool, F.dropout: _same, torch.mean: _mean,
    "add": _binary("Add"), "mul": _binary("Mul"), "relu": _simple("Relu"), "flatten": _flatten, "mean": _mean,
    "contiguous": _same,
    "stochastic_depth": _same,  # torchvision's; it does nothing in evaluation mode
}  # fmt: skip
