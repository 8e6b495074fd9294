"""The whole series on photographs: what the notebooks assert must hold on them, too, not only on digits."""

from pathlib import Path

import pytest
from PIL import Image
from series_runs import NOTEBOOKS, own_profile, run

from faqd_lib.data import datasets as data

pytestmark = pytest.mark.series


def cut_photographs(root: Path) -> str:
    """A dataset of 32×32 pieces of the two photographs that scikit-learn brings; its class is the band it is from."""
    from sklearn.datasets import load_sample_images  # imported here because it takes seconds

    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        height, width = photograph.shape[:2]
        band = height // 5
        for number in range(5):
            places = [
                (row, column)
                for row in range(number * band, (number + 1) * band - 31, 24)
                for column in range(0, width - 31, 32)
            ]
            for index, (row, column) in enumerate(places):
                split = "test" if index % 3 == 0 else "train"
                folder = root / "photographs" / split / f"{name}{number}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(photograph[row : row + 32, column : column + 32]).save(folder / f"{index}.png")
    return "photographs"


def test_every_notebook_runs_on_photographs(tmp_path, user_data):
    """On the user's CIFAR-10, or else on pieces of photographs that are always there.

    Tables have few cells here: the series on digits has trained them all. The profile is one's own, in the working
    directory.
    """
    few = {
        "weight_bits = [1, 4]": 'weight_bits = [1]\nweight_regimes = ["end-to-end"]',
        "full_bits = [[1, 4], [4, 4]]": "full_bits = [[1, 4]]",
        "logit_bits = [1, 4]": "logit_bits = [1]",
    }
    own_profile(tmp_path / "few.toml", few)
    found = [name for name in ("cifar10-jpeg", "cifar10") if user_data and data.on_disk(name, user_data)]
    root = user_data if found else tmp_path / "images"
    dataset = found[0] if found else cut_photographs(root)
    arguments = ["few.toml", "--all", "--dataset", dataset, "--data-root", str(root)]
    done = run([*arguments, "--results", str(tmp_path / "results")], cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    copies = sorted((tmp_path / "results" / f"few-{dataset}" / "notebooks").glob("*.ipynb"))
    assert [copy.name for copy in copies] == [path.name for path in NOTEBOOKS]
