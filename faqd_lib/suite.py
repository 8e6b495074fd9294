"""A suite: one profile on one dataset, its runs, and the folder they live in.

suite = Suite.open(profile="quick")
records = suite.run([suite.student("FAQD", weight_bits=1)])
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import torch
from torch import nn

from . import data as datasets
from . import planning
from .batches import Batches, Normalizer
from .checkpoints import (
    CheckpointWarning,
    Facts,
    every,
    read_checkpoint,
    remove_checkpoints,
    remove_unfinished_writes,
    write_checkpoint,
)
from .config import (
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
from .distill import DistillationObjective
from .files import require_writable
from .measure import environment
from .models import FeatureTap, build_model, parameter_count
from .progress import Progress
from .quantize import calibrate, quantize, weight_bytes
from .quantizers import FLOAT_BITS
from .results import ResultsError, RunRecord, RunStore, accuracies
from .settings import Profile, SuiteState, claim, read_state, suite_folder
from .train import Learner, evaluate, precision_that_pays, projection_seed, train

Method = Literal["labels", "KD", "FAQD", "FFAQD"]
# What of the environment must be the same for the same bits.
SAME_BITS = ("torch", "processor", "threads", "device", "commit")


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
            affinity_recipe=AFFINITY_RECIPE,
            quantizer_recipe=QUANTIZER_RECIPE,
        )
        suite = cls(claim(folder, state, seeds), RunStore(folder), where, str(data_root) if data_root else None)
        suite.__dict__["data"] = images  # loaded already; `data` is a cached property
        return suite

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The suite of a results folder, without its images: enough for tables.

        Raises:
            ResultsError: no suite was begun there, or its ``suite.json`` is damaged.
        """
        return cls(read_state(folder), RunStore(folder), torch.device("cpu"))

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
        """The float teacher (the profile's first one by default), trained on labels with seed 0.

        Seed 0 is the teachers' alone: a student of the same architecture must not start from its teacher's initial
        weights, nor see its teacher's order of images.
        """
        return RunConfig(
            data=self.state.data,
            model=model or self.profile.teachers[0],
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
            quantization=QuantizationConfig(
                weight_bits=weight_bits, activation_bits=activation_bits, **(quantization or {})
            ),
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
        """A float student quantized after training: weights rounded, activation steps calibrated, nothing trained.

        What the tables compare with, to show what training with quantizers buys. ``student``: its run; None for the one
        trained on labels.
        """
        student = self.float_student(seed) if student is None else student
        return RunConfig(
            data=self.state.data,
            model=student.model,
            optimization=OptimizationConfig(
                epochs=0, warmup_epochs=0.0, batch_size=student.optimization.batch_size, precision=self.precision
            ),
            objective=ObjectiveConfig(label_weight=1.0),  # of no use: nothing is trained
            quantization=QuantizationConfig(
                weight_bits=weight_bits, activation_bits=activation_bits, **(quantization or {})
            ),
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
        return quantize(model, **config.quantization.of_network)

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
            progress, done = Progress(sum(_units(config) for wave in missing for config in wave), title), 0
            try:
                for wave in missing:
                    done = self._run_wave(wave, progress, done, count)
            finally:
                progress.close()
        return [self.store.record(config) for config in wanted]

    def _run_wave(self, wave: Sequence[RunConfig], progress: Progress, done: int, count: int) -> int:
        """Train the runs of a wave, wait for those that another process is at. Returns ``done`` plus their number."""
        left = planning.cohorts(wave, self.profile.cohort)
        while left:
            elsewhere = []
            for cohort in left:
                with self.store.claim(cohort) as ours:
                    todo = [config for config in ours if self.store.record(config) is None]
                    progress.skip(sum(_units(config) for config in ours if config not in todo))
                    if todo:
                        self._run_cohort(todo, f"run {_span(done, len(todo))} of {count}", progress)
                    done += len(ours)
                if others := [config for config in cohort if config not in ours]:
                    elsewhere.append(others)
            if elsewhere:
                print(f"  another process trains {elsewhere[0][0].run_id}: waiting for it", flush=True)
                with self.store.lock(elsewhere[0][0]):
                    pass
            left = elsewhere
        return done

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
        here = environment(self.device)
        for learner in learners:
            remove_unfinished_writes(self.store.run_folder(learner.config))
            self._resume(learner, here, progress)

        def on_epoch(epoch: int, active: list[Learner]) -> None:
            names = ", ".join(sorted({f"{learner.config.bits} {learner.config.method}" for learner in active}))
            accuracy = " ".join(f"{learner.history[-1]['test_accuracy']:.1f}" for learner in active)
            epochs = config.optimization.epochs
            what = f"epoch {epoch + 1} of {epochs}" if epochs else "quantized after training"
            progress.advance(len(active), f"{label} ({names}), {what}: test {accuracy} %")

        result = train(
            learners, batches, teacher, () if teacher is None else teacher.feature_names, splits, on_epoch,
            every(self.profile.checkpoint_seconds), lambda learner: self._checkpoint(learner, here),
        )  # fmt: skip
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
                environment=here,
                dataset_note=self.state.note,
            )
        if result.failed:
            error = next(iter(result.failed.values()))
            if result.trained:
                error.add_note(f"{len(result.trained)} other runs of its cohort were finished and saved")
            raise error

    def _checkpoint(self, learner: Learner, here: dict[str, str | int]) -> None:
        tensors, facts = learner.state()
        facts |= {"digest": learner.config.digest, "environment": here}
        write_checkpoint(self.store.run_folder(learner.config), tensors, Facts(**facts))

    def _resume(self, learner: Learner, here: dict[str, str | int], progress: Progress) -> None:
        """Go on from the run's checkpoint, if it has one."""
        found = read_checkpoint(self.store.run_folder(learner.config), learner.config.digest)
        if found is None:
            return
        tensors, facts = found
        learner.load_state(tensors, facts.model_dump())
        progress.skip(len(learner.history))
        print(f"  {learner.config.run_id} goes on from its checkpoint after step {learner.steps}", flush=True)
        if changed := [key for key in SAME_BITS if here.get(key) != facts.environment.get(key)]:
            what = ", ".join(f"{key} {facts.environment.get(key)} then, {here.get(key)} now" for key in changed)
            warnings.warn(
                f"{learner.config.run_id} was begun in another environment ({what}): it may end with other last bits "
                "than a run without interruption",
                CheckpointWarning,
                stacklevel=2,
            )

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """(top-1 accuracy in percent, cross-entropy) on the suite's test images."""
        return evaluate(model, self.splits[2], self.normalizer)


def _limit(count: int | None, available: int) -> int | None:
    return None if count is None or count >= available else count


def _units(config: RunConfig) -> int:
    """Of progress: an epoch of one network."""
    return max(1, config.optimization.epochs)


def _span(done: int, count: int) -> str:
    return str(done + 1) if count == 1 else f"{done + 1}-{done + count}"
