"""Profiles, and the state that a results folder was begun with. Both are validated and hold no images."""

import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

import filelock
from pydantic import Field, model_validator

from ..config import (
    AFFINITY_RECIPE,
    QUANTIZER_RECIPE,
    RECIPE,
    ActivationBits,
    ClassWeights,
    ConfigurationError,
    Count,
    DataConfig,
    LogitLoss,
    Positive,
    Precision,
    Regime,
    Schedule,
    StrictModel,
    WeightBits,
    omitted_at_default,
)
from ..data import datasets
from ..models import MODEL_NAMES, is_dense, stage_names
from ..quantization.weights import FLOAT_BITS
from ..utils.files import atomic_write_text, canonical_json, project_root, require_writable, text_digest
from ..utils.messages import did_you_mean
from .store import ResultsError
from .study import ModelName, Study

Regimes = Annotated[list[Regime], Field(min_length=1)]
BitPair = Annotated[tuple[WeightBits, ActivationBits], Field(strict=False)]  # a list in TOML, which has no tuples
PROFILES = (
    "smoke", "quick", "cpu", "paper",
    "claims", "claims-2-bits", "tuning", "short", "rivals", "rivals-tuning", "losses", "where", "segmentation",
)  # fmt: skip
# Settings of a profile that may change in a folder, because they change no run.
FREE_SETTINGS = {
    "seeds", "cohort", "compile", "cuda_graphs", "series_datasets", "dataset", "checkpoint_seconds", "evaluate_every",
}  # fmt: skip


class Losses(StrictModel):
    """Weights of the objective's terms, and the logit loss of each regime. T3 alone compares both logit losses."""

    end_to_end_logit_loss: LogitLoss = "mse"
    fine_tuning_logit_loss: LogitLoss = "kl"
    logit_weight: Positive = 1.0
    temperature: Positive = 4.0
    affinity_weight: Positive = 30.0
    label_weight: Positive = 0.3
    k: Count = 6
    adapters: bool = False
    class_weights: ClassWeights = omitted_at_default("equal")


class Grid(StrictModel):
    """Which cells of the tables are trained. Other cells read "not run".

    Args:
        weight_teachers: teachers of T1's students; empty for all. The profile's first teacher must be among them,
            because the other tables take only that one.
        weight_bits, weight_regimes: of T1.
        full_bits, full_regimes: of T2, as pairs of (weight bits, activation bits).
        logit_bits: weight bits of T3.
        affinity_bits: weight bits of T4.
        projections: the k of T4's FFA at the fewest of ``affinity_bits``. At more bits, k is ``losses.k``.
    """

    weight_teachers: list[ModelName] = []
    weight_bits: Annotated[list[WeightBits], Field(min_length=1)] = [1, 2, 4]
    weight_regimes: Regimes = ["end-to-end", "fine-tuning"]
    full_bits: Annotated[list[BitPair], Field(min_length=1)] = [(1, 4), (2, 4), (4, 4)]
    full_regimes: Regimes = ["end-to-end", "fine-tuning"]
    logit_bits: list[WeightBits] = [1, 2, 4]
    affinity_bits: Annotated[list[WeightBits], Field(min_length=1)] = [1]
    projections: list[Count] = [1, 3, 6, 15]

    @model_validator(mode="after")
    def _something_is_quantized(self) -> Self:
        if all(bits == FLOAT_BITS for bits in self.weight_bits):
            raise ValueError(f"grid.weight_bits = {self.weight_bits} has no bits below {FLOAT_BITS}: T1 needs some")
        for weights, activations in self.full_bits:
            if activations == FLOAT_BITS:
                raise ValueError(
                    f"grid.full_bits has {[weights, activations]}, whose activations are float: such students belong "
                    "to grid.weight_bits"
                )
        return self


