"""Families of networks through every station: quantize, find taps, one distillation step, pack, load, export.

python tests/quantization/test_families.py [name …]    # whole networks of torchvision and timm at 1 bit: a table
"""

import copy
import sys
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from faqd_lib.export.onnx import OnnxExportError, export_onnx
from faqd_lib.export.packed import load_packed, save_packed
from faqd_lib.models import FeatureTap, stage_taps
from faqd_lib.quantization.description import describe
from faqd_lib.quantization.network import calibrate, quantize, quantized_weights
from faqd_lib.training.objective import DistillationObjective
from faqd_lib.utils.torchvision_import import torchvision

tv = torchvision.models
CLASSES = 5


def _mobilenet_v3() -> nn.Module:
    block = partial(tv.mobilenetv3.InvertedResidualConfig, use_se=True, dilation=1, width_mult=1.0)
    blocks = [
        block(16, 3, 16, 16, activation="RE", stride=2),
        block(16, 5, 48, 24, activation="HS", stride=2),
        block(24, 5, 48, 24, activation="HS", stride=1),
    ]
    return tv.MobileNetV3(blocks, 48, num_classes=CLASSES)


def _efficientnet() -> nn.Module:
    block = tv.efficientnet.MBConvConfig
    blocks = [block(1, 3, 1, 16, 16, 1), block(4, 3, 2, 16, 24, 2), block(4, 5, 2, 24, 40, 1)]
    return tv.EfficientNet(blocks, dropout=0.1, last_channel=64, num_classes=CLASSES)


def _regnet() -> nn.Module:
    stages = tv.regnet.BlockParams([1, 2], [16, 32], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return tv.RegNet(stages, CLASSES, stem_width=8)


def _convnext() -> nn.Module:
    stage = tv.convnext.CNBlockConfig
    return tv.ConvNeXt([stage(16, 32, 1), stage(32, 64, 2), stage(64, None, 1)], num_classes=CLASSES)


def _resnet() -> nn.Module:
    model = tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1])
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, CLASSES)
    return model


def _vgg() -> nn.Module:
    layers = tv.vgg.make_layers([8, "M", 16, 16, "M", 32], batch_norm=True)
    head = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, CLASSES))
    return nn.Sequential(OrderedDict(features=layers, head=nn.Sequential(*head)))


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "resnet": _resnet,
    "mobilenet_v2": partial(tv.MobileNetV2, CLASSES, 0.25, [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]),
    "mobilenet_v3": _mobilenet_v3, "efficientnet": _efficientnet, "regnet": _regnet,
    "shufflenet": partial(tv.ShuffleNetV2, [2, 2, 2], [16, 16, 32, 48, 64], CLASSES),
    "densenet": partial(tv.DenseNet, 8, (2, 2, 2), 16, num_classes=CLASSES),
    "vgg": _vgg, "convnext": _convnext,
    "vit": partial(tv.VisionTransformer, 32, 8, 3, 2, 32, 64, num_classes=CLASSES),
    "swin": partial(tv.SwinTransformer, [4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=CLASSES),
}  # fmt: skip
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
    """A network with random weights, also in layers that begin at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = builder()
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and not layer.weight.any():
                nn.init.normal_(layer.weight, std=0.1)
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
    model = calibrate(quantize(build(_mobilenet_v3), 4, 4), images)
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
                     "efficientnet_b0", "efficientnet_v2_s", "shufflenet_v2_x1_0", "regnet_y_400mf", "mnasnet0_5",
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
