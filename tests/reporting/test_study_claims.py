"""The claims of a study: what is averaged, which seeds count, and what cannot pass."""

import numpy as np
import pytest
import torch
from conftest import make_tiny_suite

from faqd_lib.reporting import charts, study_claims, verdicts
from faqd_lib.runs.suite import Suite

IMAGES, CLASSES = 2000, 10
FA_HELPS = {"statement": "FA helps", "contrast": {"fa": 1.0, "kd": -1.0}, "cells": "main"}
AS_GOOD = {
    "statement": "FFA is as good",
    "contrast": {"ffa": 1.0, "fa": -0.5, "kd": -0.5},
    "assay": {"fa": 1.0, "kd": -1.0},
    "cells": "main",
}
STUDY = {
    "looks": [5, 8],
    "arms": {"kd": {"method": "KD"}, "fa": {"method": "FAQD"}, "ffa": {"method": "FFAQD"}},
    "cells": {"main": {"arms": ["kd", "fa", "ffa"], "weight_bits": [1]}},
    "claims": {"helps": FA_HELPS, "as-good": AS_GOOD},
}


@pytest.fixture
def suite(tmp_path, tiny_data):
    return make_tiny_suite(tmp_path / "s", tiny_data, shows_results=True, teacher_per_seed=True, study=STUDY)


def save(suite: Suite, seed: int, accuracies: dict[str, float], affinity: dict[str, float] | None = None) -> None:
    """Records of one seed in which an arm is right on so many percent of the images, the same ones for each arm."""
    draw = np.random.default_rng(seed)
    ease = torch.from_numpy(draw.random(IMAGES))
    labels = torch.arange(IMAGES) % CLASSES
    for (arm, _), config in suite.study_runs("main", seed).items():
        if arm not in accuracies:
            continue
        share = accuracies[arm] / 100 + draw.normal(0, 0.0005)
        right = ease < share
        suite.store.save(
            config,
            torch.nn.Linear(1, 1),
            predictions=torch.where(right, labels, (labels + 1) % CLASSES),
            labels=labels,
            log_probabilities=torch.where(right, -0.1, -2.0),
            history=[{"epoch": 1, "test_accuracy": float(right.double().mean()) * 100}],
            last_accuracy=float(right.double().mean()) * 100,
            best_accuracy=float(right.double().mean()) * 100,
            selected_accuracy=None,
            test_affinity=affinity and affinity[arm],
            test_images=IMAGES,
            parameters=1,
            weight_bytes=1.0,
            cost={"training_seconds": 1.0},
            environment={"torch": "2"},
            dataset_note="",
        )


def rows(suite: Suite) -> dict[str, dict]:
    return {row["claim"]: row for row in study_claims.table(suite).frame.to_dict("records")}


def test_five_complete_seeds_settle_a_large_effect(suite):
    for seed in range(2, 7):
        save(suite, seed, {"kd": 70, "fa": 73, "ffa": 73})
    found = rows(suite)
    assert {row["verdict"] for row in found.values()} == {verdicts.REPRODUCED}
    helps = found["FA helps"]
    assert (helps["n (seeds)"], helps["look"], helps["contrast"]) == ("5 of 8", "1", "fa − kd")
    difference = float(helps["difference"])
    assert difference == pytest.approx(3, abs=1)
    assert found["FFA is as good"]["contrast"] == "ffa − 0.5 fa − 0.5 kd"
    assert found["FFA is as good"]["FA − KD"].startswith("+")
    # Right costs 0.1 nats and wrong 2.0: a point more is 0.01 · 1.9 nats less.
    assert float(helps["cross-entropy (nats)"].split()[0]) == pytest.approx(-0.019 * difference, rel=0.02)
    assert suite.profile.design_digest in study_claims.table(suite).caption


def test_only_complete_seeds_in_planned_order_count(suite):
    for seed in range(2, 7):
        save(suite, seed, {"kd": 70, "fa": 73} if seed == 4 else {"kd": 70, "fa": 73, "ffa": 73})
    found = rows(suite)
    assert (found["FA helps"]["n (seeds)"], found["FA helps"]["verdict"]) == ("5 of 8", verdicts.REPRODUCED)
    # Seed 4 lacks FFA: seeds 5 and 6 do not count either, or leaving a seed out could choose the verdict.
    assert (found["FFA is as good"]["n (seeds)"], found["FFA is as good"]["verdict"]) == ("2 of 8", "no look yet")


def test_seeds_between_the_looks_change_no_verdict(suite):
    for seed in range(2, 7):
        save(suite, seed, {"kd": 70, "fa": 73, "ffa": 73})
    before = rows(suite)
    for seed in (7, 8):
        save(suite, seed, {"kd": 70, "fa": 50, "ffa": 50})
    after = rows(suite)
    assert [row["verdict"] for row in after.values()] == [row["verdict"] for row in before.values()]
    assert after["FA helps"]["n (seeds)"] == "7 of 8"


