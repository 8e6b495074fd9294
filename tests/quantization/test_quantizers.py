"""Weight and activation quantizers alone: levels, scales, gradients, whatever the tensor."""

import copy
import math
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fresh_process import run_fresh
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from faqd_lib import compile_activations, quantize
from faqd_lib.quantization import relu_kernels as activation_kernels
from faqd_lib.quantization import step_search
from faqd_lib.quantization.relu import QuantizedReLU
from faqd_lib.quantization.relu_kernels import features
from faqd_lib.quantization.step_search import best_step
from faqd_lib.quantization.weights import UniformWeight, weight_quantizer

BITS = (1, 2, 3, 4, 5, 6, 7, 8)
HIGHEST = {1: 1, 2: 1} | {bits: 2 ** (bits - 1) - 1 for bits in BITS[2:]}


def weights(seed: int = 0, count: int = 600) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.3


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_few_values_on_one_scale(bits, dtype):
    weight = weights().to(dtype)
    quantized = weight_quantizer(bits)(weight)
    scale, levels = weight_quantizer(bits).levels(weight)
    assert quantized.dtype == dtype
    assert 2 <= quantized.unique().numel() <= 2**bits
    assert levels.unique().numel() <= 2**bits
    assert torch.equal(quantized, (scale * levels).to(dtype))
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


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


DISTRIBUTIONS = {
    "gaussian": lambda: weights(3, 5000),
    "few": lambda: weights(3, 40),
    "uniform": lambda: torch.rand(5000, generator=generator(3)) - 0.5,
    "heavy tails": lambda: weights(3, 5000) ** 3,
    "heavier tails": lambda: weights(3, 5000) / weights(4, 5000).abs(),
    "shifted": lambda: weights(3, 5000) * 0.2 + 0.4,
    "two clusters": lambda: torch.cat((weights(3, 3000) * 0.01, 1 + weights(4, 2000) * 0.01)),
}


def brute_force(weight: torch.Tensor, bits: int) -> float:
    """The least squared error over a fine grid of steps."""
    if bits == 1:
        steps = torch.linspace(0, float(weight.abs().max()), 4001, dtype=torch.float64)
        return min(float((weight.abs() - s).square().sum()) for s in steps)
    # From a step that reaches the largest weight with its first level to one that clips nearly all of them.
    steps = weight.abs().max() / torch.logspace(-0.3, math.log10(40 * HIGHEST[bits]), 3000, dtype=torch.float64)
    h = HIGHEST[bits]
    return min(float((weight - s * (weight / s).round().clamp(-h, h)).square().sum()) for s in steps)


@pytest.mark.parametrize("draw", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@pytest.mark.parametrize("bits", [1, 3, 4, 6, 8])
def test_error_is_within_one_percent_of_brute_force(bits, draw):
    weight = draw().double()
    error = float((weight - weight_quantizer(bits)(weight)).square().sum())
    assert error <= brute_force(weight, bits) * (1 + (1e-2 if bits > 1 else 1e-6))


@given(
    st.sampled_from([3, 4, 5, 8]),
    st.lists(st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=1, max_size=12),
)
def test_short_tensors_are_searched_exactly(bits, values):
    weight = torch.tensor(values, dtype=torch.float64)
    error = float((weight - weight_quantizer(bits)(weight)).square().sum())
    if weight.any():
        assert error <= brute_force(weight, bits) * (1 + 1e-9) + 1e-18 * float(weight.square().sum())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [2, 3, 5, 12])
def test_idempotent_and_exact_on_its_lattice_in_float32(bits, count):
    for seed in range(40):
        once = weight_quantizer(bits)(weights(seed, count))
        torch.testing.assert_close(weight_quantizer(bits)(once), once, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [6, 4000])
