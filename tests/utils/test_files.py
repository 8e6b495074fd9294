"""Atomic writes, digests, folders, progress and measurements."""

import json
import math
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from faqd_lib.utils import files, measure, progress
from faqd_lib.utils.files import (
    atomic_write,
    atomic_write_text,
    cache_dir,
    canonical_json,
    require_writable,
    tensors_digest,
    text_digest,
)


def test_atomic_write_makes_and_replaces(tmp_path):
    path = tmp_path / "deep" / "er" / "file.txt"
    assert atomic_write_text(path, "first ä") == path
    atomic_write_text(path, "second")
    assert path.read_text("utf-8") == "second"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_failing_writer_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "file.txt"
    atomic_write_text(path, "old")

    def fail(temporary):
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        atomic_write(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    with pytest.raises(RuntimeError, match="no"):
        atomic_write(tmp_path / "new.txt", lambda t: (_ for _ in ()).throw(RuntimeError("no")))
    assert not (tmp_path / "new.txt").exists()


def test_others_may_read_what_was_written(tmp_path):
    before = os.umask(0o022)
    try:
        mode = stat.S_IMODE(atomic_write_text(tmp_path / "file", "x").stat().st_mode)
    finally:
        os.umask(before)
    assert mode == 0o644


@pytest.mark.parametrize("below", ["a regular file", "/proc"])
def test_unwritable_folders_are_named(tmp_path, below):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "x" if below != "/proc" else files.Path("/proc/faqd/x")
    with pytest.raises(PermissionError, match="cannot write") as raised:
        require_writable(folder)
    for name in (str(folder), "--results", "FAQD_CACHE"):
        assert name in str(raised.value)


def test_require_writable_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    assert require_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_canonical_json():
    assert canonical_json({"b": [1, 2.5], "a": {"d": None, "c": True}}) == '{"a":{"c":true,"d":null},"b":[1,2.5]}'
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})
    assert json.loads(canonical_json({"x": 0.1 + 0.2}))["x"] == 0.1 + 0.2
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON compliant"):
            canonical_json({"a": bad})


def test_text_digest_is_sha256():
    assert text_digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_tensors_digest_sees_names_types_shapes_and_bytes():
    base = {"a": torch.arange(6.0), "b": torch.tensor(1)}
    variants = [
        base,
        {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1)},
        {"a": torch.arange(6.0).double(), "b": torch.tensor(1)},
        {"a": -torch.arange(6.0), "b": torch.tensor(1)},
        {"c": torch.arange(6.0), "b": torch.tensor(1)},
        {"a": torch.arange(6.0)},
        {**base, "e": torch.zeros(0)},
    ]
    digests = [tensors_digest(v) for v in variants] + [tensors_digest(base, salt="x")]
    assert len(set(digests)) == len(digests)
    assert tensors_digest(dict(reversed(base.items()))) == digests[0]
    # The memory layout is not part of the content.
    square = torch.arange(16.0).view(1, 4, 2, 2)
    assert tensors_digest({"a": square}) == tensors_digest({"a": square.to(memory_format=torch.channels_last)})
    assert tensors_digest({"a": torch.ones(3).bfloat16()}) != tensors_digest({"a": torch.ones(3).half()})


