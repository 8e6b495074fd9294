"""The training loop: schedule, blindness to labels, cohorts, reproducibility, failures."""

import copy
import dataclasses
import gc
import math
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE

from faqd_lib.config import OptimizationConfig, RunConfig
from faqd_lib.data.batches import Batches
from faqd_lib.data.datasets import ImageData, Images
from faqd_lib.models import FeatureTap
from faqd_lib.quantization import relu_kernels as activation_kernels
from faqd_lib.quantization.network import dequantize
from faqd_lib.reporting.tables import runs_frame
from faqd_lib.runs.store import RunRecord
from faqd_lib.runs.suite import Suite
from faqd_lib.training.learner import (
    Evaluation,
    Learner,
    learning_rate,
    precision_that_pays,
    projection_seed,
)
from faqd_lib.training.loop import evaluate, train
from faqd_lib.training.loss_log import NonFiniteLossError
from faqd_lib.utils.files import tensors_digest
from faqd_lib.utils.measure import environment, exact_kernels


def weights(suite: Suite, config: RunConfig) -> dict[str, torch.Tensor]:
    return suite.model(config).state_dict()


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def with_rate(config: RunConfig, rate: float) -> RunConfig:
    return config.model_copy(update={"optimization": config.optimization.model_copy(update={"learning_rate": rate})})


# ---- schedule


@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0, 4.0])
def test_learning_rate_warms_up_and_ends_at_zero(warmup):
    config = OptimizationConfig(epochs=4, learning_rate=0.2, warmup_epochs=warmup)
    rates = [learning_rate(config, step, 10) for step in range(41)]
    steps = round(10 * warmup)
    assert rates[:steps] == pytest.approx([0.2 * (i + 1) / steps for i in range(steps)])
    assert max(rates) == pytest.approx(0.2)
    if steps < 40:
        assert rates[steps] == pytest.approx(0.2)
        assert rates[40] == pytest.approx(0, abs=1e-12)
        assert 0 < rates[39] < 0.01
        assert rates[steps + (40 - steps) // 2] == pytest.approx(0.1, rel=0.1)
        assert all(later < earlier for earlier, later in zip(rates[steps:], rates[steps + 1 :], strict=False))


def test_precision_is_one_of_two():
    assert precision_that_pays("cpu") in ("float32", "bf16")


def test_projection_seeds_differ_between_seeds():
    assert len({projection_seed(seed) for seed in range(20)}) == 20


# ---- evaluation


def test_evaluate_by_hand(tiny_suite):
    suite = tiny_suite()
    model = suite.build(suite.float_student()).train()
    images = suite.splits[2]
    accuracy, cross_entropy, predictions, log_probabilities = evaluate(model, images, suite.normalizer, batch_size=7)
    assert model.training
    with torch.no_grad(), exact_kernels():
        logits = model.eval()(suite.normalizer(images.pixels.to(suite.device))).cpu()
    assert torch.equal(predictions, logits.argmax(1))
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == images.labels).double().mean().item())
    assert cross_entropy == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)
    expected = logits.log_softmax(1)[torch.arange(len(images)), images.labels]
    torch.testing.assert_close(log_probabilities, expected)


# ---- training


@pytest.fixture
def cohort_of(tiny_suite):
    """(a suite, three label-free runs that share teacher and batches)."""

    def make(name: str, **profile) -> tuple[Suite, list[RunConfig]]:
        suite = tiny_suite(name, **profile)
        return suite, [
            suite.student("KD", weight_bits=1),
            suite.student("FAQD", weight_bits=2, activation_bits=4),
            suite.student("FFAQD", weight_bits=1, k=2),
        ]

    return make


def test_the_loss_falls_and_every_term_is_recorded(tiny_suite):
    schedule = {"epochs": 4, "batch_size": 16, "warmup_epochs": 0.5, "learning_rate": 0.05}
    suite = tiny_suite(student_schedule=schedule)
    (record,) = suite.run([suite.student("FAQD", labels=True, weight_bits=2)])
    losses = [row["loss"] for row in record.history]
    assert losses[-1] < losses[0]
    for row in record.history:
        for term in ("logit", "affinity", "label", "gradient_norm", "test_accuracy", "test_cross_entropy"):
            assert math.isfinite(row[term]), term
        expected = row["logit"] + 30 * row["affinity"] + 0.3 * row["label"]
        assert row["loss"] == pytest.approx(expected, rel=1e-4)
    assert [row["epoch"] for row in record.history] == [1, 2, 3, 4]


