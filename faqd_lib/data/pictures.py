"""Any folder of pictures: decoded once into a memory-mapped file, split by content, read back in augmented batches.

    pictures = open_pictures("photos", Preprocessing(224), "cache")
    batches = PictureBatches(pictures.train, 32, seed=0, normalizer=Preprocessing(224).normalizer("cpu"))
    for batch in batches.epoch(0): ...

Pixels stay on disk until a batch asks for them. Memory grows only by the names of the files. A decoded folder is a
folder of three files. It gets its final name last, so a folder of that name is complete.
"""

import hashlib
import importlib
import json
import os
import shutil
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import filelock
import numpy as np
import torch
import torch.nn.functional as F

from ..utils.files import atomic_write_text, canonical_json, require_writable
from ..utils.messages import check_choice, kind_of
from .batches import PADDING, Batch, Normalizer, stream
from .decoding import DEEP, EXTENSIONS, TRANSPARENT, TURNED, picture_names, summary
from .images import DatasetError, Images, check_pixels
from .preprocessing import Preprocessing

CACHE_FORMAT = 2  # raise this number when pictures are decoded to other pixels than before
PHOTOGRAPH = 64  # pixels; smaller pictures are shifted, all others are cropped and resized
CROP_AREA = (0.35, 1.0)  # share of a picture's area that a random crop keeps
CROP_ASPECT = (3 / 4, 4 / 3)  # width over height of a random crop
NOTES = (DEEP, TRANSPARENT, TURNED)  # bits 0, 1, 2 of a row's notes
_ROW = np.dtype([("content", "<u8"), ("notes", "u1")])  # content 0: not decoded
_CHECKED = 32  # pictures whose pixels are compared with their digests when a decoded folder is opened


