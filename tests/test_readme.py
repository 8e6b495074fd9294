"""The README's code runs as it stands, and what it names exists."""

import re

import torch

from faqd_lib.cli.run_all import parser
from faqd_lib.runs.profile import PROFILES
from faqd_lib.runs.suite import Suite
from faqd_lib.utils.files import project_root

TEXT = (project_root() / "README.md").read_text(encoding="utf-8")


def test_code_runs_and_trains(tmp_path, monkeypatch):
    training, losses, files = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    written: dict = {}
    exec(compile(files, "README.md", "exec"), written)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(written["same"](images), written["network"].eval()(images))
    assert (tmp_path / "student.onnx").stat().st_size < 4 * 270_000
    alone: dict = {}
    exec(compile(losses, "README.md", "exec"), alone)
    assert 0 < alone["loss"] < 1
    scope: dict = {}
    exec(compile(training, "README.md", "exec"), scope)
    weight = scope["student"].layer1[0].conv1.parametrizations.weight.original
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    assert len(scope["student"].layer1[0].conv1.weight.unique()) == 2


def test_a_network_is_loaded_by_hand_as_the_results_page_says(tmp_path):
    suite = Suite.open("smoke", "digits", results=tmp_path)
    config = suite.teacher()
    quantized = suite.post_training(2, 4)
    (code,) = re.findall(
        r"```python\n(.*?)```", (project_root() / "results" / "README.md").read_text(), flags=re.DOTALL
    )
    for run in (config, quantized):
        suite.run([run])
        scope: dict = {}
        ours = code.replace("results/quick-digits/runs/<name>-<digest>", str(suite.store.run_folder(run)))
        assert ours != code
        exec(compile(ours, "results/README.md", "exec"), scope)
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(scope["model"](images), suite.model(run)(images))


def test_options_profiles_and_links_exist():
    options = {string for action in parser()._actions for string in action.option_strings if string.startswith("--")}
    # Ray's own commands have options of their own, and so have the benchmarks.
    ours = re.sub(r"^ray .*$|`python benchmarks/[^`]*`", "", TEXT, flags=re.MULTILINE)
    named = set(re.findall(r"(?<![-\w])--[a-z][a-z-]+", ours))
    assert named <= options
    assert options - {"--help"} <= named
    assert all(f"`{profile}`" in TEXT for profile in PROFILES)
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-")
        for line in re.findall(r"^#+ (.*)$", TEXT, flags=re.MULTILINE)
    }
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        if link.startswith("#"):
            assert link[1:] in headings, link
        else:
            assert link.startswith("https://") or (project_root() / link).exists(), link
