"""Faults that users of other tools reported, tried on our networks: what is listed is what runs."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from faqd_lib.export.packed import load_packed, save_packed
from faqd_lib.models import FeatureTap, build_model
from faqd_lib.quantization.description import describe
from faqd_lib.quantization.network import calibrate, dequantize, float_state_dict, quantize, unwrapped
from faqd_lib.quantization.relu import QuantizedReLU

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 14 * 14, 4)).eval()


# ---- transformer layers: torch's fast path


def encoder(padded: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.ReLU(), batch_first=True, dropout=0.0)
        return (nn.TransformerEncoder(layer, 2) if padded else layer).eval()


@torch.no_grad()
def test_a_transformer_layer_runs_its_quantized_activation(tmp_path):
    """torch's fast path would compute the float network, silently."""
    tokens = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    float_output = encoder()(tokens)
    layer = calibrate(quantize(encoder(), activation_bits=1), tokens)
    with torch.enable_grad():  # torch takes the slow path
        expected = layer(tokens.requires_grad_()).detach()
    assert not torch.allclose(expected, float_output, atol=1e-3)
    assert torch.allclose(layer(tokens), expected, atol=1e-6)
    assert torch.allclose(copy.deepcopy(layer)(tokens), expected, atol=1e-6)
    packed = load_packed(save_packed(layer, tmp_path / "layer.safetensors"), encoder())
    assert torch.equal(packed(tokens), layer(tokens))
    assert torch.allclose(dequantize(layer)(tokens), float_output, atol=1e-6)
    assert layer.activation_relu_or_gelu == 1
    layer.activation_relu_or_gelu = 0  # a user's own choice
    assert dequantize(quantize(layer, activation_bits=1)).activation_relu_or_gelu == 0


@torch.no_grad()
def test_an_encoder_with_padding_runs_its_quantized_activations():
    tokens = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model = calibrate(quantize(encoder(padded=True), activation_bits=1), tokens)
    with torch.enable_grad():
        expected = model(tokens.requires_grad_(), src_key_padding_mask=padding).detach()
    found = model(tokens, src_key_padding_mask=padding)
    assert torch.allclose(found[~padding], expected[~padding], atol=1e-6)
    assert model.use_nested_tensor is False
    assert dequantize(model).use_nested_tensor is True


