"""Nodes and initialisers of an ONNX graph."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ..quantization.network import LowBitWeight

Values = Mapping[fx.Node, Any]  # value of each node of a traced network


class OnnxExportError(ValueError):
    """The exporter does not know a part of the network, or a package is missing."""


def packages():
    """The modules onnx and ml_dtypes, which only the export needs; OnnxExportError if one is not installed."""
    try:
        import ml_dtypes
        import onnx
    except ImportError as error:
        raise OnnxExportError(f"ONNX export needs onnx and ml_dtypes ({error}): pip install onnx ml_dtypes") from error
    return onnx, ml_dtypes


class Writer:
    """Collects nodes and initialisers of an ONNX graph in order.

    ``quantized`` has the network's low-bit weights by the name of their layer. ``two`` and ``three`` have the value of
    each node for two and for three images. A value that differs depends on the number of images.
    """

    def __init__(self, network: nn.Module, quantized: Mapping[str, LowBitWeight], two: Values, three: Values) -> None:
        self.onnx, types = packages()
        self.modules = dict(network.named_modules())
        self._quantized, self.values, self._three = quantized, two, three
        self.nodes, self.constants = [], {}
        self.names: dict[fx.Node, str] = {}  # of the values written so far
        self.calls: Counter[str] = Counter()  # of each layer, written so far
        self._storage = {1: types.int2, 2: types.int2, 3: types.int4, 4: types.int4}  # by bits; int8 for more bits

    def add(self, kind: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        output = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def constant(self, values: Any, name: str = "") -> str:
        """Add an initialiser and return its name, which has a number added where other values have the name already.

        The same values are added once under a name: a layer that is called twice has them already.
        """
        name, count = name or f"constant_{len(self.constants)}", 1
        made = self.onnx.numpy_helper.from_array(np.asarray(values), name)
        # A layer's weight differs from the same weight with a batch normalisation folded into it.
        while self.constants.setdefault(made.name, made) != made:
            count += 1
            made.name = f"{name}.{count}"
        return made.name

    def name_of(self, argument: Any) -> str:
        """The name of a node's value; a number or a parameter becomes a constant, float32 as all values of a graph."""
        value = self.values[argument] if isinstance(argument, fx.Node) else argument
        if isinstance(value, torch.Tensor):
            if argument.op == "get_attr":
                return self.constant(value.detach().float().numpy(), str(argument.target))
            return self.names[argument]
        if value != self._three.get(argument, value):  # a plain number is the same for any number of images
            raise OnnxExportError(f"a value depends on the number of images (node {argument.name})")
        return self.constant(np.float32(value))

    def image_dims(self, node: fx.Node) -> list[int]:
        """Dimensions of a value whose size depends on the number of images."""
        pairs = zip(self.values[node].shape, self._three[node].shape, strict=True)
        return [dim for dim, (two, three) in enumerate(pairs) if two != three]

    def reshaped(self, source: str, node: fx.Node) -> str:
        """Add a reshaping of ``source`` to the shape of a node's value, for any number of images."""
        shape, dims = np.array(self.values[node].shape, np.int64), self.image_dims(node)
        if len(dims) > 1:
            raise OnnxExportError(f"{node.name}: two dimensions depend on the number of images")
        shape[dims] = -1
        return self.add("Reshape", [source, self.constant(shape)])

    def shape_of(self, node: fx.Node) -> str:
        """Add the shape of a node's value, for any number of images, as an int64 tensor."""
        shape, dims = np.array(self.values[node].shape, np.int64), self.image_dims(node)
        if not dims:
            return self.constant(shape)
        each = np.array(self._three[node].shape, np.int64) - shape  # by how much one more image enlarges it
        if (shape[dims] != 2 * each[dims]).any():
            raise OnnxExportError(f"{node.name}: a size depends on the number of images, and is no multiple of it")
        images = self.add("Shape", ["images"], start=0, end=1)
        grown = self.add("Mul", [images, self.constant(each)])
        return self.add("Add", [grown, self.constant(shape - 2 * each)])

    def parameter(self, node: fx.Node) -> str:
        """The name of a weight that a function reads: in its bits if it is a layer's quantized weight."""
        layer, _, part = str(node.target).rpartition(".")
        if node.op == "get_attr" and part == "weight" and layer in self._quantized:
            return self.weight(layer, layer, self.modules[layer], None)
        return self.name_of(node)

    def weight(self, name: str, label: str, module: nn.Module, factor: torch.Tensor | None) -> str:
        """Add the weight of layer ``name`` in its bits, and return the name of its value.

        ``factor`` (output channels,) multiplies the weight; None for 1. ``label`` names the scale, or a float weight.
        Integer levels are stored once, however often the layer is called. Output channels are the first dimension of
        a weight, but the second one of a transposed convolution.
        """
        channels = 1 if isinstance(module, nn.ConvTranspose2d) else 0
        if name not in self._quantized:
            weight = module.weight.detach().float()
            if factor is not None:
                weight = weight * factor.view(-1, *[1] * (weight.ndim - 1 - channels))
            return self.constant(weight.numpy(), f"{label}.weight")
        low = self._quantized[name]
        codes = self.constant(low.levels.numpy().astype(self._storage.get(low.bits, np.int8)), f"{name}.levels")
        scale = low.scale.float().flatten()
        if factor is not None:
            scale = scale * factor
        scale = scale.squeeze()  # a scalar scale, without an axis, belongs to the whole tensor
        axis = {"axis": channels} if scale.ndim else {}
        return self.add("DequantizeLinear", [codes, self.constant(scale.numpy(), f"{label}.scale")], **axis)

    def folded_norm(self, node: fx.Node, layer: nn.Module) -> nn.Module | None:
        """The batch normalisation to fold into a layer: the only reader of its output, over its output channels."""
        # The second dimension is normalised; the channels of a linear layer are the last one.
        if len(node.users) != 1 or self.values[node].ndim != (2 if isinstance(layer, nn.Linear) else 4):
            return None
        if isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1:  # the groups share one dimension of the weight
            return None
        (reader,) = node.users
        norm = self.modules[reader.target] if reader.op == "call_module" else None
        return norm if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) and norm.running_mean is not None else None