class Unreadable(NamedTuple):
    """A file that was left out: its name below the folder, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class PictureSet:
    """Some of the pictures of a tensor that may be memory-mapped; indexing copies only what it returns."""

    pixels: torch.Tensor  # uint8 (all, 3, size, size), on the CPU
    indices: torch.Tensor  # int64 (count,), ascending: which of ``pixels`` belong to the set
    contents: np.ndarray  # uint64 (all,), digests of the pixels
    names: Sequence[str] = ()  # of all ``pixels``, paths below the folder; () if they have none

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, chosen: slice | torch.Tensor) -> torch.Tensor:
        """A copy of the pictures at ``chosen`` (a slice, or int64 (n,)) of the set: uint8 (n, 3, size, size)."""
        return self.pixels[self.indices[chosen]]

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.pixels.shape[-1]

    def name(self, position: int) -> str:
        """Name of the picture at ``position`` of the set, for people: its path below the folder, or its number."""
        index = int(self.indices[position])
        return _printable(self.names[index]) if self.names else str(index)

    def chunks(self, size: int) -> Iterator[torch.Tensor]:
        """The pictures in order, ``size`` at a time: uint8 (up to size, 3, image_size, image_size)."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def images(self) -> Images:
        """A copy of all pictures in memory, without labels."""
        return Images(self[:])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the pictures' digests, in order."""
        return hashlib.sha256(self.contents[self.indices.numpy()].tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Pictures:
    """A folder of pictures, split. No picture of ``train`` equals one of ``held_out``."""

    train: PictureSet
    held_out: PictureSet
    unreadable: tuple[Unreadable, ...] = ()  # files that were left out
    notes: tuple[str, ...] = ()  # lines that say what was left out, turned, scaled or composed


def open_pictures(
    folder: str | os.PathLike,
    preprocessing: Preprocessing,
    cache: str | os.PathLike,
    *,
    held_out: float = 0.1,
    seed: int = 0,
    max_unreadable: float = 0.05,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pictures:
    """Open a folder of pictures of any size and mode, decoding those that no earlier call has decoded.

    Links are followed, hidden files and folders left out. A killed call goes on where it stopped. A second call for
    the same pictures waits for the first.

    Args:
        folder: pictures, at any depth.
        preprocessing: how a picture becomes a square; mean and std have no influence.
        cache: folder for decoded pictures; 3 · image_size² bytes a picture.
        held_out: pictures that are not trained on: below 1 a share of all, else a number.
        seed: seed of the split.
        max_unreadable: largest share of files that may be left out because they cannot be decoded.
        workers: threads; None for one a core, at most 8.
        progress: called with the numbers of files done and of all files.

    Raises:
        DatasetError: the folder cannot be read, holds no pictures, no two different pictures, or too many
            that cannot be decoded; or links lead from a folder to one above it.
        ValueError: ``held_out`` or ``max_unreadable`` is out of range.
        OSError: the cache cannot be written, or its disk is too small.
    """
    if not 0 <= max_unreadable < 1:
        raise ValueError(f"max_unreadable must be in [0, 1), a share of the files, got {max_unreadable}")
    folder, cache = Path(folder), Path(cache)
    names, key, others = _listed(folder, preprocessing)
    place = cache / f"pictures-{key}"
    with _lock(require_writable(cache) / f".{place.name}.lock"):
        if not _is_intact(place, len(names), preprocessing.image_size):
            _decode(folder, names, preprocessing, place, max_unreadable, workers or _cores(), progress)
        elif progress is not None:
            progress(len(names), len(names))
        rows = np.fromfile(place / "rows", _ROW)
        complete = json.loads((place / "complete.json").read_text("utf-8"))
        pixels = _mapped(place / "pixels", len(names), preprocessing.image_size)
    unreadable = tuple(Unreadable(*one) for one in complete["unreadable"])
    _check_share(folder, unreadable, len(names), max_unreadable)
    lines = summary(Counter({note: int((rows["notes"] >> bit & 1).sum()) for bit, note in enumerate(NOTES)}).elements())
    if others:
        kinds = ", ".join(f"{count} of {suffix}" for suffix, count in others.most_common())
        lines.append(f"other files, left out: {kinds}; read are {', '.join(EXTENSIONS)}")
    if unreadable:
        lines.append(f"{len(unreadable):,} of {len(names):,} pictures cannot be decoded and are left out")
    readable = np.flatnonzero(rows["content"])
    train, held = _split(str(folder), rows["content"], readable, held_out, seed)
    sets = (PictureSet(pixels, torch.from_numpy(one), rows["content"], names) for one in (train, held))
    return Pictures(*sets, unreadable, tuple(lines))


def split_pictures(pixels: torch.Tensor, *, held_out: float = 0.1, seed: int = 0) -> Pictures:
    """Split pictures that are in memory, uint8 (count, 3, size, size), as :func:`open_pictures` splits a folder.

    Raises ValueError for other pixels, and the errors of the split that :func:`open_pictures` raises.
    """
    check_pixels(pixels)
    if pixels.shape[1] != 3 or pixels.shape[2] != pixels.shape[3]:
        raise ValueError(f"pixels must be (count, 3, size, size), got {kind_of(pixels)}: cut squares of RGB pictures")
    pixels = pixels.cpu()
    contents = np.fromiter((_content(picture.permute(1, 2, 0).numpy()) for picture in pixels), np.uint64)
    train, held = _split("images", contents, np.arange(len(pixels)), held_out, seed)
    return Pictures(*(PictureSet(pixels, torch.from_numpy(one), contents) for one in (train, held)))


class PictureBatches:
    """Training batches of a :class:`PictureSet`, with the interface of :class:`~faqd_lib.data.batches.Batches`.

    Each epoch draws a new order and drops the pictures that do not fill a batch. A picture's crop and mirroring follow
    from seed, epoch and its place in the order. Pixels are read from the map a batch at a time.

    Args:
        pictures: the training set.
        batch_size: 2 to ``len(pictures)``; batch normalisation needs two pictures.
        seed: seed of order and augmentation.
        normalizer: mean and deviation, on the training device.
        crops: ``"resized"``: a random part, of an area in :data:`CROP_AREA`, resized by ``torchvision.transforms.v2``;
            ``"shifted"``: padded with zeros and shifted, as :class:`Batches` does; ``"none"``. None chooses by size,
            see :data:`PHOTOGRAPH`.
        flip: whether pictures may be mirrored.

    Raises TypeError for other pictures, and ValueError for a ``batch_size`` or ``crops`` out of range.
    """

    def __init__(
        self,
        pictures: PictureSet,
        batch_size: int,
        seed: int,
        normalizer: Normalizer,
        *,
        crops: Literal["resized", "shifted", "none"] | None = None,
        flip: bool = True,
    ) -> None:
        if not isinstance(pictures, PictureSet):
            raise TypeError(f"pictures must be a PictureSet, got {kind_of(pictures)}: use split_pictures(pixels).train")
        if not 2 <= batch_size <= len(pictures):
            allowed = f"between 2, for batch normalisation, and the {len(pictures)} pictures of the set"
            raise ValueError(f"batch_size must be {allowed}, got {batch_size}")
        self.crops = crops or ("resized" if pictures.image_size >= PHOTOGRAPH else "shifted")
        check_choice("crops", self.crops, ("resized", "shifted", "none"))
        self.pictures, self.batch_size, self.seed, self.flip = pictures, batch_size, seed, flip
        self.normalizer, self.device = normalizer, normalizer.device
        # Beside an accelerator the idle cores prepare batches ahead. Training on the CPU needs the cores itself.
        self.threads = 1 if self.device.type == "cpu" else _cores()

    def __len__(self) -> int:
        return len(self.pictures) // self.batch_size

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from batch number ``first`` on; seed and epoch determine every bit."""
        count, size = len(self.pictures), self.pictures.image_size
        order = torch.randperm(count, generator=stream(self.seed, "order", epoch))
        boxes, mirrored = crop_boxes(self.crops, count, size, stream(self.seed, "augmentation", epoch))

        def prepared(start: int) -> torch.Tensor:
            places = slice(start, start + self.batch_size)
            pixels = cropped(self.pictures[order[places]], boxes[places], self.crops)
            flipped = mirrored[places] & self.flip
            pixels[flipped] = pixels[flipped].flip(-1)
            return pixels

        starts = range(first * self.batch_size, len(self) * self.batch_size, self.batch_size)
        with ThreadPoolExecutor(self.threads) as pool:
            for pixels in _in_order(pool, prepared, starts, self.threads - 1):
                yield Batch(self.normalizer(pixels.to(self.device)), None)


def crop_boxes(crops: str, count: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random crops of square pictures: int64 (count, 4), as top, left, height, width; and which to mirror, (count,)."""
    chance = torch.rand((5, count), generator=generator, dtype=torch.float64)
    height = width = torch.full((count,), size)
    top = left = torch.zeros(count, dtype=torch.int64)
    if crops == "resized":
        side = size * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * chance[0]).sqrt()
        narrow, wide = np.log(CROP_ASPECT)
        stretch = (0.5 * (narrow + (wide - narrow) * chance[1])).exp()
        height, width = ((side * factor).round().long().clamp(1, size) for factor in (1 / stretch, stretch))
        top, left = ((chance[2 + axis] * (size - taken + 1)).long() for axis, taken in enumerate((height, width)))
    elif crops == "shifted":
        top, left = ((chance[2 + axis] * (2 * PADDING + 1)).long() - PADDING for axis in (0, 1))
    return torch.stack([top, left, height, width], 1), chance[4] < 0.5


def cropped(pixels: torch.Tensor, boxes: torch.Tensor, crops: str) -> torch.Tensor:
    """The parts ``boxes`` (n, 4) of pictures, uint8 (n, 3, size, size), at that size; see :func:`crop_boxes`."""
    if crops == "none":
        return pixels
    size = pixels.shape[-1]
    if crops == "shifted":
        padded = F.pad(pixels, [PADDING] * 4)
        starts = (boxes[:, :2] + PADDING).tolist()
        parts = [picture[:, y : y + size, x : x + size] for picture, (y, x) in zip(padded, starts, strict=True)]
    else:
        resized_crop = _torchvision_functional().resized_crop
        parts = [
            resized_crop(picture, *box, [size, size], antialias=True)
            for picture, box in zip(pixels, boxes.tolist(), strict=True)
        ]
    return torch.stack(parts)


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    lock = filelock.FileLock(file)
    try:
        held = lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"waiting for another process that decodes the same pictures into {file.parent}", flush=True)
        held = lock.acquire()
    with held:
        yield


