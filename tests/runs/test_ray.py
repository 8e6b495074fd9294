"""Engines: Ray's workers give the same bits, their death costs only what they had begun, and errors come back."""

import os
import pickle
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from faqd_lib.config import RunConfig
from faqd_lib.runs.local import Engine, train_here
from faqd_lib.runs.ray import EngineError, RayEngine, _follow
from faqd_lib.runs.store import RunStore
from faqd_lib.runs.suite import Suite
from faqd_lib.training.loss_log import NonFiniteLossError
from faqd_lib.utils.progress import Progress

PROFILE = """
shows_results = false
dataset = "digits"
teachers = ["resnet8"]
student = "resnet8"
train_images = 96
test_images = 50
cohort = 8
checkpoint_seconds = 0.0
[teacher_schedule]
epochs = 1
batch_size = 32
[student_schedule]
epochs = {epochs}
batch_size = 32
[fine_tuning_schedule]
epochs = 1
batch_size = 32
"""


@pytest.fixture
def open_suite(tmp_path):
    def opened(results: str, epochs: int = 2, engine: Engine = train_here) -> Suite:
        (tmp_path / "mine.toml").write_text(PROFILE.format(epochs=epochs))
        return Suite.open(tmp_path / "mine.toml", results=tmp_path / results, engine=engine)

    return opened


def grid(suite: Suite) -> list[RunConfig]:
    return [
        suite.student("FAQD", weight_bits=1),
        suite.student("FFAQD", weight_bits=2, activation_bits=4),
        suite.student("labels", weight_bits=4),
        suite.student("KD", weight_bits=1, seed=2),
    ]


def outcome(records) -> list[tuple]:
    return [(record.run_id, record.weights_digest, record.history) for record in records]


# ---- without Ray


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"cpus": 0}, "at least one thread, got 0"), ({"gpus": 1.5}, "got 1.5"), ({"gpus": -1.0}, "got -1")],
)
def test_a_bad_setting_is_named(settings, message):
    with pytest.raises(EngineError, match=message):
        RayEngine(**settings)


def test_a_suite_travels_without_its_images(open_suite):
    suite = open_suite("local")
    assert len(suite.splits.training) == 96
    assert suite.folder.is_absolute()
    sent = pickle.dumps(suite)
    assert len(sent) < 10_000
    there = pickle.loads(sent)  # noqa: S301 (our own bytes)
    assert there == suite
    assert there.images is None
    assert torch.equal(there.splits.training.pixels, suite.splits.training.pixels)  # loaded again


class Stubborn:
    """What ``_follow`` uses of Ray, where a worker is begun again and again until it is cancelled."""

    def __init__(self):
        self.exceptions, self.cancelled, self.rounds = SimpleNamespace(RayError=RuntimeError), [], 0

    def wait(self, pending, timeout):
        self.rounds += 1
        assert self.rounds < 100, "it goes on for ever"
        return (pending, []) if self.cancelled else ([], pending)

    def get(self, task):
        raise self.exceptions.RayError("cancelled")

    def cancel(self, task, force):
        self.cancelled.append((task, force))

    def size(self):
        return 1

    def get_nowait_batch(self, count):
        return [("run 1 of 1", "begin")]


def test_a_worker_that_ray_would_begin_for_ever_is_given_up():
    """What it stops for want of memory Ray tries again without counting."""
    ray, cohort = Stubborn(), ["a run"]
    failures = _follow(ray, {"run 1 of 1": ("task", cohort)}, ray, Progress(1, "grid"))
    assert [(found, str(error)) for found, error in failures] == [(cohort, "cancelled")]
    assert ray.cancelled[0] == ("task", True)
    assert ray.rounds == 4 + 1 + 1  # begun, and three times more; given up at the fifth; seen in the end


# ---- with Ray


@pytest.fixture(scope="module")
def two_workers():
    """Ray on this machine with room for two workers."""
    ray = pytest.importorskip("ray", reason="the engine ray is not installed: pip install 'faqd[ray]'")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def on_ray(two_workers) -> RayEngine:
    return RayEngine(gpus=0.25 if torch.cuda.is_available() else 0.0)


