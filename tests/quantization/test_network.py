"""Quantizers in a network: policies, the way in and out, what is said of it."""

import copy
import importlib
import math

import pytest
import torch
from small_networks import BUILDERS
from torch import nn
from torch.nn.utils import parametrize

from faqd_lib.models import build_model
from faqd_lib.quantization.description import describe, weight_bytes
from faqd_lib.quantization.network import (
    blend,
    calibrate,
    dequantize,
    quantize,
    quantized_weights,
    reestimate_batch_norm,
    split_parameters,
)
from faqd_lib.quantization.relu import QuantizedReLU
from faqd_lib.quantization.weights import weight_quantizer

BITS = (1, 2, 3, 4, 8)


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 5, 3, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * 4 * 4, 3),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def own_random_state():
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# ---- networks


@pytest.mark.parametrize("weight_bits", [*BITS, 32])
@pytest.mark.parametrize("activation_bits", [4, 32])
def test_dequantize_restores_outputs_bit_for_bit(weight_bits, activation_bits, images):
    model = small_network().eval()
    before, names = model(images), set(model.state_dict())
    assert quantize(model, weight_bits, activation_bits) is model
    changed = (weight_bits, activation_bits) != (32, 32)
    assert torch.equal(model(images), before) != changed
    dequantize(model)
    assert torch.equal(model(images), before)
    assert set(model.state_dict()) == names
    assert not any(isinstance(module, QuantizedReLU) for module in model.modules())


def test_failed_call_leaves_the_network_float(images):
    model = small_network().eval()
    before = model(images)
    with pytest.raises(ValueError, match="'both'"):
        quantize(model, 1, first_layer="both")
    with pytest.raises(ValueError, match=r"3\.5"):
        quantize(model, 1, 3.5)
    assert torch.equal(model(images), before)


def test_twice_is_refused():
    for bits in ((1, 32), (32, 4)):
        model = quantize(small_network(), *bits)
        with pytest.raises(ValueError, match="dequantize"):
            quantize(model, 1)


def test_float_checkpoint_becomes_the_latent_weights(images):
    trained = small_network()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.05)
    model = small_network()
    model.load_state_dict(trained.state_dict())
    quantize(model, 1)
    assert torch.equal(model[0].parametrizations.weight.original, trained[0].weight)
    assert torch.equal(model[0].weight, weight_quantizer(1)(trained[0].weight))
    assert torch.equal(dequantize(model).eval()(images), trained.eval()(images))


def test_latent_weights_are_what_the_optimizer_moves(images):
    model = quantize(small_network(), 1)
    before = model[0].parametrizations.weight.original.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images).square().sum().backward()
    gradient = model[0].parametrizations.weight.original.grad.clone()
    optimizer.step()
    after = model[0].parametrizations.weight.original.detach()
    assert gradient.abs().max() > 0
    assert torch.allclose(after, before - 0.1 * gradient)
    assert model[0].weight.unique().numel() == 2


def test_a_float_layer_or_relu_under_two_names_loads_too(images):
    def build() -> nn.ModuleDict:
        layer, relu = nn.Conv2d(3, 3, 1), nn.ReLU()
        return nn.ModuleDict({"a": layer, "r": relu, "b": layer, "r2": relu, "c": nn.Conv2d(3, 2, 1)})

    floats, model = build(), quantize(build(), 2, 4)
    model.load_state_dict(floats.state_dict())
    assert torch.equal(model["b"].parametrizations.weight.original, floats["a"].weight)


def test_tied_weights_count_and_blend_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    quantize(model, 1, last_layer="quantize")
    (quantizer, latent), _ = quantized_weights(model).values()
    before = latent.detach().clone()
    blend(model, 0.1)
    assert torch.allclose(latent, 0.9 * before + 0.1 * quantizer(before))
    assert weight_bytes(model) == 16 / 8 + 4


