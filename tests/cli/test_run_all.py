"""The headless runner: what stops it, what it refuses, what it says."""

import re

import filelock
import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError
from series_runs import NOTEBOOKS, environment

from faqd_lib.cli import run_all
from faqd_lib.runs.profile import Profile
from faqd_lib.runs.store import ResultsError
from faqd_lib.runs.suite import Suite
from faqd_lib.utils.files import project_root

pytestmark = pytest.mark.series


def test_a_misspelled_parameter_stops_the_notebook(tmp_path, monkeypatch):
    for name, value in environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PapermillExecutionError, match=r"unknown parameter 'seed' \(did you mean 'seeds'\?\)"):
        papermill.execute_notebook(
            NOTEBOOKS[0], tmp_path / "out.ipynb", {"seed": 3, "profile": "smoke", "dataset": "digits"},
            progress_bar=False, cwd=str(tmp_path),
        )  # fmt: skip


def test_a_failing_cell_stops_the_series_and_is_named(tmp_path, monkeypatch, capsys):
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    source = nbformat.read(NOTEBOOKS[0], 4)
    parameters = next(c for c in source.cells if "parameters" in c.metadata.get("tags", []))
    boom = nbformat.v4.new_code_cell("raise RuntimeError('the oven is cold')")
    later = nbformat.v4.new_code_cell("open('reached', 'w')")
    metadata = {"kernelspec": source.metadata.kernelspec}
    nbformat.write(
        nbformat.v4.new_notebook(cells=[parameters, boom, later], metadata=metadata), notebooks / "00_a.ipynb"
    )
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, later], metadata=metadata), notebooks / "01_b.ipynb")
    monkeypatch.setattr(run_all, "notebooks_folder", lambda: notebooks)
    status = run_all.main(["smoke", "--dataset", "digits", "--results", str(tmp_path / "results")])
    message = capsys.readouterr().err
    assert status == 1
    copy = tmp_path / "results" / "smoke-digits" / "notebooks" / "00_a.ipynb"
    for part in ("00_a.ipynb", "In [3]", "RuntimeError", "the oven is cold", str(copy)):
        assert part in message
    assert copy.is_file()
    assert not list(tmp_path.rglob("reached"))
    assert not (copy.parent / "01_b.ipynb").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smoke", "--dataset", "digits", "--only", "09"], "run --only 04 05 06 07 08 09"),
        (["smoke", "--dataset", "digits", "--only", "42"], "there is no notebook '42'"),
        (["smokey"], "did you mean 'smoke'?"),
        (["smoke", "--dataset", "cifar11"], "unknown dataset 'cifar11'"),
        (["smoke", "--dataset", "digits", "--seeds", "-1"], "seeds must be a whole number of at least 1, got -1"),
        (["smoke", "--dataset", "digits", "--seeds", "0"], "seeds must be a whole number of at least 1, got 0"),
    ],
)
def test_what_cannot_run_is_said_before_anything_runs(tmp_path, capsys, arguments, message):
    assert run_all.main([*arguments, "--results", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ipynb"))


@pytest.mark.parametrize(("only", "calls"), [(["9"], 4), (["08,09"], 4), (["08"], 2), ([], 4)])
def test_tables_of_several_datasets_are_written_a_second_time(tmp_path, monkeypatch, only, calls):
    profile = tmp_path / "mine.toml"
    profile.write_text('base = "smoke"\nseries_datasets = ["digits", "digit-strokes"]')
    called = []
    monkeypatch.setattr(run_all, "run_series", lambda *arguments: called.append(arguments))
    assert run_all.main([str(profile), "--results", str(tmp_path), *(["--only", *only] if only else [])]) == 0
    assert len(called) == calls


def test_no_notebook_at_all_is_an_error():
    with pytest.raises(run_all.SeriesError, match="--only , names no notebook"):
        run_all.select([","])


@pytest.mark.parametrize("only", [["0", "1"], ["00,1"], ["01", "00"]])
def test_numbers_of_notebooks_may_be_written_as_people_do(only):
    assert [path.name[:2] for path in run_all.select(only)] == ["00", "01"]


def test_the_second_part_runs_if_asked_for(tmp_path, monkeypatch):
    for number in ("00", "10", "11", "14"):
        (tmp_path / f"{number}_a.ipynb").touch()
    monkeypatch.setattr(run_all, "notebooks_folder", lambda: tmp_path)

    def numbers(*arguments) -> list[str]:
        return [path.name[:2] for path in run_all.select(*arguments)]

    assert numbers([]) == ["00", "10"]
    assert numbers([], True) == ["00", "10", "11", "14"]
    assert numbers(["14", "0"]) == ["00", "14"]
    assert run_all.parser().parse_args(["smoke", "--all"]).all


def test_a_folder_of_another_configuration_is_refused(tmp_path, capsys):
    profile = tmp_path / "mine.toml"
    shipped = (project_root() / "faqd_lib" / "runs" / "profiles" / "smoke.toml").read_text()
    profile.write_text(shipped)
    results = ["--results", str(tmp_path / "results"), "--dataset", "digits", "--only", "09"]
    assert run_all.main([str(profile), *results]) == 1  # begins the folder, then misses the runs
    profile.write_text(shipped.replace("batch_size = 32", "batch_size = 16"))
    assert run_all.main([str(profile), *results]) == 1
    message = capsys.readouterr().err
    assert "begun with another configuration" in message
    assert "batch_size: 32 there, 16 now" in message
    assert "--fresh" in message


def test_a_folder_of_other_images_is_refused(tmp_path):
    begun = Suite.open("smoke", "digits", results=tmp_path)
    content = (begun.folder / "suite.json").read_text()
    (begun.folder / "suite.json").write_text(content.replace(begun.state.data.fingerprint, "0" * 64))
    with pytest.raises(ResultsError, match=r"begun with another configuration \(other images\)"):
        Suite.open("smoke", "digits", results=tmp_path)


def test_fresh_moves_the_old_results_aside(tmp_path, capsys):
    folder = tmp_path / "smoke-digits"
    folder.mkdir()
    (folder / "suite.json").write_text("damaged")
    arguments = ["smoke", "--dataset", "digits", "--results", str(tmp_path), "--only", "09"]
    assert run_all.main(arguments) == 1
    assert "suite.json is damaged" in capsys.readouterr().err
    run_all.main([*arguments, "--fresh"])
    aside = list(tmp_path.glob("smoke-digits.old-*"))
    assert len(aside) == 1
    assert (aside[0] / "suite.json").read_text() == "damaged"
    assert "the runs of" in capsys.readouterr().err  # the new folder is good, and has no runs yet


def test_notebook_14_has_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    """With two datasets the folder is moved once: the second series goes on with the runs of the first one."""
    monkeypatch.setattr("faqd_lib.reporting.report.write_report", lambda suite: "")

    def execute(notebook, *arguments) -> float:
        (tmp_path / "smoke-digit-strokes").mkdir(exist_ok=True)
        return 0.0

    monkeypatch.setattr(run_all, "execute", execute)
    for name in ("digits", "digit-strokes"):
        (tmp_path / f"smoke-{name}").mkdir()
    arguments = ["smoke", "--results", str(tmp_path), "--only", "14", "--fresh", "--dataset", "digits"]
    options = run_all.parser().parse_args(arguments)
    options.results, fresh = tmp_path, set()
    for _ in range(2):
        run_all.run_series(options, Profile.load("smoke"), "digits", ["14"], fresh)
    for name in ("digits", "digit-strokes"):
        assert len(list(tmp_path.glob(f"smoke-{name}.old-*"))) == 1
    with filelock.FileLock(tmp_path / f".smoke-digit-strokes{run_all.LOCK_NAME}"):
        assert run_all.main(arguments) == 1
    assert f"another run_all.sh is working in {tmp_path / 'smoke-digit-strokes'}" in capsys.readouterr().err


def test_two_series_do_not_share_a_folder(tmp_path, capsys):
    with filelock.FileLock(tmp_path / f".smoke-digits{run_all.LOCK_NAME}"):
        assert run_all.main(["smoke", "--dataset", "digits", "--results", str(tmp_path)]) == 1
    assert "another run_all.sh is working" in capsys.readouterr().err


def test_a_results_folder_that_cannot_be_written_is_refused(capsys):
    assert run_all.main(["smoke", "--dataset", "digits", "--results", "/proc/faqd"]) == 1
    assert "cannot write to /proc/faqd" in capsys.readouterr().err


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count]
    assert notebook.metadata.kernelspec.name == "python3"
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert all(line.count("=") == 1 and "#" in line for line in tagged[0].source.splitlines())
    assert {"profile", "dataset", "data_root", "results_dir", "seeds"} <= set(papermill.inspect_notebook(str(path)))
    text = "\n".join(cell.source for cell in code)
    assert "assert " in text
    for forbidden in ("sys.path", "!pip", "%pip", "sys.exit"):
        assert forbidden not in text
    # A path from the root of a file system, Unix or Windows, belongs to one machine only.
    assert not re.search(r"""["'](/\w+/|[A-Za-z]:\\)""", text)


def test_the_series_is_complete():
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert numbers[: run_all.SECOND_PART] == [f"{number:02}" for number in range(run_all.SECOND_PART)]
    assert len(set(numbers)) == len(numbers)
