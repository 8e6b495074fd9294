"""The README's code runs as it stands; what README and docs name exists."""

import re

import pytest
import torch

from faqd_lib.cli.pages import MARKED, pages
from faqd_lib.cli.run_all import parser
from faqd_lib.reporting import study_claims, study_curves
from faqd_lib.runs.profile import PROFILES
from faqd_lib.runs.suite import Suite
from faqd_lib.utils.files import project_root

TEXT = (project_root() / "README.md").read_text(encoding="utf-8")


def test_code_runs_and_trains(tmp_path, monkeypatch):
    files, training = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    written: dict = {}
    exec(compile(files, "README.md", "exec"), written)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(written["same"](images), written["network"].eval()(images))
    assert (tmp_path / "student.onnx").stat().st_size < 4 * 270_000
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


def test_the_typed_numbers_of_the_study_are_those_of_its_records():
    suite = Suite.read(project_root() / "results" / "reference" / "short-cifar10-jpeg")
    reach, judged = study_curves.reach_frame(suite).set_index(["updates", "arm"]), study_claims.table(suite).frame
    family = judged[judged["family"] == "when"]
    shares = reach["share"].xs(400)
    assert f"KD's accuracy at 400 updates after [{shares['kd']:.2f} times as many]" in TEXT
    arms = study_curves.arms_frame(suite).query("cells in ['updates-400', 'kd-tuned-400']").set_index("arm")["accuracy"]
    assert arms.loc[list(shares.index)].idxmax() == "kd-10-slow"
    assert f"its accuracy at 400 updates after {shares['kd-10-slow']:.2f} times as many" in TEXT
    without = int((family["difference"] == "not run").sum())
    assert f"correct for {len(family)} claims and two looks" in TEXT
    assert f"{without} of the {len(family)} have no runs yet" in TEXT


def test_the_readme_is_short_and_shows_both_commands():
    own = MARKED.sub("", TEXT)  # the table of claims grows with the study
    assert len(own.splitlines()) <= 115
    assert all(command in TEXT for command in ("./run_all.sh", "./run_tests.sh", "./run_all.sh lab"))


def test_options_and_profiles_are_documented():
    running = (project_root() / "docs" / "running.md").read_text(encoding="utf-8")
    options = {string for action in parser()._actions for string in action.option_strings if string.startswith("--")}
    # Ray's commands and the benchmarks have other options.
    ours = re.sub(r"^\.venv/bin/ray .*$|`(?:python|pip|conda|\.venv)[^`]*`", "", running, flags=re.MULTILINE)
    named = set(re.findall(r"(?<![-\w])--[a-z][a-z-]+", ours))
    assert named == options - {"--help"}
    assert all(f"`{profile}`" in running for profile in PROFILES)


@pytest.mark.parametrize("page", pages(project_root()), ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            known = {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in headings}
            assert anchor in known, link