@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e19, 1e30, 1e37])
def test_magnitude_does_not_matter(bits, count, factor):
    weight = weights(12, count).clamp(-0.9, 0.9)
    expected = weight_quantizer(bits)(weight.double())
    found = weight_quantizer(bits)((weight.double() * factor).float()).double() / factor
    # Not the values: two steps may be equally good but for the rounding of the weights to float32.
    errors = [float((weight.double() - quantized).square().sum()) for quantized in (found, expected)]
    assert errors[0] <= errors[1] * 1.001 + 1e-9


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_long_channels_are_within_one_percent_of_brute_force(bits):
    rows = torch.stack([weights(13, 3100), weights(14, 3100) ** 3, weights(15, 3100) * 0.02 + 1, torch.cat(
        [centre + 0.004 * weights(16 + i, 1000) for i, centre in enumerate((0.2, 0.55, 0.97))] + [torch.ones(100)]
    )]).double()  # fmt: skip
    quantized = weight_quantizer(bits, per_channel=True)(rows)
    for row, found in zip(rows, quantized, strict=True):
        assert float((row - found).square().sum()) <= 1.01 * brute_force(row, bits)


LONG = 8200  # at 8 bits far more than an exact search of all its values looks at, at 3 bits more, too


@pytest.mark.parametrize("bits", [3, 5, 7, 8])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("distinct", [1, 2, 4, 11, 128])
def test_long_tensors_of_few_distinct_values(bits, per_channel, distinct):
    for seed in range(4):
        values = torch.rand(distinct, generator=generator(seed), dtype=torch.float64) + 0.01
        weight = values[torch.randint(distinct, (2, LONG), generator=generator(seed))] * torch.tensor([[1.0], [-3.0]])
        quantizer = weight_quantizer(bits, per_channel)
        once = quantizer(weight)
        assert torch.allclose(quantizer(once), once, rtol=1e-12)
        for part, found in zip(weight, once, strict=True) if per_channel else [(weight, once)]:
            error = float((part - found).square().sum())
            unit, counts = part.abs().flatten().unique(return_counts=True)
            steps = unit.max() / torch.logspace(-0.3, math.log10(40 * HIGHEST[bits]), 20_000, dtype=torch.float64)
            left = unit - steps[:, None] * (unit / steps[:, None]).round().clamp(0, HIGHEST[bits])
            assert error <= 1.01 * float((left.square() * counts).sum(1).min()) + 1e-24


@given(st.sampled_from([3, 4, 5, 6, 7, 8]), st.booleans(), st.floats(1e-3, 1e2), st.integers(0, 2**31))
def test_long_tensors_are_exact_on_their_own_lattice(bits, per_channel, scale, seed):
    h = HIGHEST[bits]
    levels = torch.randint(-h, h + 1, (2, LONG), generator=generator(seed))
    levels[:, 0] = h
    weight = levels.double() * scale
    assert torch.allclose(weight_quantizer(bits, per_channel)(weight), weight, rtol=1e-9, atol=0)


def test_a_long_tensor_of_zeros_and_one_that_is_compiled():
    quantizer = weight_quantizer(8)
    assert not quantizer(torch.zeros(LONG)).any()
    for weight in (weights(5, LONG), torch.full((LONG,), 0.3), torch.zeros(LONG)):
        compiled = torch.compile(quantizer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(weight), quantizer(weight))


