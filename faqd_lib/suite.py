"""A suite: one profile on one dataset, its runs, and the folder they live in.

suite = Suite.open(profile="quick")
records = suite.run([suite.student("FAQD", weight_bits=1)])
"""

import difflib
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from . import data as datasets
from .batches import Batches, Normalizer
from .config import (
    RECIPE,
    ActivationBits,
    ConfigurationError,
    Count,
    DataConfig,
    Frozen,
    ObjectiveConfig,
    OptimizationConfig,
    Positive,
    Precision,
    QuantizationConfig,
    RunConfig,
    Weight,
    WeightBits,
)
from .distill import DistillationObjective
from .files import atomic_write_text, project_root, require_writable
from .measure import environment
from .models import MODEL_NAMES, FeatureTap, build_model, parameter_count
from .progress import Progress
from .quantize import FLOAT_BITS, calibrate, quantize, weight_bytes
from .results import ResultsError, RunRecord, RunStore, accuracies
from .train import Learner, evaluate, precision_that_pays, projection_seed, train

ModelName = Literal[MODEL_NAMES]
Method = Literal["labels", "KD", "FAQD", "FFAQD"]
PROFILES = ("smoke", "quick", "cpu", "paper")


class Schedule(Frozen):
    """Optimization of one kind of run; the precision is chosen for the machine."""

    epochs: Count
    batch_size: Annotated[int, Field(ge=2)] = 128
    learning_rate: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Weight = 5e-4
    warmup_epochs: Weight = 1.0
    clip_norm: Positive = 20.0


class Losses(Frozen):
    """Weights of the objective's terms, and the logit loss of each regime outside the table that compares them."""

    end_to_end_logit_loss: Literal["mse", "kl"] = "mse"
    fine_tuning_logit_loss: Literal["mse", "kl"] = "kl"
    logit_weight: Positive = 1.0
    temperature: Positive = 4.0
    affinity_weight: Positive = 30.0
    label_weight: Positive = 0.3
    k: Count = 6
    adapters: bool = False


class Grid(Frozen):
    """Which cells of the tables are trained; a cell that is left out reads "not run"."""

    weight_bits: list[WeightBits] = [1, 2, 4]
    weight_regimes: list[Literal["end-to-end", "fine-tuning"]] = ["end-to-end", "fine-tuning"]
    full_bits: list[tuple[WeightBits, ActivationBits]] = [(1, 4), (4, 4)]
    full_regimes: list[Literal["end-to-end", "fine-tuning"]] = ["end-to-end", "fine-tuning"]
    logit_bits: list[WeightBits] = [1, 2, 4]
    affinity_bits: WeightBits = 1
    projections: list[Count] = [1, 3, 6, 15]