def test_other_parametrizations_are_left_alone():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"weight of 0 .*no plain parameter"):
        quantize(model, 1)
    assert not quantized_weights(model)
    quantize(model, 1, overrides={"0": 32})
    assert {row.layer: row.bits for row in describe(model) if row.kind == "Linear"} == {"0": 32, "1": 1, "2": 32}
    dequantize(model)
    assert parametrize.is_parametrized(model[0], "weight")


def test_nothing_left_to_quantize_is_an_error_and_changes_nothing():
    with pytest.raises(ValueError, match="kept float by policy"):
        quantize(nn.Linear(3, 3), 1)
    with pytest.raises(ValueError, match=r"nn\.Sequential"):
        quantize(nn.ReLU(), activation_bits=4)
    lazy = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="lazy"):
        quantize(lazy, 1)
    assert not quantized_weights(lazy)
    whole = quantize(nn.Linear(3, 3), 1, last_layer="quantize")
    whole.load_state_dict(nn.Linear(3, 3).state_dict())


def test_what_cannot_be_quantized_is_listed():
    model = nn.Sequential(
        nn.Conv1d(3, 3, 1), nn.Embedding(4, 3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.GLU(), nn.Softsign()
    )
    assert [row.kind for row in describe(model)] == ["Conv1d", "Embedding", "Linear", "GLU", "Softsign"]


@pytest.mark.parametrize("batches", [[], iter(()), [torch.rand(4, 3, 8, 8), "no images"], torch.rand(1, 3, 8, 8)])
def test_batch_norm_that_cannot_be_estimated_stays_as_it_was(batches, images):
    model = quantize(small_network(), 1, 4)
    model.train()(images)
    model.eval()[3].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"batches held nothing|a batch must be a float tensor|into a list"):
        reestimate_batch_norm(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == [0.1]
    assert [name for name, module in model.named_children() if module.training] == ["3"]


@pytest.mark.parametrize("batches", [[], iter(()), ["no images"]])
def test_batches_are_asked_for_without_a_batch_norm_too(batches):
    with pytest.raises(ValueError, match=r"batches held nothing|a batch must be a float tensor"):
        reestimate_batch_norm(nn.Sequential(nn.Linear(3, 3)), batches)


class Buffered(nn.Module):
    """A network whose forward makes or replaces a buffer, as one that caches positions does."""

    def __init__(self, pos: torch.Tensor | None) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        if pos is not None:
            self.register_buffer("pos", pos)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        x = self.norm(self.conv(x))
        self.calls += 1
        if not hasattr(self, "pos"):
            self.register_buffer("pos", torch.full((6,), 0.25))
        elif self.pos.ndim == 1:
            self.pos = torch.linspace(0, 1, x.shape[-1])
        return self.relu(x + self.pos.nan_to_num())


@pytest.mark.parametrize(
    ("pos", "expected"),
    [
        (torch.zeros(1), torch.linspace(0, 1, 6)),
        (torch.zeros(3), torch.linspace(0, 1, 6)),
        (None, torch.full((6,), 0.25)),
        (torch.tensor(0.5).expand(1, 4, 1, 1), torch.full((1, 4, 1, 1), 0.5)),
        (torch.tensor(torch.nan).expand(1, 4, 1, 1), torch.full((1, 4, 1, 1), torch.nan)),
    ],
    ids=["broadcast", "other size", "new", "expanded", "NaN"],
)
def test_calibration_leaves_what_the_network_puts_into_buffers(pos, expected, images):
    model = quantize(Buffered(pos), activation_bits=2)
    model.norm.running_mean.fill_(7)
    calibrate(model, images)
    assert torch.equal(model.pos.nan_to_num(9), expected.nan_to_num(9))
    assert model.norm.running_mean.unique().tolist() == [7]
    assert (model.norm.num_batches_tracked, model.calls) == (0, 0)


def test_calibration_leaves_statistics_that_the_network_reassigns(images):
    class Averaging(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU())
            self.register_buffer("mean", torch.zeros(1))
            self.register_buffer("graph", torch.eye(2).to_sparse())

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean().detach() + 1
            return super().forward(x)

    model = quantize(Averaging(), activation_bits=2)
    calibrate(model, images)
    assert model.mean == 0


def test_a_relu_may_be_given_its_input_by_name(images):
    class Named(nn.Sequential):
        def forward(self, x):
            return self[1](input=self[0](x))

    model = quantize(Named(nn.Conv2d(3, 4, 3), nn.ReLU()), activation_bits=4)
    before = float(model[1].step.detach())
    calibrate(model, images)
    assert float(model[1].step.detach()) != before
    assert torch.equal(model(images), model[1](model[0](images)))


@pytest.mark.parametrize("called", [False, True])
def test_a_compiled_network_is_calibrated(called, images):
    model = quantize(small_network(), 4, 4)
    expected = [relu.step.item() for relu in calibrate(copy.deepcopy(model), images) if isinstance(relu, QuantizedReLU)]
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    if called:
        compiled(images)
    assert calibrate(compiled, images) is compiled
    assert [relu.step.item() for relu in model if isinstance(relu, QuantizedReLU)] == expected
    compiled(images)
    assert notes(compiled, images) == {}


def notes(model: nn.Module, images: torch.Tensor | None = None) -> dict[tuple[str, str], str]:
    return {(row.layer, row.kind): row.note for row in describe(model, images) if row.note}


def test_with_images_calls_that_are_no_modules_are_listed(images):
    class Gate(nn.Module):
        """An activation of one's own: no parameters, and none of torch's."""

        def forward(self, x):
            return x * torch.sigmoid(x)

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.gate, self.spare = nn.Conv2d(3, 3, 1), nn.ReLU(), Gate(), nn.SiLU()

        def forward(self, x):
            x = self.gate(self.relu(nn.functional.relu(self.relu(self.conv(x)))))
            return nn.functional.leaky_relu(x).tanh().relu_().tanh()

    model = Calls()
    assert notes(model) == {}
    model.train()
    assert notes(model, images) == {
        ("", "relu()"): "a call, no module",
        ("", "leaky_relu()"): "a call, no module",
        ("", "tanh()"): "2 calls, no module",
        ("", "relu_()"): "a call, no module",
        ("relu", "ReLU"): "called 2 times",
        ("gate", "sigmoid()"): "a call, no module",
        ("spare", "SiLU"): "its forward is not called",
    }
    assert model.training


def test_describe_notes_steps_that_nobody_fitted_and_shared_weights(images):
    model = quantize(small_network(), 2, 4)
    assert notes(model) == dict.fromkeys((("2", "QuantizedReLU"), ("4", "QuantizedReLU")), "not calibrated")
    assert "not calibrated" in str(describe(model))
    calibrate(model, images)
    assert notes(model) == {}
    assert "note" not in str(describe(model))
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    for bits, size in ((32, 64.0), (1, 6.0)):
        if bits == 1:
            quantize(tied, 1, last_layer="quantize")
        rows = describe(tied)
        assert [row.size for row in rows] == [size, 0.0]
        assert [row.note for row in rows] == ["", "the weight of 0"]


def test_a_relu_that_is_called_twice_is_fitted_to_both_inputs():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.line = nn.ReLU(), nn.Linear(2, 2)

        def forward(self, x):
            return self.relu(self.relu(x) * 0.01)

    model = quantize(Twice(), activation_bits=4)
    calibrate(model, torch.rand(50, 2, generator=torch.Generator().manual_seed(0)) * 3)
    assert model.relu.step.item() * 15 > 2


def test_deepcopy_is_independent_and_equal(images):
    model = calibrate(quantize(small_network(), 2, 4), images).eval()
    twin = copy.deepcopy(model)
    expected = model(images)
    assert torch.equal(twin(images), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5).add_(0.1)
    assert not torch.equal(twin(images), expected)
    assert torch.equal(model(images), expected)


def test_dequantizing_a_copy_leaves_the_original_quantized(images):
    model = calibrate(quantize(small_network(), 1, 4), images).eval()
    expected = model(images)
    for _ in range(2):
        dequantize(copy.deepcopy(model))
    assert torch.equal(model(images), expected)
    twin = copy.deepcopy(model)
    dequantize(model)
    assert torch.equal(twin(images), expected)
    assert torch.equal(quantize(model, 1)[0].weight, twin[0].weight)


def test_state_dict_round_trip(images):
    model = calibrate(quantize(small_network(), 4, 4), images).eval()
    fresh = quantize(small_network(), 4, 4).eval()
    with torch.no_grad():
        fresh[0].parametrizations.weight.original.add_(1)
    assert not torch.equal(fresh(images), model(images))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images), model(images))


