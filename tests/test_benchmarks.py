"""Each benchmark run once at toy size, and the model behind projected costs."""

import importlib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_images
from PIL import Image

from faqd_lib.reporting import grids
from faqd_lib.runs import planning
from faqd_lib.runs.profile import Profile
from faqd_lib.runs.suite import Suite
from faqd_lib.utils.files import project_root

FOLDER = project_root() / "benchmarks"
NOT_RUN = {
    "cluster": "needs Ray and a cluster of several nodes, and takes minutes",
    "rivals_of_compress": "needs trained weights, their images and tools that are not installed",
    "reporting": "is a module of the others, no benchmark",
}


@pytest.fixture(scope="module")
def benchmark():
    """A function that imports a benchmark by its name. Compiling is off: it would take most of the time."""
    sys.path.insert(0, str(FOLDER))
    with torch._dynamo.config.patch(disable=True):
        yield importlib.import_module
    sys.path.remove(str(FOLDER))


@pytest.fixture
def cost(benchmark):
    return benchmark("cost")


@pytest.fixture
def call(benchmark, monkeypatch, tmp_path):
    """A function that runs a benchmark as its command line does, and returns what it wrote as JSON."""

    def run(name: str, *arguments: str, wrote: str | Path = "") -> dict:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, *([] if wrote else ["--out", str(tmp_path)])])
        assert not benchmark(name).main()
        return json.loads((Path(wrote) if wrote else tmp_path / f"{name}.json").read_text("utf-8"))

    return run


@pytest.fixture
def suite(tmp_path):
    return Suite.open("quick", "digits", results=tmp_path)


def test_the_series_trains_nothing_twice_and_teachers_first(cost, suite):
    waves = list(cost.needed(make(suite) for make in cost.SERIES))
    runs = list(itertools.chain(*waves))
    assert len(runs) == len(set(runs))
    trained = set()
    for wave in waves:
        for config in wave:
            assert {other for other in (config.teacher, config.initial) if other} <= trained
        trained.update(wave)
    wanted = {c for wave in planning.waves(grids.everything(suite)) for c in wave if c.optimization.epochs}
    assert set(runs) == wanted


def test_projected_time_is_that_of_the_schedule(cost, suite):
    students = [suite.student("FAQD", weight_bits=bits) for bits in (1, 2, 4)]
    own = {cost.kind_of(config): 0.2 for config in (*students, suite.teacher())}
    common = {(None, 50): 0.01, ("resnet20", 50): 0.1}
    waves = list(cost.needed([students]))
    assert [len(wave) for wave in waves] == [1, 3]
    teacher = 10 * 20 * (0.01 + 0.2)  # epochs, batches of 50 of 1,000 images
    together, alone = 3 * 20 * (0.1 + 3 * 0.2), 3 * 20 * (0.1 + 0.2)
    for workers, students_seconds in ((1, together), (2, 3 * 20 * (0.1 + 2 * 0.2)), (3, alone), (9, alone)):
        seconds = cost.projected(waves, workers, 8, 1000, own, common)
        assert seconds == pytest.approx(teacher + students_seconds)
    assert cost.projected(waves, 1, 1, 1000, own, common) == pytest.approx(teacher + 3 * alone)


# ---- each benchmark at toy size


def test_every_benchmark_is_run_here_or_the_reason_is_given():
    text = Path(__file__).read_text("utf-8")
    for path in FOLDER.glob("*.py"):
        assert f"def test_{path.stem}_at_toy_size" in text or path.stem in NOT_RUN, path.stem


def check_rows(rows: list[dict], count: int) -> None:
    """So many rows, each with a median of several calls."""
    assert len(rows) == count
    for row in rows:
        assert row["n"] >= 2
        assert row["median_ms"] > 0


