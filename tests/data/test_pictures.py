"""A folder of pictures: decoded once, resumable, split by content, read back in augmented batches."""

import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Killed
from PIL import Image

from faqd_lib.data.batches import PADDING, Batches
from faqd_lib.data.images import DatasetError, Images
from faqd_lib.data.pictures import (
    CROP_AREA,
    CROP_ASPECT,
    PictureBatches,
    Pictures,
    PictureSet,
    _in_order,
    crop_boxes,
    cropped,
    open_pictures,
    split_pictures,
)
from faqd_lib.data.preprocessing import Preprocessing
from faqd_lib.training.loop import train

SMALL = Preprocessing(8, (0.5,) * 3, (0.25,) * 3)


def pixels_of(number: int, size: tuple[int, int] = (12, 10)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)


def filled(folder: Path, count: int = 12) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(pixels_of(number)).save(folder / f"{number:03}.png")
    return folder


def opened(tmp_path: Path, preprocessing: Preprocessing = SMALL, **options) -> Pictures:
    return open_pictures(tmp_path / "photos", preprocessing, tmp_path / "cache", **options)


def by_name(pictures: Pictures) -> dict[str, torch.Tensor]:
    sets = (pictures.train, pictures.held_out)
    return {one.name(place): one[place : place + 1][0] for one in sets for place in range(len(one))}


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the files that are decoded, in the order in which that begins."""
    names, original = [], Preprocessing.read

    def read(self, path):
        names.append(Path(path).name)
        return original(self, path)

    monkeypatch.setattr(Preprocessing, "read", read)
    return names


# ---- decoding


def test_pictures_of_every_mode_are_read_from_the_map(tmp_path):
    photos = tmp_path / "photos" / "with spaces" / "and ünïcode 猫"
    photos.mkdir(parents=True)
    rgb = Image.fromarray(pixels_of(0, (40, 30)))
    rgb.save(photos / "rgb.jpg")
    rgb.convert("L").save(photos / "grey.png")
    rgb.convert("CMYK").save(photos / "cmyk.jpg")
    rgb.quantize(8).save(photos / "palette.png")
    rgb.convert("RGBA").rotate(30).save(photos / "transparent.png")
    Image.fromarray(np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)).save(photos / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    rgb.save(photos / "turned.jpg", exif=turned)
    (photos / "words.txt").write_text("no picture")
    pictures = opened(tmp_path, held_out=2)
    found = by_name(pictures)
    assert len(found) == 7
    assert (len(pictures.train), len(pictures.held_out)) == (5, 2)
    for name, picture in found.items():
        assert name.startswith("with spaces/and ünïcode 猫/")
        assert torch.equal(picture, SMALL.tensor(tmp_path / "photos" / name)), name
    for note in ("more than 8 bits", "transparent pixels", "EXIF rotation"):
        assert sum(line.startswith(f"1 picture has {note}") for line in pictures.notes) == 1
    assert any("1 of .txt" in line for line in pictures.notes)


def test_a_folder_is_decoded_once(tmp_path, decoded):
    filled(tmp_path / "photos")
    seen = []
    first = opened(tmp_path, progress=lambda *numbers: seen.append(numbers))
    assert seen == [(number, 12) for number in range(1, 13)]
    assert len(decoded) == 12
    again = opened(tmp_path, Preprocessing(8), seed=1, progress=lambda *numbers: seen.append(numbers))
    assert seen[12:] == [(12, 12)]
    assert len(decoded) == 12
    assert all(torch.equal(picture, by_name(again)[name]) for name, picture in by_name(first).items())
    opened(tmp_path, Preprocessing(8, resize_size=9))
    assert len(decoded) == 24
    os.utime(tmp_path / "photos" / "003.png", ns=(0, 0))  # replaced by another file of the same size
    opened(tmp_path)
    assert len(decoded) == 36


def test_a_killed_call_goes_on_and_decodes_damaged_parts_again(tmp_path, decoded):
    filled(tmp_path / "photos")

    def kill(done: int, total: int) -> None:
        if done == 7:
            raise Killed

    with pytest.raises(Killed):
        opened(tmp_path, workers=1, progress=kill)
    (part,) = (tmp_path / "cache").glob("*.part")
    with open(part / "pixels", "r+b") as pixels:
        pixels.seek(2 * 8 * 8 * 3 + 5)
        (value,) = pixels.read(1)
        pixels.seek(-1, os.SEEK_CUR)
        pixels.write(bytes([value ^ 1]))
    decoded.clear()
    seen = []
    pictures = opened(tmp_path, workers=1, progress=lambda *numbers: seen.append(numbers))
    assert decoded == [f"{number:03}.png" for number in (2, 7, 8, 9, 10, 11)]
    assert seen[0] == (7, 12)
    for name, picture in by_name(pictures).items():
        assert torch.equal(picture, SMALL.tensor(tmp_path / "photos" / name))
    assert [path.suffix for path in (tmp_path / "cache").glob("pictures-*")] == [""]  # nothing is left behind


@pytest.mark.parametrize("damage", ["pixel", "shorter", "rows", "complete"])
def test_a_damaged_cache_is_repaired(tmp_path, decoded, capsys, damage):
    filled(tmp_path / "photos")
    before = by_name(opened(tmp_path))
    before = {name: picture.clone() for name, picture in before.items()}
    (place,) = (tmp_path / "cache").glob("pictures-*")
    if damage == "pixel":
        content = bytearray((place / "pixels").read_bytes())
        content[4 * 8 * 8 * 3] ^= 1
        (place / "pixels").write_bytes(content)
    elif damage == "shorter":
        os.truncate(place / "pixels", 8 * 8 * 3 * 11)
    elif damage == "rows":
        (place / "rows").write_bytes(b"\1" * (12 * 9))
    else:
        (place / "complete.json").write_text("{")
    decoded.clear()
    after = by_name(opened(tmp_path))
    assert "is damaged" in capsys.readouterr().out
    assert len(decoded) == {"pixel": 1, "shorter": 1, "rows": 12, "complete": 0}[damage]
    assert all(torch.equal(after[name], picture) for name, picture in before.items())


def test_two_calls_at_once_decode_each_picture_once(tmp_path, decoded, capsys):
    filled(tmp_path / "photos")
    begun, second_waits = threading.Event(), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(opened, tmp_path, progress=lambda *numbers: begun.set() or second_waits.wait(60))
        assert begun.wait(60)
        second = pool.submit(opened, tmp_path)
        while "waiting for another process" not in capsys.readouterr().out:
            assert not second.done()
        second_waits.set()
        assert first.result().train.fingerprint == second.result().train.fingerprint
    assert len(decoded) == 12


def test_a_disk_that_is_too_small_is_found_before_decoding(tmp_path, decoded, monkeypatch):
    filled(tmp_path / "photos")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=12 * 8 * 8 * 3 - 1))
    with pytest.raises(OSError, match="make room, or choose another cache"):
        opened(tmp_path)
    assert decoded == []


def test_no_more_results_wait_than_asked_for():
    running, most = [], []

    def call(item: int) -> int:
        running.append(item)
        return item * item

    with ThreadPoolExecutor(2) as pool:
        for place, result in enumerate(_in_order(pool, call, range(50), 4)):
            assert result == place * place
            most.append(len(running) - place)
    assert max(most) <= 5
    assert len(running) == 50


# ---- bad input


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_unreadable_files_are_listed_and_left_out(tmp_path):
    photos = filled(tmp_path / "photos", 40)
    (photos / "empty.jpg").touch()
    (photos / "text.png").write_text("not a picture")
    content = (photos / "000.png").read_bytes()
    (photos / "cut short.png").write_bytes(content[: len(content) // 2])
    os.symlink(photos / "nowhere", photos / "to nothing.jpg")
    os.symlink(photos / "itself.jpg", photos / "itself.jpg")
    os.mkfifo(photos / "pipe.png")  # reading it would wait for ever
    (photos / os.fsdecode(b"\xff.jpg")).touch()  # a name that is no UTF-8
    pictures = opened(tmp_path, max_unreadable=0.2)
    reasons = dict(pictures.unreadable)
    assert sorted(reasons) == [
        "\\udcff.jpg", "cut short.png", "empty.jpg", "itself.jpg", "pipe.png", "text.png", "to nothing.jpg"
    ]  # fmt: skip
    assert "is not a picture" in reasons["empty.jpg"]
    assert "cannot be decoded" in reasons["cut short.png"]
    assert "No such file" in reasons["to nothing.jpg"]
    assert "symbolic links" in reasons["itself.jpg"]
    assert "is not a regular file" in reasons["pipe.png"]
    assert len(by_name(pictures)) == 40
    assert "7 of 47 pictures cannot be decoded and are left out" in pictures.notes
    assert opened(tmp_path, max_unreadable=0.2).unreadable == pictures.unreadable  # of the decoded copy
    with pytest.raises(DatasetError, match=r"7 of 47 pictures cannot be decoded, more than max_unreadable=0\.1"):
        opened(tmp_path, max_unreadable=0.1)


def test_too_many_unreadable_files_are_an_error_that_lists_ten(tmp_path):
    photos = filled(tmp_path / "photos", 20)
    for number in range(60):
        (photos / f"bad-{number:02}.jpg").write_text("x")
    with pytest.raises(DatasetError, match="raise max_unreadable") as caught:
        opened(tmp_path, max_unreadable=0.2)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split()[0] for line in lines] == [f"bad-{number:02}.jpg" for number in range(10)]
    with pytest.raises(ValueError, match="max_unreadable must be in"):
        opened(tmp_path, max_unreadable=1)


def test_folders_that_cannot_be_used_are_named(tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match="photos cannot be read: No such file"):
        opened(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "film.mp4").touch()
    (photos / ".hidden.png").touch()
    with pytest.raises(DatasetError, match=r"photos holds no picture, only files of \.mp4: pictures are files of"):
        opened(tmp_path)
    filled(photos / "more")
    os.symlink(photos, photos / "more" / "loop")
    with pytest.raises(DatasetError, match="loop is a link to a folder above it"):
        opened(tmp_path)
    os.unlink(photos / "more" / "loop")
    assert len(by_name(opened(tmp_path))) == 12
    scan = os.scandir

    def forbidden(path):
        if str(path).endswith("more"):  # root may read all folders
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(DatasetError, match="more cannot be read: Permission denied"):
        opened(tmp_path)


def test_one_picture_and_equal_pictures_teach_nothing(tmp_path):
    photos = filled(tmp_path / "photos", 1)
    with pytest.raises(DatasetError, match="there is one picture"):
        opened(tmp_path, held_out=0)
    shutil.copy(photos / "000.png", photos / "copy.png")
    Image.fromarray(pixels_of(0)).save(photos / "again.bmp")  # another file with the same pixels
    with pytest.raises(DatasetError, match="all 3 pictures are equal"):
        opened(tmp_path)


# ---- the split


def noise(count: int, size: int = 8) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, size, size), np.uint8))


def test_the_split_follows_from_content_and_seed():
    pixels = noise(200)
    pictures = split_pictures(pixels, held_out=0.25)
    assert (len(pictures.train), len(pictures.held_out)) == (150, 50)
    assert sorted(torch.cat([pictures.train.indices, pictures.held_out.indices]).tolist()) == list(range(200))
    assert torch.equal(split_pictures(pixels, held_out=0.25).held_out[:], pictures.held_out[:])
    assert len(split_pictures(pixels, held_out=7).held_out) == 7
    assert len(split_pictures(pixels, held_out=0).held_out) == 0
    other = split_pictures(pixels, held_out=0.25, seed=1)
    assert other.train.fingerprint != pictures.train.fingerprint
    both = set(other.held_out.indices.tolist()) & set(pictures.held_out.indices.tolist())
    assert 3 < len(both) < 25  # 12.5 are expected
    # Another order of the same pictures has the same split; with more pictures, few change sides.
    turned = split_pictures(pixels.flip(0), held_out=0.25)
    assert sorted(199 - turned.held_out.indices) == sorted(pictures.held_out.indices)
    fewer = set(split_pictures(pixels[:190], held_out=0.25).held_out.indices.tolist())
    assert len(fewer - set(pictures.held_out.indices.tolist())) < 8


def test_equal_pictures_are_on_one_side():
    pixels = noise(60).repeat(3, 1, 1, 1)
    for seed in range(5):
        pictures = split_pictures(pixels, held_out=0.3, seed=seed)
        sides = [{bytes(picture.numpy()) for picture in one[:]} for one in (pictures.train, pictures.held_out)]
        assert not sides[0] & sides[1]
        assert len(pictures.held_out) == 54
    some = torch.cat([noise(100), noise(1).repeat(20, 1, 1, 1)])  # pictures that occur once are held out
    for seed in range(20):
        held_out = split_pictures(some, held_out=0.1, seed=seed).held_out
        assert len({bytes(picture.numpy()) for picture in held_out[:]}) == len(held_out) == 12
    often = torch.cat([noise(10), noise(1).repeat(90, 1, 1, 1)])  # one picture is nine tenths of all
    assert len(split_pictures(often, held_out=0.05).held_out) == 5
    assert len(split_pictures(noise(2).repeat(5, 1, 1, 1), held_out=1).held_out) == 5  # no smaller part can be held out


def test_pixels_in_memory_are_squares_of_three_channels():
    for pixels in (noise(20)[:, :1], noise(20)[:, :, 1:]):
        with pytest.raises(ValueError, match=r"pixels must be \(count, 3, size, size\), got torch.uint8"):
            split_pictures(pixels)


@pytest.mark.parametrize("held_out", [-0.1, 1.5, 20, 21])
def test_held_out_pictures_must_be_a_share_or_a_number(held_out):
    with pytest.raises(ValueError, match="held_out must be a share below 1 or a number of the 20 pictures"):
        split_pictures(noise(20), held_out=held_out)


def test_a_set_copies_what_is_asked_for(tmp_path):
    filled(tmp_path / "photos")
    pictures = opened(tmp_path, held_out=3).held_out
    everything = torch.cat(list(pictures.chunks(2)))
    assert [len(chunk) for chunk in pictures.chunks(2)] == [2, 1]
    assert torch.equal(everything, pictures.images().pixels)
    assert torch.equal(everything[[2, 0]], pictures[torch.tensor([2, 0])])
    assert pictures.images().labels is None
    assert split_pictures(everything, held_out=0).train.fingerprint == pictures.fingerprint  # in memory or mapped
    everything.zero_()
    assert pictures[:].any()  # the map did not change


# ---- batches


def picture_set(count: int = 20, size: int = 8) -> PictureSet:
    return split_pictures(noise(count, size), held_out=0).train


@pytest.mark.parametrize("crops", ["resized", "shifted", "none"])
def test_seed_and_epoch_determine_every_bit(crops):
    batches = PictureBatches(picture_set(), 6, 0, SMALL.normalizer("cpu"), crops=crops)
    state = torch.get_rng_state()
    epoch = list(batches.epoch(0))
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from the global generator
    assert len(epoch) == len(batches) == 3
    for batch in epoch:
        assert (batch.images.shape, batch.labels) == ((6, 3, 8, 8), None)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
    batches.threads = 3  # as an accelerator has them
    ahead = list(batches.epoch(0))
    later = list(batches.epoch(0, first=2))
    assert all(torch.equal(one.images, other.images) for one, other in zip(epoch, ahead, strict=True))
    assert len(later) == 1
    assert torch.equal(later[0].images, epoch[2].images)
    other_seed = PictureBatches(picture_set(), 6, 1, SMALL.normalizer("cpu"), crops=crops)
    assert not torch.equal(next(other_seed.epoch(0)).images, epoch[0].images)
    assert not torch.equal(next(batches.epoch(1)).images, epoch[0].images)


def test_pictures_are_mirrored_and_each_is_seen_once():
    pictures = picture_set()
    normalizer = SMALL.normalizer("cpu")
    plain = PictureBatches(pictures, 5, 0, normalizer, crops="none", flip=False)
    mirrored = PictureBatches(pictures, 5, 0, normalizer, crops="none")
    seen = torch.cat([batch.images for batch in plain.epoch(0)])
    wanted = {bytes(picture.contiguous().numpy()) for picture in normalizer(pictures[:])}
    assert {bytes(picture.contiguous().numpy()) for picture in seen} == wanted
    turned = 0
    for picture, other in zip(seen, torch.cat([batch.images for batch in mirrored.epoch(0)]), strict=True):
        turned += torch.equal(picture.flip(-1), other)
        assert torch.equal(picture.flip(-1), other) or torch.equal(picture, other)
    assert 4 <= turned <= 16


def test_crops_are_within_the_picture_and_of_the_stated_shape():
    boxes, mirrored = crop_boxes("resized", 4000, 100, torch.Generator().manual_seed(0))
    top, left, height, width = boxes.T
    assert min(top.min(), left.min()) == 0
    assert max((top + height).max(), (left + width).max()) == 100
    area, aspect = (height * width).double() / 1e4, width / height
    assert area.min() > CROP_AREA[0] * 0.98
    assert 0.6 < area.mean() < 0.7  # of 0.675, less what does not fit
    assert aspect.min() > CROP_ASPECT[0] * 0.97
    assert aspect.max() < CROP_ASPECT[1] * 1.03
    assert 0.45 < mirrored.double().mean() < 0.55
    boxes, _ = crop_boxes("shifted", 4000, 100, torch.Generator().manual_seed(0))
    assert (boxes[:, :2].min(), boxes[:, :2].max()) == (-PADDING, PADDING)


def test_crops_show_the_part_that_their_box_names():
    picture = torch.arange(12 * 12, dtype=torch.uint8).view(1, 1, 12, 12).expand(1, 3, 12, 12)
    assert torch.equal(cropped(picture, torch.tensor([[0, 0, 12, 12]]), "resized"), picture)
    ramp = cropped(picture, torch.tensor([[6, 3, 6, 6]]), "resized")[0, 0].float()
    assert (ramp.min(), ramp.max()) == (picture[0, 0, 6, 3], picture[0, 0, 11, 8])
    down = cropped(picture, torch.tensor([[2, -3, 12, 12]]), "shifted")[0, 0]
    assert torch.equal(down[:10, 3:], picture[0, 0, 2:, :9])
    assert not down[10:].any()
    assert not down[:, :3].any()


def test_crops_are_chosen_by_size():
    normalizer = SMALL.normalizer("cpu")
    assert PictureBatches(picture_set(size=63), 2, 0, normalizer).crops == "shifted"
    assert PictureBatches(picture_set(size=64), 2, 0, normalizer).crops == "resized"
    with pytest.raises(ValueError, match="crops must be one of"):
        PictureBatches(picture_set(), 2, 0, normalizer, crops="random")


def test_batches_refuse_what_they_cannot_draw():
    normalizer = SMALL.normalizer("cpu")
    for size in (1, 21):
        with pytest.raises(ValueError, match=r"between 2, .* and the 20 pictures of the set, got"):
            PictureBatches(picture_set(), size, 0, normalizer)
    with pytest.raises(TypeError, match=r"got torch.uint8 \(20, 3, 8, 8\)"):
        PictureBatches(noise(20), 2, 0, normalizer)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_map_is_not_copied_into_memory(tmp_path):
    filled(tmp_path / "photos")
    pictures = opened(tmp_path, held_out=2).train
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "cache/pictures-" in line]
    starts = [int(line[0].split("-")[0], 16) for line in mapped]
    assert pictures.pixels.data_ptr() in starts
    # Batches of all pictures of a map, too, read it in place.
    assert Batches(Images(pictures.pixels), 4, 0, SMALL.normalizer("cpu"))._pixels.data_ptr() in starts


def test_a_cohort_trains_on_pictures(tiny_suite):
    suite = tiny_suite()
    config = suite.student("KD", weight_bits=1)
    teacher = suite.build(suite.teacher()).requires_grad_(False).eval()
    batches = PictureBatches(split_pictures(suite.splits[0].pixels).train, 16, 0, suite.normalizer)
    (trained,) = train([suite.learner(config, batches)], batches, teacher, (), {"test": suite.splits[2]}).trained
    assert trained.steps == 2 * len(batches) == 4