def test_fewer_seeds_than_the_first_look_give_no_verdict(suite):
    for seed in range(2, 6):
        save(suite, seed, {"kd": 70, "fa": 80, "ffa": 80})
    assert {row["verdict"] for row in rows(suite).values()} == {study_claims.NO_LOOK}
    assert {row["look"] for row in rows(suite).values()} == {"none"}


def test_kd_in_the_place_of_ffa_does_not_pass(suite):
    for seed in range(2, 7):
        save(suite, seed, {"kd": 70, "fa": 73, "ffa": 70})
    assert rows(suite)["FFA is as good"]["verdict"] == verdicts.CONTRADICTED


def test_without_an_effect_of_fa_ffa_is_not_testable(suite):
    for seed in range(2, 7):
        save(suite, seed, {"kd": 70, "fa": 70, "ffa": 70})
    found = rows(suite)
    assert found["FFA is as good"]["verdict"] == verdicts.NOT_TESTABLE
    assert found["FA helps"]["verdict"] == verdicts.NO_DIFFERENCE.format(0.5)


@pytest.mark.parametrize("accuracies", [{"kd": 15, "fa": 30}, {"kd": 30, "fa": 70}])
def test_a_run_that_learned_nothing_leaves_no_verdict(suite, accuracies):
    """Below twice the accuracy of chance, or below half of its partner's."""
    for seed in range(2, 7):
        save(suite, seed, accuracies)
    found = study_claims.table(suite)
    assert found.frame.iloc[0]["verdict"] == study_claims.LEARNED_NOTHING
    assert "Learned nothing: " in found.caption


def test_a_run_that_learned_nothing_after_a_look_unsettles_nothing(suite):
    for seed in range(2, 7):
        save(suite, seed, {"kd": 70, "fa": 73, "ffa": 73})
    save(suite, 7, {"kd": 70, "fa": 10, "ffa": 73})
    found = study_claims.table(suite)
    assert found.frame.iloc[0]["verdict"] == verdicts.REPRODUCED
    assert "Learned nothing: " in found.caption


def test_a_claim_without_runs_reads_not_run(suite):
    assert {row["verdict"] for row in rows(suite).values()} == {"not run"}
    assert study_claims.forest_frame(study_claims.table(suite)).empty


def test_the_picture_has_a_line_a_claim(suite):
    for seed in range(2, 7):
        save(suite, seed, {"kd": 70, "fa": 73, "ffa": 73})
    frame = study_claims.forest_frame(study_claims.table(suite))
    assert list(frame["claim"]) == ["FA helps", "FFA is as good"]
    assert ((frame["low"] < frame["mean"]) & (frame["mean"] < frame["high"])).all()
    axis = charts.forest(frame).axes[0]
    assert sorted(len(line.get_xdata()) for line in axis.lines) == [1, 1, 2, 2, 2]  # points, intervals, zero
    assert [text.get_text() for text in axis.texts] == ["FA helps: reproduced", "FFA is as good: reproduced"]


def test_an_affinity_claim_is_about_the_logarithm_of_the_loss_on_test_images(tmp_path, tiny_data):
    claim = {"statement": "Nearer", "contrast": {"kd": 1.0, "fa": -1.0}, "endpoint": "affinity", "cells": "main"}
    study = STUDY | {"claims": {"nearer": claim}}
    suite = make_tiny_suite(tmp_path / "s", tiny_data, shows_results=True, teacher_per_seed=True, study=study)
    for seed in range(2, 7):
        save(suite, seed, {"kd": 70, "fa": 70}, affinity={"kd": 0.4 + seed / 100, "fa": 0.1})
    row = rows(suite)["Nearer"]
    expected = np.mean([np.log(4 + seed / 10) for seed in range(2, 7)])
    assert (row["difference"], row["verdict"]) == (f"{expected:+.2f}", verdicts.REPRODUCED)
    assert row["seeds for 0.3, 0.5, 1"] == ""  # these are points of accuracy
    assert "interval for other seeds only" in row["contrast"]
    assert study_claims.forest_frame(study_claims.table(suite)).empty  # its unit is not percentage points


@pytest.mark.parametrize(
    ("accuracies", "cells"),
    [
        ({"kd": 70, "fa": 70.3, "ffa": 70.3}, {"main"}),  # small effects: open
        ({"kd": 70, "fa": 73, "ffa": 73}, set()),  # settled
        ({"kd": 15, "fa": 16, "ffa": 16}, set()),  # learned nothing: no later look can help
    ],
)
def test_groups_of_cells_that_later_seeds_can_settle(suite, accuracies, cells):
    for seed in range(2, 7):
        save(suite, seed, accuracies)
    assert study_claims.open_cells(suite) == cells
