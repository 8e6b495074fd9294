"""Suites: what is run, what is not run again, and whose folder it is."""

import json
import pickle
import shutil

import pytest
import torch

from faqd_lib.config import ConfigurationError
from faqd_lib.data.datasets import DatasetError
from faqd_lib.runs.profile import Profile, SuiteState
from faqd_lib.runs.store import ResultsError
from faqd_lib.runs.suite import Suite


def no_training(monkeypatch):
    monkeypatch.setattr("faqd_lib.runs.local.train", lambda *_, **__: pytest.fail("trained again"))


def test_finished_runs_are_not_repeated(tiny_suite, monkeypatch, capsys):
    suite = tiny_suite()
    config = suite.student("KD", weight_bits=1)
    first = suite.run([config])
    no_training(monkeypatch)
    again = tiny_suite()
    assert again.run([config, config]) == first
    assert "1 of 1 runs are there" in capsys.readouterr().out


def test_a_teacher_that_no_run_needs_any_more_is_not_trained_again(tiny_suite, monkeypatch):
    suite = tiny_suite()
    config = suite.student("KD", weight_bits=1)
    first = suite.run([config])
    shutil.rmtree(suite.store.run_folder(config.teacher))
    no_training(monkeypatch)
    assert suite.run([config]) == first
    assert suite.store.record(config.teacher) is None


def test_an_interrupted_suite_continues_where_it_stopped(tiny_suite):
    suite = tiny_suite()
    configs = [suite.student("KD", weight_bits=bits) for bits in (1, 2)]
    before = suite.run(configs)
    # As a kill between weights and record leaves it.
    (suite.store.run_folder(configs[1]) / "record.json").unlink()
    untouched = (suite.store.run_folder(configs[0]) / "record.json").stat().st_mtime_ns
    after = tiny_suite().run(configs)
    assert (suite.store.run_folder(configs[0]) / "record.json").stat().st_mtime_ns == untouched
    assert after[0] == before[0]
    assert after[1].weights_digest == before[1].weights_digest
    assert after[1].history == before[1].history


def test_what_a_run_needs_is_trained_first_and_returned_in_order(tiny_suite):
    suite = tiny_suite()
    config = suite.student("KD", weight_bits=1, regime="fine-tuning")
    teacher, student = suite.run([suite.teacher(), config])
    assert (teacher.configuration, student.configuration) == (suite.teacher(), config)
    assert {record.run_id for record in suite.store.records()} == {
        config.run_id, config.teacher.run_id, config.initial.run_id,
    }  # fmt: skip


def test_progress_names_run_epoch_and_time_left(tiny_suite, capsys):
    suite = tiny_suite()
    suite.run([suite.float_student()], "references")
    out = capsys.readouterr().out
    assert "references: run 1 of 1" in out
    assert "epoch 2 of 2" in out
    assert "left" in out


def test_a_model_comes_back_trained_quantized_and_in_evaluation_mode(tiny_suite):
    suite = tiny_suite()
    config = suite.student("labels", weight_bits=2)
    with pytest.raises(ResultsError, match="has not been trained"):
        suite.model(config)
    (record,) = suite.run([config])
    model = suite.model(config)
    assert not model.training
    assert model.layer2[0].conv1.weight.unique().numel() <= 3
    assert record.parameters == sum(p.numel() for p in model.parameters())


def test_validation_images_are_held_out_and_select_an_epoch(tiny_suite):
    suite = tiny_suite()
    state = suite.state.model_copy(
        update={"data": suite.state.data.model_copy(update={"validation_images": 12, "train_images": 30})}
    )
    chosen = Suite(state, suite.store, suite.device, images=suite.data)
    training, validation, test = chosen.splits
    assert (len(training), len(validation), len(test)) == (30, 12, 24)
    seen = {pixels.numpy().tobytes() for pixels in training.pixels}
    assert not any(pixels.numpy().tobytes() in seen for pixels in validation.pixels)
    (record,) = chosen.run([chosen.float_student()])
    best = max(record.history, key=lambda row: row["validation_accuracy"])
    assert record.selected_accuracy == best["test_accuracy"]


# ---- opening


@pytest.fixture
def profile(tmp_path):
    """A function that writes a profile on digits with other settings."""

    def write(text: str = "", name: str = "mine") -> str:
        file = tmp_path / f"{name}.toml"
        file.write_text(
            f'shows_results = false\ndataset = "digits"\nteachers = ["resnet8"]\nstudent = "resnet8"\n{text}\n'
            + "".join(
                f"[{part}_schedule]\nepochs = 1\nbatch_size = 64\n" for part in ("teacher", "student", "fine_tuning")
            )
        )
        return str(file)

    return write


