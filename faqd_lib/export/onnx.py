"""A quantized network as ONNX: batch normalisation folded, weights stored in their bits, activations as Q/DQ pairs.

Needs the packages onnx and ml_dtypes. Weights become low-bit initialisers behind a
``DequantizeLinear``: INT2 for 1 and 2 bits (opset 25), INT4 for 3 and 4 (opset 21), INT8 for 5 to 8; what follows
computes in float32. A batch normalisation behind a convolution is folded: its factors into the scales (one for each
output channel then), its offsets into the bias. A quantized ReLU becomes ``Min``, ``QuantizeLinear`` and
``DequantizeLinear`` (UINT8, which holds every level of up to 8 bits).

The network is traced with ``torch.fx``. It may consist of the modules and functions of
:data:`faqd_lib.export.onnx_operators.CALLS`, which is what this project's networks and most of torchvision's
convolutional ones are made of; anything else is an error that names it. What a trace cannot show (a value that is
overwritten and read again, a hook) is found by comparing outputs, and refused, too.
"""

import copy
import json
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ..quantization.network import LowBitWeight, low_bit_weights, unwrapped
from ..utils.files import atomic_write
from .onnx_operators import ALIASES, CALLS, KEYWORDS, OnnxExportError, known_modules
from .packed import check_json, warn_of_uncalibrated

_ONE_TENSOR = "the network returns something else than one tensor"
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def _packages():
    try:
        import ml_dtypes
        import onnx
    except ImportError as error:
        raise OnnxExportError(f"ONNX export needs onnx and ml_dtypes ({error}): pip install onnx ml_dtypes") from error
    return onnx, ml_dtypes


