"""Table T8 and claims about mean IoU, from records without training."""

import json

import pytest
import torch
from torch import nn

from faqd_lib.data.batches import stream
from faqd_lib.reporting import charts, claims, grids, study_charts, study_claims, study_curves, tables
from faqd_lib.reporting.report import write_report
from faqd_lib.reporting.segmentation import RESAMPLES, answers, gains
from faqd_lib.runs.profile import Profile
from faqd_lib.runs.suite import Suite
from faqd_lib.training.segmentation import class_iou, mean_iou, pixel_counts

IMAGES, CLASSES = 360, 11  # the test images of the digits


def counts(share: float, seed: int) -> torch.Tensor:
    """Counts of images of 6×6 pixels, of which a share is named by chance."""
    labels = torch.randint(0, CLASSES, (IMAGES, 6, 6), generator=stream(1, "labels"))
    guesses = torch.randint(0, CLASSES, (IMAGES, 6, 6), generator=stream(seed, "guesses"))
    wrong = torch.rand(IMAGES, 6, 6, generator=stream(seed, "wrong")) < share
    return pixel_counts(torch.where(wrong, guesses, labels), labels, CLASSES)


def save(suite: Suite, config, share: float, found: torch.Tensor | None = None) -> torch.Tensor:
    found = counts(share, config.seed) if found is None else found
    score = mean_iou(found)
    suite.store.save(
        config, nn.Linear(2, 2), history=[{"epoch": 1, "loss": 1.0, "test_mean_iou": score}], metric="mean_iou",
        last_accuracy=score, best_accuracy=score, selected_accuracy=None, test_images=IMAGES, parameters=6,
        weight_bytes=24.0, environment={"torch": torch.__version__}, dataset_note="", pixel_counts=found,
        log_probabilities=torch.full((IMAGES,), -share), test_affinity=None if config.teacher is None else share,
        cost={"training_seconds": 2.0, "step_milliseconds": 3.5, "images_per_second": 1.0, "peak_step_bytes": 2e6,
              "cohort": 1.0},
    )  # fmt: skip
    return found


@pytest.fixture
def suite(tmp_path):
    return Suite.open("quick", "digit-strokes", results=tmp_path)


def test_gains_are_paired_and_their_interval_is_that_of_images():
    ours, others = [counts(0.3, seed) for seed in (1, 2)], [counts(0.4, seed) for seed in (1, 2)]
    mean, by_class = gains(ours, others)
    expected = sum(mean_iou(one) - mean_iou(other) for one, other in zip(ours, others, strict=True)) / 2
    assert mean.value == pytest.approx(expected, rel=1e-12)
    assert len(by_class) == CLASSES
    assert sum(gain.value for gain in by_class) / CLASSES == pytest.approx(expected, rel=1e-9)
    # The delta method gives the same width, up to the error of so many resamples.
    shares = [
        answers({"pixel_counts": one}) - answers({"pixel_counts": two}) for one, two in zip(ours, others, strict=True)
    ]
    width = 2 * 1.96 * 100 * (sum(shares) / 2).std(ddof=1) / IMAGES**0.5
    assert mean.high - mean.low == pytest.approx(width, rel=0.1)
    assert mean.low < mean.value < mean.high
    assert gains(ours, ours)[0] == (0, 0, 0)
    assert RESAMPLES >= 1000


def test_runs_are_compared_in_pairs():
    with pytest.raises(ValueError, match="in pairs, got 1 and 2"):
        gains([counts(0.1, 1)], [counts(0.1, 1)] * 2)


def test_the_table_shows_mean_iou_gains_and_classes(suite):
    cells = {(cell.row["bits"], cell.column): cell for cell in grids.segmentation_cells(suite)}
    teacher = save(suite, cells["float", "teacher linknet8"].runs[0], 0.1)
    plain = save(suite, cells["1W32A", "KD"].runs[0], 0.4)
    taught = save(suite, cells["1W32A", "FA, encoder"].runs[0], 0.3)
    made = tables.segmentation(suite)
    frame = made.frame.set_index(["bits", "arm"])
    assert "accuracy" not in made.caption
    assert "mean IoU in percent" in made.caption
    score = "mean IoU (%), last epoch"
    assert frame.loc[("float", "teacher linknet8"), score] == f"{mean_iou(teacher):.2f}"
    assert frame.loc[("4W32A", "KD"), score] == tables.NOT_RUN
    gain = str(gains([taught], [plain])[0])
    assert frame.loc[("1W32A", "FA, encoder"), "gain over KD (95 % interval)"] == gain
    assert frame.loc[("1W32A", "KD"), "gain over KD (95 % interval)"] == ""
    by_class = tables.segmentation_classes(suite).frame
    assert list(by_class["class"]) == ["background", *"0123456789"]
    assert by_class["1W32A KD"][3] == f"{100 * float(class_iou(plain.sum(0))[3]):.2f}"
    assert by_class["1W32A FA, encoder − KD"][3] == str(gains([taught], [plain])[1][3])
    assert [table.name.split("_")[0] for table in tables.all_tables(suite)] == ["T8", "T8", "T5"]
    assert set(claims.table(suite).frame["verdict"]) == {tables.NOT_RUN}
    assert set(suite.store.record(config) is not None for config in grids.everything(suite)) == {True, False}


