"""Checkpoints: the state of a run in training, in two generations, each whole and under a digest.

    runs/<run>/checkpoint.safetensors            the newest
               checkpoint.previous.safetensors   the one before it

A process may be killed at any moment, also while it writes: one of the two is always whole. Safetensors hold numbers
and text only; reading a checkpoint executes nothing.
"""

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..config import StrictModel
from ..utils.files import atomic_write, set_aside, tensors_digest

NAMES = ("checkpoint.safetensors", "checkpoint.previous.safetensors")


class CheckpointWarning(UserWarning):
    """A checkpoint was damaged and set aside; training goes on from an older one, or from the beginning."""


class CheckpointInfo(StrictModel):
    """What a checkpoint knows beside its tensors: whose it is, how far, measured what, and where."""

    digest: str  # of the run's configuration
    steps: int
    checked: int  # of the steps of the epoch that is under way, those whose loss was seen to be finite
    history: list[dict[str, float]]
    peak_bytes: int
    data_seconds: float
    teacher_seconds: float
    environment: dict[str, str | int]


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], facts: CheckpointInfo) -> None:
    """Write the newest checkpoint; the one that was newest becomes the previous one.

    Raises:
        OSError: the disk is full or the folder not writable. A whole checkpoint that was there is still there.
    """
    text = facts.model_dump_json()
    newest, previous = (folder / name for name in NAMES)

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, {"facts": text, "digest": tensors_digest(tensors, salt=text)})
        with open(temporary, "r+b") as written:
            os.fsync(written.fileno())
        # Until the new one is renamed, too, there is only a previous one, which is enough.
        if newest.exists():
            os.replace(newest, previous)

    atomic_write(newest, write)


def read_checkpoint(folder: Path, digest: str) -> tuple[dict[str, torch.Tensor], CheckpointInfo] | None:
    """The newest whole checkpoint of the run with this configuration digest, on the CPU; None if there is none.

    A damaged or foreign one is renamed, with a :class:`CheckpointWarning`, and the one before it is taken.

    Raises:
        OSError: a file cannot be read (no right to, too many files open, a disk that fails): that says nothing of what
            it holds.
    """
    for path in (folder / name for name in NAMES):
        if not path.exists():
            continue
        try:
            return _read(path, digest)
        except (SafetensorError, ValidationError, ValueError) as error:
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
        metadata: dict[str, Any] = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dictionary)
    text = metadata.get("facts", "")
    if tensors_digest(tensors, salt=text) != metadata.get("digest"):
        raise ValueError("its contents do not have the digest that it was written with")
    facts = CheckpointInfo.model_validate_json(text)
    if facts.digest != digest:
        raise ValueError(f"it is of another configuration: {facts.digest[:12]}, not {digest[:12]}")
    return tensors, facts


def due_every(seconds: float) -> Callable[[], bool]:
    """A function that says True when it is asked again so many seconds after it last did, or after now."""
    last = time.monotonic()  # which no change of the clock sets back

    def due() -> bool:
        nonlocal last
        now = time.monotonic()
        if now - last < seconds:
            return False
        last = now
        return True

    return due


def remove_checkpoints(folder: Path) -> None:
    """Remove both, once the run is finished."""
    for name in NAMES:
        (folder / name).unlink(missing_ok=True)
    remove_unfinished_writes(folder)


def remove_unfinished_writes(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left; only for who holds the run's lock."""
    for path in folder.glob(".*.part"):
        path.unlink(missing_ok=True)
