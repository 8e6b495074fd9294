"""Datasets: found on disk, checked, decoded once into uint8 tensors, and named by a fingerprint of their content.

Places are searched in this order: an explicit ``data_root`` (and then nothing else), otherwise ``$FAQD_DATA``,
otherwise ``data/`` in the project; a download into the last of these comes last and only where it is allowed.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .files import atomic_write, cache_dir, project_root, require_writable, tensors_digest

JPEG_NOTE = "all CIFAR-10 images re-encoded as JPEG; accuracies are not comparable with the original CIFAR-10"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
TINY_ADDRESS = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")


class DatasetError(RuntimeError):
    """A dataset is missing, damaged or not what its name says; the message names what, where and what to do."""


@dataclass(frozen=True)
class Images:
    """A split: ``pixels`` uint8 (count, 3, height, width) and ``labels`` int64 (count), or None if it has none."""

    pixels: torch.Tensor
    labels: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4:
            raise ValueError(
                f"pixels must be uint8 of 4 dimensions, got {self.pixels.dtype} {tuple(self.pixels.shape)}"
            )
        if self.labels is not None and len(self.labels) != len(self.pixels):
            raise ValueError(f"{len(self.pixels)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.pixels)

    def unlabelled(self) -> "Images":
        """The same images without labels: what label-free training is given."""
        return Images(self.pixels)

    def take(self, indices: torch.Tensor) -> "Images":
        """The images at ``indices`` (int64), with their labels if there are any."""
        return Images(self.pixels[indices], None if self.labels is None else self.labels[indices])


@dataclass(frozen=True)
class ImageData:
    """A dataset in memory.

    ``mean`` and ``std`` are per channel of the whole training split, in [0, 1]. ``flip`` says whether a mirrored
    picture keeps its meaning (it does not for digits). ``fingerprint`` is the SHA-256 of content and class names;
    ``note`` goes into every caption.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str
    flip: bool = True
    note: str = ""
    source: str = ""

    @property
    def image_size(self) -> int:
        """Height of the images in pixels (they are square)."""
        return self.train.pixels.shape[-1]