def bits_by_layer(model: nn.Module) -> dict[str, int]:
    return {row.layer: row.bits for row in describe(model)}


@pytest.mark.parametrize("first", ["quantize", "float"])
@pytest.mark.parametrize("last", ["quantize", "float"])
def test_first_and_last_layer_policies(first, last):
    model = quantize(small_network(), 2, first_layer=first, last_layer=last)
    bits = {"quantize": 2, "float": 32}
    assert bits_by_layer(model) == {"0": bits[first], "2": 32, "3": 2, "4": 32, "6": bits[last]}


def test_default_policy_quantizes_the_stem_and_not_the_classifier():
    rows = bits_by_layer(quantize(build_model("resnet8", 10), 1, 4))
    assert rows.pop("fc") == 32
    assert {bits for name, bits in rows.items() if "conv" in name} == {1}
    assert {bits for name, bits in rows.items() if "relu" in name} == {4}
    assert len(rows) == 7 + 7


def test_describe_counts_levels_and_names_scales():
    model = quantize(small_network(), 1, 4)
    rows = {row.layer: row for row in describe(model)}
    assert (rows["0"].kind, rows["0"].shape, rows["0"].levels) == ("Conv2d", (4, 3, 3, 3), 2)
    assert rows["0"].scale == pytest.approx(model[0].weight.abs().max().item())
    assert math.isnan(rows["6"].scale)
    assert (rows["2"].kind, rows["2"].bits, rows["2"].levels) == ("QuantizedReLU", 4, 16)
    assert rows["0"].size == 4 * 27 / 8 + 4
    assert rows["6"].size == 80 * 3 * 4
    printed = str(describe(model))
    assert "QuantizedReLU" in printed
    # 1 bit for 108 and 180 weights and a scale for each, 240 weights that stay float.
    assert printed.endswith("1,004 bytes of weights and scales (2,112 in float32)")
    assert rows["2"].scale == pytest.approx(model[2].step.item())


