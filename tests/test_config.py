"""Configurations: unknown, mistyped and conflicting settings are refused; each has one digest."""

import json
import re
from typing import get_args

import pydantic
import pytest

from faqd_lib.config import (
    AFFINITY_RECIPE,
    ActivationBits,
    ConfigurationError,
    DataConfig,
    ImageSource,
    ObjectiveConfig,
    OptimizationConfig,
    QuantizationConfig,
    RunConfig,
    Schedule,
    WeightBits,
)
from faqd_lib.quantization.weights import ACTIVATION_BITS, FLOAT_BITS, WEIGHT_BITS
from faqd_lib.runs.profile import PROFILES, Grid, Losses, Profile
from faqd_lib.utils.files import project_root


@pytest.fixture
def student(run_config) -> RunConfig:
    """A run with a teacher, initial weights and quantizers."""
    return run_config.model_copy(
        update={
            "objective": ObjectiveConfig(logit_loss="mse", affinity="ffa", affinity_weight=30.0),
            "quantization": QuantizationConfig(weight_bits=1, activation_bits=4),
            "teacher": run_config.model_copy(update={"model": "resnet20"}),
            "initial": run_config,
        }
    )


# ---- bad values


@pytest.mark.parametrize(
    ("model", "values", "names"),
    [
        (OptimizationConfig, {"epochs": 1, "learning_rat": 0.1}, ["unknown", "'learning_rat'", "learning_rate"]),
        (OptimizationConfig, {"epochs": "1"}, ["epochs = '1'", "integer"]),
        (OptimizationConfig, {"epochs": 1.5}, ["epochs = 1.5"]),
        (OptimizationConfig, {"epochs": True}, ["epochs = True"]),
        (Schedule, {"epochs": 0}, ["epochs = 0", "1"]),
        (OptimizationConfig, {}, ["epochs is missing"]),
        (OptimizationConfig, {"epochs": 1, "batch_size": 1}, ["batch_size = 1", "2"]),
        (OptimizationConfig, {"epochs": 1, "batch_size": 0}, ["batch_size = 0"]),
        (OptimizationConfig, {"epochs": 1, "momentum": 1.0}, ["momentum = 1.0"]),
        (OptimizationConfig, {"epochs": 1, "learning_rate": 0.0}, ["learning_rate = 0.0"]),
        (OptimizationConfig, {"epochs": 1, "learning_rate": float("nan")}, ["learning_rate = nan"]),
        (OptimizationConfig, {"epochs": 1, "learning_rate": float("inf")}, ["learning_rate = inf"]),
        (OptimizationConfig, {"epochs": 1, "weight_decay": -1e-4}, ["weight_decay = -0.0001"]),
        (OptimizationConfig, {"epochs": 1, "precision": "fp16"}, ["precision = 'fp16'", "bf16"]),
        (OptimizationConfig, {"epochs": 1, "warmup_epochs": 2.0}, ["warmup_epochs=2.0", "epochs=1"]),
        (OptimizationConfig, {"epochs": 1, "batch_norm_batches": 2}, ["batch_norm_batches is for epochs = 0"]),
        (QuantizationConfig, {"weight_bits": 3.5}, ["weight_bits = 3.5", "1, 2, 3, 4, 5, 6, 7, 8 or 32"]),
        (QuantizationConfig, {"weight_bits": "1"}, ["weight_bits = '1'"]),
        (QuantizationConfig, {"activation_bits": 9}, ["activation_bits = 9", "8 or 32"]),
        (QuantizationConfig, {"weight_bits": 1, "blending": 1.0}, ["blending = 1.0"]),
        (QuantizationConfig, {"per_channel": True}, ["set weight_bits below 32"]),
        (QuantizationConfig, {"activation_bits": 4, "shortcuts": "float"}, ["set weight_bits below 32"]),
        (QuantizationConfig, {"weight_bits": 1, "step_gradient": "coarse"}, ["set activation_bits below 32"]),
        (QuantizationConfig, {"weight_bits": [1]}, ["weight_bits = [1]"]),
        (QuantizationConfig, {"weight_bits": 1, "step_gradient": "ste"}, ["step_gradient = 'ste'"]),
        (QuantizationConfig, {"first_layer": "both"}, ["first_layer = 'both'"]),
        (ObjectiveConfig, {}, ["no term"]),
        (ObjectiveConfig, {"logit_loss": "l1"}, ["logit_loss = 'l1'", "kl"]),
        (ObjectiveConfig, {"affinity": "ffa", "affinity_weight": 1.0, "k": 0}, ["k = 0"]),
        (ObjectiveConfig, {"affinity": "ffa", "affinity_weight": 1.0, "k": 1.5}, ["k = 1.5"]),
        (ObjectiveConfig, {"affinity": "fa"}, ["affinity_weight"]),
        (ObjectiveConfig, {"logit_loss": "mse", "affinity_weight": 1.0}, ["affinity"]),
        (ObjectiveConfig, {"logit_loss": "mse", "temperature": 0.0}, ["temperature = 0.0"]),
        (ObjectiveConfig, {"logit_loss": "mse", "label_weight": -1.0}, ["label_weight = -1.0"]),
        (ObjectiveConfig, {"logit_loss": "mse", "adapters": True}, ["adapters"]),
        (ObjectiveConfig, {"logit_loss": "mse", "taps": "before ReLU"}, ["taps need an affinity loss"]),
        (ObjectiveConfig, {"logit_loss": "mse", "adapters": 1}, ["adapters = 1"]),
        (DataConfig, {"name": "x", "fingerprint": "y", "train_images": 0}, ["train_images = 0"]),
    ],
)
def test_bad_settings_are_named(model, values, names):
    with pytest.raises(ConfigurationError) as raised:
        model.parse(values, "my file")
    assert str(raised.value).startswith("my file: ")
    for name in names:
        assert name in str(raised.value)