def test_the_saved_weights_are_those_that_were_evaluated_last(tiny_suite):
    suite = tiny_suite()
    (record,) = suite.run([suite.student("labels", weight_bits=1)])
    assert suite.evaluate(suite.model(record.configuration)) == pytest.approx(
        (record.history[-1]["test_accuracy"], record.history[-1]["test_cross_entropy"]), rel=1e-6
    )
    assert record.last_accuracy == record.history[-1]["test_accuracy"]


def test_alone_and_in_a_cohort_are_the_same_bits(cohort_of):
    together, configs = cohort_of("together")
    records = together.run(configs)
    assert [record.cost["cohort"] for record in records] == [3, 3, 3]
    alone, again = cohort_of("alone", cohort=1)
    assert [c.digest for c in again] == [c.digest for c in configs]
    # The other way round, so that no state can be handed on in the same order.
    separate = alone.run(reversed(again))[::-1]
    assert [record.cost["cohort"] for record in separate] == [1, 1, 1]
    for config, first, second in zip(configs, records, separate, strict=True):
        assert first.history == second.history, config.run_id
        assert first.weights_digest == second.weights_digest
        assert same_bits(weights(together, config), weights(alone, config))


def test_the_same_run_twice_is_the_same_bits_and_another_seed_is_not(tiny_suite):
    records: list[RunRecord] = []
    for name in ("first", "second"):
        suite = tiny_suite(name)
        torch.rand(5 if name == "first" else 50)  # the global generator must not matter
        records += suite.run([suite.student("FFAQD", weight_bits=1, activation_bits=4)])
    assert records[0].weights_digest == records[1].weights_digest
    assert records[0].history == records[1].history
    (other,) = suite.run([suite.student("FFAQD", weight_bits=1, activation_bits=4, seed=2)])
    assert other.weights_digest != records[0].weights_digest


def permuted(data: ImageData) -> ImageData:
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(1))
    train_split = Images(data.train.pixels, data.train.labels[order])
    assert not torch.equal(train_split.labels, data.train.labels)
    return dataclasses.replace(data, train=train_split)


def test_label_free_training_cannot_see_labels(tiny_suite, tiny_data):
    """Permuting the training labels after the teacher was trained changes no bit of a label-free student."""
    suite = tiny_suite()
    suite.run([suite.teacher()])
    blind = [suite.student("FAQD", weight_bits=1), suite.student("KD", weight_bits=1, logit_loss="kl")]
    seeing = suite.student("FAQD", labels=True, weight_bits=1)
    expected = suite.run([*blind, seeing])

    other = tiny_suite("permuted", data=permuted(tiny_data))
    (other.folder / "runs").mkdir(parents=True)
    teacher = suite.teacher().run_id
    (other.folder / "runs" / teacher).symlink_to(suite.folder / "runs" / teacher)
    got = other.run([*blind, seeing])
    for before, after in zip(expected[:2], got[:2], strict=True):
        assert before.weights_digest == after.weights_digest
        assert before.history == after.history
    # The test itself must be able to see: a student that uses labels does change.
    assert expected[2].weights_digest != got[2].weights_digest


def test_label_free_runs_are_given_images_without_labels(tiny_suite, monkeypatch):
    given = []

    def watch(learners, batches, *arguments, **options):
        given.append((learners[0].config.label_free, next(batches.epoch(0)).labels is None))
        return train(learners, batches, *arguments, **options)

    monkeypatch.setattr("faqd_lib.runs.local.train", watch)
    suite = tiny_suite()
    suite.run([suite.student("KD", weight_bits=1), suite.student("FAQD", weight_bits=1)])
    assert given == [(False, False), (True, True)]