@pytest.fixture
def expected(open_suite):
    """What one process with one thread makes of the grid."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda suite: outcome(suite.run(grid(suite)))
    torch.set_num_threads(threads)


def workers() -> list[int]:
    """Processes that train something for Ray."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::_train_there"):
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def wait_for(condition, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.01)
    return result


def test_same_bits_as_one_process(open_suite, expected, on_ray, capsys):
    here = expected(open_suite("here"))
    capsys.readouterr()
    suite = open_suite("there", engine=on_ray)
    assert outcome(suite.run(grid(suite), "grid")) == here
    out = capsys.readouterr().out
    assert "grid: run 1 of 5 (32W32A labels), epoch 1 of 1: test" in out
    assert out.count("epoch 2 of 2") == 4 - 1  # of four students in three cohorts
    records = suite.store.records()
    assert {record.environment["threads"] for record in records} == {1}
    assert not list(suite.folder.glob("runs/*/checkpoint*"))


def test_a_killed_worker_costs_only_what_it_had_begun(open_suite, expected, on_ray, capsys):
    here = expected(open_suite("here", epochs=4))
    suite = open_suite("there", epochs=4, engine=on_ray)
    suite.run([suite.teacher()])
    capsys.readouterr()
    result = []
    run = threading.Thread(target=lambda: result.extend(suite.run(grid(suite), "grid")))
    run.start()
    wait_for(lambda: list(suite.folder.glob("runs/*1w32a-faqd*/checkpoint*")))
    victims = wait_for(workers)
    os.kill(victims[0], signal.SIGKILL)
    run.join()
    assert outcome(result) == here


def test_a_worker_that_dies_again_and_again_is_an_error(open_suite, on_ray):
    suite = open_suite("there", epochs=50, engine=on_ray)
    suite.run([suite.teacher()])
    before = outcome(suite.store.records())
    stop = threading.Event()

    def kill() -> None:
        while not stop.is_set():
            for worker in workers():
                os.kill(worker, signal.SIGKILL)
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(EngineError, match=r"resnet8-1w32a-kd.* died, and so did 3 after it.*call again to go on"):
            suite.run([suite.student("KD", weight_bits=1)])
    finally:
        stop.set()
        killer.join()
    assert outcome(suite.store.records()) == before


def test_what_a_worker_raises_comes_back_and_the_others_finish(open_suite, on_ray):
    suite = open_suite("there", engine=on_ray)
    good = suite.student("KD", weight_bits=1)
    with pytest.raises(NonFiniteLossError, match="epoch 1"):
        suite.run([suite.student("FAQD", weight_bits=1, affinity_weight=1e38), good])
    assert suite.store.record(good) is not None


def test_warnings_of_a_worker_are_shown(open_suite, on_ray, capsys):
    suite = open_suite("there", engine=on_ray)
    folder = suite.store.run_folder(suite.teacher())
    folder.mkdir(parents=True)
    (folder / "checkpoint.safetensors").write_bytes(b"no checkpoint")
    suite.run([suite.teacher()])
    assert "CheckpointWarning" in capsys.readouterr().out


def test_a_folder_that_workers_do_not_see(open_suite, on_ray, tmp_path):
    suite = replace(open_suite("there", engine=on_ray), store=RunStore(tmp_path / "elsewhere"))
    with pytest.raises(EngineError, match=r"does not see .*elsewhere"):
        suite.run([suite.teacher()])


def test_no_room(open_suite, on_ray):
    suite = open_suite("there", engine=replace(on_ray, cpus=64))
    with pytest.raises(EngineError, match="no room for a worker with 64"):
        suite.run([suite.teacher()])


def test_workers_must_compute_where_this_process_does(open_suite, on_ray):
    suite = open_suite("there", engine=replace(on_ray, gpus=0.0 if on_ray.gpus else 1.0))
    with pytest.raises(EngineError, match="this process computes on"):
        suite.run([suite.teacher()])