def balanced_indices(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Indices (sorted) of a seeded subset with as many images of each class as possible.

    Raises:
        ValueError: ``count`` is not in 1..len(labels).
    """
    if not 1 <= count <= len(labels):
        raise ValueError(f"cannot take {count} images from {len(labels)}: choose 1 to {len(labels)}")
    generator = torch.Generator().manual_seed(seed)
    # The n-th image of every class comes before the (n+1)-th of any: the first `count` are as balanced as can be.
    shuffled = torch.randperm(len(labels), generator=generator)
    rank = torch.empty_like(labels)
    for label in labels.unique():
        members = (labels[shuffled] == label).nonzero().squeeze(1)
        rank[members] = torch.arange(len(members))
    return shuffled[rank.argsort(stable=True)[:count]].sort().values


def subset(images: Images, count: int | None, seed: int) -> Images:
    """A class-balanced, seeded subset of labelled images; all of them if ``count`` is None."""
    if count is None or count == len(images):
        return images
    return images.take(balanced_indices(images.labels, count, seed))


def split_validation(images: Images, count: int, seed: int) -> tuple[Images, Images | None]:
    """(training images, class-balanced held-out images); the second is None if ``count`` is 0."""
    if count == 0:
        return images, None
    if count >= len(images):
        raise ValueError(f"validation_images={count} leaves nothing to train on: there are {len(images)} images")
    held_out = torch.zeros(len(images), dtype=torch.bool)
    held_out[balanced_indices(images.labels, count, seed)] = True
    return images.take((~held_out).nonzero().squeeze(1)), images.take(held_out.nonzero().squeeze(1))


# ---------------------------------------------------------------------------------------------------------------------
# Places


def data_roots(data_root: str | os.PathLike | None = None) -> list[Path]:
    """The folders that are searched, first to last.

    Raises:
        DatasetError: ``data_root`` or ``$FAQD_DATA`` names a folder that does not exist.
    """
    for origin, value in (("data_root", data_root), ("FAQD_DATA", os.environ.get("FAQD_DATA"))):
        if value and not Path(value).is_dir():
            raise DatasetError(f"{origin} is {str(value)!r}, which is not a folder: correct it or leave it unset")
        if value and origin == "data_root":
            return [Path(value)]
    from_environment = [Path(os.environ["FAQD_DATA"])] if os.environ.get("FAQD_DATA") else []
    return [*from_environment, project_root() / "data"]


@dataclass(frozen=True)
class _Decoded:
    """What a reader returns: uint8 pixels and labels of both splits, and the names of the classes."""

    train: Images
    test: Images
    classes: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """How one dataset is found (``places``: paths under a root, first match counts) and read."""

    places: tuple[str, ...]
    read: Callable[[Path, int | None], _Decoded]
    is_there: Callable[[Path], bool] = Path.exists
    download: Callable[[Path], None] | None = None
    flip: bool = True
    note: str = ""
    hint: str = ""


def _find(source: _Source, roots: list[Path]) -> Path | None:
    for root in roots:
        for place in source.places:
            if source.is_there(root / place):
                return root / place
    return None


def _signature(path: Path) -> str:
    """A digest of names, sizes and times below ``path``: cheap, changes whenever a file does."""
    digest = hashlib.sha256()
    files = [path.as_posix()] if path.is_file() else []
    for folder, _, names in os.walk(path):
        files += [f"{folder}/{name}" for name in names]
    for file in sorted(files):
        status = os.stat(file)
        digest.update(f"{file[len(str(path)) :]}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Readers


def _decode(jobs: list[tuple[str, Callable[[], bytes]]], image_size: int | None) -> torch.Tensor:
    """Decode images in threads (Pillow releases the interpreter lock) into uint8 (count, 3, size, size)."""

    def one(job: tuple[str, Callable[[], bytes]]) -> np.ndarray:
        name, read = job
        try:
            with Image.open(io.BytesIO(read())) as picture:
                picture = picture.convert("RGB")
                if image_size is not None and picture.size != (image_size, image_size):
                    picture = picture.resize((image_size, image_size), Image.Resampling.BILINEAR)
                return np.asarray(picture).transpose(2, 0, 1)
        except OSError as error:
            raise DatasetError(
                f"{name} cannot be decoded ({error}): the file is truncated or no image. "
                "Replace it with a whole copy, or remove it."
            ) from error

    if not jobs:
        raise DatasetError("there is no image to decode")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        decoded: Iterator[np.ndarray] = pool.map(one, jobs, chunksize=64)
        first = next(decoded)
        pixels = np.empty((len(jobs), *first.shape), np.uint8)
        pixels[0] = first
        for index, picture in enumerate(decoded, start=1):
            if picture.shape != first.shape or picture.shape[1] != picture.shape[2]:
                raise DatasetError(
                    f"{jobs[index][0]} is {picture.shape[2]}x{picture.shape[1]} but {jobs[0][0]} is "
                    f"{first.shape[2]}x{first.shape[1]}: images must be square and of one size; "
                    "give --image-size to have them resized"
                )
            pixels[index] = picture
    return torch.from_numpy(pixels)


def _test_folder(tree: Path) -> Path | None:
    return next((tree / name for name in ("test", "val") if (tree / name).is_dir()), None)


def _is_tree(path: Path) -> bool:
    return (path / "train").is_dir() and _test_folder(path) is not None


def _read_tree(path: Path, image_size: int | None) -> _Decoded:
    """``train/<class>/*`` and ``test/<class>/*`` (or ``val``), as torchvision's ImageFolder reads them."""
    from ._torchvision import torchvision

    splits, classes = [], None
    for folder in (path / "train", _test_folder(path)):
        try:
            listing = torchvision.datasets.ImageFolder(folder)
        except FileNotFoundError as error:
            raise DatasetError(f"{folder} is not a tree of <class>/<image> folders: {error}") from error
        if classes is not None and listing.classes != classes:
            raise DatasetError(
                f"{folder} has the classes {listing.classes[:5]}… but {path / 'train'} has {classes[:5]}…: "
                "both splits need the same class folders"
            )
        classes = listing.classes
        jobs = [(file, Path(file).read_bytes) for file, _ in listing.samples]
        splits.append(Images(_decode(jobs, image_size), torch.tensor(listing.targets)))
    return _Decoded(*splits, tuple(classes))


def _read_tiny_imagenet(path: Path, image_size: int | None) -> _Decoded:
    """The official layout, as a folder or as the official zip archive, which is read in place, not unpacked."""
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())

        def read(name: str) -> bytes:
            return (path / name).read_bytes()
    else:
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise DatasetError(f"{path} is not a whole zip archive ({error}): fetch it again") from error
        prefix = "tiny-imagenet-200/"
        names = sorted(name[len(prefix) :] for name in archive.namelist() if name.startswith(prefix))

        def read(name: str) -> bytes:
            return archive.read(prefix + name)

    listed = set(names)
    for needed in ("wnids.txt", "words.txt", "val/val_annotations.txt"):
        if needed not in listed:
            raise DatasetError(f"{path} has no {needed}: it is not a whole Tiny ImageNet; fetch the official archive")
    wnids = sorted(read("wnids.txt").decode().split())
    words = dict(line.split("\t", 1) for line in read("words.txt").decode().splitlines() if "\t" in line)
    index = {wnid: position for position, wnid in enumerate(wnids)}
    train = [name for name in names if name.startswith("train/") and name.endswith(".JPEG")]
    annotations = [line.split("\t") for line in read("val/val_annotations.txt").decode().splitlines() if line.strip()]
    val = [(f"val/images/{fields[0]}", fields[1]) for fields in annotations]
    missing = [name for name, _ in val if name not in listed]
    if missing or not train:
        raise DatasetError(f"{path} lacks {missing[0] if missing else 'train/<wnid>/images/*.JPEG'}: fetch it again")
    unknown = {wnid for _, wnid in val} - index.keys() | {name.split("/")[1] for name in train} - index.keys()
    if unknown:
        raise DatasetError(f"{path}: {sorted(unknown)[0]} is not in wnids.txt: fetch the archive again")

    def split(files: list[str], labels: list[int]) -> Images:
        jobs = [(f"{path}/{name}", lambda name=name: read(name)) for name in files]
        return Images(_decode(jobs, image_size), torch.tensor(labels))

    return _Decoded(
        split(train, [index[name.split("/")[1]] for name in train]),
        split([name for name, _ in val], [index[wnid] for _, wnid in val]),
        tuple(words.get(wnid, wnid).split(",")[0] for wnid in wnids),
    )


def _cifar_class(name: str):
    from ._torchvision import torchvision

    return {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]


def _read_cifar(name: str) -> Callable[[Path, int | None], _Decoded]:
    def read(path: Path, image_size: int | None) -> _Decoded:
        """torchvision's loader, which checks every file's MD5 before it reads it."""
        from ._torchvision import torchvision

        dataset = _cifar_class(name)
        if path.is_file():  # the archive: unpacked into the cache, because its own folder may be read-only
            if not torchvision.datasets.utils.check_integrity(str(path), dataset.tgz_md5):
                raise DatasetError(f"{path} is truncated or not the official archive (MD5 differs): fetch it again")
            unpacked = require_writable(cache_dir() / f"{name}-unpacked")
            torchvision.datasets.utils.extract_archive(str(path), str(unpacked))
            path = unpacked / dataset.base_folder
        for file, md5 in [*dataset.train_list, *dataset.test_list, [dataset.meta["filename"], dataset.meta["md5"]]]:
            if not torchvision.datasets.utils.check_integrity(str(path / file), md5):
                state = "is truncated or damaged (MD5 differs)" if (path / file).exists() else "is missing"
                raise DatasetError(f"{path / file} {state}: remove {path} and fetch the dataset again")
        splits = [dataset(str(path.parent), train=train) for train in (True, False)]
        if image_size not in (None, 32):
            raise DatasetError(f"{name} has 32x32 images; image_size={image_size} is for folders of images")
        return _Decoded(
            *(
                Images(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets))
                for s in splits
            ),
            tuple(splits[0].classes),
        )

    return read


def _download_cifar(name: str) -> Callable[[Path], None]:
    return lambda root: _cifar_class(name)(str(root), download=True)


def _download_tiny(root: Path) -> None:
    from ._torchvision import torchvision

    torchvision.datasets.utils.download_url(TINY_ADDRESS, str(root), "tiny-imagenet-200.zip", TINY_MD5)


def _read_digits(path: Path, image_size: int | None) -> _Decoded:
    """scikit-learn's 1,797 real 8×8 digits (UCI), enlarged to 32×32; one fifth, class-balanced, is the test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float().unsqueeze(1) * (255 / 16)
    size = image_size or 32
    large = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
    images = Images(large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(bunch.target))
    train, test = split_validation(images, 360, seed=0)
    return _Decoded(train, test, tuple(str(digit) for digit in range(10)))


_JPEG_HINT = "a folder with train/<class>/*.jpg and test/<class>/*.jpg"
SOURCES: dict[str, _Source] = {
    "cifar10": _Source(
        ("cifar-10-batches-py", "cifar-10-python.tar.gz"), _read_cifar("cifar10"), download=_download_cifar("cifar10")
    ),
    "cifar100": _Source(
        ("cifar-100-python", "cifar-100-python.tar.gz"), _read_cifar("cifar100"), download=_download_cifar("cifar100")
    ),
    "tiny-imagenet": _Source(
        ("tiny-imagenet-200", "tiny-imagenet-200.zip"), _read_tiny_imagenet, download=_download_tiny
    ),
    "cifar10-jpeg": _Source(("cifar10-jpeg", "cifar10"), _read_tree, _is_tree, note=JPEG_NOTE, hint=_JPEG_HINT),
    "digits": _Source(
        (), _read_digits, flip=False, note="scikit-learn's 8×8 digits enlarged to 32×32, not a dataset of the paper"
    ),
}
BUILT_IN = ("digits",)


def _source(name: str, roots: list[Path]) -> _Source:
    if name in SOURCES:
        return SOURCES[name]
    if name and Path(name).name == name and any(_is_tree(root / name) for root in roots):
        return _Source((name,), _read_tree, _is_tree)
    raise DatasetError(
        f"unknown dataset {name!r}: choose {', '.join(SOURCES)}, or the name of a folder with train/<class>/* and "
        f"test/<class>/* below {' or '.join(str(root) for root in roots)}"
    )


def on_disk(name: str, data_root: str | os.PathLike | None = None) -> bool:
    """Whether the dataset can be read without a download."""
    roots = data_roots(data_root)
    return name in BUILT_IN or _find(_source(name, roots), roots) is not None


def resolve(
    name: str, data_root: str | os.PathLike | None = None, *, allow_digits: bool = True, allow_download: bool = False
) -> tuple[str, str]:
    """Turn ``"auto"`` into a dataset's name, and say why in one line: (name, reason).

    CIFAR-10 if it is on disk, original before JPEG; otherwise digits, or the original to be downloaded.
    """
    roots = data_roots(data_root)
    if name != "auto":
        _source(name, roots)
        return name, f"{name}: asked for"
    for candidate in ("cifar10", "cifar10-jpeg"):
        if on_disk(candidate, data_root):
            return candidate, f"{candidate}: found on disk"
    places = " and ".join(str(root) for root in roots)
    if allow_download:
        return "cifar10", f"cifar10: not on disk in {places}; to be downloaded"
    if allow_digits:
        return "digits", f"digits, scikit-learn's real 8×8 images: no CIFAR-10 was found in {places}"
    raise DatasetError(f"no CIFAR-10 in {places}: set FAQD_DATA or give --data-root, or name a dataset")


def load(
    name: str,
    data_root: str | os.PathLike | None = None,
    *,
    image_size: int | None = None,
    download: bool = False,
) -> ImageData:
    """Load a dataset by name: found, decoded (once: the result is cached), checked against its digest.

    Args:
        name: a key of :data:`SOURCES`, or a folder of images below a data root.
        data_root: the only folder to search; None for ``$FAQD_DATA``, then ``data/``.
        image_size: height and width in pixels to resize the images of a folder to; None keeps them.
        download: whether an official archive may be fetched where nothing is found.

    Raises:
        DatasetError: unknown name; nothing found; a truncated, damaged or wrong file.
    """
    roots = data_roots(data_root)
    source = _source(name, roots)
    if name in BUILT_IN:
        decoded = source.read(Path(), image_size)
        return _assemble(name, source, decoded, _fingerprint(decoded), "scikit-learn")
    path = _find(source, roots)
    if path is None and download and source.download is not None:
        target = require_writable(roots[-1])
        try:
            source.download(target)
        except (OSError, RuntimeError) as error:
            raise DatasetError(
                f"{name} is not on disk and could not be downloaded into {target} ({error}). Without a network, "
                f"put {' or '.join(source.places)} into {roots[0]}."
            ) from error
        path = _find(source, roots)
    if path is None:
        looked = ", ".join(str(root / place) for root in roots for place in source.places)
        remedy = source.hint or "allow the download or fetch the official archive"
        raise DatasetError(
            f"dataset {name!r} was not found. Looked for: {looked}. Put it there ({remedy}), set FAQD_DATA or give "
            "--data-root."
        )
    return _assemble(name, source, *_cached(name, source, path, image_size), path.name)


def _fingerprint(decoded: _Decoded) -> str:
    return tensors_digest(_tensors(decoded), salt=json.dumps(decoded.classes))


def _tensors(decoded: _Decoded) -> dict[str, torch.Tensor]:
    return {
        "train": decoded.train.pixels,
        "train_labels": decoded.train.labels,
        "test": decoded.test.pixels,
        "test_labels": decoded.test.labels,
    }


def _from_cache(file: Path) -> tuple[_Decoded, str] | None:
    """The decoded dataset in ``file`` and its fingerprint, or None if the file is damaged."""
    try:
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
    except SafetensorError:
        return None
    decoded = _Decoded(
        Images(tensors["train"], tensors["train_labels"]),
        Images(tensors["test"], tensors["test_labels"]),
        tuple(json.loads(metadata["classes"])),
    )
    return (decoded, metadata["fingerprint"]) if _fingerprint(decoded) == metadata["fingerprint"] else None


def _cached(name: str, source: _Source, path: Path, image_size: int | None) -> tuple[_Decoded, str]:
    file = cache_dir() / f"{name}-{image_size or 'original'}-{_signature(path)}.safetensors"
    if file.exists():
        cached = _from_cache(file)
        if cached is not None:
            return cached
        # The cache is only a copy: it is made again, and the user is told why this takes a while.
        print(f"the decoded copy {file.name} is damaged; decoding {path.name} again", flush=True)
    decoded = source.read(path, image_size)
    require_writable(file.parent)
    fingerprint = _fingerprint(decoded)
    metadata = {"fingerprint": fingerprint, "classes": json.dumps(decoded.classes)}
    atomic_write(file, lambda temporary: save_file(_tensors(decoded), temporary, metadata))
    return decoded, fingerprint


def _assemble(name: str, source: _Source, decoded: _Decoded, fingerprint: str, origin: str) -> ImageData:
    pixels = decoded.train.pixels
    # Exact integer counts: mean and deviation do not depend on the order of a float reduction.
    levels = torch.stack([torch.bincount(pixels[:, c].flatten(), minlength=256) for c in range(3)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    share = levels / levels.sum(1, keepdim=True)
    mean = (share * values).sum(1)
    std = ((share * values**2).sum(1) - mean**2).clamp_min(1e-12).sqrt()
    return ImageData(
        name,
        decoded.classes,
        decoded.train,
        decoded.test,
        tuple(mean.tolist()),
        tuple(std.tolist()),
        fingerprint,
        source.flip,
        source.note,
        origin,
    )
