"""Networks: parameter counts, seeds, and feature maps caught from any module."""

import doctest

import pytest
import torch
from torch import nn

from faqd_lib import models
from faqd_lib.models import FeatureTap, build_model, is_dense, parameter_count, stage_names, stage_taps, tap_names
from faqd_lib.quantization.network import quantize


@pytest.mark.parametrize(
    ("name", "exact", "millions"),
    [
        ("resnet20", 269_722, 0.27),
        ("resnet32", 464_154, 0.46),
        ("resnet44", 658_586, 0.66),
        ("resnet56", 853_018, 0.85),
        ("resnet110", 1_727_962, 1.73),
    ],
)
def test_parameter_counts_are_those_of_he_et_al(name, exact, millions):
    count = parameter_count(build_model(name, 10))
    assert count == exact
    assert round(count / 1e6, 2) == millions


def test_classes_change_the_classifier_only():
    assert parameter_count(build_model("resnet20", 100)) - parameter_count(build_model("resnet20", 10)) == 90 * 65


def test_cifar_resnet_shapes():
    model = build_model("resnet8", 7).eval()
    with FeatureTap(model, model.feature_names) as tap, torch.no_grad():
        logits = model(torch.zeros(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    assert [tuple(m.shape[1:]) for m in tap.features] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_other_students_have_the_grids_of_resnet20():
    images = torch.randn(2, 3, 32, 32)
    shapes = {
        "plain20": [(16, 32, 32), (32, 16, 16), (64, 8, 8)],
        "mobilenet": [(32, 32, 32), (64, 16, 16), (128, 8, 8)],
        "mixer": [(64, 96)] * 3,  # tokens: N = 8·8
    }
    for name, expected in shapes.items():
        model = build_model(name, 7).eval()
        with FeatureTap(model, stage_names(name)) as tap, torch.no_grad():
            assert model(images).shape == (2, 7)
        assert [tuple(features.shape[1:]) for features in tap.features] == expected
        assert quantize(model, 1, 4) is model
        assert model(images).isfinite().all()


def test_other_students_parameters_counted_by_hand():
    # Plain: ResNet-20's shortcuts have no parameters. Mixer: embedding, six blocks of token and channel mixing with
    # two norms each, the last norm, the classifier.
    assert parameter_count(build_model("plain20", 10)) == 269_722
    block = 2 * (64 * 64 + 64) + (96 * 192 + 192) + (192 * 96 + 96) + 4 * 96
    assert parameter_count(build_model("mixer", 10)) == 48 * 96 + 96 + 6 * block + 2 * 96 + 96 * 10 + 10
    # The first depthwise block: 3×3 for each of 32 channels, 32·32 for the 1×1 convolution, two batch norms.
    assert parameter_count(build_model("mobilenet", 10).layer1[0]) == 9 * 32 + 32 * 32 + 2 * 2 * 32


def test_the_mixers_tokens_are_patches_row_by_row():
    model = build_model("mixer", 10, image_size=8)
    images = torch.zeros(1, 3, 8, 8)
    images[:, :, :4, 4:] = 1  # the second patch
    with FeatureTap(model, ["embed"]) as tap:
        model(images)
    changed = (tap.features[0][0] - model.embed.bias).abs().sum(1) > 0
    assert changed.tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match="multiple of 4 for a patch mixer, got 30"):
        build_model("mixer", 10, image_size=30)


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "plain20", "mobilenet", "linknet8"])
def test_a_stage_is_the_relu_of_its_sum(name):
    """Also in the quantized network, whose ReLUs are other modules of the same names."""
    model = quantize(build_model(name, 5), 1, 4)
    names = tap_names(model, "before ReLU")
    with FeatureTap(model, names) as sums, FeatureTap(model, tap_names(model)) as outputs:
        model(torch.randn(2, 3, 16, 16))
    for relu, before, after in zip(names, sums.features, outputs.features, strict=True):
        assert before.min() < 0
        assert torch.equal(model.get_submodule(relu.removesuffix("@input"))(before), after)


def test_taps_before_a_relu_that_is_not_there_are_refused():
    with pytest.raises(ValueError, match=r"stage 'blocks\.1' of PatchMixer does not end with a ReLU"):
        tap_names(build_model("mixer", 10), "before ReLU")
    with pytest.raises(ValueError, match="'0' overwrites its input"):
        FeatureTap(nn.Sequential(nn.ReLU(inplace=True)), ["0@input"])


def test_an_input_is_tapped_by_position_and_by_keyword():
    network = nn.Module()
    network.add_module("relu", nn.ReLU())
    network.add_module("attention", nn.MultiheadAttention(4, 1))
    x = -torch.ones(1, 2, 4)
    with FeatureTap(network, ["relu@input"]) as tap:
        for given, named in (((x,), {}), ((), {"input": x})):
            tap.clear()
            network.relu(*given, **named)
            assert tap.features[0] is x
    message = "'attention@input' is to be tapped, .* several by keyword, query, key, value"
    with FeatureTap(network, ["attention@input"]), pytest.raises(TypeError, match=message):
        network.attention(query=x, key=x, value=x)


