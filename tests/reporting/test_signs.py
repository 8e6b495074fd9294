"""The three failure signs: what raises each, and what does not."""

import pandas as pd
import pytest
from conftest import make_tiny_data, make_tiny_suite

from faqd_lib.reporting import signs, tables


def gaps(*values: float) -> pd.DataFrame:
    count = len(values)
    return pd.DataFrame(
        [("r", "KD", (epoch + 1) / count, gap) for epoch, gap in enumerate(values)],
        columns=["run", "method", "progress", "gap"],
    )


@pytest.mark.parametrize(
    ("values", "judged", "found"),
    [
        ((20, 10, 5, 4, 4, 4), 1, 1),  # stays four points behind
        ((20, 10, 5, 4, 3.9, 3.81), 1, 1),  # 4.75 % closed
        ((20, 10, 5, 4, 3, 2.5), 1, 0),  # still closes
        ((20, 10, 5, 1.9, 1.9, 1.9), 1, 0),  # near enough
        ((20, 10, 5, 4, 4), 0, 0),  # too few evaluations
    ],
)
def test_a_plateau_is_a_gap_that_has_stopped_closing(values, judged, found):
    assert tuple(map(len, signs.plateaus(gaps(*values)))) == (judged, found)


@pytest.mark.parametrize(
    ("apart", "ratio", "found"), [(0.9, 1.2, 0), (-1.1, 1.0, 1), (0.0, 1.3, 1), (0.0, 0.79, 1), (0.0, float("nan"), 0)]
)
def test_ffa_is_not_fa_where_accuracy_or_maps_differ(apart, ratio, found):
    pairs = pd.DataFrame([("r", "p", 6, apart, ratio)], columns=["run", "partner", "k", "apart", "ratio"])
    assert tuple(map(len, signs.apart(pairs))) == (1, found)


@pytest.mark.parametrize(
    ("norms", "losses", "found"),
    [
        ((3.0, 0.9, 0.5), (1.0, 0.8, 0.6), 0),  # the first epoch does not count
        ((0.5, 1.1, 0.5), (1.0, 0.8, 0.6), 1),
        ((0.5, 0.5, 0.5), (1.0, 1.2, 0.6), 1),
    ],
)
def test_instability_is_a_large_gradient_or_a_rising_loss(norms, losses, found):
    rows = [("r", 30.0, epoch + 1, norm, loss) for epoch, (norm, loss) in enumerate(zip(norms, losses, strict=True))]
    steps = pd.DataFrame(rows, columns=["run", "affinity_weight", "epoch", "norm", "loss"])
    assert tuple(map(len, signs.unstable(steps))) == (1, found)


def test_frames_are_read_from_records(trained_suite):
    suite, runs = trained_suite
    records = suite.store.records()
    found = signs.gap_frame(records)
    teacher = suite.store.record(suite.teacher())
    kd = suite.store.record(runs["KD"])
    rows = found[found["run"] == kd.run_id]
    assert list(rows["gap"]) == [teacher.last_accuracy - row["test_accuracy"] for row in kd.history]
    assert list(rows["progress"]) == [0.5, 1.0]
    (pair,) = signs.estimate_frame(records).itertuples()
    fa, ffa = (suite.store.record(runs[name]) for name in ("FAQD", "FFAQD"))
    assert (pair.run, pair.partner, pair.k) == (ffa.run_id, fa.run_id, 2)
    assert pair.ratio == pytest.approx(ffa.test_affinity / fa.test_affinity)
    steps = signs.stability_frame(records)
    assert set(steps["run"]) == {record.run_id for record in (kd, fa, ffa)}
    assert list(steps.groupby("run")["loss"].first()) == [1.0] * 3


def test_the_table_names_the_runs_behind_each_sign(trained_suite):
    suite, _ = trained_suite
    frame = signs.table(suite).frame
    assert list(frame["sign"]) == list(signs.SIGNS)
    assert list(frame["runs judged"]) == ["0", "1", "3"]
    # A profile for tests shows no result; and no run of two epochs is judged for a plateau.
    assert list(frame["runs with the sign"]) == [signs.NOT_JUDGED, tables.NOT_A_RESULT, tables.NOT_A_RESULT]


@pytest.fixture(scope="module")
def trained_suite(tmp_path_factory):
    suite = make_tiny_suite(tmp_path_factory.mktemp("signs") / "s", make_tiny_data())
    runs = {name: suite.student(name, weight_bits=1) for name in ("KD", "FAQD")}
    runs["FFAQD"] = suite.student("FFAQD", weight_bits=1, k=2)
    suite.run(runs.values())
    return suite, runs
