"""Atomic writes, digests, and the folders where the project reads and writes."""

import ctypes
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError


def project_root() -> Path:
    """The checkout that contains this package; the working directory if the package is installed elsewhere."""
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def cache_dir() -> Path:
    """Folder for decoded datasets: ``$FAQD_CACHE`` if set, else ``data/cache`` in the project."""
    return Path(os.environ.get("FAQD_CACHE") or project_root() / "data" / "cache")


def require_writable(folder: Path) -> Path:
    """Return ``folder``, made if need be. Raises PermissionError, with a remedy, if no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"cannot write to {folder} ({error.strerror or error}). Make it writable, or choose another folder: "
            "--results for results, FAQD_CACHE for decoded data."
        ) from error
    return folder


def atomic_write(path: Path, write: Callable[[Path], Any]) -> Path:
    """Call ``write(temporary)``, move the finished file to ``path``, and return ``path``.

    A reader sees the old file or the new one, never a part of it. ``temporary`` lies in the same folder. If ``write``
    raises or the process dies, ``path`` stays unchanged.

    Raises:
        OSError: the file could not be written; the message names the remedy. A ``SafetensorError`` is converted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode  # as the user's umask has it; safetensors makes files that only their owner reads
    try:
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "r+b") as written:  # Windows syncs only files opened for writing
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"cannot write {path} ({error}). If the disk is full, make room and call again: finished runs are kept, "
            "and an interrupted run continues from its last checkpoint."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def atomic_write_text(path: Path, text: str) -> Path:
    """Write ``text`` (UTF-8) to ``path`` atomically."""
    return atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def set_aside(path: Path) -> Path:
    """Rename a damaged file to ``<name>.damaged-<n>``, so that nothing reads it again; return the new path."""
    count = 1
    while (target := path.with_name(f"{path.stem}.damaged-{count}{path.suffix}")).exists():
        count += 1
    return path.replace(target)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal texts. Raises ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def text_digest(text: str) -> str:
    """SHA-256 of a text, 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def tensors_digest(tensors: dict[str, torch.Tensor], salt: str = "") -> str:
    """SHA-256 of ``salt`` and the names, dtypes, shapes and bytes of the tensors, in the order of their names."""
    digest = hashlib.sha256(salt.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():
            # Hashed without NumPy, because a packed network can be read with torch and safetensors alone.
            digest.update((ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr()))
    return digest.hexdigest()
