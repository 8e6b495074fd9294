"""Datasets in tiny folders: search order, content, and errors that name the file and the remedy."""

import dataclasses
import hashlib
import io
import os
import pickle
import shutil
import socket
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from faqd_lib.data import datasets as data
from faqd_lib.data import sources
from faqd_lib.data.datasets import (
    DatasetError,
    Images,
    balanced_indices,
    data_roots,
    load,
    on_disk,
    resolve,
    split_validation,
    subset,
)
from faqd_lib.data.sources import CIFAR10_CLASSES
from faqd_lib.utils.torchvision_import import torchvision


def picture(path: Path, colour: int, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 255 - colour, 100)).save(path)


def write_tree(root: Path, colour: int = 10, test: str = "test", size: tuple[int, int] = (8, 8)) -> Path:
    """Two classes; 3 + 2 training images, 1 + 1 test images; ``colour`` makes trees differ."""
    for split, counts in (("train", (3, 2)), (test, (1, 1))):
        for label, (name, count) in enumerate(zip(("cat", "dog"), counts, strict=True)):
            for i in range(count):
                picture(root / split / name / f"{i}.png", colour + 40 * label + i, size)
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def message(call) -> str:
    with pytest.raises(DatasetError) as raised:
        call()
    return str(raised.value)


# ---- folders of images


@pytest.mark.parametrize("test_folder", ["test", "val"])
@pytest.mark.parametrize("place", ["cifar10-jpeg", "cifar10"])
def test_jpeg_tree(root, place, test_folder):
    write_tree(root / place, test=test_folder)
    told = message(lambda: load("cifar10-jpeg", root))
    assert f"{root / place} is not cifar10-jpeg: its classes are cat, dog" in told
    for name in set(CIFAR10_CLASSES) - {"cat", "dog"}:
        for split in ("train", test_folder):
            picture(root / place / split / name / "0.png", 200)
    images = load("cifar10-jpeg", root)
    assert images.classes == CIFAR10_CLASSES
    assert images.train.labels.tolist() == [0, 1, 2, 3, 3, 3, 4, 5, 5, 6, 7, 8, 9]
    assert "JPEG" in images.note


@pytest.mark.parametrize("test_folder", ["test", "val"])
def test_tree(root, test_folder):
    write_tree(root / "pets", test=test_folder)
    images = load("pets", root)
    assert images.classes == ("cat", "dog")
    assert images.train.pixels.shape == (5, 3, 8, 8)
    assert images.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert images.test.labels.tolist() == [0, 1]
    assert images.train.pixels[:, 0, 0, 0].tolist() == [10, 11, 12, 50, 51]
    assert images.train.pixels[0, :, 3, 4].tolist() == [10, 245, 100]
    assert images.test.pixels[1, 0, 0, 0] == 50
    assert images.image_size == 8
    assert images.flip
    assert images.note == ""


def test_a_folder_of_images_with_an_archives_name_is_told_so(root):
    write_tree(root / "cifar10")
    told = message(lambda: load("cifar10", root))
    assert f"{root / 'cifar10'} is a folder of images: ask for cifar10-jpeg, if it is CIFAR-10, or give it" in told
    write_tree(root / "cifar100")
    assert f"{root / 'cifar100'} is a folder of images: give it another name" in message(lambda: load("cifar100", root))


def test_a_folder_of_one_class_is_an_error(root):
    for split in ("train", "test"):
        picture(root / "pets" / split / "cat" / "0.png", 3)
    assert message(lambda: load("pets", root)).startswith(f"{root / 'pets'} has one class, cat")


