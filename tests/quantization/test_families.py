"""Families of networks through every station: quantize, find taps, one distillation step, pack, load, export.

A table of whole networks of torchvision and timm at 1 bit:

    PYTHONPATH=tests python tests/quantization/test_families.py [name …]
"""

import copy
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnxruntime
import pytest
import torch
from small_networks import BUILDERS, CLASSES, tv
from torch import nn

from faqd_lib.export.onnx import OnnxExportError, export_onnx
from faqd_lib.export.packed import load_packed, save_packed
from faqd_lib.models import FeatureTap, stage_taps
from faqd_lib.quantization.description import describe
from faqd_lib.quantization.network import calibrate, quantize, quantized_weights
from faqd_lib.training.objective import DistillationObjective

TAPS = {
    "resnet": ["relu", "layer1", "layer2"],
    "mobilenet_v2": ["features.1", "features.3", "features.6"],
    "mobilenet_v3": ["features.0", "features.1", "features.4"],
    "efficientnet": ["features.1", "features.2", "features.4"],
    "regnet": ["stem", "trunk_output.block1", "trunk_output.block2"],
    "shufflenet": ["conv1", "maxpool", "stage2", "stage3"],
    "densenet": ["features.relu0", "features.denseblock1", "features.denseblock2", "features.denseblock3"],
    "vgg": ["features.2", "features.9", "features.13", "head.0"],
    "convnext": ["features.1", "features.3", "features.5"],
    "vit": [f"encoder.layers.encoder_layer_{block}" for block in range(3)],
    "swin": ["features.1@bhwc", "norm@bhwc"],
}
TIMM = ("test_resnet", "test_vit", "test_convnext")  # timm's own tiny networks


def build(builder: Callable[[], nn.Module]) -> nn.Module:
    """A network with random weights, also where the library begins at zero: gradients would stop there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = builder()
        for name, parameter in model.named_parameters():
            if "bias" not in name and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        return model.eval()


def pictures(size: int) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.eval()(images)


def step(student: nn.Module, teacher: nn.Module, images: torch.Tensor, taps: list[str]) -> None:
    """One step of distillation; every latent weight has a finite gradient."""
    objective, optimizer = DistillationObjective("mse", "fa"), torch.optim.SGD(student.parameters(), lr=1e-3)
    with FeatureTap(student, taps) as of_student, FeatureTap(teacher, taps) as of_teacher:
        with torch.no_grad():
            target = teacher(images)
        logits = student.train()(images)
        terms = objective(logits, of_student.features, target, of_teacher.features)
    assert terms["total"].isfinite()
    assert terms["affinity"] > 0
    terms["total"].backward()
    latent = {name: weight for name, (_, weight) in quantized_weights(student).items()}
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in latent.values())
    before = {name: weight.detach().clone() for name, weight in latent.items()}
    optimizer.step()
    assert sum(not torch.equal(before[name], weight) for name, weight in latent.items()) > len(latent) / 2


def through_all_stations(builder: Callable[[], nn.Module], size: int, bits: int, folder: Path) -> str:
    """Take one network through every station; "exported", or why it is not."""
    teacher, images = build(builder), pictures(size)
    taps = stage_taps(teacher, images)
    student = quantize(copy.deepcopy(teacher), bits)
    step(student, teacher, images, taps)
    expected = outputs(student, images)
    assert expected.isfinite().all()
    assert expected.std() > 0
    packed = load_packed(save_packed(student, folder / "packed.safetensors"), build(builder))
    assert torch.equal(outputs(packed, images), expected)
    try:
        file = export_onnx(student, folder / "network.onnx", images.shape[1:])
    except OnnxExportError as error:
        return str(error)
    for one in (images, images[:1]):
        found = run(file, one)
        assert (found - expected[: len(one)]).abs().max() <= 1e-4 * expected.abs().max()
    return "exported"


def run(file: Path, images: torch.Tensor) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("family", BUILDERS)
def test_a_family_goes_through_every_station(tmp_path, family, bits):
    assert through_all_stations(BUILDERS[family], 32, bits, tmp_path) == "exported"


@pytest.mark.parametrize("family", BUILDERS)
def test_taps_of_every_family(family):
    assert stage_taps(build(BUILDERS[family]), pictures(32)) == TAPS[family]


@pytest.mark.parametrize("name", TIMM)
def test_timms_networks_go_through_every_station(tmp_path, name):
    timm = pytest.importorskip("timm")
    options = {"img_size": 64} if name == "test_vit" else {}
    builder = partial(timm.create_model, name, num_classes=CLASSES, **options)
    assert through_all_stations(builder, 64, 1, tmp_path) == "exported"


def test_activations_are_quantized_where_a_quantizer_exists_and_the_others_are_listed():
    images = pictures(32)
    model = calibrate(quantize(build(BUILDERS["mobilenet_v3"]), 4, 4), images)
    rows = describe(model, images)
    bits = {kind: {row.bits for row in rows if row.kind == kind} for kind in ("QuantizedReLU", "Hardswish")}
    assert bits == {"QuantizedReLU": {4}, "Hardswish": {32}}


@pytest.mark.parametrize("family", ["efficientnet", "convnext", "vit"])
def test_activation_bits_of_a_network_without_relu_are_refused(family):
    model = build(BUILDERS[family])
    with pytest.raises(ValueError, match=r"(SiLU|GELU), which have negative values\. Leave activation_bits at 32"):
        quantize(model, 4, 4)
    assert not quantized_weights(model)


def test_the_joint_projection_of_an_attention_is_listed_as_float():
    rows = {row.layer: row for row in describe(quantize(build(BUILDERS["vit"]), 1))}
    attention = rows["encoder.layers.encoder_layer_0.self_attention"]
    assert attention.bits == 32
    assert attention.size == 4 * (3 * 32 * 32 + 3 * 32)
    assert attention.note == "in_proj_weight is no Linear layer and stays float"
    assert rows["encoder.layers.encoder_layer_0.self_attention.out_proj"].bits == 1


class Gelu(nn.Module):
    """As timm's: named like torch's module, and no subclass of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(x)