def _cores() -> int:
    return min(8, os.cpu_count() or 1)


def _torchvision_functional():
    """``torchvision.transforms.v2.functional``, imported here because it takes seconds."""
    from ..utils.torchvision_import import torchvision

    return importlib.import_module(f"{torchvision.__name__}.transforms.v2.functional")


def _printable(name: str) -> str:
    """A file's name with bytes that are no text written as ``\\udcXX``."""
    return name.encode("utf-8", "backslashreplace").decode()


def _listed(folder: Path, preprocessing: Preprocessing) -> tuple[list[str], str, Counter[str]]:
    """Sorted names of the pictures below a folder; a digest of the files' states and the geometry; other files."""
    others: Counter[str] = Counter()
    start = len(os.path.join(folder, ""))
    names = sorted(
        os.path.join(place, name)[start:] for place, found in picture_names(folder, others) for name in found
    )
    if not names:
        kinds = f", only files of {', '.join(others)}" if others else ""
        raise DatasetError(f"{folder} holds no picture{kinds}: pictures are files of {', '.join(EXTENSIONS)}")
    digest = hashlib.sha256(canonical_json([CACHE_FORMAT, preprocessing.geometry]).encode())
    digest.update(os.fsencode(folder.resolve()))
    for name in names:
        try:
            status = os.stat(folder / name)
            state = f"{status.st_size}|{status.st_mtime_ns}"
        except OSError as error:  # a link to nothing: it is listed as unreadable
            state = f"errno {error.errno}"
        digest.update(b"\0" + os.fsencode(name) + b"\0" + state.encode())
    return names, digest.hexdigest()[:16], others