def export_onnx(
    model: nn.Module, path: str | Path, image_shape: Sequence[int], *, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write a network to an ONNX file, whole or not at all. The network itself is left as it is.

    Args:
        model: quantized, read from a packed file, or float; exported in evaluation mode, without what DataParallel,
            DistributedDataParallel or ``torch.compile`` have put around it.
        path: of the file, by convention ``*.onnx``.
        image_shape: (channels, height, width) of one input image. The batch size stays free.
        metadata: whatever else belongs to the network (class names, mean and standard deviation of the pixels), kept
            as the model's metadata properties: text as it is, everything else as JSON.

    Returns:
        ``path``. The graph has one input ``images`` (N, channels, height, width) and one output ``logits``, float32.

    Raises:
        OnnxExportError: a module or function that is not known here (named), control flow that depends on data, a
            network that does not take such images, or missing packages.
        ValueError: a weight from a packed file has been changed since, or the metadata is no JSON.

    Warns:
        UserWarning: an activation step is neither calibrated nor trained.
    """
    onnx, _ = _packages()
    check_json("metadata", metadata)
    if len(image_shape) != 3 or not all(isinstance(size, int) and size > 0 for size in image_shape):
        raise OnnxExportError(f"image_shape must be (channels, height, width) of one image, got {image_shape!r}")
    model = unwrapped(model)
    warn_of_uncalibrated(model)
    model = copy.deepcopy(model).cpu()
    quantized = low_bit_weights(model)  # before the weights' own precision is gone
    model = model.float().eval()
    hooked, model = model, copy.deepcopy(model)
    for module in model.modules():  # a trace does not see what hooks change: without them, it can be told
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    try:
        graph = _Tracer().trace(model)
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:  # the last where it asks for len()
        raise OnnxExportError(f"the network cannot be traced: {error}") from error
    if not all(isinstance(node.args[0], fx.Node) for node in graph.nodes if node.op == "output"):
        raise OnnxExportError(_ONE_TENSOR)
    writer = _Writer(model, graph, quantized)
    with torch.no_grad():
        # Shapes of everything in between, from two images and from three: what differs is how many images there are.
        runs = [_Shapes(fx.GraphModule(model, graph)) for _ in range(2)]
        for images, run in enumerate(runs, start=2):
            try:
                run.run(torch.zeros(images, *image_shape))
            except RuntimeError as error:
                raise OnnxExportError(
                    f"the network cannot take {images} images of image_shape {tuple(image_shape)}: "
                    f"{str(error).partition(chr(10))[0]}"
                ) from error
        _check_trace(hooked, fx.GraphModule(model, graph), image_shape)
        writer.write(*runs)
    shapes = runs[0]
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
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
    h.set_model_props(file, texts)
    onnx.checker.check_model(file)
    return atomic_write(Path(path), lambda temporary: temporary.write_bytes(file.SerializeToString()))


def _check_trace(model: nn.Module, traced: nn.Module, image_shape: Sequence[int]) -> None:
    """Raise OnnxExportError where the traced network is not the network: what a trace loses cannot be seen in it."""
    images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        theirs, ours = model(images.clone()), traced(images.clone())
    if isinstance(theirs, torch.Tensor) and isinstance(ours, torch.Tensor):
        tolerance = 1e-4 * float(theirs.abs().max())
        if not torch.allclose(ours, theirs, rtol=1e-4, atol=tolerance, equal_nan=True):
            raise OnnxExportError(
                "traced, the network gives other outputs: it overwrites a value that is read again (x += y, x *= y: "
                "write x = x + y), drops at random in evaluation (F.dropout without training=self.training), or has "
                "hooks"
            )


class _Tracer(fx.Tracer):
    """Every module that has a handler is one node; all others are looked into."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return _kind_of(module) is not None


def _kind_of(module: nn.Module) -> type | None:
    """The known class that a module behaves as; a subclass with a ``forward`` of its own behaves as itself."""
    for kind in CALLS:
        if isinstance(kind, type) and isinstance(module, kind) and type(module).forward is kind.forward:
            return kind
    return None


class _Shapes(fx.Interpreter):
    """Runs the graph once and remembers the shape of every tensor, shapes of tuples of them, and sizes as they are."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.pieces: dict[fx.Node, list[tuple[int, ...]]] = {}
        self.sizes: dict[fx.Node, Any] = {}
        self.result: torch.Tensor | None = None

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if isinstance(value, torch.Tensor):
            self.shapes[node] = tuple(value.shape)
            self.result = value
        elif isinstance(value, tuple | list) and value and all(isinstance(part, torch.Tensor) for part in value):
            self.pieces[node] = [tuple(part.shape) for part in value]
        elif node.op != "output":
            self.sizes[node] = value
        return value


class _Writer:
    """Turns the nodes of a traced graph into nodes and initialisers of ONNX, in order."""

    def __init__(self, model: nn.Module, graph: fx.Graph, quantized: Mapping[str, LowBitWeight]) -> None:
        self.onnx, self.dtypes = _packages()
        self.graph, self.modules = graph, dict(model.named_modules())
        self.quantized = quantized
        self.nodes, self.initializers = [], []
        self.names: dict[fx.Node, str] = {}
        self.stored: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.uses_int2 = False

    def write(self, two: _Shapes, three: _Shapes) -> None:
        """``two``, ``three``: what was found with so many images."""
        self.shapes, self.pieces, self.sizes, self.three = two.shapes, two.pieces, two.sizes, three
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.names[node] = "images"
            elif node.op == "output":
                (result,) = node.args
                if result not in self.shapes:
                    raise OnnxExportError(_ONE_TENSOR)
                self.add("Identity", [self.names[result]], output="logits")
            # A folded batch normalisation has its name already, pieces are taken one by one, and what is made of sizes
            # has a shape that is known.
            elif node not in self.names and node not in self.pieces and node not in self.sizes:
                self.names[node] = self._call(node)

    def has_all_images(self, node: fx.Node) -> bool:
        """Whether a value still has one part for each image, in its first dimension and there alone."""
        shape = self.shapes[node]
        return shape[:1] == (2,) and self.three.shapes[node] == (3, *shape[1:])

    def _handler(self, node: fx.Node) -> Callable | None:
        if node.op == "call_module":
            return CALLS[_kind_of(self.modules[node.target])]
        if node.op in ("call_function", "call_method"):
            return CALLS.get(node.target) or CALLS.get(getattr(node.target, "__name__", node.target))
        return None

    def _names_of(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that stand for one piece of memory: what comes out of a dropout or a flattening is what went in."""
        while self._handler(node) in ALIASES:
            (node, *_) = node.all_input_nodes
        found = [node]
        for name in found:
            found += [user for user in name.users if self._handler(user) in ALIASES]
        return found

    def _call(self, node: fx.Node) -> str:
        handler = self._handler(node)
        if node.op == "call_module":
            module = self.modules[node.target]
            what, inplace = type(module).__name__, getattr(module, "inplace", False)
        elif node.op in ("call_function", "call_method"):
            module, what = None, getattr(node.target, "__name__", node.target)
            inplace = node.kwargs.get("inplace", False) or node.target in (operator.iadd, operator.imul)
            unknown = {name for name, value in node.kwargs.items() if value is not None} - KEYWORDS
            if unknown:
                raise OnnxExportError(f"{what} with {', '.join(sorted(unknown))} is not known here (node {node.name})")
        else:  # a parameter that a module without a handler reads: name that module
            owner = str(node.target).rpartition(".")[0]
            kind = type(self.modules[owner]).__name__
            module, what, inplace = None, f"{kind} ({owner})" if owner else f"the parameter {node.target}", False
        if handler is None:
            raise OnnxExportError(
                f"no ONNX form is known here for {what} (node {node.name}); known are {', '.join(known_modules())} and "
                "their functions"
            )
        if not node.args and "tensors" not in node.kwargs:
            raise OnnxExportError(f"{what} (node {node.name}): give its input by position, not by name")
        source = node.args[0] if node.args else None
        if inplace and handler not in ALIASES and isinstance(source, fx.Node):
            names = self._names_of(source)
            others = {user for name in names for user in name.users if user not in self.sizes} - {node, *names}
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
        if isinstance(argument, fx.Node) and argument in self.sizes:
            if self.sizes[argument] != self.three.sizes[argument]:
                raise OnnxExportError(f"a value depends on the number of images (node {argument.name})")
            argument = self.sizes[argument]
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
        low = self.quantized[name]
        codes = self.constant(low.levels.numpy().astype(self._type_of(low.bits)), f"{name}.levels")
        scale = low.scale.float().flatten()
        if factor is not None:
            scale = scale * factor
        scales = self.constant((scale if scale.numel() > 1 else scale.squeeze()).numpy(), f"{label}.scale")
        # Without an axis a scalar scale belongs to the whole tensor.
        return self.add("DequantizeLinear", [codes, scales], **({"axis": 0} if scale.numel() > 1 else {}))

    def _type_of(self, bits: int):
        if bits <= 2:
            self.uses_int2 = True
            return self.dtypes.int2
        return self.dtypes.int4 if bits <= 4 else np.int8

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
