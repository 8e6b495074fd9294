"""Finished runs on disk: a JSON record and safetensors weights in a folder named after the run's configuration.

    <suite folder>/runs/<readable name>-<digest>/record.json      configuration, history, accuracies, cost, environment
                                                 weights.safetensors, predictions.safetensors
                   .locks/<readable name>-<digest>                held by the process that trains the run

The record is written last and atomically: a run is finished if and only if its folder contains ``record.json``.
A lock is released by the operating system when its process ends, also when the process is killed.
"""

import datetime
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import filelock
import torch
from pydantic import ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..config import RunConfig, StrictModel, omitted_at_default
from ..utils.files import (
    atomic_write,
    atomic_write_text,
    canonical_json,
    require_writable,
    set_aside,
    tensors_digest,
    text_digest,
)
from .checkpoints import remove_checkpoints

# What a run is judged by, by its name in histories and records; all in percent.
METRICS = {"accuracy": "accuracy", "mean_iou": "mean IoU"}


class ResultsError(RuntimeError):
    """A results folder, record or weights file is damaged or of another configuration; the message says what to do."""


class DamagedRecordError(ResultsError):
    """The contents of a record differ from what was written."""


class DamagedRecordWarning(UserWarning):
    """A record is damaged; its run counts as not trained."""


class RunRecord(StrictModel):
    """A finished run: configuration, history, accuracies, cost and environment.

    Args:
        metric: what the next three values are, a key of :data:`METRICS`: ``mean_iou`` of networks that predict a class
            for each pixel, else top-1 accuracy.
        last_accuracy: test accuracy after the last epoch, in percent. Tables and claims compare this one.
        best_accuracy: of the epoch that is best on the test images, and therefore optimistic.
        selected_accuracy: test accuracy of the epoch that is best on the validation images; None without them.
        test_affinity: exact affinity loss between student and teacher on test images
            (:meth:`~faqd_lib.runs.workshop.Workshop.test_affinity`); None without a teacher and in early versions.
        weight_bytes: size of the quantized weights, counted in bits.
        weights_digest, predictions_digest: SHA-256 of the files. Early versions kept no predictions (None).
        checksum: SHA-256 of all other fields.
    """

    # JSON has no NaN: a record with NaN could not be read again.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    run_id: str
    digest: str
    configuration: RunConfig
    history: list[dict[str, float]]
    metric: Literal["accuracy", "mean_iou"] = omitted_at_default("accuracy")
    last_accuracy: float
    best_accuracy: float
    selected_accuracy: float | None
    test_affinity: float | None = None
    test_images: int
    parameters: int
    weight_bytes: float
    cost: dict[str, float]
    environment: dict[str, str | int]
    dataset_note: str
    weights_digest: str
    predictions_digest: str | None = None
    finished: str
    checksum: str


