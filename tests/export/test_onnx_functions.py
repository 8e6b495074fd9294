"""ONNX files of functions of transformers: ONNX Runtime agrees for any number of images, or the export is refused."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from faqd_lib.export.onnx import OnnxExportError, export_onnx
from faqd_lib.quantization.network import quantize

SHAPE = (4, 6, 8)
IMAGES = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))


class Call(nn.Module):
    """A network that is one function of its images and, perhaps, of a parameter (4,)."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.vector = function, nn.Parameter(torch.linspace(-1, 1, 4))

    def forward(self, x):
        return self.function(x, self.vector)


def attend(x: torch.Tensor, vector: torch.Tensor, **options) -> torch.Tensor:
    q = x.flatten(2).unflatten(1, (2, 2)).mT  # (images, 2 heads, 48 tokens, 2)
    return F.scaled_dot_product_attention(q, q * 2, q - 1, **options)


def windows(x: torch.Tensor, _) -> torch.Tensor:
    """Windows of 3×4 pixels, whose number depends on the number of images, and back."""
    n, c, h, w = x.shape
    assert h % 3 == 0, "sizes may decide"
    x = x.view(n, c, h // 3, 3, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 12, c)
    x = x - x.mean(dim=1, keepdim=True)
    x = x.view(n, h // 3, w // 4, 3, 4, c).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(n, c, h, w) if len(x.shape) == 6 else x


def read_before(x: torch.Tensor, _) -> torch.Tensor:
    x = x * 2
    before = x.exp()
    return before - x.mul_(3)


FUNCTIONS = {
    "windows": windows,
    "roll": lambda x, _: torch.roll(x, shifts=(-2, 3), dims=(2, 3)),
    "pad": lambda x, _: F.pad(F.pad(x, (1, 2, 0, 3), value=2.0), (1, 1, 0, 2), "replicate"),
    "slices": lambda x, _: x[..., 1::3, :-1][:, 2, None] + x[:, -1:, :2, 2, None],
    "stack": lambda x, _: torch.stack([x[:, 0], x[:, 1] * 2], dim=-1).amax(-1),
    "unbind": lambda x, _: x.unbind(1)[-1] - x.unbind(dim=2)[0].sum(1, keepdim=True),
    "split": lambda x, _: x.split([1, 3], dim=1)[1],
    "class token": lambda x, v: torch.cat([v.view(1, 1, 4).expand(x.shape[0], -1, -1), x.flatten(2).mT], dim=1),
    "repeat": lambda x, v: x.flatten(2) + v.view(1, 4, 1).repeat(x.size(0), 1, 48),
    "images elsewhere": lambda x, _: x.permute(1, 0, 2, 3).reshape(x.size(0), -1),
    "layer norm": lambda x, _: F.layer_norm(x, (6, 8), eps=1e-3),
    "layer norm of channels": lambda x, v: F.layer_norm(x.permute(0, 2, 3, 1), (4,), v, v + 1, 1e-6),
    "group norm": lambda x, v: F.group_norm(x, 2, v, v - 1) + F.group_norm(x, 4),
    "batch norm": lambda x, v: F.batch_norm(x, v, v.abs() + 1, v, v + 2, eps=1e-3),
    "normalize": lambda x, _: F.normalize(x, dim=1) + F.normalize(x, p=2.0, dim=-1, eps=10.0),
    "norm": lambda x, v: x / (x.norm(p=2, dim=(2, 3), keepdim=True) + 1) + torch.norm(x, dim=1, keepdim=True),
    "einsum": lambda x, v: torch.einsum("n c h w, n d h w -> n c d", x, x),
    "addcmul": lambda x, v: torch.addcmul(v.view(1, 4, 1, 1), x, x).swapaxes(1, 3),
    "made by size": lambda x, _: x + torch.ones((x.shape[2], 1), device=x.device),
    "clamp": lambda x, _: x.clamp(min=-0.5) + torch.clamp(x, max=0.25) + x.clamp(-0.1, 0.1),
    "arithmetic": lambda x, v: (x @ x.mT).abs().sqrt().pow(2).exp().neg() / (3 - v.exp().sum()),
    "activations": lambda x, _: F.softplus(x) + F.mish(x) + F.hardswish(x) + F.gelu(x, approximate="tanh"),
    "attention": attend,
    "attention with a mask": lambda x, v: attend(x, v, attn_mask=torch.arange(48.0).view(1, 48), scale=0.2),
    "linear": lambda x, v: F.linear(x.permute(0, 2, 3, 1), v.view(1, 4) * 2, v[:1]),
    "conv2d": lambda x, v: F.conv2d(x, v.view(4, 1, 1, 1).expand(4, 1, 3, 3), v, 2, 1, groups=4),
    "made beside": lambda x, _: x + x.new_ones(6, 8).cumsum(0),
    "overwritten, and read by its new name": lambda x, _: F.relu((x * 2).add_(x)).sub_(0.5).div_(2),
    "read, then overwritten": read_before,
    "copied, then overwritten": lambda x, _: x.clone().mul_(2) + x,
    "softplus": lambda x, _: F.softplus(x, 2) + F.softplus(x, beta=0.5, threshold=20),
    "whole numbers": lambda x, _: x * torch.tensor(2) + torch.arange(8) * torch.tensor([True, False] * 4),
    "whole numbers for each image": lambda x, v: x.sum(3) * (v * 3).long().view(4, 1).expand(x.shape[0], 4, 6),
    "clamp by whole numbers": lambda x, _: x.clamp(min=torch.tensor(0)) - x.clamp(max=torch.tensor([1])),
    "clamp by tensors": lambda x, v: (
        x.clamp(v.view(4, 1, 1), v.view(4, 1, 1) + 0.5) - x.clamp(max=v.view(4, 1, 1)) * x.clamp(min=v.view(4, 1, 1))
    ),
    "max pool": lambda x, _: torch.max_pool2d(x, 3, 2, 1, 1, True),
    "unchanged": lambda x, _: x.float().to(torch.float32).clone().detach().contiguous() * 1,
}  # fmt: skip


def run(model: nn.Module, path, images: torch.Tensor = IMAGES) -> onnx.ModelProto:
    """Export a network and compare it with ONNX Runtime for one image and for several."""
    export_onnx(model, path, images.shape[1:])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for some in (images, images[:1]):
        with torch.no_grad():
            expected = model(some.clone())
        (found,) = session.run(None, {"images": some.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    return onnx.load(path)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(tmp_path, name):
    run(Call(FUNCTIONS[name]).eval(), tmp_path / "net.onnx")


class Attention(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **options)
        if self.attention.in_proj_bias is not None:
            nn.init.normal_(self.attention.in_proj_bias)
            nn.init.normal_(self.attention.out_proj.bias)

    def forward(self, x):
        tokens = x.flatten(2).mT
        first = self.attention.batch_first
        tokens = tokens if first else tokens.transpose(0, 1)
        out, _ = self.attention(tokens, tokens * 2, value=tokens - 1, need_weights=False)
        return out if first else out.transpose(0, 1)


@pytest.mark.parametrize("options", [{"batch_first": True}, {"batch_first": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("bits", [1, 4, 32])
def test_multihead_attention(tmp_path, options, bits):
    model = Attention(**options).eval()
    if bits < 32:
        quantize(model, bits, last_layer="quantize")
    stored = {tensor.name for tensor in run(model, tmp_path / "net.onnx").graph.initializer}
    assert ("attention.out_proj.levels" in stored) == (bits < 32)


class Standardised(nn.Conv2d):
    """A convolution with another forward."""

    def forward(self, x):
        return super().forward(x - 1)


class Reads(nn.Linear):
    """A linear layer whose forward calls the function."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_layers_with_a_forward_of_their_own_keep_their_bits(tmp_path, bits):
    model = nn.Sequential(Standardised(4, 6, 3, padding=1, groups=2), nn.Conv2d(6, 2, 1), Reads(8, 5), nn.Linear(5, 4))
    quantize(model, bits, last_layer="quantize", per_channel=True)
    before = copy.deepcopy(model.state_dict())
    stored = {tensor.name: tensor for tensor in run(model, tmp_path / "net.onnx").graph.initializer}
    kinds = {onnx.TensorProto.DataType.Name(stored[f"{layer}.levels"].data_type) for layer in range(4)}
    assert kinds == {{1: "INT2", 4: "INT4", 8: "INT8"}[bits]}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Masked(Attention):
    def forward(self, x):
        tokens = x.flatten(2).mT
        return self.attention(tokens, tokens, tokens, attn_mask=torch.zeros(48, 48))[0]


class Overwrites(Attention):
    def forward(self, x):
        tokens = x.flatten(2).mT.clone()
        tokens.add_(1)
        return self.attention(tokens, tokens, tokens)[0]


class Weights(Attention):
    def forward(self, x):
        tokens = x.flatten(2).mT
        return self.attention(tokens, tokens, tokens)[1]


@pytest.mark.parametrize(
    ("model", "message"),
    [(Masked(batch_first=True), "no attn_mask"), (Weights(batch_first=True), "attention weights"),
     (Overwrites(batch_first=True), "add_ .* overwrites a value that is read again"),
     (nn.Sequential(nn.Softplus(threshold=0.1)), "softplus must have threshold = 20 for ONNX, got 0.1"),
     (Call(lambda x, v: torch.add(x, 2, x)), "must have 2 argument.s. by position"),
     (Call(lambda x, v: attend(x, v, is_causal=True)), "attention must be"),
     (Call(lambda x, v: x[:2] * 2), "images would be parted|one tensor"),
     (Call(lambda x, v: x.roll(1, 0)), "images would be rolled"),
     (Call(lambda x, v: x.roll(1)), "give roll its dims"),
     (Call(lambda x, v: x.repeat(1, 2, 1, 1)), "repeating"),
     (Call(lambda x, v: F.pad(x, (1, 1, 1, 1), "circular")), "circular"),
     (Call(lambda x, v: x[x.mean((1, 2, 3)) > 0]), "no ONNX form|cannot take|one tensor"),
     (Call(lambda x, v: x.double()), "no ONNX form is known for double"),
     (Call(lambda x, v: x.to(torch.float64)), "conversion from"),
     (Call(lambda x, v: x.softmax(1, dtype=torch.float64)), "dtype"),
     (Call(lambda x, v: F.batch_norm(x, None, None, training=True)), "running statistics"),
     (Call(lambda x, v: F.normalize(x, p=1.0)), "p = 2"),
     (Call(lambda x, v: x / x.norm(p=1, dim=1, keepdim=True)), "p = 2"),
     (Call(lambda x, v: x / x.norm()), "p = 2"), (Call(lambda x, v: torch.addcmul(x, x, x, value=2)), "value = 1"),
     (Call(lambda x, v: x if x.mean().item() > 0 else -x), "cannot be traced"),
     (Call(lambda x, v: x if torch.equal(x, x.abs()) else -x), "cannot be traced"),
     (Call(lambda x, v: x if len(x) > 1 else -x), "cannot be traced"),
     (Call(lambda x, v: x if x.shape[0] > 1 else -x), "cannot be traced")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_what_has_no_form_is_refused(tmp_path, model, message):
    with pytest.raises(OnnxExportError, match=message):
        export_onnx(model.eval(), tmp_path / "net.onnx", SHAPE)
    assert not list(tmp_path.iterdir())


def test_an_unknown_function_names_the_module_that_calls_it(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(Call(lambda x, v: x.cumsum(1))))
    with pytest.raises(OnnxExportError, match=r"known for cumsum of Call \(1\.0\)"):
        export_onnx(model, tmp_path / "net.onnx", SHAPE)


def test_constants_are_computed_once(tmp_path):
    model = Call(lambda x, v: x * (v.exp() + v.cumsum(0)).view(1, 4, 1, 1))
    file = run(model, tmp_path / "net.onnx")
    assert [node.op_type for node in file.graph.node] == ["Mul", "Identity"]
    (constant,) = file.graph.initializer
    expected = (model.vector.exp() + model.vector.cumsum(0)).detach().numpy()
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(constant).ravel(), expected)
