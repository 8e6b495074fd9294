"""Export a quantized network to ONNX: low-bit weights, folded batch normalisation, quantized activations.

- Weights become low-bit initialisers behind a ``DequantizeLinear``: INT2 for 1 and 2 bits (opset 25), INT4 for 3 and 4
  bits (opset 21), INT8 for 5 to 8 bits. Layers compute in float32.
- A batch normalisation behind a layer is folded: its factors into the scales, one an output channel, and its offsets
  into the bias.
- A quantized ReLU becomes ``Min``, ``QuantizeLinear`` to UINT8 and ``DequantizeLinear``. UINT8 holds all levels of up
  to 8 bits.

:mod:`faqd_lib.export.onnx_tracer` traces the network; onnx and ml_dtypes must be installed.
:mod:`faqd_lib.export.onnx_operators` lists what can be exported. The list covers this project's networks, and the
convolutional networks and transformers of torchvision and timm that ``tests/quantization/test_families.py`` names. Any
other part raises an error that names it. The file is made for images of one shape.
"""

import copy
import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ..quantization.network import fix_weights, low_bit_weights, unwrapped, why_not_copied
from ..utils.files import atomic_write
from ..utils.messages import first_line
from .onnx_operators import ALIASES, FUNCTIONS, KEYWORDS, MODULES, Handler, function_name
from .onnx_tracer import Tracer
from .onnx_writer import OnnxExportError, Values, Writer, packages
from .packed import check_json, warn_of_uncalibrated

__all__ = ["OnnxExportError", "export_onnx"]