def test_open_begins_a_folder_and_finds_it_again(profile, tmp_path):
    results = tmp_path / "results"
    suite = Suite.open(profile("train_images = 64\ntest_images = 50"), results=results)
    assert suite.folder == results / "mine-digits"
    assert [len(suite.splits.training), len(suite.splits.test)] == [64, 50]
    assert suite.splits.test.labels.bincount().tolist() == [5] * 10
    again = Suite.open(profile("train_images = 64\ntest_images = 50"), results=results)
    assert again.student("FAQD", weight_bits=1).digest == suite.student("FAQD", weight_bits=1).digest
    for text in ("digits", "64 training", "50 test", "profile mine"):
        assert text in again.caption
    assert Suite.read(suite.folder).caption == suite.caption
    with pytest.raises(ResultsError, match=r"no suite\.json"):
        Suite.read(results)


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ("train_images = 64", "train_images = 65", ["profile.train_images: 64 there, 65 now"]),
        ("", "[losses]\naffinity_weight = 10.0", ["affinity_weight: 30.0 there, 10.0 now"]),
        ("", "image_size = 16", ["image_size", "16"]),
    ],
)
def test_a_folder_of_another_configuration_is_refused(profile, tmp_path, first, second, names):
    Suite.open(profile(first), results=tmp_path / "results")
    state = tmp_path / "results" / "mine-digits" / "suite.json"
    before = state.read_bytes()
    with pytest.raises(ResultsError, match="another configuration") as raised:
        Suite.open(profile(second), results=tmp_path / "results")
    for name in [*names, "--fresh", "--results"]:
        assert name in str(raised.value)
    assert state.read_bytes() == before


def test_more_seeds_or_smaller_cohorts_are_the_same_suite(profile, tmp_path):
    results = tmp_path / "results"
    assert Suite.open(profile(), results=results).profile.seeds == 1
    assert Suite.open(profile("cohort = 2"), results=results, seeds=3).profile.seeds == 3


def test_another_note_on_the_same_images_is_the_same_suite(profile, tmp_path):
    """A remark on how the images were made may come later; the fingerprint says which they are."""
    first = Suite.open(profile(), results=tmp_path / "results")
    path = first.folder / "suite.json"
    path.write_text(path.read_text(encoding="utf-8").replace(first.state.note, "an older note"), encoding="utf-8")
    assert "an older note" in Suite.read(first.folder).caption
    assert Suite.open(profile(), results=tmp_path / "results").state == Suite.read(first.folder).state == first.state


def test_the_precision_that_a_folder_was_begun_with_stays(profile, tmp_path, monkeypatch):
    results = tmp_path / "results"
    monkeypatch.setattr("faqd_lib.runs.suite.precision_that_pays", lambda device: "float32")
    Suite.open(profile(), results=results)
    monkeypatch.setattr("faqd_lib.runs.suite.precision_that_pays", lambda device: "bf16")
    assert Suite.open(profile(), results=results).precision == "float32"
    assert Suite.open(profile(), results=tmp_path / "others").precision == "bf16"


@pytest.mark.parametrize("damage", [lambda text: text[:40], lambda text: "", lambda text: json.dumps({"profile": 1})])
def test_damaged_suite_file_is_named(profile, tmp_path, damage):
    Suite.open(profile(), results=tmp_path / "results")
    state = tmp_path / "results" / "mine-digits" / "suite.json"
    state.write_text(damage(state.read_text()))
    with pytest.raises(ResultsError, match="damaged") as raised:
        Suite.open(profile(), results=tmp_path / "results")
    assert str(state) in str(raised.value)


def test_unwritable_results_stop_before_anything_is_computed(profile, tmp_path, monkeypatch):
    monkeypatch.setattr("faqd_lib.data.datasets.load", lambda *_, **__: pytest.fail("loaded data first"))
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "results", "/proc/faqd"):
        with pytest.raises(PermissionError, match="--results") as raised:
            Suite.open(profile(), results=folder)
        assert str(folder) in str(raised.value)


@pytest.mark.parametrize("seeds", [-1, 1.5, "2", True])
def test_bad_seeds_are_named(profile, tmp_path, seeds):
    with pytest.raises(ConfigurationError, match="seeds") as raised:
        Suite.open(profile(), results=tmp_path, seeds=seeds)
    assert repr(seeds) in str(raised.value)


