"""Finished runs on disk: a JSON record and safetensors weights in a folder named after the run's configuration.

    <suite folder>/runs/<readable name>-<digest>/record.json      configuration, history, accuracies, cost, environment
                                                 weights.safetensors

The record is written last and atomically: a folder with a record is a finished run, any other is none.
"""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .config import Frozen, RunConfig
from .files import atomic_write, atomic_write_text, require_writable, tensors_digest


class ResultsError(RuntimeError):
    """A record or its weights are damaged, or do not belong where they lie; the message says what to do."""


class RunRecord(Frozen):
    """All that is known of a finished run. Accuracies in percent; ``best`` is the best epoch on the test set and
    therefore optimistic, ``last`` is what counts; with a validation split, ``selected`` is the test accuracy of the
    epoch that was best there."""

    # JSON has no NaN: a record with one could not be read again.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    run_id: str
    digest: str
    configuration: RunConfig
    history: list[dict[str, float]]
    last_accuracy: float
    best_accuracy: float
    selected_accuracy: float | None
    test_images: int
    parameters: int
    weight_bytes: float
    cost: dict[str, float]
    environment: dict[str, str | int]
    dataset_note: str
    weights_digest: str
    finished: str


@dataclass(frozen=True)
class RunStore:
    """The runs of one suite folder."""

    folder: Path

    def run_folder(self, config: RunConfig) -> Path:
        return self.folder / "runs" / config.run_id

    def record(self, config: RunConfig) -> RunRecord | None:
        """The record of a finished run, or None.

        Raises:
            ResultsError: the record is damaged, or is that of another configuration.
        """
        path = self.run_folder(config) / "record.json"
        if not path.is_file():
            return None
        record = read_record(path)
        if record.digest != config.digest or record.configuration.digest != config.digest:
            raise ResultsError(
                f"{path} belongs to another configuration (digest {record.digest[:12]}, expected "
                f"{config.digest[:12]}): remove the folder {path.parent.name} to train this run again"
            )
        return record

    def records(self) -> list[RunRecord]:
        """Every finished run in the folder, in the order of their names."""
        return [read_record(path) for path in sorted((self.folder / "runs").glob("*/record.json"))]

    def save(self, config: RunConfig, model: nn.Module, **fields: Any) -> RunRecord:
        """Write weights, then the record. ``fields`` are the record's, less those that follow from config and model."""
        folder = require_writable(self.run_folder(config))
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        record = RunRecord(
            run_id=config.run_id,
            digest=config.digest,
            configuration=config,
            weights_digest=tensors_digest(tensors),
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **fields,
        )
        atomic_write(folder / "weights.safetensors", lambda temporary: save_file(tensors, temporary))
        atomic_write_text(folder / "record.json", record.model_dump_json(indent=1) + "\n")
        return record

    def load_weights(self, config: RunConfig, model: nn.Module) -> nn.Module:
        """Load a finished run's weights into a network of the same build. Returns ``model``.

        Raises:
            ResultsError: the run is not finished, or its weights are missing, damaged or not those of the record.
        """
        record = self.record(config)
        path = self.run_folder(config) / "weights.safetensors"
        if record is None:
            raise ResultsError(f"{config.run_id} has not been trained in {self.folder}")
        remedy = f"remove the folder {path.parent} to train the run again"
        try:
            tensors = load_file(path)
        except (SafetensorError, FileNotFoundError) as error:
            raise ResultsError(f"{path} is missing or damaged ({error}): {remedy}") from error
        if tensors_digest(tensors) != record.weights_digest:
            raise ResultsError(f"{path} does not hold the weights of its record: {remedy}")
        model.load_state_dict(tensors)
        return model


def read_record(path: Path) -> RunRecord:
    """Read one record file.

    Raises:
        ResultsError: it is damaged or written by another version of the suite.
    """
    try:
        return RunRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise ResultsError(
            f"{path} is damaged or of another version of the suite ({detail}): move the folder "
            f"{path.parent.name} away, and the run is trained again"
        ) from error


def accuracies(history: list[dict[str, float]]) -> dict[str, float | None]:
    """Last, best (on the test set, optimistic) and validation-selected test accuracy of a history, in percent."""
    test = [row["test_accuracy"] for row in history]
    selected = None
    if "validation_accuracy" in history[0]:
        selected = max(history, key=lambda row: row["validation_accuracy"])["test_accuracy"]
    return {"last_accuracy": test[-1], "best_accuracy": max(test), "selected_accuracy": selected}