def test_each_bad_setting_has_a_line():
    with pytest.raises(ConfigurationError) as raised:
        OptimizationConfig.parse({"epochs": -1, "momentun": 1, "batch_size": "x"}, "here")
    assert len(str(raised.value).splitlines()) == 3


def test_runs_must_fit_together(run_config, student):
    parts = {name: getattr(student, name) for name in RunConfig.model_fields}
    elsewhere = run_config.model_copy(update={"data": DataConfig(name="tiny", fingerprint="1" * 64)})
    for change, names in (
        ({"teacher": None}, "teacher"),
        ({"objective": ObjectiveConfig(label_weight=1.0)}, "teacher"),
        ({"initial": student.teacher}, "resnet20 do not fit resnet8"),
        ({"teacher": elsewhere}, "same images"),
        ({"initial": elsewhere}, "same images"),
        (
            {
                "images": ImageSource(name="noise", train_images=4),
                "objective": ObjectiveConfig(logit_loss="mse", label_weight=0.3),
            },
            "images from 'noise' have no labels",
        ),
        ({"optimization": OptimizationConfig(epochs=0, warmup_epochs=0.0)}, "quantization after training"),
    ):
        with pytest.raises(ConfigurationError, match=names):
            RunConfig.parse({**parts, **change}, "here")
    RunConfig.parse(parts, "here")


def test_frozen(run_config):
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        run_config.seed = 3
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        run_config.optimization.epochs = 3


def test_stages_are_read_from_a_record_again():
    objective = ObjectiveConfig(logit_loss="mse", affinity="fa", affinity_weight=1.0, stages=(1, 3))
    assert ObjectiveConfig.model_validate_json(objective.model_dump_json()) == objective


# ---- digests

# Another valid value for every setting of a run.
OTHERS = {
    "data": {"name": "other", "fingerprint": "1" * 64, "train_images": 7, "test_images": 8, "validation_images": 9,
             "held_out_images": 3, "subset_seed": 1},
    "model": "resnet20",
    "images": ImageSource(name="noise", train_images=4),
    "optimization": {"epochs": 3, "batch_size": 8, "learning_rate": 0.3, "momentum": 0.5, "weight_decay": 0.0,
                     "warmup_epochs": 0.5, "clip_norm": 1.0, "precision": "bf16", "batch_norm_batches": 4,
                     "compiled": True, "updates": 5},
    "objective": {"logit_loss": "kl", "logit_weight": 2.0, "temperature": 1.0, "affinity": "fa",
                  "affinity_weight": 10.0, "k": 1, "distribution": "rademacher", "label_weight": 0.3, "adapters": True,
                  "stages": (1, 3), "taps": "before ReLU", "class_weights": "root median frequency",
                  "affinity_recipe": 99},
    "quantization": {"weight_bits": 2, "activation_bits": 32, "first_layer": "float", "last_layer": "quantize",
                     "shortcuts": "float", "per_channel": True, "step_gradient": "coarse", "blending": 0.1,
                     "quantizer_recipe": 99},
    "seed": 1,
    "teacher": {"seed": 5},
    "initial": {"seed": 5},
    "recipe": 99,
}  # fmt: skip
CHANGES = [
    (field, key, value)
    for field, other in OTHERS.items()
    for key, value in (other.items() if isinstance(other, dict) else [(None, other)])
]


def test_every_setting_is_in_the_list():
    assert set(OTHERS) == set(RunConfig.model_fields)
    for field in ("data", "optimization", "objective", "quantization"):
        assert set(OTHERS[field]) == set(RunConfig.model_fields[field].annotation.model_fields), field


