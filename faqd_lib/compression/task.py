"""The fixed part of a compression: networks, pictures, bits and settings, checked and ready for training."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from ..config import Precision, QuantizationConfig
from ..data.batches import Normalizer, stream
from ..data.images import Images
from ..data.pictures import PHOTOGRAPH, PictureBatches, Pictures, PictureSet
from ..data.preprocessing import Preprocessing
from ..export.packed import check_names
from ..models import FeatureTap, stage_taps
from ..quantization.network import (
    calibrate,
    quantize,
    quantized_weights,
    reestimate_batch_norm,
    unwrapped,
    why_not_copied,
)
from ..training.learner import Learner, precision_that_pays, projection_seed
from ..training.objective import DistillationObjective
from ..utils.files import tensors_digest
from ..utils.measure import exact_kernels
from . import planning
from .measures import logits_of
from .planning import Candidate, CompressionConfig
from .teachers import check_teacher

WATCHED = 1000  # most held-out pictures that judge an epoch, and most training pictures that judge a candidate
BATCHES, SMALLEST_BATCH = 16, 16  # fewest batches of an epoch, and the size below which batches do not shrink for that
STATISTICS_BATCHES = 8  # batches that re-estimate batch normalisation


class CompressionError(ValueError):
    """A compression cannot begin or go on; the message says why and what to do."""


@dataclass(frozen=True)
class Task:
    """What does not change during a compression: networks, pictures, bits and settings."""

    teacher: nn.Module  # frozen, on the device
    initial: nn.Module  # the float network of the students
    prepared: dict[str, nn.Module]  # quantized, calibrated students before training, by bits
    widths: dict[str, QuantizationConfig]
    pictures: Pictures
    preprocessing: Preprocessing
    normalizer: Normalizer
    taps: tuple[str, ...]
    student_taps: tuple[str, ...]
    classes: tuple[str, ...]
    digests: dict[str, str]  # of teacher and student
    batch_size: int
    flip: bool
    seed: int
    precision: Precision
    device: torch.device

    @classmethod
    @exact_kernels()
    def prepare(
        cls,
        teacher: nn.Module,
        student: nn.Module | None,
        pictures: Pictures,
        preprocessing: Preprocessing,
        taps: Sequence[str] | None,
        student_taps: Sequence[str] | None,
        widths: dict[str, QuantizationConfig],
        *,
        batch_size: int | None,
        flip: bool,
        seed: int,
        precision: Precision | None,
        device: torch.device,
        classes: Sequence[str],
        affinity: bool,
        say: Callable[[str], None],
    ) -> "Task":
        """Check teacher and taps, and quantize the students; see :func:`compress`, also for errors.

        Wrappers, such as DataParallel, are taken off. No maps are compared without ``affinity``.
        """
        teacher, student = unwrapped(teacher), None if student is None else unwrapped(student)
        say("the student is " + ("a copy of the teacher" if student is None else f"a {type(student).__name__}"))
        for role, model in (("teacher", teacher), ("student", student)):
            if model is not None and (reason := why_not_copied(model)):
                raise CompressionError(f"the {role} cannot be copied: {reason}")
        initial = copy.deepcopy(teacher if student is None else student).requires_grad_(True)
        teacher = copy.deepcopy(teacher).requires_grad_(False).to(device, memory_format=torch.channels_last)
        initial = initial.to(device, memory_format=torch.channels_last)
        normalizer = preprocessing.normalizer(device)
        usual = 128 if preprocessing.image_size < PHOTOGRAPH else 32
        few = max(SMALLEST_BATCH, len(pictures.train) // BATCHES)
        wanted = min(usual, few) if batch_size is None else batch_size
        size = min(wanted, len(pictures.train))
        if size < wanted:
            say(f"there are fewer training pictures than a batch of {wanted}: a batch has {size}")
        batches = PictureBatches(pictures.train, size, seed, normalizer, flip=flip)
        example = next(batches.epoch(0)).images
        for note in check_teacher(teacher, example):
            say(note)
        count = teacher(example[:2]).shape[1]
        if classes and len(classes) != count:
            raise CompressionError(f"there are {len(classes)} names of classes, and the teacher has {count} logits")
        if not affinity:
            taps = student_taps = ()
        taps = tuple(taps) if taps is not None else _taps(teacher, example)
        if student_taps is None:
            student_taps = taps if student is None else _taps(initial.eval(), example)
        if len(taps) != len(student_taps):
            raise CompressionError(
                f"{len(taps)} maps of the teacher ({', '.join(taps)}) cannot be compared with "
                f"{len(student_taps)} of the student ({', '.join(student_taps)}): give taps and student_taps"
            )
        say(
            f"maps compared: {', '.join(taps) or 'none'}"
            + (f" with {', '.join(student_taps)}" if student_taps != taps else "")
        )
        for model, names in ((teacher, taps), (initial.eval(), student_taps)) if affinity else ():
            _check_taps(model, names, example[:2])
        prepared = {}
        for bits, width in widths.items():
            model = quantize(copy.deepcopy(initial), **width.quantize_arguments)
            check_names(model, quantized_weights(model))
            calibrate(model, example)
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout may draw
                torch.manual_seed(stream(seed, "statistics").initial_seed())
                reestimate_batch_norm(model, (batch.images for batch in islice(batches.epoch(0), STATISTICS_BATCHES)))
            prepared[bits] = model
        return cls(
            teacher, initial, prepared, widths, pictures, preprocessing, normalizer, taps, tuple(student_taps),
            tuple(classes),
            {"teacher": _digest(teacher), "student": _digest(initial)}, size, flip, seed,
            precision or precision_that_pays(device), device,
        )  # fmt: skip

    @property
    def settings(self) -> dict[str, Any]:
        """What the numbers depend on, as JSON values."""
        return {
            **self.digests,
            "pictures": self.pictures.train.fingerprint,
            "held_out_pictures": self.pictures.held_out.fingerprint,
            "bits": {bits: width.model_dump(mode="json") for bits, width in self.widths.items()},
            "taps": list(self.taps),
            "student_taps": list(self.student_taps),
            "mean": list(self.preprocessing.mean),
            "std": list(self.preprocessing.std),
            **self.preprocessing.geometry,
            "batch_size": self.batch_size,
            "flip": self.flip,
            "seed": self.seed,
            "precision": self.precision,
        }

    def batches(self, pictures: PictureSet) -> PictureBatches:
        """Training batches of ``pictures``, at most as large as the task's."""
        return PictureBatches(pictures, min(self.batch_size, len(pictures)), self.seed, self.normalizer, flip=self.flip)

    def learner(self, candidate: Candidate, updates: int, batches: PictureBatches) -> Learner:
        """A student before its first step."""
        config = CompressionConfig(
            optimization=planning.optimization(
                updates, len(batches), batches.batch_size, candidate.learning_rate, self.precision
            ),
            objective=planning.objective(candidate.affinity_weight),
            quantization=self.widths[candidate.bits],
            seed=self.seed,
            teacher=self.digests["teacher"],
            student=self.digests["student"],
            pictures=batches.pictures.fingerprint,
            mean=tuple(self.preprocessing.mean),
            std=tuple(self.preprocessing.std),
            taps=self.taps,
            student_taps=self.student_taps,
            flip=self.flip,
        )
        objective = DistillationObjective(
            **config.objective.model_dump(exclude={"adapters", "stages", "affinity_recipe"}),
            seed=projection_seed(self.seed),
        )
        model = copy.deepcopy(self.prepared[candidate.bits])
        return Learner(config, model, objective.to(self.device), self.student_taps, len(batches))

    def watched(self, pictures: PictureSet) -> Images:
        """At most :data:`WATCHED` of ``pictures``, labelled by the teacher."""
        some = thinned(pictures, WATCHED)
        return Images(some[:], logits_of(self.teacher, some, self.normalizer).argmax(1))


def thinned(pictures: PictureSet, most: int) -> PictureSet:
    """At most ``most`` pictures, evenly spread over a set."""
    step = -(-len(pictures) // most)
    return replace(pictures, indices=pictures.indices[::step])


def _taps(model: nn.Module, example: torch.Tensor) -> tuple[str, ...]:
    """The network's own ``feature_names``, else those that :func:`stage_taps` finds; CompressionError without any."""
    try:
        return tuple(getattr(model, "feature_names", None) or stage_taps(model, example[:2]))
    except ValueError as error:
        raise CompressionError(f"{error}. With affinity_weight=0 logits alone are compared") from error


@torch.no_grad()
def _check_taps(model: nn.Module, names: Sequence[str], images: torch.Tensor) -> None:
    """Raise CompressionError if a name is no module's, or the module returns no map."""
    try:
        with FeatureTap(model, names) as tap:
            model(images)
        tap.features  # noqa: B018 (raises for maps that were overwritten)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CompressionError(f"maps of {type(model).__name__} cannot be compared: {error}") from error


def _digest(model: nn.Module) -> str:
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return tensors_digest(tensors, salt=str(model))