def test_option_a_shortcut_subsamples_and_pads_with_zeros():
    x = torch.arange(2 * 2 * 4 * 4.0).reshape(2, 2, 4, 4)
    out = models.SubsampleAndPad(2, 2)(x)
    assert out.shape == (2, 4, 2, 2)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert out[:, 0].abs().max() == out[:, 3].abs().max() == 0


def test_linknet_shapes_and_cost():
    model = build_model("linknet16", 11).eval()
    products = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda layer, _, out: products.append(layer.weight.numel() * out.shape[2:].numel())
            )
    with FeatureTap(model, model.feature_names) as tap, torch.no_grad():
        logits = model(torch.zeros(1, 3, 180, 240))
    assert logits.shape == (1, 11, 180, 240)
    shapes = [(32, 45, 60), (64, 23, 30), (128, 12, 15), (64, 23, 30), (32, 45, 60), (16, 90, 120)]
    assert [tuple(m.shape[1:]) for m in tap.features] == shapes
    assert parameter_count(model) == 739_403
    assert sum(products) < 0.36e9
    assert is_dense("linknet16")
    assert not is_dense("resnet18")


def test_every_relu_is_its_own_module():
    relus = [m for m in build_model("resnet20", 10).modules() if isinstance(m, nn.ReLU)]
    assert len(relus) == 19 == len(set(relus))


def test_same_seed_same_weights_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    first, again, other = (build_model("resnet8", 10, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    assert torch.equal(before, torch.get_rng_state())


def test_resnet18_for_64_pixels():
    model = build_model("resnet18", 200, image_size=64).eval()
    # torchvision's 11,689,512 parameters, with another classifier and a 3×3 stem instead of 7×7.
    assert parameter_count(model) == 11_689_512 - 513_000 + 513 * 200 - 64 * 3 * (49 - 9)
    with FeatureTap(model, model.feature_names) as tap, torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 200)
    assert [tuple(m.shape[1:]) for m in tap.features] == [(64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8)]


def test_resnet18_keeps_torchvisions_stem_for_larger_images():
    model = build_model("resnet18", 10, image_size=96)
    assert model.conv1.kernel_size == (7, 7)
    assert isinstance(model.maxpool, nn.MaxPool2d)


@pytest.mark.parametrize(
    ("name", "classes", "names"), [("resnet19", 10, "resnet20"), ("vgg", 10, "'vgg'"), ("resnet20", 1, "1")]
)
def test_bad_arguments(name, classes, names):
    with pytest.raises(ValueError, match=names):
        build_model(name, classes)


@pytest.mark.parametrize("depth", [2, 21, 0])
def test_bad_depth(depth):
    with pytest.raises(ValueError, match=f"got {depth}"):
        models.CifarResNet(depth)


# ---- taps


@pytest.fixture
def network():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 1)))


def test_tap_keeps_the_order_of_the_names_and_the_latest_pass(network):
    x = torch.ones(1, 3, 2, 2)
    with FeatureTap(network, ["1.1", "0"]) as tap:
        network(x)
        out = network(2 * x)
    assert torch.equal(tap.features[0], out)
    assert torch.equal(tap.features[1], network[0](2 * x))
    assert tap.features[0].requires_grad  # the gradient must reach the student through the tap


def test_torchvision_comes_by_its_name_and_nothing_else_does():
    import faqd_lib
    from faqd_lib.utils.torchvision_import import torchvision

    assert faqd_lib.torchvision is torchvision
    with pytest.raises(AttributeError, match="'faqd_lib' has no attribute 'torchvisions'"):
        faqd_lib.torchvisions  # noqa: B018


def test_tap_on_torchvisions_networks():
    from faqd_lib.utils.torchvision_import import torchvision

    model = torchvision.models.squeezenet1_1(num_classes=3).eval()
    with FeatureTap(model, ["features.3", "features.12.squeeze_activation"]) as tap, torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    assert [m.shape[1] for m in tap.features] == [128, 64]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_are_removed_on_exit_on_close_and_on_an_error(network):
    with FeatureTap(network, ["0", "1"]):
        assert hooks(network) == 2
    assert hooks(network) == 0
    tap = FeatureTap(network, ["0"])
    tap.close()
    assert hooks(network) == 0
    with pytest.raises(RuntimeError, match="expected input"), FeatureTap(network, ["0"]):
        network(torch.ones(1, 7, 2, 2))
    assert hooks(network) == 0


def test_unknown_name_lists_close_matches_and_leaves_no_hook():
    model = build_model("resnet8", 10)
    with pytest.raises(ValueError, match="'layer4'") as raised:
        FeatureTap(model, ["layer1", "layer4"])
    assert "did you mean 'layer3'" in str(raised.value)
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="'' to tap: it has conv1, bn1, relu, layer1, "):
        FeatureTap(model, [""])


