"""The first cells of a notebook: parameters that papermill injected, and the suite they describe."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from faqd_lib.cli import notebook
from faqd_lib.cli.notebook import check_injected, injected_names, start
from faqd_lib.config import ConfigurationError
from faqd_lib.runs.profile import Profile
from faqd_lib.utils.files import project_root

INJECTED = '# Parameters\nprofile = "smoke"\nseeds = 2\n'
KNOWN = {"profile", "dataset", "data_root", "results_dir", "seeds"}


@pytest.fixture
def shell(monkeypatch):
    """A function that puts cells into the history of an IPython shell."""

    def show(*cells: str) -> None:
        monkeypatch.setattr(notebook, "get_ipython", lambda: SimpleNamespace(user_ns={"In": ["", *cells]}))

    return show


def test_injected_names_are_those_of_the_latest_injected_cell():
    assert injected_names([]) == []
    assert injected_names(["seeds: int = 1  # parameters cell of the notebook", "x = 2"]) == []
    assert injected_names(["# Parameters\nold = 1", "x = 2", INJECTED, "y = 3"]) == ["profile", "seeds"]
    assert injected_names(["\n# Parameters\nvalues = [1, 2]\nname = None\n"]) == ["values", "name"]


@pytest.mark.parametrize(("name", "near"), [("profle", "profile"), ("seed", "seeds"), ("result_dir", "results_dir")])
def test_misspelled_parameter_is_refused_with_the_near_name(shell, name, near):
    shell("profile: str = 'quick'", f"# Parameters\nseeds = 2\n{name} = 3\n")
    with pytest.raises(ConfigurationError) as raised:
        check_injected(KNOWN)
    assert f"unknown parameter {name!r}" in str(raised.value)
    assert f"did you mean {near!r}?" in str(raised.value)


def test_a_name_like_none_lists_them_all(shell):
    shell("# Parameters\nzzz = 1\n")
    with pytest.raises(ConfigurationError, match="'zzz'") as raised:
        check_injected(KNOWN)
    assert "did you mean" not in str(raised.value)
    assert ", ".join(sorted(KNOWN)) in str(raised.value)


def test_known_parameters_pass(shell):
    shell(INJECTED)
    check_injected(KNOWN)
    shell("nonsense = 1")
    check_injected(KNOWN)


def test_without_ipython_nothing_is_injected(monkeypatch):
    monkeypatch.setattr(notebook, "get_ipython", lambda: None)
    check_injected(set())


def arguments(tmp_path, **changes) -> dict:
    return {
        "profile": "smoke", "dataset": "digits", "data_root": "", "results_dir": str(tmp_path / "r"), "seeds": 0,
        **changes,
    }  # fmt: skip


def test_start_opens_the_suite_and_says_what_it_is(shell, tmp_path, capsys):
    shell("# Parameters\nprofile = 'smoke'\nimages_shown = 3\n")
    suite = start(**arguments(tmp_path), images_shown=3)
    out = capsys.readouterr().out
    assert suite.folder == tmp_path / "r" / "smoke-digits"
    for text in ("digits", "smoke", str(suite.folder), "mean nothing"):
        assert text in out


def test_a_notebook_about_pixels_takes_images_that_have_their_classes(shell, tmp_path):
    shell()
    assert start(**arguments(tmp_path), dense=True).folder == tmp_path / "r" / "smoke-digit-strokes"
    with pytest.raises(ConfigurationError, match=r"digit-strokes has a class for each pixel.*notebook 14"):
        start(**arguments(tmp_path, dataset="digit-strokes"))


@pytest.mark.parametrize(("profile", "expected"), [("smoke", "digit-strokes"), ("quick", "camvid")])
def test_camvid_is_taken_where_it_is_on_disk_and_results_are_shown(tmp_path, profile, expected):
    for folder in ("train", "trainannot"):
        (tmp_path / "camvid" / folder).mkdir(parents=True)
    chosen = Profile.load(profile)
    fitted, name, lines = notebook.dense_choice(chosen, "cifar10", str(tmp_path))
    assert (fitted, name) == (chosen, expected)
    (line,) = lines
    assert line.startswith(f"dataset: {expected} (")
    assert line.endswith("because cifar10 has no label maps that this project reads")
    assert notebook.dense_choice(chosen, "camvid-val", str(tmp_path))[1:] == ("camvid-val", [])


@pytest.mark.parametrize(("shows", "lender", "bits"), [("true", "quick", [1, 4]), ("false", "smoke", [4])])
def test_a_profile_without_dense_networks_borrows_them(shell, tmp_path, capsys, shows, lender, bits):
    shell()
    shipped = (project_root() / "docs" / "profile.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(
        shipped.replace("shows_results = true", f"shows_results = {shows}").replace(
            "weight_teachers = []", 'weight_teachers = ["resnet20"]'
        )
    )
    suite = start(**arguments(tmp_path, profile=str(path)), dense=True)
    profile = suite.profile
    assert (profile.teachers, profile.student, profile.grid.weight_bits) == (["linknet8"], "linknet8", bits)
    assert profile.student_schedule.epochs == 8  # the user's own
    out = capsys.readouterr().out
    assert "dataset: digit-strokes (made from scikit-learn's digits, because camvid is not on disk)" in out
    assert f"networks: teacher linknet8, student linknet8, with the settings of the profile {lender} for" in out


def test_start_takes_the_results_folder_from_the_environment(shell, tmp_path, monkeypatch):
    shell()
    monkeypatch.setenv("FAQD_RESULTS", str(tmp_path / "elsewhere"))
    assert start(**arguments(tmp_path, results_dir="")).folder == tmp_path / "elsewhere" / "smoke-digits"


def test_start_passes_the_engine_and_the_style_of_progress_on(shell, tmp_path, monkeypatch):
    shell()
    monkeypatch.setenv("FAQD_ENGINE", "ray")
    monkeypatch.setenv("FAQD_RAY_ADDRESS", "head:6379")
    monkeypatch.setenv("FAQD_PROGRESS", "bar")
    suite = start(**arguments(tmp_path))
    assert suite.engine.address == "head:6379"
    assert suite.bar is True


def test_figures_have_controls_only_where_somebody_watches(monkeypatch):
    figure, slider = object(), notebook.slider("bits", 1, 8, 4)
    assert notebook.explore(lambda bits: (figure, bits), bits=slider) == (figure, 4)
    monkeypatch.setenv("FAQD_PROGRESS", "text")
    assert notebook.explore(lambda bits: (figure, bits), bits=slider) == (figure, 4)
    monkeypatch.setenv("FAQD_PROGRESS", "bar")
    assert slider in notebook.explore(lambda bits: None, bits=slider).children[0].children


@pytest.mark.parametrize(
    ("name", "value"), [("profile", 3), ("dataset", ["digits"]), ("results_dir", None), ("seeds", "2")]
)
def test_parameters_of_the_wrong_type_are_named(shell, tmp_path, name, value):
    shell()
    with pytest.raises(ConfigurationError, match=name) as raised:
        start(**arguments(tmp_path, **{name: value}))
    assert repr(value) in str(raised.value)


def test_misspelling_stops_before_the_suite_is_opened(shell, tmp_path):
    shell("# Parameters\nprofle = 'smoke'\n")
    with pytest.raises(ConfigurationError, match="profle"):
        start(**arguments(tmp_path))
    assert not (tmp_path / "r").exists()


FIRST_CELLS = """
import sys
import torch
torch.set_num_threads(1)
from faqd_lib.cli import notebook
from faqd_lib.data.batches import Batches
from faqd_lib.reporting import charts, grids, pictures, tables
from faqd_lib.training.learner import TeacherOutput

