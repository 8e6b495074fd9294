"""Read pictures with a class for every pixel, from two folders a split: ``<split>`` and ``<split>annot``.

A picture ``train/<stem>.png`` (or jpg) has its label map in ``trainannot/<stem>.png``, whose grey or palette values are
the indices of classes. In memory a label map is uint8 (height, width), and :data:`~faqd_lib.data.images.IGNORED` marks
pixels without a label.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from .decoding import TURNED, decode_rgb, picture_files
from .images import IGNORED, DatasetError, Images


def is_label_tree(path: Path) -> bool:
    """Whether a folder has the folders ``train`` and ``trainannot``."""
    return (path / "train").is_dir() and (path / "trainannot").is_dir()


def read_split(path: Path, split: str, height: int | None, classes: Sequence[str], unlabelled: int) -> Images:
    """Read the pictures of ``path/split`` with the label maps of ``path/<split>annot``, in the order of their names.

    Args:
        path, split: the dataset's folder, and the folder of the pictures in it.
        height: rows of pixels to resize to; the width follows from the proportions. Pictures are resized bilinearly,
            label maps to the nearest pixel. None keeps the size.
        classes: names of the classes 0, 1, …
        unlabelled: the value of pixels without a label in the files.

    Raises:
        DatasetError: no pictures, two pictures of one label map, a picture that its EXIF turns, a missing or damaged
            label map, one of another size than its picture, a value that is no class, or pictures of different sizes.
            An image without a labelled pixel is allowed.
    """
    folder, annotations = path / split, path / f"{split}annot"
    for needed in (folder, annotations):
        if not needed.is_dir():
            raise DatasetError(f"{path} has no folder {needed.name}: it needs {split}/ and {split}annot/")
    files, _ = picture_files(folder)
    if not files:
        raise DatasetError(f"{folder} holds no picture")
    of_map: dict[str, Path] = {}
    for file in files:
        if (first := of_map.setdefault(file.stem, file)) is not file:
            raise DatasetError(f"{first} and {file} have one label map, {file.stem}.png: rename one, and give it a map")
    pixels, maps = [], []
    for file in files:
        picture, notes = decode_rgb(str(file), file.read_bytes)
        if TURNED in notes:
            raise DatasetError(
                f"{file} is turned by its EXIF orientation, and its label map is not: save the picture as it is to be "
                "seen, without EXIF, and check its map"
            )
        labels = _label_map(annotations / f"{file.stem}.png", picture.size)
        if height is not None and height != picture.height:
            size = round(picture.width * height / picture.height), height
            picture, labels = (
                picture.resize(size, Image.Resampling.BILINEAR), labels.resize(size, Image.Resampling.NEAREST)
            )  # fmt: skip
        pixels.append(np.asarray(picture).transpose(2, 0, 1))
        maps.append(np.asarray(labels))
        if pixels[-1].shape != pixels[0].shape:
            shown = " and ".join(f"{each.shape[2]}x{each.shape[1]}" for each in (pixels[0], pixels[-1]))
            raise DatasetError(f"{files[0]} and {file} are {shown}: all pictures must have the same size")
    found = torch.from_numpy(np.stack(maps))
    known = (found < len(classes)) | (found == unlabelled)
    if not known.all():
        image, row, column = (~known).nonzero()[0].tolist()
        value = int(found[image, row, column])
        raise DatasetError(
            f"{annotations / files[image].stem}.png has the value {value} in row {row}, column {column}: classes are "
            f"0 to {len(classes) - 1}, and {unlabelled} is unlabelled"
        )
    found[found == unlabelled] = IGNORED
    return Images(torch.from_numpy(np.ascontiguousarray(pixels)), found)


def _label_map(path: Path, size: tuple[int, int]) -> Image.Image:
    """A label map of ``size`` (width, height), as an 8-bit picture of class indices."""
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            picture.load()
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing: every picture needs a label map of the same name") from error
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise DatasetError(f"{path} cannot be decoded ({error}): replace it with an intact copy") from error
    if picture.mode not in ("L", "P"):
        raise DatasetError(f"{path} has the mode {picture.mode}: label maps hold one class index of 8 bits a pixel")
    if picture.size != size:
        shown = " and ".join(f"{width}x{height}" for width, height in (picture.size, size))
        raise DatasetError(f"{path} and its picture are {shown}: both must have the same size")
    return picture
