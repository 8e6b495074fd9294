"""Packed files: each weight takes its bits, and the loaded network gives the same outputs bit for bit."""

import copy
import json
from collections import OrderedDict

import pytest
import torch
from fresh_process import run_fresh
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

from faqd_lib.export.packed import PackedFileError, load_packed, pack_bits, read_header, save_packed, unpack_bits
from faqd_lib.models import build_model
from faqd_lib.quantization.description import describe, weight_bytes
from faqd_lib.quantization.network import calibrate, dequantize, low_bit_weights, quantize, unwrapped

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(name: str = "resnet8", **bits) -> nn.Module:
    """A quantized network whose batch normalisations have seen images."""
    model = quantize(build_model(name, 10, seed=1), **bits)
    with torch.no_grad(), parametrize.cached():  # each weight is quantized once
        calibrate(model, IMAGES)
        for _ in range(3):
            model.train()(IMAGES * 2 + 1)
    return model.eval()


@torch.no_grad()
def same_bits(first: nn.Module, second: nn.Module) -> bool:
    """Whether outputs agree for one image and several, in both memory formats: the routines differ."""
    with parametrize.cached():
        return all(
            torch.equal(first(images), second(images))
            for count in (1, 2, 3)
            for images in (IMAGES[:count], IMAGES[:count].to(memory_format=torch.channels_last))
        )


@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_bits_survive(bits, numbers):
    codes = torch.tensor(numbers, dtype=torch.uint8) % 2**bits
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-len(numbers) * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, len(numbers)), codes)


def test_documented_example():
    assert pack_bits(torch.tensor([1, 0, 1, 1]), 1).tolist() == [13]


BOTH = [(1, 32), (2, 4), (3, 2), (4, 4), (5, 8), (8, 1)]


@pytest.mark.parametrize(
    ("weights", "activations", "per_channel"), [(32, 4, False), *((*bits, each) for bits in BOTH for each in (0, 1))]
)
def test_outputs_are_the_same_bits(tmp_path, weights, activations, per_channel):
    model = trained(weight_bits=weights, activation_bits=activations, per_channel=bool(per_channel))
    path = save_packed(model, tmp_path / "net.safetensors", architecture={"name": "resnet8", "num_classes": 10})
    both = load_packed(path), load_packed(path, build_model("resnet8", 10, seed=7))
    assert all(same_bits(loaded, model) for loaded in both)


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_bits": 1},
        {"weight_bits": 4, "activation_bits": 4},
        {"activation_bits": 4},
        {"weight_bits": 1, "first_layer": "float"},
    ],
    ids=str,
)
def test_the_same_bits_from_a_network_that_is_channels_last(tmp_path, settings):
    model = trained(**settings).to(memory_format=torch.channels_last)
    path = save_packed(model, tmp_path / "net.safetensors", architecture={"name": "resnet8", "num_classes": 10})
    assert same_bits(load_packed(path), model)


def test_a_one_bit_resnet20_is_an_eighteenth(tmp_path):
    model = trained("resnet20", weight_bits=1)
    packed = save_packed(model, tmp_path / "packed.safetensors", architecture={"name": "resnet20", "num_classes": 10})
    floats = tmp_path / "float.safetensors"
    save_file(build_model("resnet20", 10).state_dict(), floats)
    assert packed.stat().st_size * 18 <= floats.stat().st_size
    # Each quantized layer takes its bits, rounded up to a byte.
    tensors = load_file(packed)
    for name, layer in read_header(packed)["layers"].items():
        assert tensors[f"{name}.levels"].numel() == -(-torch.Size(layer["shape"]).numel() // 8)


def test_other_layers_and_what_the_user_adds(tmp_path):
    model = trained(weight_bits=4, overrides={"layer1.*": 2, "layer2.0.conv1": 8})
    path = save_packed(model, tmp_path / "net.safetensors", metadata={"classes": ["Käse", "Brot"]})
    header = read_header(path)
    assert header["metadata"] == {"classes": ["Käse", "Brot"]}
    assert header["layers"]["layer1.0.conv1"]["bits"] == 2
    assert header["layers"]["layer2.0.conv1"]["bits"] == 8
    assert "fc" not in header["layers"]
    with torch.no_grad():
        assert torch.equal(load_packed(path, build_model("resnet8", 10))(IMAGES), model(IMAGES))
    with pytest.raises(PackedFileError, match="names no architecture"):
        load_packed(path)


def test_a_network_of_ones_own(tmp_path):
    def build() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, 5, 3, bias=True), nn.BatchNorm2d(5, affine=False), nn.ReLU6(),
            nn.Conv2d(5, 5, 3, groups=5), nn.GroupNorm(1, 5), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4),
        )  # fmt: skip

    model, fresh = build(), build()
    for network in (model, fresh):
        network(IMAGES)
    calibrate(quantize(model, 3, 4, last_layer="quantize"), IMAGES).eval()
    path = save_packed(model, tmp_path / "own.safetensors")
    with torch.no_grad():
        assert torch.equal(load_packed(path, fresh)(IMAGES), model(IMAGES))


