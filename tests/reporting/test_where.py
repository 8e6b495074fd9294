"""Table T6: pairs by pictures, network and layers, and gains worked out by hand."""

import pandas as pd
import pytest
import torch
from conftest import random_images

from faqd_lib.data.datasets import ImageData
from faqd_lib.data.elsewhere import MADE_HERE
from faqd_lib.models import build_model
from faqd_lib.reporting import charts, grids, where
from faqd_lib.runs.profile import Profile, SuiteState
from faqd_lib.runs.store import RunStore
from faqd_lib.runs.suite import Suite

IMAGES = 200
STUDY = {
    "looks": [5],
    "arms": {"kd": {"method": "KD"}, "fa": {"method": "FAQD"}, "sums": {"method": "FAQD", "taps": "before ReLU"}},
    "cells": {
        "noise": {"arms": ["kd", "fa"], "weight_bits": [1], "updates": 2, "images": 32, "source": "noise"},
        "own": {"arms": ["kd"], "weight_bits": [1], "updates": 2},
        "layers": {"arms": ["sums"], "weight_bits": [1], "updates": 2},
    },
}


@pytest.fixture
def suite(tiny_suite):
    return tiny_suite(teacher_per_seed=True, study=STUDY, shows_results=True)


def save(suite, config, accuracy: float, test_affinity: float) -> None:
    """A finished run that is right on the first images of every hundred."""
    labels = torch.arange(IMAGES) % 3
    right = torch.arange(IMAGES) % 100 < accuracy
    suite.store.save(
        config, torch.nn.Linear(1, 1), labels=labels, predictions=torch.where(right, labels, (labels + 1) % 3),
        log_probabilities=torch.where(right, -0.1, -2.0), history=[{"epoch": 1, "test_accuracy": accuracy}],
        last_accuracy=accuracy, best_accuracy=accuracy, selected_accuracy=None, test_affinity=test_affinity,
        test_images=IMAGES, parameters=1, weight_bytes=1.0, cost={"training_seconds": 1.0}, environment={"torch": "2"},
        dataset_note="",
    )  # fmt: skip


def test_gains_are_of_pairs_with_one_seed(suite):
    for seed, (kd, fa) in {2: (50.0, 53.0), 3: (52.0, 53.0)}.items():
        runs = suite.study_runs("noise", seed)
        save(suite, runs["kd", 1], kd, 0.4), save(suite, runs["fa", 1], fa, 0.1 if seed == 2 else 0.4)
    save(suite, suite.study_runs("noise", 4)["fa", 1], 90.0, 0.1)  # its partner is missing
    frame = where.gain_frame(suite)
    assert list(zip(frame["pictures"], frame["affinity"], frame["n"], strict=True)) == [
        ("noise", "all stages", 2), ("tiny", "all stages, before ReLU", 0),
    ]  # fmt: skip
    row = frame.iloc[0]
    assert (row["KD"], row["with FA"], row["gain"]) == (51, 53, 2)
    assert row["maps"] == pytest.approx(0.5)  # the geometric mean of 1/4 and 1
    assert row["low"] < 1  # two seeds, 3 and 1
    assert row["high"] > 3
    shown = where.table(suite)
    assert len(shown.runs) == 4
    assert shown.frame.loc[0, ["images", "student", "gain"]].tolist() == ["32", "resnet8", "+2.00"]
    assert shown.frame.loc[1, "gain"] == "not run"


def test_layers_are_compared_with_kd_of_another_group(suite):
    save(suite, suite.study_runs("own", 2)["kd", 1], 40.0, 0.4)
    save(suite, suite.study_runs("layers", 2)["sums", 1], 45.0, 0.2)
    row = where.gain_frame(suite).iloc[1]
    assert (row["n"], row["gain"], row["maps"]) == (1, 5, 0.5)
    assert row["interval"].endswith("(other images only: 1 seed)")
    forest = where.forest_frame(where.gain_frame(suite), "affinity")
    assert forest["verdict"].tolist() == ["+5.00 points, n = 1"]
    assert charts.forest(forest).axes