def test_what_stays_float_is_described_with_its_bytes():
    class Own(nn.ReLU):
        pass

    attention = nn.MultiheadAttention(8, 2, bias=False)
    model = quantize(
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.PReLU(4), Own(), attention), 4, last_layer="quantize"
    )
    rows = {row.layer: row for row in describe(model)}
    assert rows["1"].size == 4 * 4
    assert (rows["2"].kind, rows["2"].bits) == ("Own", 32)
    assert rows["3"].size == 4 * 3 * 8 * 8
    assert rows["3.out_proj"].bits == 4


def test_patterns_reach_what_is_quantized_and_names_everything():
    model = quantize(build_model("resnet8", 10), 1, overrides={"layer1.*": 8})
    assert not any(isinstance(module, QuantizedReLU) for module in model.modules())
    model = quantize(build_model("resnet8", 10), 1, overrides={"relu": 8})
    assert [m.bits for m in model.modules() if isinstance(m, QuantizedReLU)] == [8]
    with pytest.raises(ValueError, match="matches no"):
        quantize(build_model("resnet8", 10), 1, overrides={"layer1.0.relu?": 8})


def test_a_part_takes_a_float_checkpoint_by_itself(images):
    def build():
        return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU()))

    trained, model = build(), quantize(build(), 4, 4, last_layer="quantize")
    model[0].load_state_dict(trained[0].state_dict())
    assert torch.equal(model[0][0].parametrizations.weight.original, trained[0][0].weight)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        model[1].load_state_dict({"0.bias": torch.zeros(2)})


