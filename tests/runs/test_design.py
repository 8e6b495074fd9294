"""Studies: designs that are checked, the runs they ask for, and what trains them."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_data, make_tiny_suite

from faqd_lib.cli.study import hours_left, run_study, seed_runs, wanted
from faqd_lib.config import ConfigurationError, ImageSource, OptimizationConfig
from faqd_lib.data import datasets
from faqd_lib.data.batches import Batch
from faqd_lib.reporting import study_claims
from faqd_lib.runs.configurations import TEACHER_SEEDS
from faqd_lib.runs.profile import Profile, SuiteState
from faqd_lib.runs.store import ResultsError
from faqd_lib.runs.suite import Suite, _precision
from faqd_lib.training.learner import Learner
from faqd_lib.training.loop import OutOfTimeError, TeacherPass
from faqd_lib.training.loss_log import NonFiniteLossError

DESIGN = {
    "looks": [5],
    "arms": {
        "kd": {"method": "KD"},
        "fa": {"method": "FAQD"},
        "labels": {"method": "labels", "labels": True},
        "long": {"method": "labels", "labels": True, "epochs": 3},
        "tuned": {"method": "KD", "losses": {"logit_weight": 3.0}, "learning_rate": 0.01},
    },
    "cells": {
        "main": {"arms": ["kd", "fa", "labels"], "weight_bits": [1]},
        "long": {"arms": ["long"], "weight_bits": [1], "seeds": 1},
        "short": {"arms": ["kd", "tuned"], "weight_bits": [1], "updates": 4, "images": 32},
    },
    "claims": {
        "helps": {"statement": "It helps", "contrast": {"fa": 1.0, "kd": -1.0}, "cells": "main"},
        "budget": {
            "statement": "It beats labels",
            "contrast": {"fa": 1.0, "long": -1.0},
            "cells": "main",
            "reference": "long",
        },
    },
}


def changed(**changes) -> dict:
    """The design with some of its tables changed, entry by entry; an entry that is None goes."""
    design = json.loads(json.dumps(DESIGN))
    for name, value in changes.items():
        if isinstance(value, dict):
            design[name] |= value
            design[name] = {key: entry for key, entry in design[name].items() if entry is not None}
        else:
            design[name] = value
    return design


@pytest.fixture
def study_suite(tiny_suite):
    def make(name: str = "study", **profile):
        return tiny_suite(name, **{"teacher_per_seed": True, "study": changed(), **profile})

    return make


# ---- the design


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"looks": [8, 5]}, "must rise"),
        ({"looks": [3]}, "at least 5 seeds"),
        ({"cells": {"main": {"arms": ["kd", "fq"], "weight_bits": [1]}}}, "cells.main has the arm 'fq'"),
        ({"claims": {"x": {"statement": "", "contrast": {"fa": 1.0, "kd": -0.5}, "cells": "main"}}}, "sum to 0"),
        ({"claims": {"x": {"statement": "", "contrast": {"fa": 1.0, "kd": -1.0}, "cells": "man"}}}, "cells 'man'"),
        ({"claims": {"x": {"statement": "", "contrast": {"fa": 1.0, "long": -1.0}, "cells": "main"}}}, "'long' is not"),
        ({"cells": {"long": {"arms": ["long"], "weight_bits": [2]}}}, "different bit-widths"),
        (
            {
                "claims": {
                    "x": {
                        "statement": "",
                        "contrast": {"fa": 1.0, "kd": -1.0},
                        "cells": "main",
                        "endpoint": "affinity",
                        "margin": 0.5,
                    }
                }
            },
            "margin and assay are for accuracy",
        ),
        (
            {
                "claims": {
                    "x": {
                        "statement": "",
                        "contrast": {"fa": 1.0, "labels": -1.0},
                        "cells": "main",
                        "endpoint": "affinity",
                    }
                }
            },
            "the arm 'labels' has no teacher",
        ),
        ({"arms": {"x": {"method": "KD", "stages": [1]}}}, "the method KD compares no maps"),
        ({"arms": {"x": {"method": "KD", "adapters": True}}}, "adapters = True: the method KD compares no maps"),
        ({"cells": {"x": {"arms": ["kd"], "weight_bits": [1], "source": "noise"}}}, "set images to the number"),
        (
            {"cells": {"x": {"arms": ["labels"], "weight_bits": [1], "source": "noise", "images": 32}}},
            "no labels for the arm 'labels'",
        ),
        ({"arms": {"x": {"method": "FAQD", "stages": [2, 1]}}}, "must rise"),
        ({"arms": {"x": {"method": "FA", "logit_loss": "kl"}}}, "the method FA compares no logits"),
        ({"claims": {"x": {"statement": "", "contrast": {}, "cells": "main"}}}, "compares nothing"),
        (
            {"claims": {"x": {"statement": "", "contrast": {"kd": float("nan"), "fa": 0.0}, "cells": "main"}}},
            "finite number",
        ),
        ({"arms": {"x": {"method": "KD", "step_gradient": "coarse"}}}, "needs activation_bits below 32"),
    ],
)
def test_a_design_that_contradicts_itself_is_refused(tiny_suite, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        tiny_suite(study=changed(**changes))


def test_shipped_studies_are_valid_and_share_no_seed_with_the_pilots():
    names = ("claims", "claims-2-bits", "tuning", "short", "rivals", "rivals-tuning", "losses", "where", "segmentation")
    for name in names:
        study = Profile.load(name).study
        assert 1 not in study.seeds
        assert not study.claims or study.looks == [5, 8]
    one, two = Profile.load("claims"), Profile.load("claims-2-bits")
    assert {bits for cells in two.study.cells.values() for bits in cells.weight_bits} == {2}
    for name, cells in one.study.cells.items():
        assert two.study.cells[name].model_copy(update={"weight_bits": [1]}) == cells


def test_designs_keep_their_digests():
    """Of the designs whose runs have begun, or whose digest was shown."""
    found = {name: Profile.load(name).design_digest for name in ("claims", "tuning", "losses")}
    assert found == {"claims": "3d86b974f38d", "tuning": "c2e4cf4140a2", "losses": "bccc9800a4d3"}


def test_tuning_chooses_under_the_conditions_of_the_claims():
    tuning, claims = Profile.load("tuning"), Profile.load("claims")
    for name in ("teachers", "student", "teacher_per_seed", "held_out_images", "precision", "losses"):
        assert getattr(tuning, name) == getattr(claims, name), name
    for name in ("teacher_schedule", "student_schedule", "fine_tuning_schedule"):
        assert getattr(tuning, name) == getattr(claims, name), name
    assert tuning.validation_images > 0


def test_teachers_of_short_can_be_copied_to_where():
    """The conditions of a teacher, and of the two arms that both studies have, are the same."""
    short, where = Profile.load("short"), Profile.load("where")
    for name in Profile.model_fields:
        assert name in ("name", "study") or getattr(short, name) == getattr(where, name), name
    assert where.study.cells["updates-400"] == short.study.cells["updates-400"].model_copy(
        update={"arms": ["kd", "fa"]}
    )
    assert all(where.study.arms[arm] == short.study.arms[arm] for arm in ("kd", "fa"))
    assert where.study.sources == ["tiny-imagenet"]


def test_a_teacher_for_each_seed_needs_a_study(tiny_suite):
    with pytest.raises(ConfigurationError, match="teacher_per_seed = true is for a study"):
        tiny_suite(teacher_per_seed=True)


def test_the_digest_is_of_all_that_changes_a_verdict():
    profile = Profile.load("claims")
    assert profile.model_copy(update={"cohort": 2, "evaluate_every": 4}).design_digest == profile.design_digest
    claims = {name: claim.model_copy(update={"margin": 1.0}) for name, claim in profile.study.claims.items()}
    for other in (
        {"study": profile.study.model_copy(update={"claims": claims})},
        {"study": profile.study.model_copy(update={"looks": [6, 8]})},
        {"held_out_images": 5000},
    ):
        assert profile.model_copy(update=other).design_digest != profile.design_digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base = 5", "base = 5 must be a profile's name"), ('base = "mine.toml"', "leads back to this file"),
        ('base = "other.toml"', "leads back"), ("\xff", "not valid TOML"),
    ],
)  # fmt: skip
def test_a_base_that_is_none_is_named(tmp_path, text, message):
    (tmp_path / "mine.toml").write_text(text, "latin-1")
    (tmp_path / "other.toml").write_text('base = "mine.toml"')
    with pytest.raises(ConfigurationError, match=message):
        Profile.load(tmp_path / "mine.toml")


def test_a_base_is_found_beside_its_file(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "base.toml").write_text('base = "smoke"\nseeds = 3')
    (tmp_path / "mine.toml").write_text('base = "below/base.toml"')
    monkeypatch.chdir("/")
    assert Profile.load(tmp_path / "mine.toml").seeds == 3


def test_affinity_of_networks_with_other_stages_is_no_endpoint(study_suite):
    claim = {"statement": "Nearer", "contrast": {"kd": 1.0, "fa": -1.0}, "cells": "main", "endpoint": "affinity"}
    with pytest.raises(ConfigurationError, match="resnet8 and resnet18 have other numbers of stages"):
        study_suite(teachers=["resnet18"], study=changed(claims={"helps": claim}))


def test_what_is_wrong_with_a_design_is_said_before_training(study_suite, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load", lambda *arguments, **options: tiny_data)
    for arms, cells, message in (
        ({}, {"arms": ["kd"], "images": 4}, "arms.kd in cells.short: images = 4 is less than a batch of 16"),
        ({}, {"arms": ["long"], "updates": 4}, "arms.long in cells.short: epochs has no effect where updates are set"),
        ({"x": {"method": "KD", "k": 3}}, {"arms": ["x"]}, "arms.x in cells.short: k has no effect on the method KD"),
    ):
        profile = study_suite(study=changed(arms=arms, cells={"short": {"weight_bits": [1], **cells}})).profile
        with pytest.raises(ConfigurationError, match=message):
            Suite.open(profile, "digits", results=tmp_path)
    assert not list(tmp_path.rglob("suite.json"))  # the design can still be changed


def test_a_folder_of_an_earlier_version_may_have_settings_without_effect(study_suite):
    cells = {"arms": ["x", "labels"], "weight_bits": [1], "teacher": "resnet8"}
    suite = study_suite(
        study=changed(
            arms={"x": {"method": "KD", "k": 3}}, cells={"main": cells}, claims={"helps": None, "budget": None}
        )
    )
    first, second = suite.study_runs("main", 2).values()
    assert first == suite.student("KD", weight_bits=1, seed=2)
    assert second == suite.student("labels", labels=True, weight_bits=1, seed=2)


def test_a_profile_on_a_base_changes_only_what_it_names(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "claims"\ntest_images = 50\n[study.cells.updates-400]\nweight_bits = [2]\n', "utf-8")
    mine, base = Profile.load(path), Profile.load("claims")
    assert (mine.name, mine.test_images, mine.study.cells["updates-400"].weight_bits) == ("mine", 50, [2])
    assert mine.study.cells["updates-400"].arms == base.study.cells["updates-400"].arms
    assert mine.study.cells["main"] == base.study.cells["main"]
    assert mine.student_schedule == base.student_schedule


# ---- the runs


def test_every_seed_has_a_teacher_of_its_own_and_no_student_its_seed(study_suite):
    suite = study_suite()
    for seed in suite.profile.study.seeds:
        runs = seed_runs(suite, seed)
        assert {run.seed for run in runs} == {seed}
        assert {run.teacher.seed for run in runs if run.teacher} == {TEACHER_SEEDS + seed}
    assert suite.teacher().seed == 0


def test_cells_choose_images_updates_epochs_and_settings(study_suite):
    suite = study_suite()
    main, short = suite.study_runs("main", 3), suite.study_runs("short", 3)
    assert [run.method for run in main.values()] == ["KD", "FAQD", "labels"]
    assert suite.study_runs("long", 2)["long", 1].optimization.epochs == 3
    assert suite.study_runs("long", 3) == {}  # the design wants one seed of it
    kd, tuned = short["kd", 1], short["tuned", 1]
    assert (kd.data.train_images, kd.teacher.data.train_images) == (32, None)
    # 4 updates of 2 an epoch; half an epoch of 2 was warm-up before, so a quarter of the updates is.
    assert (kd.optimization.epochs, kd.optimization.updates, kd.optimization.warmup_epochs) == (2, 4, 0.5)
    assert (tuned.objective.logit_weight, tuned.optimization.learning_rate) == (3.0, 0.01)
    assert (kd.objective.logit_weight, kd.optimization.learning_rate) == (1.0, 0.05)


def test_updates_end_a_run_within_an_epoch(tiny_suite, monkeypatch):
    """3 steps an epoch: 5 updates are all of the first epoch and two steps of the second."""
    suite = tiny_suite()
    config = suite.student("KD", weight_bits=1, updates=5)
    assert config.optimization.epochs == 2
    seen, advance = [], Learner.advance

    def watch(learner, epoch, *arguments):
        seen.append((learner.config.method, epoch))
        return advance(learner, epoch, *arguments)

    monkeypatch.setattr(Learner, "advance", watch)
    (record,) = suite.run([config])
    assert [epoch for method, epoch in seen if method == "KD"] == [0, 0, 0, 1, 1]
    assert [row["epoch"] for row in record.history] == [1, 2]


def test_as_many_updates_as_the_epochs_have_give_the_same_weights(tiny_suite):
    suite = tiny_suite()
    whole, counted = suite.student("KD", weight_bits=1), suite.student("KD", weight_bits=1, updates=6)
    assert whole.digest != counted.digest
    first, second = suite.run([whole, counted])
    assert first.weights_digest == second.weights_digest
    assert first.history == second.history


def test_updates_outside_the_last_epoch_are_refused():
    optimization = OptimizationConfig(epochs=2, batch_size=16, updates=3)
    with pytest.raises(ConfigurationError, match="set epochs=1"):
        optimization.steps(3)
    assert OptimizationConfig(epochs=1, batch_size=16, updates=3).steps(3) == 3


def test_a_smaller_subset_is_part_of_the_images(study_suite):
    suite = study_suite()
    run = suite.study_runs("short", 2)["kd", 1]
    batches = suite.batches([run])
    assert len(batches) == 2
    wanted = {image.numpy().tobytes() for image in suite.splits.training.pixels}
    taken = {image.permute(2, 0, 1).contiguous().numpy().tobytes() for image in batches._pixels.cpu()}
    assert len(taken) == 32
    assert taken <= wanted


def test_held_out_images_are_tested_on_and_never_trained_on(tiny_suite, tiny_data):
    suite = tiny_suite(held_out_images=12)
    training, validation, test = suite.splits
    assert (len(training), validation, len(test)) == (36, None, 36)
    assert torch.equal(test.pixels[:24], tiny_data.test.pixels)
    trained = {image.numpy().tobytes() for image in training.pixels}
    held_out = {image.numpy().tobytes() for image in test.pixels[24:]}
    assert not trained & held_out
    assert test.labels[24:].bincount().tolist() == [4, 4, 4]  # class-balanced


def test_evaluated_less_often_is_the_same_run_with_fewer_tests(tiny_suite):
    each, rarely = tiny_suite("each"), tiny_suite("rarely", evaluate_every=2)
    config = each.student("FAQD", weight_bits=1, schedule={"epochs": 3})
    (first,), (second,) = each.run([config]), rarely.run([config])
    assert first.weights_digest == second.weights_digest
    assert ["test_accuracy" in row for row in first.history] == [True, True, True]
    assert ["test_accuracy" in row for row in second.history] == [False, True, True]  # the last one always
    assert first.history[-1] == second.history[-1]
    assert second.best_accuracy == max(row["test_accuracy"] for row in second.history[1:])


def test_a_run_on_fewer_images_is_evaluated_after_as_many_updates(tiny_suite):
    """Evaluations would outweigh the training otherwise. Epochs of 1 and of 2 steps, where all images give 3."""
    suite = tiny_suite("fewer")
    assert len(suite.splits.training) // 16 == 3

    def tested(**settings) -> list[int]:
        (record,) = suite.run([suite.student("KD", weight_bits=1, **settings)])
        return [epoch for epoch, row in enumerate(record.history, start=1) if "test_accuracy" in row]

    assert tested(images=16, schedule={"epochs": 7}) == [3, 6, 7]
    assert tested(images=32, schedule={"epochs": 3}) == [2, 3]


def test_labelled_and_label_free_students_side_by_side_have_the_bits_of_each_alone(tiny_suite):
    together, alone = tiny_suite("together"), tiny_suite("alone", cohort=1)
    configs = [
        together.student("labels", weight_bits=1),
        together.student("KD", weight_bits=1),
        together.student("FAQD", labels=True, weight_bits=1),
    ]
    kd = together.student("KD", labels=True, weight_bits=1)
    first, second = together.run([*configs, kd]), alone.run([*configs, kd])
    assert [record.weights_digest for record in first] == [record.weights_digest for record in second]
    assert [record.history for record in first] == [record.history for record in second]
    assert first[-1].cost["cohort"] == 3  # KD, FAQD and KD; the run without a teacher was trained before


def test_the_log_probability_of_the_true_class_is_kept(tiny_suite):
    suite = tiny_suite()
    (record,) = suite.run([suite.student("KD", weight_bits=1)])
    kept = suite.store.predictions(record)
    assert kept["log_probability"].dtype == torch.float16
    found = -float(kept["log_probability"].double().mean())
    assert found == pytest.approx(record.history[-1]["test_cross_entropy"], rel=2e-3)


def test_test_affinity_is_that_of_the_maps(tiny_suite):
    """Zero between a network and itself; lower for the student that learned from maps."""
    suite = tiny_suite()
    teacher = suite.teacher()
    (record, of_teacher) = suite.run([suite.student("FAQD", weight_bits=1), teacher])
    network = suite.model(teacher)
    assert suite.test_affinity(network, network) == pytest.approx(0, abs=1e-9)
    student = suite.model(record.configuration)
    assert record.test_affinity == pytest.approx(suite.test_affinity(student, network))
    assert record.test_affinity > 1e-4
    assert of_teacher.test_affinity is None


def test_arms_choose_stages_and_quantizers(study_suite):
    arms = {
        "deep": {"method": "FAQD", "stages": [2, 3]},
        "alone": {"method": "FA"},
        "frozen": {"method": "FAQD", "activation_bits": 4, "step_gradient": "frozen"},
    }
    cells = {"parts": {"arms": list(arms), "weight_bits": [1]}}
    suite = study_suite(study={"looks": [5], "arms": arms, "cells": cells})
    runs = {arm: run for (arm, _), run in suite.study_runs("parts", 2).items()}
    assert runs["deep"].objective.stages == (2, 3)
    assert (runs["alone"].method, runs["alone"].objective.logit_loss) == ("FA", "none")
    assert (runs["frozen"].bits, runs["frozen"].quantization.step_gradient) == ("1W4A", "frozen")
    assert len({run.run_id for run in runs.values()}) == 3


def test_cells_choose_networks_and_pictures(study_suite):
    arms = {
        "kd": {"method": "KD"},
        "fa": {"method": "FAQD"},
        "sums": {"method": "FAQD", "taps": "before ReLU"},
        "adapted": {"method": "FAQD", "adapters": True},
    }
    common = {"arms": ["kd", "fa"], "weight_bits": [1], "updates": 2}
    cells = {
        "noise": common | {"source": "noise", "images": 32},
        "mixer": common | {"student": "mixer"},
        "layers": common | {"arms": ["sums", "adapted"]},
    }
    suite = study_suite(study={"looks": [5], "arms": arms, "cells": cells})
    runs = {(name, arm): run for name in cells for (arm, _), run in suite.study_runs(name, 2).items()}
    assert len({run.digest for run in runs.values()}) == 6
    noise, mixer = runs["noise", "fa"], runs["mixer", "fa"]
    assert (noise.images.name, noise.training_images, noise.data.train_images) == ("noise", 32, None)
    assert noise.teacher == mixer.teacher == suite.study_runs("layers", 2)["sums", 1].teacher
    assert (mixer.model, mixer.images) == ("mixer", None)
    assert "-on-noise-" in noise.run_id
    assert (runs["layers", "sums"].objective.taps, runs["layers", "adapted"].objective.adapters) == (
        "before ReLU", True,
    )  # fmt: skip
    records = suite.run(runs.values())
    assert all(record.test_affinity > 0 for record in records)
    weights = {record.weights_digest for record in records}
    assert len(weights) == 6  # every setting has changed what was learned
    batch = next(suite.batches([noise]).epoch(0))
    assert batch.labels is None


def test_a_source_that_the_folder_does_not_know_is_named(tiny_suite, monkeypatch):
    suite = tiny_suite()
    with pytest.raises(ConfigurationError, match="source = 'pets' is not known here: choose first-half"):
        suite.student("KD", source="pets", images=4)
    with pytest.raises(ConfigurationError, match="set images to the number of images"):
        suite.student("KD", source="noise")
    with pytest.raises(ConfigurationError, match="images from 'noise' have no labels"):
        suite.student("labels", source="noise", images=16)
    other = replace(make_tiny_data(), name="pets", fingerprint="2" * 64)
    monkeypatch.setattr(datasets, "load", lambda *arguments, **options: other)
    knowing = suite.with_source("pets")
    config = knowing.student("KD", source="pets", images=32, updates=2, weight_bits=1)
    assert config.images == ImageSource(name="pets", fingerprint="2" * 64, train_images=32)
    assert Suite.read(suite.folder).state.sources == {"pets": "2" * 64}
    assert len(knowing.batches([config])) == 2
    other = replace(other, fingerprint="3" * 64)
    with pytest.raises(ResultsError, match="the images of pets are not those"):
        knowing.batches([config])
    with pytest.raises(ResultsError, match="has runs on other images of pets"):
        knowing.with_source("pets")


def test_only_the_chosen_stages_are_compared(tiny_suite):
    """The affinity term of one stage, and of all three, at the same weights and batch."""
    suite = tiny_suite()
    suite.run([suite.teacher()])
    wanted = [suite.student("FAQD", weight_bits=1, stages=stages) for stages in ((1,), (2,), (3,), ())]
    batches, teacher = suite.batches(wanted), suite.model(suite.teacher())
    batch = next(iter(batches.epoch(0)))
    terms = []
    for run in wanted:
        learner = suite.learner(run, batches)
        output = TeacherPass(teacher, teacher.feature_names, "float32")(batch.images)
        terms.append(float(learner.step(Batch(batch.images, None), output)["affinity"]))
    assert min(terms) > 0
    assert terms[3] == pytest.approx(sum(terms[:3]))


def test_a_stage_that_the_network_lacks_is_named(tiny_suite):
    suite = tiny_suite()
    with pytest.raises(ConfigurationError, match="has the stages 1 to 3, there is no stage 4"):
        suite.student("FAQD", weight_bits=1, stages=(4,))


@pytest.mark.parametrize(("student", "teacher"), [("resnet8", "resnet18"), ("resnet18", "resnet8")])
def test_a_teacher_with_other_stages_is_refused_before_training(tiny_suite, student, teacher):
    suite = tiny_suite(student=student, teachers=[teacher])
    with pytest.raises(ConfigurationError, match=r"not every map has a partner"):
        suite.student("FAQD", weight_bits=1)
    (record,) = suite.run([suite.student("KD", weight_bits=1)])
    assert record.test_affinity is None


def test_stages_without_a_last_relu_are_named(tiny_suite):
    suite = tiny_suite(teachers=["resnet8", "mixer"])
    squat = {"activation_bits": 4}
    for method, settings, setting in (
        ("FAQD", {"taps": "before ReLU"}, "taps = 'before ReLU'"), ("KD+SQuaT", squat, "method = 'KD\\+SQuaT'"),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError, match=f"{setting}: no ReLU ends the stages of mixer: .* resnet8"):
            suite.student(method, weight_bits=1, model="mixer", **settings)
    with pytest.raises(ConfigurationError, match="no ReLU ends the stages of mixer"):
        suite.student("FAQD", weight_bits=1, teacher="mixer", taps="before ReLU")
    assert suite.student("KD+SQuaT", weight_bits=1, teacher="mixer", **squat).teacher.model == "mixer"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": (2, 1)}, "must rise"),
        ({"stages": (1, 1)}, "must rise"),
        ({"stages": (1,), "losses": {"adapters": True}}, "adapters stand at all stages"),
    ],
)
def test_stages_that_make_no_sense_are_refused(tiny_suite, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        tiny_suite().student("FAQD", weight_bits=1, **settings)


@pytest.mark.parametrize("images", [0, -3, 2.5, True])
@pytest.mark.parametrize("source", [None, "noise"])
def test_a_number_of_images_that_is_none_is_refused(tiny_suite, images, source):
    with pytest.raises(ConfigurationError, match="images must be a whole number of at least 1"):
        tiny_suite().student("KD", images=images, source=source)


@pytest.mark.parametrize("settings", [{}, {"updates": 5}])
def test_fewer_images_than_a_batch_are_refused(tiny_suite, settings):
    with pytest.raises(ConfigurationError, match="images = 10 is less than a batch of 16"):
        tiny_suite().student("KD", images=10, **settings)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("labels", {"logit_loss": "mse"}), ("labels", {"losses": {"logit_weight": 3.0}}),
        ("labels", {"taps": "before ReLU"}), ("KD", {"losses": {"k": 3}}),
        ("labels", {"teacher": "resnet8"}), ("FA", {"logit_loss": "kl"}),
        ("FA", {"losses": {"temperature": 2.0}}), ("KD", {"affinity_weight": 7.0}),
        ("KD", {"k": 3}), ("FAQD", {"k": 3}), ("KD", {"losses": {"label_weight": 1.0}}),
    ],
)  # fmt: skip
def test_a_setting_that_the_method_does_not_read_is_refused(tiny_suite, method, settings):
    (name,) = settings.get("losses", settings)
    with pytest.raises(ConfigurationError, match=f"{name} has no effect on the method {method}"):
        tiny_suite().student(method, weight_bits=1, **settings)


def test_updates_beyond_the_last_epoch_are_refused_before_training(tiny_suite, tiny_data):
    schedule = {"epochs": 1, "batch_size": 16, "updates": 500, "warmup_epochs": 0.0}
    profile = tiny_suite(student_schedule=schedule).profile
    with pytest.raises(ConfigurationError, match="updates=500 does not end within epoch 1"):
        SuiteState.describe(profile, "tiny", "", tiny_data, "float32")


def test_a_quantized_network_is_not_quantized_again_after_training(tiny_suite):
    suite = tiny_suite()
    with pytest.raises(ConfigurationError, match="a float run, got one of 1W32A"):
        suite.post_training(2, student=suite.student("KD", weight_bits=1))


def test_stages_without_an_affinity_loss_are_refused(tiny_suite):
    with pytest.raises(ConfigurationError, match="stages has no effect on the method KD"):
        tiny_suite().student("KD", weight_bits=1, stages=(1,))
    with pytest.raises(ConfigurationError, match="adapters, stages and taps need an affinity loss"):
        tiny_suite().student("KD", weight_bits=1, taps="before ReLU")


# ---- running


@pytest.mark.parametrize(("still_open", "trained"), [({"main"}, [7]), (set(), [])])
def test_the_second_look_trains_only_what_the_first_left_open(study_suite, monkeypatch, still_open, trained):
    cells = {
        name: {"arms": ["kd"], "weight_bits": [1], "updates": updates} for name, updates in (("main", 1), ("b", 2))
    }
    suite = study_suite(study={"looks": [5, 6], "arms": DESIGN["arms"], "cells": cells})
    monkeypatch.setattr(study_claims, "open_cells", lambda _: still_open)
    assert run_study(suite)

    def done(name: str) -> list[int]:
        return [
            seed for seed in suite.profile.study.seeds if suite.store.record(*suite.study_runs(name, seed).values())
        ]

    assert done("main") == [2, 3, 4, 5, 6, *trained]
    assert done("b") == [2, 3, 4, 5, 6]
    assert hours_left(suite) == 0


def test_the_second_look_waits_for_the_first(study_suite, monkeypatch):
    cells = {"main": {"arms": ["kd"], "weight_bits": [1], "updates": 1}}
    suite = study_suite(study={"looks": [5, 6], "arms": DESIGN["arms"], "cells": cells})
    monkeypatch.setattr(study_claims, "open_cells", lambda _: {"main"})
    with suite.store.group_lock("seed4").acquire():  # another process has this seed
        assert run_study(suite)
    assert wanted(suite) == [("main", 4)]
    assert run_study(suite)
    assert wanted(suite) == []


def test_a_study_trains_cells_by_cells_and_each_seed_by_seed(study_suite, capsys):
    suite = study_suite(study=changed(looks=[2], claims={"helps": None, "budget": None}))
    assert run_study(suite)
    wanted = [run for seed in (2, 3) for run in seed_runs(suite, seed)]
    assert all(suite.store.record(run) for run in wanted)
    said = capsys.readouterr().out
    order = ["main, seed 2", "main, seed 3", "long, seed 2", "short, seed 2", "short, seed 3"]
    places = [said.index(text) for text in order]
    assert places == sorted(places)
    before = {run.run_id: suite.store.record(run).finished for run in wanted}
    assert run_study(study_suite(study=changed(looks=[2], claims={"helps": None, "budget": None})))
    assert before == {run.run_id: suite.store.record(run).finished for run in wanted}


def test_a_seed_that_another_process_trains_is_left_to_it(study_suite, capsys):
    suite = study_suite(study=changed(looks=[2], claims={"helps": None, "budget": None}))
    with suite.store.group_lock("seed2").acquire():
        assert run_study(suite)
    assert (
        capsys.readouterr().out.count("seed 2: another process trains it") == 2
    )  # once a pass, and the second is idle
    assert not any(suite.store.record(run) for run in seed_runs(suite, 2))
    assert all(suite.store.record(run) for run in seed_runs(suite, 3))


def test_a_run_that_diverges_stops_no_other_group_of_cells(study_suite, capsys):
    arms = {"wild": {"method": "KD", "learning_rate": 1e30}, "kd": {"method": "KD"}}
    cells = {name: {"arms": [arm], "weight_bits": [1]} for name, arm in (("first", "wild"), ("second", "kd"))}
    suite = study_suite(study={"looks": [2], "arms": arms, "cells": cells})
    with pytest.raises(NonFiniteLossError) as caught:
        run_study(suite)
    assert len(caught.value.__notes__) == 1  # the other seed
    assert wanted(suite) == [("first", 2), ("first", 3)]
    assert "first, seed 2: " in capsys.readouterr().out


def test_the_lock_of_a_seed_is_free_after_an_error(study_suite, monkeypatch):
    suite = study_suite()
    monkeypatch.setattr(Suite, "run", lambda *_: (_ for _ in ()).throw(ValueError("no")))
    with pytest.raises(ValueError, match="no") as kept:  # its traceback keeps the frame, and what is held there
        run_study(suite)
    suite.store.group_lock("seed2").acquire(timeout=0).lock.release()
    assert kept.tb is not None


def test_waiting_for_another_process_ends_in_time(tiny_suite):
    suite = tiny_suite()
    config = suite.teacher()
    with suite.store.lock(config), pytest.raises(OutOfTimeError, match="another process"):
        suite.run([config], deadline=time.monotonic() + 0.2)


def test_time_that_is_up_leaves_a_checkpoint_to_go_on_from_with_the_same_bits(tiny_suite, monkeypatch):
    whole, cut = tiny_suite("whole"), tiny_suite("cut")
    config = whole.student("FFAQD", weight_bits=1, k=2)
    (expected,) = whole.run([config])
    cut.run([config.teacher])
    asked = []

    def now() -> float:  # a clock that stands still, but for the fourth question
        asked.append(None)
        return 10.0 if len(asked) == 4 else 0.0

    monkeypatch.setattr("faqd_lib.runs.local.time", SimpleNamespace(monotonic=now))
    with pytest.raises(OutOfTimeError, match="go on"):
        cut.run([config], deadline=5.0)
    monkeypatch.undo()
    assert cut.store.record(config) is None
    (record,) = cut.run([config])
    assert len(asked) == 4
    assert (record.weights_digest, record.history) == (expected.weights_digest, expected.history)


def test_no_time_at_all_trains_one_batch_and_says_so(study_suite, capsys):
    suite = study_suite()
    assert not run_study(suite, hours=0.0)
    assert "time is up" in capsys.readouterr().out
    assert suite.store.records() == []


# ---- precision by device


def test_precision_by_device_is_float32_on_a_cpu(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr("faqd_lib.runs.suite.precision_that_pays", lambda device: "bf16")
    profile = make_tiny_suite(tmp_path, tiny_data).profile
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    wanted = {"auto": ("bf16", "bf16"), "by device": ("float32", "bf16"), "float32": ("float32", "float32")}
    for asked, expected in wanted.items():
        chosen = profile.model_copy(update={"precision": asked})
        assert (_precision(chosen, cpu), _precision(chosen, cuda)) == expected
