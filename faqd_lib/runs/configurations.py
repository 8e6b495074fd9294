"""Run configurations from a profile: teachers, float students, distilled and quantized students.

Nothing here trains, loads images or touches a disk: the same state gives the same configurations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from ..config import (
    METHOD_OF_AFFINITY,
    ConfigurationError,
    ImageSource,
    Method,
    ObjectiveConfig,
    OptimizationConfig,
    Precision,
    QuantizationConfig,
    RunConfig,
    Schedule,
)
from ..data.elsewhere import HALVES, MADE_HERE
from ..models import MODEL_NAMES, ends_with_relus, is_dense, stage_names
from ..quantization.weights import FLOAT_BITS
from ..utils.messages import check_choice
from .profile import Losses, Profile, SuiteState, check_fits
from .study import Arm, Cells

# Unlabelled batches for the batch normalisation of a network that is quantized after training.
_BATCH_NORM_BATCHES = 16

TEACHER_SEEDS = 1000  # the teacher of the students of seed s has the seed 1000 + s, where each seed has its own

AFFINITY_OF_METHOD = {"labels": "none", "FA": "fa"} | {name: affinity for affinity, name in METHOD_OF_AFFINITY.items()}


@dataclass(frozen=True)
class Configurations:
    """Makes the run configurations of a suite.

    Args:
        state: profile, images and precision that every configuration is made from.
    """

    state: SuiteState

    @property
    def profile(self) -> Profile:
        """The profile, with the settings for this dataset."""
        return self.state.profile

    @property
    def precision(self) -> Precision:
        """The number format that training steps compute in."""
        return self.state.precision

    def teacher(self, model: str | None = None, student_seed: int | None = None) -> RunConfig:
        """The float teacher, trained on labels. None: the profile's first teacher.

        Its seed is one that no student has: 0, or with ``teacher_per_seed`` that of the student plus
        :data:`TEACHER_SEEDS`. A student of the same architecture has other initial weights and another order of images
        than its teacher.

        Raises:
            ConfigurationError: there is no such model, or it does not predict what the dataset has labels for.
        """
        model = model or self.profile.teachers[0]
        self._check_model("teacher", model)
        own = self.profile.teacher_per_seed and student_seed is not None
        return self._on_labels(model, self.profile.teacher_schedule, TEACHER_SEEDS + student_seed if own else 0)

    def float_student(self, seed: int = 1, model: str | None = None) -> RunConfig:
        """The float student, trained on labels: a reference row, and where fine-tuning starts.

        Raises ConfigurationError as :meth:`teacher` does.
        """
        model = model or self.profile.student
        self._check_model("model", model)
        return self._on_labels(model, self.profile.student_schedule, seed)

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
        stages: Sequence[int] = (),
        taps: str = "output",
        losses: Mapping[str, object] | None = None,
        schedule: Mapping[str, object] | None = None,
        updates: int | None = None,
        images: int | None = None,
        source: str | None = None,
        model: str | None = None,
        teacher: str | None = None,
        seed: int = 1,
    ) -> RunConfig:
        """A student's run. Settings that are None come from the profile.

        Args:
            method: ``"labels"`` (cross-entropy only), ``"KD"`` (logits), ``"FA"`` (exact feature affinity), ``"FAQD"``
                (logits and exact feature affinity), ``"FFAQD"`` (logits and affinity from k projections); or with a
                rival of feature affinity ``"KD+SP"``, ``"KD+AT"``, ``"KD+FitNet"``, ``"KD+CKA"``, ``"KD+CWD"``,
                ``"KD+SQuaT"`` (quantized activations only).
            labels: whether cross-entropy is added to a distillation loss.
            weight_bits, activation_bits: 1 to 8, or 32 for float.
            quantization: other settings of :class:`~faqd_lib.config.QuantizationConfig`, such as ``per_channel``.
            regime: ``"end-to-end"`` (random initial weights) or ``"fine-tuning"`` (from the float student).
            logit_loss: ``"mse"`` or ``"kl"``.
            k: number of projections, at least 1.
            affinity_weight: weight of the affinity loss, above 0.
            stages: numbers of the stages whose maps are compared, from 1 on; empty for all.
            taps: whether these maps are taken after a stage's last ReLU (``"output"``) or ``"before ReLU"``.
            losses, schedule: changes to the profile's losses and to the regime's schedule, by setting.
            updates: number of steps, in place of epochs. Warm-up keeps its share of them.
            images: number of training images, a class-balanced subset; None for all. The teacher has seen all of them.
            source: where the unlabelled images come from, see :mod:`faqd_lib.data.elsewhere`; None for the training
                split. ``images`` says how many.
            model, teacher: the student's and the teacher's network.
            seed: at least 1.

        Raises:
            ConfigurationError: an argument is unknown, out of range or without effect on the method; student and
                teacher have other numbers of stages, do not fit the dataset, or lack ReLUs to tap; there are fewer
                images than a batch has; the folder does not know the ``source``, or the images have a class for each
                pixel.
        """
        if seed < 1:
            raise ConfigurationError(f"students have seeds from 1 on (seed 0 is the teachers'), got {seed}")
        check_choice("method", method, get_args(Method), ConfigurationError)
        model = model or self.profile.student
        self._check_model("model", model)
        check_choice("regime", regime, ("end-to-end", "fine-tuning"), ConfigurationError)
        fine_tuning, taught = regime == "fine-tuning", method != "labels"
        changes = {**(losses or {}), **({} if affinity_weight is None else {"affinity_weight": affinity_weight})}
        given = {
            "logit_loss": logit_loss, "k": k, "stages": len(stages), "teacher": teacher, "taps": taps != "output",
        }  # fmt: skip
        _check_effects(method, labels, {*changes, *(name for name, value in given.items() if value)})
        if not taught:
            Losses.parse(self.profile.losses.model_dump() | changes, "losses")
        if images is not None and (isinstance(images, bool) or not isinstance(images, int) or images < 1):
            raise ConfigurationError(f"images must be a whole number of at least 1, got {images!r}")
        elsewhere = None if source is None else self._source(source, images)
        count = self.state.training_count if images is None else images
        if elsewhere is None and count > self.state.training_count:
            raise ConfigurationError(
                f"images = {images} is more than the {self.state.training_count} training images there are: lower it"
            )
        whole = elsewhere is not None or count == self.state.training_count
        data = self.state.data if whole else self.state.data.model_copy(update={"train_images": count})
        times = self.profile.fine_tuning_schedule if fine_tuning else self.profile.student_schedule
        times = Schedule.parse(times.model_dump() | dict(schedule or {}), "schedule")
        if count < times.batch_size:
            raise ConfigurationError(
                f"images = {count} is less than a batch of {times.batch_size}: take more images, or lower batch_size"
            )
        times = times if updates is None else _of_updates(times, updates, count)
        times.steps(count // times.batch_size)
        teacher_run = self.teacher(teacher, seed) if taught else None
        if AFFINITY_OF_METHOD[method] != "none":
            _check_stages(model, teacher_run.model, stages)
            _check_relus(method, taps, model, teacher_run.model)
        settings = dict(
            data=data,
            images=elsewhere,
            model=model,
            optimization=self._optimization(times),
            objective=(
                self._distillation(method, labels, fine_tuning, logit_loss, k, tuple(stages), taps, changes)
                if taught
                else self._labels_alone()
            ),
            quantization=_quantization(weight_bits, activation_bits, quantization),
            seed=seed,
            teacher=teacher_run,
            initial=self.float_student(seed, model) if fine_tuning else None,
        )
        return RunConfig.parse(settings, "student")

    def _check_model(self, setting: str, model: str) -> None:
        check_choice(setting, model, MODEL_NAMES, ConfigurationError)
        check_fits(setting, model, self.state.dataset, is_dense(self.profile.student))

    def _source(self, name: str, count: int | None) -> ImageSource:
        """The images of a source; ConfigurationError if there is no count, or the folder does not know the dataset."""
        if is_dense(self.profile.student):
            raise ConfigurationError(
                f"source = {name!r}: images of {self.state.dataset} have a class for each pixel, and their students "
                "train on the training split: leave out source"
            )
        if count is None:
            raise ConfigurationError(f"source = {name!r}: set images to the number of images from there")
        known = self.state.sources | dict.fromkeys(MADE_HERE, "") | dict.fromkeys(HALVES, self.state.data.fingerprint)
        if name not in known:
            raise ConfigurationError(
                f"source = {name!r} is not known here: choose {', '.join(known)}, or name another dataset to "
                "Suite.with_source first"
            )
        return ImageSource(name=name, fingerprint=known[name], train_images=count)

    def study_runs(self, cells: str, seed: int) -> dict[tuple[str, int], RunConfig]:
        """The runs of one seed in the cells of the profile's study, by arm and weight bits."""
        study = self.profile.study
        chosen = study.cells[cells]
        if chosen.seeds is not None and seed >= study.first_seed + chosen.seeds:
            return {}
        return {
            (name, bits): self._of_arm(study.arms[name], chosen, bits, seed)
            for name in chosen.arms
            for bits in chosen.weight_bits
        }

    def _of_arm(self, arm: Arm, cells: Cells, weight_bits: int, seed: int) -> RunConfig:
        schedule = {"epochs": arm.epochs, "learning_rate": arm.learning_rate}
        unread = _unread(arm.method, arm.labels)  # a folder of an earlier version may have such settings
        losses = {name: value for name, value in arm.losses.items() if name not in unread}
        return self.student(
            arm.method,
            labels=arm.labels,
            weight_bits=weight_bits,
            activation_bits=arm.activation_bits,
            quantization={} if arm.step_gradient is None else {"step_gradient": arm.step_gradient},
            regime=arm.regime,
            logit_loss=arm.logit_loss,
            k=None if "k" in unread else arm.k,
            stages=arm.stages,
            taps=arm.taps,
            losses=losses | ({"adapters": True} if arm.adapters else {}),
            schedule={name: value for name, value in schedule.items() if value is not None},
            updates=cells.updates,
            images=cells.images,
            source=cells.source,
            model=cells.student,
            teacher=None if arm.method == "labels" else cells.teacher,
            seed=seed,
        )

    def check_design(self) -> None:
        """Make the runs of the study's first seed.

        Raises:
            ConfigurationError: a setting of an arm has no effect, or a run cannot be; the message names the arm.
        """
        study = self.profile.study
        for name, cells in study.cells.items():
            for each in cells.arms:
                arm = study.arms[each]
                given = {*arm.losses, *(["k"] if arm.k is not None else [])}
                try:
                    _check_effects(arm.method, arm.labels, given)
                    if cells.updates is not None and arm.epochs is not None:
                        raise ConfigurationError("epochs has no effect where updates are set: leave one of them out")
                    for bits in cells.weight_bits:
                        self._of_arm(arm, cells, bits, study.first_seed)
                except ConfigurationError as error:
                    raise ConfigurationError(f"study.arms.{each} in cells.{name}: {error}") from error

    def post_training(
        self,
        weight_bits: int = FLOAT_BITS,
        activation_bits: int = FLOAT_BITS,
        *,
        seed: int = 1,
        quantization: Mapping[str, object] | None = None,
        student: RunConfig | None = None,
    ) -> RunConfig:
        """A float student quantized after training: the tables' baseline for training with quantizers.

        Weights are rounded, activation steps calibrated on one batch, and batch normalisation is estimated again on
        unlabelled batches. No weight is trained.

        Args:
            weight_bits, activation_bits, quantization: as in :meth:`student`.
            seed: of the float student.
            student: the float run whose weights are taken. None: the float student trained on labels.

        Raises:
            ConfigurationError: the bits are none that there are, or ``student`` is quantized.
        """
        student = self.float_student(seed) if student is None else student
        if student.bits != f"{FLOAT_BITS}W{FLOAT_BITS}A":
            raise ConfigurationError(f"post_training: student must be a float run, got one of {student.bits}")
        settings = dict(
            data=self.state.data,
            model=student.model,
            optimization=OptimizationConfig(
                epochs=0,
                warmup_epochs=0.0,
                batch_size=student.optimization.batch_size,
                precision=self.precision,
                batch_norm_batches=_BATCH_NORM_BATCHES,
            ),
            objective=ObjectiveConfig(label_weight=1.0),  # has no effect without training
            quantization=_quantization(weight_bits, activation_bits, quantization),
            seed=student.seed,
            initial=student,
        )
        return RunConfig.parse(settings, "post_training")

    def _on_labels(self, model: str, schedule: Schedule, seed: int) -> RunConfig:
        return RunConfig(
            data=self.state.data,
            model=model,
            optimization=self._optimization(schedule),
            objective=self._labels_alone(),
            seed=seed,
        )

    def _labels_alone(self) -> ObjectiveConfig:
        return ObjectiveConfig(label_weight=1.0, class_weights=self.profile.losses.class_weights)

    def _optimization(self, schedule: Schedule) -> OptimizationConfig:
        return OptimizationConfig(**schedule.model_dump(), precision=self.precision, compiled=self.profile.compile)

    def _distillation(
        self,
        method: Method,
        labels: bool,
        fine_tuning: bool,
        logit_loss: str | None,
        k: int | None,
        stages: tuple[int, ...],
        taps: str,
        changes: Mapping[str, object],
    ) -> ObjectiveConfig:
        losses = Losses.parse(self.profile.losses.model_dump() | dict(changes), "losses")
        affinity = AFFINITY_OF_METHOD[method]
        default_loss = losses.fine_tuning_logit_loss if fine_tuning else losses.end_to_end_logit_loss
        settings = {
            "logit_loss": "none" if method == "FA" else logit_loss or default_loss,
            "logit_weight": losses.logit_weight,
            "temperature": losses.temperature,
            "affinity": affinity,
            "affinity_weight": 0.0 if affinity == "none" else losses.affinity_weight,
            "k": losses.k if k is None else k,
            "label_weight": losses.label_weight if labels else 0.0,
            "adapters": losses.adapters and affinity != "none",
            "stages": stages,
            "class_weights": losses.class_weights if labels else "equal",
            "taps": taps,
        }
        return ObjectiveConfig.parse(settings, "student")


