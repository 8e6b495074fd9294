"""Networks with one prediction a pixel: packed files give the same bits, ONNX Runtime the same logits."""

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from faqd_lib.export.onnx import OnnxExportError, export_onnx
from faqd_lib.export.packed import load_packed, save_packed
from faqd_lib.models import build_model
from faqd_lib.quantization.network import calibrate, quantize

IMAGES = torch.randn(2, 3, 37, 50, generator=torch.Generator().manual_seed(0))  # no multiples of the strides


def outputs(path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.fixture(scope="module")
def student() -> nn.Module:
    """A 4W4A network with statistics of batch normalisation, and calibrated steps."""
    model = quantize(build_model("linknet8", 11, seed=1), 4, 4)
    calibrate(model, IMAGES)
    with torch.no_grad():
        model.train()(IMAGES * 2 + 1)
    return model.eval()


@torch.no_grad()
def test_a_packed_network_gives_the_same_bits(student, tmp_path):
    path = tmp_path / "net.safetensors"
    save_packed(student, path, architecture={"name": "linknet8", "num_classes": 11})
    assert torch.equal(load_packed(path)(IMAGES), student(IMAGES))
    assert path.stat().st_size < 4 * sum(parameter.numel() for parameter in student.parameters()) / 5


@torch.no_grad()
def test_runtime_gives_the_same_logits_and_classes(student, tmp_path):
    path = export_onnx(student, tmp_path / "net.onnx", (3, 37, 50))
    expected, found = student(IMAGES), outputs(path, IMAGES)
    assert found.shape == (2, 11, 37, 50)
    # A value at the border of two levels of a 4-bit activation may round to the other one.
    assert (found - expected).abs().mean() < 1e-3 * expected.abs().mean()
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.99


class Resized(nn.Module):
    def __init__(self, **how) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, **self.how)


@pytest.mark.parametrize(
    "how",
    [
        {"size": (23, 30)}, {"scale_factor": 2}, {"scale_factor": 2, "mode": "bilinear"},
        {"size": (23, 30), "mode": "bilinear"}, {"size": (5, 7), "mode": "bilinear", "align_corners": False},
    ],
)  # fmt: skip
def test_resized_maps(tmp_path, how):
    images = torch.rand(2, 3, 12, 15, generator=torch.Generator().manual_seed(1))
    found = outputs(export_onnx(Resized(**how), tmp_path / "net.onnx", (3, 12, 15)), images)
    exact = how.get("mode", "nearest") == "nearest"
    torch.testing.assert_close(found, F.interpolate(images, **how), rtol=0, atol=0 if exact else 1e-5)


@pytest.mark.parametrize(
    ("before", "how", "operators"),
    [
        ((14, 14), {"size": (2, 2)}, ["Gather", "Gather"]), ((20, 14), {"size": (12, 2)}, ["Gather", "Gather"]),
        ((10, 20), {"scale_factor": (1, 0.6)}, ["Gather", "Gather"]), ((12, 15), {"size": (23, 30)}, ["Resize"]),
    ],
)  # fmt: skip
def test_nearest_pixels_are_torchs(tmp_path, before, how, operators):
    """The pixels are numbered. From 14 to 2, ONNX Runtime's Resize takes pixel 6 where torch takes pixel 7."""
    images = torch.arange(1.0 * before[0] * before[1]).view(1, 1, *before)
    path = export_onnx(Resized(**how), tmp_path / "net.onnx", (1, *before))
    written = [node.op_type for node in onnx.load(path).graph.node]
    assert [kind for kind in written if kind != "Identity"] == operators
    assert torch.equal(outputs(path, images), F.interpolate(images, **how))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"size": (4, 4), "mode": "bicubic"}, "known here for nearest and bilinear"),
        ({"size": (4, 4), "mode": "bilinear", "align_corners": True}, "without align_corners"),
        ({"scale_factor": 1.4}, "gives no whole pixels"),
    ],
)
def test_other_resizing_is_refused(tmp_path, how, message):
    with pytest.raises(OnnxExportError, match=message):
        export_onnx(Resized(**how), tmp_path / "net.onnx", (3, 12, 15))
