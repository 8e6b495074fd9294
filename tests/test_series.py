"""The real thing: notebooks through papermill at smoke scale, from another folder than the project's."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import nbformat
import pandas as pd
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from faqd_lib import series, tables
from faqd_lib.files import project_root
from faqd_lib.suite import Suite

pytestmark = pytest.mark.series
NOTEBOOKS = sorted((project_root() / "notebooks").glob("*.ipynb"))


def environment(cache: Path) -> dict[str, str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith("FAQD_")}
    return {**keep, "FAQD_CACHE": str(cache), "PYTHONPATH": str(project_root()), "OMP_WAIT_POLICY": "passive"}


def run(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "faqd_lib.series", *arguments],
        cwd=cwd, env=environment(cwd / "cache"), capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip


def digests(results: Path) -> dict[str, str]:
    records = [json.loads(path.read_text()) for path in results.glob("*/runs/*/record.json")]
    return {record["run_id"]: record["weights_digest"] for record in records}


@pytest.fixture(scope="module")
def whole_series(tmp_path_factory):
    """Every notebook once, on the images that need no file."""
    folder = tmp_path_factory.mktemp("series with a space")
    results = folder / "results"
    done = run(["smoke", "--dataset", "digits", "--results", str(results)], cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, results / "smoke-digits", done


def test_every_notebook_is_executed_without_an_error(whole_series):
    _, suite, done = whole_series
    copies = sorted((suite / "notebooks").glob("*.ipynb"))
    assert [copy.name for copy in copies] == [path.name for path in NOTEBOOKS]
    for copy in copies:
        cells = [cell for cell in nbformat.read(copy, 4).cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in cells), copy.name
        assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"], copy.name
        assert copy.stat().st_size < 4_000_000, copy.name
    assert f"notebook 1 of {len(NOTEBOOKS)}" in done.stdout
    assert "epoch 1 of 1" in done.stdout
    assert "left" in done.stdout


def test_every_table_and_the_summary_are_written_and_named(whole_series):
    _, suite, done = whole_series
    names = {path.name.split("_")[0].split(".")[0] for path in (suite / "tables").iterdir()}
    assert names == {"T1", "T2", "T3", "T4", "T5", "claims"}
    assert str(suite / "summary.md") in done.stdout
    assert list((suite / "figures").glob("*.pdf"))
    assert "not a result" in (suite / "tables" / "claims.md").read_text()


def test_a_second_call_trains_nothing_and_says_why_it_took_which_images(whole_series, tmp_path):
    _, suite, _ = whole_series
    (tmp_path / "empty").mkdir()
    copy = shutil.copytree(suite, tmp_path / "results" / suite.name)
    before = {path: path.stat().st_mtime_ns for path in copy.glob("runs/*/*")}
    done = run(["smoke", "--data-root", "empty", "--results", "results", "--only", "05", "09"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ", epoch " not in done.stdout
    assert {path: path.stat().st_mtime_ns for path in copy.glob("runs/*/*")} == before
    reason = f"no CIFAR-10 was found in {tmp_path / 'empty'}"
    assert reason in done.stdout
    for name in ("claims.md", "T1_weight_quantization_digits.md", "T5_cost_digits.md"):
        assert reason in (copy / "tables" / name).read_text(), name


def test_a_profile_of_ones_own_is_found_from_any_folder(tmp_path):
    shipped = (project_root() / "faqd_lib" / "profiles" / "smoke.toml").read_text()
    (tmp_path / "mine.toml").write_text(shipped)
    done = run(["mine.toml", "--dataset", "digits", "--results", "results", "--only", "00"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "mine-digits" / "notebooks" / "00_start_here.ipynb").is_file()


def test_killed_in_the_middle_it_continues_to_the_same_weights_and_tables(whole_series, tmp_path):
    _, suite, _ = whole_series
    # The smoke profile under another name that shows its numbers, or the tables would hold none to compare.
    shipped = (project_root() / "faqd_lib" / "profiles" / "smoke.toml").read_text()
    (tmp_path / "tiny.toml").write_text(shipped.replace("shows_results = false", "shows_results = true"))
    command = [sys.executable, "-m", "faqd_lib.series", "tiny.toml", "--dataset", "digits", "--only", "04", "08"]
    command += ["--results", str(tmp_path / "results")]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(tmp_path / "cache"), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(digests(tmp_path / "results")) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = digests(tmp_path / "results")
    assert kept, "nothing was finished before the kill: the test does not test what it should"
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path / "cache"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    finished = digests(tmp_path / "results")
    assert kept.items() <= finished.items()
    assert finished.items() <= digests(suite.parent).items()
    assert len(finished) > len(kept)
    # The same runs, trained without interruption, in a folder of their own: the same tables, times apart.
    folders = [tmp_path / "results" / "tiny-digits", tmp_path / "whole" / "tiny-digits"]
    for name in finished:
        shutil.copytree(suite / "runs" / name, folders[1] / "runs" / name)
    shutil.copy(folders[0] / "suite.json", folders[1])
    found = []
    for folder in folders:
        there = Suite.read(folder)
        reference = tables.read_paper_reference()
        made = [make(there, reference) for make in (tables.weight_quantization, tables.affinity_losses)]
        found.append([table.frame.drop(columns=["ms a step", "peak MB a step"], errors="ignore") for table in made])
    for interrupted, whole in zip(*found, strict=True):
        pd.testing.assert_frame_equal(interrupted, whole)
    assert sum(map(has_accuracy, found[0][0].astype(str).to_numpy().flat)) >= 6


def has_accuracy(cell: str) -> bool:
    return re.search(r"\d\.\d", cell) is not None


def test_a_misspelled_parameter_stops_the_notebook(tmp_path, monkeypatch):
    for name, value in environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PapermillExecutionError, match=r"unknown parameter 'seed'; did you mean 'seeds'"):
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
    monkeypatch.setattr(series, "notebooks_folder", lambda: notebooks)
    status = series.main(["smoke", "--dataset", "digits", "--results", str(tmp_path / "results")])
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
        (["smokey"], "did you mean smoke?"),
        (["smoke", "--dataset", "cifar11"], "unknown dataset 'cifar11'"),
        (["smoke", "--dataset", "digits", "--seeds", "-1"], "seeds must be a whole number"),
    ],
)
def test_what_cannot_run_is_said_before_anything_runs(tmp_path, capsys, arguments, message):
    assert series.main([*arguments, "--results", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ipynb"))


def test_a_folder_of_another_configuration_is_refused(tmp_path, capsys):
    profile = tmp_path / "mine.toml"
    shipped = (project_root() / "faqd_lib" / "profiles" / "smoke.toml").read_text()
    profile.write_text(shipped)
    results = ["--results", str(tmp_path / "results"), "--dataset", "digits", "--only", "09"]
    assert series.main([str(profile), *results]) == 1  # begins the folder, then misses the runs
    profile.write_text(shipped.replace("batch_size = 64", "batch_size = 32"))
    assert series.main([str(profile), *results]) == 1
    message = capsys.readouterr().err
    assert "begun with another configuration" in message
    assert "batch_size: 64 there, 32 now" in message
    assert "--fresh" in message


def test_fresh_moves_the_old_results_aside(tmp_path, capsys):
    folder = tmp_path / "smoke-digits"
    folder.mkdir()
    (folder / "suite.json").write_text("damaged")
    arguments = ["smoke", "--dataset", "digits", "--results", str(tmp_path), "--only", "09"]
    assert series.main(arguments) == 1
    assert "suite.json is damaged" in capsys.readouterr().err
    series.main([*arguments, "--fresh"])
    aside = list(tmp_path.glob("smoke-digits.old-*"))
    assert len(aside) == 1
    assert (aside[0] / "suite.json").read_text() == "damaged"
    assert "the runs of" in capsys.readouterr().err  # the new folder is good, and has no runs yet


def test_two_series_do_not_share_a_folder(tmp_path, capsys):
    with filelock.FileLock(tmp_path / f".smoke-digits{series.LOCK_NAME}"):
        assert series.main(["smoke", "--dataset", "digits", "--results", str(tmp_path)]) == 1
    assert "another run_all.sh is working" in capsys.readouterr().err


def test_a_results_folder_that_cannot_be_written_is_refused(capsys):
    assert series.main(["smoke", "--dataset", "digits", "--results", "/proc/faqd"]) == 1
    assert "cannot write to /proc/faqd" in capsys.readouterr().err


# ---- hygiene of the notebooks in the repository


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
    for forbidden in ("sys.path", "!pip", "%pip", "sys.exit", "/home/", "/root/"):
        assert forbidden not in text


def test_the_series_is_complete():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number:02}" for number in range(11)]
