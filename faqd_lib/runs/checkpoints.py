"""Checkpoints: the state of a run in training, in two generations, each protected by a digest.

    runs/<run>/checkpoint.safetensors            the newest
               checkpoint.previous.safetensors   the one before it

A process may be killed at any moment, also while it writes: one of the two files is always whole. Safetensors hold
numbers and text only: no code runs when a checkpoint is read.
"""

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..config import StrictModel
from ..utils.files import atomic_write, set_aside, tensors_digest

NAMES = ("checkpoint.safetensors", "checkpoint.previous.safetensors")


class CheckpointWarning(UserWarning):
    """A checkpoint is damaged, or from another machine. Training goes on; the message says from where."""


class CheckpointInfo(StrictModel):
    """The part of a checkpoint that is not tensors: steps, epochs and costs so far, and where they were computed."""

    digest: str  # of the run's configuration
    steps: int
    checked: int  # steps of the current epoch whose loss is known to be finite
    history: list[dict[str, float]]  # finished epochs
    peak_bytes: int
    data_seconds: float
    teacher_seconds: float
    environment: dict[str, str | int]  # machine and software


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], facts: CheckpointInfo) -> None:
    """Write the newest checkpoint; the newest so far becomes the previous one.

    Raises:
        OSError: the disk is full or the folder not writable. Checkpoints written earlier are unharmed.
    """
    text = facts.model_dump_json()
    newest, previous = (folder / name for name in NAMES)

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, {"facts": text, "digest": tensors_digest(tensors, salt=text)})
        with open(temporary, "r+b") as written:
            os.fsync(written.fileno())
        # Between the two renames there is only a previous checkpoint, which is enough.
        if newest.exists():
            os.replace(newest, previous)

    atomic_write(newest, write)


def read_checkpoint(folder: Path, digest: str) -> tuple[dict[str, torch.Tensor], CheckpointInfo] | None:
    """Read the newest whole checkpoint of a run.

    ``digest`` is that of the run's configuration. A damaged checkpoint, or one with another digest, is renamed with a
    :class:`CheckpointWarning`. Then the previous checkpoint is read.

    Returns:
        Tensors on the CPU, and the rest; None if there is no checkpoint.

    Raises:
        OSError: a file cannot be opened or read. It stays where it is, because its contents may be whole.
    """
    for path in (folder / name for name in NAMES):
        if not path.exists():
            continue
        try:
            return _read(path, digest)
        except (SafetensorError, ValueError) as error:
            moved = set_aside(path)
            warnings.warn(
                f"the checkpoint {path} cannot be used ({error}); it was renamed to {moved.name}. Training goes on "
                "from the one before it, or from the beginning if there is none.",
                CheckpointWarning,
                stacklevel=2,
            )
    return None


def _read(path: Path, digest: str) -> tuple[dict[str, torch.Tensor], CheckpointInfo]:
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dictionary)
    text = metadata.get("facts", "")
    if tensors_digest(tensors, salt=text) != metadata.get("digest"):
        raise ValueError("its contents do not have the digest that it was written with")
    facts = CheckpointInfo.model_validate_json(text)
    if facts.digest != digest:
        raise ValueError(f"it is of another configuration: {facts.digest[:12]}, not {digest[:12]}")
    return tensors, facts


def due_every(seconds: float) -> Callable[[], bool]:
    """A function that returns True every ``seconds`` seconds, the first time after that many."""
    last = time.monotonic()  # changes of the system clock have no effect

    def due() -> bool:
        nonlocal last
        now = time.monotonic()
        is_due = now - last >= seconds
        if is_due:
            last = now
        return is_due

    return due


def remove_checkpoints(folder: Path) -> None:
    """Remove both checkpoints of a finished run."""
    for name in NAMES:
        (folder / name).unlink(missing_ok=True)
    remove_unfinished_writes(folder)


def remove_unfinished_writes(folder: Path) -> None:
    """Remove temporary files of a process that was killed while it wrote. The caller must hold the run's lock."""
    for path in folder.glob(".*.part"):
        path.unlink(missing_ok=True)