def test_mean_and_deviation_are_of_the_whole_training_split(root):
    write_tree(root / "pets")
    images = load("pets", root)
    values = images.train.pixels.double() / 255
    assert images.mean == pytest.approx(values.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert images.std[:2] == pytest.approx(values.std((0, 2, 3), correction=0).tolist()[:2], rel=1e-9)
    assert images.std[2] > 0  # a constant channel must not divide by zero


def test_any_folder_by_its_name(root):
    write_tree(root / "my-pictures")
    assert load("my-pictures", root).train.pixels.shape[0] == 5
    assert on_disk("my-pictures", root)


def test_images_are_resized_on_demand(root):
    write_tree(root / "pets", size=(8, 8))
    assert load("pets", root, image_size=16).train.pixels.shape == (5, 3, 16, 16)
    assert load("pets", root).train.pixels.shape == (5, 3, 8, 8)


def test_grey_images_become_colour(root):
    write_tree(root / "pets")
    Image.new("L", (8, 8), 77).save(root / "pets/train/cat/0.png")
    assert load("pets", root).train.pixels[0, :, 0, 0].tolist() == [77, 77, 77]


@pytest.mark.parametrize("split", ["train", "test"])
def test_truncated_image_is_named(root, split):
    write_tree(root / "pets")
    victim = root / "pets" / split / "dog/0.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(noise).save(victim)
    victim.write_bytes(victim.read_bytes()[:-200])
    told = message(lambda: load("pets", root))
    assert f"{victim} cannot be decoded (" in told
    assert "replace it" in told


@pytest.mark.parametrize("content", [b"", b"this is no image", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR broken here"])
def test_a_file_that_is_no_image_is_named(root, content):
    write_tree(root / "pets")
    victim = root / "pets/train/cat/1.png"
    victim.write_bytes(content)
    assert str(victim) in message(lambda: load("pets", root))


def test_images_of_different_sizes_are_named(root):
    write_tree(root / "pets")
    picture(root / "pets/train/dog/1.png", 5, (9, 9))
    told = message(lambda: load("pets", root))
    assert "9x9" in told
    assert "8x8" in told
    assert "image_size" in told
    assert load("pets", root, image_size=8).train.pixels.shape == (5, 3, 8, 8)


def test_splits_of_different_sizes_are_named(root):
    write_tree(root / "pets")
    for name in ("cat", "dog"):
        picture(root / f"pets/test/{name}/0.png", 5, (16, 16))
    told = message(lambda: load("pets", root))
    assert "16x16" in told
    assert "image_size" in told


def test_images_that_are_not_square_are_named(root):
    write_tree(root / "pets", size=(8, 6))
    told = message(lambda: load("pets", root))
    assert "8x6" in told
    assert "square" in told


def test_class_folders_must_agree(root):
    tree = write_tree(root / "pets")
    (tree / "test/dog").rename(tree / "test/fox")
    told = message(lambda: load("pets", root))
    assert "fox" in told
    assert "dog" in told


def test_empty_class_folder_is_named(root):
    tree = write_tree(root / "pets")
    shutil.rmtree(tree / "train/dog")
    (tree / "train/dog").mkdir()
    assert "dog" in message(lambda: load("pets", root))


def test_hidden_entries_are_left_out(root):
    tree = write_tree(root / "pets")
    expected = load("pets", root)
    for folder in (tree / "train" / ".ipynb_checkpoints", tree / "train/cat/.thumbnails"):
        folder.mkdir()
        picture(folder / "0.png", 99)
    (tree / "test" / ".empty").mkdir()
    for name in ("train/cat/.DS_Store", "train/cat/._0.png", "test/.DS_Store"):
        (tree / name).write_bytes(b"Mac OS")
    assert load("pets", root).fingerprint == expected.fingerprint


def test_files_that_are_no_pictures_are_counted(root, capsys):
    tree = write_tree(root / "pets")
    for name in ("train/cat/notes.txt", "train/dog/a.gif", "test/dog/b.gif"):
        (tree / name).write_bytes(b"")
    load("pets", root)
    said = capsys.readouterr().out
    assert "left out are 2 files of .gif, 1 files of .txt; read are .jpg, .jpeg, .png" in said


def test_an_empty_class_folder_says_what_it_holds(root):
    tree = write_tree(root / "pets")
    (tree / "train/fox").mkdir()
    (tree / "train/fox/a.gif").write_bytes(b"")
    assert f"{tree / 'train/fox'} holds no picture, only files of .gif" in message(lambda: load("pets", root))


def test_a_folder_without_classes_is_named(root):
    tree = write_tree(root / "pets")
    shutil.rmtree(tree / "test")
    (tree / "test").mkdir()
    assert f"{tree / 'test'} is not a tree" in message(lambda: load("pets", root))


def test_a_broken_link_is_named(root):
    tree = write_tree(root / "pets")
    (tree / "train/cat/8.png").symlink_to(tree / "nowhere.png")
    assert f"{tree / 'train/cat/8.png'} cannot be read (No such file" in message(lambda: load("pets", root))


def test_links_in_a_circle_are_named(root):
    tree = write_tree(root / "pets")
    (tree / "train/cat/8.png").symlink_to(tree / "train/cat/9.png")
    (tree / "train/cat/9.png").symlink_to(tree / "train/cat/8.png")
    assert "cannot be read (Too many levels of symbolic links)" in message(lambda: load("pets", root))
    (tree / "train/cat/8.png").unlink()
    (tree / "train/cat/9.png").unlink()
    (tree / "train/cat/again").symlink_to(tree / "train")
    assert "again is a link to a folder above it" in message(lambda: load("pets", root))


def test_what_was_done_to_pictures_is_said(root, capsys):
    tree = write_tree(root / "pets")
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tree / "train/cat/0.png")
    Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(tree / "train/dog/0.png")
    images = load("pets", root)
    assert images.train.pixels[0, 0].flatten().tolist() == np.rint(ramp / 257).flatten().tolist()
    said = capsys.readouterr().out
    assert "1 picture has more than 8 bits a value, scaled to 8 bits" in said
    assert "1 picture has transparent pixels, composed on white" in said
    load("pets", root)
    assert "picture" not in capsys.readouterr().out  # said once, when decoded


# ---- CIFAR in torchvision's files


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def write_cifar(monkeypatch):
    """A function that writes a CIFAR folder of 2 images a file, and tells torchvision its digests."""

    def write(root: Path, name: str) -> Path:
        dataset = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
        folder = root / dataset.base_folder
        folder.mkdir(parents=True)
        label_key = "labels" if name == "cifar10" else "fine_labels"
        lists = {}
        for attribute in ("train_list", "test_list"):
            lists[attribute] = []
            for file, _ in getattr(dataset, attribute):
                number = sum(map(len, lists.values()))
                pixels = np.random.default_rng(number).integers(0, 256, (2, 3072), np.uint8)
                labels = [number % 10, (number + 1) % 10]
                (folder / file).write_bytes(pickle.dumps({"data": pixels, label_key: labels}))
                lists[attribute].append([file, md5(folder / file)])
        names = [f"class{i}" for i in range(10 if name == "cifar10" else 100)]
        meta = dict(dataset.meta)
        (folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: names}))
        meta["md5"] = md5(folder / meta["filename"])
        for attribute, value in (*lists.items(), ("meta", meta)):
            monkeypatch.setattr(dataset, attribute, value)
        return folder

    return write


