"""ONNX files: low-bit initialisers, and ONNX Runtime gives the outputs of the network."""

import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from small_networks import BUILDERS, googlenet, vgg_with_dropout
from torch import nn
from torch.nn.utils import parametrize, prune

from faqd_lib.export.onnx import OnnxExportError, export_onnx
from faqd_lib.export.packed import load_packed, save_packed
from faqd_lib.models import build_model
from faqd_lib.quantization.network import calibrate, low_bit_weights, quantize
from faqd_lib.quantization.relu import QuantizedReLU

IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
STORAGE_BITS = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 8: 8}
STORAGE_TYPES = {2: "INT2", 4: "INT4", 8: "INT8"}


@pytest.fixture(autouse=True)
def own_random_state():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def with_statistics(model: nn.Module, images: torch.Tensor = IMAGES) -> nn.Module:
    """Give each batch normalisation its own statistics and factors, so that folding changes the weights."""
    with torch.no_grad(), parametrize.cached():  # each weight is quantized once
        for _ in range(3):
            model.train()(images * 2 + 1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-1.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model.eval()


def run(path, images: torch.Tensor) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", STORAGE_BITS)
def test_runtime_gives_the_same_logits_and_weights_take_their_bits(tmp_path, bits, per_channel):
    model = with_statistics(quantize(build_model("resnet8", 10, seed=1), bits, per_channel=per_channel))
    path = export_onnx(model, tmp_path / "net.onnx", (3, 32, 32))
    with torch.no_grad():
        expected = model(IMAGES)
    torch.testing.assert_close(run(path, IMAGES), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(run(path, IMAGES[:1]), expected[:1], rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    weights = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert len(weights) == 7
    for name, module in weights.items():
        tensor = stored[f"{name}.levels"]
        assert onnx.TensorProto.DataType.Name(tensor.data_type) == STORAGE_TYPES[STORAGE_BITS[bits]]
        needed = module.weight.numel() * STORAGE_BITS[bits] / 8
        size = len(tensor.raw_data) or 4 * len(tensor.int32_data)
        assert needed <= size <= 1.1 * needed + 1, name
        assert f"{name}.weight" not in stored
    assert not any(node.op_type == "BatchNormalization" for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_one_quantized_activation_is_exact(tmp_path, bits):
    model = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Flatten())
    quantize(model, activation_bits=bits)
    calibrate(model, IMAGES).eval()
    with torch.no_grad():
        expected = model(IMAGES)
        assert expected.unique().numel() == min(2**bits, expected.unique().numel())
    path = export_onnx(model, tmp_path / "relu.onnx", (3, 32, 32))
    assert torch.equal(run(path, IMAGES), expected)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert "QuantizeLinear" in kinds
    assert "DequantizeLinear" in kinds


def dyadic(weights: int, activations: int) -> nn.Module:
    """A quantized ResNet-8 in which every number is a small multiple of a power of two.

    Its sums and products are exact in float32, in any order. Values half way between two levels are then half way in
    every implementation, and all of them round half to even.
    """
    model = build_model("resnet8", 10)
    highest = {1: 1, 2: 1, 32: 3}.get(weights) or 2 ** (weights - 1) - 1
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            levels = torch.randint(-highest, highest + 1, layer.weight.shape)
            if weights == 1:
                levels = torch.where(levels < 0, -1, 1)
            size = levels.float().square().sum(list(range(1, levels.ndim))).mean().sqrt()
            layer.weight.data = levels / 2.0 ** size.log2().round()  # outputs as large as inputs
        elif isinstance(layer, nn.BatchNorm2d):
            layer.eps = 0.0
            layer.running_var = 4.0 ** torch.randint(0, 2, layer.running_var.shape)
            layer.running_mean = torch.randint(-4, 5, layer.running_mean.shape) / 4
            layer.weight.data = torch.randint(1, 3, layer.weight.shape) / 2 * (-1) ** torch.arange(len(layer.weight))
            layer.bias.data = torch.randint(-4, 5, layer.bias.shape) / 4
    model.fc.bias.data = torch.randint(-4, 5, model.fc.bias.shape) / 4
    quantize(model, weights, activations)
    for relu in model.modules():
        if isinstance(relu, QuantizedReLU):
            relu.step.data.fill_(2.0 ** (2 - activations))
    return model.eval()


@pytest.mark.parametrize("activations", [2, 4, 8])
@pytest.mark.parametrize("weights", [1, 2, 4, 8, 32])
def test_full_quantization_is_exact_where_arithmetic_is(tmp_path, weights, activations):
    images = torch.randint(-8, 9, (16, 3, 16, 16)) / 4
    model = dyadic(weights, activations)
    for low in low_bit_weights(model).values():
        assert torch.equal(low.scale, 2.0 ** low.scale.log2().round())
    with torch.no_grad():
        expected = model(images)
    assert len(expected.unique(dim=0)) == len(images)  # no image saturates the network
    path = export_onnx(model, tmp_path / "net.onnx", (3, 16, 16))
    assert torch.equal(run(path, images), expected)


TORCHVISION = {
    **{name: BUILDERS[name] for name in ("resnet", "mobilenet_v2", "mobilenet_v3", "densenet", "efficientnet")},
    "shufflenet": BUILDERS["shufflenet"], "googlenet": googlenet, "vgg": vgg_with_dropout,
}  # fmt: skip


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks(tmp_path, name):
    images = torch.randn(4, 3, 32, 32)
    with parametrize.cached():
        model = with_statistics(quantize(TORCHVISION[name](), 4), images)
        with torch.no_grad():
            expected = model(images)
    assert expected.std() > 0
    found = run(export_onnx(model, tmp_path / "net.onnx", (3, 32, 32)), images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_a_network_of_many_parts(tmp_path):
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU6(), nn.MaxPool2d(2))
            self.norm, self.second = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, 2, 2, dilation=2, groups=3)
            self.act, self.drop, self.sigmoid = nn.SiLU(), nn.Dropout(), nn.Sigmoid()
            self.pool, self.head = nn.AvgPool2d(2), nn.Linear(6, 4)

        def forward(self, x):
            x = self.norm(self.first(x))
            y = self.act(self.second(x))
            y = torch.relu(y + 0.25) * self.sigmoid(y)
            y = torch.cat([self.pool(y), nn.functional.adaptive_avg_pool2d(x, 4)], dim=2)
            return self.head(self.drop(y.mean((2, 3))))

    class Cut(nn.Module):
        def forward(self, x):
            return x.cumsum(1)

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm, self.out = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 2)

        def forward(self, x):
            return self.out(self.norm(self.inner(torch.flatten(nn.functional.relu(x.add(1).mul(0.5)), 1))))

    vectors = torch.randn(9, 5, 1, 1)
    model = quantize(Head(), 8, last_layer="quantize")
    with torch.no_grad():
        model.train()(vectors)
        expected = model.eval()(vectors)
    found = run(export_onnx(model, tmp_path / "head.onnx", (5, 1, 1)), vectors)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    model = with_statistics(quantize(Parts(), 4, 32))
    with torch.no_grad():
        expected = model(IMAGES)
    found = run(export_onnx(model, tmp_path / "parts.onnx", (3, 32, 32)), IMAGES)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # An unknown part is named, and nothing is written.
    with pytest.raises(OnnxExportError, match="no ONNX form is known for cumsum"):
        export_onnx(Cut(), tmp_path / "cut.onnx", (3, 32, 32))
    assert not (tmp_path / "cut.onnx").exists()


def test_shapes_pools_and_functions_of_every_kind(tmp_path):
    f = nn.functional

    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 6, (4, 3), padding="same", dilation=(1, 2))
            self.second, self.out = nn.Conv2d(6, 6, 3, padding="valid"), nn.Linear(54, 4)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            x = f.max_pool2d(self.relu(self.first(x)), 3, 2, padding=1, ceil_mode=True)
            n, c, h, w = x.size()
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(x.shape[0], -1, h, w)
            first, second, third = x.chunk(3, dim=1)
            x = torch.cat([third * 2, first, second], 1).permute(0, 1, 3, 2)
            x = f.avg_pool2d(f.leaky_relu(self.second(x) - 1), kernel_size=4, stride=4, count_include_pad=False)
            x = f.gelu(x) / (c // 3) + torch.tanh(x) * f.silu(x)
            return f.log_softmax(self.out(x.reshape(x.size(0), -1)), dim=1)

    model = quantize(Functions(), 4, last_layer="quantize").eval()
    for images in (IMAGES, IMAGES[:1]):
        with torch.no_grad():
            expected = model(images)
        found = run(export_onnx(model, tmp_path / "net.onnx", (3, 32, 32)), images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_metadata_goes_with_the_file(tmp_path):
    path = export_onnx(nn.Flatten(), tmp_path / "net.onnx", (3, 8, 8), metadata={"mean": [0.5], "made by": "ä"})
    assert {entry.key: entry.value for entry in onnx.load(path).metadata_props} == {"mean": "[0.5]", "made by": "ä"}


@pytest.mark.parametrize("shape", [(3, 8), (0, 8, 8), (3, 8.0, 8), (1, 3, 8, 8), (4, 8, 8)])
def test_a_shape_that_does_not_fit_is_named(tmp_path, shape):
    with pytest.raises(OnnxExportError, match="image_shape"):
        export_onnx(nn.Conv2d(3, 3, 1), tmp_path / "net.onnx", shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("weights", "activations"), [(1, 4), (2, 32), (8, 32)])
def test_a_network_from_a_packed_file_keeps_its_bits(tmp_path, weights, activations, dtype):
    model = with_statistics(calibrate(quantize(build_model("resnet8", 10), weights, activations), IMAGES)).to(dtype)
    path = save_packed(model, tmp_path / "net.safetensors")
    first = export_onnx(model, tmp_path / "first.onnx", (3, 32, 32))
    wrapped = nn.DataParallel(load_packed(path, build_model("resnet8", 10)))
    assert export_onnx(wrapped, tmp_path / "again.onnx", (3, 32, 32)).read_bytes() == first.read_bytes()


class Chunked(nn.Module):
    """Overwrites a piece of a value that is read again."""

    def forward(self, x):
        x = x + 1
        first, second = x.chunk(2, dim=2)
        return nn.functional.relu(first, inplace=True) + x.mean((2, 3), True) + second


class Parted(nn.Module):
    def forward(self, x):
        return x.chunk(2)[0]


class PerImage(nn.Module):
    def forward(self, x):
        return x / x.shape[0]


class AddsInPlace(nn.Module):
    """Overwrites a value that is read again; a trace records x + 1 for x += 1."""

    def forward(self, x):
        x = x * 2
        kept = x
        x += 1
        return x + kept


class ScalesAPiece(nn.Module):
    def forward(self, x):
        x = x * 2
        first, _, _ = x.chunk(3, dim=1)
        first *= 0.5
        return x


class ShiftsAView(nn.Module):
    def forward(self, x):
        x = x * 2
        flat = x.view(x.size(0), -1)
        flat -= 1
        return x


class AddsToACopy(nn.Module):
    """As a residual block with a method that overwrites; a trace records no other value for ``out``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        out = self.conv(x)
        out.add_(x)
        return nn.functional.relu(out).mean((2, 3))


class ScalesImages(nn.Module):
    def forward(self, x):
        x.mul_(3)
        return x


class Standardises(nn.Module):
    def forward(self, x):
        x.sub_(0.5)
        x.div_(2)
        return x


class AlwaysDrops(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    model[0].register_forward_hook(lambda _module, _inputs, output: output + 1)
    return model


class Joined(nn.Module):
    def forward(self, x):
        return torch.cat(x.chunk(3, 1), 1)


class ByName(nn.Sequential):
    def forward(self, x):
        return self[0](input=x)


class Scaled(nn.Module):
    def forward(self, x):
        return torch.add(x, x, alpha=2)


class Aliased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = x + 1
        return self.relu(y) + y


class AliasedBehind(Aliased):
    """Puts a module between that returns its input's memory in evaluation, such as a dropout."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.between = between

    def forward(self, x):
        y = x + 1
        return self.relu(self.between(y)) + y


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Together(nn.Module):
    def forward(self, x):
        return x.flatten(0)


@pytest.mark.parametrize(
    ("network", "named"),
    [(Scaled(), "alpha"), (Aliased(), "overwrites"),
     (AliasedBehind(nn.Dropout()), "overwrites"), (AliasedBehind(nn.Sequential(nn.Identity())), "overwrites"),
     (Chunked(), "overwrites"), (Parted(), "flattened together, or counted"),
     (nn.Sequential(nn.Bilinear(8, 8, 2)), "cannot take"), (PerImage(), "number of images"),
     (AddsInPlace(), "read again"), (ScalesAPiece(), "read again"), (ShiftsAView(), "read again"),
     (AddsToACopy(), "add_ .* overwrites a value that is read again"), (ScalesImages(), "mul_ .* overwrites"),
     (Standardises(), "sub_ .* overwrites"), (AlwaysDrops(), "read again"),
     (hooked(), "read again"), (Joined(), "list of tensors"),
     (ByName(nn.Conv2d(3, 3, 1)), "by position"),
     (nn.Sequential(nn.MaxPool2d(2, return_indices=True)), "one tensor"),
     (nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")), "reflect"),
     (nn.Sequential(nn.Softmax()), "give it a dim"),
     (Pair(), "one tensor"), (Together(), "flattened"), (nn.Sequential(nn.AvgPool2d(2, divisor_override=3)), "divisor"),
     (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)), "running statistics")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_what_would_be_wrong_is_refused(tmp_path, network, named):
    with pytest.raises(OnnxExportError, match=named):
        export_onnx(network, tmp_path / "net.onnx", (3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_a_layer_called_twice_and_a_norm_behind_three_dimensions(tmp_path):
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line, self.norm, self.out = nn.Linear(8, 8), nn.BatchNorm1d(3), nn.Linear(8, 5)

        def forward(self, x):
            return self.out(self.norm(self.line(self.line(x.mean(3)))))

    tokens = torch.randn(6, 3, 8, 4)
    model = quantize(Tokens(), 4)
    with torch.no_grad():
        for _ in range(3):
            model.train()(tokens * 2 + 1)
        expected = model.eval()(tokens)
    found = run(export_onnx(model, tmp_path / "net.onnx", (3, 8, 4)), tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def settle(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Give each batch normalisation other statistics, factors and offsets than its initial ones."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _ in range(3):
            model.train()(images * 2 + 1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                module.bias.copy_(torch.rand(module.bias.shape, generator=generator) - 0.5)
    return model.eval()


class Shared(nn.Module):
    """One convolution, called twice; a different normalisation follows each call, or one call only."""

    def __init__(self, first: bool, second: bool) -> None:
        super().__init__()
        self.conv, self.line = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Linear(3 * 64, 4)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) if there else nn.Identity() for there in (first, second))
        self.relu, self.flatten = nn.ReLU(), nn.Flatten()

    def forward(self, x):
        for norm in self.norms:
            x = self.relu(norm(self.conv(x)))
        return self.line(self.flatten(x))


@pytest.mark.parametrize("bits", [1, 4, 32])
@pytest.mark.parametrize("norms", [(True, True), (True, False), (False, True)])
def test_a_shared_layer_has_the_normalisation_of_each_call(tmp_path, bits, norms):
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model = settle(Shared(*norms) if bits == 32 else quantize(Shared(*norms), bits), images)
    with torch.no_grad():
        expected = model(images)
    path = export_onnx(model, tmp_path / "net.onnx", (3, 8, 8))
    torch.testing.assert_close(run(path, images), expected, rtol=1e-4, atol=1e-5)
    levels = [tensor.name for tensor in onnx.load(path).graph.initializer if tensor.name.endswith("levels")]
    assert len(levels) == len(set(levels)) == (0 if bits == 32 else 1)  # the integers are stored once


class ReadTwice(nn.Module):
    """A layer with a batch normalisation. A function reads the layer's weight as well."""

    def __init__(self, linear: bool, module_first: bool) -> None:
        super().__init__()
        self.module_first, self.relu = module_first, nn.ReLU()
        self.layer, self.norm = (
            (nn.Linear(3, 3), nn.BatchNorm1d(3)) if linear else (nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        )
        nn.init.uniform_(self.norm.weight, 2, 3)

    def forward(self, x):
        layer, f = self.layer, nn.functional
        x = x.mean((2, 3)) if isinstance(layer, nn.Linear) else x
        for is_module in (self.module_first, not self.module_first):
            if is_module:
                x = self.norm(layer(x))
            elif isinstance(layer, nn.Linear):
                x = f.linear(x, layer.weight, layer.bias)
            else:
                x = f.conv2d(x, layer.weight, layer.bias, padding=1)
            x = self.relu(x)
        return x


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("module_first", [True, False])
@pytest.mark.parametrize("linear", [True, False])
def test_a_weight_with_and_without_a_folded_normalisation(tmp_path, linear, module_first, bits):
    images = torch.randn(5, 3, 8, 8)
    model = ReadTwice(linear, module_first)
    model = settle(model if bits == 32 else quantize(model, bits, last_layer="quantize"), images)
    with torch.no_grad():
        expected = model(images)
    path = export_onnx(model, tmp_path / "net.onnx", (3, 8, 8))
    torch.testing.assert_close(run(path, images), expected, rtol=1e-4, atol=1e-5)
    part = "weight" if bits == 32 else "scale"
    names = [tensor.name for tensor in onnx.load(path).graph.initializer if tensor.name.startswith(f"layer.{part}")]
    assert names == [f"layer.{part}", f"layer.{part}.2"]


def test_a_norm_of_images_behind_a_linear_layer_is_not_folded(tmp_path):
    images = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(2))
    model = settle(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm2d(3)), images)
    with torch.no_grad():
        expected = model(images)
    found = run(export_onnx(model, tmp_path / "net.onnx", (3, 3, 3)), images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_network_is_left_as_it_was(tmp_path):
    model = calibrate(quantize(build_model("resnet8", 10), 1, 4), IMAGES).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_onnx(model, tmp_path / "net.onnx", (3, 32, 32))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_control_flow_that_depends_on_data_is_an_error(tmp_path):
    class Moody(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(OnnxExportError, match="cannot be traced"):
        export_onnx(Moody(), tmp_path / "net.onnx", (3, 8, 8))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(OnnxExportError, match="needs onnx"):
        export_onnx(nn.Flatten(), tmp_path / "net.onnx", (3, 8, 8))


def test_a_float_network_is_exported_as_well(tmp_path):
    model = with_statistics(build_model("resnet8", 10, seed=1))
    path = export_onnx(model, tmp_path / "net.onnx", (3, 32, 32))
    with torch.no_grad():
        np.testing.assert_allclose(run(path, IMAGES).numpy(), model(IMAGES).numpy(), rtol=1e-3, atol=1e-3)


def decoder(groups: int = 1, **options) -> nn.Module:
    """Halves the size of a map and doubles it again, as segmentation networks do."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3, 2, 1, groups=groups, **options), nn.BatchNorm2d(4), nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2, 2),
    )  # fmt: skip


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("groups", "options"), [(1, {}), (2, {}), (4, {"output_padding": 1}), (1, {"dilation": 2})])
@pytest.mark.parametrize("bits", [1, 4, 32])
def test_transposed_convolutions(tmp_path, bits, groups, options, per_channel):
    model = decoder(groups, **options)
    if bits < 32:
        quantize(model, bits, per_channel=per_channel, last_layer="quantize")
    with_statistics(model)
    path = export_onnx(model, tmp_path / "net.onnx", (3, 32, 32))
    with torch.no_grad():
        expected = model(IMAGES)
    torch.testing.assert_close(run(path, IMAGES), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    loaded = (
        load_packed(save_packed(model, tmp_path / "net.safetensors"), decoder(groups, **options))
        if bits < 32
        else model
    )
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), expected)
    folded = not any(node.op_type == "Mul" for node in onnx.load(path).graph.node)
    assert folded == (groups == 1)  # the groups of a transposed convolution share their scales


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize(
    "call",
    [lambda up, x: up(x[..., ::2, ::2], output_size=x.shape[2:]), lambda up, x: up(x, (16, 15)), lambda up, x: up(x)],
    ids=["keyword", "position", "none"],
)
def test_transposed_convolutions_to_a_given_size(tmp_path, call, bits):
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 2, 3, 2, 1)

        def forward(self, x):
            return call(self.up, x)

    images = torch.randn(2, 3, 8, 8)
    model = Doubles().eval() if bits == 32 else quantize(Doubles(), bits, last_layer="quantize").eval()
    with torch.no_grad():
        expected = model(images)
    found = run(export_onnx(model, tmp_path / "net.onnx", (3, 8, 8)), images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def computed(by) -> nn.Sequential:
    """A network whose first weight is computed by hooks before each pass."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    by(model[0])
    model(torch.ones(2, 3, 8, 8))
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize(
    ("by", "message"),
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 1), r"weight of 0 .Conv2d. is pruned .*prune\.remove"),
        (lambda layer: prune.l1_unstructured(layer, "bias", 1), r'the bias of 0 .Conv2d. is pruned .*layer, "bias"'),
        (nn.utils.weight_norm, r"is computed by torch.nn.utils.weight_norm: .*remove_weight_norm\(layer"),
        (nn.utils.spectral_norm, r"is computed by torch.nn.utils.spectral_norm: .*remove_spectral_norm\(layer"),
        (lambda layer: vars(layer).update(kept=layer.weight * 2), "the kept of 0 .Conv2d. is an intermediate result"),
    ],
    ids=["pruned", "pruned bias", "weight norm", "spectral norm", "intermediate"],
)
def test_weights_that_are_computed_before_each_pass_are_named(tmp_path, by, message, bits):
    model = computed(by) if bits == 32 else quantize(computed(by), bits, overrides={"0": 32}, last_layer="quantize")
    with pytest.raises(OnnxExportError, match=message):
        export_onnx(model, tmp_path / "net.onnx", (3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_a_spectral_norm_that_never_ran_is_hinted_at(tmp_path):
    model = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 3, 1)))
    with pytest.raises(OnnxExportError, match="remove_spectral_norm"):
        export_onnx(model, tmp_path / "net.onnx", (3, 8, 8))


def test_a_module_that_cannot_be_traced_is_named(tmp_path):
    class Chooses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Sequential(Chooses()))
    with pytest.raises(OnnxExportError, match=r"the module '1\.0' \(Chooses\) cannot be traced"):
        export_onnx(model, tmp_path / "net.onnx", (3, 8, 8))


def test_a_second_call_that_cannot_be_traced_is_named(tmp_path):
    class Chooses(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x if self.calls % 2 or x.sum() > 0 else -x

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chooses = Chooses()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.chooses(self.chooses(x))

    with pytest.raises(OnnxExportError, match=r"the module 'chooses' \(Chooses\) cannot be traced"):
        export_onnx(Twice(), tmp_path / "net.onnx", (3, 8, 8))


def test_an_averaged_model_is_exported(tmp_path):
    model = with_statistics(quantize(build_model("resnet8", 10, seed=1), 2))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    path = export_onnx(averaged.eval(), tmp_path / "net.onnx", (3, 32, 32))
    with torch.no_grad():
        expected = model(IMAGES)
    torch.testing.assert_close(run(path, IMAGES), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class _InPlace(nn.Module):
    """A forward that overwrites, and reads nothing that was overwritten."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 4, 3), forward

    def forward(self, x):
        return self.how(self.conv(x))


def _sizes_unpacked(x):
    n, c, h, w = x.shape
    x = x.add_(1)
    return x.view(n, c * h * w)


def _pieces_of_a_chunk(x):
    left, right = x.chunk(2, 1)
    return torch.cat([left.add_(1), right], 1)


@pytest.mark.parametrize(
    "forward",
    [lambda x: x.mul_(2).view(x.shape[0], -1), _sizes_unpacked, _pieces_of_a_chunk],
    ids=["size", "sizes", "chunk"],
)
def test_sizes_and_other_pieces_are_not_overwritten(tmp_path, forward):
    images = torch.randn(2, 3, 6, 6)
    model = _InPlace(forward).eval()
    with torch.no_grad():
        expected = model(images)
    found = run(export_onnx(model, tmp_path / "net.onnx", (3, 6, 6)), images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
