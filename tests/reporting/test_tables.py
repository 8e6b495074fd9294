"""Tables and claims from records, without training."""

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import nn

from faqd_lib.cli.study import study_tables
from faqd_lib.reporting import claims, grids, tables
from faqd_lib.reporting.verdicts import Estimate
from faqd_lib.runs.profile import Profile
from faqd_lib.runs.store import ResultsError
from faqd_lib.runs.suite import Suite
from faqd_lib.utils.files import canonical_json, project_root, tensors_digest, text_digest


@pytest.fixture
def suite(tmp_path):
    return Suite.open("quick", "digits", results=tmp_path)


IMAGES = 1000


def save(suite, config, accuracy, best=None):
    labels = torch.arange(IMAGES) % 10
    wrong = torch.arange(IMAGES) >= round(accuracy / 100 * IMAGES)
    suite.store.save(
        config,
        nn.Linear(2, 2),
        history=[{"epoch": 1, "loss": 1.0, "affinity": 0.25, "test_accuracy": accuracy}],
        last_accuracy=accuracy,
        best_accuracy=accuracy if best is None else best,
        selected_accuracy=None,
        test_images=IMAGES,
        parameters=6,
        weight_bytes=24.0,
        cost={
            "training_seconds": 2.0, "shared_seconds": 1.0, "step_milliseconds": 3.5, "images_per_second": 100.0,
            "peak_step_bytes": 2e6, "cohort": 1.0,
        },
        environment={"torch": torch.__version__},
        dataset_note="",
        predictions=torch.where(wrong, (labels + 1) % 10, labels),
        labels=labels,
    )  # fmt: skip


EMPTY = pd.DataFrame(columns=list(tables.REFERENCE_COLUMNS), dtype=str)


def test_every_table_says_not_run_without_records(suite):
    for table in tables.all_tables(suite, EMPTY):
        if "ours, last epoch" in table.frame:
            assert set(table.frame["ours, last epoch"]) == {tables.NOT_RUN}
            assert set(table.frame["n"]) == {"0"}
    assert set(claims.table(suite).frame["verdict"]) == {tables.NOT_RUN}


def test_a_record_fills_its_cell_and_no_other(suite):
    save(suite, suite.student("FAQD", weight_bits=2), 81.25, best=82.5)
    table = tables.weight_quantization(suite, EMPTY)
    filled = table.frame[table.frame["ours, last epoch"] != tables.NOT_RUN]
    assert len(filled) == 1
    row = filled.iloc[0]
    assert (row["bits"], row["regime"], row["learns from"]) == ("2W32A", "end-to-end", "FAQD, label-free")
    assert (row["ours, last epoch"], row["ours, best epoch"], row["n"]) == ("81.25", "82.50", "1")
    cell = table.overview.query("bits == '2W32A' and regime == 'end-to-end'")["FAQD, label-free"].item()
    assert cell == "81.25"


@pytest.mark.parametrize("profile", ["smoke", "quick", "cpu", "paper"])
def test_tables_show_the_runs_of_the_series_and_no_others(tmp_path, profile):
    shipped = Profile.load(profile).model_copy(
        update={"train_images": None, "test_images": None, "image_size": None, "dataset_settings": {}}
    )
    suite = Suite.open(shipped, "digits", results=tmp_path, seeds=2)
    series = grids.everything(suite)
    assert len(series) == len(set(series))
    cells = [cell for cells in grids.TABLES for cell in cells(suite)]
    assert {config for cell in cells if cell.planned for config in cell.runs} == set(series)
    for cell in cells:
        assert cell.planned or not set(cell.runs) & set(series), cell
    for config in series:
        save(suite, config, 80.0)
    made = [table for table in tables.all_tables(suite, EMPTY) if tables.OURS in table.frame]
    assert {run for table in made for run in table.runs} == {config.run_id for config in series}
    empty = sum((table.frame[tables.OURS].isin([tables.NOT_RUN])).sum() for table in made)
    assert empty == sum(not cell.planned for cell in cells)