def test_a_checkpoint_without_steps_is_not_taken_for_a_float_one():
    with pytest.raises(RuntimeError, match=r"Missing key.*step"):
        quantize(small_network(), 4, 4).load_state_dict(quantize(small_network(), 2).state_dict())


def test_calibrate_says_what_it_needs(images):
    model = quantize(small_network(), 1, 4)
    for wrong in (images[:1], (images * 10).byte(), [images], images.tolist()):
        with pytest.raises(ValueError, match=r"float tensor .* at least 2 normalised images, got"):
            calibrate(model, wrong)


def test_calibrate_leaves_the_random_stream_alone(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    quantize(model, 1, 4)
    state = torch.get_rng_state()
    first, second = (float(calibrate(model, images)[2].step.detach()) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


class CallsReLU(nn.Module):
    """One that is a module and stays float, and one that is a call."""

    def __init__(self, kind, kept=nn.ReLU) -> None:
        super().__init__()
        self.body, self.kept, self.kind = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), kept(), kind

    def forward(self, x):
        return self.kind(self.kept(self.body(x)) - 0.1)


@pytest.mark.parametrize("kind", [torch.relu, nn.functional.relu, torch.Tensor.relu, nn.functional.relu6])
@pytest.mark.parametrize("kept", [nn.ReLU, nn.ReLU6])
def test_calibrate_warns_of_activations_that_are_calls(kind, kept, images):
    model = quantize(CallsReLU(kind, kept), 4, 4, last_layer="quantize", overrides={"kept": 32})
    with pytest.warns(UserWarning, match=r"1 ReLU\(s\) of CallsReLU are called as functions"):
        calibrate(model, images)


def test_calibrate_does_not_warn_of_modules(images, recwarn):
    calibrate(quantize(CallsReLU(nn.Identity()), 4, 4, last_layer="quantize", overrides={"kept": 32}), images)
    assert not [str(warning.message) for warning in recwarn if "functions" in str(warning.message)]


@pytest.mark.parametrize(("bits", "width"), [(1, 1), (2, 2), (3, 3), (4, 4), (8, 8)])
def test_weight_bytes_by_hand(bits, width):
    # Convolutions of 4·3·9 = 108 and 5·4·9 = 180 weights with one scale each; float: BN 2·4, linear 80·3 + 3.
    assert weight_bytes(small_network()) == 4 * (108 + 180 + 8 + 243)
    assert weight_bytes(quantize(small_network(), bits)) == (108 + 180) * width / 8 + 2 * 4 + 4 * (8 + 243)


def test_split_parameters_sets_the_steps_apart():
    model = quantize(small_network(), 1, 4)
    ordinary, steps = split_parameters(model)
    assert [id(step) for step in steps] == [id(model[2].step), id(model[4].step)]
    assert {id(p) for p in ordinary} | {id(p) for p in steps} == {id(p) for p in model.parameters()}
    assert len(ordinary) + len(steps) == len(list(model.parameters()))
    assert split_parameters(small_network())[1] == []


def test_a_relu_used_in_several_places_stays_one_module():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 3), shared)
    quantize(model, activation_bits=4)
    assert isinstance(model[1], QuantizedReLU)
    assert model[1] is model[3]
    assert isinstance(dequantize(model)[1], nn.ReLU)


def test_torchvision_network(images):
    from faqd_lib.utils.torchvision_import import torchvision

    model = quantize(torchvision.models.resnet18(num_classes=3), 1, 4)
    assert not any(type(module) is nn.ReLU for module in model.modules())
    assert parametrize.is_parametrized(model.layer4[1].conv2, "weight")
    assert not parametrize.is_parametrized(model.fc, "weight")


def test_bf16_autocast(images):
    model = calibrate(quantize(small_network(), 1, 4), images)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images).float().square().mean()
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_per_channel_scales_are_stored_too():
    quantized = quantize(small_network(), 4, per_channel=True)
    assert weight_bytes(quantized) == (108 + 180) / 2 + (4 + 5) * 4 + 4 * (8 + 243)
    rows = {row.layer: row for row in describe(quantized)}
    assert rows["3"].size == 180 / 2 + 5 * 4


