"""Decode one picture file into 8-bit RGB, whatever its mode, and list the picture files of a folder.

- Pictures are turned upright by their EXIF orientation.
- Transparent pixels are composed on :data:`BACKGROUND`.
- Pictures of more than 8 bits are scaled to [0, 255], never clipped: 16-bit integers from [0, 65535], 32-bit integers
  from [0, 2³¹ − 1], floats from [0, 1]. Other floats, negative values and 32-bit pictures without a value above 65535
  are refused.
- Grey pictures get three equal channels. Palette, CMYK and YCbCr pictures are converted.
"""

import io
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from .images import DatasetError

BACKGROUND = (255, 255, 255)  # white
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision's ImageFolder
DEEP = "more than 8 bits a value, scaled to 8 bits"
TRANSPARENT = "transparent pixels, composed on white"
TURNED = "EXIF rotation, turned upright"
SQUEEZED = "sides of different length, squeezed into a square"
_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def decode(name: str, read: Callable[[], bytes], image_size: int | None = None) -> tuple[np.ndarray, list[str]]:
    """Decode a picture into an array, and say what was done to it.

    Args:
        name, read: see :func:`decode_rgb`, whose errors it raises.
        image_size: height and width to resize to; None keeps the size.

    Returns:
        uint8 (3, height, width), and those that apply of :data:`DEEP`, :data:`TRANSPARENT`, :data:`TURNED` and
        :data:`SQUEEZED`.
    """
    rgb, notes = decode_rgb(name, read)
    if image_size is not None and rgb.size != (image_size, image_size):
        notes += [SQUEEZED] * (rgb.width != rgb.height)
        rgb = rgb.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(rgb).transpose(2, 0, 1), notes


def decode_rgb(name: str, read: Callable[[], bytes]) -> tuple[Image.Image, list[str]]:
    """Decode a picture, and say what was done to it.

    Args:
        name: name of the file, for errors.
        read: returns the file's bytes.

    Returns:
        A picture of mode RGB, and those that apply of :data:`DEEP`, :data:`TRANSPARENT` and :data:`TURNED`.

    Raises:
        DatasetError: the file cannot be read, is no picture, is damaged or too large, or has values that are refused.
    """
    try:
        with Image.open(io.BytesIO(read())) as picture:
            sixteen = picture.mode.startswith("I;16") or picture.format == "PPM"  # Pillow widens a PGM to 32 bits
            upright, notes = _upright(picture)
            rgb, more = _rgb(name, upright, 16 if sixteen else 32)
    except UnidentifiedImageError as error:
        raise DatasetError(f"{name} is not a picture, or its start is damaged: replace or remove it") from error
    except Image.DecompressionBombError as error:
        raise DatasetError(
            f"{name} is too large to decode ({error}): make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except (OSError, ValueError, SyntaxError, zipfile.BadZipFile, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DatasetError(
            f"{name} cannot be decoded ({reason}): replace it with an intact copy, save it again, or remove it"
        ) from error
    return rgb, notes + more


def _upright(picture: Image.Image) -> tuple[Image.Image, list[str]]:
    try:
        turn = _TURNS.get(picture.getexif().get(_ORIENTATION))
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, struct.error):
        turn = None  # damaged EXIF says nothing of the picture
    if turn is None:
        return picture, []
    if picture.format == "TIFF":
        picture.load()  # turns the picture: Pillow does so for TIFF only
        return picture, [TURNED]
    return picture.transpose(turn), [TURNED]


def _rgb(name: str, picture: Image.Image, bits: int) -> tuple[Image.Image, list[str]]:
    if picture.mode == "F" or picture.mode.startswith("I"):
        return Image.fromarray(_eight_bits(name, np.asarray(picture), bits)).convert("RGB"), [DEEP]
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        if layer.getextrema()[3][0] < 255:
            ground = Image.new("RGBA", layer.size, (*BACKGROUND, 255))
            return Image.alpha_composite(ground, layer).convert("RGB"), [TRANSPARENT]
        return layer.convert("RGB"), []
    return picture.convert("RGB"), []


def _eight_bits(name: str, values: np.ndarray, bits: int) -> np.ndarray:
    """Scale grey values of 16 or 32 bits to uint8, by one factor for all pictures of a depth.

    Raises:
        DatasetError: negative or not finite values, floats above 1, or 32-bit integers that need only 16 bits.
    """
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 1):
            raise DatasetError(f"{name} has float values from {low:g} to {high:g}: scale them to [0, 1]")
        return np.rint(values * 255).astype(np.uint8)
    if low < 0 or (bits == 32 and high < 2**16):  # the latter would be black, and their own scale is not known
        raise DatasetError(f"{name} has integers from {low} to {high} in 32 bits: store them as unsigned 8 or 16 bits")
    largest = 2**16 - 1 if bits == 16 else 2**31 - 1
    return np.rint(values.astype(np.float64) * (255 / largest)).astype(np.uint8)


def summary(notes: Iterable[str]) -> list[str]:
    """One line for each kind of note of :func:`decode`, with the number of pictures."""
    return [f"{count:,} picture{'s have' if count > 1 else ' has'} {note}" for note, count in Counter(notes).items()]


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden: its name begins with a dot, as ``.ipynb_checkpoints`` and ``._x.jpg`` do."""
    return name.startswith(".")


def picture_files(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The pictures below a folder, folder by folder, and a count of all other files. Hidden entries are left out.

    Returns:
        Paths of the pictures, and the number of other files by extension, such as ``{".gif": 3}``.

    Raises:
        DatasetError: the folder cannot be read, or links lead from a folder to one above it.
    """
    others: Counter[str] = Counter()
    found = [Path(place, name) for place, names in picture_names(folder, others) for name in names]
    return sorted(found, key=lambda path: (str(path.parent), path.name)), others


def picture_names(folder: Path, others: Counter[str]) -> Iterable[tuple[str, list[str]]]:
    """Each folder below ``folder``, with the names of its pictures; counts other files as :func:`picture_files` does.

    Raises DatasetError as :func:`picture_files` does.
    """
    for place, folders, names in walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        suffixes = {name: Path(name).suffix.lower() for name in names if not is_hidden(name)}
        others.update(suffix or "no extension" for suffix in suffixes.values() if suffix not in EXTENSIONS)
        yield place, [name for name, suffix in suffixes.items() if suffix in EXTENSIONS]


def walk(folder: Path) -> Iterable[tuple[str, list[str], list[str]]]:
    """``os.walk`` with links followed. Callers may take folders off the second list to skip them.

    Raises:
        DatasetError: a folder cannot be read, or links lead from a folder to one above it.
    """

    def fail(error: OSError) -> None:
        raise DatasetError(f"{error.filename} cannot be read: {error.strerror}") from error

    above: dict[str, tuple[str, ...]] = {os.fspath(folder): ()}
    for place, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        real, parents = os.path.realpath(place), above.pop(place)
        if real in parents:
            raise DatasetError(f"{place} is a link to a folder above it, {real}: remove the link")
        yield place, folders, names
        above |= {os.path.join(place, name): (*parents, real) for name in folders}
