"""Quantizers: levels, scales, gradients, policies, and the way in and out of a network."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from faqd_lib.models import build_model
from faqd_lib.quantize import (
    QuantizedReLU,
    UniformWeight,
    calibrate,
    dequantize,
    describe,
    quantize,
    split_parameters,
    weight_bytes,
    weight_quantizer,
)

BITS = (1, 2, 4)
HIGHEST = {1: 1, 2: 1, 4: 7}


def weights(seed: int = 0, count: int = 600) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.3


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


# ---- weights


@pytest.mark.parametrize(
    ("bits", "weight", "expected"),
    [
        (1, [-3.0, 1.0, 2.0], [-2.0, 2.0, 2.0]),
        (2, [-3.0, 0.2, 1.0, 2.0], [-2.5, 0.0, 0.0, 2.5]),
        (4, [-0.7, 0.1, 0.3], [-0.7, 0.1, 0.3]),
    ],
)
def test_documented_examples(bits, weight, expected):
    assert torch.allclose(weight_quantizer(bits)(torch.tensor(weight)), torch.tensor(expected))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_values_on_one_scale(bits, dtype):
    weight = weights().to(dtype)
    quantized = weight_quantizer(bits)(weight)
    scale, levels = weight_quantizer(bits).levels(weight)
    assert quantized.dtype == dtype
    assert 2 <= quantized.unique().numel() <= 2**bits
    assert torch.equal(quantized, scale * levels)
    assert torch.equal(levels, levels.round())
    assert levels.abs().max() <= HIGHEST[bits]


@given(st.sampled_from(BITS), st.integers(1, 40), st.integers(0, 2**31))
def test_idempotent(bits, count, seed):
    quantizer = weight_quantizer(bits)
    once = quantizer(weights(seed, count))
    assert torch.allclose(quantizer(once), once, rtol=1e-5, atol=0)


@given(st.sampled_from(BITS), st.integers(1, 40), st.integers(0, 2**31))
def test_odd(bits, count, seed):
    weight, quantizer = weights(seed, count), weight_quantizer(bits)
    assert weight.abs().min() > 0  # sign(0) counts as +1, so oddness holds away from 0 only
    assert torch.equal(quantizer(-weight), -quantizer(weight))


@given(st.sampled_from(BITS), st.integers(1, 40), st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_a_larger_weight_gives_as_much_larger_a_result(bits, count, factor, seed):
    weight, quantizer = weights(seed, count).double(), weight_quantizer(bits)
    assert torch.allclose(quantizer(factor * weight), factor * quantizer(weight), rtol=1e-9, atol=0)


@given(st.sampled_from(BITS), st.integers(1, 60), st.floats(1e-3, 1e2), st.integers(0, 2**31))
def test_exact_on_its_own_lattice(bits, count, scale, seed):
    levels = torch.randint(-HIGHEST[bits], HIGHEST[bits] + 1, (count,), generator=torch.Generator().manual_seed(seed))
    levels[0] = HIGHEST[bits]  # the lattice is that of its largest level
    if bits == 1:
        levels = torch.where(levels < 0, -1, 1)
    weight = levels.double() * scale
    assert torch.allclose(weight_quantizer(bits)(weight), weight, rtol=1e-9, atol=1e-12 * scale)


@pytest.mark.parametrize("bits", BITS)
def test_scale_is_the_least_squares_one_for_its_levels(bits):
    weight = weights(2).double()
    scale, levels = weight_quantizer(bits).levels(weight)

    def error(candidate):
        return float((weight - candidate * levels).square().sum())

    scan = torch.linspace(0.2, 3, 4001, dtype=torch.float64) * scale
    best = scan[torch.tensor([error(s) for s in scan]).argmin()]
    assert float(scale) == pytest.approx(float(best), rel=1e-3)
    assert all(error(scale) <= error(s) + 1e-12 for s in scan)


# Values, and how much worse than the best grid of a scan 4 bits may be: levels and scale are found by alternating,
# which ends in a local optimum.
DISTRIBUTIONS = {
    "gaussian": (lambda: weights(3), 0.03),
    "uniform": (lambda: torch.rand(600, generator=torch.Generator().manual_seed(3)) - 0.5, 0.15),
    "heavy tails": (lambda: weights(3) ** 3, 0.15),
    "shifted": (lambda: weights(3) + 0.4, 0.15),
}


@pytest.mark.parametrize(("draw", "slack"), DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@pytest.mark.parametrize("bits", [1, 4])
def test_no_uniform_grid_is_much_better(bits, draw, slack):
    weight = draw().double()
    error = float((weight - weight_quantizer(bits)(weight)).square().sum())
    scan = torch.linspace(1e-4, float(weight.abs().max()), 2000, dtype=torch.float64)
    if bits == 1:
        errors = [float((weight.abs() - s).square().sum()) for s in scan]
    else:
        errors = [float((weight - s * (weight / s).round().clamp(-7, 7)).square().sum()) for s in scan]
    assert error <= min(errors) * (1 + (slack if bits == 4 else 1e-6))


def test_ternary_scale_is_of_the_kept_weights_and_its_error_as_known():
    weight = weights(4, 50_000).double()
    quantized = weight_quantizer(2)(weight)
    kept = weight.abs() >= 0.7 * weight.abs().mean()
    assert torch.equal(quantized != 0, kept)
    assert float(quantized.abs().max()) == pytest.approx(float(weight[kept].abs().mean()), rel=1e-12)
    # 0.19 of the variance for Gaussian weights; averaging over the zeros, too, would leave 0.34.
    assert float((weight - quantized).square().mean() / weight.var()) == pytest.approx(0.19, abs=0.01)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "values", [[0.0] * 7, [0.25] * 7, [-0.25] * 7, [0.3], [-0.3], [0.0], [1e-15] * 3, [1e18, -1e18]]
)
def test_degenerate_tensors(bits, values):
    weight = torch.tensor(values, requires_grad=True)
    quantized = weight_quantizer(bits)(weight)
    quantized.sum().backward()
    assert torch.allclose(quantized, weight, rtol=1e-5, atol=0)
    assert torch.equal(weight.grad, torch.ones_like(weight))


@pytest.mark.parametrize("bits", BITS)
def test_gradient_goes_straight_through(bits):
    weight = weights(5).requires_grad_()
    gradient = weights(6)
    weight_quantizer(bits)(weight).backward(gradient)
    assert torch.equal(weight.grad, gradient)


@pytest.mark.parametrize("bits", [3.5, 3, 0, 8, True, "1", None, 1.0])
def test_other_bits_are_refused_by_value(bits):
    for call in (
        lambda: weight_quantizer(bits),
        lambda: quantize(small_network(), weight_bits=bits),
        lambda: quantize(small_network(), activation_bits=bits),
    ):
        with pytest.raises(ValueError, match="_bits must be one of") as raised:
            call()
        assert repr(bits) in str(raised.value)


def test_uniform_needs_three_bits():
    with pytest.raises(ValueError, match="got 2"):
        UniformWeight(2)


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
    assert bits_by_layer(model) == {"0": bits[first], "3": 2, "6": bits[last]}


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
    assert (rows["2"].kind, rows["2"].bits, rows["2"].levels) == ("ReLU", 4, 16)
    assert rows["2"].scale == pytest.approx(model[2].step.item())


@pytest.mark.parametrize(("bits", "width"), [(1, 1), (2, 2), (4, 4)])
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
    from faqd_lib._torchvision import torchvision

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


# ---- activations


def quantized_relu(step: float) -> QuantizedReLU:
    relu = QuantizedReLU(4)
    with torch.no_grad():
        relu.step.fill_(step)
    return relu


def test_quantized_relu_levels():
    relu = quantized_relu(0.1)
    assert torch.allclose(relu(torch.tensor([-1.0, 0.26, 9.0])), torch.tensor([0.0, 0.3, 1.5]))
    values = relu(torch.linspace(-1, 3, 4001)).unique()
    assert torch.allclose(values, torch.arange(16) * 0.1, atol=1e-6)
    assert torch.allclose(relu(values), values)
    # Nearest, not up: no bias over the range.
    x = torch.linspace(0, 1.5, 15_001)
    assert abs((relu(x) - x).mean().item()) < 1e-4


def test_quantized_relu_gradient_window():
    x = torch.tensor([-0.5, -1e-3, 1e-3, 0.04, 0.7, 1.499, 1.501, 20.0], requires_grad=True)
    upstream = torch.arange(1.0, 9.0)
    quantized_relu(0.1)(x).backward(upstream)
    assert torch.equal(x.grad, upstream * torch.tensor([0.0, 0, 1, 1, 1, 1, 0, 0]))


def test_step_gradient_is_lsqs():
    relu = quantized_relu(0.2)
    x = torch.randn(300, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2
    upstream = torch.randn(300, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = 0.0
    for value, weight in zip(x.tolist(), upstream.tolist(), strict=True):
        scaled = value / relu.step.item()
        if scaled >= 15:
            expected += weight * 15
        elif scaled > 0:
            expected += weight * (round(scaled) - scaled)
    relu(x).backward(upstream)
    assert float(relu.step.grad) != 0
    assert float(relu.step.grad) == pytest.approx(expected / math.sqrt(300 * 15), rel=1e-4)


def test_step_learns_from_clipped_values():
    relu = quantized_relu(0.1)
    target, optimizer = torch.full((50,), 3.0), torch.optim.SGD(relu.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (relu(target) - target).square().mean().backward()
        optimizer.step()
    assert relu.step.item() * 15 > 2.5  # it began with a range of 1.5


def test_two_layers_clip_each_at_its_own_range():
    narrow, wide = quantized_relu(0.1), quantized_relu(0.4)
    x = torch.tensor([1.0, 3.0, 7.0], requires_grad=True)
    # The layer built last must not decide for the first: that is how mixed settings go wrong.
    narrow_out, wide_out = narrow(x), wide(x)
    assert narrow_out.max().item() == pytest.approx(1.5)
    assert wide_out.max().item() == pytest.approx(6.0)
    assert torch.autograd.grad(narrow_out.sum(), x)[0].tolist() == [1, 0, 0]
    assert torch.autograd.grad(wide_out.sum(), x)[0].tolist() == [1, 1, 0]


@pytest.mark.parametrize("spread", [0.05, 1.0, 20.0])
def test_fitting_comes_close_to_the_best_step(spread):
    relu, x = QuantizedReLU(4), torch.randn(4000, generator=torch.Generator().manual_seed(4)) * spread
    target = x.clamp_min(0)

    def error() -> float:
        with torch.no_grad():
            return float((relu(x) - target).square().mean())

    before = error()
    relu.fit(x)
    after = error()
    if spread != 1:  # the step that a layer starts with is made for unit variance
        assert after < before / 2
    scan = []
    for step in torch.linspace(0.02, 0.4, 200) * spread:
        relu.step.data.fill_(step)
        scan.append(error())
    assert after <= min(scan) * 1.05


def test_fitting_to_nothing_positive_keeps_the_step():
    relu = QuantizedReLU(4)
    before = float(relu.step.detach())
    relu.fit(-torch.rand(10))
    assert relu.step.item() == before > 0


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