@pytest.mark.parametrize(("field", "key", "value"), CHANGES)
def test_digest_and_folder_change_with_every_setting(student, field, key, value):
    if key is not None:
        part = getattr(student, field)
        assert getattr(part, key) != value
        value = part.model_copy(update={key: value})
    changed = student.model_copy(update={field: value})
    assert changed.digest != student.digest
    assert changed.run_id != student.run_id


def test_a_teachers_own_settings_change_the_students_digest(student):
    optimization = student.teacher.optimization.model_copy(update={"learning_rate": 0.01})
    teacher = student.teacher.model_copy(update={"optimization": optimization})
    assert student.model_copy(update={"teacher": teacher}).digest != student.digest


def test_a_run_with_another_affinity_recipe_is_another_run(student):
    assert student.objective.affinity != "none"
    old = student.model_dump_json().replace(f'"affinity_recipe":{AFFINITY_RECIPE}', '"affinity_recipe":1')
    with pytest.raises(pydantic.ValidationError, match="affinity_recipe 1 is not that of this version"):
        RunConfig.model_validate_json(old)
    older = student.model_dump_json().replace(f',"affinity_recipe":{AFFINITY_RECIPE}', "")
    assert older != student.model_dump_json()
    with pytest.raises(pydantic.ValidationError, match="affinity_recipe None"):
        RunConfig.model_validate_json(older)
    assert "affinity_recipe" not in student.teacher.model_dump_json()


def test_digest_survives_json(student):
    again = RunConfig.model_validate_json(student.model_dump_json())
    assert again == student
    assert hash(again) == hash(student)
    assert again.digest == student.digest
    # The order of keys and 1 instead of 1.0 do not change the digest.
    shuffled = dict(reversed(json.loads(student.model_dump_json()).items()))
    shuffled["optimization"]["clip_norm"] = 20
    assert RunConfig.parse(shuffled, "here").digest == student.digest


def test_stages_survive_json(student):
    objective = ObjectiveConfig(affinity="fa", affinity_weight=1.0, stages=(1, 3))
    staged = student.model_copy(update={"objective": objective})
    assert RunConfig.model_validate_json(staged.model_dump_json()) == staged
    with pytest.raises(pydantic.ValidationError, match="valid integer"):
        ObjectiveConfig(affinity="fa", affinity_weight=1.0, stages=("1",))


def test_readable_names(student, run_config):
    assert student.run_id.startswith("resnet8-1w4a-ffaqd-k6-mse-labelfree-from-resnet20-finetuned-seed0-")
    assert run_config.run_id.startswith("resnet8-32w32a-labels-seed0-")
    assert (student.bits, student.method, student.regime, student.label_free) == ("1W4A", "FFAQD", "fine-tuning", True)
    assert (run_config.method, run_config.regime, run_config.label_free) == ("labels", "end-to-end", False)


# ---- profiles


@pytest.mark.parametrize("name", PROFILES)
def test_shipped_profiles_load(name):
    profile = Profile.load(name)
    assert profile.name == name
    assert profile.shows_results == (name != "smoke")
    for dataset in ("cifar10", "cifar10-jpeg", "cifar100", "tiny-imagenet", "digits"):
        chosen = profile.for_dataset(dataset)
        assert chosen.name == name
        assert chosen.dataset_settings == {}


def test_every_dataset_setting_of_a_profile_is_valid():
    for name in PROFILES:
        for dataset, changes in Profile.load(name).dataset_settings.items():
            chosen = Profile.load(name).for_dataset(dataset)
            assert changes, dataset
            assert any(getattr(chosen, key) != getattr(Profile.load(name), key) for key in changes), (name, dataset)


def write_profile(path, text="", name="mine.toml", skip=""):
    schedule = "epochs = 1\n"
    file = path / name
    file.write_text(
        f'shows_results = false\nteachers = ["resnet8"]\nstudent = "resnet8"\n{text}\n'
        + "".join(
            f"[{part}]\n{schedule}"
            for part in ("teacher_schedule", "student_schedule", "fine_tuning_schedule")
            if part != skip
        )
    )
    return file


def test_the_first_teacher_teaches_in_every_table():
    values = Profile.load("cpu").model_dump()
    values["grid"]["weight_teachers"] = ["resnet56"]
    with pytest.raises(ConfigurationError, match="lacks 'resnet20', the first of the teachers"):
        Profile.parse(values, "mine")


