"""Checkpoints: the same bits after any interruption; damaged, foreign and malicious files; locks; full disks."""

import os
import pickle
import subprocess
import sys
import time
import warnings

import pytest
import torch
from conftest import Killed, make_tiny_data, make_tiny_suite, run_until_killed
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from faqd_lib.config import RunConfig
from faqd_lib.runs import local
from faqd_lib.runs.checkpoints import (
    NAMES,
    CheckpointInfo,
    CheckpointWarning,
    due_every,
    read_checkpoint,
    write_checkpoint,
)
from faqd_lib.runs.store import RunStore
from faqd_lib.runs.suite import Suite
from faqd_lib.utils.progress import Progress

FINISHED = {"record.json", "weights.safetensors", "predictions.safetensors"}
FACTS = CheckpointInfo(
    digest="a" * 64, steps=3, checked=1, history=[{"epoch": 1, "loss": 0.1}], peak_bytes=5, data_seconds=0.25,
    teacher_seconds=0.5, environment={"torch": "2", "threads": 1},
)  # fmt: skip
TENSORS = {"model.weight": torch.randn(3, 4), "momentum.0": torch.randn(3, 4), "seconds.step": torch.rand(2).double()}


def equal(found, expected=(TENSORS, FACTS)) -> bool:
    tensors, facts = found
    same = tensors.keys() == expected[0].keys() and all(torch.equal(tensors[n], expected[0][n]) for n in tensors)
    return same and facts == expected[1]


# ---- files


def test_the_last_two_are_kept(tmp_path):
    assert read_checkpoint(tmp_path, FACTS.digest) is None
    for steps in range(1, 4):
        write_checkpoint(tmp_path, TENSORS, FACTS.model_copy(update={"steps": steps}))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    assert equal(read_checkpoint(tmp_path, FACTS.digest), (TENSORS, FACTS))
    (tmp_path / NAMES[0]).unlink()
    assert read_checkpoint(tmp_path, FACTS.digest)[1].steps == 2


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: flipped(content, 3),  # the length of the header
        lambda content: flipped(content, 40),  # the header
        lambda content: flipped(content, -1),  # a tensor
        lambda content: pickle.dumps(TENSORS),
        lambda content: b"\x00" * len(content),
    ],
    ids=["empty", "half", "one byte short", "header length", "header", "tensor", "pickle", "zeros"],
)
def test_damaged_one_is_set_aside_and_the_one_before_it_is_used(tmp_path, damage):
    write_checkpoint(tmp_path, TENSORS, FACTS)
    write_checkpoint(tmp_path, TENSORS, FACTS.model_copy(update={"steps": 4}))
    newest = tmp_path / NAMES[0]
    content = damage(newest.read_bytes())
    newest.write_bytes(content)
    with pytest.warns(CheckpointWarning, match=r"renamed to checkpoint\.damaged-1\.safetensors") as caught:
        assert equal(read_checkpoint(tmp_path, FACTS.digest))
    assert str(newest) in str(caught[0].message)
    assert (tmp_path / "checkpoint.damaged-1.safetensors").read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(read_checkpoint(tmp_path, FACTS.digest))  # it is in nobody's way any more


def test_both_damaged_or_foreign_is_none(tmp_path):
    write_checkpoint(tmp_path, TENSORS, FACTS)
    with pytest.warns(CheckpointWarning, match="another configuration: aaaaaaaaaaaa, not bbbbbbbbbbbb"):
        assert read_checkpoint(tmp_path, "b" * 64) is None
    write_checkpoint(tmp_path, TENSORS, FACTS)
    write_checkpoint(tmp_path, TENSORS, FACTS)
    for name in NAMES:
        (tmp_path / name).write_bytes(b"no")
    with pytest.warns(CheckpointWarning):
        assert read_checkpoint(tmp_path, FACTS.digest) is None


