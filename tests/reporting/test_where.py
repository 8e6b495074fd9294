"""Table T6: pairs by pictures, network and layers, and gains worked out by hand."""

import pandas as pd
import pytest
import torch

from faqd_lib.reporting import charts, grids, where

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
    few = rows[rows["images"] == "19"]  # two fifths of 48
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
