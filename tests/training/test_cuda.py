"""On a GPU: recorded steps, the same bits whatever else happens, the numbers of the CPU, no waiting for the device."""

import dataclasses
import itertools

import pytest
import torch
from conftest import make_tiny_data, make_tiny_suite, run_until_killed

from faqd_lib.affinity.loss import FastFeatureAffinityLoss, FeatureAffinityLoss
from faqd_lib.config import RunConfig
from faqd_lib.data.batches import Batches, stream
from faqd_lib.quantization.relu_kernels import quantized_relu
from faqd_lib.quantization.step_search import running_sums
from faqd_lib.quantization.weights import weight_quantizer
from faqd_lib.runs.suite import Suite
from faqd_lib.training.cuda_graphs import RecordedStep, Recorder, own_stream
from faqd_lib.training.loop import Cohort, train
from faqd_lib.training.loss_log import NonFiniteLossError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")
SCHEDULE = {"epochs": 4, "batch_size": 16, "warmup_epochs": 0.5, "learning_rate": 0.05}  # 12 steps


@pytest.fixture
def cuda_suite(tmp_path):
    """``cuda_suite("name", precision="bf16", **profile settings)``: a suite of tiny runs on the GPU."""

    def make(name: str, precision: str = "bf16", **profile) -> Suite:
        data = make_tiny_data()
        made = make_tiny_suite(tmp_path / name, data, **{"student_schedule": SCHEDULE, **profile})
        state = made.state.model_copy(update={"precision": precision})
        return dataclasses.replace(made, state=state, device=CUDA)

    return make


def every_kind(suite: Suite) -> list[RunConfig]:
    """Students that share a teacher, with every loss and every kind of quantizer."""
    return [
        suite.student("KD", weight_bits=1, activation_bits=4, logit_loss="kl"),
        suite.student("FAQD", weight_bits=2, activation_bits=4, quantization={"step_gradient": "coarse"}),
        suite.student("FFAQD", weight_bits=4, k=2),
        suite.student("FFAQD", weight_bits=4, activation_bits=4, quantization={"per_channel": True}),
        suite.student("FAQD", weight_bits=8, quantization={"blending": 0.1}),
    ]


def outcomes(suite: Suite, configs: list[RunConfig]) -> list[tuple]:
    return [(record.weights_digest, record.history) for record in suite.run(configs)]


# ---- the same bits


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_recorded_or_not_alone_or_in_a_cohort_are_the_same_bits(cuda_suite, precision):
    whole = cuda_suite("whole", precision, losses={"adapters": True})
    expected = outcomes(whole, every_kind(whole))
    environment = whole.store.record(every_kind(whole)[0]).environment
    assert (environment["cuda_graphs"], environment["device"]) == ("on", torch.cuda.get_device_name())

    plain = cuda_suite("plain", precision, losses={"adapters": True}, cuda_graphs=False)
    assert outcomes(plain, every_kind(plain)) == expected
    assert plain.store.record(every_kind(plain)[0]).environment["cuda_graphs"] == "off"

    alone = cuda_suite("alone", precision, losses={"adapters": True}, cohort=1)
    assert outcomes(alone, every_kind(alone)[::-1])[::-1] == expected
    assert [alone.store.record(config).cost["cohort"] for config in every_kind(alone)] == [1] * len(expected)


def test_with_labels_and_as_a_teacher_too(cuda_suite):
    def runs(suite: Suite) -> list[RunConfig]:
        return [
            suite.teacher(),
            suite.student("labels", weight_bits=1),
            suite.student("FAQD", labels=True, weight_bits=1),
            suite.student("KD", labels=True, weight_bits=2, regime="fine-tuning"),
        ]

    recorded, plain = cuda_suite("recorded"), cuda_suite("plain", cuda_graphs=False)
    assert outcomes(recorded, runs(recorded)) == outcomes(plain, runs(plain))


def test_compiled_recorded_or_not_alone_or_in_a_cohort_are_the_same_bits(cuda_suite):
    def runs(suite: Suite) -> list[RunConfig]:
        coarse = {"step_gradient": "coarse"}
        return [
            suite.student("KD", weight_bits=1, activation_bits=4, quantization=coarse),
            suite.student("FFAQD", weight_bits=4, activation_bits=4, k=2),
        ]

    whole, plain = cuda_suite("whole", compile=True), cuda_suite("plain", compile=True, cuda_graphs=False)
    expected = outcomes(whole, runs(whole))
    assert outcomes(plain, runs(plain)) == expected
    alone = cuda_suite("alone", compile=True, cohort=1)
    assert outcomes(alone, runs(alone)[::-1])[::-1] == expected
    eager = cuda_suite("eager")
    assert [config.digest for config in runs(eager)] != [config.digest for config in runs(whole)]


@pytest.mark.parametrize(("after", "settings"), [(2, {}), (4, {}), (5, {}), (8, {}), (6, {"compile": True})])
def test_interrupted_and_resumed_are_the_same_bits(cuda_suite, monkeypatch, after, settings):
    suite = cuda_suite("whole", **settings)
    expected = outcomes(suite, every_kind(suite))

    begun = cuda_suite("begun", checkpoint_seconds=0.0, **settings)
    begun.run([begun.teacher()])
    run_until_killed(monkeypatch, begun, every_kind(begun), after)
    assert outcomes(begun, every_kind(begun)) == expected


