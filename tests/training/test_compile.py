"""Passes by ``torch.compile``: repeatable, the same network, and a clear word where there is no compiler."""

import pytest
import torch
from conftest import run_until_killed
from fresh_process import run_fresh
from torch import nn
from torch._inductor.exc import TritonMissing
from torch.nn.utils import parametrize

from faqd_lib.config import ConfigurationError, OptimizationConfig
from faqd_lib.models import FeatureTap
from faqd_lib.quantization.network import quantize
from faqd_lib.quantization.weights import WeightQuantizer
from faqd_lib.runs.suite import Suite
from faqd_lib.training.compile import CompilationError, compile_network

with_compiler = pytest.mark.usefixtures("compiler")


def small_network(bits: int = 32, activation_bits: int = 32, step_gradient: str = "lsq") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(8 * 16, 5),
        )  # fmt: skip
    if (bits, activation_bits) == (32, 32):
        return model
    return quantize(model, bits, activation_bits, first_layer="quantize", step_gradient=step_gradient)


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class ResidualNetwork(nn.Module):
    """A residual block and no more: the time to compile a network grows with its number of layers."""

    feature_names = ("first", "relu")

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.relu, self.pool, self.fc = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.fc(self.pool(self.relu(x + self.second(x))).flatten(1))


def build_residual_network(name: str, classes: int, *, image_size: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResidualNetwork(classes)


@with_compiler
def test_alone_interrupted_and_in_a_cohort_are_the_same_bits_and_runs_of_their_own(tiny_suite, monkeypatch):
    monkeypatch.setattr("faqd_lib.runs.workshop.build_model", build_residual_network)

    def runs(suite: Suite):
        coarse = {"step_gradient": "coarse"}
        return [
            # One needs the teacher's maps, the other does not: its logits must be the same either way.
            suite.student("KD", weight_bits=4, activation_bits=4, quantization=coarse),
            suite.student("FFAQD", weight_bits=1, k=2),
        ]

    together = tiny_suite("together", compile=True)
    together.run([together.teacher()])
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    expected = [(record.weights_digest, record.history) for record in together.run(runs(together))]
    # Teacher and students once each, though there are evaluations in between.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 3
    alone = tiny_suite("alone", compile=True, cohort=1, checkpoint_seconds=0.0)
    teacher = together.teacher().run_id
    (alone.folder / "runs").mkdir(parents=True)
    (alone.folder / "runs" / teacher).symlink_to(together.folder / "runs" / teacher)
    run_until_killed(monkeypatch, alone, runs(alone), 1)
    assert [(record.weights_digest, record.history) for record in alone.run(runs(alone))] == expected

    plain = tiny_suite("plain")
    for theirs, ours in zip(runs(together), runs(plain), strict=True):
        assert theirs.optimization.compiled
        assert not ours.optimization.compiled
        assert theirs.digest != ours.digest


@with_compiler
@pytest.mark.parametrize("step_gradient", ["lsq", "coarse", "frozen"])
def test_values_gradients_and_statistics_are_those_of_the_network(step_gradient):
    x, found = images(), []
    for way in (lambda model: model, lambda model: compile_network(model, training=True)):
        model = small_network(4, 4, step_gradient).train()
        out = way(model)(x)
        out.square().sum().backward()
        found.append([out.detach(), model[1].running_var, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 6
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@with_compiler
def test_maps_are_tapped_and_a_network_in_evaluation_is_folded():
    model = small_network().eval().requires_grad_(False)
    model[1].running_mean.normal_(generator=torch.Generator().manual_seed(2))
    x = images()
    with torch.no_grad(), FeatureTap(model, ["2", "4"]) as tap:
        expected = [model(x), *tap.features]
        tap.clear()
        work = compile_network(model, training=False)
        for got, wanted in zip([work(x), *tap.features], expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(work(x), work(x))
        model[1].running_mean += 1
        torch.testing.assert_close(work(x), expected[0], rtol=1e-4, atol=1e-5)  # as it says: not looked at again


@with_compiler
def test_an_overwritten_map_is_copied_before():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)).eval().requires_grad_(False)
    x = images()
    with torch.no_grad(), FeatureTap(model, ["0"]) as tap:
        compile_network(model, training=False)(x)
        torch.testing.assert_close(tap.features[0], model[0](x), rtol=1e-4, atol=1e-5)
        assert tap.features[0].min() < 0


@with_compiler
def test_what_is_not_trained_is_folded_whatever_the_callers_mode():
    model = small_network().eval()
    work = compile_network(model, training=False)
    first = work(images())
    assert not first.requires_grad
    model[1].running_mean += 1
    torch.testing.assert_close(work(images()), first)


@with_compiler
def test_the_number_of_threads_is_part_of_what_is_compiled(monkeypatch):
    """Sums depend on it, and not every version of torch looks at it before it takes something from its cache."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **settings: seen.append(settings["options"]))
    compile_network(small_network(), training=True)
    assert seen[0]["cpp.threads"] == torch.get_num_threads()


@with_compiler
def test_a_quantizer_of_ones_own_is_compiled_with_the_rest():
    class Sign(WeightQuantizer):
        bits = 16

        def fit(self, rows):
            return rows.abs().amax(1, keepdim=True), rows.sign()

    layer = nn.Conv2d(3, 2, 3)
    parametrize.register_parametrization(layer, "weight", Sign())
    x = images()
    torch.testing.assert_close(compile_network(layer, training=True)(x), layer(x), rtol=1e-4, atol=1e-5)


@with_compiler
def test_without_triton_the_error_says_what_to_do(monkeypatch):
    def fail(*_, **__):
        raise TritonMissing(None)

    monkeypatch.setattr(torch, "compile", lambda function, **settings: fail)
    with pytest.raises(CompilationError, match=r"cannot be compiled \(TritonMissing: .*on CUDA also Triton"):
        compile_network(small_network(), training=True)(images())


@with_compiler
def test_more_networks_than_torch_compiles_of_one_function():
    x = images()
    with torch.no_grad():
        for seed in range(10):
            model = nn.Conv2d(3, 2, 3).eval()
            nn.init.constant_(model.weight, seed)
            torch.testing.assert_close(compile_network(model, training=False)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channel_dim", [0, 1])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_quantizer_as_an_operator(bits, per_channel, channel_dim):
    weight = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.faqd.quantized_weight.default, (weight, bits, per_channel, channel_dim))


def test_switched_off_is_an_error_and_not_another_run():
    switched_off = torch._dynamo.config.patch(disable=True)
    with switched_off, pytest.raises(CompilationError, match="TORCH_COMPILE_DISABLE"):
        compile_network(small_network(), training=True)


def test_without_a_compiler_activations_go_on_and_networks_say_what_to_do(tmp_path):
    """Both in one process: importing torch's compiler takes most of the time."""
    code = """
import torch
from torch import nn
from faqd_lib import compile_activations, quantize
from faqd_lib.training.compile import compile_network
network = quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), 1, 4)
assert not compile_activations(network)
assert not compile_activations(network)
network(torch.randn(16, 3, 40, 40)).sum().backward()
assert network[1].step.grad != 0
print("training goes on")
compile_network(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), training=True)(torch.ones(2, 3, 8, 8))
"""
    missing = {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run_fresh(code, TORCH_COMPILE_DISABLE="", **missing)
    assert done.returncode == 1
    assert "training goes on" in done.stdout
    assert done.stderr.count("without compiled kernels") == 1
    assert missing["CXX"] in done.stderr
    assert "TORCH_COMPILE_DISABLE=1" in done.stderr
    assert "CompilationError: Sequential cannot be compiled (" in done.stderr
    assert "or set compile = false" in done.stderr


def test_what_is_not_trained_is_not_compiled():
    with pytest.raises(ConfigurationError, match="epochs = 0 has none"):
        OptimizationConfig.parse({"epochs": 0, "warmup_epochs": 0.0, "compiled": True}, "here")
