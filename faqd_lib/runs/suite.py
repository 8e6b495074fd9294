"""A suite: one profile on one dataset, its runs, and the folder they live in.

suite = Suite.open(profile="quick")
records = suite.run([suite.student("FAQD", weight_bits=1)])
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import torch
from torch import nn

from ..config import (
    AFFINITY_RECIPE,
    QUANTIZER_RECIPE,
    RECIPE,
    ConfigurationError,
    DataConfig,
    ObjectiveConfig,
    OptimizationConfig,
    Precision,
    QuantizationConfig,
    RunConfig,
    Schedule,
)
from ..data import datasets
from ..data.batches import Batches, Normalizer
from ..models import MODEL_NAMES, FeatureTap, build_model
from ..quantization.network import calibrate, quantize, reestimate_batch_norm
from ..quantization.weights import FLOAT_BITS
from ..training.learner import Learner, precision_that_pays, projection_seed
from ..training.loop import evaluate
from ..training.objective import DistillationObjective
from ..utils.files import require_writable
from ..utils.measure import exact_kernels
from ..utils.progress import Progress
from . import local, planning
from .checkpoints import remove_checkpoints
from .profile import Profile, SuiteState, claim, read_state, suite_folder
from .ray import chosen_engine
from .store import ResultsError, RunRecord, RunStore

# Of unlabelled images, for a network that is quantized after training: 2,048 images at batch 128.
_BATCH_NORM_BATCHES = 16

Method = Literal["labels", "KD", "FAQD", "FFAQD"]


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
        profile: str | Path | Profile = "quick",
        dataset: str = "",
        data_root: str | Path | None = None,
        results: str | Path | None = None,
        seeds: int = 0,
        device: str = "auto",
    ) -> Self:
        """Open (or begin) the suite of a profile on a dataset.

        Args:
            profile: a shipped profile's name, the path of a TOML file, or a profile.
            dataset: a dataset's name, or ``"auto"``; empty for the profile's own choice.
            data_root: the only folder to look for data in; None for ``$FAQD_DATA``, then ``data/``.
            results: where suite folders live; None for the project's ``results/``.
            seeds: number of seeds; 0 for the profile's own, or the folder's if it has more.
            device: ``"auto"`` (CUDA if there is one), or a torch device.

        Raises:
            ConfigurationError: a bad profile or argument.
            DatasetError: the dataset is unknown, missing or damaged.
            ResultsError: the folder was begun with another configuration.
            PermissionError: the folder cannot be written to.
        """
        chosen = profile if isinstance(profile, Profile) else Profile.load(profile)
        if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 0:
            raise ConfigurationError(f"seeds must be a whole number of at least 1 (0: the profile's), got {seeds!r}")
        name, reason = chosen.resolve_dataset(dataset, data_root)
        chosen = chosen.for_dataset(name)
        chosen = chosen.model_copy(update={"seeds": seeds or chosen.seeds})
        folder = require_writable(suite_folder(chosen, name, results)).resolve()
        where = _device(device)
        images = datasets.load(name, data_root or None, image_size=chosen.image_size, download=chosen.download)
        rest = len(images.train) - chosen.validation_images
        _check_batches(chosen, name, min(rest, chosen.train_images or rest))
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
            affinity_recipe=AFFINITY_RECIPE,
            quantizer_recipe=QUANTIZER_RECIPE,
        )
        suite = cls(
            claim(folder, state, seeds), RunStore(folder), where, str(Path(data_root).resolve()) if data_root else None
        )
        suite.__dict__["data"] = images  # loaded already; `data` is a cached property
        return suite

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The suite of a results folder, without its images: enough for tables.

        Raises:
            ResultsError: no suite was begun there, or its ``suite.json`` is damaged.
        """
        return cls(read_state(Path(folder)), RunStore(Path(folder)), torch.device("cpu"))

    def __getstate__(self) -> dict[str, object]:
        """For another process: without the images and what else is found again there."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

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
        return OptimizationConfig(**schedule.model_dump(), precision=self.precision, compiled=self.profile.compile)

    def teacher(self, model: str | None = None) -> RunConfig:
        """The float teacher (the profile's first one by default), trained on labels with seed 0.

        Seed 0 is the teachers' alone: a student of the same architecture must not start from its teacher's initial
        weights, nor see its teacher's order of images.
        """
        name = model or self.profile.teachers[0]
        _chosen("teacher", name, dict.fromkeys(MODEL_NAMES))
        return RunConfig(
            data=self.state.data,
            model=name,
            optimization=self._optimization(self.profile.teacher_schedule),
            objective=ObjectiveConfig(label_weight=1.0),
        )

    def float_student(self, seed: int = 1) -> RunConfig:
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
        quantization: Mapping[str, object] | None = None,
        regime: str = "end-to-end",
        logit_loss: str | None = None,
        k: int | None = None,
        affinity_weight: float | None = None,
        teacher: str | None = None,
        seed: int = 1,
    ) -> RunConfig:
        """A student's run: ``method`` is ``"labels"``, ``"KD"``, ``"FAQD"`` (exact) or ``"FFAQD"`` (k projections).

        What is left out comes from the profile. ``quantization``: other settings of
        :class:`~faqd_lib.config.QuantizationConfig` (``per_channel``, ``blending``, …).
        ``labels`` adds cross-entropy; method ``"labels"`` is nothing else.
        """
        losses = self.profile.losses
        if seed < 1:
            raise ConfigurationError(f"students have seeds from 1 on (seed 0 is the teachers'), got {seed}")
        fine_tuning = _chosen("regime", regime, {"end-to-end": False, "fine-tuning": True})
        affinity = _chosen("method", method, {"labels": "none", "KD": "none", "FAQD": "fa", "FFAQD": "ffa"})
        default_loss = losses.fine_tuning_logit_loss if fine_tuning else losses.end_to_end_logit_loss
        if method == "labels":
            objective = ObjectiveConfig(label_weight=1.0)
        else:
            weight = losses.affinity_weight if affinity_weight is None else affinity_weight
            settings = {
                "logit_loss": logit_loss or default_loss,
                "logit_weight": losses.logit_weight,
                "temperature": losses.temperature,
                "affinity": affinity,
                "affinity_weight": 0.0 if affinity == "none" else weight,
                "k": losses.k if k is None else k,
                "label_weight": losses.label_weight if labels else 0.0,
                "adapters": losses.adapters and affinity != "none",
            }
            objective = ObjectiveConfig.parse(settings, "student")
        schedule = self.profile.fine_tuning_schedule if fine_tuning else self.profile.student_schedule
        return RunConfig(
            data=self.state.data,
            model=self.profile.student,
            optimization=self._optimization(schedule),
            objective=objective,
            quantization=_quantization(weight_bits, activation_bits, quantization),
            seed=seed,
            teacher=None if method == "labels" else self.teacher(teacher),
            initial=self.float_student(seed) if fine_tuning else None,
        )

    def post_training(
        self,
        weight_bits: int = FLOAT_BITS,
        activation_bits: int = FLOAT_BITS,
        *,
        seed: int = 1,
        quantization: Mapping[str, object] | None = None,
        student: RunConfig | None = None,
    ) -> RunConfig:
        """A float student quantized after training: weights rounded, activation steps calibrated on a batch, batch
        normalisation estimated anew on some; no weight is trained, no label is looked at.

        What the tables compare with, to show what training with quantizers buys. ``student``: its run; None for the one
        trained on labels.
        """
        student = self.float_student(seed) if student is None else student
        return RunConfig(
            data=self.state.data,
            model=student.model,
            optimization=OptimizationConfig(
                epochs=0,
                warmup_epochs=0.0,
                batch_size=student.optimization.batch_size,
                precision=self.precision,
                batch_norm_batches=_BATCH_NORM_BATCHES,
            ),
            objective=ObjectiveConfig(label_weight=1.0),  # of no use: nothing is trained
            quantization=_quantization(weight_bits, activation_bits, quantization),
            seed=student.seed,
            initial=student,
        )

    # ---- networks

    def build(self, config: RunConfig, *, initial_weights: bool = True) -> nn.Module:
        """The network of a run before training: initial weights, quantizers, calibrated activation steps."""
        model = build_model(config.model, len(self.data.classes), image_size=self.data.image_size, seed=config.seed).to(
            self.device, memory_format=torch.channels_last
        )
        if initial_weights and config.initial is not None:
            self.store.load_weights(config.initial, model)
        return quantize(model, **config.quantization.quantize_arguments)

    def model(self, config: RunConfig) -> nn.Module:
        """The trained network of a finished run, in evaluation mode."""
        return self.store.load_weights(config, self.build(config, initial_weights=False)).eval()

    @exact_kernels()
    def learner(self, config: RunConfig, batches: Batches) -> Learner:
        """A run's network before its first step: quantized, steps calibrated on the first batch, with its objective."""
        model = self.build(config)
        calibrate(model, next(batches.epoch(0)).images)
        if count := config.optimization.batch_norm_batches:
            reestimate_batch_norm(model, (batch.images for batch in itertools.islice(batches.epoch(0), count)))
        o = config.objective
        channels: tuple[int, ...] = ()
        if o.adapters:
            with FeatureTap(model.eval(), model.feature_names) as tap, torch.no_grad():
                model(torch.zeros(1, 3, self.data.image_size, self.data.image_size, device=self.device))
            channels = tuple(feature_map.shape[1] for feature_map in tap.features)
        objective = DistillationObjective(
            **o.model_dump(exclude={"adapters", "affinity_recipe"}),
            adapter_channels=channels,
            seed=projection_seed(config.seed),
        ).to(self.device)
        return Learner(config, model, objective, model.feature_names, len(batches))

    # ---- running

    def run(self, configs: Iterable[RunConfig], title: str = "runs") -> list[RunRecord]:
        """Train what has not been trained yet, with the teachers and initial weights it needs; return all records.

        Every finished run is written before the next cohort begins. The records are in the order of ``configs``.

        Raises:
            NonFiniteLossError: a loss stopped being finite; all other runs of its cohort are finished and saved.
            EngineError: the engine cannot work, or a worker died again and again.
        """
        wanted = list(dict.fromkeys(configs))
        ordered = planning.waves(wanted)
        missing = [[config for config in wave if self.store.record(config) is None] for wave in ordered]
        count, known = sum(map(len, missing)), sum(map(len, ordered))
        for config in (config for wave, left in zip(ordered, missing, strict=True) for config in set(wave) - set(left)):
            remove_checkpoints(self.store.run_folder(config))  # its process died before it had tidied up
        if count < known:
            print(f"  {title}: {known - count} of {known} runs are there", flush=True)
        if count:
            engine = chosen_engine()
            units = sum(local.units(config) for wave in missing for config in wave)
            with Progress(units, title, count) as progress:
                for wave in filter(None, missing):
                    engine(self, wave, progress)
        return [self.store.record(config) for config in wanted]

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """(top-1 accuracy in percent, cross-entropy) on the suite's test images."""
        return evaluate(model, self.splits[2], self.normalizer)[:2]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"device must be auto, cpu, or cuda, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"device {name!r}: this torch ({torch.__version__}) sees no CUDA device")
    return device


def _check_batches(profile: Profile, dataset: str, count: int) -> None:
    """Raise ConfigurationError, before anything is trained, where a batch is larger than the training split."""
    for schedule in ("teacher_schedule", "student_schedule", "fine_tuning_schedule"):
        size = getattr(profile, schedule).batch_size
        if size > count:
            raise ConfigurationError(
                f"profile {profile.name}: {schedule}.batch_size = {size} is more than the {count} training images of "
                f"{dataset}: lower it"
            )


def _chosen(name: str, value: str, among: Mapping[str, object]) -> object:
    if value not in among:
        raise ConfigurationError(f"{name} must be one of {', '.join(among)}, got {value!r}")
    return among[value]


def _quantization(weights: int, activations: int, others: Mapping[str, object] | None) -> QuantizationConfig:
    return QuantizationConfig.parse(
        {"weight_bits": weights, "activation_bits": activations, **(others or {})}, "quantization"
    )


def _limit(count: int | None, available: int) -> int | None:
    return None if count is None or count >= available else count