class Profile(StrictModel):
    """The settings of a profile file: a shipped one (``faqd_lib/runs/profiles/*.toml``), or one of the user's."""

    name: str
    shows_results: bool  # False: its numbers are for tests and never shown as a result
    dataset: str = "auto"
    download: bool = False
    train_images: Count | None = None
    test_images: Count | None = None
    validation_images: Annotated[int, Field(ge=0)] = 0
    held_out_images: Annotated[int, Field(ge=0)] = omitted_at_default(0)  # of the training split: more test images
    image_size: Count | None = None
    teachers: Annotated[list[ModelName], Field(min_length=1)]
    student: ModelName
    seeds: Count = 1
    checkpoint_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 120.0  # of training between checkpoints
    cohort: Count = 8
    compile: bool = False  # passes by torch.compile: other last digits, so other runs
    cuda_graphs: bool = True  # on CUDA: steps recorded and replayed; the same bits
    evaluate_every: Count = omitted_at_default(1)  # epochs of all training images; the last one is always evaluated
    # "auto": bf16 where the hardware computes in it. "by device": bf16 on GPUs, float32 on every CPU.
    precision: Literal["auto", "by device", "float32", "bf16"] = omitted_at_default("auto")
    teacher_per_seed: bool = omitted_at_default(False)  # each student seed has a teacher of its own
    teacher_schedule: Schedule
    student_schedule: Schedule
    fine_tuning_schedule: Schedule
    losses: Losses = Losses()
    grid: Grid = Grid()
    series_datasets: Annotated[list[str], Field(min_length=1)] = ["auto"]
    dataset_settings: dict[str, dict] = {}
    study: Study | None = omitted_at_default(None)  # claims to settle, written down before their runs

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        chosen = self.grid.weight_teachers
        for teacher in chosen:
            if teacher not in self.teachers:
                raise ValueError(f"grid.weight_teachers has {teacher!r}, which is none of the teachers {self.teachers}")
        if chosen and self.teachers[0] not in chosen:
            raise ValueError(
                f"grid.weight_teachers = {chosen} lacks {self.teachers[0]!r}, the first of the teachers, whose "
                "students the notebooks look at: add it, or put another teacher first"
            )
        if self.teacher_per_seed and self.study is None:
            raise ValueError(
                "teacher_per_seed = true is for a study: notebooks and tables have one teacher; leave it out, or add "
                "the table [study]"
            )
        for claim in self.study.claims.values() if self.study is not None else ():
            for name in filter(None, (claim.cells, claim.reference)) if claim.endpoint == "affinity" else ():
                cells = self.study.cells[name]
                student, teacher = cells.student or self.student, cells.teacher or self.teachers[0]
                if len(stage_names(student)) != len(stage_names(teacher)):
                    raise ValueError(
                        f"the claim {claim.statement!r} compares affinity losses, and {student} and {teacher} have "
                        "other numbers of stages: choose another teacher, or the endpoint accuracy"
                    )
        for dataset in self.dataset_settings:  # now, rather than after days of training on other datasets
            self.for_dataset(dataset)
        return self

    @property
    def design_digest(self) -> str:
        """The first 12 digits of the SHA-256 of all settings but those that change no run."""
        return text_digest(canonical_json(self.model_dump(mode="json", exclude=FREE_SETTINGS)))[:12]

    @classmethod
    def load(cls, profile: str | Path, changed_by: tuple[Path, ...] = ()) -> Self:
        """A shipped profile by name, or a TOML file by path. Its key ``base`` names a profile that it changes.

        A ``base`` that is a path is relative to the file's folder. ``changed_by`` has the files whose base this is.

        Raises:
            ConfigurationError: no such profile, no valid TOML, unknown keys, wrong types, values out of range, or a
                profile that is its own base.
        """
        path = Path(profile)
        if str(profile) in PROFILES:
            file = resources.files(__package__) / "profiles" / f"{profile}.toml"
        elif path.suffix == ".toml" and path.is_file():
            file = path
        else:
            missing = "; there is no such file" if path.suffix == ".toml" else ""
            unknown = f"unknown profile {str(profile)!r}{missing}{did_you_mean(profile, PROFILES)}"
            raise ConfigurationError(f"{unknown}: choose {', '.join(PROFILES)}, or the path of a .toml file")
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{profile}: not valid TOML: {error}") from error
        if "base" in values:
            base, here = values.pop("base"), (*changed_by, path.resolve())
            if not isinstance(base, str):
                raise ConfigurationError(f"{profile}: base = {base!r} must be a profile's name or the path of a file")
            base = (path.parent / base).resolve() if base not in PROFILES and base.endswith(".toml") else base
            if base in here:
                raise ConfigurationError(f"{profile}: base = {str(base)!r} leads back to this file: name another")
            values = _merged(cls.load(base, here).model_dump(exclude={"name"}), values)
        return cls.parse({"name": path.stem, **values}, where=str(profile))

    def resolve_dataset(self, dataset: str, data_root: str | Path | None) -> tuple[str, str]:
        """Choose the dataset: a name, ``"auto"``, or empty for the profile's own choice.

        Returns:
            The dataset's name, and in words why it was taken.

        Raises:
            DatasetError: the dataset is unknown, or not found.
        """
        allowed = {"allow_digits": not self.download, "allow_download": self.download}
        return datasets.resolve(dataset or self.dataset, data_root or None, **allowed)

    def for_dataset(self, dataset: str) -> Self:
        """This profile with its ``dataset_settings`` for one dataset. Settings not named there stay."""
        settings = _merged(self.model_dump(), self.dataset_settings.get(dataset, {})) | {"dataset_settings": {}}
        return type(self).parse(settings, where=f"profile {self.name}, dataset_settings.{dataset}")

    def with_dense_networks(self, dataset: str) -> tuple[Self, str]:
        """This profile for a dataset with a class for each pixel, and the name of the profile it borrows from or "".

        A profile whose networks there predict one class an image borrows the ``dataset_settings`` of ``smoke``, if it
        shows no results, or else of ``quick``. Its own ``dataset_settings`` for the dataset come on top of them.
        """
        own = self.for_dataset(dataset)
        if any(map(is_dense, (*own.teachers, own.student))):
            return self, ""
        lenders = ("quick",) if self.shows_results else ("smoke", "quick")
        for lender in map(type(self).load, lenders):
            if borrowed := lender.dataset_settings.get(dataset):
                # The profile's own choice of T1's teachers names networks with one class an image.
                settings = _merged({"grid": {"weight_teachers": []}}, borrowed)
                settings = _merged(settings, self.dataset_settings.get(dataset, {}))
                all_settings = {**self.dataset_settings, dataset: settings}
                return self.model_copy(update={"dataset_settings": all_settings}), lender.name
        return self, ""