def test_affinity_at_toy_size(benchmark, call, monkeypatch, tmp_path):
    module = benchmark("affinity")
    pair = module.pair
    build = module.build_model
    monkeypatch.setattr(module, "build_model", lambda name, *others, **options: build("resnet8", *others, **options))
    monkeypatch.setattr(module, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(module, "HEIGHTS", (8, 128, 224))  # with every loss, without the slow ones, left out at C = 512
    monkeypatch.setattr(module, "pair", lambda b, c, h, device: pair(min(b, 2), min(c, 4), min(h, 4), device))
    found = call("affinity", "--device", "cpu", "--rounds", "2", "--batch", "2")
    check_rows(found["targets"], 3 * 5)
    assert {row["loss"] for row in found["targets"] if row["met"] is not None} == {"exact (auto)"}
    check_rows(found["ffa"], 4)
    check_rows(found["memory"], 1)
    precisions = [row["precision"] for row in found["step"] if row["loss"] == "logits"]
    assert precisions[0] == "float32"
    check_rows(found["step"], 3 * len(precisions))
    check_rows(found["rivals"], 11)
    assert found["rivals"][0] | {"loss": "KD", "time / logits": 1, "extra_MiB": 0} == found["rivals"][0]
    assert {row["time / logits"] for row in found["step"] if row["loss"] == "logits"} == {1}
    assert all(row["ratio low"] <= row["time / logits"] <= row["ratio high"] for row in found["step"])
    sweep = json.loads((tmp_path / "affinity-sweep.json").read_text("utf-8"))["sweep"]
    assert {row["C"] for row in sweep} == {16, 64, 128, 512}
    assert {row["loss"] for row in sweep} == set(module.candidates(*pair(1, 1, 1, "cpu"))) - {"plain FFA, k = 15"}
    assert (tmp_path / "affinity-sweep.png").stat().st_size > 10_000


def test_proposition_at_toy_size(call, tmp_path):
    suite = Suite.open("smoke", "digits", results=tmp_path)
    suite.run([suite.student("FAQD", weight_bits=1), suite.student("KD", weight_bits=1)])
    rows = call("proposition", str(suite.folder), "*-faqd-*", "--images", "2", "--repeats", "40")["rows"]
    assert [(row["network"], row["stage"]) for row in rows] == [("1W32A FAQD", f"layer{stage}") for stage in (1, 2, 3)]
    for row in rows:
        assert row["slope low"] < row["slope"] < row["slope high"]
        assert row["slope"] == pytest.approx(-1, abs=0.4)
        assert row["RMS error k=6"] == pytest.approx(row["formula"], rel=0.5)


def test_proposition_needs_a_student(call, tmp_path, capsys):
    suite = Suite.open("smoke", "digits", results=tmp_path)
    with pytest.raises(SystemExit):
        call("proposition", str(suite.folder), "*-faqd-*")
    assert "has no student whose name matches '*-faqd-*'" in capsys.readouterr().err


def test_logit_geometry_at_toy_size(call, tmp_path):
    cells = {"updates-400": {"arms": ["kd"], "weight_bits": [1]}}
    study = {"looks": [5], "arms": {"kd": {"method": "KD"}}, "cells": cells}
    profile = Profile.parse(Profile.load("smoke").model_dump() | {"teacher_per_seed": True, "study": study}, "toy")
    suite = Suite.open(profile, "digits", results=tmp_path)
    suite.run([suite.study_runs("updates-400", 2)["kd", 1], suite.teacher(student_seed=3)])
    found = call("logit_geometry", str(suite.folder), "--batches", "1")
    assert [(row["student"], row["seed"], row["T"]) for row in found["rows"]] == [
        (student, seed, T)
        for seed, students in ((2, ("random", "rounded", "kd")), (3, ("random", "rounded")))
        for student in students
        for T in (1, 4, 16)
    ]
    for row in found["rows"]:
        assert row["images"] == 32
        assert row["|d|"] >= row["|d centred|"] >= row["spread"] / 2**0.5
        assert row["KL gradient"] <= min(row["T"] * 2**0.5, row["|d centred|"] / 2)
    assert {row["student"]: row["n (seeds)"] for row in found["means"]} == {"random": 2, "rounded": 2, "kd": 1}
    assert (tmp_path / "logit_geometry.png").stat().st_size > 10_000


def test_quantization_at_toy_size(call):
    found = call("quantization", "--device", "cpu", "--rounds", "2", "--batch", "2", "--precisions", "float32")
    networks = {row["network"]: row for row in found["steps"]}
    check_rows(found["steps"], len(networks))
    assert networks.keys() >= {"float", "1W32A", "1W4A", "1W4A, not compiled", "1W4A, coarse"}
    assert networks["float"]["time / float"] == 1
    assert networks["1W4A"]["met"] == (networks["1W4A"]["time / float"] <= 1.25)


def test_training_at_toy_size(benchmark, call, monkeypatch, tmp_path):
    module = benchmark("training")
    build, suite_in = module.build_model, module.suite_in

    def small_suite(*arguments):
        suite = suite_in(*arguments)
        profile = suite.profile.model_copy(update={"student": "resnet8"})
        return replace(suite, state=suite.state.model_copy(update={"profile": profile}))

    monkeypatch.setattr(module, "PLAIN_BATCH", 2)
    monkeypatch.setattr(module, "COHORTS", (1, 2))
    monkeypatch.setattr(module, "LEAST_AGAINST_PLAIN", {1: 9, 2: 18})
    monkeypatch.setattr(module, "suite_in", small_suite)
    monkeypatch.setattr(
        module, "build_model", lambda name, *arguments, **options: build("resnet8", *arguments, **options)
    )
    found = call("training", "--device", "cpu", "--rounds", "2", "--batch", "2", "--teachers", "resnet20")
    check_rows(found["steps"], 5 + 1)
    assert [row["step"] for row in found["steps"]][0::5] == ["float, labels", "data alone"]
    check_rows(found["cohorts"], 2)
    assert [row["students"] for row in found["cohorts"]] == [1, 2]
    assert found["cohorts"][0]["time / separate runs"] == 1
    check_rows(found["plain"], 3)
    assert found["plain"][0]["times the plain images/s"] == 1
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_pictures_at_toy_size(call, tmp_path):
    for index, pixels in enumerate(random_images(5, 3, 8, "train").pixels):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")
    rows = call("pictures", str(tmp_path), "--image-size", "8", "--batch", "2")["rows"]
    assert [(row["what"], row["pictures"]) for row in rows] == [
        ("decode", 5), ("open again", 5), ("an epoch of batches", 4),
    ]  # fmt: skip
    assert all(row["CPU seconds"] > 0 for row in rows)
    assert rows[0]["peak_MiB"] <= rows[-1]["peak_MiB"]


def test_cost_at_toy_size(call, tmp_path):
    parts = ("teacher_schedule", "student_schedule", "fine_tuning_schedule")
    schedules = "".join(f"[{part}]\nepochs = 1\nbatch_size = 2\n" for part in parts)
    profile = tmp_path / "toy.toml"
    profile.write_text(f'shows_results = false\nteachers = ["resnet8"]\nstudent = "resnet8"\n{schedules}')
    arguments = (str(profile), "--images", "640", "--device", "cpu", "--rounds", "2", "--workers", "1", "2")
    found = call("cost", *arguments, "--out", str(tmp_path), wrote=tmp_path / "cost-toy.json")
    lines = {line["table"]: line for line in found["projected"]}
    assert lines.keys() == {"references", "T1", "T2", "T3", "T4", "series"}
    for line in lines.values():
        assert 0 < line["hours, 2 workers"] <= line["hours, 1 worker"] <= lines["series"]["hours, 1 worker"]
    assert all(row["ms"] > 0 for row in found["measured"] if row["what"].startswith("data"))


def test_affinity_weight_at_toy_size(call, tmp_path):
    folder = tmp_path / "smoke-tuning-digits"
    arguments = ("--profile", "smoke", "--dataset", "digits", "--results", str(tmp_path), "--weights", "0", "30")
    found = call("affinity_weight", *arguments, wrote=folder / "affinity_weight.json")
    assert [row["affinity weight"] for row in found["rows"]] == [0, 30]
    assert all(0 <= row["validation accuracy (%)"] <= 100 for row in found["rows"])


def test_export_at_toy_size(call, tmp_path):
    suite = Suite.open("smoke", "digits", results=tmp_path)
    (record,) = suite.run([suite.student("labels", weight_bits=1)])
    wrote = tmp_path / "export-smoke.json"
    arguments = (str(suite.folder), "--batch", "2", "--rounds", "2", "--out", str(tmp_path))
    (row,) = call("export", *arguments, wrote=wrote)["export"]
    assert (row["run"], row["images"], row["packed: same bits"]) == (record.run_id, 100, True)
    assert row["top-1 PyTorch"] == pytest.approx(record.last_accuracy)
    assert 10 * row["packed_bytes"] < row["float32_bytes"]


def test_rivals_of_compress_are_compared_seed_by_seed_at_their_best_rate(benchmark):
    module = benchmark("rivals_of_compress")

    def cells(name, rate, *agreements):
        return [
            {"student": name, "bits": "4W4A", "seed": seed, "rate asked": rate, "CPU minutes": 1.0, "updates": 50,
             "learning rate": rate or 0.005, "bytes of the file": 9, "agreement (%)": value,
             "test accuracy (%)": value - 5, "note": "", "commit": "abc"}
            for seed, value in enumerate(agreements, 1)
        ]  # fmt: skip

    made = cells("rounded", None, 50.0) + cells("compress", None, 80.0, 84.0)
    made += cells("Brevitas", None, 70.0, 71.0) + cells("Brevitas", 0.02, 79.0, 81.0, 99.0)
    rows = {(row["student"], row["learning rates"]): row for row in module.rows_of(made)}
    assert rows["Brevitas", "0.02"]["seeds"] == 3
    assert rows["Brevitas", "0.005"]["agreement (%)"] == "70.50 ± 6.35"  # t(0.975, 1) = 12.706, times 0.5
    beside_rounded, beside_brevitas, of_others = module.differences(made)
    assert beside_rounded["agreement (%)"] == "30.00"
    assert beside_brevitas["seeds"] == 2
    assert beside_brevitas["agreement (%)"] == "2.00 ± 12.71"  # of 1 and 3 points
    assert (of_others["compared"], of_others["agreement (%)"]) == ("Brevitas − rounded", "29.00")


def test_kill_at_toy_size():
    """Two real kills, in a process of its own, since a process has one fork server.

    Without compiled kernels: importing torch's compiler would take most of the time.
    """
    command = [sys.executable, str(FOLDER / "kill.py"), "--kills", "2"]
    settings = {"PYTHONPATH": str(project_root()), "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
    environment = {**os.environ, **settings}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert said.count(": killed after") == 2
    assert "2 kills in" in said
    assert "all the same bits" in said
