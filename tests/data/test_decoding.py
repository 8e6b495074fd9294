"""One picture file to 8-bit RGB: bit depths, transparency, rotation, and files that cannot be decoded."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from faqd_lib.data.decoding import BACKGROUND, DEEP, SQUEEZED, TRANSPARENT, TURNED, decode, picture_files, summary
from faqd_lib.data.images import DatasetError

RAMP = np.linspace(0, 65535, 32).round().astype(np.uint16)[None].repeat(4, 0)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def pixels(data: bytes, image_size: int | None = None) -> tuple[np.ndarray, list[str]]:
    return decode("picture", lambda: data, image_size)


@pytest.mark.parametrize(
    ("values", "kind", "largest"),
    [
        (RAMP, "PNG", 65535),
        (RAMP, "TIFF", 65535),
        (RAMP, "PPM", 65535),
        (RAMP.astype(np.int32) * 32768, "TIFF", 2**31 - 1),
        (np.linspace(0, 1, 32, dtype=np.float32)[None], "TIFF", 1),
    ],
)
def test_deep_grey_pictures_keep_their_range(values, kind, largest):
    found, notes = pixels(encoded(Image.fromarray(values), kind))
    assert notes == [DEEP]
    assert (found == np.rint(values / largest * 255)).all()  # in all three channels
    assert len(np.unique(found)) == 32  # nothing is clipped


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 2.5]], np.float32), "float values from 0 to 2.5: scale them to"),
        (np.array([[np.nan, 0.5]], np.float32), "float values from nan"),
        (np.array([[-1, 5]], np.int32), "integers from -1 to 5 in 32 bits"),
        (np.array([[0, 200]], np.int32), "integers from 0 to 200 in 32 bits"),
    ],
)
def test_values_without_a_scale_are_refused(values, message):
    with pytest.raises(DatasetError, match=f"picture has {message}"):
        pixels(encoded(Image.fromarray(values), "TIFF"))


def test_transparent_pixels_show_the_background():
    rgba = Image.new("RGBA", (2, 1), (200, 100, 0, 255))
    rgba.putpixel((0, 0), (200, 100, 0, 0))
    found, notes = pixels(encoded(rgba))
    assert notes == [TRANSPARENT]
    assert found[:, 0].T.tolist() == [list(BACKGROUND), [200, 100, 0]]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    found, notes = pixels(encoded(palette, transparency=0))
    assert (found[:, 0].T.tolist(), notes) == ([list(BACKGROUND), [40, 50, 60]], [TRANSPARENT])
    assert pixels(encoded(Image.new("LA", (1, 1), (0, 128))))[0].flatten().tolist() == [127] * 3


def test_opaque_alpha_changes_nothing():
    found, notes = pixels(encoded(Image.new("RGBA", (1, 1), (200, 100, 0, 255))))
    assert (found.flatten().tolist(), notes) == ([200, 100, 0], [])


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("JPEG", {"quality": 100}), ("WEBP", {"lossless": True}), ("TIFF", {}),
     ("TIFF", {"compression": "tiff_lzw"})],
)  # fmt: skip
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation, kind, options):
    """Pillow turns TIFF pictures itself, and no others."""
    upright = np.arange(0, 240, 40).reshape(2, 3).repeat(8, 0).repeat(8, 1)  # in blocks, which JPEG keeps
    picture = Image.fromarray(upright.astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    found, notes = pixels(encoded(picture, kind, exif=exif, **options))
    turned = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
        6: np.rot90(upright, -1), 7: np.rot90(upright, 2).T, 8: np.rot90(upright),
    }[orientation]  # fmt: skip
    assert found.shape == (3, *turned.shape)
    assert abs(found.astype(int) - turned).max() <= (2 if kind == "JPEG" else 0)
    assert notes == ([] if orientation == 1 else [TURNED])


def test_deep_pictures_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    found, notes = pixels(encoded(Image.fromarray(RAMP), "TIFF", exif=exif))
    assert (found == np.rot90(np.rint(RAMP / 257), -1)).all()
    assert set(notes) == {DEEP, TURNED}


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB"])
def test_every_common_mode_becomes_rgb(mode):
    found, notes = pixels(encoded(Image.new(mode, (4, 2)), "TIFF"), image_size=3)
    assert (found.shape, found.dtype, notes) == ((3, 3, 3), np.uint8, [SQUEEZED])
    assert pixels(encoded(Image.new(mode, (4, 4)), "TIFF"), image_size=3)[1] == []


def _text() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 2_000_000, zip=True)
    return encoded(Image.new("RGB", (2, 2)), pnginfo=info)


def _cut() -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))[:500]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: b"", "is not a picture"),
        (lambda: b"Mac OS DS_Store", "is not a picture"),
        (_cut, "cannot be decoded .*truncated"),
        (_text, "cannot be decoded .*MAX_TEXT_CHUNK"),
        (lambda: encoded(Image.new("1", (20000, 20000))), "is too large to decode .*400000000 pixels"),
        (lambda: Path("/nowhere/x.png").read_bytes(), "cannot be decoded .No such file"),
    ],
)
def test_a_file_that_cannot_be_decoded_is_named(data, message):
    with pytest.raises(DatasetError, match=f"^picture {message}"):
        decode("picture", data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_does_not_matter(kind):
    found, notes = pixels(encoded(Image.new("RGB", (2, 1)), kind, exif=b"Exif\0\0garbage!"))
    assert (found.shape, notes) == ((3, 1, 2), [])


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    picture = Image.new("RGB", (2, 1))
    exif = picture.getexif()
    exif[0x0112] = orientation
    assert pixels(encoded(picture, exif=exif))[1] == []


def test_notes_are_counted():
    assert summary([DEEP, DEEP, TURNED]) == [f"2 pictures have {DEEP}", f"1 picture has {TURNED}"]


# ---- folders


def test_pictures_of_a_folder_without_hidden_and_other_files(tmp_path):
    for name in ("b.JPG", "a.png", "._a.png", ".DS_Store", "notes.txt", "film.gif", "c.gif", "README"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a.png").write_bytes(b"")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "d.webp").write_bytes(b"")
    found, others = picture_files(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.png", "b.JPG", "more/d.webp"]
    assert others == {".gif": 2, ".txt": 1, "no extension": 1}


def test_a_link_to_a_folder_above_is_named(tmp_path):
    (tmp_path / "class").mkdir()
    os.symlink(tmp_path, tmp_path / "class" / "again")
    with pytest.raises(DatasetError, match="again is a link to a folder above it"):
        picture_files(tmp_path)


def test_two_links_to_one_folder_are_no_loop(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes(b"")
    os.symlink(tmp_path / "one", tmp_path / "two")
    assert len(picture_files(tmp_path)[0]) == 2


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DatasetError, match="nowhere cannot be read: No such file"):
        picture_files(tmp_path / "nowhere")