def _merged(settings: dict, changes: dict) -> dict:
    """``settings`` with ``changes``, table by table."""
    inside = {
        key: _merged(settings[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(settings.get(key), dict)
    }
    return settings | changes | inside


class SuiteState(StrictModel):
    """What a results folder was begun with (``suite.json``): enough to name its runs and to caption its tables."""

    profile: Profile  # with the settings for this dataset
    dataset: str  # its name
    reason: str  # why this dataset was taken, in words
    note: str  # a remark of the dataset on its images; often empty
    data: DataConfig  # the images by fingerprint, and the subsets taken
    training_count: int  # images after the subsets are taken
    test_count: int
    precision: Precision  # of training steps
    recipe: int  # versions of training, affinity losses and quantizers
    affinity_recipe: int
    quantizer_recipe: int
    sources: dict[str, str] = omitted_at_default({})  # other datasets to take unlabelled images from: fingerprints

    @classmethod
    def describe(
        cls, profile: Profile, dataset: str, reason: str, images: datasets.ImageData, precision: Precision
    ) -> Self:
        """The state of a profile on images.

        Raises:
            ConfigurationError: no training image is left, a batch is larger than the training split, the updates of a
                schedule do not end within its last epoch, or networks of the profile do not predict what the images
                have labels for.
        """
        for model in (*profile.teachers, profile.student):
            check_fits(f"profile {profile.name}", model, dataset, images.train.is_dense)
        rest = len(images.train) - profile.validation_images - profile.held_out_images
        if rest < 1:
            raise ConfigurationError(
                f"profile {profile.name}: held_out_images = {profile.held_out_images} and validation_images = "
                f"{profile.validation_images} leave no training image of the {len(images.train):,} that {dataset} has: "
                "lower them"
            )
        data = DataConfig(
            name=dataset,
            fingerprint=images.fingerprint,
            train_images=_limit(profile.train_images, rest),
            test_images=_limit(profile.test_images, len(images.test)),
            validation_images=profile.validation_images,
            held_out_images=profile.held_out_images,
        )
        training_count = data.train_images or rest
        for schedule in ("teacher_schedule", "student_schedule", "fine_tuning_schedule"):
            chosen = getattr(profile, schedule)
            if chosen.batch_size > training_count:
                raise ConfigurationError(
                    f"profile {profile.name}: {schedule}.batch_size = {chosen.batch_size} is more than the "
                    f"{training_count} training images of {dataset}: lower it"
                )
            chosen.steps(training_count // chosen.batch_size)
        test_count = (data.test_images or len(images.test)) + data.held_out_images
        return cls(
            profile=profile, dataset=dataset, reason=reason, note=images.note, data=data, training_count=training_count,
            test_count=test_count, precision=precision, recipe=RECIPE, affinity_recipe=AFFINITY_RECIPE,
            quantizer_recipe=QUANTIZER_RECIPE,
        )  # fmt: skip

    @property
    def caption(self) -> str:
        """Dataset, sizes and profile, for every table and figure."""
        note = f" ({self.note})" if self.note else ""
        kind = "random" if is_dense(self.profile.student) else "class-balanced"
        subsets = f" ({kind} subsets)" if self.data.train_images or self.data.test_images else ""
        count = self.data.held_out_images
        held_out = f" ({count:,} of them held out of the training split)" if count else ""
        images = f"{self.training_count:,} training and {self.test_count:,} test images{subsets}{held_out}"
        compiled = ", compiled" if self.profile.compile else ""
        text = f"{self.dataset}{note}, {images}, profile {self.profile.name}{compiled}"
        return text if self.reason.endswith((datasets.ASKED, datasets.FOUND)) else f"{text}; {self.reason}"


def check_fits(setting: str, model: str, dataset: str, dense: bool) -> None:
    """Raise ConfigurationError unless a network predicts what a dataset has labels for: ``dense``, those of pixels."""
    if is_dense(model) != dense:
        labels = "a class for each pixel" if dense else "one class for each image"
        fitting = ", ".join(name for name in MODEL_NAMES if is_dense(name) == dense)
        raise ConfigurationError(f"{setting}: {model} does not fit {dataset}, which has {labels}: choose {fitting}")


def _limit(count: int | None, available: int) -> int | None:
    """None where a limit takes all images anyway: the same images must not have two configurations."""
    return None if count is None or count >= available else count


def default_results() -> Path:
    """``results/`` in the project."""
    return project_root() / "results"


def suite_folder(profile: Profile, dataset: str, results: str | Path | None = None) -> Path:
    """The folder of the suite of a profile on a dataset."""
    return Path(results or default_results()) / f"{profile.name}-{dataset}"


def read_state(folder: Path) -> SuiteState:
    """The state that a results folder was begun with.

    Raises:
        ResultsError: nothing was begun there, or ``suite.json`` is damaged.
    """
    path = folder / "suite.json"
    if not path.is_file():
        raise ResultsError(f"no suite was begun in {folder}: there is no suite.json")
    try:
        return SuiteState.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(
            f"{path} is damaged or of another version of the suite: give another folder with --results, or begin "
            "again with --fresh (the old folder is moved aside)"
        ) from error


def begin_or_continue(folder: Path, state: SuiteState, asked_seeds: int) -> SuiteState:
    """Write ``state`` into a new folder, or compare ``state`` with that of a folder that was begun already.

    ``state`` is of the profile and images in use now. ``asked_seeds`` is the number of seeds; 0 for the larger of the
    profile's and the folder's.

    Returns:
        The state to work with. Its precision is that of the folder.

    Raises:
        ResultsError: the folder was begun with another configuration; the message lists the differences.
    """
    with filelock.FileLock(require_writable(folder / ".locks") / "suite"):
        return _begin_or_continue(folder, state, asked_seeds)


def _begin_or_continue(folder: Path, state: SuiteState, asked_seeds: int) -> SuiteState:
    path = folder / "suite.json"
    if path.exists():
        begun = read_state(folder)
        if state.profile.precision == "auto":
            # The folder keeps its precision, even where another one is faster on this machine.
            state = state.model_copy(update={"precision": begun.precision})
        # The grid may change too: it only chooses runs. A note is a remark on images that the fingerprint names.
        changeable = {"reason": True, "note": True, "sources": True, "profile": FREE_SETTINGS | {"grid"}}
        was, now = (one.model_dump(mode="json", exclude=changeable) for one in (begun, state))
        if differences := list(_differences(was, now)):
            raise ResultsError(
                f"{folder} was begun with another configuration ({'; '.join(differences[:4])}): give another folder "
                "with --results, or begin again with --fresh (the old folder is moved aside)"
            )
        for name in begun.sources.keys() & state.sources.keys():
            if begun.sources[name] != state.sources[name]:
                raise ResultsError(f"{folder} has runs on other images of {name}: give another folder with --results")
        seeds = asked_seeds or max(begun.profile.seeds, state.profile.seeds)
        profile = state.profile.model_copy(update={"seeds": seeds})
        state = state.model_copy(update={"profile": profile, "sources": begun.sources | state.sources})
        if state == begun:
            return state
    atomic_write_text(path, state.model_dump_json(indent=1) + "\n")
    return state


def _differences(was: dict, now: dict, prefix: str = "") -> Iterator[str]:
    for key in {**was, **now}:
        name, before, after = prefix + key, was.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{name}.")
        elif before != after:
            yield "other images" if name == "data.fingerprint" else f"{name}: {before!r} there, {after!r} now"
