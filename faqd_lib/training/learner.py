"""One network in training: its steps, its history, and the state from which it goes on with the same bits."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config import OptimizationConfig, RunConfig
from ..data.batches import stream
from ..models import FeatureTap
from ..quantization.network import blend, compile_activations, split_parameters
from ..utils.measure import Stopwatch, peak_bytes
from .compile import compiled
from .cuda_graphs import RecordedStep, Recorder
from .objective import DistillationObjective

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


def projection_seed(seed: int) -> int:
    """Seed of a run's random projections: a stream of its own."""
    return stream(seed, "projections").initial_seed()


class Evaluation(NamedTuple):
    """Top-1 accuracy in percent, mean cross-entropy, and the class (N,) int64 that each image was taken for."""

    accuracy: float
    cross_entropy: float
    predictions: torch.Tensor


class _Inputs(NamedTuple):
    """What a step reads that others have made."""

    images: torch.Tensor
    labels: torch.Tensor | None
    teacher_logits: torch.Tensor | None
    teacher_maps: Sequence[torch.Tensor]


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
        device = next(model.parameters()).device
        on_cuda = device.type == "cuda"
        # A recorded step reads its rate from the device's memory, which of torch's updates only the fused one can.
        self._rate = torch.full((), o.learning_rate, device=device) if on_cuda else None
        self.optimizer = torch.optim.SGD(
            [
                {"params": [*weights, *objective.parameters()]},
                {"params": activation_steps, "weight_decay": 0.0},  # decay would shrink the clipping range
            ],
            lr=o.learning_rate if self._rate is None else self._rate,
            momentum=o.momentum,
            nesterov=o.momentum > 0,
            weight_decay=o.weight_decay,
            fused=on_cuda or None,
        )
        self.kernels: dict[str, str] = {}  # what of them a record has to say
        self._network = compiled(model, training=True) if o.compiled else model
        if activation_steps and o.epochs and device.type == "cpu" and not o.compiled:
            made = compile_activations(model, torch.bfloat16 if o.precision == "bf16" else torch.float32)
            self.kernels["activation_kernels"] = "compiled" if made else "not compiled"
        self.history: list[dict[str, float]] = []
        self.predictions: torch.Tensor | None = None  # of the last test; a checkpoint does not hold them
        self.steps = 0
        self.watch, self.loss_watch = Stopwatch(device), Stopwatch(device)
        self.data_seconds = self.teacher_seconds = 0.0  # its share of what the cohort has in common
        self.peak_bytes = 0
        # The epoch's loss terms, a row a term and a column a step, in one piece of memory: a few small tensors kept at
        # every step would lie between the large ones and keep the heap from using their room again.
        self._names: list[str] = []
        self._terms = torch.empty(0, steps_per_epoch, device=device)
        self._filled = self._checked = 0
        self._map_pixels: list[int] = []
        self._settled = 0
        self.record_with(None)

    def record_with(self, recorder: Recorder | None) -> None:
        """Whether the steps to come are recorded, to be replayed; the inputs of :meth:`step` must then lie still."""
        self._pieces = RecordedStep(self._forward, self.compute_loss, self.update_weights, recorder=recorder)
        if self._rate is not None:
            self.kernels["cuda_graphs"] = "off" if recorder is None else "on"

    def step(
        self,
        epoch: int,
        images: torch.Tensor,
        labels: torch.Tensor | None,
        teacher_logits: torch.Tensor | None,
        teacher_maps: Sequence[torch.Tensor],
    ) -> None:
        """One update; the peak memory of the first one is measured."""
        self._inputs = _Inputs(images, labels, teacher_logits, teacher_maps)
        self.watch.start()
        if self.steps:
            self._update()
        else:
            self.peak_bytes = peak_bytes(self._update, images.device)
        self._note()
        self.watch.stop(counts=not self._pieces.is_preparing)
        self.steps += 1
        if self._filled - self._checked >= CHECK_EVERY.get(images.device.type, CHECK_EVERY_ELSEWHERE):
            self._check(epoch)

    def _update(self) -> None:
        rate = learning_rate(self.config.optimization, self.steps, self.steps_per_epoch)
        if self._rate is None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        else:
            self._rate.fill_(rate)
        if self._pieces.are_recorded:
            self.objective.predraw(self._map_pixels, self._inputs.images.device)
        images, labels, logits, maps = self._inputs
        self._pieces.begin([images, labels, logits, *maps])
        self._pieces.run(0)
        self.loss_watch.start()
        self._pieces.run(1)
        self.loss_watch.stop()
        self._pieces.run(2)
        # Nothing of a step may outlive it but its terms: graph and maps would keep the memory that the next one needs.
        self._inputs, self._logits, self._found = None, None, {}
        self.tap.clear()

    def _autocast(self) -> torch.autocast:
        enabled = self.config.optimization.precision == "bf16"
        return torch.autocast(self._inputs.images.device.type, torch.bfloat16, enabled=enabled)

    def _forward(self) -> None:
        with self._autocast():
            self._logits = self._network(self._inputs.images)
        self._map_pixels = [feature_map.shape[2:].numel() for feature_map in self.tap.features]

    def compute_loss(self) -> None:
        _, labels, logits, maps = self._inputs
        with self._autocast():
            self._found = self.objective(self._logits, self.tap.features, logits, maps, labels)

    def update_weights(self) -> None:
        o = self.config.optimization
        self.optimizer.zero_grad(set_to_none=True)
        self._found["total"].backward()
        self._found["gradient_norm"] = nn.utils.clip_grad_norm_(self.parameters, o.clip_norm)
        blend(self.model, self.config.quantization.blending)
        self.optimizer.step()
        self._names = self._names or list(self._found)
        self._values = torch.stack([self._found[name].detach() for name in self._names])

    def _note(self) -> None:
        """Put the terms of the step that has just been taken to those of the epoch."""
        if not self._terms.numel():
            self._terms = self._values.new_empty(len(self._values), self.steps_per_epoch)
        self._terms[:, self._filled] = self._values
        self._filled += 1

    def _check(self, epoch: int) -> None:
        columns = self._terms[:, self._checked : self._filled].T.tolist()
        for offset, values in enumerate(columns, start=self._checked):
            if not all(map(math.isfinite, values)):
                listed = ", ".join(f"{name} {value:.6g}" for name, value in zip(self._names, values, strict=True))
                raise NonFiniteLossError(
                    f"{self.config.run_id}: the loss is not finite in epoch {epoch + 1}, step {offset + 1} of "
                    f"{self.steps_per_epoch} ({listed}). Lower the learning rate or the weight of the largest term."
                )
        self._checked = self._filled

    @property
    def is_preparing(self) -> bool:
        """Whether the last step was one of this process's first, which take longer than all others."""
        return self._pieces.is_preparing

    def close(self) -> None:
        """Take the hooks off the network and free what was recorded; there are no steps any more."""
        self.tap.close()
        self._pieces.release()
        self.objective.predraw((), torch.device("cpu"))

    def end_epoch(self, epoch: int, evaluations: Mapping[str, Evaluation]) -> None:
        """Append the epoch's mean loss terms and its evaluations."""
        self.tap.clear()  # of the maps of the last images that were evaluated
        self._check(epoch)
        row: dict[str, float] = {"epoch": epoch + 1}
        for name, values in self._epoch_terms().items():
            row[name if name != "total" else "loss"] = float(values.mean())
        for split, (accuracy, cross_entropy, _) in evaluations.items():
            if not math.isfinite(cross_entropy):
                raise NonFiniteLossError(
                    f"{self.config.run_id}: the {split} cross-entropy after epoch {epoch + 1} is {cross_entropy}, "
                    "though no training loss was: the weights left the range of float32. Lower the learning rate."
                )
            row[f"{split}_accuracy"], row[f"{split}_cross_entropy"] = accuracy, cross_entropy
        self.history.append(row)
        self.predictions = evaluations["test"].predictions
        self.watch.read(), self.loss_watch.read()  # once an epoch the host waits for the device anyway
        self._filled = self._checked = 0

    def _epoch_terms(self) -> dict[str, torch.Tensor]:
        """Loss terms of the steps of this epoch so far, by name."""
        return dict(zip(self._names, self._terms[:, : self._filled].unbind(), strict=True)) if self._filled else {}

    def _momentum(self) -> dict[str, torch.Tensor]:
        buffers = (self.optimizer.state[parameter].get("momentum_buffer") for parameter in self.parameters)
        return {f"momentum.{index}": buffer for index, buffer in enumerate(buffers) if buffer is not None}

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors on the CPU, numbers and text) from which :meth:`load_state` goes on with the same bits.

        To be called between steps. Order and augmentation of images need no state: they follow from seed and step.
        """
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"objective.{name}": tensor for name, tensor in self.objective.state_dict().items()}
        tensors |= self._momentum()
        tensors |= {f"terms.{name}": values for name, values in self._epoch_terms().items()}
        for name, watch in (("step", self.watch), ("loss", self.loss_watch)):
            tensors[f"seconds.{name}"] = torch.tensor(watch.read(), dtype=torch.float64)
        facts = {
            "steps": self.steps, "checked": self._checked, "history": self.history, "peak_bytes": self.peak_bytes,
            "data_seconds": self.data_seconds, "teacher_seconds": self.teacher_seconds,
        }  # fmt: skip
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, facts

    def load_state(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Take the place in training of the learner, built from the same configuration, whose state this is."""
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.objective.load_state_dict(parts.get("objective", {}))
        for index, buffer in parts.get("momentum", {}).items():
            parameter = self.parameters[int(index)]
            self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
        device = next(self.model.parameters()).device
        kept = {name: values.to(device) for name, values in parts.get("terms", {}).items()}
        self._names, self._terms, self._filled = list(kept), self._terms[:0], 0
        if kept:
            rows = torch.stack(list(kept.values()))
            self._filled = rows.shape[1]
            self._terms = rows.new_empty(len(rows), self.steps_per_epoch)
            self._terms[:, : self._filled] = rows
        self.watch.seconds, self.loss_watch.seconds = (parts["seconds"][name].tolist() for name in ("step", "loss"))
        self._settled = len(self.watch.seconds)
        self.record_with(self._pieces.recorder)  # recordings know the momentum at its former place
        self.steps, self._checked, self.peak_bytes = facts["steps"], facts["checked"], facts["peak_bytes"]
        self.history = [dict(row) for row in facts["history"]]
        self.data_seconds, self.teacher_seconds = facts["data_seconds"], facts["teacher_seconds"]

    def unsettled(self) -> float:
        """Seconds of its steps since they were last settled, of those that count."""
        return sum(seconds for seconds in self.watch.read()[self._settled :] if not math.isnan(seconds))

    def settle(self, share: float) -> None:
        """Count only a part of these seconds: in the rest of them others computed, too."""
        for watch in (self.watch, self.loss_watch):
            watch.seconds[self._settled :] = [share * seconds for seconds in watch.read()[self._settled :]]
        self._settled = len(self.watch.seconds)

    def position(self, epoch: int) -> int | None:
        """The batch of ``epoch`` that it is to see next, up to their number; None if it has finished that epoch."""
        return None if len(self.history) > max(0, epoch) else self.steps - epoch * self.steps_per_epoch
