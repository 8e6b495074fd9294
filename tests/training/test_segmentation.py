"""Dense prediction: losses without the ignored pixels, counts and IoU by hand, and runs from start to record."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from faqd_lib.config import ConfigurationError, ObjectiveConfig
from faqd_lib.data.batches import stream
from faqd_lib.data.images import IGNORED, Images
from faqd_lib.models import build_model
from faqd_lib.runs.profile import SuiteState
from faqd_lib.training.loop import evaluate
from faqd_lib.training.objective import DistillationObjective
from faqd_lib.training.segmentation import (
    class_iou,
    constant_iou,
    dense_cross_entropy,
    iou_by_image,
    mean_iou,
    pixel_counts,
    root_median_frequency,
)

NETWORKS = {"teachers": ["linknet8"], "student": "linknet8"}
# Two images of 1×4 pixels, three classes. The last pixel of the second image has no label.
LABELS = torch.tensor([[[0, 0, 1, 1]], [[2, 2, 0, IGNORED]]])
PREDICTED = torch.tensor([[[0, 1, 1, 1]], [[2, 0, 0, 0]]])


def test_counts_and_iou_by_hand():
    counts = pixel_counts(PREDICTED, LABELS, 3)
    assert counts.tolist() == [[[1, 2, 0], [1, 3, 0], [2, 2, 0]], [[1, 0, 1], [2, 0, 1], [1, 0, 2]]]
    # Class 0: 2 right of 3 named and 3 true; class 1: 2 of 3 and 2; class 2: 1 of 1 and 2.
    assert class_iou(counts.sum(0)).tolist() == pytest.approx([2 / 4, 2 / 3, 1 / 2])
    assert mean_iou(counts) == pytest.approx(100 * (1 / 2 + 2 / 3 + 1 / 2) / 3)
    # A class that nobody has or names is left out.
    assert mean_iou(pixel_counts(PREDICTED, LABELS, 4)) == mean_iou(counts)


def test_the_best_constant_prediction_by_hand():
    """Of seven labelled pixels three are of class 0: its IoU is 3/7, that of the two other classes 0."""
    assert constant_iou(pixel_counts(PREDICTED, LABELS, 3)) == pytest.approx(100 * 3 / 7 / 3)
    constant = [mean_iou(pixel_counts(torch.full_like(LABELS, index), LABELS, 4)) for index in range(3)]
    assert constant_iou(pixel_counts(PREDICTED, LABELS, 4)) == pytest.approx(max(constant))
    assert constant_iou(torch.zeros(2, 3, 4, dtype=torch.int32)) == 0


def test_shares_of_images_average_to_the_mean_iou_and_are_its_derivative():
    labels = torch.randint(0, 3, (6, 4, 4), generator=stream(0, "labels"))
    counts = pixel_counts(torch.randint(0, 3, (6, 4, 4), generator=stream(0, "predicted")), labels, 3)
    shares = iou_by_image(counts)
    assert 100 * float(shares.mean()) == pytest.approx(mean_iou(counts), rel=1e-12)
    # Weight 1 + e on image 0: mean IoU changes by e / n · (share − mean IoU / 100).
    more = counts.double()
    more[0] *= 1 + 1e-6
    slope = (mean_iou(more) - mean_iou(counts)) / 100 / 1e-6
    assert slope == pytest.approx(float(shares[0] - shares.mean()) / 6, rel=1e-4)


def test_the_label_loss_is_a_mean_over_labelled_pixels():
    logits = torch.randn(2, 3, 1, 4, generator=stream(0, "logits"), requires_grad=True)
    by_hand = [
        -F.log_softmax(logits[image, :, 0, column], 0)[label].item()
        for image, row in enumerate(LABELS[:, 0].tolist())
        for column, label in enumerate(row)
        if label != IGNORED
    ]
    assert dense_cross_entropy(logits, LABELS).item() == pytest.approx(sum(by_hand) / 7, rel=1e-6)
    weights, labels = torch.tensor([1.0, 2.0, 4.0]), [0, 0, 1, 1, 2, 2, 0]
    weighted = sum(weights[label].item() * loss for label, loss in zip(labels, by_hand, strict=True)) / 15
    assert dense_cross_entropy(logits, LABELS, weights).item() == pytest.approx(weighted, rel=1e-6)
    dense_cross_entropy(logits, LABELS).backward()
    assert logits.grad[1, :, 0, 3].abs().max() == 0


@pytest.mark.parametrize("weights", [None, torch.ones(3)])
def test_a_batch_without_labelled_pixels_has_no_loss_and_no_gradient(weights):
    logits = torch.randn(2, 3, 2, 2, requires_grad=True)
    objective = DistillationObjective(
        "none", "none", affinity_weight=0.0, label_weight=1.0, class_weights=weights
    )  # fmt: skip
    total = objective(logits, labels=torch.full((2, 2, 2), IGNORED))["total"]
    total.backward()
    assert total.item() == 0
    assert logits.grad.abs().max() == 0


def test_more_classes_than_a_label_map_can_name_are_refused():
    with pytest.raises(ValueError, match="up to 255 classes"):
        dense_cross_entropy(torch.zeros(1, 256, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64))


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(ValueError, match="same images and classes"):
        DistillationObjective("mse", "none", affinity_weight=0.0)(torch.zeros(1, 3, 2, 2), (), torch.zeros(1, 4, 2, 2))


def test_weights_of_classes_by_hand():
    # Labelled pixels: 4 in the first image, 3 in the second. Class 0: 3 of 7; class 1: 2 of 4; class 2: 2 of 3.
    # The median frequency is 1/2. Class 3 has no pixel.
    weights = root_median_frequency(LABELS.to(torch.uint8), 4)
    assert weights.tolist() == pytest.approx([math.sqrt(7 / 6), 1, math.sqrt(3 / 4), 1], rel=1e-6)


def test_class_weights_need_a_label_loss():
    with pytest.raises(ValueError, match="class_weights"):
        ObjectiveConfig(logit_loss="mse", class_weights="root median frequency")


@pytest.fixture(scope="module")
def dense_data(request):
    """20 + 10 images of 20×28 pixels, which two colours divide; a corner has no label."""
    from conftest import make_tiny_data

    def split(count: int, purpose: str) -> Images:
        labels = torch.randint(0, 2, (count, 20, 28), generator=stream(0, purpose), dtype=torch.uint8)
        pixels = torch.where(labels[:, None] == 1, 200, 50).expand(-1, 3, -1, -1).to(torch.uint8)
        labels[:, :2, :2] = IGNORED
        return Images(pixels.contiguous(), labels)

    return dataclasses.replace(
        make_tiny_data(), classes=("dark", "bright"), train=split(20, "train"), test=split(10, "test")
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dense_data):
    """A teacher and two students of a suite of dense images."""
    from conftest import make_tiny_suite

    schedule = {"epochs": 2, "batch_size": 5, "warmup_epochs": 0.5, "learning_rate": 0.05}
    suite = make_tiny_suite(
        tmp_path_factory.mktemp("dense"), dense_data, **NETWORKS, teacher_schedule=schedule, student_schedule=schedule,
        losses={"class_weights": "root median frequency"},
    )  # fmt: skip
    records = suite.run(
        [
            suite.student("KD", weight_bits=4),
            suite.student("FAQD", weight_bits=1, stages=(1, 2, 3)),
            suite.student("FAQD", labels=True, weight_bits=2),
        ]
    )
    return suite, records


def test_a_run_is_judged_by_its_mean_iou(trained):
    suite, records = trained
    teacher = suite.store.record(suite.teacher())
    assert teacher.configuration.objective.class_weights == "root median frequency"
    assert records[0].configuration.objective.class_weights == "equal"
    for record in (teacher, *records):
        assert record.metric == "mean_iou"
        assert record.last_accuracy == record.history[-1]["test_mean_iou"]
        assert "test_accuracy" not in record.history[-1]
        kept = suite.store.predictions(record)
        assert (tuple(kept["pixel_counts"].shape), kept["pixel_counts"].dtype) == ((10, 3, 2), torch.int32)
        assert mean_iou(kept["pixel_counts"]) == record.last_accuracy
        assert int(kept["pixel_counts"][:, 2].sum()) == 10 * (560 - 4)
        assert suite.evaluate(suite.model(record.configuration))[0] == record.last_accuracy
    assert suite.metric == "mean IoU"
    assert records[1].test_affinity > 0


def test_evaluation_by_hand_in_any_batches(trained):
    suite, records = trained
    model, images = suite.model(records[0].configuration), suite.splits.test
    found = evaluate(model, images, suite.normalizer, batch_size=3)
    with torch.no_grad():
        logits = model(suite.normalizer(images.pixels))
    by_pixel = F.cross_entropy(logits, images.labels.long(), ignore_index=IGNORED, reduction="none")
    assert found.cross_entropy == pytest.approx(float(by_pixel.sum()) / (10 * 556), rel=1e-5)
    torch.testing.assert_close(found.log_probabilities, -by_pixel.sum((1, 2)) / 556)
    assert torch.equal(found.counts, pixel_counts(logits.argmax(1), images.labels, 2).int())


def test_an_image_without_labelled_pixels_counts_nowhere(trained):
    suite, records = trained
    model, images = suite.model(records[0].configuration), suite.splits.test
    labels = images.labels.clone()
    labels[3] = IGNORED
    without = images.take(torch.arange(10) != 3)
    found, expected = (evaluate(model, each, suite.normalizer) for each in (Images(images.pixels, labels), without))
    assert found.mean_iou == expected.mean_iou
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-6)
    assert found.log_probabilities[3] == 0


def test_networks_and_images_must_fit(dense_data, tiny_suite, tiny_data):
    classifier, dense = tiny_suite("a").profile, tiny_suite("b", **NETWORKS).profile
    with pytest.raises(ConfigurationError, match=r"resnet8 does not fit.*each pixel: choose linknet8"):
        SuiteState.describe(classifier, "x", "", dense_data, "float32")
    with pytest.raises(ConfigurationError, match=r"linknet8 does not fit.*each image: choose resnet8"):
        SuiteState.describe(dense, "x", "", tiny_data, "float32")


def test_students_and_teachers_must_fit_the_images(tiny_suite, dense_data):
    classifier, dense = tiny_suite("a"), tiny_suite("b", data=dense_data, **NETWORKS)
    for setting in ("model", "teacher"):
        with pytest.raises(ConfigurationError, match=f"{setting}: linknet8 does not fit tiny, .*: choose resnet8"):
            classifier.student("KD", **{setting: "linknet8"})
        with pytest.raises(ConfigurationError, match=f"{setting}: resnet8 does not fit tiny, .*: choose linknet8"):
            dense.student("KD", **{setting: "resnet8"})
    with pytest.raises(ConfigurationError, match=r"source = 'noise': .* leave out source"):
        dense.student("KD", source="noise", images=5)


def test_images_of_any_size(dense_data):
    model = build_model("linknet8", 3).eval()
    for size in ((1, 1), (7, 19), (33, 64)):
        assert model(torch.zeros(1, 3, *size)).shape == (1, 3, *size)