def export_onnx(
    model: nn.Module, path: str | Path, image_shape: Sequence[int], *, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write a network to an ONNX file, atomically, and return ``path``. The network itself is not changed.

    The graph has one input ``images`` (N, channels, height, width) and one output ``logits``, float32. A UserWarning
    names activation steps that are neither calibrated nor trained.

    Args:
        model: a quantized network, one loaded from a packed file, or a float network. It is exported in evaluation
            mode, without wrappers such as DataParallel and that of ``torch.compile``.
        path: path of the file, by convention ``*.onnx``.
        image_shape: (channels, height, width) of one input image. The number of images stays free.
        metadata: values that belong to the network, such as class names, mean and deviation of the pixels. They become
            metadata properties of the model: text unchanged, everything else as JSON.

    Raises:
        OnnxExportError: a module or function is unknown, control flow depends on data, or the traced network gives
            other outputs. Also: a weight is pruned or under the old weight norm, the network takes no images of that
            shape, or a package is missing.
        ValueError: a weight was changed after it was loaded from a packed file, or the metadata is not JSON.
        OSError: the file could not be written.
    """
    onnx, _ = packages()
    check_json("metadata", metadata)
    if len(image_shape) != 3 or not all(isinstance(size, int) and size > 0 for size in image_shape):
        raise OnnxExportError(f"image_shape must be (channels, height, width) of one image, got {image_shape!r}")
    model = unwrapped(model)
    warn_of_uncalibrated(model)
    if reason := why_not_copied(model):
        raise OnnxExportError(reason)
    hooked = copy.deepcopy(model).cpu()
    quantized = low_bit_weights(hooked)  # before the conversion to float32
    fix_weights(hooked.float().eval(), quantized)
    model = copy.deepcopy(hooked)
    for module in model.modules():  # traced without hooks, so that _check_trace notices them
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    with torch.no_grad():
        _check_images(hooked, image_shape)
        tracer = Tracer(lambda module: _module_handler(module) is not None, FUNCTIONS, image_shape)
        try:
            graph = tracer.trace(model)
        except (fx.proxy.TraceError, TypeError, RuntimeError) as error:  # len() of a traced value raises RuntimeError
            raise OnnxExportError(f"{tracer.where(model)} cannot be traced: {first_line(error)}") from error
        traced = fx.GraphModule(model, graph)
        (result,) = graph.output_node().args
        two, three = (_values(traced, images, image_shape) for images in (2, 3))
        if not isinstance(result, fx.Node) or not isinstance(two[result], torch.Tensor):
            raise OnnxExportError("the network must return one tensor")
        if two[result].shape[:1] != (2,) or three[result].shape != (3, *two[result].shape[1:]):
            raise OnnxExportError(
                f"the network must return one tensor (images, …), got {tuple(two[result].shape)} for 2 images: images "
                "are flattened together, or counted by another dimension"
            )
        _check_trace(hooked, traced, image_shape)
        writer = Writer(model, quantized, two, three)
        for node in graph.nodes:
            # Skipped: batch normalisations folded before, tuples whose pieces are written one by one, constant sizes.
            if node.op in ("output", "get_attr") or node in writer.names or not isinstance(two[node], torch.Tensor):
                continue
            if node.users or function_name(node) != "getitem":  # not an unused piece of a tuple
                writer.names[node] = "images" if node.op == "placeholder" else _write_call(writer, node)
    writer.add("Identity", [writer.names[result]], output="logits")
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    images = helper.make_tensor_value_info("images", real, ["N", *image_shape])
    logits = helper.make_tensor_value_info("logits", real, ["N", *two[result].shape[1:]])
    constants = list(writer.constants.values())
    made = helper.make_graph(writer.nodes, type(model).__name__, [images], [logits], constants)
    has_int2 = any(tensor.data_type == onnx.TensorProto.INT2 for tensor in constants)
    opset, version = (helper.make_opsetid("", 25), 13) if has_int2 else (helper.make_opsetid("", 21), 11)
    file = helper.make_model(made, opset_imports=[opset], producer_name="faqd", ir_version=version)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
    helper.set_model_props(file, texts)
    onnx.checker.check_model(file)
    return atomic_write(Path(path), lambda temporary: temporary.write_bytes(file.SerializeToString()))


def _check_images(model: nn.Module, image_shape: Sequence[int]) -> None:
    try:
        model(torch.zeros(2, *image_shape))
    except (RuntimeError, AssertionError, TypeError) as error:
        raise OnnxExportError(
            f"the network cannot take images of image_shape {tuple(image_shape)}: {first_line(error)}"
        ) from error


def _values(traced: fx.GraphModule, images: int, image_shape: Sequence[int]) -> Values:
    interpreter = fx.Interpreter(traced, garbage_collect_values=False)
    interpreter.run(torch.zeros(images, *image_shape))
    return interpreter.env


def _check_trace(model: nn.Module, traced: nn.Module, image_shape: Sequence[int]) -> None:
    """Raise OnnxExportError unless both give the same outputs: a trace lacks hooks and overwritten values."""
    images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        expected, found = model(images.clone()), traced(images.clone())
    if not isinstance(expected, torch.Tensor) or not torch.allclose(
        found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()), equal_nan=True
    ):
        raise OnnxExportError(
            "traced, the network gives other outputs. It overwrites a value that is read again (write x = x + y "
            "for x += y), drops at random in evaluation (give F.dropout training=self.training), or has hooks, such as "
            "that of torch.nn.utils.spectral_norm (take it off by torch.nn.utils.remove_spectral_norm)"
        )


def _module_handler(module: nn.Module) -> Handler | None:
    """The handler of a module's class, or of a base class whose ``forward`` it keeps."""
    for kind, handler in MODULES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return handler
    return None


def _handler(writer: Writer, node: fx.Node) -> Handler | None:
    if node.op == "call_module":
        return _module_handler(writer.modules[node.target])
    return FUNCTIONS.get(function_name(node))


def _write_call(writer: Writer, node: fx.Node) -> str:
    handler, module, inplace = _handler(writer, node), None, False
    if node.op == "call_module":
        module = writer.modules[node.target]
        what, inplace = type(module).__name__, getattr(module, "inplace", False)
    else:
        what = function_name(node)
        # x.add_(1) and others: torch ends the names of methods that overwrite by an underscore.
        overwrites = node.target in (operator.iadd, operator.imul) or str(what).endswith("_")
        inplace = node.kwargs.get("inplace", False) or overwrites
        if unknown := {name for name, value in node.kwargs.items() if value is not None} - KEYWORDS:
            raise OnnxExportError(f"{what} with {', '.join(sorted(unknown))} is not known here (node {node.name})")
    if handler is None:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        inside = f" of {stack[-1][1].__name__} ({stack[-1][0]})" if stack and stack[-1][0] else ""
        known = ", ".join(sorted(FUNCTIONS))
        raise OnnxExportError(f"no ONNX form is known for {what}{inside} (node {node.name}); known are {known}")
    if not node.args and "tensors" not in node.kwargs:
        raise OnnxExportError(f"{what} (node {node.name}): give its input by position, not by name")
    if inplace and handler not in ALIASES and isinstance(node.args[0], fx.Node):
        same_memory, order = _aliases(writer, node.args[0]), list(node.graph.nodes)
        readers = {user for alias in same_memory for user in alias.users} - {node, *same_memory}
        readers -= set(order[: order.index(node)])  # these have read what is overwritten now
        # Sizes are no tensors, and stay as they are. An attention returns a tuple.
        if any(isinstance(value, torch.Tensor) or type(value) is tuple for value in map(writer.values.get, readers)):
            raise OnnxExportError(
                f"{what} (node {node.name}) overwrites a value that is read again: use inplace=False, or write "
                "x = x + y for x.add_(y)"
            )
    return handler(writer, node, module)


def _aliases(writer: Writer, node: fx.Node) -> list[fx.Node]:
    """All nodes in the memory of ``node``: a dropout or a flattening returns its input's memory."""
    parts = []  # pieces of chunk, split or unbind on the way: other pieces do not overlap with them
    while _handler(writer, node) in ALIASES:
        if function_name(node) == "getitem" and type(writer.values[node.args[0]]) is tuple:
            parts.append(node)
        (node, *_) = node.all_input_nodes
    wholes, found = {part.args[0] for part in parts}, [node]
    for alias in found:
        found += [
            user
            for user in alias.users
            if _handler(writer, user) in ALIASES
            and (isinstance(writer.values[user], torch.Tensor) or type(writer.values[user]) is tuple)  # no sizes
            and (user in parts or alias not in wholes)
        ]
    return found