def _check_share(folder: Path, unreadable: Sequence[Unreadable], count: int, allowed: float) -> None:
    if len(unreadable) > allowed * count:
        first = "".join(f"\n  {name} {reason}" for name, reason in unreadable[:10])
        raise DatasetError(
            f"{folder}: {len(unreadable):,} of {count:,} pictures cannot be decoded, more than max_unreadable="
            f"{allowed:g} allows. Repair or remove them, or raise max_unreadable. The first are:{first}"
        )


def _content(picture: np.ndarray) -> int:
    """A digest of pixels (height, width, 3), 1 to 2⁶⁴ − 1."""
    digest = hashlib.blake2b(np.ascontiguousarray(picture), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _mapped(file: Path, count: int, size: int) -> torch.Tensor:
    """The pixels of a file as uint8 (count, 3, size, size), channels-last, read when used; they cannot be written."""
    array = np.memmap(file, np.uint8, "r", shape=(count, size, size, 3))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array).permute(0, 3, 1, 2)


def _digests_hold(pixels: Path, rows: np.ndarray, size: int, some: Iterable[int]) -> Iterator[bool]:
    """Whether the pixels at each of ``some`` positions are those whose digest is in ``rows``."""
    with open(pixels, "rb") as file:
        for index in some:
            file.seek(int(index) * size**2 * 3)
            yield _content(np.frombuffer(file.read(size**2 * 3), np.uint8)) == rows["content"][index]


