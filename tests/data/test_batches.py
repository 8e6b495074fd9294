"""Batches: crops and flips of single images, seeded random streams, and no labels in label-free training."""

import pytest
import torch

from faqd_lib.data.batches import PADDING, Batches, Normalizer, stream
from faqd_lib.data.datasets import Images

SIZE = 8
CPU = torch.device("cpu")
# 255·std = 1 and mean 0: normalised pixels are the stored ones, as floats.
RAW = Normalizer((0, 0, 0), (1 / 255,) * 3, CPU)


@pytest.fixture
def images() -> Images:
    """Channel 0 is the row, 1 the column (from 1: 0 is padding), 2 the image; the label repeats the image."""
    count = 120
    pixels = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8)
    pixels[:, 0] = torch.arange(1, SIZE + 1).view(1, SIZE, 1)
    pixels[:, 1] = torch.arange(1, SIZE + 1).view(1, 1, SIZE)
    pixels[:, 2] = torch.arange(1, count + 1).view(count, 1, 1)
    return Images(pixels, torch.arange(1, count + 1))


def windows(pixels: torch.Tensor) -> dict[bytes, tuple[int, int, bool]]:
    """Every crop of the zero-padded image, plain and mirrored, by its bytes."""
    padded = torch.zeros(3, SIZE + 2 * PADDING, SIZE + 2 * PADDING)
    padded[:, PADDING:-PADDING, PADDING:-PADDING] = pixels
    found = {}
    for top in range(2 * PADDING + 1):
        for left in range(2 * PADDING + 1):
            crop = padded[:, top : top + SIZE, left : left + SIZE]
            found[crop.contiguous().numpy().tobytes()] = (top, left, False)
            found[crop.flip(2).contiguous().numpy().tobytes()] = (top, left, True)
    return found


@pytest.mark.parametrize("flip", [True, False])
def test_every_image_is_a_window_of_its_padded_original(images, flip):
    seen, mirrored_in_batch = [], []
    for batch in Batches(images, 40, 0, RAW, flip=flip).epoch(0):
        places = []
        for picture, label in zip(batch.images, batch.labels, strict=True):
            crops = windows(images.pixels[label - 1])
            places.append(crops[picture.contiguous().numpy().tobytes()])  # KeyError: not a crop of its own original
        seen += places
        mirrored_in_batch.append(sum(mirrored for *_, mirrored in places))
    assert len(seen) == 120
    assert {top for top, *_ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert all((0 < count < 40) if flip else count == 0 for count in mirrored_in_batch)
    # Each image is moved by itself, not the batch as a whole.
    assert len(set(seen[:40])) > 20


def test_an_epoch_visits_each_image_at_most_once_and_drops_the_rest(images):
    batches = Batches(images, 50, 0, RAW)
    labels = [batch.labels for batch in batches.epoch(0)]
    assert len(batches) == len(labels) == 2
    assert torch.cat(labels).unique().numel() == 100
    left_out = [set(range(1, 121)) - set(torch.cat([b.labels for b in batches.epoch(e)]).tolist()) for e in (0, 1)]
    assert left_out[0] != left_out[1]


def epoch_tensors(batches: Batches, epoch: int) -> list[torch.Tensor]:
    return [tensor for batch in batches.epoch(epoch) for tensor in (batch.images, batch.labels)]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_seed_and_epoch_decide_every_bit(images):
    batches = Batches(images, 30, 7, RAW)
    later = epoch_tensors(batches, 3)
    torch.rand(100)  # neither other random numbers nor earlier epochs change an epoch
    list(batches.epoch(0))
    assert equal(later, epoch_tensors(Batches(images, 30, 7, RAW), 3))
    assert not equal(later, epoch_tensors(batches, 2))
    assert not equal(later, epoch_tensors(Batches(images, 30, 8, RAW), 3))


def test_the_global_generator_is_left_alone(images):
    before = torch.get_rng_state()
    list(Batches(images, 30, 0, RAW).epoch(0))
    assert torch.equal(before, torch.get_rng_state())


def test_labels_do_not_influence_the_images(images):
    labelled = [b.images for b in Batches(images, 30, 0, RAW).epoch(1)]
    unlabelled = [b.images for b in Batches(images.unlabelled(), 30, 0, RAW).epoch(1)]
    assert equal(labelled, unlabelled)


def test_no_labels_in_no_labels_out(images):
    assert images.unlabelled().labels is None
    assert all(batch.labels is None for batch in Batches(images.unlabelled(), 30, 0, RAW).epoch(0))


@pytest.mark.parametrize("batch_size", [0, 1, -4, 121])
def test_impossible_batch_sizes_are_refused_by_value(images, batch_size):
    with pytest.raises(ValueError, match=f"got {batch_size}") as raised:
        Batches(images, batch_size, 0, RAW)
    assert "120 images" in str(raised.value)


def test_what_is_no_images_is_named():
    pixels = torch.zeros(5, 8, 8, 3, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"got torch\.uint8 \(5, 3, 8, 8\): use Images\(pixels\)"):
        Batches(pixels.permute(0, 3, 1, 2), 2, 0, RAW)
    for wrong, named in (
        (pixels, r"pixels\.permute\(0, 3, 1, 2\)"), (pixels.float(), r"torch\.float32"), (pixels.numpy(), "ndarray")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            Images(wrong)


@pytest.mark.parametrize("pixels", [torch.rand(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), [[1]]])
def test_what_is_no_pixels_is_named(pixels):
    with pytest.raises(ValueError, match=r"pixels must be a uint8 tensor .*got (torch\.|list)"):
        RAW(pixels)
    with pytest.raises(ValueError, match=r"pixels\.permute\(0, 3, 1, 2\)"):
        RAW(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="divide them by 255"):
        Normalizer((127.0,) * 3, (60.0,) * 3, CPU)


@pytest.mark.parametrize(("mean", "std"), [((0.5,) * 3, (0.2, 0.2, 0)), ((0.5,), (0.2,) * 3)])
def test_a_deviation_that_cannot_be_is_named(mean, std):
    with pytest.raises(ValueError, match="std above 0"):
        Normalizer(mean, std, CPU)


def test_smallest_and_largest_batch_size(images):
    assert len(Batches(images, 120, 0, RAW)) == 1
    assert next(Batches(images, 2, 0, RAW).epoch(0)).images.shape == (2, 3, SIZE, SIZE)


def test_normaliser_against_the_formula():
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.25, 0.3)
    pixels = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalised = Normalizer(mean, std, CPU)(pixels)
    expected = (pixels.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert normalised.dtype == torch.float32
    assert normalised.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(normalised.double(), expected, atol=1e-5)


def test_batches_are_channels_last_and_normalised(images):
    batch = next(Batches(images, 4, 0, RAW).epoch(0))
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    # Padding is black, 0 before normalisation, as in torchvision's transforms.
    shifted = next(Batches(images, 120, 0, Normalizer((0.5,) * 3, (0.5,) * 3, CPU)).epoch(0))
    assert shifted.images.min().item() == pytest.approx(-1)


def test_streams_are_independent_of_each_other():
    draws = {
        (seed, purpose, epoch): float(torch.rand((), generator=stream(seed, purpose, epoch)))
        for seed in (0, 1)
        for purpose in ("order", "augmentation")
        for epoch in (0, 1)
    }
    assert len(set(draws.values())) == 8
    assert draws[0, "order", 1] == float(torch.rand((), generator=stream(0, "order", 1)))
