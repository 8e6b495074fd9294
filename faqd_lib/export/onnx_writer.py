"""Nodes and initialisers of an ONNX graph, and what a traced network knows of its values."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ..quantization.network import LowBitWeight

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class OnnxExportError(ValueError):
    """The exporter does not know a part of the network, or a package is missing."""


def packages():
    """The modules (onnx, ml_dtypes), imported here because only the export needs them.

    Raises:
        OnnxExportError: one of them is not installed.
    """
    try:
        import ml_dtypes
        import onnx
    except ImportError as error:
        raise OnnxExportError(f"ONNX export needs onnx and ml_dtypes ({error}): pip install onnx ml_dtypes") from error
    return onnx, ml_dtypes


class Values(fx.Interpreter):
    """Runs a traced graph once and remembers each node's value: shapes of tensors, everything else unchanged.

    Attributes:
        shapes: shape of each tensor, by node.
        pieces: shapes of the tensors in each tuple, by node.
        sizes: every other value, by node.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.pieces: dict[fx.Node, list[tuple[int, ...]]] = {}
        self.sizes: dict[fx.Node, Any] = {}

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if isinstance(value, torch.Tensor):
            self.shapes[node] = tuple(value.shape)
        elif isinstance(value, tuple | list) and value and all(isinstance(part, torch.Tensor) for part in value):
            self.pieces[node] = [tuple(part.shape) for part in value]
        elif node.op != "output":
            self.sizes[node] = value
        return value


class Writer:
    """Collects nodes and initialisers of an ONNX graph in order.

    Args:
        modules: the modules of the network by name.
        quantized: its low-bit weights by the name of their layer.
        two, three: the values of the graph for two and for three images. Values that differ depend on that number.

    Attributes:
        names: names of the values that have one, by node.
        calls: how often each layer was written.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], quantized: Mapping[str, LowBitWeight], two: Values, three: Values
    ) -> None:
        self.onnx, self._dtypes = packages()
        self.modules, self._quantized, self._three = modules, quantized, three
        self.shapes, self.pieces, self.sizes = two.shapes, two.pieces, two.sizes
        self.nodes, self.initializers = [], []
        self.names: dict[fx.Node, str] = {}
        self.calls: Counter[str] = Counter()
        self.uses_int2 = False
        self._stored: set[str] = set()

    def add(self, kind: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        output = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def constant(self, values: Any, name: str = "") -> str:
        """Add an initialiser and return its name. A name that exists already is not added again."""
        if name in self._stored:  # a layer that is called twice
            return name
        name = name or f"constant_{len(self.initializers)}"
        self._stored.add(name)
        self.initializers.append(self.onnx.numpy_helper.from_array(np.asarray(values), name))
        return name

    def name_of(self, argument: Any) -> str:
        """The name of a node's value; a number becomes a constant."""
        if isinstance(argument, fx.Node) and argument in self.sizes:
            if self.sizes[argument] != self._three.sizes[argument]:
                raise OnnxExportError(f"a value depends on the number of images (node {argument.name})")
            argument = self.sizes[argument]
        if isinstance(argument, fx.Node):
            return self.names[argument]
        return self.constant(np.float32(argument))

    def has_all_images(self, node: fx.Node) -> bool:
        """Whether the first dimension of a value, and no other, counts the images."""
        shape = self.shapes[node]
        return shape[:1] == (2,) and self._three.shapes[node] == (3, *shape[1:])

    def weight(self, name: str, label: str, module: nn.Module, factor: torch.Tensor | None) -> str:
        """Add the weight of layer ``name`` in its bits and return its name.

        Args:
            name: name of the layer; its integer levels are stored once, however often the layer is called.
            label: name for the scale, or for a float weight.
            module: the layer.
            factor: (output channels,) to multiply the weight by, or None.
        """
        if name not in self._quantized:
            weight = module.weight.detach().float()
            if factor is not None:
                weight = weight * factor.view(-1, *[1] * (weight.ndim - 1))
            return self.constant(weight.numpy(), f"{label}.weight")
        low = self._quantized[name]
        codes = self.constant(low.levels.numpy().astype(self._type_of(low.bits)), f"{name}.levels")
        scale = low.scale.float().flatten()
        if factor is not None:
            scale = scale * factor
        scales = self.constant((scale if scale.numel() > 1 else scale.squeeze()).numpy(), f"{label}.scale")
        # A scalar scale, without an axis, belongs to the whole tensor.
        return self.add("DequantizeLinear", [codes, scales], **({"axis": 0} if scale.numel() > 1 else {}))

    def _type_of(self, bits: int):
        if bits <= 2:
            self.uses_int2 = True
            return self._dtypes.int2
        return self._dtypes.int4 if bits <= 4 else np.int8

    def folded_norm(self, node: fx.Node, layer: nn.Module) -> nn.Module | None:
        """The batch normalisation to fold into a layer: the only reader of its output, over its output channels."""
        (reader, *more) = node.users or [None]
        if more or reader is None or reader.op != "call_module":
            return None
        module = self.modules[reader.target]
        if not isinstance(module, _NORMS) or module.running_mean is None:
            return None
        # The second dimension is normalised; the channels of a linear layer are the last one.
        return module if len(self.shapes[node]) == (2 if isinstance(layer, nn.Linear) else 4) else None