def test_label_free_runs_beside_labelled_ones_are_given_batches_without_labels(tiny_suite, monkeypatch):
    """In a cohort of both kinds, no learner that is label-free sees a label."""
    given = set()
    advance = Learner.advance

    def watch(learner, epoch, batch, teacher):
        given.add((learner.config.label_free, batch.labels is None))
        return advance(learner, epoch, batch, teacher)

    monkeypatch.setattr(Learner, "advance", watch)
    suite = tiny_suite()
    records = suite.run([suite.student("KD", weight_bits=1), suite.student("KD", labels=True, weight_bits=1)])
    assert given == {(True, True), (False, False)}
    assert [record.cost["cohort"] for record in records] == [2, 2]


def test_not_finite_stops_with_step_and_terms_and_the_others_finish(tiny_suite):
    suite = tiny_suite()
    good = suite.student("FAQD", weight_bits=1)
    bad = with_rate(suite.student("KD"), 1e38)
    with pytest.raises(NonFiniteLossError) as raised:
        suite.run([bad, good])
    told = str(raised.value)
    assert bad.run_id in told
    assert "epoch 1, step" in told
    assert "logit" in told
    assert "total" in told
    assert "learning rate" in told
    assert any("1 other runs" in note for note in raised.value.__notes__)
    record = suite.store.record(good)
    assert len(record.history) == 2
    assert suite.store.record(bad) is None
    # Whoever shares a cohort with a failure is not disturbed by it.
    alone = tiny_suite("alone")
    assert alone.run([good])[0].weights_digest == record.weights_digest


def test_not_finite_images_of_a_broken_teacher_are_caught(tiny_suite):
    suite = tiny_suite()
    config = suite.student("KD", weight_bits=1)
    batches = Batches(suite.splits[0].unlabelled(), 16, 0, suite.normalizer)
    teacher = suite.build(suite.teacher()).requires_grad_(False).eval()
    teacher.fc.weight.fill_(math.nan)
    result = train([suite.learner(config, batches)], batches, teacher, (), {"test": suite.splits[2]})
    assert not result.trained
    assert "step 1 of 3" in str(result.failed[config.run_id])
    assert "nan" in str(result.failed[config.run_id])


def test_not_finite_evaluation_does_not_pass_for_a_result(tiny_suite, monkeypatch):
    monkeypatch.setattr("faqd_lib.training.loop.evaluate", lambda *_: Evaluation(10.0, math.nan, *torch.zeros(2, 1)))
    suite = tiny_suite()
    with pytest.raises(ArithmeticError):
        suite.run([suite.float_student()])
    assert suite.store.record(suite.float_student()) is None


def test_fine_tuning_starts_from_the_float_student(tiny_suite):
    suite = tiny_suite()
    config = suite.student("FAQD", weight_bits=1, activation_bits=4, regime="fine-tuning")
    suite.run([config.initial])
    trained = weights(suite, config.initial)
    start = {
        n.replace("parametrizations.", "").removesuffix(".original"): p
        for n, p in suite.build(config).state_dict().items()
    }
    assert set(start) - set(trained) == {n for n in start if n.endswith("step")}
    assert all(torch.equal(start[name], trained[name]) for name in trained)
    fresh = suite.build(suite.student("FAQD", weight_bits=1)).state_dict()
    assert not torch.equal(start["layer1.0.conv1.weight"], fresh["layer1.0.conv1.parametrizations.weight.original"])


@pytest.mark.parametrize("step_gradient", ["lsq", "frozen"])
def test_activation_steps_are_calibrated_before_and_learned_in_training(tiny_suite, step_gradient):
    suite = tiny_suite()
    settings = {"step_gradient": step_gradient}
    config = suite.student("KD", weight_bits=1, activation_bits=4, quantization=settings)
    size = config.optimization.batch_size
    batches = Batches(suite.splits[0].unlabelled(), size, config.seed, suite.normalizer, flip=suite.data.flip)
    started = suite.learner(config, batches).model.state_dict()
    fresh = suite.build(config).state_dict()
    suite.run([config])
    steps = [name for name in started if name.endswith("step")]
    assert len(steps) == 7
    for name in steps:
        assert started[name] != fresh[name]
        assert (weights(suite, config)[name] != started[name]) == (step_gradient == "lsq")


