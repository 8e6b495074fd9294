"""Accuracy and gain over updates, and the updates to an accuracy, against values worked out by hand."""

import math

import pytest
import torch
from conftest import make_tiny_suite

from faqd_lib.reporting import study_charts, study_curves
from faqd_lib.runs.suite import Suite

IMAGES = 2000
ARMS = {"kd": {"method": "KD"}, "fa": {"method": "FAQD"}}
CELLS = {f"updates-{updates}": {"arms": ["kd", "fa"], "weight_bits": [1], "updates": updates} for updates in (2, 4, 8)}
ACCURACY = {("kd", 2): 40, ("kd", 4): 50, ("kd", 8): 60, ("fa", 2): 45, ("fa", 4): 55, ("fa", 8): 61}


@pytest.fixture
def suite(tmp_path, tiny_data):
    study = {"looks": [5], "arms": ARMS, "cells": CELLS}
    return make_tiny_suite(tmp_path / "s", tiny_data, shows_results=True, teacher_per_seed=True, study=study)


def save(suite: Suite, seed: int, shift: float = 0.0, accuracy: dict[tuple[str, int], int] = ACCURACY) -> None:
    labels, of_cell = torch.arange(IMAGES) % 10, accuracy
    for name in suite.profile.study.cells:
        for (arm, _), config in suite.study_runs(name, seed).items():
            accuracy = of_cell[arm, suite.profile.study.cells[name].updates] + (shift if arm == "fa" else 0.0)
            right = torch.arange(IMAGES) < IMAGES * accuracy / 100
            suite.store.save(
                config, torch.nn.Linear(1, 1), labels=labels,
                predictions=torch.where(right, labels, (labels + 1) % 10),
                log_probabilities=torch.where(right, -0.1, -2.0),
                history=[{"epoch": 1, "test_accuracy": accuracy}], last_accuracy=accuracy, best_accuracy=accuracy,
                selected_accuracy=None, test_affinity=0.1 if arm == "fa" else 0.4, test_images=IMAGES, parameters=1,
                weight_bytes=1.0, cost={"training_seconds": 1.0}, environment={"torch": "2"}, dataset_note="",
            )  # fmt: skip


def test_arms_have_their_mean_accuracy_and_affinity(suite):
    save(suite, 2), save(suite, 3, shift=2.0)
    frame = study_curves.arms_frame(suite).set_index(["updates", "arm"])
    assert frame.loc[(4, "fa"), "accuracy"] == 56
    assert frame.loc[(4, "kd"), "affinity"] == pytest.approx(0.4)
    assert set(frame["n"]) == {2}
    row = frame.loc[(4, "fa")]
    assert row["low"] < 55  # two seeds, 55 and 57
    assert row["high"] > 57
    table = study_curves.arms_table(suite).frame
    assert list(table["accuracy (%)"])[:2] == ["40.00", "46.00"]


def test_gains_are_of_the_same_seeds(suite):
    save(suite, 2), save(suite, 3, shift=2.0)
    assert list(study_curves.gain_frame(suite)["gain"]) == [6, 6, 2]


def test_updates_to_an_accuracy_are_interpolated_on_a_logarithmic_axis(suite):
    save(suite, 2), save(suite, 3)
    frame = study_curves.reach_frame(suite).set_index("updates")
    # 45 at 2, 55 at 4: 50 after 2·2^(5/10). 55 at 4, 61 at 8: 60 after 4·2^(5/6).
    assert frame.loc[4, "share"] == pytest.approx(2 * math.sqrt(2) / 4)
    assert frame.loc[8, "share"] == pytest.approx(4 * 2 ** (5 / 6) / 8)
    assert frame.loc[4, "low"] == pytest.approx(frame.loc[4, "share"])  # both seeds agree
    assert (frame.loc[2, "bound"], frame.loc[2, "share"]) == ("below", 1)  # ahead after the shortest budget already
    shown = study_curves.reach_table(suite).frame["FAQD's updates / its"]
    assert list(shown) == ["below 1.00", "0.71", "0.89"]
    timed = study_curves.reach_table(suite, study_curves.StepRatio(1.5, 1.2, 1.8))
    assert list(timed.frame["FAQD's time / its"]) == ["below 1.50", "1.06", "1.34"]
    # Both seeds agree on the updates: the interval is that of the step.
    assert list(timed.frame["95 % interval of time"]) == ["", "0.85 to 1.27", "1.07 to 1.60"]
    assert "1.50 times as long" in timed.caption


def test_an_accuracy_that_is_never_reached_has_a_lower_bound(suite):
    save(suite, 2, shift=-10.0), save(suite, 3, shift=-10.0)
    frame = study_curves.reach_frame(suite).set_index("updates")
    assert (frame.loc[8, "bound"], frame.loc[8, "share"]) == ("above", 1)  # 51 at 8 updates, and KD has 60
    assert math.isnan(frame.loc[8, "low"])
    assert list(study_curves.reach_table(suite).frame["FAQD's updates / its"]) == ["1.41", "1.78", "above 1.00"]


def test_every_arm_of_kd_is_a_goal_and_no_other_arm(tmp_path, tiny_data):
    arms = ARMS | {
        "slow": {"method": "KD", "learning_rate": 0.01}, "labels": {"method": "labels"}, "alone": {"method": "FA"},
        "kd-4a": {"method": "KD", "activation_bits": 4},
    }  # fmt: skip
    cells = CELLS | {"tuned": {"arms": ["slow", "labels", "alone", "kd-4a"], "weight_bits": [1], "updates": 4}}
    study = {"looks": [5], "arms": arms, "cells": cells}
    suite = make_tiny_suite(tmp_path / "t", tiny_data, shows_results=True, teacher_per_seed=True, study=study)
    save(suite, 2, accuracy=ACCURACY | {(arm, 4): 53 for arm in arms if arm not in ARMS})
    frame = study_curves.reach_frame(suite)
    assert list(zip(frame["updates"], frame["arm"], strict=True)) == [(2, "kd"), (4, "kd"), (4, "slow"), (8, "kd")]
    assert frame["share"][2] == pytest.approx(2 * 2 ** (8 / 10) / 4)  # 45 at 2, 55 at 4: 53


def test_seeds_on_both_sides_leave_it_open(suite):
    save(suite, 2, shift=-10.0), save(suite, 3, shift=20.0)
    assert study_curves.reach_frame(suite).set_index("updates").loc[8, "bound"] == "open"


def test_without_runs_all_frames_are_empty(suite):
    for frame in (study_curves.arms_frame, study_curves.gain_frame, study_curves.reach_frame):
        assert frame(suite).empty
    assert study_curves.arms_table(suite).frame.empty


def test_the_chart_shows_every_curve(suite):
    save(suite, 2), save(suite, 3, shift=2.0)
    figure = study_charts.over_updates(study_curves.arms_frame(suite), study_curves.gain_frame(suite))
    left, right = figure.axes
    assert [line.lines[0].get_ydata().tolist() for line in left.containers] == [[40, 50, 60], [46, 56, 62]]
    assert right.containers[0].lines[0].get_ydata().tolist() == [6, 6, 2]