def test_one_that_is_not_finite_is_found_and_disturbs_nobody(cuda_suite):
    suite = cuda_suite("suite")
    good, bad = suite.student("FAQD", weight_bits=1), suite.student("KD")
    fast = bad.model_copy(update={"optimization": bad.optimization.model_copy(update={"learning_rate": 1e38})})
    with pytest.raises(NonFiniteLossError, match="epoch 1, step"):
        suite.run([fast, good])
    assert cuda_suite("alone").run([good])[0].weights_digest == suite.store.record(good).weights_digest


def test_cumulative_sums_repeat_to_the_bit():
    rows = torch.randn(1, 2**15, dtype=torch.float64, generator=stream(0, "sums")).to(CUDA)
    first = running_sums(rows)
    assert all(torch.equal(running_sums(rows), first) for _ in range(50))
    torch.testing.assert_close(first.cpu(), rows.cpu().cumsum(1))


# ---- the numbers of the CPU


def on_both(call, *tensors: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(value, gradients) of ``call`` on the CPU and on CUDA, all on the CPU."""
    found = []
    for device in (torch.device("cpu"), CUDA):
        own = [tensor.to(device).requires_grad_() for tensor in tensors]
        value = call(*own)
        gradients = torch.autograd.grad(value.square().sum(), own)
        found.append([each.detach().cpu() for each in (value, *gradients)])
    return tuple(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [FeatureAffinityLoss(), FeatureAffinityLoss("pairwise"), "ffa"], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_affinity_losses_are_those_of_the_cpu(dtype, loss, memory_format):
    maps = torch.randn(2, 6, 16, 8, 8, generator=stream(0, "maps")).to(dtype)
    student, teacher = (m.contiguous(memory_format=memory_format) for m in maps)

    def value(s):
        chosen = FastFeatureAffinityLoss(6, seed=3) if loss == "ffa" else loss
        return chosen(s, teacher.to(s.device))

    expected, found = on_both(value, student)
    tolerance = {"rtol": 1e-4, "atol": 1e-8} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-6}
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coarse", [False, True])
def test_quantized_relu_is_that_of_the_cpu(dtype, coarse):
    x = torch.randn(8, 16, 8, 8, generator=stream(0, "x")).to(dtype).contiguous(memory_format=torch.channels_last)
    expected, found = on_both(lambda x, step: quantized_relu(x, step, 15, coarse, True).float(), x, torch.tensor(0.1))
    assert torch.equal(expected[0], found[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(16, 3, 3, 3), (32, 16, 3, 3), (64, 64, 3, 3)])
def test_quantized_weights_are_those_of_the_cpu(bits, per_channel, shape):
    weight = torch.randn(shape, generator=stream(bits, "weight"))
    quantizer = weight_quantizer(bits, per_channel)
    expected, found = quantizer(weight), quantizer(weight.to(CUDA)).cpu()
    error, other = ((weight - quantized).square().sum().item() for quantized in (expected, found))
    # Both devices follow the same rules; their sums differ in the last digits.
    assert other == pytest.approx(error, rel=1e-2)
    if bits <= 2 or weight[0].numel() * (1 if per_channel else len(weight)) * 2 ** (bits - 1) <= 2**13:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(quantizer(weight.to(CUDA)).cpu(), found)


# ---- no waiting, and misuse


@pytest.mark.parametrize("recorded", [False, True])
def test_no_step_waits_for_the_device(cuda_suite, recorded):
    suite = cuda_suite("suite")
    configs = every_kind(suite)
    batches = Batches(suite.splits[0].unlabelled(), 16, 1, suite.normalizer)
    with own_stream(CUDA):
        learners = [suite.learner(config, batches) for config in configs]
        teacher = suite.build(suite.teacher()).eval().requires_grad_(False)
        cohort = Cohort(learners, teacher, teacher.feature_names, CUDA, cuda_graphs=recorded)
        source = itertools.chain.from_iterable(batches.epoch(epoch) for epoch in range(2))

        def step() -> None:
            cohort.step(0, next(source), learners)

        for _ in range(3):  # the first one measures memory, the third one records
            step()
            for learner in learners:
                learner.log.steps = 1  # as in a longer epoch
        next(source)  # an epoch's order is drawn when its first batch is: once an epoch the host may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(learner._recorded_step.replays_next == recorded for learner in learners)


def test_a_recorded_step_refuses_inputs_at_another_place():
    with own_stream(CUDA):
        x = torch.ones(4, device=CUDA)
        total = torch.zeros(4, device=CUDA)
        step = RecordedStep(total.add_, Recorder(CUDA))
        for _ in range(4):
            step(x)
        assert total.tolist() == [4.0] * 4
        with pytest.raises(ValueError, match="reads its inputs where they were"):
            step(x.clone())


def test_training_waits_for_what_its_caller_has_begun(cuda_suite):
    suite = cuda_suite("suite")
    batches = Batches(suite.splits[0].unlabelled(), 16, 0, suite.normalizer)
    teacher = suite.build(suite.teacher()).requires_grad_(False).eval()
    config = suite.student("FAQD", weight_bits=1)
    splits = {"test": suite.splits[2]}
    digests = []
    for cycles in (0, 200_000_000):
        learner = suite.learner(config, batches)
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        with torch.no_grad():
            for parameter in learner.parameters:
                parameter.mul_(0.5)  # on the caller's stream, behind what it is busy with
        (trained,) = train([learner], batches, teacher, teacher.feature_names, splits).trained
        digests.append([parameter.double().sum().item() for parameter in trained.model.parameters()])
    assert digests[0] == digests[1]