def test_own_profile_from_a_file(tmp_path):
    profile = Profile.load(write_profile(tmp_path, "seeds = 3"))
    assert (profile.name, profile.seeds, profile.teacher_schedule.epochs) == ("mine", 3, 1)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("sedes = 3", ["unknown setting 'sedes'", "seeds"]),
        ("seeds = 0", ["seeds = 0"]),
        ("seeds = 1.5", ["seeds = 1.5"]),
        ('train_images = "many"', ["train_images = 'many'"]),
        ("[losses]\nk = 0", ["losses.k = 0"]),
        ("[losses]\nkk = 1", ["kk"]),
        ("[grid]\nweight_bits = [9]", ["grid.weight_bits", "9"]),
        ("[grid]\nfull_bits = [[1, 9]]", ["full_bits", "9"]),
        ("[grid]\nweight_teachers = ['resnet20']", ["weight_teachers has 'resnet20'", "['resnet8']"]),
        ("[grid]\naffinity_bits = []", ["grid.affinity_bits"]),
        ("[grid]\nweight_bits = [32]", ["grid.weight_bits = [32]", "below 32"]),
        ("[grid]\nfull_bits = [[1, 4], [4, 32]]", ["[4, 32]", "belong to grid.weight_bits"]),
        ("seeds = ", ["TOML"]),
    ],
)
def test_bad_profiles_are_named(tmp_path, text, names):
    file = write_profile(tmp_path, text)
    with pytest.raises(ConfigurationError) as raised:
        Profile.load(file)
    for name in [str(file), *names]:
        assert name in str(raised.value)


@pytest.mark.parametrize(("name", "near"), [("qick", "quick"), ("paper.toml", "paper"), ("/nowhere/x.toml", "smoke")])
def test_unknown_profile_names_the_known_ones(name, near):
    with pytest.raises(ConfigurationError, match=near) as raised:
        Profile.load(name)
    assert repr(name) in str(raised.value)


def test_a_profile_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"nope\.toml'; there is no such file"):
        Profile.load(tmp_path / "nope.toml")


def test_dataset_settings_override(tmp_path):
    profile = Profile.load(write_profile(tmp_path, "[dataset_settings.digits]\nseeds = 4"))
    assert profile.for_dataset("digits").seeds == 4
    assert profile.for_dataset("cifar100").seeds == 1


def test_dataset_settings_change_only_what_they_name(tmp_path):
    text = "[dataset_settings.digits.student_schedule]\nlearning_rate = 0.5\n[dataset_settings.digits.losses]\nk = 3"
    profile = Profile.load(write_profile(tmp_path, text))
    chosen = profile.for_dataset("digits")
    changed = {"learning_rate": 0.5}
    assert chosen.student_schedule == profile.student_schedule.model_copy(update=changed)
    assert chosen.losses == profile.losses.model_copy(update={"k": 3})
    assert chosen.teacher_schedule == profile.teacher_schedule


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("sedes = 3", "did you mean 'seeds'"),
        ("[losses]\nlabel_wieght = 1.0", "mean 'label_weight'"),
        ("[study]\nlokks = [5]", "mean 'looks'"),
        ("[study.arms.kd]\nmetod = 'KD'", "mean 'method'"),
    ],
)
def test_a_misspelled_setting_gets_a_hint(tmp_path, text, hint):
    with pytest.raises(ConfigurationError, match=hint):
        Profile.load(write_profile(tmp_path, text))


def test_dataset_settings_are_checked_before_their_turn_comes(tmp_path):
    file = write_profile(tmp_path, "[dataset_settings.cifar10]\nsedes = 4")
    with pytest.raises(ConfigurationError, match=r"dataset_settings\.cifar10.*sedes"):
        Profile.load(file)


def test_warmup_longer_than_the_schedule_is_refused_with_the_files_name(tmp_path):
    file = write_profile(tmp_path, "[student_schedule]\nepochs = 2\nwarmup_epochs = 3.0", skip="student_schedule")
    with pytest.raises(
        ConfigurationError, match=r"mine\.toml: student_schedule: warmup_epochs=3\.0 is more than epochs=2"
    ):
        Profile.load(file)


def test_bits_offered_are_those_of_the_quantizers():
    assert set(get_args(WeightBits)) == {*WEIGHT_BITS, FLOAT_BITS}
    assert set(get_args(ActivationBits)) == {*ACTIVATION_BITS, FLOAT_BITS}


def test_the_commented_profile_names_every_setting_and_its_default():
    file = project_root() / "docs" / "profile.toml"
    text = file.read_text(encoding="utf-8")
    profile = Profile.load(file)

    def settings(model: type, head: str) -> None:
        part = text[text.index(head) :] if head else text
        part = part[: part.find("\n[", 1)]
        written = profile if not head else getattr(profile, head.strip("\n[]"))
        for name, field in model.model_fields.items():
            if name in ("name", "dataset_settings", "losses", "grid", "study") or name.endswith("_schedule"):
                continue
            assert re.search(rf"^(# )?{name} = ", part, flags=re.MULTILINE), (head, name)
            if not field.is_required():
                assert getattr(written, name) == field.get_default(call_default_factory=True), name

    for model, head in ((Profile, ""), (Schedule, "\n[teacher_schedule]"), (Losses, "\n[losses]"), (Grid, "\n[grid]")):
        settings(model, head)
    assert "[dataset_settings." in text
