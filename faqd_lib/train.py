"""The training loop, for teachers and students alike.

Networks that share data, seed, batch size, epochs and teacher train side by side as a cohort: one augmentation and one
teacher pass for all, and paired comparisons on the same batches. A network's weights are the same bits whether it
trains alone or in a cohort: its initial weights, optimizer and random projections are its own.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from .batches import Batches, Normalizer, stream
from .config import OptimizationConfig, RunConfig
from .data import Images
from .distill import DistillationObjective
from .measure import Stopwatch, exact_kernels, peak_bytes
from .models import FeatureTap
from .quantize import blend, split_parameters

CHECK_EVERY = {"cpu": 1}  # steps between looks at the loss; elsewhere a look waits for the device
CHECK_EVERY_ELSEWHERE = 50


class NonFiniteLossError(ArithmeticError):
    """A loss became NaN or infinite; the message gives epoch, step and every term of the loss."""


def learning_rate(config: OptimizationConfig, step: int, steps_per_epoch: int) -> float:
    """Rate of a step (from 0): linear warm-up, then half a cosine that ends at 0 after the last step."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    total = config.epochs * steps_per_epoch
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def precision_that_pays(device: torch.device | str) -> str:
    """``"bf16"`` where the hardware computes in it, else ``"float32"`` (emulated bf16 is many times slower)."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # Builds without oneDNN do not even have the question.
    return (
        "bf16" if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    )


class Learner:
    """One network in training: weights, optimizer, objective and history."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        objective: DistillationObjective,
        feature_names: Sequence[str],
        steps_per_epoch: int,
    ) -> None:
        self.config, self.model, self.objective = config, model, objective
        self.steps_per_epoch = steps_per_epoch
        self.tap = FeatureTap(model, feature_names if objective.affinity_weight > 0 else ())
        weights, activation_steps = split_parameters(model)
        self.parameters = [*weights, *activation_steps, *objective.parameters()]
        o = config.optimization
        self.optimizer = torch.optim.SGD(
            [
                {"params": [*weights, *objective.parameters()]},
                {"params": activation_steps, "weight_decay": 0.0},  # decay would shrink the clipping range
            ],
            lr=o.learning_rate,
            momentum=o.momentum,
            nesterov=o.momentum > 0,
            weight_decay=o.weight_decay,
        )
        self.history: list[dict[str, float]] = []
        self.steps = 0
        self.watch = Stopwatch(next(model.parameters()).device)
        self.peak_bytes = 0
        self._terms: list[dict[str, torch.Tensor]] = []
        self._checked = 0

    def step(
        self,
        epoch: int,
        images: torch.Tensor,
        labels: torch.Tensor | None,
        teacher_logits: torch.Tensor | None,
        teacher_maps: Sequence[torch.Tensor],
    ) -> None:
        """One update; the peak memory of the first one is measured."""
        self.watch.start()
        if self.steps:
            self._update(epoch, images, labels, teacher_logits, teacher_maps)
        else:
            self.peak_bytes = peak_bytes(
                lambda: self._update(epoch, images, labels, teacher_logits, teacher_maps), images.device
            )
        self.watch.stop()
        self.steps += 1

    def _update(self, epoch, images, labels, teacher_logits, teacher_maps) -> None:
        o = self.config.optimization
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(o, self.steps, self.steps_per_epoch)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=o.precision == "bf16"):
            logits = self.model(images)
            terms = self.objective(logits, self.tap.features, teacher_logits, teacher_maps, labels)
        self.optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        terms["gradient_norm"] = nn.utils.clip_grad_norm_(self.parameters, o.clip_norm)
        self._terms.append({name: term.detach() for name, term in terms.items()})
        if len(self._terms) - self._checked >= CHECK_EVERY.get(images.device.type, CHECK_EVERY_ELSEWHERE):
            self._check(epoch)
        blend(self.model, self.config.quantization.blending)
        self.optimizer.step()
        self.tap.clear()

    def _check(self, epoch: int) -> None:
        for offset, terms in enumerate(self._terms[self._checked :], start=self._checked):
            values = {name: float(term) for name, term in terms.items()}
            if not all(map(math.isfinite, values.values())):
                listed = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
                raise NonFiniteLossError(
                    f"{self.config.run_id}: the loss is not finite in epoch {epoch + 1}, step {offset + 1} of "
                    f"{self.steps_per_epoch} ({listed}). Lower the learning rate or the weight of the largest term."
                )
        self._checked = len(self._terms)

    def end_epoch(self, epoch: int, evaluations: dict[str, tuple[float, float]]) -> None:
        """Append the epoch's mean loss terms and its evaluations (accuracy in percent, cross-entropy)."""
        self._check(epoch)
        row: dict[str, float] = {"epoch": epoch + 1}
        for name in self._terms[0] if self._terms else ():
            row[name if name != "total" else "loss"] = float(torch.stack([t[name] for t in self._terms]).mean())
        for split, (accuracy, cross_entropy) in evaluations.items():
            if not math.isfinite(cross_entropy):
                raise NonFiniteLossError(
                    f"{self.config.run_id}: the {split} cross-entropy after epoch {epoch + 1} is {cross_entropy}, "
                    "though no training loss was: the weights left the range of float32. Lower the learning rate."
                )
            row[f"{split}_accuracy"], row[f"{split}_cross_entropy"] = accuracy, cross_entropy
        self.history.append(row)
        self.watch.read()  # once an epoch the host waits for the device anyway
        self._terms.clear()
        self._checked = 0