def _is_intact(place: Path, count: int, size: int) -> bool:
    """Whether a decoded folder is complete: all sizes, the digest of ``rows``, and the pixels of some pictures."""
    try:
        found = json.loads((place / "complete.json").read_text("utf-8"))
        rows = np.fromfile(place / "rows", _ROW)
        if (place / "pixels").stat().st_size != count * size**2 * 3 or len(rows) != count:
            return False
    except (OSError, ValueError):
        return False
    readable = np.flatnonzero(rows["content"])
    some = readable[:: max(1, len(readable) // _CHECKED)]
    return found.get("rows") == hashlib.sha256(rows.tobytes()).hexdigest() and all(
        _digests_hold(place / "pixels", rows, size, some)
    )


def _decode(
    folder: Path,
    names: list[str],
    preprocessing: Preprocessing,
    place: Path,
    max_unreadable: float,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Decode pictures into ``place`` + ``.part``, keeping those that are there, and move the folder to ``place``."""
    part, count, size = place.with_name(f"{place.name}.part"), len(names), preprocessing.image_size
    if place.exists():
        print(f"the decoded copy {place.name} is damaged; its damaged pictures are decoded again", flush=True)
        shutil.rmtree(part, ignore_errors=True)
        os.replace(place, part)
        (part / "complete.json").unlink(missing_ok=True)
    part.mkdir(exist_ok=True)
    for file, length in (("pixels", size**2 * 3), ("rows", _ROW.itemsize)):
        (part / file).touch()
        os.truncate(part / file, count * length)  # takes no room on the disk before it is written
    table = np.fromfile(part / "rows", _ROW)
    there = np.flatnonzero(table["content"])
    damaged = there[[not holds for holds in _digests_hold(part / "pixels", table, size, there)]]
    table[damaged] = 0
    todo = np.flatnonzero(table["content"] == 0)
    needed, free = len(todo) * size**2 * 3, shutil.disk_usage(part).free
    if needed > free:
        raise OSError(
            f"the decoded pictures need {needed / 1e9:.1f} GB more, but {place.parent} has {free / 1e9:.1f} GB: make "
            "room, or choose another cache"
        )

    def decoded(index: int) -> tuple[np.ndarray, int, int] | str:
        path = folder / names[index]
        try:
            picture, notes = preprocessing.read(path)
        except DatasetError as error:
            return _printable(str(error).removeprefix(f"{path} "))
        return picture, _content(picture), sum(1 << NOTES.index(note) for note in notes)

    unreadable: list[Unreadable] = []
    with (
        ThreadPoolExecutor(workers) as pool,  # Pillow and hashlib release the interpreter lock
        open(part / "pixels", "r+b") as pixels,
        open(part / "rows", "r+b") as rows,
    ):
        results = _in_order(pool, decoded, todo.tolist(), 4 * workers)
        for done, (index, result) in enumerate(zip(todo.tolist(), results, strict=True), count - len(todo) + 1):
            if isinstance(result, str):
                unreadable.append(Unreadable(_printable(names[index]), result))
                _check_share(folder, unreadable, count, max_unreadable)
                row = np.zeros((), _ROW)
            else:
                _write(pixels, index, result[0])
                row = np.array(result[1:], _ROW)
            _write(rows, index, row)  # after the pixels, so that a row proves that its pixels are there
            table[index] = row
            if progress is not None:
                progress(done, count)
        for file in (pixels, rows):
            os.fsync(file.fileno())
    complete = {"unreadable": unreadable, "rows": hashlib.sha256(table.tobytes()).hexdigest()}
    atomic_write_text(part / "complete.json", canonical_json(complete))
    os.replace(part, place)


def _write(file, index: int, values: np.ndarray) -> None:
    file.seek(index * values.nbytes)
    file.write(values.tobytes())
    file.flush()


def _in_order(pool: ThreadPoolExecutor, call: Callable, items: Iterable, ahead: int) -> Iterator:
    """``pool.map``, but with at most ``ahead`` results in memory."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(call, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _split(
    origin: str, contents: np.ndarray, readable: np.ndarray, held_out: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of training and held-out pictures, ascending; equal pictures are on one side.

    Pictures are ranked by a hash of content and seed, so that new pictures in a folder move few others across.
    """
    count = len(readable)
    if not 0 <= held_out < count or (held_out >= 1 and held_out != int(held_out)):
        raise ValueError(f"held_out must be a share below 1 or a number of the {count} pictures, got {held_out}")
    different, group, sizes = np.unique(contents[readable], return_inverse=True, return_counts=True)
    if len(different) < 2:
        raise DatasetError(
            f"{origin}: {f'all {count:,} pictures are equal' if count > 1 else 'there is one picture'}, and nothing "
            "can be learned from one picture: give at least two different ones"
        )
    wanted = int(held_out) if held_out >= 1 else max(held_out > 0, round(held_out * count))
    ranked = np.argsort(_mixed(different, seed))
    ranked = ranked[np.argsort(sizes[ranked] > 1, kind="stable")]  # pictures that occur once come first
    taken, room = [], max(wanted, sizes[ranked[0]]) if wanted else 0
    for place in ranked:
        if not room:
            break
        if sizes[place] <= room:
            taken.append(place)
            room -= sizes[place]
    held = np.isin(group, taken)
    return readable[~held], readable[held]


def _mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """A hash of uint64 values and a seed: the finalizer of SplitMix64."""
    mixed = values ^ np.uint64(stream(seed, "held-out").initial_seed())
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed
