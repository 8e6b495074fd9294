"""The command that runs a study: its options, what it writes, and the hours that it names."""

import pytest

from faqd_lib.cli import run_all
from faqd_lib.cli.study import hours_left, report_study, run_study, seed_runs
from faqd_lib.runs.suite import Suite
from faqd_lib.training.loss_log import NonFiniteLossError

STUDY = {
    "looks": [2],
    "arms": {"kd": {"method": "KD"}, "fa": {"method": "FAQD"}},
    "cells": {"main": {"arms": ["kd", "fa"], "weight_bits": [1]}},
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["claims", "--only", "05"], "--only is not for a study"),
        (["claims", "--seeds", "3"], "--seeds is not for a study"),
        (["claims", "--seeds", "0"], "--seeds is not for a study"),
        (["claims", "--hours", "-1"], "--hours must be a number of at least 0, got -1"),
        (["claims", "--hours", "nan"], "--hours must be a number of at least 0, got nan"),
        (["smoke", "--hours", "1"], "--hours is for a study, and the profile smoke has none"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message, capsys):
    assert run_all.main(options) == 1
    assert message in capsys.readouterr().err


def test_fresh_leaves_a_folder_that_another_process_works_in(tmp_path, capsys):
    profile = tmp_path / "mine.toml"
    profile.write_text('base = "short"\nheld_out_images = 0')
    suite = Suite.open(profile, "digits", results=tmp_path)
    arguments = [str(profile), "--dataset", "digits", "--results", str(tmp_path), "--fresh", "--hours", "0"]
    with suite.store.group_lock("seed3"):
        assert run_all.main(arguments) == 1
    assert "another process trains seed 3" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.old-*"))


def test_a_study_whose_run_diverged_is_reported_and_fails(tmp_path, monkeypatch, capsys):
    def diverge(suite, hours):
        raise NonFiniteLossError("no number")

    monkeypatch.setattr(run_all, "run_study", diverge)
    monkeypatch.setattr(run_all, "report_study", lambda suite: print("reported"))
    profile = tmp_path / "mine.toml"
    profile.write_text('base = "short"\nheld_out_images = 0')
    assert run_all.main([str(profile), "--dataset", "digits", "--results", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "reported" in said.out
    assert "stopped: no number" in said.err


def test_a_study_of_tuning_is_trained_and_reported(tiny_suite, capsys):
    suite = tiny_suite(study=STUDY, shows_results=True, validation_images=12)
    assert hours_left(suite) is None
    assert run_study(suite)
    table, of_signs = report_study(suite)
    assert (table.name, of_signs.name) == ("tuning", "signs")
    assert list(table.frame["arm"]) == ["kd", "fa"]
    assert list(table.frame["n"]) == [2, 2]
    runs = [suite.store.record(run) for seed in (2, 3) for run in seed_runs(suite, seed)]
    kd = [run.history[-1]["validation_accuracy"] for run in runs if run.configuration.method == "KD"]
    assert float(table.frame.iloc[0]["validation accuracy (%)"]) == pytest.approx(sum(kd) / 2, abs=0.005)
    assert (suite.folder / "tables" / "tuning.csv").is_file()
    assert "training left: about 0:00 on this machine" in capsys.readouterr().out


def test_hours_left_follow_from_the_finished_epochs_of_the_same_kind(tiny_suite):
    """One of two seeds of the first group is done, with its teacher; the other group has another network."""
    other = {"arms": ["kd"], "weight_bits": [1], "student": "resnet20"}
    suite = tiny_suite(study=STUDY | {"cells": STUDY["cells"] | {"other": other}})
    records = [*suite.run(suite.study_runs("main", 2).values()), suite.store.record(suite.teacher())]
    seconds = [record.cost["training_seconds"] for record in records]
    students = sum(seconds[:2]) / (2 + 2)  # of an epoch; the teacher has one
    pooled = sum(seconds) / (2 + 2 + 1)
    assert hours_left(suite) == pytest.approx((4 * students + 4 * pooled) / 3600)
    assert students != pytest.approx(pooled)


def test_the_claims_of_a_study_are_reported(tiny_suite, capsys):
    claim = {"statement": "It helps", "contrast": {"fa": 1.0, "kd": -1.0}, "cells": "main"}
    suite = tiny_suite(study=STUDY | {"looks": [5], "claims": {"helps": claim}}, shows_results=True)
    suite.run([*seed_runs(suite, 2), *seed_runs(suite, 3)])
    made = {table.name: table.frame for table in report_study(suite)}
    assert made["claims"].iloc[0]["n (seeds)"] == "2 of 5"
    assert list(made["arms"]["arm"]) == ["kd", "fa"]
    assert "updates_to_accuracy" not in made  # one budget is no curve
    assert {path.stem for path in (suite.folder / "figures").glob("*.png")} == {
        "claims", "over_updates", "failure_signs",
    }  # fmt: skip
    assert {path.stem for path in (suite.folder / "tables").glob("*.csv")} == set(made)
    assert "It helps" in capsys.readouterr().out
    page = (suite.folder / "report" / "index.html").read_text()
    head, _, rest = page.partition('<div class="cards">')
    assert 'src="data:image/png' in head  # the picture of the claims stands first, and only there
    assert page.count("data:image/png") == 3
    assert "5 planned seeds" in head
    assert "kd" in rest[rest.index('id="arms"') :]
    assert "T1 Weight quantization" not in page