@exact_kernels()
@torch.no_grad()
def evaluate(model: nn.Module, images: Images, normalizer: Normalizer, batch_size: int = 500) -> tuple[float, float]:
    """(top-1 accuracy in percent, mean cross-entropy) in float32, with the weights as they are now."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    correct, loss = 0, 0.0
    for start in range(0, len(images), batch_size):
        pixels = images.pixels[start : start + batch_size].to(device)
        labels = images.labels[start : start + batch_size].to(device)
        logits = model(normalizer(pixels)).float()
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    model.train(was_training)
    return 100 * correct / len(images), loss / len(images)


@dataclass(frozen=True)
class Trained:
    """A finished run: the network in evaluation mode, its history and what it cost."""

    config: RunConfig
    model: nn.Module
    history: list[dict[str, float]]
    cost: dict[str, float]


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
) -> CohortResult:
    """Train a cohort to the end.

    Args:
        learners: at least one; all with the same epochs, batch size and seed. If ``batches`` has no labels, theirs
            must be label-free objectives.
        batches: the training batches that all of them see.
        teacher: in evaluation mode and frozen; None if no learner needs one.
        feature_names: modules of the teacher to tap; the students' own were given to them.
        splits: what to evaluate after each epoch, by name; labelled.
        on_epoch: called after every epoch with its number (from 0) and the learners still in training.

    Returns:
        A learner whose loss stops being finite is reported as failed; the others go on undisturbed.
    """
    result, active = CohortResult(), list(learners)

    def attempt(learner: Learner, action: Callable[..., None], *arguments: object) -> None:
        try:
            action(*arguments)
        except NonFiniteLossError as error:
            result.failed[learner.config.run_id] = error
            active.remove(learner)

    shared, sharers = Stopwatch(batches.device), []  # making batches and the teacher's pass, shared by so many
    wants_maps = any(learner.objective.affinity_weight > 0 for learner in learners)
    teaches = _Teacher(teacher, feature_names if wants_maps else (), learners[0].config.optimization.precision)
    for learner in learners:
        learner.model.train()

    def end_epoch(epoch: int) -> None:
        for learner in list(active):
            scores = {name: evaluate(learner.model, images, batches.normalizer) for name, images in splits.items()}
            attempt(learner, learner.end_epoch, epoch, scores)

    epochs = learners[0].config.optimization.epochs
    if epochs == 0:  # quantized after training: there is nothing to do but to look
        end_epoch(-1)
        on_epoch(-1, active)
    for epoch in range(epochs):
        shared.start()
        for batch in batches.epoch(epoch):
            teacher_logits, teacher_maps = teaches(batch.images)
            shared.stop()
            sharers.append(max(1, len(active)))
            for learner in list(active):
                labels = None if learner.config.label_free else batch.labels
                attempt(learner, learner.step, epoch, batch.images, labels, teacher_logits, teacher_maps)
            shared.start()
        end_epoch(epoch)
        shared.read()
        if not active:
            break
        on_epoch(epoch, active)
    teaches.close()
    share = sum(seconds / count for seconds, count in zip(shared.read(), sharers, strict=True))
    result.trained = [_finish(learner, batches.batch_size, len(learners), share) for learner in active]
    return result


class _Teacher:
    """The one pass through the teacher that a whole cohort shares; without a teacher, nothing."""

    def __init__(self, model: nn.Module | None, feature_names: Sequence[str], precision: str) -> None:
        self.model, self.precision = model, precision
        self.tap = None if model is None else FeatureTap(model.eval(), feature_names)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        if self.model is None:
            return None, []
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.model(images)
        maps = self.tap.features
        self.tap.clear()
        return logits, maps

    def close(self) -> None:
        if self.tap is not None:
            self.tap.close()


def _finish(learner: Learner, batch_size: int, cohort: int, shared_seconds: float) -> Trained:
    learner.tap.close()
    every = learner.watch.read()
    measured = every[1:] or every  # the first step carries the memory measurement
    own = sum(measured)
    cost = {
        "training_seconds": own / max(1, len(measured)) * len(every) + shared_seconds,
        "shared_seconds": shared_seconds,
        "step_milliseconds": 1000 * statistics.median(measured) if measured else 0.0,
        "images_per_second": batch_size * len(measured) / own if measured else 0.0,
        "peak_step_bytes": learner.peak_bytes,
        "cohort": cohort,
    }
    return Trained(learner.config, learner.model.eval(), learner.history, cost)


def projection_seed(seed: int) -> int:
    """Seed of a run's random projections: a stream of its own."""
    return stream(seed, "projections").initial_seed()