def test_a_name_given_twice_is_refused(network):
    with pytest.raises(ValueError, match="twice"):
        FeatureTap(network, ["0", "0"])
    assert hooks(network) == 0


def test_reading_before_a_pass_or_after_clear_is_an_error(network):
    with FeatureTap(network, ["0"]) as tap:
        with pytest.raises(RuntimeError, match="'0'"):
            _ = tap.features
        network(torch.ones(1, 3, 2, 2))
        assert len(tap.features) == 1
        tap.clear()
        with pytest.raises(RuntimeError, match="'0'"):
            _ = tap.features


def test_docstring_examples():
    result = doctest.testmod(models)
    assert result.attempted >= 3
    assert result.failed == 0


def test_a_map_that_was_overwritten_behind_the_tap_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU())
    with FeatureTap(model, ["0"]) as tap:
        model(torch.randn(2, 3, 8, 8))
    with pytest.raises(RuntimeError, match=r"'0' was overwritten.*in-place"):
        _ = tap.features
    with FeatureTap(model, ["1", "2"]) as tap:
        model(torch.randn(2, 3, 8, 8))
    assert len(tap.features) == 2
    with torch.inference_mode(), FeatureTap(model, ["1"]) as tap:
        model(torch.randn(2, 3, 8, 8))
        assert tap.features[0].min() >= 0


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet18", "linknet8"])
def test_stages_are_those_of_the_network(name):
    assert build_model(name, 10).feature_names == stage_names(name)


# ---- taps that are found


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet18"])
def test_taps_found_in_our_networks_are_their_stages(name):
    model = build_model(name, 10).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert tuple(stage_taps(model, torch.randn(2, 3, 32, 32))) == model.feature_names
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert hooks(model) == 0


class Gate(nn.Module):
    """Squeeze and excitation over a pooled map of 2×2 pixels, a dip that is no stage."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.conv = nn.AdaptiveAvgPool2d(2), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.conv(self.pool(x)).mean((2, 3), keepdim=True)


def test_a_dip_inside_a_module_is_no_stage_and_the_end_of_a_block_is_preferred():
    block = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, 2, 1), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Gate(), block, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert stage_taps(model, torch.randn(2, 3, 8, 8)) == ["2", "3"]


def test_a_stage_of_one_pixel_is_no_tap_and_nothing_within_it():
    stage = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 2, 2))
    model = nn.Sequential(nn.Conv2d(3, 4, 2, 2), stage)
    assert stage_taps(model, torch.randn(2, 3, 4, 4)) == ["0"]
    assert stage_taps(model, torch.randn(2, 3, 8, 8)) == ["0", "1"]


def test_a_map_overwritten_in_place_is_not_tapped():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1))
    assert stage_taps(model, torch.randn(2, 3, 8, 8)) == ["1", "3"]
    with torch.inference_mode():  # whose tensors do not tell whether they were overwritten
        assert stage_taps(model, torch.randn(2, 3, 8, 8)) == ["1", "3"]
        made = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(2))
        assert stage_taps(made, torch.randn(2, 3, 8, 8)) == ["0", "1"]

    class Functional(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self[1](self[0](x))
            return self[2](nn.functional.relu(x, inplace=True))

    model = Functional(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 2, 1))
    assert stage_taps(model, torch.randn(2, 3, 8, 8)) == ["0", "2"]


def test_layout_follows_the_proportions_of_the_images():
    class Last(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.permute(0, 2, 3, 1)

    model = nn.Sequential(nn.Conv2d(3, 8, 1, stride=2), Last(), nn.Linear(8, 8))
    assert stage_taps(model, torch.randn(2, 3, 8, 8)) == ["2@bhwc"]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Last(), nn.Linear(4, 4))  # all three sizes of these maps are 4
    assert stage_taps(model, torch.randn(2, 3, 4, 4)) == ["2"]
    assert stage_taps(model, torch.randn(2, 3, 4, 6)) == ["2@bhwc"]


def test_a_transformer_is_tapped_at_thirds():
    class Encoder(nn.Module):
        def __init__(self, blocks: int) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.embed, self.blocks = nn.Conv2d(3, 8, 4, 4), nn.TransformerEncoder(layer, blocks).layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x).flatten(2).mT
            for block in self.blocks:
                x = block(x)
            return x.mean(1)

    for blocks, ends in ((1, (0,)), (2, (0, 1)), (3, (0, 1, 2)), (12, (3, 7, 11)), (7, (2, 4, 6))):
        assert stage_taps(Encoder(blocks), torch.randn(2, 3, 16, 16)) == [f"blocks.{end}" for end in ends]


@pytest.mark.parametrize(
    ("images", "message"), [(torch.ones(3, 8, 8), r"example_images must be .*\(3, 8, 8\)"),
                            (torch.ones(2, 3, 1, 1), "no module of Sequential returns a map")]
)  # fmt: skip
def test_images_without_maps_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        stage_taps(nn.Sequential(nn.Conv2d(3, 4, 1)), images)