def test_an_activation_that_is_not_called_is_said():
    class Reads(nn.Module):
        """Reads the kind of its activation instead of calling it."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.act = nn.Linear(3, 3), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).clamp_min(0) if isinstance(self.act, nn.Module) else x

    model = quantize(Reads(), activation_bits=2)
    with pytest.warns(UserWarning, match=r"1 quantized ReLU\(s\) of Reads were not called \(act\)"):
        calibrate(model, torch.randn(4, 3))
    (row,) = (row for row in describe(model, torch.randn(4, 3)) if row.layer == "act")
    assert "not called" in row.note


# ---- copies while a tap is open


@pytest.mark.parametrize("copied", [copy.deepcopy, torch.optim.swa_utils.AveragedModel])
def test_a_copy_does_not_write_into_the_tap(copied):
    model = network()
    with FeatureTap(model, ["0"]) as tap:
        other = copied(model)
        model(IMAGES)
        (before,) = tap.features
        other(IMAGES + 1)
        assert tap.features[0] is before
    assert not any(module._forward_hooks for module in [*model.modules(), *other.modules()])


def test_a_shallow_copy_leaves_the_tap_alone():
    """As the replicas of DataParallel, which share the dictionary of hooks."""
    model = network()
    with FeatureTap(model, ["0"]) as tap:
        copy.copy(model[0])(IMAGES)
        model(IMAGES)
        assert len(tap.features) == 1


@pytest.mark.parametrize("name", ["0[", "a[0]b", "0[0"])
def test_names_of_no_module_are_refused(name):
    with pytest.raises(ValueError, match="the network has no module"):
        FeatureTap(network(), [name])


# ---- taps of modules that return no tensor


class Several(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor):
        return {"tuple": (x, x + 1), "dict": {"out": x, "aux": None}, "nothing": None, "tensor": x}[self.kind]


@pytest.mark.parametrize(("kind", "name"), [("tuple", "0[0]"), ("tuple", "0[-2]"), ("dict", "0[out]")])
def test_an_item_of_what_a_module_returns_can_be_tapped(kind, name):
    model = nn.Sequential(Several(kind))
    with FeatureTap(model, [name]) as tap:
        model(IMAGES)
    assert torch.equal(tap.features[0], IMAGES)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("tuple", "0", r"'0' is to be tapped, and the module returned a tuple of 2: tap one of them, such as 0\[0\]"),
        ("tuple", "0[7]", r"a tuple of 2: tap one of them"),
        ("tuple", "0[out]", r"a tuple of 2: tap one of them"),
        ("dict", "0", r"a dictionary with the items out, aux: tap one of them, such as 0\[out\]"),
        ("dict", "0[aux]", r"a dictionary with the items out, aux"),
        ("nothing", "0", r"returned NoneType: tap a module that returns a tensor"),
    ],
)
def test_what_a_module_returned_is_named(kind, name, message):
    model = nn.Sequential(Several(kind))
    with FeatureTap(model, [name]), pytest.raises(TypeError, match=message):
        model(IMAGES)


# ---- wrappers


def test_an_averaged_model_is_taken_off(tmp_path):
    model = calibrate(quantize(network(), 2, 4), IMAGES)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert unwrapped(averaged) is averaged.module
    loaded = load_packed(save_packed(averaged, tmp_path / "averaged.safetensors"), network())
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model.eval()(IMAGES))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("quantized", [False, True])
def test_checkpoints_of_wrapped_networks_load(prefix, quantized):
    source = network()
    if quantized:
        calibrate(quantize(source, 2, 4), IMAGES)
    state = {f"{prefix}{name}": value for name, value in source.state_dict().items()} | {"n_averaged": torch.tensor(1)}
    if prefix != "module.":
        del state["n_averaged"]
    target = quantize(nn.Sequential(*network()), 2, 4)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(1)
    target.load_state_dict(state)
    assert torch.equal(target[0].parametrizations.weight.original, dict(source.named_parameters())[
        "0.parametrizations.weight.original" if quantized else "0.weight"
    ])  # fmt: skip


def test_a_part_that_is_called_module_keeps_its_name():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x)

    quantize(Outer(), 2).load_state_dict(Outer().state_dict())


def test_float_weights_come_out_of_a_quantized_network():
    source = network()
    model = calibrate(quantize(copy.deepcopy(source), 2, 4, last_layer="quantize"), IMAGES)
    float_network = network()
    float_network.load_state_dict(float_state_dict(model))
    assert all(torch.equal(a, b) for a, b in zip(float_network.parameters(), source.parameters(), strict=True))
    float_network.load_state_dict(float_state_dict(model, rounded=True))
    assert torch.equal(float_network[0].weight, model[0].weight)
    assert len(float_network[3].weight.unique()) == 3


def test_float_weights_leave_other_parametrizations_alone():
    model = network()
    nn.utils.parametrizations.spectral_norm(model[3])
    quantize(model, 2, overrides={"3": 32})
    other = network()
    nn.utils.parametrizations.spectral_norm(other[3])
    other.load_state_dict(float_state_dict(model))


# ---- what cannot be quantized or calibrated, said


def test_a_layer_of_zeros_is_calibrated_and_packed_without_a_warning(tmp_path):
    model = network()
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_packed(calibrate(quantize(model, 1, 4), IMAGES), tmp_path / "zeros.safetensors")
    with pytest.warns(UserWarning, match="neither calibrated nor trained"):
        save_packed(quantize(network(), 1, 4), tmp_path / "fresh.safetensors")


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_old_norms_of_weights_are_named(kind):
    model = network()
    getattr(nn.utils, kind)(model[0])
    with pytest.raises(ValueError, match=rf"the weight of 0 \(Conv2d\) is computed by .*\.{kind}: .*remove_{kind}"):
        quantize(model, 2)
    getattr(nn.utils, f"remove_{kind}")(model[0])
    quantize(model, 2)


def test_pruning_is_named():
    model = network()
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"the weight of 0 \(Conv2d\) is pruned .*prune\.remove"):
        quantize(model, 2)
    prune.remove(model[0], "weight")
    assert quantize(model, 2)[0].weight.eq(0).float().mean() >= 0.5


class Derived(nn.ReLU):
    pass


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (nn.GELU(), "its activations are 1 GELU, which have negative values"),
        (Derived(), "Derived is a subclass, whose forward may differ"),
        (nn.Identity(), "replace calls of F.relu or torch.relu by modules"),
        (nn.Softmax(1), "quantize: replace calls of F.relu"),
    ],
)
def test_a_network_without_relu_is_told_what_it_has(activation, message):
    with pytest.raises(ValueError, match=message):
        quantize(nn.Sequential(nn.Linear(2, 2), activation, nn.Linear(2, 2)), activation_bits=4)


def test_calibrate_passes_on_what_else_the_network_takes():
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.act = nn.Linear(3, 3), nn.ReLU()

        def forward(self, x: torch.Tensor, shift: torch.Tensor, *, scale: float) -> torch.Tensor:
            return self.act(self.layer(x) * scale + shift)

    model = quantize(Conditional(), activation_bits=4)
    calibrate(model, torch.randn(4, 3), torch.full((3,), 100.0), scale=0.0)
    assert float(model.act.step.detach()) == pytest.approx(100)  # the one value is one level
    assert not any(row.note for row in describe(model, torch.randn(4, 3), torch.zeros(3), scale=1.0))


# ---- transposed convolutions


@pytest.mark.parametrize("per_channel", [False, True])
def test_transposed_convolutions_have_a_scale_for_each_output_channel(per_channel):
    layer = nn.ConvTranspose2d(4, 3, 2)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1))
    latent = layer.weight.detach().clone()
    model = quantize(nn.Sequential(layer), 1, last_layer="quantize", per_channel=per_channel)
    expected = latent.abs().mean((0, 2, 3), keepdim=True) if per_channel else latent.abs().mean()
    assert torch.allclose(model[0].weight, expected * torch.where(latent < 0, -1.0, 1.0))
    assert next(iter(describe(model))).kind == "ConvTranspose2d"


def test_transposed_convolutions_compile(compiler):
    model = quantize(nn.Sequential(nn.ConvTranspose2d(3, 6, 3), nn.Conv2d(6, 2, 3)), 4, per_channel=True)
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, fullgraph=True)(IMAGES), model(IMAGES), atol=1e-5)


def test_quantized_relus_are_differentiated_by_torch_func():
    model = quantize(network(), 1, 4)
    images = IMAGES

    def loss(parameters: dict) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (images,)).square().sum()

    parameters = dict(model.named_parameters())
    found = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in parameters.items():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_torch_func_gives_gradients_of_single_images(bits):
    model = quantize(network(), bits, 4, per_channel=True)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict, image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (image.unsqueeze(0),)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, IMAGES)
    for index, image in enumerate(IMAGES):
        expected = torch.func.grad(loss)(parameters, image)
        for name, gradient in expected.items():
            assert torch.allclose(found[name][index], gradient, rtol=1e-4, atol=1e-5), name


def test_a_network_of_ours_taps_and_quantizes_as_before():
    model = quantize(build_model("resnet8", 10), 1, 4)
    assert sum(isinstance(module, QuantizedReLU) for module in model.modules()) == 7


def test_a_wrong_number_is_not_guessed_at():
    with pytest.raises(ValueError, match=r"got 16$"):
        quantize(network(), 16)