def test_bad_profile_and_dataset_are_named(profile, tmp_path):
    with pytest.raises(ConfigurationError, match="smoke"):
        Suite.open("smok", results=tmp_path)
    with pytest.raises(DatasetError, match="'cifar11'"):
        Suite.open(profile(), dataset="cifar11", results=tmp_path)
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_batch_size_above_the_images_is_named(profile, tmp_path):
    with pytest.raises(ConfigurationError, match=r"teacher_schedule\.batch_size = 64 is more than the 50 training"):
        Suite.open(profile("train_images = 50"), results=tmp_path)


@pytest.mark.parametrize("device", ["gpu", "cuda" if not torch.cuda.is_available() else "cuda:x"])
def test_a_device_that_is_not_there_is_named(profile, tmp_path, device):
    with pytest.raises(ConfigurationError, match=f"device.*{device}"):
        Suite.open(profile(), results=tmp_path, device=device)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"method": "FAQQ"}, "method must be one of labels, KD, FA, FAQD, FFAQD, KD.*, got 'FAQQ'"),
        ({"regime": "slow"}, "regime must be one of end-to-end, fine-tuning, got 'slow'"),
        ({"teacher": "resnet21"}, "teacher must be one of .*resnet20.*, got 'resnet21'"),
        ({"weight_bits": "4"}, "weight_bits = '4': Input should be 1, 2"),
        ({"quantization": {"per_chanel": True}}, r"'per_chanel' \(did you mean 'per_channel'\?\)"),
        ({"k": 0, "method": "FFAQD"}, "k = 0"),
        ({"logit_loss": "l1"}, "logit_loss = 'l1'"),
    ],
)
def test_bad_arguments_of_a_student_are_named(tiny_suite, settings, names):
    with pytest.raises(ConfigurationError, match=names):
        tiny_suite().student(**{"method": "FAQD", **settings})


def test_students_take_what_is_left_out_from_the_profile(tiny_suite):
    suite = tiny_suite(losses={"affinity_weight": 10.0, "k": 3, "label_weight": 0.7})
    student = suite.student("FFAQD", labels=True, weight_bits=1)
    loss = student.objective
    assert (loss.logit_loss, loss.affinity, loss.affinity_weight, loss.k) == ("mse", "ffa", 10.0, 3)
    assert loss.label_weight == 0.7
    assert suite.student("KD", regime="fine-tuning").objective.logit_loss == "kl"
    assert suite.student("KD").objective.affinity_weight == 0
    assert suite.student("KD").label_free
    assert suite.student("labels", weight_bits=1).teacher is None
    changed = suite.student("FAQD", logit_loss="kl", affinity_weight=5.0, seed=2)
    assert (changed.objective.logit_loss, changed.objective.affinity_weight, changed.seed) == ("kl", 5.0, 2)


def test_smoke_on_digits_end_to_end(tmp_path):
    suite = Suite.open("smoke", "digits", results=tmp_path)
    assert not suite.profile.shows_results
    (record,) = suite.run([suite.student("FAQD", weight_bits=1, activation_bits=4)])
    assert record.test_images == 100
    assert record.configuration.data.fingerprint == suite.data.fingerprint
    assert torch.isfinite(suite.model(record.configuration)(suite.normalizer(suite.data.test.pixels[:4]))).all()


def test_profile_of_smoke_is_small():
    profile = Profile.load("smoke")
    assert max(s.epochs for s in (profile.teacher_schedule, profile.student_schedule)) <= 2


def test_a_suite_is_sent_without_its_images_and_loads_them_again(tmp_path):
    suite = Suite.open("smoke", "digits", results=tmp_path)
    sent = pickle.dumps(suite)
    assert len(sent) < suite.data.train.pixels.numel() / 100
    there = pickle.loads(sent)  # noqa: S301 (our own bytes)
    assert there == suite
    assert there.data.fingerprint == suite.data.fingerprint


def test_more_images_than_there_are_is_an_error(tiny_suite):
    suite = tiny_suite()
    assert suite.student("KD", weight_bits=1, images=suite.state.training_count).data.train_images is None
    with pytest.raises(ConfigurationError, match=r"images = 1000 is more than the 48 training images"):
        suite.student("KD", weight_bits=1, images=1000)


def test_images_held_out_must_leave_some(tiny_suite, tiny_data):
    profile = tiny_suite().profile.model_copy(update={"held_out_images": 40, "validation_images": 8})
    with pytest.raises(
        ConfigurationError, match=r"held_out_images = 40 and validation_images = 8 leave no training image"
    ):
        SuiteState.describe(profile, "tiny", "", tiny_data, "float32")