def imported(*names):
    return [name for name in names if name in sys.modules]

suite = notebook.start(profile="smoke", dataset="squares", data_root=sys.argv[1], results_dir=sys.argv[1], seeds=0)
slow = ("matplotlib", "seaborn", "ipywidgets", "sklearn", "scipy", "onnx", "onnxruntime", "nbconvert", "ray")
compilers = ("torch._dynamo", "torch._inductor", "sympy")
assert not imported(*slow, *compilers), imported(*slow, *compilers)
batches = Batches(suite.splits.training.unlabelled(), 16, 0, suite.normalizer)
batch = next(batches.epoch(0))
with torch.no_grad():
    seen = TeacherOutput(suite.build(suite.teacher()).eval()(batch.images))
learner = suite.learner(suite.student("KD", weight_bits=1), batches)
learner.advance(0, batch, seen)
network = suite.build(suite.student("KD", weight_bits=1, activation_bits=4)).train()
network(batch.images).square().mean().backward()
assert not imported(*slow, *compilers), imported(*slow, *compilers)
pictures.image_grid([batch.images], [""])
assert imported("matplotlib.pyplot", "seaborn")
"""


def test_a_notebook_imports_what_it_draws_and_compiles_with_when_it_does(tmp_path):
    for split, count in (("train", 64), ("test", 100)):
        for index in range(count):
            folder = tmp_path / "squares" / split / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 32, 3), 100 * (index % 2) + index, np.uint8)).save(folder / f"{index}.png")
    command = [sys.executable, "-c", FIRST_CELLS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
