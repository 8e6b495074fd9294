"""The training loop, for teachers and students alike.

Networks that share data, seed, batch size, epochs and teacher train side by side as a cohort. One augmentation and one
teacher pass serve all, and comparisons are paired on the same batches. Initial weights, optimizer and random
projections belong to each network. Its weights therefore are the same bits alone and in a cohort. They are also the
same after a checkpoint, at whichever step the checkpoint and the rest of the cohort are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from ..config import OptimizationConfig, Precision
from ..data.batches import Batch, Batches, Normalizer
from ..data.images import Images
from ..models import FeatureTap
from ..utils.measure import exact_kernels
from .clock import CohortClock
from .compile import compile_network
from .cuda_graphs import RecordedStep, Recorder, StudentStreams, own_stream
from .learner import Evaluation, Learner, TeacherOutput
from .loss_log import NonFiniteLossError
from .segmentation import DenseEvaluation, dense_evaluation, measure

EVALUATED_PIXELS = 2500 * 32**2  # pixels of a batch: many, because each launch of a kernel costs time on a GPU


@exact_kernels()
@torch.no_grad()
def evaluate(
    model: nn.Module, images: Images, normalizer: Normalizer, batch_size: int = 0
) -> Evaluation | DenseEvaluation:
    """Classify labelled images, or their pixels, in float32 with the present weights.

    ``batch_size`` 0 chooses one for the device.
    """
    device = next(model.parameters()).device
    if not batch_size:
        batch_size = max(1, EVALUATED_PIXELS // images.pixels.shape[2:].numel())
        batch_size = min(500, batch_size) if device.type == "cpu" else batch_size
    was_training = model.training
    model.eval()
    # In float32, cuDNN computes convolutions several times faster without channels-last weights.
    weights = {name: tensor.contiguous() for name, tensor in model.named_parameters()} if device.type == "cuda" else {}
    loss, predictions, log_probabilities = torch.zeros((), dtype=torch.float64, device=device), [], []
    measured = []
    for pixels, labels in zip(images.pixels.split(batch_size), images.labels.split(batch_size), strict=True):
        batch, labels = normalizer(pixels.to(device)), labels.to(device)
        logits = (functional_call(model, weights, batch.contiguous()) if weights else model(batch)).float()
        if images.is_dense:
            measured.append(measure(logits, labels))
            continue
        predictions.append(logits.argmax(1))
        log_probabilities.append(-F.cross_entropy(logits, labels, reduction="none"))
        loss += F.cross_entropy(logits, labels, reduction="sum")
    model.train(was_training)
    if images.is_dense:
        return dense_evaluation(measured)
    predicted, log_probability = torch.cat(predictions).cpu(), torch.cat(log_probabilities).cpu()
    correct = int((predicted == images.labels.cpu()).sum())
    return Evaluation(100 * correct / len(images), float(loss) / len(images), predicted, log_probability)


class OutOfTimeError(RuntimeError):
    """The time that a caller set was up before a cohort was finished; its checkpoints are written."""


class CohortResult(NamedTuple):
    """Finished learners with networks in evaluation mode, and the errors of all others by the name of the run."""

    trained: list[Learner]
    failed: dict[str, NonFiniteLossError]


@exact_kernels()
def train(
    learners: Sequence[Learner],
    batches: Batches,
    teacher: nn.Module | None,
    feature_names: Sequence[str],
    splits: Mapping[str, Images],
    on_epoch: Callable[[int, list[Learner]], None] = lambda epoch, learners: None,
    checkpoint_due: Callable[[], bool] = lambda: False,
    checkpoint: Callable[[Learner], None] = lambda learner: None,
    on_batch: Callable[[int, int], None] = lambda epoch, done: None,
    cuda_graphs: bool = True,
    evaluate_every: int = 1,
    time_is_up: Callable[[], bool] = lambda: False,
) -> CohortResult:
    """Train a cohort to the end.

    Args:
        learners: at least one; all with the same epochs, updates, batch size and seed, at any step. Where ``batches``
            has no labels, every objective must be label-free. Label-free learners are not given labels.
        batches: the training batches that all of them see.
        teacher: in evaluation mode and frozen; None if no learner needs one.
        feature_names: modules of the teacher to tap. Each learner knows its own.
        splits: labelled images to evaluate, by name. One name is ``"test"``.
        on_epoch: called after every epoch with its number (from 0) and the learners that have just finished it.
        on_batch: called after every batch with the epoch (from 0) and the number of batches done in it.
        checkpoint_due: asked after every batch whether to call ``checkpoint`` for each learner in training.
        time_is_up: asked after every batch whether to stop.
        cuda_graphs: whether steps on CUDA are recorded and replayed, with the same bits.
        evaluate_every: epochs from one evaluation to the next. The last epoch is always evaluated.

    Raises:
        OutOfTimeError: time was up. ``checkpoint`` was called for each learner in training.

    Returns:
        Finished learners, and those whose loss stopped being finite, which do not disturb the others.
    """
    with (
        own_stream(batches.device),
        closing(Cohort(learners, teacher, feature_names, batches.device, cuda_graphs=cuda_graphs)) as cohort,
    ):

        def evaluated(learner: Learner) -> dict[str, Evaluation | DenseEvaluation]:
            return {name: evaluate(learner.model, images, batches.normalizer) for name, images in splits.items()}

        def end_epoch(epoch: int) -> None:
            cohort.clock.settle()
            ending = [learner for learner in cohort.active if learner.position(epoch) is not None]
            due = (epoch + 1) % evaluate_every == 0 or epoch + 1 >= epochs
            for learner in ending:
                with cohort.excluding(learner):
                    learner.end_epoch(epoch, evaluated(learner) if due else {})
            if finished := [learner for learner in ending if learner in cohort.active]:
                on_epoch(epoch, finished)

        optimization = learners[0].config.optimization
        epochs, steps = optimization.epochs, optimization.steps(len(batches))
        if epochs == 0:  # quantized after training: evaluated only
            end_epoch(-1)
        for epoch in range(min(len(learner.history) for learner in learners), epochs):
            # Learners that go on from checkpoints may be at different batches of the epoch.
            places = (at for learner in cohort.active if (at := learner.position(epoch)) is not None)
            first = min(places, default=len(batches))
            left = islice(batches.epoch(epoch, first), max(0, steps - epoch * len(batches) - first))
            for index, batch in enumerate(cohort.clock.timed(left), start=first):
                cohort.step(epoch, batch, [one for one in cohort.active if one.position(epoch) == index])
                if not cohort.active:
                    break
                on_batch(epoch, index + 1)
                stopping = time_is_up()
                if stopping or checkpoint_due():
                    cohort.clock.settle()
                    for learner in cohort.active:
                        checkpoint(learner)
                if stopping:
                    raise OutOfTimeError("time was up; call again to go on from the checkpoints")
            if not cohort.active:
                break
            end_epoch(epoch)
        for learner in cohort.active:
            if learner.tested is None:  # the checkpoint was taken after the last epoch
                learner.tested = evaluated(learner)["test"]
            measured = {"peak_step_bytes": learner.peak_bytes, "cohort": len(learners)}
            learner.cost = learner.clock.cost(batches.batch_size) | measured
            learner.model.eval()
        return CohortResult(cohort.active, cohort.failed)


class Cohort:
    """Learners side by side on the same batches, with one teacher pass and one clock for all.

    Args:
        learners, teacher, feature_names, cuda_graphs: see :func:`train`.
        device: of everything; on CUDA use a cohort within one :func:`~faqd_lib.training.cuda_graphs.own_stream`.
        optimization: the learners'; needed where there is no learner.
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
        optimization = optimization or learners[0].config.optimization
        self._recorder = Recorder(device) if cuda_graphs and device.type == "cuda" else None
        # The maps of a compiled teacher are always taken: its logits' last digits depend on which outputs it has.
        wants_maps = optimization.compiled or any(learner.objective.affinity_weight > 0 for learner in learners)
        self.teacher = TeacherPass(
            teacher, feature_names if wants_maps else (), optimization.precision, optimization.compiled, self._recorder
        )
        self.clock = CohortClock(device)
        self._streams = StudentStreams(device, len(learners))
        for learner in learners:
            learner.model.train()
            learner.record_with(self._recorder)

    def step(self, epoch: int, batch: Batch, learners: Sequence[Learner]) -> None:
        """One step of each of ``learners``; one whose loss is not finite leaves the active ones."""
        self.clock.teacher.start()  # for all students: the copy to where a recording reads, and the teacher's pass
        if self._recorder is not None:
            batch = self._recorder.placed(batch)
        teacher = self.teacher(batch.images)
        self.clock.teacher.stop(counts=not self.teacher.is_preparing)
        self.clock.share([learner.clock for learner in learners])
        self.clock.students.start()
        unlabelled = Batch(batch.images, None)
        for learner in learners:
            seen = unlabelled if learner.config.label_free else batch
            with self._streams.of(self._learners.index(learner)), self.excluding(learner):
                learner.advance(epoch, seen, teacher)
        self._streams.join()
        self.clock.students.stop(counts=not any(learner.is_preparing for learner in learners))

    def close(self) -> None:
        """Take the hooks off the networks and free the recordings. No step is possible afterwards."""
        self._streams.join()
        self.teacher.close()
        for learner in self._learners:
            learner.close()

    @contextmanager
    def excluding(self, learner: Learner) -> Iterator[None]:
        """Take a learner out of the active ones if its numbers stop being finite within the context."""
        try:
            yield
        except NonFiniteLossError as error:
            self.failed[learner.config.run_id] = error
            self.active.remove(learner)


class TeacherPass:
    """The one pass through the teacher that a whole cohort shares; without a teacher, no output."""

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
        self._network = compile_network(model, training=False) if compile_it and model is not None else model
        self._recorded_pass = RecordedStep(self._pass, recorder)

    @property
    def is_preparing(self) -> bool:
        """Whether the last pass was one of the first, which take longer than all others."""
        return self._network is not None and self._recorded_pass.is_preparing

    def __call__(self, images: torch.Tensor) -> TeacherOutput:
        """Logits and tapped maps of a batch; a recorded pass returns the same tensors each time."""
        return TeacherOutput() if self._network is None else self._recorded_pass(images)

    @torch.no_grad()
    def _pass(self, images: torch.Tensor) -> TeacherOutput:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self._network(images)
        output = TeacherOutput(logits, self.tap.features)
        self.tap.clear()
        return output

    def close(self) -> None:
        """Take the hooks off the teacher and free the recording."""
        if self.tap is not None:
            self.tap.close()
        self._recorded_pass.release()
