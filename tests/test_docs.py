"""The pages in docs/: their code runs as it stands, and what they point to exists."""

import re

import numpy as np
import pytest
from PIL import Image

from faqd_lib.utils.files import project_root

PAGES = sorted(
    [*(project_root() / "docs").glob("*.md"), project_root() / "README.md", project_root() / "results" / "README.md"]
)


def test_code_of_your_project_runs_and_learns(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(random.integers(0, 256, (40, 36, 3), np.uint8)).save(photos / f"{index}.jpg")
    monkeypatch.chdir(tmp_path)
    text = (project_root() / "docs" / "your-project.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 10
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "docs/your-project.md", "exec"), scope)
    assert len(scope["history"]) == 16
    assert scope["history"][-1]["total"] < scope["history"][0]["total"]
    assert scope["images"].labels is None
    assert len(scope["images"]) == 32
    assert scope["agreement"]().split(";")[0].endswith("% of 8")
    assert (tmp_path / "student.onnx").stat().st_size > 0
    assert scope["small"].card.held_out_pictures == 4
    assert (tmp_path / "mine" / "index.html").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_a_page_points_to_exists(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for target in re.findall(r"`((?:benchmarks|tests|notebooks|scripts|docs)/[\w.-]+)`", text):
        assert (project_root() / target).exists(), target
    for target in re.findall(r"`(test_\w+\.py)`", text):
        assert (project_root() / "tests" / target).exists(), target