def test_activation_steps_have_a_table(tmp_path):
    suite = Suite.open("quick", "digits", results=tmp_path)
    reference = EMPTY.copy()
    steps = grids.activation_steps(suite)
    learned = steps["lsq"][0]
    reference.loc[0] = [
        "T2", "digits", learned.teacher.model, learned.model, "1", "4", "end-to-end", "FAQD", "false", "mse", "fa", "",
        "70", "page 8",
    ]  # fmt: skip
    save(suite, steps["frozen"][0], 75.0)
    frame = tables.activation_steps(suite, reference).frame.set_index("gradient of the steps")
    assert list(frame.index) == ["lsq", "coarse", "frozen"]
    assert frame[tables.OURS].tolist() == [tables.NOT_RUN, tables.NOT_RUN, "75.00"]
    assert frame["paper"].tolist() == ["70.00", "", ""]  # the paper has learned steps only


COMMITTED = sorted((project_root() / "results" / "reference").glob("*/tables/*.csv"))


def test_committed_tables_are_those_of_the_committed_records():
    assert COMMITTED
    for folder in {path.parents[1] for path in COMMITTED}:
        suite = Suite.read(folder)
        if suite.profile.study is None:
            again = [claims.table(suite), *tables.all_tables(suite, EMPTY)]
        else:
            again = study_tables(suite)
        made = {table.name: table for table in again}
        for path in COMMITTED:
            if path.parents[1] == folder:
                expected = pd.read_csv(path, dtype=str, keep_default_na=False)
                assert made[path.stem].frame.astype(str).equals(expected), path


def test_seeds_give_mean_and_deviation(tmp_path):
    suite = Suite.open("quick", "digits", results=tmp_path, seeds=2)
    for seed, accuracy in ((1, 80.0), (2, 82.0)):
        save(suite, suite.student("KD", weight_bits=1, seed=seed), accuracy)
    frame = tables.affinity_losses(suite, EMPTY).frame.set_index("affinity loss")
    assert frame.loc["none", "ours, last epoch"] == "81.00 ± 1.41"
    assert frame.loc["none", "n"] == "2"
    assert frame.loc["FA (exact)", "ours, last epoch"] == tables.NOT_RUN


def test_a_grid_chooses_teachers_of_t1_and_bits_of_t4(tmp_path):
    suite = Suite.open("cpu", "digits", results=tmp_path)
    assert [config.model for config in grids.references(suite)] == ["resnet20", "resnet56", "resnet20"]
    assert {c.teacher.model for c in grids.weight_quantization(suite) if c.teacher} == {"resnet20"}
    wanted = grids.affinity_losses(suite)
    assert {(c.quantization.weight_bits, c.method) for c in wanted} == {
        (bits, method) for bits in (1, 2, 4) for method in ("KD", "FAQD", "FFAQD")
    }
    assert {(c.quantization.weight_bits, c.objective.k) for c in wanted if c.method == "FFAQD"} == {
        (1, 1), (1, 3), (1, 6), (1, 15), (2, 6), (4, 6),
    }  # fmt: skip
    assert set(tables.weight_quantization(suite, EMPTY).frame["teacher"]) == {"", "resnet20"}
    save(suite, suite.student("FFAQD", weight_bits=2, k=6), 80.0)
    frame = tables.affinity_losses(suite, EMPTY).frame
    filled = frame[frame["ours, last epoch"] != tables.NOT_RUN]
    assert filled[["bits", "affinity loss"]].to_numpy().tolist() == [["2W32A", "FFA, k = 6"]]


def save_untaught(suite, config):
    """A run that takes every image for class 0."""
    save(suite, config, 10.0)
    path = suite.store.run_folder(config) / "predictions.safetensors"
    kept = load_file(path)
    kept["predicted"] = torch.zeros_like(kept["predicted"])
    save_file(kept, path)
    record = suite.store.run_folder(config) / "record.json"
    content = json.loads(record.read_text()) | {"predictions_digest": tensors_digest(kept)}
    del content["checksum"]
    record.write_text(json.dumps(content | {"checksum": text_digest(canonical_json(content))}))