def test_binary_scale_is_the_least_squares_one():
    weight = weights(8).double()
    scale, levels = weight_quantizer(1).levels(weight)
    assert float(scale) == pytest.approx(float((weight * levels).sum() / levels.square().sum()), rel=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_per_channel_is_each_channel_by_itself(bits):
    weight = torch.randn(5, 3, 3, 3, generator=generator(9)) * torch.tensor([0.01, 1, 5, 0, 0.3]).view(5, 1, 1, 1)
    scale, levels = weight_quantizer(bits, per_channel=True).levels(weight)
    quantized = weight_quantizer(bits, per_channel=True)(weight)
    assert scale.shape == (5, 1, 1, 1)
    assert torch.equal(quantized, scale * levels)
    for channel in range(5):
        assert torch.allclose(quantized[channel], weight_quantizer(bits)(weight[channel]), rtol=1e-5, atol=1e-8)
    whole = weight_quantizer(bits)(weight)
    assert (weight - quantized).square().sum() < (weight - whole).square().sum()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_weight_that_is_not_finite_is_an_error(bits, per_channel, bad):
    weight = weights(10).view(6, 100).clone()
    weight[2, 3] = bad
    with pytest.raises(ValueError, match=r"\(6, 100\).*NaN or an infinity"):
        weight_quantizer(bits, per_channel)(weight)


def test_an_empty_weight_is_an_error():
    with pytest.raises(ValueError, match=r"\(0, 3\)"):
        weight_quantizer(4)(torch.ones(0, 3))


@pytest.mark.parametrize("highest", [3, 7, 127])
def test_scan_and_exact_search_agree(highest, monkeypatch):
    rows = torch.stack([draw()[:40].abs().double() for draw in DISTRIBUTIONS.values()])

    def errors() -> torch.Tensor:
        step = best_step(rows, highest)
        return (rows - step * (rows / step).round().clamp(0, highest)).square().sum(1)

    monkeypatch.setattr(step_search, "_EXACT", 10**9)
    exact = errors()
    monkeypatch.setattr(step_search, "_EXACT", 0)
    assert (exact <= errors() * (1 + 1e-9)).all()
    if highest < 100:  # forty values meet a grid of 127 levels by chance, which a scan may miss
        assert (errors() <= exact * 1.05).all()


def scanned_plainly(row: torch.Tensor, highest: int, bins: int, spacing: float) -> torch.Tensor:
    """The scan of one row (n,) as ``step_search`` describes it, each step looked up by itself and each row alone."""
    peak = row.max()

    def place(values: torch.Tensor) -> torch.Tensor:
        return ((values / peak).log2() * (bins / 16) + bins).nan_to_num(0, 0, 0).floor().clamp(0, bins - 1).long()

    counts = torch.bincount(place(row), minlength=bins).double()
    values = peak * ((torch.arange(bins, dtype=row.dtype) + 0.5 - bins) * (16 / bins)).exp2()
    below, mass = (torch.cat((torch.zeros(1), sums.cumsum(0))) for sums in (counts, values * counts))
    half = torch.arange(highest, dtype=row.dtype) + 0.5

    def explained(step: torch.Tensor) -> torch.Tensor:
        edges = step * half
        at = torch.where(edges > peak, bins, place(edges) + 1)
        energy = ((below[-1] - below[at]) * (2 * half)).sum()
        return torch.where(energy > 0, (mass[-1] - mass[at]).sum().square() / energy.clamp_min(1), 0)

    grid = torch.arange(-12.0, 1.0, spacing, dtype=row.dtype).exp2() * (peak / highest)
    coarse = grid[torch.stack([explained(step) for step in grid]).topk(4).indices]
    fine = torch.linspace(-spacing, spacing, 33, dtype=row.dtype).exp2()
    steps = (coarse.unsqueeze(1) * fine).flatten()
    return steps[torch.stack([explained(step) for step in steps]).topk(1).indices]


@pytest.mark.parametrize("highest", [3, 127])
@pytest.mark.parametrize(("rows", "bins", "spacing"), [(1, 2**15, 1 / 96), (9, 2**13, 1 / 32)])
def test_steps_are_scanned_to_the_bits_of_the_plain_arithmetic(rows, bins, spacing, highest):
    values = torch.randn(rows, 3000, generator=generator(23), dtype=torch.float64).abs()
    values[-1].pow_(3)
    unit = values / values.amax(1, keepdim=True)
    expected = torch.stack([scanned_plainly(row, highest, bins, spacing) for row in unit])
    assert torch.equal(step_search._scanned_step(unit, highest), expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_fitted_in_float32(bits, dtype):
    weight = weights(11, 3000).to(dtype)
    assert torch.equal(weight_quantizer(bits)(weight), weight_quantizer(bits)(weight.float()).to(dtype))


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


@pytest.mark.parametrize("bits", [3.5, 0, 9, True, "1", None, 1.0])
def test_other_bits_are_refused_by_value(bits):
    for call in (lambda: weight_quantizer(bits), lambda: QuantizedReLU(bits)):
        with pytest.raises(ValueError, match="_bits must be one of") as raised:
            call()
        assert repr(bits) in str(raised.value)


@pytest.mark.parametrize("bits", [2, 9])
def test_uniform_has_three_to_eight_bits(bits):
    with pytest.raises(ValueError, match=f"got {bits}"):
        UniformWeight(bits)


# ---- activations


def quantized_relu(step: float, bits: int = 4, step_gradient: str = "lsq") -> QuantizedReLU:
    relu = QuantizedReLU(bits, step_gradient)
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


def test_two_layers_of_other_bits_keep_their_own_levels():
    """What is kept on a class is that of the layer built last: forward, window and step gradient of the first."""
    coarse, fine = quantized_relu(0.5, bits=2), quantized_relu(0.5, bits=8)
    x = torch.tensor([1.2, 9.0, 200.0], requires_grad=True)
    for relu, highest, window in ((coarse, 3, [1, 0, 0]), (fine, 255, [1, 1, 0])):
        out = relu(x)
        assert out.tolist() == [1.0, min(9.0, 0.5 * highest), 0.5 * highest]
        by_x, by_step = torch.autograd.grad(out.sum(), [x, relu.step])
        assert by_x.tolist() == window
        inside = (2 - 2.4) + (0 if highest == 255 else 3)  # round(x/α) − x/α, and Q above
        assert by_step.item() == pytest.approx((inside + highest) / (3 * highest) ** 0.5)


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
    assert after <= min(scan) * 1.01


def test_fitting_to_nothing_positive_keeps_the_step_but_for_its_last_digits():
    relu = QuantizedReLU(4)
    before = relu.step.item()
    relu.fit(-torch.rand(10))
    fitted = relu.step.item()
    assert fitted == pytest.approx(before, rel=1e-6)
    assert not relu.is_initial
    relu.fit(-torch.rand(10))
    assert relu.step.item() == fitted


@pytest.mark.parametrize("bits", BITS)
def test_levels_of_every_width(bits):
    relu = quantized_relu(0.5, bits)
    values = relu(torch.linspace(-2, 200, 20_001)).unique()
    assert torch.allclose(values, torch.arange(2**bits) * 0.5)


def test_coarse_gradient_is_three_valued():
    relu = quantized_relu(0.1, 4, "coarse")
    x = torch.tensor([-1.0, 0.26, 1.4, 9.0], requires_grad=True)
    upstream = torch.tensor([5.0, 3.0, 2.0, 7.0])
    relu(x).backward(upstream)
    assert relu.step.grad.item() == pytest.approx((3 * 8 + 2 * 8 + 7 * 15) / math.sqrt(4 * 15), rel=1e-5)
    assert x.grad.tolist() == [0, 3, 2, 0]
    one_bit = quantized_relu(1.0, 1, "coarse")
    one_bit(torch.tensor([0.4, 2.0])).sum().backward()
    assert one_bit.step.grad.item() == pytest.approx((1 + 1) / math.sqrt(2), rel=1e-6)


@pytest.mark.parametrize("step_gradient", ["lsq", "coarse"])
def test_pace_of_a_step_does_not_depend_on_the_batch_size(step_gradient):
    x = 2 * torch.randn(4, 3, 5, 5, generator=generator(21))
    gradients = []
    for copies in (1, 32):
        relu = quantized_relu(0.1, 4, step_gradient)
        relu(x.repeat(copies, 1, 1, 1)).square().sum((1, 2, 3)).mean().backward()  # as losses are: a mean over images
        gradients.append(relu.step.grad.item())
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-4)


@pytest.mark.parametrize(("shape", "count"), [((8, 3, 5, 5), 75), ((8, 7), 7), ((9,), 9), ((), 1), ((0, 3), 0)])
def test_features_are_counted_for_one_image(shape, count):
    assert features(torch.zeros(shape)) == count


def test_frozen_step_has_no_gradient():
    relu = quantized_relu(0.1, 4, "frozen")
    x = torch.tensor([-1.0, 0.26, 9.0], requires_grad=True)
    learned = quantized_relu(0.1, 4)(x)
    assert torch.equal(relu(x), learned)
    relu(x).sum().backward()
    assert relu.step.grad is None
    assert x.grad.tolist() == [0, 1, 0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_lsq_gradient_is_the_derivative_of_the_surrogate(bits):
    """With the levels' rounding held constant (straight through), α·(x/α + r) inside and α·Q above."""
    highest, step = 2**bits - 1, 0.25
    x = torch.randn(400, generator=generator(12), dtype=torch.float64) * highest * step
    upstream = torch.randn(400, generator=generator(13), dtype=torch.float64)
    scaled = x / step
    offset = scaled.clamp(0, highest).round() - scaled  # constant, as the straight-through estimator has it

    def surrogate(alpha: float) -> float:
        inside = (scaled > 0) & (scaled < highest)
        value = torch.where(inside, x + alpha * offset, alpha * highest * (scaled >= highest).double())
        return float((value * upstream).sum())

    difference = (surrogate(step + 1e-4) - surrogate(step - 1e-4)) / 2e-4
    relu = quantized_relu(step, bits).double()
    relu(x).backward(upstream)
    assert abs(difference) > 1e-3
    assert float(relu.step.grad) * math.sqrt(400 * highest) == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("layout", ["channels last", "contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("step_gradient", ["lsq", "coarse"])
@pytest.mark.parametrize("chunk", [7, 10**6])
def test_memory_layout_and_chunks_change_nothing(layout, step_gradient, chunk, monkeypatch):
    x = torch.randn(3, 4, 6, 5, generator=generator(14), dtype=torch.float64)
    upstream = torch.randn(3, 4, 6, 5, generator=generator(15), dtype=torch.float64)
    arranged = {
        "channels last": lambda: x.to(memory_format=torch.channels_last),
        "contiguous": x.clone,
        "transposed": lambda: x.transpose(1, 3).contiguous().transpose(1, 3),
        "sliced": lambda: torch.cat((x, x), dim=3)[..., :5],
    }[layout]()
    expected_step, expected = quantized_relu(0.2, 4, step_gradient).double(), x.clone().requires_grad_()
    expected_step(expected).backward(upstream)
    monkeypatch.setattr(activation_kernels, "_CHUNK", chunk * x.element_size())
    relu = quantized_relu(0.2, 4, step_gradient).double()
    leaf = arranged.detach().requires_grad_()
    output = relu(leaf)
    output.backward(upstream.to(memory_format=torch.channels_last))
    assert torch.equal(output, quantized_relu(0.2).double()(x))
    assert torch.equal(leaf.grad, expected.grad)
    assert float(relu.step.grad) == pytest.approx(float(expected_step.step.grad), rel=1e-10)


def test_quantized_relu_in_bf16_and_empty():
    relu = quantized_relu(0.25)
    x = torch.randn(50, generator=generator(16)).bfloat16().requires_grad_()
    output = relu(x)
    output.sum().backward()
    assert output.dtype == x.grad.dtype == torch.bfloat16
    assert relu.step.grad.dtype == torch.float32
    assert torch.equal(output.float(), relu(x.float()))  # multiples of 1/4 up to 3.75: exact in bf16
    assert relu(torch.ones(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_divided_in_float32(bits, dtype):
    x = (torch.randn(2000, generator=generator(18)) * 2).to(dtype)
    upstream = torch.randn(2000, generator=generator(19)).to(dtype)
    results = []
    for source in (x, x.float()):
        relu = quantized_relu(0.013 * 256 / 2**bits, bits)
        relu(source).backward(upstream.to(source.dtype))
        results.append((relu(source).float(), float(relu.step.grad)))
    assert torch.equal(results[0][0], results[1][0].to(dtype).float())
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-3)


@pytest.mark.parametrize("step_gradient", ["lsq", "coarse"])
def test_large_and_infinite_inputs_have_a_finite_step_gradient(step_gradient):
    for x in (torch.tensor([400.0, 1.0], dtype=torch.float16), torch.tensor([math.inf, -math.inf, 1.0])):
        relu = quantized_relu(0.005, 4, step_gradient)
        relu(x).sum().backward()
        assert relu.step.grad.isfinite()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_fitting_to_what_is_not_finite_is_an_error(bad):
    with pytest.raises(ValueError, match="NaN or an infinity"):
        QuantizedReLU(4).fit(torch.tensor([1.0, bad]))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("step_gradient", ["lsq", "coarse"])
def test_what_traces_and_transforms_networks_takes_the_quantized_relu(step_gradient):
    relu, x = quantized_relu(0.2, 4, step_gradient), torch.randn(2, 3, 4, 4, generator=generator(17))
    leaf = x.clone().requires_grad_()
    expected = relu(leaf)
    gradient, by_step = torch.autograd.grad(expected.square().sum(), [leaf, relu.step])
    network = nn.Sequential(relu)
    for same in (
        torch.compile(network, backend="aot_eager", fullgraph=True),
        torch.fx.symbolic_trace(network),
        torch.jit.trace(network, x),
    ):
        leaf = x.clone().requires_grad_()
        output = same(leaf)
        assert torch.equal(output, expected)
        step = next(iter(same.parameters()))
        found, found_step = torch.autograd.grad(output.square().sum(), [leaf, step])
        assert torch.equal(found, gradient)
        assert found_step.item() == pytest.approx(by_step.item(), rel=1e-4)
    assert torch.equal(torch.export.export(network, (x,)).module()(x), expected)  # values only
    assert torch.equal(torch.func.vmap(relu)(x), expected)
    assert torch.equal(torch.func.grad(lambda x: relu(x).square().sum())(x), gradient)


def test_training_without_a_compiler_does_not_import_one():
    code = """
import sys
import torch
from faqd_lib.quantization.relu import QuantizedReLU
relu = QuantizedReLU(4)
relu(torch.randn(3, 4)).sum().backward()
assert relu.step.grad is not None
print(*{"torch._dynamo", "torch._inductor", "sympy"}.intersection(sys.modules))
"""
    done = run_fresh(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


needs_compiler = pytest.mark.usefixtures("compiler")


def gradients(x: torch.Tensor, bits: int, step_gradient: str, compiled: bool) -> tuple[torch.Tensor, ...]:
    relu = quantized_relu(0.0937, bits, step_gradient)
    relu.compiled = compiled
    leaf = x.detach().requires_grad_()
    output = relu(leaf)
    upstream = torch.randn(x.shape, generator=generator(21)).to(x.dtype)
    output.backward(upstream.to(memory_format=torch.channels_last))
    return output.detach(), leaf.grad, relu.step.grad


def large(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = (torch.randn(3, 32, 30, 31, generator=generator(20)) * 4).to(dtype)
    assert x.numel() >= activation_kernels._COMPILED_FROM
    return x


@needs_compiler
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("step_gradient", ["lsq", "coarse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_give_the_same_numbers(bits, step_gradient, dtype):
    x = large(dtype)
    for arranged in (
        x,
        x.to(memory_format=torch.channels_last),
        torch.cat((x, x), dim=3)[..., :31],
        x[:1].expand_as(x),
    ):
        compiled, otherwise = (gradients(arranged, bits, step_gradient, which) for which in (True, False))
        assert torch.equal(compiled[0], otherwise[0])
        assert torch.equal(compiled[1], otherwise[1])
        assert compiled[0].stride() == otherwise[0].stride()
        # The terms of the sum have both signs; in bfloat16 their rounding shows where they cancel.
        rel, absolute = (1e-4, 0) if dtype == torch.float32 else (2e-2, 1e-5)
        assert compiled[2].item() == pytest.approx(otherwise[2].item(), rel=rel, abs=absolute)


@needs_compiler
def test_compiled_kernels_are_made_for_every_use_and_never_too_often():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for step_gradient in ("lsq", "coarse"):
                    with torch.autocast("cpu", torch.bfloat16):
                        gradients(large(dtype), 4, step_gradient, True)
                    gradients(large(dtype), 1, step_gradient, True)
                    assert activation_kernels._made[dtype, step_gradient == "coarse", threads] is not None
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_compiled_kernels_are_made_once_whatever_threads_ask(monkeypatch):
    monkeypatch.setattr(activation_kernels, "_made", {})
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: activation_kernels.kernels(torch.float32, False), range(4)))
        found = list(pool.map(lambda _: gradients(large(), 4, "lsq", True), range(8)))
    assert set(made) == {activation_kernels._made[torch.float32, False, torch.get_num_threads()]}
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_compiled_kernels_are_for_large_plain_tensors_in_training(monkeypatch):
    class Spy:
        def values(self, x, step, highest):
            calls.append(x.numel())
            return x.clone()

        def gradients(self, g, x, step, highest, middle):
            return g, step.sum()

    calls: list[int] = []
    monkeypatch.setattr(activation_kernels, "kernels", lambda dtype, coarse: Spy())
    enough = activation_kernels._COMPILED_FROM

    def run(count: int, training: bool = True, asked: bool = True):
        relu = quantized_relu(0.2).train(training)
        relu.compiled = asked
        relu(torch.ones(1, count).requires_grad_()).sum().backward()

    for count, training, asked in ((enough - 1, True, True), (enough, False, True), (enough, True, False)):
        run(count, training, asked)
    with FlopCounterMode(display=False):
        run(enough)
    assert calls == []
    run(enough)
    assert calls == [enough]


@needs_compiler
def test_compiled_kernels_stay_out_of_traces_and_pretended_tensors():
    relu = quantized_relu(0.2)
    relu.compiled = True
    x = large()
    assert torch.equal(torch.jit.trace(relu, x, check_trace=False)(x), relu(x))
    assert torch.equal(make_fx(relu)(x)(x), relu(x))
    mode = FakeTensorMode()
    pretended, step = (mode.from_tensor(tensor.detach()).requires_grad_() for tensor in (x, relu.step))
    with mode:
        output = activation_kernels.quantized_relu(pretended, step, 15, False, True)
        output.sum().backward()
    assert output.shape == pretended.grad.shape == x.shape


@needs_compiler
def test_compiled_kernels_outputs_may_be_overwritten():
    relu = quantized_relu(0.2, 4, "frozen")
    relu.compiled = True
    y = relu(large())
    y *= torch.ones(1, requires_grad=True)
    assert relu(large()).detach_()._base is None


@needs_compiler
@pytest.mark.parametrize("compiled", [True, False])
def test_a_second_derivative_is_refused(compiled):
    relu = quantized_relu(0.2)
    relu.compiled = compiled
    x = large().requires_grad_()
    (gradient,) = torch.autograd.grad(relu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|no autograd formula|differentiat"):
        gradient.square().sum().backward()


@needs_compiler
def test_copies_and_compiled_students_train_with_compiled_kernels():
    network = quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()), 1, 4)
    assert compile_activations(network)
    network = copy.deepcopy(network)
    assert network[1].compiled
    x = torch.randn(16, 3, 40, 40, generator=generator(22))
    losses = []
    for model in (network, torch.compile(network)):
        loss = model(x).square().mean()
        losses.append(loss.item())
        loss.backward()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_compile_activations_says_what_there_is(monkeypatch):
    with pytest.raises(ValueError, match="call quantize"):
        compile_activations(quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), 1))
    asked = []
    monkeypatch.setattr(sys.modules["faqd_lib.quantization.network"], "kernels", lambda *variant: asked.append(variant))
    network = quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), 1, 4, step_gradient="coarse")
    assert not compile_activations(network, torch.bfloat16)
    assert asked == [(torch.bfloat16, True)]
    with pytest.raises(ValueError, match=r"torch\.int8"):
        compile_activations(network, torch.int8)


def test_torchs_own_switch_turns_the_compiler_off_in_silence(monkeypatch):
    """``TORCH_COMPILE_DISABLE`` is this setting of torch's."""
    monkeypatch.setattr(activation_kernels, "_made", {})
    network = quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), 1, 4)
    with torch._dynamo.config.patch(disable=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not compile_activations(network)
        network(torch.randn(16, 3, 40, 40, generator=generator(24))).sum().backward()
    assert network[1].step.grad != 0
    assert activation_kernels._made == {}


def test_unknown_step_gradient_is_named():
    with pytest.raises(ValueError, match="'exact'"):
        QuantizedReLU(4, "exact")