def test_an_activation_module_of_another_library_is_listed():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), Gelu())
    assert [(row.layer, row.kind, row.bits) for row in describe(model)] == [("0", "Conv2d", 32), ("1", "Gelu", 32)]
    assert len(describe(model, pictures(4))) == 2  # its call of F.gelu is not listed a second time
    with pytest.raises(ValueError, match="its activations are 1 Gelu"):
        quantize(model, 1, 4)


def _whole_networks() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    def small_vgg() -> nn.Module:  # without the hundred million weights of its classifier
        model = tv.vgg11_bn(num_classes=CLASSES, init_weights=False)
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, CLASSES)
        return model

    found: dict[str, tuple[Callable[[], nn.Module], int]] = {
        name: (partial(getattr(tv, name), num_classes=CLASSES), 64)
        for name in ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large",
                     "efficientnet_b0", "efficientnet_v2_s", "shufflenet_v2_x1_0", "regnet_y_400mf",
                     "densenet121", "convnext_tiny", "swin_t", "swin_v2_t", "squeezenet1_1")
    }  # fmt: skip
    found["vgg11_bn"] = small_vgg, 64
    found["googlenet"] = partial(tv.googlenet, num_classes=CLASSES, init_weights=False, aux_logits=False), 64
    found["inception_v3"] = partial(tv.inception_v3, num_classes=CLASSES, init_weights=False, aux_logits=False), 96
    found["vit_b_16"] = partial(tv.vit_b_16, num_classes=CLASSES, image_size=64), 64
    found["maxvit"] = partial(tv.MaxVit, (64, 64), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=CLASSES), 64
    try:
        import timm
    except ImportError:
        return found
    resized = ("vit_tiny_patch16_224", "deit_tiny_patch16_224")  # other networks with "224" take no other size
    names = (
        "resnet18", "resnet50", "seresnet18", "mobilenetv3_small_100", "mobilenetv4_conv_small", "efficientnet_b0",
        "tf_efficientnet_b0", "ghostnet_100", "rexnet_100", "regnety_002", "densenet121", "repvgg_a0", "test_nfnet",
        "hrnet_w18_small", "convnext_atto", "convnextv2_atto", "mobilevit_xxs", "edgenext_xx_small", "pvt_v2_b0",
        "poolformer_s12", "fastvit_t8", *resized, "swin_tiny_patch4_window7_224", "coatnet_nano_rw_224",
        "xcit_nano_12_p16_224", "mixer_s32_224",
    )  # fmt: skip
    for name in names:
        options = {"img_size": 64} if name in resized else {}
        size = 224 if "224" in name and not options else 64
        found[f"timm {name}"] = partial(timm.create_model, name, num_classes=CLASSES, **options), size
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    whole = _whole_networks()
    for title in sys.argv[1:] or whole:
        make, pixels = whole[title]
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            try:
                outcome = through_all_stations(make, pixels, 1, Path(place))
            except Exception as error:  # noqa: BLE001 — a table of whatever happens
                outcome = f"FAILED {type(error).__name__}: {str(error)[:200]}"
        print(f"{title:34} {time.perf_counter() - begin:5.0f} s  {outcome}", flush=True)
