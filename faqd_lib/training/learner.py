"""One student in training: its step, its history, and the state from which it goes on with the same bits."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from ..affinity.loss import pixel_count
from ..config import OptimizationConfig, TrainingConfig
from ..data.batches import Batch, stream
from ..models import FeatureTap
from ..quantization.network import blend, compile_activations, split_parameters
from ..utils.measure import peak_bytes
from .clock import StepClock
from .compile import compile_network
from .cuda_graphs import RecordedStep, Recorder
from .loss_log import LossLog, NonFiniteLossError
from .momentum import Group, NesterovSGD
from .objective import DistillationObjective
from .segmentation import DenseEvaluation

CHECK_EVERY = 50  # steps between checks of the loss on a GPU, where a check makes the host wait; on a CPU 1


def learning_rate(optimization: OptimizationConfig, step: int, steps_per_epoch: int) -> float:
    """Rate of a step (from 0): linear warm-up, then half a cosine that ends at 0 after the last step."""
    warmup = round(optimization.warmup_epochs * steps_per_epoch)
    total = optimization.steps(steps_per_epoch)
    if step < warmup:
        return optimization.learning_rate * (step + 1) / warmup
    return optimization.learning_rate * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def precision_that_pays(device: torch.device | str) -> str:
    """``"bf16"`` where the hardware computes in it, else ``"float32"`` (emulated bf16 is many times slower)."""
    if torch.device(device).type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # builds without oneDNN cannot be asked
        supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if supported else "float32"


def projection_seed(seed: int) -> int:
    """Seed of a run's random projections, from a random stream that nothing else uses."""
    return stream(seed, "projections").initial_seed()


class Evaluation(NamedTuple):
    """Top-1 accuracy in percent, mean cross-entropy, and for each image (N,) the predicted class, int64, and the
    log-probability of the true class, float32."""

    accuracy: float
    cross_entropy: float
    predictions: torch.Tensor
    log_probabilities: torch.Tensor

    metric = "accuracy"

    def kept(self, labels: torch.Tensor) -> dict[str, Any]:
        """What :meth:`faqd_lib.runs.store.RunStore.save` keeps, with the true classes (N,)."""
        return {"predictions": self.predictions, "labels": labels, "log_probabilities": self.log_probabilities}


class TeacherOutput(NamedTuple):
    """The teacher's logits (batch, classes) and its feature maps, one a stage; None and () without a teacher."""

    logits: torch.Tensor | None = None
    maps: Sequence[torch.Tensor] = ()


