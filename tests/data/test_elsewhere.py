"""Unlabelled images from elsewhere: which are taken, that the seed gives every bit, and what is refused."""

import pytest
import torch

from faqd_lib.data.elsewhere import half, noise, unlabelled
from faqd_lib.data.images import DatasetError, Images


@pytest.fixture
def own() -> Images:
    """Twelve images of 8×8 pixels; the value of image i is 10·i, and its class i mod 5."""
    pixels = (10 * torch.arange(12, dtype=torch.uint8)).view(12, 1, 1, 1).expand(12, 3, 8, 8)
    return Images(pixels.contiguous(), torch.arange(12) % 5)


def test_halves_are_by_class_and_share_no_image(own):
    assert half(own, 5, "first-half").labels.unique().tolist() == [0, 1]
    assert half(own, 5, "second-half").labels.unique().tolist() == [2, 3, 4]
    first, second = (unlabelled(name, count, 0, own, 5) for name, count in (("first-half", 6), ("second-half", 6)))
    values = [images.pixels[:, 0, 0, 0].tolist() for images in (first, second)]
    assert sorted(values[0] + values[1]) == sorted(own.pixels[:, 0, 0, 0].tolist())
    assert first.labels is None


@pytest.mark.parametrize("name", ["noise", "smooth-noise"])
def test_noise_has_the_size_of_the_images_and_the_bits_of_its_seed(own, name):
    images = unlabelled(name, 20, 1, own, 5)
    assert images.pixels.shape == (20, 3, 8, 8)
    assert torch.equal(images.pixels, noise(name, 20, (8, 8), 1).pixels)
    assert not torch.equal(images.pixels, noise(name, 20, (8, 8), 2).pixels)
    assert images.pixels.float().mean() == pytest.approx(127.5, abs=10)


def test_smooth_noise_is_smooth():
    """Neighbours of noise differ by 85 on average, as two independent uniform values; those of smooth noise by less."""
    rough, smooth = (
        noise(name, 50, (32, 32), 0).pixels.float().diff(dim=3).abs().mean() for name in ("noise", "smooth-noise")
    )
    assert rough == pytest.approx(255 / 3, rel=0.02)
    assert smooth < rough / 3


def test_another_dataset_gives_its_images_without_labels(own):
    other = Images(torch.full((4, 3, 8, 8), 7, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]))
    taken = unlabelled("other", 2, 0, own, 5, other)
    assert (len(taken), taken.labels, int(taken.pixels.max())) == (2, None, 7)
    with pytest.raises(DatasetError, match="5 images were asked for, and other has 4"):
        unlabelled("other", 5, 0, own, 5, other)
    larger = Images(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), other.labels)
    with pytest.raises(DatasetError, match="other has images of 16x16 and the own images of 8x8"):
        unlabelled("other", 2, 0, own, 5, larger)


def test_label_maps_have_no_halves_and_noise_their_size():
    own = Images(torch.zeros(3, 3, 8, 12, dtype=torch.uint8), torch.zeros(3, 8, 12, dtype=torch.uint8))
    for name in ("first-half", "second-half"):
        with pytest.raises(DatasetError, match=f"{name} is chosen by the class of each image"):
            unlabelled(name, 1, 0, own, 5)
    for name in ("noise", "smooth-noise"):
        assert unlabelled(name, 2, 0, own, 5).pixels.shape == (2, 3, 8, 12)
    square = Images(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(DatasetError, match="images of 8x8 and the own images of 12x8"):
        unlabelled("other", 2, 0, own, 5, square)