@pytest.mark.parametrize(
    "settings",
    [
        {"blending": 0.05},
        {"per_channel": True},
        {"step_gradient": "coarse"},
        {"step_gradient": "frozen"},
        {"shortcuts": "float"},
    ],
    ids=str,
)
def test_every_way_of_quantizing_trains_to_numbers_of_its_own(tiny_suite, settings):
    suite = tiny_suite()
    runs = [suite.student("KD", weight_bits=2, activation_bits=4, quantization=chosen) for chosen in ({}, settings)]
    records = suite.run(runs)
    assert all(math.isfinite(row["loss"]) for record in records for row in record.history)
    differs = records[0].weights_digest != records[1].weights_digest
    assert differs == ("shortcuts" not in settings)  # the CIFAR ResNets' shortcuts have no weights


def test_quantized_after_training_is_the_float_student_rounded_and_nothing_else(tiny_suite):
    suite = tiny_suite()
    float_record, record = suite.run([suite.float_student(), suite.post_training(2, 4)])
    assert (record.configuration.method, record.configuration.regime) == ("none", "post-training")
    assert len(record.history) == 1
    trained, rounded = suite.model(suite.float_student()), suite.model(suite.post_training(2, 4))
    steps = {name for name, _ in rounded.named_parameters() if name.endswith("step")}
    assert steps
    floats = dict(dequantize(copy.deepcopy(rounded)).state_dict())
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert all(torch.equal(t, floats[n]) for n, t in trained.state_dict().items() if not n.endswith(statistics))
    # Batch normalisation is estimated anew: the plain average over the first batches, whatever it was before.
    batches = Batches(suite.splits[0].unlabelled(), record.configuration.optimization.batch_size, 1, suite.normalizer)
    with FeatureTap(rounded, ["conv1"]) as tap, torch.no_grad():
        means = [(rounded(batch.images), tap.features[0].mean((0, 2, 3)))[1] for batch in batches.epoch(0)]
    torch.testing.assert_close(rounded.bn1.running_mean, torch.stack(means).mean(0))
    assert not torch.allclose(rounded.bn1.running_mean, trained.bn1.running_mean)
    assert suite.evaluate(rounded)[0] == pytest.approx(record.last_accuracy)
    assert record.cost["training_seconds"] < float_record.cost["training_seconds"]
    assert not any(module.training for module in rounded.modules())
    assert "none" in runs_frame([record])["method"].tolist()


def test_activation_steps_have_no_weight_decay(tiny_suite):
    suite = tiny_suite()
    batches = Batches(suite.splits[0].unlabelled(), 16, 0, suite.normalizer)
    learner = suite.learner(suite.student("FAQD", weight_bits=1, activation_bits=4), batches)
    weights, steps = learner.optimizer.groups
    assert weights.weight_decay == learner.config.optimization.weight_decay > 0
    assert steps.weight_decay == 0
    own = [parameter for name, parameter in learner.model.named_parameters() if name.endswith("step")]
    assert own
    assert list(map(id, steps.parameters)) == list(map(id, own))


def test_adapters_are_trained(tiny_suite):
    suite = tiny_suite(losses={"adapters": True})
    config = suite.student("FAQD", weight_bits=1)
    assert config.objective.adapters
    batches = Batches(suite.splits[0].unlabelled(), 16, 0, suite.normalizer)
    learner = suite.learner(config, batches)
    before = copy.deepcopy(learner.objective.state_dict())
    assert [before[f"adapters.{i}.0.weight"].shape[0] for i in range(3)] == [16, 32, 64]
    teacher = suite.build(suite.teacher()).requires_grad_(False).eval()
    result = train([learner], batches, teacher, teacher.feature_names, {"test": suite.splits[2]})
    assert len(result.trained) == 1
    after = learner.objective.state_dict()
    for name, tensor in before.items():
        if name.endswith("0.weight"):
            # More than weight decay alone would do: the direction changes, not only the length.
            cosine = F.cosine_similarity(tensor.flatten(), after[name].flatten(), dim=0)
            assert cosine < 1 - 1e-5, name
        assert not torch.equal(tensor, after[name]), name


def test_the_teacher_is_left_as_it_was(tiny_suite):
    suite = tiny_suite()
    batches = Batches(suite.splits[0].unlabelled(), 16, 0, suite.normalizer)
    teacher = suite.build(suite.teacher()).requires_grad_(False).eval()
    before = copy.deepcopy(teacher.state_dict())
    learner = suite.learner(suite.student("FAQD", weight_bits=1), batches)
    train([learner], batches, teacher, teacher.feature_names, {"test": suite.splits[2]})
    assert same_bits(teacher.state_dict(), before)
    assert not any(module._forward_hooks for module in (*teacher.modules(), *learner.model.modules()))