@pytest.mark.parametrize("bits", [3.5, 0, 9, True, "1", None, 1.0])
def test_other_bits_are_refused_by_value(bits):
    for call in (
        lambda: quantize(small_network(), weight_bits=bits),
        lambda: quantize(small_network(), activation_bits=bits),
        lambda: quantize(small_network(), 1, overrides={"3": bits}),
    ):
        with pytest.raises(ValueError, match="must be one of") as raised:
            call()
        assert repr(bits) in str(raised.value)


def test_overrides_by_pattern():
    model = quantize(
        build_model("resnet8", 10), 1, 4, overrides={"layer1.*": 8, "layer1.0.conv2": 3, "fc": 2, "relu": 32}
    )
    rows = bits_by_layer(model)
    assert rows["layer1.0.conv1"] == 8
    assert rows["layer1.0.conv2"] == 3
    assert {bits for name, bits in rows.items() if name.startswith("layer1") and "relu" in name} == {8}
    assert rows["layer2.0.conv1"] == 1
    assert rows["fc"] == 2
    assert rows["relu"] == 32
    with pytest.raises(ValueError, match=r"layer9\.\*"):
        quantize(build_model("resnet8", 10), 1, overrides={"layer9.*": 4})


def test_shortcut_policy():
    for policy, bits in (("quantize", 1), ("float", 32)):
        rows = bits_by_layer(quantize(BUILDERS["resnet"](), 1, shortcuts=policy))
        assert rows["layer2.0.downsample.0"] == bits
        assert rows["layer2.0.conv1"] == 1


@pytest.mark.parametrize("strict", [True, False])
def test_a_float_state_dict_loads_into_the_quantized_network(images, strict):
    trained = small_network()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.05)
    expected = quantize(copy.deepcopy(trained), 4, 4).eval()(images)
    model = quantize(small_network(), 4, 4).eval()
    state = trained.state_dict()
    names = set(state)
    result = model.load_state_dict(state, strict=strict)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert set(state) == names
    assert torch.equal(model(images), expected)
    # A quantized checkpoint without one of its steps is still an error.
    damaged = model.state_dict()
    del damaged["2.step"]
    with pytest.raises(RuntimeError, match=r"2\.step"):
        model.load_state_dict(damaged)
    # Taken off again, float state dicts load as ever.
    dequantize(model).load_state_dict(trained.state_dict())


def test_dequantize_gives_back_the_very_modules():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(inplace=True), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True))
    before = list(model)
    quantize(model, 1, 4)
    assert [type(m) for m in model][1::2] == [QuantizedReLU] * 2
    dequantize(model)
    assert model[1] is before[1]
    assert model[3] is before[3]
    assert type(copy.deepcopy(quantize(model, 1, 4))[1].replaces) is nn.ReLU6


def test_blending_moves_latent_weights_toward_the_quantized_ones():
    model = quantize(small_network(), 1)
    (quantizer, latent), *_ = quantized_weights(model).values()
    before = latent.detach().clone()
    target = quantizer(before)
    blend(model, 0.25)
    assert torch.allclose(latent, 0.75 * before + 0.25 * target)
    others = {name: p.detach().clone() for name, p in model.named_parameters() if "original" not in name}
    blend(model, 1.0)
    assert torch.allclose(latent, quantizer(latent), rtol=1e-5)
    assert all(torch.equal(p, others[name]) for name, p in model.named_parameters() if name in others)
    with pytest.raises(ValueError, match=r"1\.5"):
        blend(model, 1.5)


def test_one_step_is_blended_coarse_gradient_descent(images):
    model = quantize(small_network(), 1)
    (quantizer, latent), *_ = quantized_weights(model).values()
    before = latent.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images).square().sum().backward()
    gradient = latent.grad.clone()
    blend(model, 0.1)
    optimizer.step()
    assert torch.allclose(latent, 0.9 * before + 0.1 * quantizer(before) - 0.1 * gradient, atol=1e-6)