def test_cells_without_a_study(tiny_suite):
    shown, smoke = (tiny_suite(shows_results=shows) for shows in (True, False))
    rows = pd.DataFrame([cell.row | {"maps": cell.column} for cell in grids.where_cells(shown)])
    few = rows[rows["images"] == "16"]  # the first half of 48 images in three classes
    assert few["pictures"].unique().tolist() == ["tiny", "first-half", "second-half", "noise", "smooth-noise"]
    assert set(rows["updates"]) == {"6"}  # 2 epochs of 3 batches, whatever the pictures
    assert rows["student"].unique().tolist() == ["resnet8", *grids.WHERE_NETWORKS]
    assert list(rows["maps"])[-5:] == [
        "stage 1", "stage 2", "stage 3", "all stages, before ReLU", "all stages, adapters",
    ]  # fmt: skip
    runs = grids.where(smoke)
    assert len(runs) == 12
    assert len({run.digest for run in runs}) == 12
    assert smoke.student("FAQD", weight_bits=1, updates=6) not in runs  # the profile's own epochs, as in T4
    assert smoke.student("FAQD", weight_bits=1) in runs


def open_suite(folder, profile: str, classes: int, size: int, count: int = 400, sources: dict | None = None) -> Suite:
    """The suite of a shipped profile on images of noise, named Tiny ImageNet."""
    train, test = (random_images(count, classes, size, split) for split in ("train", "test"))
    names = tuple(map(str, range(classes)))
    images = ImageData("tiny-imagenet", names, train, test, (0.5,) * 3, (0.25,) * 3, "0" * 64)
    chosen = Profile.load(profile).for_dataset("tiny-imagenet")
    state = SuiteState.describe(chosen, "tiny-imagenet", "tiny-imagenet: asked for", images, "float32")
    state = state.model_copy(update={"sources": sources or {}})
    return Suite(state, RunStore(folder), torch.device("cpu"), images=images)


@pytest.mark.parametrize(
    ("profile", "size", "networks"),
    [("smoke", 64, {"resnet8", "mixer"}), ("quick", 64, {"resnet8", *grids.WHERE_NETWORKS}),
     ("cpu", 64, {"resnet20", *grids.WHERE_NETWORKS}), ("paper", 64, {"resnet18"}),
     ("quick", 50, {"resnet8", "mobilenet", "plain20"})],
)  # fmt: skip
def test_networks_have_the_teachers_stages_and_fit_the_images(tmp_path, profile, size, networks):
    """The teacher of ``paper`` has four stages there; a mixer's patches do not fill 50 pixels."""
    suite = open_suite(tmp_path, profile, 10, size)
    assert {run.model for run in grids.where(suite)} == networks
    for name in grids.where_networks(suite):
        build_model(name, 10, image_size=size)


def test_a_small_half_bounds_the_number_of_pictures(tmp_path):
    """Of 400 images in three classes the first half has 134: two fifths would be 160."""
    suite = open_suite(tmp_path, "quick", 3, 8)
    counts = {run.images.train_images for run in grids.where(suite) if run.images is not None}
    assert counts == {134}
    (batch,) = {run.optimization.batch_size for run in grids.where(suite) if run.images is not None}
    assert batch == 50
    assert len(suite.images_from("first-half", 134, "0" * 64)) == 134


def test_a_dataset_that_is_gone_stays_only_with_finished_runs(tmp_path):
    suite = open_suite(tmp_path, "quick", 10, 8, sources={"pets": "1" * 64, "digits": "2" * 64})

    def pictures() -> set[str]:
        return {cell.row["pictures"] for cell in grids.where_cells(suite)} - {"tiny-imagenet", *MADE_HERE}

    assert pictures() == {"digits"}
    save(suite, suite.student("KD", weight_bits=1, source="pets", images=160, updates=24), 50.0, 0.1)
    assert pictures() == {"pets", "digits"}