@pytest.mark.parametrize(("name", "train_images", "classes"), [("cifar10", 10, 10), ("cifar100", 2, 100)])
def test_cifar_folder(root, write_cifar, name, train_images, classes):
    write_cifar(root, name)
    images = load(name, root)
    assert images.train.pixels.shape == (train_images, 3, 32, 32)
    assert images.test.pixels.shape == (2, 3, 32, 32)
    assert len(images.classes) == classes
    assert images.train.labels[:2].tolist() == [0, 1]
    # The files hold red, green, blue planes, row by row.
    stored = np.random.default_rng(0).integers(0, 256, (2, 3072), np.uint8)
    assert torch.equal(images.train.pixels[1].flatten(), torch.from_numpy(stored[1]))
    assert images.note == ""


@pytest.mark.parametrize("damage", ["truncated", "missing"])
@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_cifar_batch_is_named(root, write_cifar, file, damage):
    victim = write_cifar(root, "cifar10") / file
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-10])
    told = message(lambda: load("cifar10", root))
    assert str(victim) in told
    assert damage in told
    assert "fetch the dataset again" in told


def archive(root: Path, folder: Path, monkeypatch) -> Path:
    path = root / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5(path))
    return path


def test_cifar_archive_is_unpacked_outside_its_own_folder(root, write_cifar, monkeypatch):
    expected = load("cifar10", write_cifar(root, "cifar10").parent).fingerprint
    archive(root, root / "cifar-10-batches-py", monkeypatch)
    assert load("cifar10", root).fingerprint == expected
    assert [p.name for p in root.iterdir()] == ["cifar-10-python.tar.gz"]


def test_truncated_archive_is_named(root, write_cifar, monkeypatch):
    path = archive(root, write_cifar(root, "cifar10"), monkeypatch)
    path.write_bytes(path.read_bytes()[:-100])
    told = message(lambda: load("cifar10", root))
    assert str(path) in told
    assert "truncated" in told
    assert "fetch it again" in told