class Profile(Frozen):
    """A profile file (``faqd_lib/profiles/*.toml``, or one of the user's own)."""

    name: str
    shows_results: bool  # False: its numbers are for tests and never shown as a result
    dataset: str = "auto"
    download: bool = False
    train_images: Count | None = None
    test_images: Count | None = None
    validation_images: Annotated[int, Field(ge=0)] = 0
    image_size: Count | None = None
    teachers: Annotated[list[ModelName], Field(min_length=1)]
    student: ModelName
    seeds: Count = 1
    cohort: Count = 8
    teacher_schedule: Schedule
    student_schedule: Schedule
    fine_tuning_schedule: Schedule
    losses: Losses = Losses()
    grid: Grid = Grid()
    series_datasets: list[str] = ["auto"]
    dataset_settings: dict[str, dict] = {}

    @model_validator(mode="before")
    @classmethod
    def _lists_to_tuples(cls, values: dict) -> dict:
        # TOML has no tuples; the pairs of bits are lists there.
        grid = values.get("grid")
        if isinstance(grid, dict) and isinstance(grid.get("full_bits"), list):
            pairs = [tuple(pair) if isinstance(pair, list) else pair for pair in grid["full_bits"]]
            values = {**values, "grid": {**grid, "full_bits": pairs}}
        return values

    @classmethod
    def load(cls, profile: str | Path) -> Self:
        """A shipped profile by name, or a TOML file by path.

        Raises:
            ConfigurationError: no such profile, no valid TOML, unknown keys, wrong types, values out of range.
        """
        path = Path(profile)
        if str(profile) in PROFILES:
            text = (resources.files("faqd_lib") / "profiles" / f"{profile}.toml").read_text(encoding="utf-8")
        elif path.suffix == ".toml" and path.is_file():
            text = path.read_text(encoding="utf-8")
        else:
            near = difflib.get_close_matches(str(profile), PROFILES, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigurationError(
                f"unknown profile {str(profile)!r}{hint}: choose {', '.join(PROFILES)}, or the path of a .toml file"
            )
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigurationError(f"{profile}: not valid TOML: {error}") from error
        return cls.parse({"name": path.stem, **values}, where=str(profile))

    def resolve_dataset(self, dataset: str, data_root: str | Path | None) -> tuple[str, str]:
        """The dataset that is used and the reason, from a name, ``"auto"`` or nothing (the profile's own choice)."""
        return datasets.resolve(
            dataset or self.dataset, data_root or None, allow_digits=not self.download, allow_download=self.download
        )

    def for_dataset(self, dataset: str) -> Self:
        """This profile with the settings that it has for one dataset."""
        settings = {**self.model_dump(), **self.dataset_settings.get(dataset, {}), "dataset_settings": {}}
        return type(self).parse(settings, where=f"profile {self.name}, dataset_settings.{dataset}")


class SuiteState(Frozen):
    """What a results folder was begun with (``suite.json``): enough to name its runs and to caption its tables."""

    profile: Profile
    dataset: str
    reason: str
    note: str
    data: DataConfig
    training_count: int
    test_count: int
    precision: Precision
    recipe: int

    @property
    def caption(self) -> str:
        """What every table and figure says of its origin."""
        note = f" ({self.note})" if self.note else ""
        text = (
            f"{self.dataset}{note}, {self.training_count:,} training and {self.test_count:,} test images, "
            f"profile {self.profile.name}"
        )
        return text if ": found on disk" in self.reason or ": asked for" in self.reason else f"{text}; {self.reason}"


# Settings under which the same runs are the same runs: they may differ from what the folder was begun with.
FREE_SETTINGS = {"reason", "profile.seeds", "profile.cohort", "profile.series_datasets", "profile.dataset"}


def default_results() -> Path:
    """``results/`` in the project."""
    return project_root() / "results"


@dataclass(frozen=True)
class Suite:
    """See the head of this module. Make one with :meth:`open`, or with :meth:`read` from a folder alone."""

    state: SuiteState
    store: RunStore
    device: torch.device
    data_root: str | None = None

    @classmethod
    def open(
        cls,
        profile: str | Path = "quick",
        dataset: str = "",
        data_root: str | Path | None = None,
        results: str | Path | None = None,
        seeds: int = 0,
        device: str = "auto",
    ) -> Self:
        """Open (or begin) the suite of a profile on a dataset.

        Args:
            profile: a shipped profile's name, or the path of a TOML file.
            dataset: a dataset's name, or ``"auto"``; empty for the profile's own choice.
            data_root: the only folder to look for data in; None for ``$FAQD_DATA``, then ``data/``.
            results: where suite folders live; None for the project's ``results/``.
            seeds: number of seeds; 0 for the profile's own.
            device: ``"auto"`` (CUDA if there is one), or a torch device.

        Raises:
            ConfigurationError: a bad profile or argument.
            DatasetError: the dataset is unknown, missing or damaged.
            ResultsError: the folder was begun with another configuration.
            PermissionError: the folder cannot be written to.
        """
        chosen = Profile.load(profile)
        if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 0:
            raise ConfigurationError(f"seeds must be a whole number of at least 1 (0: the profile's), got {seeds!r}")
        name, reason = chosen.resolve_dataset(dataset, data_root)
        chosen = chosen.for_dataset(name)
        chosen = chosen.model_copy(update={"seeds": seeds or chosen.seeds})
        folder = require_writable(suite_folder(chosen, name, results))
        where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        images = datasets.load(name, data_root or None, image_size=chosen.image_size, download=chosen.download)
        rest = len(images.train) - chosen.validation_images
        config = DataConfig(
            name=name,
            fingerprint=images.fingerprint,
            train_images=_limit(chosen.train_images, rest),
            test_images=_limit(chosen.test_images, len(images.test)),
            validation_images=chosen.validation_images,
        )
        state = SuiteState(
            profile=chosen,
            dataset=name,
            reason=reason,
            note=images.note,
            data=config,
            training_count=config.train_images or rest,
            test_count=config.test_images or len(images.test),
            precision=precision_that_pays(where),
            recipe=RECIPE,
        )
        suite = cls(_claim(folder, state), RunStore(folder), where, str(data_root) if data_root else None)
        suite.__dict__["data"] = images  # loaded already; `data` is a cached property
        return suite

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The suite of a results folder, without its images: enough for tables.

        Raises:
            ResultsError: no suite was begun there, or its ``suite.json`` is damaged.
        """
        return cls(_read_state(folder), RunStore(folder), torch.device("cpu"))

    @property
    def profile(self) -> Profile:
        """The profile, with the settings for this dataset."""
        return self.state.profile

    @property
    def dataset(self) -> str:
        """The dataset's name."""
        return self.state.dataset

    @property
    def precision(self) -> Precision:
        """In which the training steps compute."""
        return self.state.precision

    @property
    def folder(self) -> Path:
        """The suite's own folder, ``<results>/<profile>-<dataset>``."""
        return self.store.folder

    @property
    def caption(self) -> str:
        """What every table and figure says of its origin."""
        return self.state.caption

    # ---- data

    @cached_property
    def data(self) -> datasets.ImageData:
        """The dataset, whole."""
        images = datasets.load(self.dataset, self.data_root, image_size=self.profile.image_size)
        if images.fingerprint != self.state.data.fingerprint:
            raise ResultsError(f"the images of {self.dataset} are not those that {self.folder} was begun with")
        return images

    @cached_property
    def splits(self) -> tuple[datasets.Images, datasets.Images | None, datasets.Images]:
        """(training, validation or None, test) images, after subsets are taken; the validation split comes first."""
        config = self.state.data
        rest, validation = datasets.split_validation(self.data.train, config.validation_images, config.subset_seed)
        training = datasets.subset(rest, config.train_images, config.subset_seed)
        return training, validation, datasets.subset(self.data.test, config.test_images, config.subset_seed)

    @cached_property
    def normalizer(self) -> Normalizer:
        """uint8 images to what the networks take, on the suite's device."""
        return Normalizer(self.data.mean, self.data.std, self.device)

    # ---- configurations of runs

    def _optimization(self, schedule: Schedule) -> OptimizationConfig:
        return OptimizationConfig(**schedule.model_dump(), precision=self.precision)

    def teacher(self, model: str | None = None) -> RunConfig:
        """The float teacher (the profile's first one by default), trained on labels with seed 0."""
        return RunConfig(
            data=self.state.data,
            model=model or self.profile.teachers[0],
            optimization=self._optimization(self.profile.teacher_schedule),
            objective=ObjectiveConfig(label_weight=1.0),
        )

    def float_student(self, seed: int = 0) -> RunConfig:
        """The float student, trained on labels: a reference row, and where fine-tuning starts."""
        return RunConfig(
            data=self.state.data,
            model=self.profile.student,
            optimization=self._optimization(self.profile.student_schedule),
            objective=ObjectiveConfig(label_weight=1.0),
            seed=seed,
        )

    def student(
        self,
        method: Method,
        *,
        labels: bool = False,
        weight_bits: int = FLOAT_BITS,
        activation_bits: int = FLOAT_BITS,
        regime: str = "end-to-end",
        logit_loss: str | None = None,
        k: int | None = None,
        affinity_weight: float | None = None,
        teacher: str | None = None,
        seed: int = 0,
    ) -> RunConfig:
        """A student's run: ``method`` is ``"labels"``, ``"KD"``, ``"FAQD"`` (exact) or ``"FFAQD"`` (k projections).

        What is left out comes from the profile. ``labels`` adds cross-entropy; method ``"labels"`` is nothing else.
        """
        losses = self.profile.losses
        fine_tuning = {"end-to-end": False, "fine-tuning": True}[regime]
        default_loss = losses.fine_tuning_logit_loss if fine_tuning else losses.end_to_end_logit_loss
        if method == "labels":
            objective = ObjectiveConfig(label_weight=1.0)
        else:
            affinity = {"KD": "none", "FAQD": "fa", "FFAQD": "ffa"}[method]
            weight = losses.affinity_weight if affinity_weight is None else affinity_weight
            objective = ObjectiveConfig(
                logit_loss=logit_loss or default_loss,
                logit_weight=losses.logit_weight,
                temperature=losses.temperature,
                affinity=affinity,
                affinity_weight=0.0 if affinity == "none" else weight,
                k=losses.k if k is None else k,
                label_weight=losses.label_weight if labels else 0.0,
                adapters=losses.adapters and affinity != "none",
            )
        schedule = self.profile.fine_tuning_schedule if fine_tuning else self.profile.student_schedule
        return RunConfig(
            data=self.state.data,
            model=self.profile.student,
            optimization=self._optimization(schedule),
            objective=objective,
            quantization=QuantizationConfig(weight_bits=weight_bits, activation_bits=activation_bits),
            seed=seed,
            teacher=None if method == "labels" else self.teacher(teacher),
            initial=self.float_student(seed) if fine_tuning else None,
        )

    # ---- networks

    def build(self, config: RunConfig, *, initial_weights: bool = True) -> nn.Module:
        """The network of a run before training: initial weights, quantizers, calibrated activation steps."""
        model = build_model(config.model, len(self.data.classes), image_size=self.data.image_size, seed=config.seed).to(
            self.device, memory_format=torch.channels_last
        )
        if initial_weights and config.initial is not None:
            self.store.load_weights(config.initial, model)
        return quantize(model, **config.quantization.model_dump())

    def model(self, config: RunConfig) -> nn.Module:
        """The trained network of a finished run, in evaluation mode."""
        return self.store.load_weights(config, self.build(config, initial_weights=False)).eval()

    def _learner(self, config: RunConfig, batches: Batches) -> Learner:
        model = self.build(config)
        calibrate(model, next(batches.epoch(0)).images)
        o = config.objective
        channels: tuple[int, ...] = ()
        if o.adapters:
            with FeatureTap(model.eval(), model.feature_names) as tap, torch.no_grad():
                model(torch.zeros(1, 3, self.data.image_size, self.data.image_size, device=self.device))
            channels = tuple(feature_map.shape[1] for feature_map in tap.features)
        objective = DistillationObjective(
            **o.model_dump(exclude={"adapters"}), adapter_channels=channels, seed=projection_seed(config.seed)
        ).to(self.device)
        return Learner(config, model, objective, model.feature_names, len(batches))

    # ---- running

    def run(self, configs: Iterable[RunConfig], title: str = "runs") -> list[RunRecord]:
        """Train what has not been trained yet, with the teachers and initial weights it needs; return all records.

        Every finished run is written before the next cohort begins. The records are in the order of ``configs``.

        Raises:
            NonFiniteLossError: a loss stopped being finite; all other runs of its cohort are finished and saved.
        """
        wanted = list(dict.fromkeys(configs))
        waves = _waves(wanted)
        missing = [[config for config in wave if self.store.record(config) is None] for wave in waves]
        total = sum(config.optimization.epochs for wave in missing for config in wave)
        count = sum(map(len, missing))
        if count < sum(map(len, waves)):
            print(f"  {title}: {sum(map(len, waves)) - count} of {sum(map(len, waves))} runs are there", flush=True)
        if count:
            progress, done = Progress(total, title), 0
            try:
                for wave in missing:
                    for cohort in _cohorts(wave, self.profile.cohort):
                        self._run_cohort(cohort, f"run {_span(done, len(cohort))} of {count}", progress)
                        done += len(cohort)
            finally:
                progress.close()
        return [self.store.record(config) for config in wanted]

    def _run_cohort(self, cohort: Sequence[RunConfig], label: str, progress: Progress) -> None:
        config = cohort[0]
        training, validation, test = self.splits
        # Label-free students are trained from images that have no labels: there is nothing to look at.
        images = training.unlabelled() if config.label_free else training
        batches = Batches(
            images, config.optimization.batch_size, config.seed, self.normalizer, flip=self.data.flip,
            device=self.device,
        )  # fmt: skip
        teacher_config = next((c.teacher for c in cohort if c.teacher is not None), None)
        teacher = None if teacher_config is None else self.model(teacher_config).requires_grad_(False)
        splits = {"test": test} if validation is None else {"validation": validation, "test": test}
        learners = [self._learner(c, batches) for c in cohort]

        def on_epoch(epoch: int, active: list[Learner]) -> None:
            names = ", ".join(sorted({f"{learner.config.bits} {learner.config.method}" for learner in active}))
            accuracy = " ".join(f"{learner.history[-1]['test_accuracy']:.1f}" for learner in active)
            progress.advance(
                len(cohort), f"{label} ({names}), epoch {epoch + 1} of {config.optimization.epochs}: test {accuracy} %"
            )

        result = train(learners, batches, teacher, () if teacher is None else teacher.feature_names, splits, on_epoch)
        for trained in result.trained:
            self.store.save(
                trained.config,
                trained.model,
                history=trained.history,
                **accuracies(trained.history),
                test_images=len(test),
                parameters=parameter_count(trained.model),
                weight_bytes=weight_bytes(trained.model),
                cost=trained.cost,
                environment=environment(self.device),
                dataset_note=self.state.note,
            )
        if result.failed:
            error = next(iter(result.failed.values()))
            if result.trained:
                error.add_note(f"{len(result.trained)} other runs of its cohort were finished and saved")
            raise error

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """(top-1 accuracy in percent, cross-entropy) on the suite's test images."""
        return evaluate(model, self.splits[2], self.normalizer)


def _limit(count: int | None, available: int) -> int | None:
    return None if count is None or count >= available else count


def _span(done: int, count: int) -> str:
    return str(done + 1) if count == 1 else f"{done + 1}-{done + count}"


def _waves(configs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Runs in an order in which nothing comes before what it needs: each wave needs only earlier ones."""

    def depth(config: RunConfig) -> int:
        return max((1 + depth(other) for other in (config.teacher, config.initial) if other is not None), default=0)

    everything: dict[RunConfig, int] = {}

    def add(config: RunConfig) -> None:
        for other in (config.teacher, config.initial):
            if other is not None:
                add(other)
        everything.setdefault(config, depth(config))

    for config in configs:
        add(config)
    deepest = max(everything.values(), default=-1)
    return [[c for c, level in everything.items() if level == wave] for wave in range(deepest + 1)]


def _cohorts(configs: Sequence[RunConfig], largest: int) -> list[list[RunConfig]]:
    """Split runs into groups that can share their batches and their teacher, none larger than ``largest``."""
    groups: dict[tuple, list[RunConfig]] = {}
    for config in sorted(configs, key=lambda config: config.teacher is None):  # runs without a teacher join last
        o = config.optimization
        shared = (config.data, config.seed, o.epochs, o.batch_size, o.precision, config.label_free)
        key = (*shared, config.teacher)
        if config.teacher is None:
            key = next((other for other in groups if other[:-1] == shared), key)
        groups.setdefault(key, []).append(config)
    return [group[i : i + largest] for group in groups.values() for i in range(0, len(group), largest)]


def suite_folder(profile: Profile, dataset: str, results: str | Path | None = None) -> Path:
    """Where the suite of a profile on a dataset lives."""
    return Path(results or default_results()) / f"{profile.name}-{dataset}"


def _read_state(folder: Path) -> SuiteState:
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


def _claim(folder: Path, state: SuiteState) -> SuiteState:
    """Begin the folder, or make sure that it was begun with the same configuration; return the state to work with."""
    path = folder / "suite.json"
    if path.exists():
        begun = _read_state(folder)
        # What the folder was begun with stays, though another precision might pay on this machine.
        state = state.model_copy(update={"precision": begun.precision})
        differences = [
            f"{key}: {was!r} there, {now!r} now"
            for key, was, now in _differences(begun.model_dump(mode="json"), state.model_dump(mode="json"))
            if key not in FREE_SETTINGS
        ]
        if differences:
            raise ResultsError(
                f"{folder} was begun with another configuration ({'; '.join(differences[:4])}): give another folder "
                "with --results, or begin again with --fresh (the old folder is moved aside)"
            )
        # Seeds only grow: a notebook opened with fewer does not hide what has been trained.
        if begun.profile.seeds >= state.profile.seeds:
            return state
    atomic_write_text(path, state.model_dump_json(indent=1) + "\n")
    return state


def _differences(was: dict, now: dict, prefix: str = "") -> list[tuple[str, object, object]]:
    found = []
    for key in {**was, **now}:
        before, after = was.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append((prefix + key, before, after))
    return found
