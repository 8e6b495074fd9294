"""The real thing: notebooks through papermill at smoke scale, from another folder than the project's."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import psutil
import pytest
from series_runs import NOTEBOOKS, digests, environment, has_accuracy, own_profile, run

from faqd_lib.reporting import tables
from faqd_lib.runs.suite import Suite

pytestmark = pytest.mark.series


@pytest.fixture(scope="module")
def whole_series(tmp_path_factory):
    """Every notebook once, on the images that need no file."""
    folder = tmp_path_factory.mktemp("series with a space")
    results = folder / "results"
    done = run(["smoke", "--all", "--dataset", "digits", "--results", str(results)], cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, results / "smoke-digits", done


def leads_a_session(process: int) -> bool:
    """Among the processes of a series, only its kernels do."""
    try:
        return os.getsid(process) == process
    except ProcessLookupError:  # it has ended
        return False


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
    assert names >= {"T1", "T2", "T3", "T4", "T5", "claims", "signs"}
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


def test_interrupted_and_killed_it_continues_to_the_same_weights_and_tables(whole_series, tmp_path):
    """An interrupted kernel is reported, a killed series is not; each time the next call goes on."""
    _, suite, _ = whole_series
    # The smoke profile under another name that shows its numbers, or the tables would hold none to compare.
    own_profile(tmp_path / "tiny.toml", {"shows_results = false": "shows_results = true"})
    results = tmp_path / "results"
    command = [sys.executable, "-m", "faqd_lib.cli.run_all", "tiny.toml", "--dataset", "digits", "--only", "04", "08"]
    command += ["--results", str(results)]
    settings = {"cwd": tmp_path, "env": environment(tmp_path / "cache"), "text": True}

    def kernels(process: subprocess.Popen) -> list[psutil.Process]:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if leads_a_session(child.pid)]

    def begun(runs: int) -> subprocess.Popen:
        """The series, once ``runs`` are finished and a kernel is there."""
        with (tmp_path / "errors").open("w") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True, **settings
            )
        deadline = time.monotonic() + 900
        while process.poll() is None and time.monotonic() < deadline:
            if kernels(process) and len(digests(results)) >= runs:
                return process
            time.sleep(0.05)
        process.kill()
        raise AssertionError((tmp_path / "errors").read_text())

    process = begun(1)
    deadline = time.monotonic() + 900
    while process.poll() is None and time.monotonic() < deadline:  # a kernel between two cells ignores a signal
        with contextlib.suppress(psutil.NoSuchProcess):
            for kernel in kernels(process):
                kernel.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3)
    assert process.wait(timeout=60) == 1
    errors = (tmp_path / "errors").read_text()
    assert re.search(r"0[48]_\w+\.ipynb, cell", errors)
    assert "KeyboardInterrupt" in errors
    first = digests(results)

    process = begun(2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=900)
    kept = digests(results)
    assert len(kept) > 1
    assert first.items() <= kept.items()

    done = subprocess.run(command, capture_output=True, check=False, **settings)
    assert done.returncode == 0, done.stderr
    finished = digests(results)
    assert len(finished) > len(kept)
    assert kept.items() <= finished.items() <= digests(suite.parent).items()
    # The same runs, trained without interruption, in a folder of their own: the same tables, times apart.
    folders = [results / "tiny-digits", tmp_path / "whole" / "tiny-digits"]
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


def test_what_is_drawn_where_numbers_count(whole_series, tmp_path):
    """The cells that smoke leaves out: notebooks that show accuracies, with two teachers and two seeds."""
    _, suite, _ = whole_series
    changes = {
        "shows_results = false": "shows_results = true\nseeds = 2",
        'teachers = ["resnet8"]': 'teachers = ["resnet8", "resnet20"]',
        "weight_bits = [1, 4]": 'weight_teachers = ["resnet8"]\nweight_bits = [1]\nweight_regimes = ["end-to-end"]',
    }
    own_profile(tmp_path / "shown.toml", changes)
    there = tmp_path / "results" / "shown-digits"
    shutil.copytree(suite / "runs", there / "runs")
    done = run(["shown.toml", "--dataset", "digits", "--only", "05", "09", "--results", "results"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    drawn = {path.stem for path in (there / "figures").glob("*.png")}
    assert drawn == {
        "05_accuracy_by_bits", "05_confusion", "05_curves_fewest_bits", "09_accuracy_and_size", "09_failure_signs",
        "claims",
    }  # fmt: skip
    assert "seeds 1, 2 (n = 2), trained" in (there / "report" / "index.html").read_text()