def test_students_that_learned_nothing_are_counted(tmp_path):
    """They agree to the last image whatever they were taught: an interval of no width is no evidence."""
    suite = Suite.open("quick", "digits", results=tmp_path, seeds=3)
    for seed in (1, 2, 3):
        for labels in (True, False):
            save_untaught(suite, suite.student("FAQD", labels=labels, weight_bits=1, seed=seed))
    table = claims.table(suite)
    row = table.frame.set_index("claim").loc["Label-free equals or beats distillation with labels"]
    assert (row["difference"], row["n (seeds)"], row["verdict"]) == ("+0.00", "3", claims.EXPLORATORY)
    assert "Learned nothing, one class for all test images: 6 runs." in table.caption


def test_a_run_that_learned_nothing_counts_only_where_a_claim_rests_on_it(tmp_path):
    suite = Suite.open("quick", "digits", results=tmp_path, seeds=3)
    for seed in (1, 2, 3):
        for labels, accuracy in ((True, 70.0), (False, 80.0 + seed / 100)):
            save(suite, suite.student("FAQD", labels=labels, weight_bits=1, seed=seed), accuracy)
    save_untaught(suite, suite.post_training(1, 4))  # no claim compares what was not trained
    table = claims.table(suite)
    assert "Learned nothing" not in table.caption
    save_untaught(suite, suite.student("FAQD", labels=True, weight_bits=2))
    save(suite, suite.student("FAQD", weight_bits=2), 80.0)
    table = claims.table(suite)
    assert "Learned nothing, one class for all test images: 1 run." in table.caption


def test_captions_say_how_many_runs_of_which_seeds_and_when(tmp_path):
    suite = Suite.open("quick", "digits", results=tmp_path, seeds=2)
    assert "No runs yet: n = 0." in tables.affinity_losses(suite, EMPTY).caption
    save(suite, suite.teacher(), 90.0)
    for seed in (1, 2):
        for method in ("KD", "FAQD"):
            save(suite, suite.student(method, weight_bits=1, seed=seed), 80.0)
    today = suite.store.records()[0].finished[:10]
    assert f"From 4 runs, seeds 1, 2 (n = 2), trained {today}." in tables.affinity_losses(suite, EMPTY).caption
    assert f"From 5 runs, seeds 1, 2 (n = 2), trained {today}." in tables.weight_quantization(suite, EMPTY).caption
    assert f"trained {today}." in claims.table(suite).caption


def test_one_seed_has_an_interval_for_other_images_only(suite):
    save(suite, suite.student("KD", weight_bits=1), 70.0)
    save(suite, suite.student("FAQD", weight_bits=1), 72.0)
    row = claims.table(suite).frame.iloc[0]
    low, high = map(float, row["95 % interval"].removesuffix(" (other images only: 1 seed)").split(" to "))
    first, second = (
        suite.store.predictions(suite.store.record(suite.student(method, weight_bits=1))) for method in ("FAQD", "KD")
    )
    difference = 100 * (
        (first["predicted"] == first["label"]).double() - (second["predicted"] == second["label"]).double()
    )
    half = 1.96 * float(difference.std()) / IMAGES**0.5
    assert (low, high) == pytest.approx((2 - half, 2 + half), abs=0.02)
    assert row["verdict"] == claims.EXPLORATORY


def test_smoke_numbers_are_never_shown(tmp_path):
    suite = Suite.open("smoke", "digits", results=tmp_path)
    for config in grids.everything(suite):
        save(suite, config, 98.7654)
    made = [claims.table(suite), *tables.all_tables(suite, EMPTY)]
    for path in tables.write_all(suite, made):
        assert "98.7" not in path.read_text(), path
    assert set(claims.table(suite).frame["verdict"]) == {tables.NOT_A_RESULT}