def test_reading_needs_torch_and_safetensors_only(tmp_path):
    model = trained(weight_bits=1, activation_bits=4)
    path = save_packed(model, tmp_path / "net.safetensors", architecture={"name": "resnet8", "num_classes": 10})
    save_file({"images": IMAGES, "logits": model(IMAGES).detach()}, tmp_path / "expected.safetensors")
    code = f"""
import sys
for name in ("numpy", "onnx", "onnxruntime", "ml_dtypes", "pandas", "pydantic", "torchvision", "matplotlib", "seaborn",
             "papermill", "sklearn", "PIL", "scipy", "tqdm", "filelock", "nbformat"):
    sys.modules[name] = None  # importing it fails, as if it were not installed
import torch
torch.set_num_threads({torch.get_num_threads()})
from safetensors.torch import load_file
from faqd_lib import load_packed
saved = load_file({str(tmp_path / "expected.safetensors")!r})
with torch.no_grad():
    assert torch.equal(load_packed({str(path)!r})(saved["images"]), saved["logits"])
"""
    done = run_fresh(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("weights", "activations"), BOTH)
def test_what_is_loaded_is_described_and_saved_again_as_it_was(tmp_path, weights, activations):
    model = trained(weight_bits=weights, activation_bits=activations, per_channel=weights > 2)
    with torch.no_grad():
        model.layer1[0].conv1.parametrizations.weight.original.zero_()
    path = save_packed(model, tmp_path / "net.safetensors")
    loaded = copy.deepcopy(load_packed(path, build_model("resnet8", 10)))
    assert save_packed(loaded, tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert str(describe(loaded)) == str(describe(model))
    assert weight_bytes(loaded) == weight_bytes(model)
    with pytest.raises(ValueError, match="quantized already"):
        quantize(loaded, 4)
    # Quantized again, it has the same scales.
    quantize(dequantize(loaded), weights, per_channel=weights > 2)
    for name, low in low_bit_weights(model).items():
        torch.testing.assert_close(low_bit_weights(loaded)[name].scale, low.scale, rtol=1e-5, atol=0)


def test_a_loaded_weight_that_was_changed_is_not_saved(tmp_path):
    loaded = load_packed(save_packed(trained(weight_bits=4), tmp_path / "net.safetensors"), build_model("resnet8", 10))
    with torch.no_grad():
        loaded.layer1[0].conv1.weight[0, 0, 0, 0] += 0.001
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1 was read from a packed file, at 4 bits, .*changed since"):
        save_packed(loaded, tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


def test_wrappers_are_taken_off(tmp_path):
    model = trained(weight_bits=1, activation_bits=4)
    expected = save_packed(model, tmp_path / "net.safetensors").read_bytes()
    for wrapped in (nn.DataParallel(model), torch.compile(model), torch.compile(nn.DataParallel(model))):
        assert save_packed(wrapped, tmp_path / "wrapped.safetensors").read_bytes() == expected
        assert str(describe(wrapped)) == str(describe(model))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel])
def test_a_file_is_loaded_into_wrapped_networks(tmp_path, wrap):
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))

    model = calibrate(quantize(build(), 2, 4), IMAGES).eval()
    path, fresh = save_packed(model, tmp_path / "net.safetensors"), wrap(build())
    assert load_packed(path, fresh) is fresh
    assert not any(module.training for module in fresh.modules())
    with torch.no_grad():
        assert torch.equal(unwrapped(fresh)(IMAGES), model(IMAGES))


