"""What a network expects of its pictures: the pixels of torchvision's transforms, and what timm and torchvision say."""

import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from faqd_lib.data.images import DatasetError
from faqd_lib.data.preprocessing import Preprocessing, preprocessing_of
from faqd_lib.utils.torchvision_import import torchvision  # noqa: F401  (before torchvision.transforms)


def photograph(height: int, width: int) -> Image.Image:
    """Soft edges, as a photograph has them: Pillow rounds between its two passes, and noise would enlarge that."""
    return noise(height // 6 + 2, width // 6 + 2).resize((width, height), Image.Resampling.BICUBIC)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(
    ("size", "resize_size", "image_size", "interpolation"),
    [
        ((333, 500), 256, 224, "bilinear"),
        ((201, 177), 116, 112, "bicubic"),
        ((50, 77), 128, 112, "bilinear"),  # enlarged
        ((900, 90), 64, 57, "bilinear"),  # an odd difference
        ((64, 37), 32, 32, "lanczos"),
    ],
)
def test_the_pixels_are_those_of_resize_and_centre_crop(size, resize_size, image_size, interpolation):
    from torchvision.transforms import v2

    mode = v2.InterpolationMode(interpolation)
    wanted = v2.Compose([v2.Resize(resize_size, mode), v2.CenterCrop(image_size)])(photograph(*size))
    found = Preprocessing(image_size, resize_size=resize_size, interpolation=interpolation).fit(photograph(*size))
    difference = np.abs(np.asarray(wanted).astype(int) - found)
    assert difference.max() <= 2
    assert difference.mean() < 0.5  # of 255


def test_aspect_is_kept_unless_squeezed():
    picture = np.zeros((40, 120, 3), np.uint8)
    picture[:, 40:80] = 255  # the middle third
    assert Preprocessing(20).fit(Image.fromarray(picture))[:, 2:-2].min() == 255  # the rest is cut off
    squeezed = Preprocessing(30, squeeze=True).fit(Image.fromarray(picture))[15, :, 0]
    assert (squeezed[:8] == 0).all()
    assert (squeezed[12:18] == 255).all()
    assert (squeezed[22:] == 0).all()


def test_long_pictures_need_no_more_memory_than_others():
    sizes = []
    original = Image.Image.resize

    def resize(self, size, *arguments):
        sizes.append(size)
        return original(self, size, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", resize)
        assert Preprocessing(32).fit(noise(2, 20_000)).shape == (32, 32, 3)
    assert sizes == [(32, 32)]  # not 320,000 pixels wide


def test_one_file_has_the_pixels_of_its_fit(tmp_path):
    noise(30, 40).save(tmp_path / "a.png")
    tensor = Preprocessing(16).tensor(tmp_path / "a.png")
    assert (tensor.dtype, tensor.shape) == (torch.uint8, (3, 16, 16))
    assert (tensor.permute(1, 2, 0).numpy() == Preprocessing(16).fit(noise(30, 40))).all()
    with pytest.raises(DatasetError, match=r"is not a regular file"):
        Preprocessing(16).tensor(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 0}, "image_size must be 1 to resize_size"),
        ({"image_size": 32, "resize_size": 31}, "raise resize_size, or set it to 0"),
        ({"image_size": 32, "interpolation": "bilinar"}, "did you mean 'bilinear'"),
        ({"image_size": 32, "mean": (0.5,), "std": (0.5,)}, "three values"),
        ({"image_size": 32, "std": (0.5, 0.0, 0.5)}, "std above 0"),
        ({"image_size": 32, "mean": (123.7, 116.3, 103.5)}, "divide them by 255"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**values)


def test_it_comes_back_from_json():
    made = Preprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 36, "bicubic", squeeze=True)
    assert Preprocessing(**json.loads(json.dumps(asdict(made)))) == made


# ---- what timm and torchvision say


def test_torchvision_says_how_its_weights_were_trained():
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    model = torch.nn.Identity()
    assert preprocessing_of(model, "torchvision:resnet50") == Preprocessing(224, resize_size=232, **imagenet)
    first = preprocessing_of(model, "torchvision:resnet50:IMAGENET1K_V1")
    assert first == Preprocessing(224, resize_size=256, **imagenet)
    assert first.image_size / first.resize_size == 0.875
    bicubic = preprocessing_of(model, "torchvision:efficientnet_b0")
    assert bicubic == Preprocessing(224, resize_size=256, interpolation="bicubic", **imagenet)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:resnet50:IMAGENET1K_V3", r"weights of resnet50 must be one of DEFAULT, IMAGENET1K_V1"),
        ("torchvision:fcn_resnet50", "no classifier of pictures"),
        ("torchvision:resnet51", "resnet51"),
        ("my.module:network", "Give a Preprocessing with image_size, mean and std"),
    ],
)
def test_networks_that_do_not_say_it_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        preprocessing_of(torch.nn.Identity(), spec)


TIMM = {
    "input_size": (3, 224, 224), "crop_mode": "center", "crop_pct": 0.95, "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25),
}  # fmt: skip


def with_timm(monkeypatch, **changed) -> torch.nn.Module:
    """A network whose configuration a stand-in for timm resolves."""
    data = SimpleNamespace(resolve_data_config=lambda config, model: TIMM | config)
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(data=data))
    monkeypatch.setitem(sys.modules, "timm.data", data)
    model = torch.nn.Identity()
    model.pretrained_cfg = changed
    return model


def test_timm_says_how_a_network_was_trained(monkeypatch):
    found = preprocessing_of(with_timm(monkeypatch), "timm:resnet18")
    assert found == Preprocessing(224, (0.5,) * 3, (0.25,) * 3, 235, "bicubic")  # floor(224 / 0.95) = 235
    squashed = preprocessing_of(with_timm(monkeypatch, crop_mode="squash", crop_pct=1.0), "timm:resnet18")
    assert squashed == Preprocessing(224, (0.5,) * 3, (0.25,) * 3, 224, "bicubic", squeeze=True)


@pytest.mark.parametrize("changed", [{"input_size": (1, 224, 224)}, {"input_size": (3, 8, 9)}, {"crop_mode": "border"}])
def test_configurations_of_other_pictures_are_refused(monkeypatch, changed):
    with pytest.raises(ValueError, match="give a Preprocessing, which is for square RGB pictures"):
        preprocessing_of(with_timm(monkeypatch, **changed), "timm:resnet18")


def test_timm_is_asked_for_only_if_the_spec_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.data", None)
    preprocessing_of(torch.nn.Identity(), "torchvision:resnet18")
    with pytest.raises(ModuleNotFoundError, match="pip install timm"):
        preprocessing_of(torch.nn.Identity(), "timm:resnet18")


def test_timm_itself():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", pretrained=False)
    found = preprocessing_of(model, "timm:resnet18")
    assert (found.image_size, found.interpolation) == (224, model.pretrained_cfg["interpolation"])
    assert found.image_size / found.resize_size == pytest.approx(model.pretrained_cfg["crop_pct"], abs=0.01)