def test_a_step_leaves_no_tensor_behind(tiny_suite):
    """Small tensors kept at every step pinned the heap: 100 MB more every 40 steps."""
    suite = tiny_suite()
    batches = Batches(suite.splits[0].unlabelled(), 16, 0, suite.normalizer)
    teacher = suite.build(suite.teacher()).requires_grad_(False).eval()
    learner = suite.learner(suite.student("FAQD", weight_bits=1), batches)
    alive = []

    def count() -> bool:
        gc.collect()
        alive.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
        return False

    gc.collect()
    gc.freeze()  # what other tests have left is not looked at: it may go at any moment
    try:
        train([learner], batches, teacher, teacher.feature_names, {"test": suite.splits[2]}, checkpoint_due=count)
    finally:
        gc.unfreeze()
    assert len(alive) == 6
    assert alive[1] == alive[2]  # within an epoch
    assert alive[4] == alive[5]


def test_cost_is_measured(tiny_suite):
    suite = tiny_suite()
    (record,) = suite.run([suite.student("FAQD", weight_bits=1)])
    assert record.cost["peak_step_bytes"] > 16 * 16 * 8 * 8 * 4  # more than one feature map of the batch
    assert record.cost["training_seconds"] > record.cost["shared_seconds"] > 0
    assert record.environment["device"] == environment(suite.device)["device"]


def test_first_steps_of_a_process_have_no_part_in_what_a_step_costs(tiny_suite, monkeypatch):
    """They measure memory, compile and record; the usual step stands for them."""
    step, waits = Learner.step, iter([0.5])

    def slow_at_first(self, *inputs) -> dict:
        time.sleep(next(waits, 0.0))
        return step(self, *inputs)

    monkeypatch.setattr(Learner, "step", slow_at_first)
    suite = tiny_suite()
    batches = Batches(suite.splits[0].unlabelled(), 16, 0, suite.normalizer)
    teacher = suite.build(suite.teacher()).requires_grad_(False).eval()
    learner = suite.learner(suite.student("KD", weight_bits=1), batches)
    (trained,) = train([learner], batches, teacher, (), {"test": suite.splits[2]}).trained
    assert [math.isnan(seconds) for seconds in learner.clock.step.seconds[:2]] == [True, False]
    assert len(learner.clock.step.seconds) == 6
    usual, shared = learner.clock.step.seconds[1:], trained.cost["shared_seconds"]
    assert trained.cost["training_seconds"] == pytest.approx(sum(usual) / 5 * 6 + shared)
    assert trained.cost["images_per_second"] == pytest.approx(16 * 5 / sum(usual))


def test_a_label_free_learner_is_kept_blind_among_labelled_batches(tiny_suite):
    suite = tiny_suite()
    config = suite.student("KD", weight_bits=1)
    teacher = suite.build(suite.teacher()).requires_grad_(False).eval()
    digests = []
    for images in (suite.splits[0], suite.splits[0].unlabelled()):
        batches = Batches(images, 16, 0, suite.normalizer)
        (trained,) = train([suite.learner(config, batches)], batches, teacher, (), {"test": suite.splits[2]}).trained
        digests.append(tensors_digest(trained.model.state_dict()))
    assert digests[0] == digests[1]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="such kernels are the CPU's")
@pytest.mark.usefixtures("compiler")
def test_compiled_activations_are_the_same_bits_in_a_cohort_and_are_recorded(tiny_suite, monkeypatch):
    monkeypatch.setattr(activation_kernels, "_COMPILED_FROM", 1)
    together, alone = tiny_suite("a"), tiny_suite("b")
    quantized, weights_only = (together.student("KD", weight_bits=1, activation_bits=bits) for bits in (4, 32))
    of_quantized, of_weights_only = together.run([quantized, weights_only])
    alone.run([quantized])
    assert same_bits(weights(together, quantized), weights(alone, quantized))
    assert of_quantized.environment["activation_kernels"] == "compiled"
    assert "activation_kernels" not in of_weights_only.environment