def _check_effects(method: str, labels: bool, given: set[str]) -> None:
    """Raise ConfigurationError if a method does not read one of the ``given`` settings of :meth:`student`."""
    if useless := sorted(given & _unread(method, labels)):
        raise ConfigurationError(f"{useless[0]} has no effect on the method {method}: leave it out")


def _unread(method: str, labels: bool) -> set[str]:
    """The settings of :meth:`student`, losses included, that a method does not read."""
    affinity, unread = AFFINITY_OF_METHOD[method], set()
    if method == "labels":
        unread |= {"teacher", "logit_loss", "taps", "stages", *Losses.model_fields}
    if not labels:
        unread |= {"label_weight", "class_weights"}
    if method == "FA":
        unread |= {"logit_loss", "logit_weight", "temperature"}
    if affinity == "none":
        unread |= {"affinity_weight", "adapters", "stages"}
    if affinity != "ffa":
        unread |= {"k"}
    return unread


def _check_stages(student: str, teacher: str, stages: Sequence[int]) -> None:
    count, others = len(stage_names(student)), len(stage_names(teacher))
    if count != others:
        raise ConfigurationError(
            f"teacher: {teacher} has {others} stages and {student} has {count}, so not every map has a partner; choose "
            "a teacher with as many stages"
        )
    if (last := max(stages, default=0)) > count:
        raise ConfigurationError(f"stages: {student} has the stages 1 to {count}, there is no stage {last}")