def test_replicas_of_data_parallel_compute_the_same_and_train_the_original(images, monkeypatch):
    """What DataParallel does between GPUs, with the copies made on the CPU."""
    module = importlib.import_module("torch.nn.parallel.replicate")

    def copies(tensors, devices, detach=False):
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(module, "_get_device_index", lambda device, _: device)
    model = calibrate(quantize(small_network(), 2, 4), images).eval()
    replicas = module.replicate(model, [0, 1])
    outputs = [replica(part) for replica, part in zip(replicas, images.chunk(2), strict=True)]
    torch.testing.assert_close(torch.cat(outputs), model(images))
    torch.cat(outputs).square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("step"):
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)
        assert gradients[name].abs().max() > 0, name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="DataParallel replicates between GPUs: it needs two")
def test_data_parallel_wrappers(images):
    model = calibrate(quantize(small_network(), 2, 4), images)
    model, images = model.cuda().eval(), images.cuda()
    torch.testing.assert_close(nn.DataParallel(model)(images), model(images))


def test_distributed_data_parallel(images, tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = calibrate(quantize(small_network(), 2, 4), images)
        alone = copy.deepcopy(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for network in (wrapped, alone):
            network(images).square().sum().backward()
        for (name, mine), other in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert torch.equal(mine.grad, other.grad), name
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_compiles_as_one_graph(bits, images):
    model = calibrate(quantize(small_network(), bits, 4), images).eval()
    expected = model(images)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(images)
    assert torch.allclose(output, expected, rtol=1e-5, atol=1e-6)
    output.square().sum().backward()
    assert model[2].step.grad.abs() > 0


@pytest.mark.parametrize("name", ["resnet", "vgg", "mobilenet_v2", "densenet", "efficientnet"])
def test_torchvision_networks_are_quantized_and_train_a_step(name):
    torch.manual_seed(0)
    model = BUILDERS[name]()
    rectified = any(isinstance(module, nn.ReLU | nn.ReLU6) for module in model.modules())
    quantize(model, 1, 4 if rectified else 32)
    rows = describe(model)
    quantized = {row.layer for row in rows if row.bits != 32}
    weighted = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert set(weighted) - quantized == {weighted[-1]}  # the classifier, by policy
    # What stays float is listed, not skipped.
    silent = {n for n, m in model.named_modules() if isinstance(m, nn.SiLU | nn.Sigmoid)}
    assert silent == {row.layer for row in rows if row.kind in ("SiLU", "Sigmoid")}
    assert bool(silent) == (name == "efficientnet")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    calibrate(model, images)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()(images).square().mean().backward()
    latent = next(latent for _, latent in quantized_weights(model).values())
    before = latent.detach().clone()
    optimizer.step()
    assert not torch.equal(latent, before)
    assert model.eval()(images).isfinite().all()


def test_calibrate_fits_every_step_and_leaves_the_rest_alone(images):
    model = quantize(small_network(), 1, 4)
    model.eval()
    model[3].train()  # a mixture of modes, to be found again
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    fixed = {n: p.detach().clone() for n, p in model.named_parameters() if not n.endswith("step")}
    steps = [float(model[i].step.detach()) for i in (2, 4)]

    def squared_error() -> float:
        total = 0.0

        def add(_module, inputs, output):
            nonlocal total
            total += float((output - inputs[0].clamp_min(0)).square().mean())

        twin = copy.deepcopy(model).train()
        handles = [twin[i].register_forward_hook(add) for i in (2, 4)]
        with torch.no_grad():
            twin(images * 4)
        for handle in handles:
            handle.remove()
        return total

    before = squared_error()
    assert calibrate(model, images * 4) is model
    assert squared_error() < before
    assert all(float(model[i].step.detach()) != old for i, old in zip((2, 4), steps, strict=True))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p, fixed[n]) for n, p in model.named_parameters() if n in fixed)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_calibrate_without_quantized_activations_does_nothing(images):
    model = quantize(small_network(), 1)
    before = copy.deepcopy(model.state_dict())
    calibrate(model, images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