def test_other_datasets_have_a_table_where_the_series_has_them(suite):
    wanted = ["cifar10", "tiny-imagenet"]
    profile = suite.profile.model_copy(update={"series_datasets": wanted})
    several = replace(suite, state=suite.state.model_copy(update={"profile": profile}))
    t1 = [table.name.rpartition("_")[2] for table in tables.all_tables(several, EMPTY) if table.name.startswith("T1")]
    assert t1 == ["digits", *wanted]


def test_all_tables_are_written_in_three_formats(suite):
    save(suite, suite.teacher(), 90.0)
    made = tables.all_tables(suite, EMPTY)
    assert {table.name.split("_")[0] for table in made} == {"T1", "T2", "T3", "T4", "T5"}
    assert sum(table.name.startswith("T1") for table in made) == 1
    written = tables.write_all(suite, made)
    assert {path.suffix for path in written} == {".csv", ".md", ".tex"}
    for table in made:
        with_teacher = table.name.split("_")[0] in ("T1", "T2", "T5") and table.name.endswith("_digits")
        with_teacher &= "activation_steps" not in table.name
        assert ("From 1 run, trained" if with_teacher else "n = 0") in table.caption, table.name
        assert table.caption in (suite.folder / "tables" / f"{table.name}.md").read_text()
        back = pd.read_csv(suite.folder / "tables" / f"{table.name}.csv", dtype=str, keep_default_na=False)
        assert back.astype(str).equals(table.frame.astype(str)), table.name
        tex = (suite.folder / "tables" / f"{table.name}.tex").read_text()
        assert re.search(r"(?<!\\)%", tex) is None
    assert "digits" in (suite.folder / "summary.md").read_text()


def test_caption_names_dataset_reason_profile_and_seeds(tmp_path, monkeypatch):
    monkeypatch.setenv("FAQD_DATA", str(tmp_path))
    suite = Suite.open("quick", results=tmp_path / "results", data_root=tmp_path)
    caption = tables.weight_quantization(suite, EMPTY).caption
    for part in ("digits", "no CIFAR-10 was found", "profile quick", "one seed"):
        assert part in caption


def test_paper_column_comes_from_the_users_file(suite, tmp_path):
    config = suite.student("FAQD", weight_bits=1)
    save(suite, config, 80.0)
    path = tmp_path / "paper.csv"
    row = f"T1,digits,{config.teacher.model},{config.model},1,32,end-to-end,FAQD,false,mse,fa,,81.5,page 7"
    path.write_text(",".join(tables.REFERENCE_COLUMNS) + "\n" + row + "\n")
    frame = tables.weight_quantization(suite, tables.read_paper_reference(path)).frame
    cell = frame[frame["paper"] != ""]
    assert cell[["paper", "ours, last epoch", "difference"]].values.tolist() == [["81.50", "80.00", "-1.50"]]


def test_shipped_paper_reference_holds_no_guess():
    assert len(tables.read_paper_reference()) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("table,dataset\nT1,cifar10\n", "lacks the columns"),
        (
            ",".join(tables.REFERENCE_COLUMNS) + "\nT1,a,b,c,1,32,end-to-end,KD,no,mse,fa,,80,p\n",
            "labels must be one of true, false, got 'no'",
        ),
        (
            ",".join(tables.REFERENCE_COLUMNS) + 2 * "\nT1,a,b,c,1,32,end-to-end,KD,true,mse,none,,80,p" + "\n",
            "has two lines for",
        ),
        (
            ",".join(tables.REFERENCE_COLUMNS) + "\nT1,a,b,c,1,32,r,m,false,mse,fa,,high,p\n",
            "'high' is not a percentage",
        ),
        (",".join(tables.REFERENCE_COLUMNS) + "\nT1,a,b,c,1,32,r,m,false,mse,fa,,101,p\n", "'101' is not a percentage"),
    ],
)
def test_bad_paper_reference_is_refused(tmp_path, text, message):
    path = tmp_path / "paper.csv"
    path.write_text(text)
    with pytest.raises(ResultsError, match=message):
        tables.read_paper_reference(path)


# ---- claims


