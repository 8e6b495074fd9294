"""Find datasets on disk, check them, decode them once into uint8 tensors, and fingerprint their content.

An explicit ``data_root`` is the only folder searched. Without one, ``$FAQD_DATA`` is searched first, then ``data/`` in
the project. A dataset found nowhere is downloaded into the last folder searched, if the caller allows it.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..utils.files import atomic_write, cache_dir, project_root, require_writable
from ..utils.messages import did_you_mean
from .decoding import walk
from .images import DatasetError, ImageData, Images, balanced_indices, split_validation, subset
from .sources import BUILT_IN, SOURCES, Decoded, Source, is_tree, read_tree

__all__ = [
    "DatasetError", "ImageData", "Images", "balanced_indices", "data_roots", "load", "on_disk", "resolve",
    "split_validation", "subset",
]  # fmt: skip


ASKED, FOUND = "asked for", "found on disk"  # ends of reasons that a caption need not give
CACHE_FORMAT = 3  # raise this number when pictures are decoded to other pixels than before


def data_roots(data_root: str | os.PathLike | None = None) -> list[Path]:
    """The folders to search, in order. Raises DatasetError if ``data_root`` or ``$FAQD_DATA`` is no folder."""
    origin, value = ("data_root", data_root) if data_root else ("FAQD_DATA", os.environ.get("FAQD_DATA"))
    if value and not Path(value).is_dir():
        raise DatasetError(f"{origin} is {str(value)!r}, which is not a folder: correct it or unset it")
    given = [Path(value)] if value else []
    return given if data_root else [*given, project_root() / "data"]


def _find(source: Source, roots: list[Path]) -> Path | None:
    return next(filter(source.is_there, _places(source, roots)), None)


def _places(source: Source, roots: list[Path]) -> list[Path]:
    return [root / place for root in roots for place in source.places]


def _signature(path: Path) -> str:
    """A digest of names, sizes and times of all files in ``path``, which costs less than one of their content."""
    digest = hashlib.sha256(str(path.resolve()).encode())
    inside = [f"{folder}/{name}" for folder, _, names in walk(path) for name in names] if path.is_dir() else []
    for file in sorted(inside) or [path.as_posix()]:
        try:
            status = os.stat(file)
        except OSError as error:
            raise DatasetError(f"{file} cannot be read ({error.strerror}): replace or remove it") from error
        digest.update(f"{file[len(str(path)) :]}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _download(source: Source, target: Path) -> None:
    """Download into a temporary folder, then move the result: an interrupted download never looks complete."""
    with tempfile.TemporaryDirectory(dir=target, prefix=".download-") as folder:
        source.download(Path(folder))
        for made in Path(folder).iterdir():
            os.replace(made, target / made.name)


def _source(name: str, roots: list[Path]) -> Source:
    if name in SOURCES:
        return SOURCES[name]
    if name and Path(name).name == name and any(is_tree(root / name) for root in roots):
        return Source((name,), read_tree, is_tree)
    if inside := [root for root in roots if root.name == name and is_tree(root)]:
        raise DatasetError(f"{inside[0]} is the dataset itself: set data_root to its parent folder, {inside[0].parent}")
    there = next((root / name for root in roots if name and (root / name).is_dir()), None)
    lacking = "" if there is None else f"; {there} has no {'test/' if (there / 'train').is_dir() else 'train/'}"
    raise DatasetError(
        f"unknown dataset {name!r}{did_you_mean(name, SOURCES)}: choose {', '.join(SOURCES)}, or the name of a folder "
        f"with train/<class>/* and test/<class>/* in {' or '.join(map(str, roots))}{lacking}"
    )


def on_disk(name: str, data_root: str | os.PathLike | None = None) -> bool:
    """Whether the dataset can be read without a download. Raises DatasetError for an unknown name or data root."""
    roots = data_roots(data_root)
    return name in BUILT_IN or _find(_source(name, roots), roots) is not None


def resolve(
    name: str, data_root: str | os.PathLike | None = None, *, allow_digits: bool = True, allow_download: bool = False
) -> tuple[str, str]:
    """Resolve ``"auto"`` to a dataset; returns (name, reason in one line).

    ``"auto"`` means the first of these: the original CIFAR-10 on disk; CIFAR-10 as JPEGs on disk; a download of the
    original, if ``allow_download``; the digits, if ``allow_digits``. Any other name is checked and returned unchanged.
    Raises DatasetError for an unknown name or data root, or if there is nothing to choose for ``"auto"``.
    """
    roots = data_roots(data_root)
    if name != "auto":
        _source(name, roots)
        return name, f"{name}: {ASKED}"
    for candidate in ("cifar10", "cifar10-jpeg"):
        if on_disk(candidate, data_root):
            return candidate, f"{candidate}: {FOUND}"
    places = " and ".join(map(str, roots))
    if allow_download:
        return "cifar10", f"cifar10: not on disk in {places}; to be downloaded"
    if allow_digits:
        return "digits", f"digits, scikit-learn's real 8×8 images: no CIFAR-10 was found in {places}"
    raise DatasetError(f"no CIFAR-10 in {places}: set FAQD_DATA or give --data-root, or name a dataset")


def load(
    name: str, data_root: str | os.PathLike | None = None, *, image_size: int | None = None, download: bool = False
) -> ImageData:
    """Load a dataset by name. Decoded datasets are cached in :func:`faqd_lib.utils.files.cache_dir`.

    Args:
        name: a key of :data:`SOURCES`, or the name of a folder of images in a data root.
        data_root: the only folder to search; None for ``$FAQD_DATA``, then ``data/``.
        image_size: height and width in pixels to resize a folder's images to; None keeps their size.
        download: whether the official archive may be downloaded if the dataset is not on disk.

    Raises:
        DatasetError: the name is unknown, the dataset was not found, or a file is truncated, damaged or wrong.
        PermissionError: the cache or the download's folder cannot be written to.
    """
    roots = data_roots(data_root)
    source = _source(name, roots)
    if name in BUILT_IN:
        return _assemble(name, source, source.read(Path(), image_size), "scikit-learn")
    path = _find(source, roots)
    if path is None and download and source.download is not None:
        target = require_writable(roots[-1])
        try:
            _download(source, target)
        except (OSError, RuntimeError) as error:
            raise DatasetError(
                f"{name} is not on disk and could not be downloaded into {target} ({error}). Without a network, "
                f"put {' or '.join(source.places)} into {roots[0]}."
            ) from error
        path = _find(source, roots)
    if path is None:
        looked = ", ".join(map(str, _places(source, roots)))
        remedy = source.hint or "allow the download or fetch the official archive"
        if tree := next((root / name for root in roots if is_tree(root / name)), None):
            other = "ask for cifar10-jpeg, if it is CIFAR-10, or " if name == "cifar10" else ""
            remedy += f"; {tree} is a folder of images: {other}give it another name and ask for that name"
        raise DatasetError(
            f"dataset {name!r} was not found. Looked for: {looked}. Put it there ({remedy}), set FAQD_DATA or give "
            "--data-root."
        )
    decoded = _cached(name, source, path, image_size)
    if source.classes is not None and decoded.classes != source.classes:
        raise DatasetError(
            f"{path} is not {name}: its classes are {', '.join(decoded.classes[:4])}…, not {source.classes[0]}, "
            f"{source.classes[1]}…. Give the folder another name, and ask for that name"
        )
    return _assemble(name, source, decoded, path.name, source.remark(path))


def _cached(name: str, source: Source, path: Path, image_size: int | None) -> Decoded:
    file = cache_dir() / f"{name}-{image_size or 'original'}-{_signature(path)}-{CACHE_FORMAT}.safetensors"
    if file.exists():
        # A damaged header holds other keys, or other values than were written.
        with contextlib.suppress(SafetensorError, KeyError, ValueError), safe_open(file, "pt") as opened:
            metadata = opened.metadata()
            train, test = (
                Images(opened.get_tensor(split), opened.get_tensor(f"{split}_labels")) for split in ("train", "test")
            )
            cached = Decoded(train, test, tuple(json.loads(metadata["classes"])))
            if (cached.fingerprint, file.name) == (metadata["fingerprint"], metadata["file"]):
                return cached
        # The cache is only a copy: decode again, and tell the user why loading takes longer.
        print(f"the decoded copy {file.name} is damaged; decoding {path.name} again", flush=True)
    decoded = source.read(path, image_size)
    require_writable(file.parent)
    metadata = {"fingerprint": decoded.fingerprint, "classes": json.dumps(decoded.classes), "file": file.name}
    atomic_write(file, lambda temporary: save_file(decoded.tensors, temporary, metadata))
    return decoded


def _assemble(name: str, source: Source, decoded: Decoded, origin: str, remark: str = "") -> ImageData:
    pixels = decoded.train.pixels
    # Counts are integers, hence exact: mean and deviation do not depend on the order of summation.
    levels = torch.stack([torch.bincount(pixels[:, c].flatten(), minlength=256) for c in range(3)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    share = levels / levels.sum(1, keepdim=True)
    mean = (share * values).sum(1)
    std = ((share * values**2).sum(1) - mean**2).clamp_min(1e-12).sqrt()
    return ImageData(
        name, decoded.classes, decoded.train, decoded.test, tuple(mean.tolist()), tuple(std.tolist()),
        decoded.fingerprint, source.flip, "; ".join(filter(None, (source.note, remark))), origin,
    )  # fmt: skip