class Malice:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_a_malicious_batch_is_not_unpickled(root, write_cifar, tmp_path):
    victim = write_cifar(root, "cifar10") / "data_batch_1"
    victim.write_bytes(pickle.dumps(Malice(tmp_path / "executed")))
    assert str(victim) in message(lambda: load("cifar10", root))
    assert not (tmp_path / "executed").exists()
    pickle.loads(victim.read_bytes())  # noqa: S301 - what would have happened
    assert (tmp_path / "executed").exists()


def test_an_archive_with_paths_outside_its_folder_is_not_unpacked(root, write_cifar, monkeypatch, tmp_path):
    path = archive(root, write_cifar(root, "cifar10"), monkeypatch)
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo("../../escaped")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    assert str(path) in message(lambda: load("cifar10", root))
    assert not list(tmp_path.rglob("escaped"))


def test_a_tiny_imagenet_archive_is_only_read(root, tmp_path):
    path = root / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("tiny-imagenet-200/../../escaped", b"evil")
        target.writestr("tiny-imagenet-200/wnids.txt", "n1")
    assert str(path) in message(lambda: load("tiny-imagenet", root))
    assert not list(tmp_path.rglob("escaped"))


def test_cifar_has_one_size(root, write_cifar):
    write_cifar(root, "cifar10")
    assert "image_size=64" in message(lambda: load("cifar10", root, image_size=64))


# ---- Tiny ImageNet