@pytest.mark.parametrize("name", ["scale", "levels", "batch_norm"])
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_names_that_the_file_needs_are_refused(tmp_path, name, kind):
    """As the factor of a layer with an equalised learning rate."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    for layer in model:  # of the float layer, scale and levels are stored
        if kind == "buffer":
            layer.register_buffer(name, torch.ones(4))
        else:
            layer.register_parameter(name, nn.Parameter(torch.ones(4)))
    quantize(model, 2)
    with pytest.raises(ValueError, match=rf"under the name 0\.{name}: rename this parameter .*own_{name}"):
        save_packed(model, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())
    delattr(model[0], name)
    if name != "batch_norm":
        fresh = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
        fresh[1].register_buffer(name, torch.zeros(4))
        loaded = load_packed(save_packed(model, tmp_path / "net.safetensors"), fresh)
        assert torch.equal(getattr(loaded[1], name), torch.ones(4))


def test_steps_that_nobody_fitted_are_warned_of(tmp_path):
    model = quantize(build_model("resnet8", 10), 4, 4)
    with pytest.warns(UserWarning, match=r"7 activation step\(s\) .* \(relu, .*call calibrate"):
        save_packed(model, tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    "bits",
    [{"weight_bits": 1}, {"weight_bits": 4}, {"weight_bits": 4, "overrides": {"a": 8}},
     {"weight_bits": 4, "overrides": {"a": 32}}],
    ids=str,
)  # fmt: skip
def test_shared_weights_are_stored_once_and_shared_again(tmp_path, bits):
    def network() -> nn.Sequential:
        parts = [(name, nn.Linear(6, 6, bias=False)) for name in ("a", "b", "c", "d")]
        parts[1][1].weight, parts[3][1].weight = parts[0][1].weight, parts[2][1].weight
        return nn.Sequential(OrderedDict(parts))

    model = quantize(network(), **bits, last_layer="quantize").eval()
    path = save_packed(model, tmp_path / "net.safetensors")
    for fresh in (network(), nn.Sequential(OrderedDict((n, nn.Linear(6, 6, bias=False)) for n in "abcd"))):
        loaded = load_packed(path, fresh)
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
        assert torch.equal(loaded(x), model(x))
        assert (loaded.a.weight is loaded.b.weight) == ("overrides" not in bits)
        assert save_packed(loaded, tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
        assert [row.bits for row in describe(loaded)] == [row.bits for row in describe(model)]
        assert str(describe(loaded)) == str(describe(model))
        assert weight_bytes(loaded) == weight_bytes(model) == sum(row.size for row in describe(model))


def test_half_precision_at_the_end_of_its_range(tmp_path):
    layer = nn.Sequential(nn.Linear(64, 4), nn.Identity()).half()
    with torch.no_grad():
        layer[0].weight.copy_(torch.linspace(-65504, 65504, 256).view(4, 64))
    model = quantize(layer, 8, last_layer="quantize")
    loaded = load_packed(
        save_packed(model, tmp_path / "net.safetensors"), nn.Sequential(nn.Linear(64, 4), nn.Identity())
    )
    assert torch.equal(loaded[0].weight, model[0].weight)
    assert loaded[0].weight.isfinite().all()
    assert str(describe(loaded)) == str(describe(model))


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Talks(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    model = quantize(nn.Sequential(Talks(3, 3), nn.Linear(3, 3)), 4)
    with pytest.raises(ValueError, match=r"0\._extra_state is a dict"):
        save_packed(model, tmp_path / "net.safetensors")


# ---- refusals


@pytest.mark.parametrize(
    ("architecture", "named"),
    [
        ({"name": "resnet8", "classes": 10}, r"'classes', which build_model does not take; it takes name, num_classes"),
        ({"name": "resnet20", "num_classes": 10}, r"another network than this: its layer1\.1\..* here it is not there"),
        ({"name": "resnet8", "num_classes": 7}, r"its fc\.weight is \(7, 64\), here it is \(10, 64\)"),
        ("resnet8", "must be a dictionary"),
    ],
)
def test_an_architecture_that_builds_another_network_is_refused(tmp_path, architecture, named):
    with pytest.raises(ValueError, match=named):
        save_packed(trained(weight_bits=1), tmp_path / "net.safetensors", architecture=architecture)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"mean": torch.zeros(3)}, r"metadata\['mean'\] is not JSON .*use \.tolist"),
        (["a"], r"must be a dictionary whose keys are text, got \['a'\]"),
        ({0: "a"}, "keys are text"),
        ({"classes": {0: "a"}}, r"metadata\['classes'\] would come back"),
    ],
)
def test_metadata_that_would_not_come_back_is_refused(tmp_path, metadata, named):
    with pytest.raises(ValueError, match=named):
        save_packed(trained(weight_bits=1), tmp_path / "net.safetensors", metadata=metadata)


def test_an_activation_that_is_no_relu_here_is_refused(tmp_path):
    path = save_packed(trained(weight_bits=1, activation_bits=4), tmp_path / "net.safetensors")
    other = build_model("resnet8", 10)
    other.layer1[0].relu1 = nn.SiLU()
    with pytest.raises(PackedFileError, match=r"layer1\.0\.relu1 is a ReLU in the file, a SiLU in the network"):
        load_packed(path, other)


@pytest.fixture
def path(tmp_path):
    return save_packed(trained(weight_bits=1, activation_bits=4), tmp_path / "net.safetensors")


def test_a_float_network_is_not_packed(tmp_path):
    with pytest.raises(ValueError, match="nothing in the network is quantized"):
        save_packed(build_model("resnet8", 10), tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_packed(tmp_path / "nowhere")


def test_one_flipped_bit_is_noticed(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(PackedFileError, match="damaged"):
        load_packed(path, build_model("resnet8", 10))


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'\\"bits\\":4', b'\\"bits\\":5'), (b'\\"bits\\":1', b'\\"bits\\":2'), (b'\\"digest\\"', b'\\"digezt\\"'),
     (b'{\\"format\\"', b'[\\"format\\"')],
)  # fmt: skip
def test_a_changed_header_is_noticed(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    with pytest.raises(PackedFileError, match=r"net\.safetensors"):
        load_packed(path, build_model("resnet8", 10))


def test_reading_into_a_quantized_network_is_refused(path):
    with pytest.raises(PackedFileError, match="is quantized: give"):
        load_packed(path, quantize(build_model("resnet8", 10), 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_files_precision_is_kept(tmp_path, dtype):
    model = trained(weight_bits=4, activation_bits=4).to(dtype)
    path = save_packed(model, tmp_path / "net.safetensors", architecture={"name": "resnet8", "num_classes": 10})
    with torch.no_grad():
        assert torch.equal(load_packed(path)(IMAGES.to(dtype)), model(IMAGES.to(dtype)))


def test_what_a_relu_replaced_and_its_gradient_come_back(tmp_path):
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU6(), nn.Conv2d(3, 3, 1))

    model = calibrate(quantize(build(), 2, 4, step_gradient="coarse"), IMAGES)
    loaded = load_packed(save_packed(model, tmp_path / "net.safetensors"), build())
    assert loaded[1].step_gradient == "coarse"
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert isinstance(dequantize(loaded)[1], nn.ReLU6)


def test_shared_parts_and_a_layer_alone(tmp_path):
    def build() -> nn.Sequential:
        layer, relu = nn.Conv2d(3, 3, 1), nn.ReLU()
        return nn.Sequential(layer, relu, layer, relu, nn.Conv2d(3, 2, 1))

    model = calibrate(quantize(build(), 2, 4), IMAGES)
    with torch.no_grad():
        loaded = load_packed(save_packed(model, tmp_path / "net.safetensors"), build())
        assert torch.equal(loaded(IMAGES), model(IMAGES))
        alone = quantize(nn.Linear(8, 5), 3, last_layer="quantize")
        x = torch.randn(2, 8)
        assert torch.equal(load_packed(save_packed(alone, tmp_path / "one.safetensors"), nn.Linear(8, 5))(x), alone(x))


@pytest.mark.parametrize("content", [b"", b"no tensors here", None])
def test_other_files_are_refused(path, content):
    if content is None:
        save_file({"x": torch.ones(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(PackedFileError, match=r"net\.safetensors"):
        load_packed(path, build_model("resnet8", 10))


@pytest.mark.parametrize(("name", "classes"), [("resnet8", 7), ("resnet20", 10)])
def test_a_network_that_does_not_fit_is_refused(path, name, classes):
    with pytest.raises(PackedFileError, match="does not fit"):
        load_packed(path, build_model(name, classes))


def test_the_header_is_plain_json(path):
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["faqd"]
    assert json.loads(header)["format"] == "faqd-packed-1"


def test_an_architecture_without_all_it_needs_is_named(tmp_path):
    with pytest.raises(ValueError, match="architecture lacks 'num_classes', which build_model needs"):
        save_packed(trained(weight_bits=2), tmp_path / "x.safetensors", architecture={"name": "resnet8"})
