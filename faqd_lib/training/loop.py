"""The training loop, for teachers and students alike.

Networks that share data, seed, batch size, epochs and teacher train side by side as a cohort: one augmentation and one
teacher pass for all, and paired comparisons on the same batches. A network's weights are the same bits whether it
trains alone or in a cohort: its initial weights, optimizer and random projections are its own. The same holds when it
goes on from :meth:`Learner.state`, wherever in an epoch that was taken and wherever the others of its cohort are.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ..config import OptimizationConfig, Precision, RunConfig
from ..data.batches import Batch, Batches, Normalizer
from ..data.datasets import Images
from ..models import FeatureTap
from ..utils.measure import Stopwatch, exact_kernels
from .compile import compiled
from .cuda_graphs import RecordedStep, Recorder, StudentStreams, own_stream
from .learner import Evaluation, Learner, NonFiniteLossError

EVALUATED_PIXELS = 2500 * 32**2  # in a batch on a GPU: many, for every batch has its price in launches


@exact_kernels()
@torch.no_grad()
def evaluate(model: nn.Module, images: Images, normalizer: Normalizer, batch_size: int = 0) -> Evaluation:
    """Look at labelled images, in float32, with the weights as they are now; ``batch_size`` 0 for the device's own."""
    device = next(model.parameters()).device
    if not batch_size:
        height, width = images.pixels.shape[2:]
        batch_size = 500 if device.type == "cpu" else max(1, EVALUATED_PIXELS // (height * width))
    was_training = model.training
    model.eval()
    loss, predictions = torch.zeros((), dtype=torch.float64, device=device), []
    for start in range(0, len(images), batch_size):
        pixels = images.pixels[start : start + batch_size].to(device)
        labels = images.labels[start : start + batch_size].to(device)
        logits = model(normalizer(pixels)).float()
        predictions.append(logits.argmax(1))
        loss += F.cross_entropy(logits, labels, reduction="sum")
    model.train(was_training)
    predicted = torch.cat(predictions).cpu()
    correct = int((predicted == images.labels.cpu()).sum())
    return Evaluation(100 * correct / len(images), float(loss) / len(images), predicted)


@dataclass(frozen=True)
class Trained:
    """A finished run: the network in evaluation mode, its history, what it cost, which class it took every test image
    for, and what its record has to say of compiled kernels."""

    config: RunConfig
    model: nn.Module
    history: list[dict[str, float]]
    cost: dict[str, float]
    predictions: torch.Tensor
    kernels: dict[str, str]


@dataclass
class CohortResult:
    """What a cohort came to: finished runs, and by run the error that stopped the others."""

    trained: list[Trained] = field(default_factory=list)
    failed: dict[str, NonFiniteLossError] = field(default_factory=dict)


@exact_kernels()
def train(
    learners: Sequence[Learner],
    batches: Batches,
    teacher: nn.Module | None,
    feature_names: Sequence[str],
    splits: dict[str, Images],
    on_epoch: Callable[[int, list[Learner]], None] = lambda epoch, learners: None,
    checkpoint_due: Callable[[], bool] = lambda: False,
    checkpoint: Callable[[Learner], None] = lambda learner: None,
    on_batch: Callable[[int, int], None] = lambda epoch, done: None,
    cuda_graphs: bool = True,
) -> CohortResult:
    """Train a cohort to the end.

    Args:
        learners: at least one; all with the same epochs, batch size and seed, wherever they are in training. If
            ``batches`` has no labels, theirs must be label-free objectives.
        batches: the training batches that all of them see.
        teacher: in evaluation mode and frozen; None if no learner needs one.
        feature_names: modules of the teacher to tap; the students' own were given to them.
        splits: what to evaluate after each epoch, by name; labelled. One of them is ``"test"``.
        on_epoch: called after every epoch with its number (from 0) and the learners that have just finished it.
        on_batch: called after every batch with the epoch (from 0) and how many of its batches are done.
        checkpoint_due: asked after every batch whether ``checkpoint`` is to be called, for each learner in training.
        cuda_graphs: whether steps on CUDA are recorded and replayed, with the same bits
            (:mod:`faqd_lib.training.cuda_graphs`).

    Returns:
        A learner whose loss stops being finite is reported as failed; the others go on undisturbed.
    """
    with (
        own_stream(batches.device),
        closing(Cohort(learners, teacher, feature_names, batches.device, cuda_graphs=cuda_graphs)) as cohort,
    ):

        def evaluated(learner: Learner) -> dict[str, Evaluation]:
            return {name: evaluate(learner.model, images, batches.normalizer) for name, images in splits.items()}

        def end_epoch(epoch: int) -> None:
            cohort.shared.settle()
            ending = [learner for learner in cohort.active if learner.position(epoch) is not None]
            for learner in ending:
                cohort.attempt(learner, learner.end_epoch, epoch, evaluated(learner))
            if finished := [learner for learner in ending if learner in cohort.active]:
                on_epoch(epoch, finished)

        epochs = learners[0].config.optimization.epochs
        if epochs == 0:  # quantized after training: there is nothing to do but to look
            end_epoch(-1)
        for epoch in range(min(len(learner.history) for learner in learners), epochs):
            # Who goes on from a checkpoint may be elsewhere in the epoch than the others.
            places = (at for learner in cohort.active if (at := learner.position(epoch)) is not None)
            first = min(places, default=len(batches))
            for index, batch in enumerate(cohort.placed(batches.epoch(epoch, first)), start=first):
                cohort.step(epoch, batch, [one for one in cohort.active if one.position(epoch) == index])
                if not cohort.active:
                    break
                on_batch(epoch, index + 1)
                if checkpoint_due():
                    cohort.shared.settle()
                    for learner in cohort.active:
                        checkpoint(learner)
            if not cohort.active:
                break
            end_epoch(epoch)
        for learner in cohort.active:
            if learner.predictions is None:  # its checkpoint was that of a finished training
                learner.predictions = evaluated(learner)["test"].predictions
        trained = [_finish(learner, batches.batch_size, len(learners)) for learner in cohort.active]
        return CohortResult(trained, cohort.failed)


class Cohort:
    """Learners side by side on the same batches, and what they share: batches, the teacher's pass, the clock.

    Args:
        learners: with the same epochs, batch size and seed.
        teacher, feature_names: see :func:`train`.
        device: of all of it; on CUDA, to be used in one :func:`~faqd_lib.training.cuda_graphs.own_stream`.
        optimization: the learners'; needed where there are none.
        cuda_graphs: whether steps on CUDA are recorded and replayed.
    """

    def __init__(
        self,
        learners: Sequence[Learner],
        teacher: nn.Module | None,
        feature_names: Sequence[str],
        device: torch.device,
        *,
        optimization: OptimizationConfig | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        self._learners, self.active, self.failed = list(learners), list(learners), {}
        o = optimization or learners[0].config.optimization
        self._recorder = Recorder(device) if cuda_graphs and device.type == "cuda" else None
        # A compiled teacher's maps are always taken: what is fused, and so its logits' last digits, depends on what is
        # asked of it.
        wants_maps = o.compiled or any(learner.objective.affinity_weight > 0 for learner in learners)
        names = feature_names if wants_maps else ()
        self.teaches = TeacherPass(teacher, names, o.precision, o.compiled, self._recorder)
        self.shared = _SharedCost(device)
        self._lanes = StudentStreams(device, len(learners))
        self._lane_of = {id(one): i for i, one in enumerate(learners)}
        for learner in learners:
            learner.model.train()
            learner.record_with(self._recorder)

    def placed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, where the steps look for them; the time to make them is taken."""
        self.shared.data.start()
        for batch in batches:
            ready = batch if self._recorder is None else self._recorder.placed(batch)
            self.shared.data.stop()
            yield ready
            self.shared.data.start()

    def step(self, epoch: int, batch: Batch, learners: Sequence[Learner]) -> None:
        """One step of those for whose turn it is; who fails is active no longer."""
        self.shared.teacher.start()
        teacher_logits, teacher_maps = self.teaches(batch.images)
        self.shared.teacher.stop(counts=not self.teaches.is_preparing)
        self.shared.sharers.append(list(learners))
        self.shared.students.start()
        for learner in learners:
            labels = None if learner.config.label_free else batch.labels
            with self._lanes.lane(self._lane_of[id(learner)]):
                self.attempt(learner, learner.step, epoch, batch.images, labels, teacher_logits, teacher_maps)
        self._lanes.join()
        self.shared.students.stop(counts=not any(learner.is_preparing for learner in learners))

    def close(self) -> None:
        """Take the hooks off the networks and free what was recorded; there are no steps any more."""
        self._lanes.join()
        self.teaches.close()
        for learner in self._learners:
            learner.close()

    def attempt(self, learner: Learner, action: Callable[..., None], *arguments: object) -> None:
        """Do something of a learner's; if its numbers are not finite any more, it is out."""
        try:
            action(*arguments)
        except NonFiniteLossError as error:
            self.failed[learner.config.run_id] = error
            self.active.remove(learner)


class _SharedCost:
    """What making the batches and the teacher's pass take, shared evenly among those who use them.

    Students that compute at the same time, on CUDA, take longer each than they would alone: of the time they take
    together, each has the part that it has of the sum.
    """

    def __init__(self, device: torch.device) -> None:
        self.data, self.teacher, self.students = Stopwatch(device), Stopwatch(device), Stopwatch(device)
        self.sharers: list[list[Learner]] = []  # for each batch
        self._overlapping = device.type == "cuda"

    def settle(self) -> None:
        teacher = counted(self.teacher.read())
        usual = statistics.median(teacher) if teacher else 0.0  # in the place of a pass that took its compiling, too
        for data, seconds, sharers in zip(self.data.read(), self.teacher.seconds, self.sharers, strict=True):
            for learner in sharers:
                learner.data_seconds += data / len(sharers)
                learner.teacher_seconds += (usual if math.isnan(seconds) else seconds) / len(sharers)
        together = sum(counted(self.students.read()))
        learners = {id(learner): learner for sharers in self.sharers for learner in sharers}.values()
        if self._overlapping and (apart := sum(learner.unsettled() for learner in learners)) > 0:
            for learner in learners:
                learner.settle(min(1.0, together / apart))
        for watch in (self.data, self.teacher, self.students):
            watch.seconds.clear()
        self.sharers.clear()


class TeacherPass:
    """The one pass through the teacher that a whole cohort shares; without a teacher, nothing."""

    def __init__(
        self,
        model: nn.Module | None,
        feature_names: Sequence[str],
        precision: Precision,
        compile_it: bool = False,
        recorder: Recorder | None = None,
    ) -> None:
        self.precision = precision
        self.tap = None if model is None else FeatureTap(model.eval(), feature_names)
        self._network = compiled(model, training=False) if compile_it and model is not None else model
        self._pieces = RecordedStep(self._pass, recorder=recorder)
        self._images: torch.Tensor | None = None
        self._result: tuple[torch.Tensor | None, list[torch.Tensor]] = None, []

    @property
    def is_preparing(self) -> bool:
        """Whether the last pass was one of the first, which take longer than all others."""
        return self._network is not None and self._pieces.is_preparing

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Logits and tapped maps of a batch."""
        if self._network is None:
            return None, []
        self._images = images
        self._pieces.begin([images])
        self._pieces.run(0)
        if self._pieces.are_replayed:
            return self._result
        result, self._result = self._result, (None, [])  # or the last batch's maps would live beside the next one's
        return result

    @torch.no_grad()
    def _pass(self) -> None:
        with torch.autocast(self._images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self._network(self._images)
        self._result = logits, self.tap.features
        self.tap.clear()

    def close(self) -> None:
        if self.tap is not None:
            self.tap.close()
        self._pieces.release()


def counted(seconds: Iterable[float]) -> list[float]:
    """Those durations that count: see :meth:`~faqd_lib.utils.measure.Stopwatch.stop`."""
    return [each for each in seconds if not math.isnan(each)]


def _finish(learner: Learner, batch_size: int, cohort: int) -> Trained:
    every = learner.watch.read()
    measured = counted(every)
    own = sum(measured)
    shared = learner.data_seconds + learner.teacher_seconds
    cost = {
        "training_seconds": own / max(1, len(measured)) * len(every) + shared,
        "shared_seconds": shared,
        "data_seconds": learner.data_seconds,
        "teacher_seconds": learner.teacher_seconds,
        "loss_seconds": sum(learner.loss_watch.read()),
        "step_milliseconds": 1000 * statistics.median(measured) if measured else 0.0,
        "images_per_second": batch_size * len(measured) / own if measured else 0.0,
        "peak_step_bytes": learner.peak_bytes,
        "cohort": cohort,
    }
    return Trained(learner.config, learner.model.eval(), learner.history, cost, learner.predictions, learner.kernels)