class Learner:
    """One network in training: weights, optimizer, objective and history.

    Args:
        config: the run, whose schedule, precision and quantization are used.
        model: the network, quantized and on its device.
        objective: takes the network's logits and the maps of the objective's stages.
        feature_names: modules of the network, one a stage. Those of the objective's stages are tapped.
        steps_per_epoch: number of batches of an epoch.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: nn.Module,
        objective: DistillationObjective,
        feature_names: Sequence[str],
        steps_per_epoch: int,
    ) -> None:
        self.config, self.model, self.objective = config, model, objective
        self.steps_per_epoch = steps_per_epoch
        self.device = next(model.parameters()).device
        names = [feature_names[stage - 1] for stage in config.objective.stages] or feature_names
        self.tap = FeatureTap(model, names if objective.affinity_weight > 0 else ())
        weights, activation_steps = split_parameters(model)
        self.parameters = [*weights, *activation_steps, *objective.parameters()]
        optimization = config.optimization
        on_cuda = self.device.type == "cuda"
        # A recorded step must read its rate from the device's memory.
        self._rate = torch.full((), optimization.learning_rate, device=self.device) if on_cuda else None
        self.optimizer = NesterovSGD(
            [
                Group([*weights, *objective.parameters()], optimization.weight_decay),
                Group(activation_steps, 0.0),  # decay would shrink the clipping range
            ],
            optimization.learning_rate if self._rate is None else self._rate,
            optimization.momentum,
            fused=on_cuda,
        )
        self.kernels: dict[str, str] = {}  # kernel settings, stored in the run record
        self.network = compile_network(model, training=True) if optimization.compiled else model
        if activation_steps and optimization.epochs and self.device.type == "cpu" and not optimization.compiled:
            made = compile_activations(model, torch.bfloat16 if optimization.precision == "bf16" else torch.float32)
            self.kernels["activation_kernels"] = "compiled" if made else "not compiled"
        self.history: list[dict[str, float]] = []
        self.tested: Evaluation | DenseEvaluation | None = None  # the last test; a checkpoint does not hold it
        self.cost: dict[str, float] = {}  # seconds, milliseconds, bytes of a finished run; see ``results/README.md``
        self.steps = 0
        self.peak_bytes = 0  # of the first step
        self.log = LossLog(steps_per_epoch, self.device)
        self.clock = StepClock(self.device)
        self.record_with(None)

    def record_with(self, recorder: Recorder | None) -> None:
        """Record the steps to come as CUDA graphs, of batches that are ``recorder.placed``; None calls them instead."""
        self._recorded_step = RecordedStep(self.step, recorder)
        self._map_sizes: list[int] = []  # pixels of each tapped map: a replay draws no projections itself
        if self._rate is not None:
            self.kernels["cuda_graphs"] = "off" if recorder is None else "on"

    def step(self, batch: Batch, teacher: TeacherOutput) -> dict[str, torch.Tensor]:
        """Forward, compare, backward, clip, blend, update.

        Returns the terms of the objective, and ``gradient_norm`` before clipping, as scalars without gradient. The step
        can be recorded. Hence it must not draw random numbers on the host, read values or copy from the host.
        """
        timed = not self._recorded_step.replays_next  # no clock runs within a recording
        with torch.autocast(self.device.type, torch.bfloat16, self.config.optimization.precision == "bf16"):
            logits = self.network(batch.images)
            maps = [teacher.maps[stage - 1] for stage in self.config.objective.stages] or teacher.maps
            with self.clock.loss if timed else nullcontext():
                terms = self.objective(logits, self.tap.features, teacher.logits, maps, batch.labels)
        self.optimizer.zero_grad()
        terms["total"].backward()
        terms["gradient_norm"] = nn.utils.clip_grad_norm_(self.parameters, self.config.optimization.clip_norm)
        blend(self.model, self.config.quantization.blending)
        self.optimizer.step()
        return {name: term.detach() for name, term in terms.items()}

    def advance(self, epoch: int, batch: Batch, teacher: TeacherOutput) -> None:
        """Take one step at the rate of the schedule; time the step, log and check its terms.

        Raises:
            NonFiniteLossError: a term is not finite (found within ``CHECK_EVERY`` steps).
        """
        self.clock.step.start()
        rate = learning_rate(self.config.optimization, self.steps, self.steps_per_epoch)
        if self._rate is not None:
            self._rate.fill_(rate)
        else:
            self.optimizer.rate = rate
        if self._recorded_step.replays_next:
            self.objective.predraw(self._map_sizes, self.device)
        terms: dict[str, torch.Tensor] = {}
        with self._own_randomness():
            if self.steps == 0:
                self.peak_bytes = peak_bytes(lambda: terms.update(self._recorded_step(batch, teacher)), self.device)
            else:
                terms = self._recorded_step(batch, teacher)
        self._map_sizes = self._map_sizes or [pixel_count(features) for features in self.tap.features]
        self.tap.clear()  # maps would keep the memory that the next step needs
        self.log.append(terms)
        self.clock.step.stop(counts=not self.is_preparing)
        self.steps += 1
        if self.device.type == "cpu" or self.log.steps - self.log.checked >= CHECK_EVERY:
            self.log.check(self.config.run_id, epoch)

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Draw what dropout draws from a stream of this run and step, alone or beside others, resumed or not.

        A recorded step draws nothing: the networks of the suite have no dropout.
        """
        if self._recorded_step.recorder is not None:
            yield
            return
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            # torch.manual_seed seeds the generators of all devices, which takes a millisecond.
            seed = torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed
            seed(stream(self.config.seed, "dropout", self.steps).initial_seed())
            yield

    @property
    def is_preparing(self) -> bool:
        """Whether the last step was one of this process's first, which take longer than all others."""
        return self._recorded_step.is_preparing

    def close(self) -> None:
        """Take the hooks off the network and free the recording. No step is possible afterwards."""
        self.tap.close()
        self._recorded_step.release()
        self.objective.predraw((), torch.device("cpu"))

    def end_epoch(self, epoch: int, evaluations: Mapping[str, Evaluation | DenseEvaluation]) -> None:
        """Append the epoch's mean terms and evaluations to the history; NonFiniteLossError if one is not finite."""
        self.tap.clear()  # maps of the last evaluated images
        self.log.check(self.config.run_id, epoch)
        row: dict[str, float] = {"epoch": epoch + 1}
        row |= {"loss" if name == "total" else name: mean for name, mean in self.log.means().items()}
        for split, found in evaluations.items():
            score, cross_entropy, *_ = found
            if not math.isfinite(cross_entropy):
                raise NonFiniteLossError(
                    f"{self.config.run_id}: the {split} cross-entropy after epoch {epoch + 1} is {cross_entropy}, "
                    "though every training loss was finite: the weights left the range of float32. Lower the "
                    "learning rate."
                )
            row[f"{split}_{found.metric}"], row[f"{split}_cross_entropy"] = score, cross_entropy
        self.history.append(row)
        self.tested = evaluations.get("test")
        self.clock.step.read(), self.clock.loss.read()  # once an epoch the host waits for the device anyway
        self.log.clear()

    def position(self, epoch: int) -> int | None:
        """Number of the next batch of ``epoch``, the count of batches if all are done, None if the epoch has ended."""
        return None if len(self.history) > max(0, epoch) else self.steps - epoch * self.steps_per_epoch

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors on the CPU, and numbers and text, from which :meth:`load_state` goes on with the same bits.

        Call it between steps. Order and augmentation of images need no state: they follow from seed and step.
        """
        momentum = (self.optimizer.buffers.get(parameter) for parameter in self.parameters)
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"objective.{name}": tensor for name, tensor in self.objective.state_dict().items()}
        tensors |= {f"momentum.{index}": buffer for index, buffer in enumerate(momentum) if buffer is not None}
        tensors |= {f"terms.{name}": values for name, values in self.log.rows().items()}
        tensors["seconds.step"] = torch.tensor(self.clock.step.read(), dtype=torch.float64)
        tensors["seconds.loss"] = torch.tensor(self.clock.loss.read(), dtype=torch.float64)
        info = {
            "steps": self.steps, "checked": self.log.checked, "history": self.history, "peak_bytes": self.peak_bytes,
            "data_seconds": self.clock.data_seconds, "teacher_seconds": self.clock.teacher_seconds,
        }  # fmt: skip
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, info

    def load_state(self, tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned, of a learner built from the same configuration."""
        parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.objective.load_state_dict(parts["objective"])
        for index, buffer in parts["momentum"].items():
            parameter = self.parameters[int(index)]
            self.optimizer.buffers[parameter] = torch.empty_like(parameter).copy_(buffer)
        self.log.load({name: values.to(self.device) for name, values in parts["terms"].items()}, info["checked"])
        step, loss = (tensors[f"seconds.{name}"].tolist() for name in ("step", "loss"))
        self.clock.load(step, loss, info["data_seconds"], info["teacher_seconds"])
        self.record_with(self._recorded_step.recorder)  # a former recording reads the momentum at its old place
        self.steps, self.peak_bytes = info["steps"], info["peak_bytes"]
        self.history = [dict(row) for row in info["history"]]