def test_cache_dir(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("FAQD_CACHE")
    assert cache_dir() == files.project_root() / "data" / "cache"
    assert (files.project_root() / "faqd_lib").is_dir()


# ---- progress


def test_progress_as_text(capsys):
    with progress.Progress(4, "students", runs=4) as line:
        assert line.number(1) == "run 1 of 4"
        label = line.number(3)
        line.advance(1, label)
        line.say("something else")
    out = capsys.readouterr().out
    assert "students: run 2-4 of 4" in out
    assert "something else" in out
    assert "left" in out


def test_progress_within_an_epoch_is_estimated_and_shown_seldom(capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.Progress(10, "students") as line:
        now = 110.0
        line.within("run 1", 0.25, "batch 25 of 100")  # too soon for a line
        assert capsys.readouterr().out == ""
        now = 130.0
        line.within("run 1", 0.5, "batch 50 of 100")
        assert "batch 50 of 100; 0:30 gone, about 9:30 left" in capsys.readouterr().out
        now = 140.0
        line.within("run 2", 0.5, "batch 51 of 100")
        assert capsys.readouterr().out == ""
        now = 160.0
        line.within("run 1", 0.0)
        line.advance(1, "epoch 1")
        assert "epoch 1; 1:00 gone, about 5:40 left" in capsys.readouterr().out  # 1.5 of 10 units in a minute
        now = 800.0
        line.within("run 1", 0.5, "batch 50 of 100")
        assert "batch 50" in capsys.readouterr().out


def test_progress_style(monkeypatch, capsys):
    """A bar is drawn where it is asked for, or where somebody watches."""
    for bar, nobody_watches, is_bar in (
        (None, True, False),
        (None, False, True),
        (True, True, True),
        (False, False, False),
    ):
        monkeypatch.setattr(progress, "headless", lambda answer=nobody_watches: answer)
        with progress.Progress(2, "students", bar=bar) as line:
            line.advance(1, "first")
        captured = capsys.readouterr()
        assert ("students" in captured.err, "students" in captured.out) == (is_bar, not is_bar)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3725, "1:02:05")])
def test_clock(seconds, text):
    assert progress.clock(seconds) == text


# ---- measurements


def test_peak_memory_is_what_was_held_at_one_time():
    megabyte = 1 << 20

    def two_then_one():
        first, second = (torch.empty(megabyte, dtype=torch.uint8) for _ in range(2))
        del first, second
        torch.empty(megabyte, dtype=torch.uint8)

    assert measure.peak_bytes(two_then_one) == pytest.approx(2 * megabyte, rel=0.01)
    assert measure.peak_bytes(lambda: None) == 0


class Clock:
    """A clock that only a test moves, in place of ``time.perf_counter``."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def fake_clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def test_a_stopwatch_times_what_lies_between_start_and_stop(fake_clock):
    watch = measure.Stopwatch("cpu")
    for seconds, counts in ((2.0, True), (5.0, False), (0.5, True)):
        fake_clock.wait(1.0)
        watch.start()
        fake_clock.wait(seconds)
        watch.stop(counts)
    assert watch.read() == pytest.approx([2.0, math.nan, 0.5], nan_ok=True)
    assert len(watch.read()) == 3  # read again, the durations are there once


def test_candidates_take_turns_after_a_warm_up_call_that_does_not_count(fake_clock):
    order, durations = [], iter([60.0, 60.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])

    def call(name: str) -> None:
        order.append(name)
        fake_clock.wait(next(durations))

    times = measure.take_turns({name: lambda name=name: call(name) for name in "ab"}, 3)
    assert order == list("ab" + "ababab")
    assert times == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0, 6.0]}


def test_copy_bandwidth_is_the_bytes_read_and_written_by_the_fastest_copy(fake_clock, monkeypatch):
    copy, durations = torch.Tensor.copy_, iter([9.0, 4.0, 2.0, 0.5, 3.0, 1.0, 2.0, 2.0])

    def slow_copy(target, source):
        assert source.numel() * source.element_size() == 2 * 2**20
        fake_clock.wait(next(durations))
        return copy(target, source)

    monkeypatch.setattr(torch.Tensor, "copy_", slow_copy)
    assert measure.copy_bandwidth(megabytes=2) == pytest.approx(2 * 2 * 2**20 / 0.5)


def test_environment_names_machine_and_software():
    found = measure.environment()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["device"] == "cpu"
    assert all(isinstance(value, str | int) for value in found.values())


def test_commit_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "project_root", lambda: tmp_path)
    assert measure.commit() == "unknown"


def test_files_have_the_permissions_that_the_user_gives_new_files(tmp_path):
    """safetensors alone makes files that only their owner can read."""
    (tmp_path / "plain").touch()
    written = atomic_write(tmp_path / "x.safetensors", lambda path: save_file({"x": torch.zeros(1)}, path))
    assert written.stat().st_mode == (tmp_path / "plain").stat().st_mode
