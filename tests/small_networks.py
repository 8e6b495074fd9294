"""Small networks of torchvision's families: its own modules, a block of each kind, few channels."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

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


def googlenet() -> nn.Module:
    """torchvision's GoogLeNet, without the blocks that keep the shape."""
    model = tv.googlenet(num_classes=CLASSES, init_weights=False, aux_logits=False)
    model.inception4b = model.inception4c = model.inception5a = nn.Identity()
    return model


def vgg_with_dropout() -> nn.Module:
    """torchvision's whole VGG class, with its classifier of three layers."""
    with torch.device("meta"):  # the first layer of the classifier has a hundred million weights
        model = tv.VGG(tv.vgg.make_layers([8, "M", 16, 16, "M"], batch_norm=True), CLASSES, init_weights=False)
        model.avgpool = nn.AdaptiveAvgPool2d(2)
        model.classifier[0], model.classifier[3], model.classifier[6] = (
            nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, CLASSES)
        )  # fmt: skip
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model