def write_tiny(root: Path) -> Path:
    """Two classes; wnids.txt lists 'n02' first, to show that classes are sorted by name."""
    folder = root / "tiny-imagenet-200"
    for wnid, colour in (("n01", 20), ("n02", 120)):
        for i in range(3):
            picture(folder / f"train/{wnid}/images/{wnid}_{i}.JPEG", colour)
    for i, colour in enumerate((120, 20)):
        picture(folder / f"val/images/val_{i}.JPEG", colour)
    (folder / "val/val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
    (folder / "wnids.txt").write_text("n02\nn01\n")
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tbullfrog\nn03\tnever used\n")
    return folder


def zip_tiny(root: Path, folder: Path) -> Path:
    path = root / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as target:
        for file in sorted(folder.rglob("*")):
            target.write(file, f"tiny-imagenet-200/{file.relative_to(folder)}")
    shutil.rmtree(folder)
    return path


def check_tiny(images) -> None:
    assert images.classes == ("goldfish", "bullfrog")
    assert images.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.test.labels.tolist() == [1, 0]
    for split in (images.train, images.test):
        red = split.pixels[:, 0].float().mean((1, 2))
        assert torch.equal(red > 70, split.labels == 1)


def test_tiny_imagenet_folder_and_zip_are_the_same(root):
    folder = write_tiny(root)
    from_folder = load("tiny-imagenet", root)
    check_tiny(from_folder)
    zip_tiny(root, folder)
    from_zip = load("tiny-imagenet", root)
    check_tiny(from_zip)
    assert from_zip.fingerprint == from_folder.fingerprint
    assert from_zip.source != from_folder.source
    assert load("tiny-imagenet", root, image_size=4).image_size == 4


def test_truncated_zip_is_named(root):
    path = zip_tiny(root, write_tiny(root))
    path.write_bytes(path.read_bytes()[:-300])
    told = message(lambda: load("tiny-imagenet", root))
    assert str(path) in told
    assert "fetch it again" in told


def test_damaged_member_of_the_zip_is_named(root):
    path = zip_tiny(root, write_tiny(root))
    with zipfile.ZipFile(path) as opened:
        member = opened.getinfo("tiny-imagenet-200/train/n02/images/n02_1.JPEG")
    content = bytearray(path.read_bytes())
    middle = member.header_offset + 30 + len(member.filename) + member.compress_size // 2
    content[middle] ^= 0xFF
    path.write_bytes(content)
    told = message(lambda: load("tiny-imagenet", root))
    assert "n02_1.JPEG" in told


@pytest.mark.parametrize("inside", ["", "images/"])
def test_tiny_imagenet_with_sorted_validation_images(root, inside):
    folder = write_tiny(root)
    expected = load("tiny-imagenet", root)
    for line in (folder / "val/val_annotations.txt").read_text().splitlines():
        name, wnid, *_ = line.split("\t")
        target = folder / "val" / wnid / inside
        target.mkdir(parents=True, exist_ok=True)
        (folder / "val/images" / name).rename(target / name)
    (folder / "val/val_annotations.txt").unlink()
    (folder / "val/images").rmdir()
    found = load("tiny-imagenet", root)
    assert torch.equal(found.train.pixels, expected.train.pixels)
    assert sorted(found.test.labels.tolist()) == sorted(expected.test.labels.tolist())
    by_label = {int(label): pixels for pixels, label in zip(found.test.pixels, found.test.labels, strict=True)}
    for pixels, label in zip(expected.test.pixels, expected.test.labels, strict=True):
        assert torch.equal(by_label[int(label)], pixels)


@pytest.mark.parametrize("file", ["wnids.txt", "words.txt", "val/val_annotations.txt", "val/images/val_1.JPEG"])
def test_incomplete_tiny_imagenet_is_named(root, file):
    (write_tiny(root) / file).unlink()
    told = message(lambda: load("tiny-imagenet", root))
    assert file in told
    assert "tiny-imagenet-200" in told
    assert "fetch" in told


def test_tiny_imagenet_with_an_unknown_class_is_named(root):
    (write_tiny(root) / "wnids.txt").write_text("n02\n")
    told = message(lambda: load("tiny-imagenet", root))
    assert "n01" in told
    assert "wnids.txt" in told


# ---- digits


def test_digits_need_nothing_on_disk(root):
    images = load("digits", root)
    assert len(images.train) == 1437
    assert len(images.test) == 360
    assert images.test.labels.bincount().min() >= 35
    assert images.image_size == 32
    assert images.train.pixels.max() == 255
    assert not images.flip
    assert images.classes == tuple("0123456789")
    assert "not a dataset of the paper" in images.note
    assert torch.equal(images.train.pixels[:, 0], images.train.pixels[:, 2])
    assert load("digits", image_size=16).image_size == 16


def test_digits_splits_do_not_overlap():
    images = load("digits")
    train = {p.numpy().tobytes() for p in images.train.pixels}
    shared = sum(p.numpy().tobytes() in train for p in images.test.pixels)
    assert shared == 0


# ---- places


@pytest.fixture
def three_places(tmp_path, monkeypatch):
    """A different tree in each of the three places; the project's own ``data`` folder is last."""
    places = {name: tmp_path / name for name in ("given", "environment")}
    places["project"] = tmp_path / "project" / "data"
    for colour, place in zip((10, 20, 30), places.values(), strict=True):
        write_tree(place / "pets", colour)
    monkeypatch.setenv("FAQD_DATA", str(places["environment"]))
    return places


def first_pixel(data_root=None) -> int:
    return int(load("pets", data_root).train.pixels[0, 0, 0, 0])


def test_places_are_searched_in_order(three_places, monkeypatch):
    assert first_pixel(three_places["given"]) == 10
    assert first_pixel() == 20
    shutil.rmtree(three_places["environment"] / "pets")
    assert first_pixel() == 30
    monkeypatch.delenv("FAQD_DATA")
    assert first_pixel() == 30
    assert data_roots() == [three_places["project"]]


def test_a_given_root_is_the_only_one(three_places):
    shutil.rmtree(three_places["given"] / "pets")
    told = message(lambda: load("pets", three_places["given"]))
    assert str(three_places["given"]) in told
    assert str(three_places["environment"]) not in told
    assert "train/<class>" in told
    assert not on_disk("cifar10-jpeg", three_places["given"])


def test_a_root_that_is_the_dataset_itself_or_lacks_images_to_test_is_told_so(tmp_path):
    (tmp_path / "birds" / "train" / "owl").mkdir(parents=True)
    assert message(lambda: load("birds", tmp_path)).endswith(f"; {tmp_path / 'birds'} has no test/")
    assert message(lambda: load("train", tmp_path / "birds")).endswith("train has no train/")
    (tmp_path / "birds" / "test" / "owl").mkdir(parents=True)
    told = message(lambda: load("birds", tmp_path / "birds"))
    assert told.endswith(f"is the dataset itself: set data_root to its parent folder, {tmp_path}")


def test_missing_dataset_names_every_place_and_what_to_do(three_places):
    told = message(lambda: load("cifar100"))
    for place in ("environment", "project"):
        for file in ("cifar-100-python", "cifar-100-python.tar.gz"):
            assert str(three_places[place] / file) in told
    assert "FAQD_DATA" in told
    assert "--data-root" in told


def test_roots_that_do_not_exist_are_named(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    assert str(gone) in message(lambda: load("digits", gone))
    monkeypatch.setenv("FAQD_DATA", str(gone))
    told = message(lambda: load("digits"))
    assert "FAQD_DATA" in told
    assert str(gone) in told


@pytest.mark.parametrize("name", ["cifra10", "", "../etc", "imagenet"])
def test_unknown_dataset_is_named_with_the_known_ones(root, name):
    for call in (load, resolve, on_disk):
        told = message(lambda call=call: call(name, root))
        assert repr(name) in told
        assert "cifar10-jpeg" in told
        assert "tiny-imagenet" in told
        assert ("(did you mean 'cifar10'?)" in told) == (name == "cifra10")


# ---- auto


def test_auto_prefers_the_original_then_jpeg_then_digits(root, write_cifar):
    name, reason = resolve("auto", root)
    assert name == "digits"
    assert str(root) in reason
    write_tree(root / "cifar10")
    assert resolve("auto", root) == ("cifar10-jpeg", "cifar10-jpeg: found on disk")
    write_cifar(root, "cifar10")
    assert resolve("auto", root) == ("cifar10", "cifar10: found on disk")
    assert resolve("digits", root) == ("digits", "digits: asked for")


def test_auto_without_digits(root):
    name, reason = resolve("auto", root, allow_digits=False, allow_download=True)
    assert name == "cifar10"
    assert "downloaded" in reason
    told = message(lambda: resolve("auto", root, allow_digits=False))
    assert str(root) in told
    assert "FAQD_DATA" in told


# ---- downloads


def with_download(monkeypatch, name, download, **changes):
    monkeypatch.setitem(data.SOURCES, name, dataclasses.replace(data.SOURCES[name], download=download, **changes))


def test_nothing_is_downloaded_unless_asked(root, monkeypatch):
    with_download(monkeypatch, "cifar10", lambda folder: pytest.fail("a download was tried"))
    message(lambda: load("cifar10", root))


def test_failed_download_says_what_to_do(root, monkeypatch):
    def fail(folder):
        raise OSError("no route to host")

    with_download(monkeypatch, "cifar10", fail)
    told = message(lambda: load("cifar10", root, download=True))
    assert "no route to host" in told
    assert "cifar-10-python.tar.gz" in told
    assert str(root) in told


def test_download_goes_into_the_last_place(tmp_path, root, monkeypatch):
    monkeypatch.setenv("FAQD_DATA", str(root))
    with_download(monkeypatch, "cifar10-jpeg", lambda folder: write_tree(folder / "cifar10-jpeg"), classes=None)
    assert len(load("cifar10-jpeg", download=True).train) == 5
    assert (tmp_path / "project/data/cifar10-jpeg").is_dir()


def test_the_network_is_blocked_here():
    with pytest.raises(AssertionError, match=r"192\.0\.2\.1"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)
    with pytest.raises(AssertionError, match=r"example\.org"):
        socket.getaddrinfo("example.org", 80)


# ---- cache


def cached_files(tmp_path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*.safetensors"))


def no_decoding(monkeypatch):
    monkeypatch.setattr(sources, "_decode", lambda *_: pytest.fail("decoded although there is a cached copy"))


def test_cache_is_used_the_second_time(root, tmp_path, monkeypatch):
    write_tree(root / "pets")
    first = load("pets", root)
    assert len(cached_files(tmp_path)) == 1
    no_decoding(monkeypatch)
    second = load("pets", root)
    assert second.fingerprint == first.fingerprint
    assert second.classes == first.classes
    assert torch.equal(second.train.pixels, first.train.pixels)
    assert torch.equal(second.test.labels, first.test.labels)
    assert (second.mean, second.std) == (first.mean, first.std)


def flip_last_byte(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "damage", [flip_last_byte, lambda c: c[:-5], lambda c: c[:20], lambda c: b""], ids=["bit", "tail", "head", "empty"]
)
def test_damaged_cache_is_made_again(root, tmp_path, capsys, monkeypatch, damage):
    write_tree(root / "pets")
    first = load("pets", root)
    (file,) = cached_files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again = load("pets", root)
    assert "damaged" in capsys.readouterr().out
    assert again.fingerprint == first.fingerprint
    assert torch.equal(again.train.pixels, first.train.pixels)
    no_decoding(monkeypatch)
    assert load("pets", root).fingerprint == first.fingerprint


def test_changed_source_is_read_again_and_changes_the_fingerprint(root):
    tree = write_tree(root / "pets")
    first = load("pets", root)
    picture(tree / "train/cat/1.png", 200)
    second = load("pets", root)
    assert second.train.pixels[1, 0, 0, 0] == 200
    assert second.fingerprint != first.fingerprint


def test_fingerprint_is_of_the_content_not_of_the_files(tmp_path):
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        write_tree(place / "pets")
    os.utime(places[1] / "pets/train/cat/0.png", (1, 1))
    first, second = (load("pets", place) for place in places)
    assert first.fingerprint == second.fingerprint
    for folder in (places[1] / "pets").iterdir():
        (folder / "cat").rename(folder / "bat")
    assert load("pets", places[1]).fingerprint != first.fingerprint


def test_unwritable_cache_is_named(root, monkeypatch):
    write_tree(root / "pets")
    (root / "file").touch()
    monkeypatch.setenv("FAQD_CACHE", str(root / "file" / "cache"))
    with pytest.raises(PermissionError, match="FAQD_CACHE"):
        load("pets", root)


# ---- subsets


LABELS = torch.arange(100) % 7


@pytest.mark.parametrize("count", [1, 7, 50, 99, 100])
def test_subsets_are_balanced_and_seeded(count):
    chosen = balanced_indices(LABELS, count, seed=3)
    assert len(chosen.unique()) == count
    assert torch.equal(chosen, chosen.sort().values)
    per_class = LABELS[chosen].bincount(minlength=7)
    if count <= 98:  # with 100 images of 7 classes two classes have one more
        assert per_class.max() - per_class.min() <= 1
    assert torch.equal(chosen, balanced_indices(LABELS, count, seed=3))
    if 1 < count < 99:
        assert not torch.equal(chosen, balanced_indices(LABELS, count, seed=4))


def test_scarce_classes_are_taken_whole():
    labels = torch.tensor([0] * 50 + [1] * 3)
    assert labels[balanced_indices(labels, 20, 0)].bincount().tolist() == [17, 3]


@pytest.mark.parametrize("count", [0, -1, 101])
def test_impossible_subsets_are_refused_by_value(count):
    with pytest.raises(ValueError, match=f"{count} images from 100"):
        balanced_indices(LABELS, count, 0)


def numbered(labels: torch.Tensor) -> Images:
    return Images(torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), labels)


def test_subset_keeps_labels_with_their_images():
    images = numbered(LABELS)
    taken = subset(images, 21, 1)
    assert torch.equal(LABELS[taken.pixels[:, 0, 0, 0].long()], taken.labels)
    assert subset(images, None, 1) is images
    assert subset(images, 100, 1) is images


def test_validation_split_is_disjoint_balanced_and_seeded():
    images = numbered(LABELS)
    training, validation = split_validation(images, 28, seed=2)
    ids = [set(split.pixels[:, 0, 0, 0].tolist()) for split in (training, validation)]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == set(range(100))
    assert validation.labels.bincount().tolist() == [4] * 7
    assert torch.equal(split_validation(images, 28, seed=2)[1].pixels, validation.pixels)
    assert not torch.equal(split_validation(images, 28, seed=3)[1].pixels, validation.pixels)
    assert split_validation(images, 0, 0) == (images, None)
    with pytest.raises(ValueError, match="validation_images=100"):
        split_validation(images, 100, 0)


def test_images_check_themselves():
    with pytest.raises(ValueError, match="float32"):
        Images(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="2 images but 3 labels"):
        Images(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3))


# ---- real images, if the user has them


def test_real_cifar10_jpeg(user_data):
    if user_data is None or not on_disk("cifar10-jpeg", user_data):
        pytest.skip("no JPEG CIFAR-10 in FAQD_DATA")
    tree = next(user_data / name for name in ("cifar10-jpeg", "cifar10") if (user_data / name).is_dir())
    folders = sorted(p.name for p in (tree / "train").iterdir())
    assert folders == sorted(["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"])
    file = next(iter(sorted((tree / "test" / "frog").iterdir())))
    decoded = sources._decode([(str(file), file.read_bytes)], None)
    assert decoded.shape == (1, 3, 32, 32)
    assert np.array_equal(decoded[0].permute(1, 2, 0).numpy(), np.asarray(Image.open(file).convert("RGB")))