def test_interval_is_students():
    # mean 2, standard deviation 1, n = 4: half width 3.1824 · 1 / 2
    low, high = Estimate.of([1.0, 2.0, 2.0, 3.0]).interval()
    deviation = (2 / 3) ** 0.5
    assert (high + low) / 2 == pytest.approx(2.0)
    assert (high - low) / 2 == pytest.approx(3.182446 * deviation / 2, rel=1e-5)


def test_interval_without_seeds_is_that_of_paired_images():
    of_images = torch.tensor([1.0] * 30 + [-1.0] * 20 + [0.0] * 950)
    by_image = of_images.repeat(3, 1)  # every seed the same
    measured = Estimate.of([1.0, 1.0, 1.0], by_image)
    expected = stats.ttest_1samp(100 * of_images.numpy(), 0).confidence_interval(0.95)
    assert measured.interval() == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("of_seeds", "of_images", "of_both"), [(0.008, 0.2, 0.2), (0.0, 0.0, 0.4), (0.01, 0.0, 0.1), (0.0, 0.3, 0.1)]
)
def test_interval_covers_new_seeds_and_new_images(of_seeds, of_images, of_both):
    """Simulated: an effect that differs between seeds, between images and for each pair, measured on samples."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        cells = 0.01 + random.normal(0, of_seeds, (4, 1)) + random.normal(0, of_images, (1, 400))
        cells = torch.from_numpy(cells + random.normal(0, of_both, (4, 400)))
        low, high = Estimate.of((100 * cells.mean(1)).tolist(), cells).interval()
        covered += low <= 1.0 <= high
    assert 930 <= covered <= 995  # Cochran's intervals err on the safe side


def test_noise_of_single_runs_is_not_taken_for_that_of_images():
    random = np.random.default_rng(1)
    cells = torch.from_numpy(0.003 + random.normal(0, 0.4, (3, 10_000)))  # images differ by chance only
    measured = Estimate.of((100 * cells.mean(1)).tolist(), cells)
    naive = 100**2 * float(cells.mean(0).var()) / 10_000
    assert measured.image_variance < 0.1 * naive


def test_every_cell_names_the_records_behind_it(suite):
    config = suite.student("FAQD", weight_bits=1)
    save(suite, config, 80.0)
    save(suite, suite.student("KD", weight_bits=1), 70.0)
    before = {table.name: table.frame for table in (claims.table(suite), *tables.all_tables(suite, EMPTY))}
    behind = [
        name for name, frame in before.items() if frame.get("runs", pd.Series([""])).str.contains(config.run_id).any()
    ]
    assert [name.split("_")[0] for name in behind] == ["claims", "T1", "T3", "T4", "T5"]
    (suite.store.run_folder(config) / "record.json").unlink()
    for table in (claims.table(suite), *tables.all_tables(suite, EMPTY)):
        old, new = before[table.name], table.frame
        assert config.run_id not in new.to_csv()
        if table.name.startswith("T5"):
            assert new.equals(old[old["run"] != config.run_id].reset_index(drop=True))
            continue
        touched = old["runs"].str.contains(config.run_id) if "runs" in old else pd.Series(False, index=old.index)
        assert new[~touched].equals(old[~touched])
        for column in {"ours, last epoch", "verdict"} & set(new.columns):
            assert set(new.loc[touched, column]) <= {tables.NOT_RUN}


def test_runs_of_a_version_without_predictions_are_compared_by_seeds(tmp_path):
    suite = Suite.open("quick", "digits", results=tmp_path, seeds=3)
    for seed in (1, 2, 3):
        for method, accuracy in (("KD", 70.0), ("FAQD", 75.0)):
            save(suite, suite.student(method, weight_bits=1, seed=seed), accuracy + seed / 10)
    save(suite, suite.teacher(), 90.0)
    student = suite.student("KD", weight_bits=1, seed=2)
    for config in (student, suite.teacher()):  # the teacher stands in no pair, so it is not counted
        path = suite.store.run_folder(config) / "record.json"
        content = json.loads(path.read_text())
        del content["predictions_digest"], content["checksum"]
        path.write_text(json.dumps(content | {"checksum": text_digest(canonical_json(content))}))
    assert suite.store.predictions(suite.store.record(student)) is None
    table = claims.table(suite)
    assert "Kept no predictions: 1 run;" in table.caption
    assert "for other seeds and other test images" in table.caption
    low, high = map(float, table.frame.iloc[0]["95 % interval"].split(" to "))
    assert low == high == 5.0  # every seed differs by as much


def test_pairs_are_same_bits_regime_and_seed_and_a_seed_counts_once(tmp_path):
    suite = Suite.open("quick", "digits", results=tmp_path, seeds=3)
    for seed in (1, 2, 3):
        for bits, kd, faqd in ((1, 70.0, 71.0), (2, 75.0, 77.0), (4, 80.0, 83.0 + seed / 10)):
            save(suite, suite.student("KD", weight_bits=bits, seed=seed), kd)
            save(suite, suite.student("FAQD", weight_bits=bits, seed=seed), faqd)
    save(suite, suite.student("KD", weight_bits=1, regime="fine-tuning"), 99.0)  # without a partner
    save(suite, suite.student("FAQD", weight_bits=1, logit_loss="kl"), 10.0)  # T3's other half
    save(suite, suite.student("FAQD", weight_bits=1, affinity_weight=1000.0), 10.0)  # not of the profile
    row = claims.table(suite).frame.iloc[0]
    assert (row["n (seeds)"], row["difference"], row["verdict"]) == ("3", "+2.07", claims.EXPLORATORY)
    assert row["pairs above −margin"] == "9 of 9"


def test_without_a_design_there_is_no_verdict(suite):
    for bits in (1, 2, 4):
        for regime in ("end-to-end", "fine-tuning"):
            save(suite, suite.student("KD", weight_bits=bits, regime=regime), 70.0)
            save(suite, suite.student("FAQD", weight_bits=bits, regime=regime), 80.0)
    row = claims.table(suite).frame.iloc[0]
    assert (row["pairs above −margin"], row["n (seeds)"], row["verdict"]) == ("6 of 6", "1", claims.EXPLORATORY)


def test_label_free_claims_leave_fine_tuning_out(suite):
    for regime, accuracy in (("end-to-end", 70.0), ("fine-tuning", 10.0)):
        save(suite, suite.student("labels", weight_bits=1, regime=regime), 60.0)
        save(suite, suite.student("FAQD", weight_bits=1, regime=regime), accuracy)
    row = claims.table(suite).frame.set_index("claim").loc["Label-free equals or beats training with labels only"]
    assert (row["difference"], row["pairs above −margin"]) == ("+10.00", "1 of 1")


def test_logit_loss_claims_compare_within_a_regime(tmp_path):
    suite = Suite.open("quick", "digits", results=tmp_path, seeds=3)
    for seed in (1, 2, 3):
        save(suite, suite.student("FAQD", weight_bits=1, logit_loss="mse", seed=seed), 80.0 + seed / 10)
        save(suite, suite.student("FAQD", weight_bits=1, logit_loss="kl", seed=seed), 79.0)
    frame = claims.table(suite).frame.set_index("claim")
    assert frame.loc["MSE beats KL end to end", "difference"] == "+1.20"
    assert frame.loc["KL beats MSE in fine-tuning", "verdict"] == tables.NOT_RUN


def test_ffa_is_held_against_fa_with_its_margin(suite):
    save(suite, suite.student("FAQD", weight_bits=1), 80.0)
    save(suite, suite.student("FFAQD", weight_bits=1, k=6), 79.9)
    save(suite, suite.student("FFAQD", weight_bits=1, k=1), 20.0)  # another k
    row = claims.table(suite).frame.set_index("claim").loc["FFA with k = 6 is as good as exact FA"]
    assert (row["n (seeds)"], row["difference"], row["margin"]) == ("1", "-0.10", "0.5")
    assert row["verdict"] == claims.EXPLORATORY