@pytest.mark.parametrize("settings", [{"taps": "before ReLU"}, {"losses": {"adapters": True}}, {"stages": (1,)}])
def test_the_partner_of_other_maps_and_adapters_is_the_same_kd(suite, settings):
    plain = save(suite, suite.student("KD", weight_bits=1), 0.4)
    config = suite.student("FAQD", weight_bits=1, **settings)
    taught = save(suite, config, 0.3)
    ours, others = tables._pairs_with_kd(suite, [suite.store.record(config)])
    assert torch.equal(torch.stack(ours), taught[None])
    assert torch.equal(torch.stack(others), plain[None])


def test_profiles_that_show_nothing_show_no_mean_iou(tmp_path):
    suite = Suite.open("smoke", "digit-strokes", results=tmp_path)
    for config in grids.segmentation(suite):
        save(suite, config, 0.4)
    shown = tables.segmentation(suite).frame
    assert set(shown["mean IoU (%), last epoch"]) == {tables.NOT_A_RESULT}
    assert not any("." in cell for cell in shown["gain over KD (95 % interval)"])


@pytest.fixture
def study(tmp_path):
    """The design on CamVid, with the strokes of the digits in the place of CamVid."""
    design = Profile.load("segmentation").model_copy(update={"image_size": None, "dataset": "digit-strokes"})
    return Suite.open(design, results=tmp_path)


def test_runs_that_beat_no_constant_prediction_learned_nothing(study):
    """The classes have as many pixels: a constant prediction has 100 / 11 / 11 %, far below an accuracy of chance."""
    labels = torch.randint(0, CLASSES, (IMAGES, 6, 6), generator=stream(1, "labels"))
    constant = pixel_counts(torch.zeros_like(labels), labels, CLASSES)
    claim, first, second = study.profile.study.claims["fa-helps-4"], *study.profile.study.seeds[:2]
    for seed, found in ((first, None), (second, constant)):
        for config in study.study_runs("four-bits", seed).values():
            save(study, config, 0.95, found)
    measured = study_claims.contrast(study, dict.fromkeys(claim.contrast, claim.cells), claim.contrast)
    assert all(1.8 < record.last_accuracy < 200 / CLASSES for record in measured.records[:2])
    assert [len(dead) for dead in measured.dead] == [0, 2]


def test_claims_of_a_study_are_judged_by_mean_iou(study):
    for seed in study.profile.study.seeds[:5]:
        for (arm, _), config in study.study_runs("four-bits", seed).items():
            save(study, config, 0.4 if arm == "kd" else 0.3)
            if arm == "kd":
                save(study, config.teacher, 0.1)
    found = study_claims.table(study)
    row = found.frame.iloc[0]
    assert "mean IoU" in found.caption
    assert "all with one teacher" in found.caption
    assert row["n (seeds)"] == "5 of 8"
    assert row["verdict"] == "reproduced"
    frame = tables.segmentation(study).frame.set_index("arm")
    assert frame.loc["fa-encoder", "n of the gain"].iloc[0] == "5"
    assert float(frame.loc["fa-encoder", "gain over KD (95 % interval)"].iloc[0].split()[0]) == float(row["difference"])
    forest = charts.forest(study_claims.forest_frame(found), study.metric).axes[0]
    assert forest.get_xlabel() == "difference of mean IoU (percentage points)"
    reached = study_curves.arms_frame(study)
    curves = study_charts.over_updates(reached, reached.rename(columns={"accuracy": "gain"}), study.metric)
    assert curves.axes[0].get_ylabel() == "test mean IoU (%)"
    page = write_report(study, []).read_text(encoding="utf-8")
    assert "Differences of test mean IoU" in page
    assert "test accuracy" not in page
    arms = study_curves.arms_table(study)
    assert "mean IoU (%)" in arms.frame
    assert "accuracy" not in arms.markdown()
    record = json.loads(next((study.folder / "runs").glob("*/record.json")).read_text())
    assert record["metric"] == "mean_iou"