@dataclass(frozen=True)
class RunStore:
    """The runs of one suite folder."""

    folder: Path

    def run_folder(self, config: RunConfig) -> Path:
        """The folder of a run, whether the run exists or not."""
        return self.folder / "runs" / config.run_id

    def record(self, config: RunConfig) -> RunRecord | None:
        """The record of a finished run, or None. A damaged record gives None and a :class:`DamagedRecordWarning`.

        Raises:
            ResultsError: the record belongs to another configuration or version of the suite.
        """
        path = self.run_folder(config) / "record.json"
        record = _whole(path) if path.is_file() else None
        if record is not None and {record.digest, record.configuration.digest} != {config.digest}:
            raise ResultsError(
                f"{path} belongs to another configuration (digest {record.digest[:12]}, expected "
                f"{config.digest[:12]}): remove the folder {path.parent.name} to train this run again"
            )
        return record

    def records(self) -> list[RunRecord]:
        """Every finished run in the folder, in the order of their names; damaged records as in :meth:`record`."""
        found = map(_whole, sorted((self.folder / "runs").glob("*/record.json")))
        return [record for record in found if record is not None]

    def save(
        self,
        config: RunConfig,
        model: nn.Module,
        *,
        predictions: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        log_probabilities: torch.Tensor | None = None,
        pixel_counts: torch.Tensor | None = None,
        **fields: Any,
    ) -> RunRecord:
        """Write the weights of a trained network and its predictions, then the record with the other ``fields``.

        Args:
            predictions, labels: predicted class after the last epoch and true class (N,) of each test image.
            log_probabilities: log-probability (N,) of the true class of each test image; kept in float16.
            pixel_counts: in place of classes, for one prediction a pixel: int32 (N, 3, C) of
                :func:`~faqd_lib.training.segmentation.pixel_counts`.

        Raises:
            PermissionError: the folder cannot be written to.
            OSError: a file cannot be written, such as on a full disk.
        """
        folder = require_writable(self.run_folder(config))
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        if pixel_counts is not None:
            predicted = {"pixel_counts": pixel_counts.to("cpu", torch.int32).contiguous()}
        else:
            classes = {"predicted": predictions, "label": labels}
            dtype = torch.uint8 if max(int(each.max()) for each in classes.values()) < 256 else torch.int16
            predicted = {name: each.to("cpu", dtype).contiguous() for name, each in classes.items()}
        if log_probabilities is not None:
            predicted["log_probability"] = log_probabilities.to("cpu", torch.float16).contiguous()
        record = RunRecord(
            run_id=config.run_id,
            digest=config.digest,
            configuration=config,
            weights_digest=tensors_digest(tensors),
            predictions_digest=tensors_digest(predicted),
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            checksum="",
            **fields,
        )
        atomic_write(folder / "weights.safetensors", lambda temporary: save_file(tensors, temporary))
        atomic_write(folder / "predictions.safetensors", lambda temporary: save_file(predicted, temporary))
        values = canonical_json(json.loads(record.model_dump_json(exclude={"checksum"})))
        record = record.model_copy(update={"checksum": text_digest(values)})
        path = folder / "record.json"
        if path.exists():  # damaged: a run with a whole record is not trained again
            set_aside(path)
        atomic_write_text(path, record.model_dump_json(indent=1) + "\n")
        remove_checkpoints(folder)
        return record

    def lock(self, config: RunConfig) -> filelock.BaseFileLock:
        """The lock of a run, not taken yet."""
        return self.group_lock(config.run_id)

    def group_lock(self, name: str) -> filelock.BaseFileLock:
        """The lock of a group of runs that one process trains, not taken yet."""
        return filelock.FileLock(require_writable(self.folder / ".locks") / name)

    @contextmanager
    def lock_available(self, configs: Sequence[RunConfig]) -> Iterator[list[RunConfig]]:
        """Hold the locks of those runs that no other process has locked; gives these runs."""
        with ExitStack() as held:
            locked = []
            for config in configs:
                with suppress(filelock.Timeout):
                    held.enter_context(self.lock(config).acquire(timeout=0))
                    locked.append(config)
            yield locked

    def load_weights(self, config: RunConfig, model: nn.Module) -> nn.Module:
        """Load a finished run's weights into a network of the same architecture and quantizers. Returns ``model``.

        Raises:
            ResultsError: the run is not finished, or its weights are missing, damaged or of another record.
        """
        record = self.record(config)
        if record is None:
            raise ResultsError(f"{config.run_id} has not been trained in {self.folder}")
        model.load_state_dict(_tensors(self.run_folder(config) / "weights.safetensors", record.weights_digest))
        return model

    def predictions(self, record: RunRecord) -> dict[str, torch.Tensor] | None:
        """The classes (N,) of the test images, ``predicted`` and ``label``; None for records without them.

        Classes are integers of 8 bits, or of 16 bits in early records and where there are more than 256 classes. Later
        records also have ``log_probability`` (N,) float16, of the true class. Networks with one prediction a pixel have
        ``pixel_counts`` (N, 3, C) int32 of :func:`~faqd_lib.training.segmentation.pixel_counts` in place of classes,
        and the mean log-probability of an image's pixels.

        Raises:
            ResultsError: the file is missing, damaged or of another record.
        """
        if record.predictions_digest is None:
            return None
        path = self.folder / "runs" / record.run_id / "predictions.safetensors"
        return _tensors(path, record.predictions_digest)


def _tensors(path: Path, digest: str) -> dict[str, torch.Tensor]:
    remedy = f"remove the folder {path.parent} to train the run again"
    try:
        tensors = load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise ResultsError(f"{path} is missing or damaged ({error}): {remedy}") from error
    if tensors_digest(tensors) != digest:
        raise ResultsError(f"{path} does not hold what its record says: {remedy}")
    return tensors


def _whole(path: Path) -> RunRecord | None:
    """Read a record; warn and return None if it is damaged."""
    try:
        return read_record(path)
    except DamagedRecordError as error:
        message = f"{error}: its run counts as not trained. When it is trained again, the damaged file is renamed."
        warnings.warn(message, DamagedRecordWarning, stacklevel=3)
        return None


def read_record(path: Path) -> RunRecord:
    """Read a record file.

    Raises:
        DamagedRecordError: the contents differ from what was written.
        ResultsError: the record is whole, but of another version of the suite.
    """
    text = path.read_bytes()
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise DamagedRecordError(f"{path} is damaged ({error})") from error
    checksum = values.pop("checksum", None)
    if checksum is not None and checksum != text_digest(canonical_json(values)):
        raise DamagedRecordError(f"{path} is damaged (its checksum does not fit)")
    try:
        return RunRecord.model_validate_json(text)
    except ValidationError as error:
        raise ResultsError(
            f"{path} is of another version of the suite ({error.errors()[0]['msg']}): move the folder "
            f"{path.parent.name} away, and the run is trained again"
        ) from error


def score(row: dict[str, float], split: str = "test") -> float | None:
    """What an entry of a history says of the images of a split, in percent; None where they were not evaluated."""
    return next((row[key] for metric in METRICS if (key := f"{split}_{metric}") in row), None)


def accuracies(history: list[dict[str, float]]) -> dict[str, Any]:
    """The three accuracies of a record from a history, in percent, and the metric if it is another one.

    See :class:`RunRecord`.
    """
    evaluated = [row for row in history if score(row) is not None]
    test = [score(row) for row in evaluated]
    validated = [row for row in evaluated if score(row, "validation") is not None]
    best = max(validated, key=lambda row: score(row, "validation"), default={})
    metric = {"metric": "mean_iou"} if "test_mean_iou" in evaluated[-1] else {}
    return {**metric, "last_accuracy": test[-1], "best_accuracy": max(test), "selected_accuracy": score(best)}