def _check_relus(method: str, taps: str, student: str, teacher: str) -> None:
    """Raise ConfigurationError where the maps before a stage's last ReLU, or the ReLU's levels, are not there."""
    settings = {f"taps = {taps!r}": (student, teacher)} if taps == "before ReLU" else {}
    settings |= {f"method = {method!r}": (student,)} if AFFINITY_OF_METHOD[method] == "squat" else {}
    for setting, models in settings.items():
        for model in models:
            if not ends_with_relus(model):
                fitting = ", ".join(name for name in MODEL_NAMES if ends_with_relus(name))
                raise ConfigurationError(
                    f"{setting}: no ReLU ends the stages of {model}: choose another setting, or one of {fitting}"
                )


def _of_updates(schedule: Schedule, updates: int, images: int) -> Schedule:
    """The schedule with as many steps, and with the same share of warm-up."""
    steps_per_epoch = images // schedule.batch_size
    warmup = schedule.warmup_epochs / schedule.epochs * updates / steps_per_epoch
    changes = {"epochs": -(-updates // steps_per_epoch), "updates": updates, "warmup_epochs": warmup}
    return Schedule.parse(schedule.model_dump() | changes, "schedule")


def _quantization(weights: int, activations: int, others: Mapping[str, object] | None) -> QuantizationConfig:
    settings = {"weight_bits": weights, "activation_bits": activations, **(others or {})}
    return QuantizationConfig.parse(settings, "quantization")