def test_changed_facts_are_noticed(tmp_path):
    write_checkpoint(tmp_path, TENSORS, FACTS)
    text = FACTS.model_copy(update={"steps": 1}).model_dump_json()
    save_file(load_file(tmp_path / NAMES[0]), tmp_path / NAMES[0], {"facts": text, "digest": "c" * 64})
    with pytest.warns(CheckpointWarning, match="do not have the digest"):
        assert read_checkpoint(tmp_path, FACTS.digest) is None


class Evil:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_a_malicious_checkpoint_is_not_executed(tmp_path, write):
    with open(tmp_path / NAMES[0], "wb") as file:
        write(Evil(tmp_path / "executed"), file)
    with pytest.warns(CheckpointWarning):
        assert read_checkpoint(tmp_path, FACTS.digest) is None
    assert not (tmp_path / "executed").exists()


def test_a_file_that_cannot_be_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, TENSORS, FACTS)

    def fail(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("faqd_lib.runs.checkpoints.safe_open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        read_checkpoint(tmp_path, FACTS.digest)
    monkeypatch.undo()
    assert equal(read_checkpoint(tmp_path, FACTS.digest))


@pytest.mark.parametrize("moment", ["saving", "between the renamings"])
def test_killed_while_writing_leaves_a_whole_one(tmp_path, monkeypatch, moment):
    for steps in (1, 2):
        write_checkpoint(tmp_path, TENSORS, FACTS.model_copy(update={"steps": steps}))

    def kill(*_):
        raise Killed

    renamed = os.replace
    if moment == "saving":
        monkeypatch.setattr("faqd_lib.runs.checkpoints.save_file", kill)
    else:
        monkeypatch.setattr("os.replace", lambda a, b: renamed(a, b) if "previous" in str(b) else kill())
    with pytest.raises(Killed):
        write_checkpoint(tmp_path, TENSORS, FACTS)
    monkeypatch.setattr("os.replace", renamed)
    assert read_checkpoint(tmp_path, FACTS.digest)[1].steps == 2


# ---- training


def wanted(suite: Suite) -> list[RunConfig]:
    """Every kind of state: a teacher, steps and blending, projections that are drawn, adapters."""
    quantization = {"blending": 0.1}
    return [
        suite.teacher(),
        suite.student("FAQD", weight_bits=1, activation_bits=4, quantization=quantization),
        suite.student("FFAQD", weight_bits=2, k=3),
    ]


def outcome(suite: Suite) -> list[tuple]:
    return [(suite.store.record(c).weights_digest, suite.store.record(c).history) for c in wanted(suite)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    suite = make_tiny_suite(tmp_path_factory.mktemp("whole"), make_tiny_data(), losses={"adapters": True})
    suite.run(wanted(suite))
    return outcome(suite)


@pytest.fixture
def begun(tiny_suite):
    """A suite with a checkpoint after every step."""
    return tiny_suite("killed", losses={"adapters": True}, checkpoint_seconds=0.0)


def interrupt(monkeypatch, suite: Suite, checkpoints: int) -> None:
    run_until_killed(monkeypatch, suite, wanted(suite), checkpoints)


# The teacher takes 3 steps; then two students side by side take 6, in two epochs of 3: 3 + 12 checkpoints.
@pytest.mark.parametrize("checkpoints", [1, 3, 4, 5, 8, 9, 10, 14, 15])
def test_interrupted_anywhere_it_ends_with_the_same_bits(monkeypatch, expected, begun, checkpoints, capsys):
    interrupt(monkeypatch, begun, checkpoints)
    capsys.readouterr()
    begun.run(wanted(begun))
    assert "goes on from its checkpoint after step" in capsys.readouterr().out
    assert outcome(begun) == expected
    left = [path.name for path in begun.folder.glob("runs/*/*")]
    assert set(left) == FINISHED


def test_what_killed_processes_left_is_removed(monkeypatch, begun):
    interrupt(monkeypatch, begun, 5)
    finished, unfinished = wanted(begun)[:2]
    half = ".checkpoint.safetensors.x.part"
    for config in (finished, unfinished):
        (begun.store.run_folder(config) / half).write_bytes(b"half")
    # Killed between the record and the removal of checkpoints.
    write_checkpoint(begun.store.run_folder(finished), TENSORS, FACTS)
    other = begun.student("labels", weight_bits=1)
    (begun.store.run_folder(other)).mkdir(parents=True)
    (begun.store.run_folder(other) / half).write_bytes(b"somebody else's, in the middle of it")
    begun.run(wanted(begun))
    for config in (finished, unfinished):
        left = [path.name for path in begun.store.run_folder(config).iterdir()]
        assert set(left) == FINISHED
    assert (begun.store.run_folder(other) / half).exists()


def test_interrupted_again_and_again(monkeypatch, expected, begun, capsys):
    for _ in range(5):
        interrupt(monkeypatch, begun, 3)
    begun.run(wanted(begun))
    assert capsys.readouterr().out.count("goes on from its checkpoint") >= 5
    assert outcome(begun) == expected


@pytest.mark.parametrize("lost", ["newest of one", "all of one", "newest of both"])
def test_members_of_a_cohort_may_be_at_different_places(monkeypatch, expected, begun, lost):
    interrupt(monkeypatch, begun, 3 + 10)
    folders = [begun.store.run_folder(config) for config in wanted(begun)[1:]]
    for folder in folders[: 2 if lost == "newest of both" else 1]:
        (folder / NAMES[0]).write_bytes(b"damaged")
        if lost == "all of one":
            (folder / NAMES[1]).unlink()
    with pytest.warns(CheckpointWarning):
        begun.run(wanted(begun))
    assert outcome(begun) == expected


def test_one_that_goes_on_joins_one_that_begins(monkeypatch, expected, begun):
    interrupt(monkeypatch, begun, 3 + 7)
    alone = wanted(begun)[2]
    begun.run([alone])
    begun.run(wanted(begun))
    assert outcome(begun) == expected


def test_progress_and_cost_know_of_what_was_done_before(monkeypatch, begun, capsys):
    interrupt(monkeypatch, begun, 3 + 9)
    capsys.readouterr()
    records = begun.run(wanted(begun))
    lines = [line for line in capsys.readouterr().out.splitlines() if ", epoch " in line]
    assert len(lines) == 1
    assert "epoch 2 of 2" in lines[0]
    assert "about 0:00 left" in lines[0]
    for record in records:
        cost = record.cost
        parts = ("data_seconds", "teacher_seconds", "loss_seconds")
        assert all(cost[name] > 0 for name in parts if name != "teacher_seconds" or record.configuration.teacher)
        assert cost["shared_seconds"] == pytest.approx(cost["data_seconds"] + cost["teacher_seconds"])


def test_the_pace_is_that_of_what_is_trained_now(monkeypatch, begun):
    interrupt(monkeypatch, begun, 3 + 4)  # both students after the second of an epoch's three steps
    told = []
    for name in ("skip", "advance", "within"):
        monkeypatch.setattr(Progress, name, lambda self, *arguments, name=name: told.append((name, *arguments)))
    monkeypatch.setattr(local, "_BETWEEN_REPORTS", 0.0)
    begun.run(wanted(begun)[1:])
    assert [call[1] for call in told if call[0] == "skip"][-2:] == [pytest.approx(2 / 3)] * 2
    assert [call[1] for call in told if call[0] == "advance"] == [pytest.approx(2 / 3), pytest.approx(2)]
    begun_parts = [call[2] for call in told if call[0] == "within"]
    assert begun_parts == pytest.approx([2 / 3, 0, 2 / 3, 4 / 3, 2, 0])


def test_another_environment_is_named(monkeypatch, begun):
    interrupt(monkeypatch, begun, 5)
    monkeypatch.setattr(local, "environment", lambda device: {"torch": "9.9", "threads": 7, "processor": "?"})
    with pytest.warns(CheckpointWarning, match=r"another environment.*now.*other last bits"):
        begun.run(wanted(begun))


def test_checkpoints_are_written_at_intervals_whatever_the_clock_says(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: -1e9)
    due = due_every(10)
    asked = []
    for step in range(35):
        now[0] = 100.0 + step
        asked.append(due())
    assert [step for step, is_due in enumerate(asked) if is_due] == [10, 20, 30]


def test_a_clock_that_is_set_back_changes_nothing(monkeypatch, expected, begun):
    backwards = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(backwards)))
    begun.run(wanted(begun))
    assert outcome(begun) == expected


# ---- other processes


HOLD = """
import filelock, sys
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def holder_of(lock: FileLock) -> subprocess.Popen:
    """Another process, which holds the lock until its input is closed."""
    command = [sys.executable, "-c", HOLD, lock.lock_file]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    return process


def test_a_run_that_another_process_trains_is_waited_for(tiny_suite, capsys, monkeypatch):
    suite = tiny_suite()
    config, other = (suite.student("labels", weight_bits=bits) for bits in (1, 2))
    holder, say = holder_of(suite.store.lock(config)), Progress.say

    def say_and_release(self, text: str) -> None:
        say(self, text)
        if "waiting for it" in text:
            holder.stdin.close()

    monkeypatch.setattr(Progress, "say", say_and_release)
    records = suite.run([config, other])
    assert holder.wait() == 0
    out = capsys.readouterr().out
    assert f"another process trains {config.run_id}: waiting for it" in out
    assert out.index("2W32A") < out.index("waiting") < out.index("1W32A")  # there was something to do meanwhile
    assert [record.configuration for record in records] == [config, other]


def test_what_was_finished_elsewhere_meanwhile_is_not_trained_again(tiny_suite, monkeypatch):
    suite, other = tiny_suite(), tiny_suite()
    config = suite.student("labels", weight_bits=1)
    lock_available, trained = RunStore.lock_available, []

    def late(store, configs):
        if store is suite.store:  # it looked for the record before; now somebody else finishes
            trained.extend(other.run(configs))
            monkeypatch.setattr(local, "_train_cohort", lambda *_: pytest.fail("trained twice"))
        return lock_available(store, configs)

    monkeypatch.setattr(RunStore, "lock_available", late)
    assert suite.run([config]) == trained


def test_a_dead_process_holds_no_lock(tiny_suite):
    suite = tiny_suite()
    config = suite.student("labels", weight_bits=1)
    holder = holder_of(suite.store.lock(config))
    with suite.store.lock_available([config]) as ours:
        assert ours == []
    holder.kill()
    holder.wait()
    with suite.store.lock_available([config]) as ours:
        assert ours == [config]


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path):
    """No file may grow beyond 1 MiB, and the checkpoint takes four."""
    resource = pytest.importorskip("resource", reason="file-size limits are of Unix")
    write_checkpoint(tmp_path, TENSORS, FACTS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match="If the disk is full, make room and call again") as caught:
            write_checkpoint(tmp_path, {"x": torch.zeros(2**20)}, FACTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path / NAMES[0]) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[0]]
    assert equal(read_checkpoint(tmp_path, FACTS.digest))


def test_a_disk_that_fills_up_in_training_costs_nothing_that_was_written(monkeypatch, expected, begun):
    save, left = save_file, [10]

    def full(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(*arguments)

    monkeypatch.setattr("faqd_lib.runs.checkpoints.save_file", full)
    with pytest.raises(OSError, match="make room and call again"):
        begun.run(wanted(begun))
    kept = begun.store.record(wanted(begun)[0])
    monkeypatch.setattr("faqd_lib.runs.checkpoints.save_file", save)
    begun.run(wanted(begun))
    assert outcome(begun) == expected
    assert begun.store.record(wanted(begun)[0]) == kept
