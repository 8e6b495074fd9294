"""Recordings, as far as no GPU is needed; the rest is in ``test_cuda.py``."""

import contextlib
import gc
import time

import pytest
import torch

from faqd_lib.data.batches import Batch, Batches
from faqd_lib.training.cuda_graphs import RecordedStep, Recorder, StudentStreams, own_stream
from faqd_lib.training.loop import TeacherPass

CPU = torch.device("cpu")


class Pretended:
    """In the place of ``torch.cuda.CUDAGraph``: a replay does what was done while it was recorded."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def recorder(monkeypatch):
    @contextlib.contextmanager
    def graph(made, pool, stream):
        assert (pool, stream) == ("pool", "stream")
        yield

    monkeypatch.setattr("torch.cuda.CUDAGraph", Pretended)
    monkeypatch.setattr("torch.cuda.graph", graph)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: "pool")
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: "stream")
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    return Recorder(CPU)


def test_nothing_is_collected_while_it_is_recorded_and_collecting_goes_on_afterwards(recorder):
    """An old recording that was freed in the middle of a new one made CUDA give the new one up."""
    seen = []
    recorder.record(lambda: seen.append(gc.isenabled()))
    assert seen == [False]
    assert gc.isenabled()

    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        recorder.record(fail)
    assert gc.isenabled()


def test_a_step_is_called_twice_then_recorded_then_replayed(recorder):
    calls, x = [], torch.zeros(3)

    def function(inputs: tuple, labels: None) -> torch.Tensor:
        calls.append((step.replays_next, step.is_preparing))
        return inputs[0] + len(calls)

    step = RecordedStep(function, recorder)
    results = [step((x, [x]), None) for _ in range(5)]
    assert len(calls) == 3  # two calls, and one while it is recorded, which computes nothing
    assert [recording for recording, _ in calls] == [False, False, True]
    assert [float(result[0]) for result in results] == [1.0, 2.0, 3.0, 3.0, 3.0]
    assert results[2] is results[4]
    assert not step.is_preparing
    assert step._graph.replays == 3
    with pytest.raises(ValueError, match="reads its inputs where they were"):
        step((x.clone(), [x]), None)
    step.release()
    assert not step.replays_next


def test_drawing_for_a_replay_counts_as_time_of_the_step(recorder, tiny_suite, monkeypatch):
    """An exact loss draws nothing: leaving the draw out would make the fast one look cheaper than it is."""
    suite = tiny_suite()
    batches = Batches(suite.splits.training.unlabelled(), 16, 0, suite.normalizer)
    learner = suite.learner(suite.student("FFAQD", weight_bits=1, k=2), batches)
    teacher = TeacherPass(suite.build(suite.teacher()), learner.model.feature_names, "float32")
    learner.record_with(recorder)
    monkeypatch.setattr(learner.objective, "predraw", lambda *_: time.sleep(0.2))
    batch = next(batches.epoch(0))
    output = teacher(batch.images)
    for _ in range(3):  # the third one is recorded: first it draws
        learner.advance(0, batch, output)
    learner.clock.step.stop(counts=True)  # from the beginning of the third step
    assert learner.clock.step.read()[-1] >= 0.2


def test_batches_are_placed_in_one_memory_and_must_have_one_size(recorder):
    batches = [Batch(torch.full((4, 3, 2, 2), float(i)), torch.full((4,), i)) for i in range(3)]
    placed = [recorder.placed(batch) for batch in batches]
    assert len({batch.images.data_ptr() for batch in placed}) == 1
    assert placed[0].images.unique().tolist() == [2.0]
    assert placed[0].labels.tolist() == [2] * 4
    with pytest.raises(ValueError, match=r"\(4, 3, 2, 2\), got one of \(1, 3, 2, 2\)"):
        recorder.placed(Batch(torch.zeros(1, 3, 2, 2), torch.zeros(1).long()))


def test_without_a_recorder_every_call_is_an_ordinary_one():
    calls = []
    step = RecordedStep(calls.append)
    for _ in range(4):
        step(torch.zeros(2))
    assert len(calls) == 4
    assert not step.replays_next


def test_on_the_cpu_streams_do_nothing():
    with own_stream(CPU):
        streams = StudentStreams(CPU, 2)
        with streams.of(1):
            total = torch.ones(2).sum()
        streams.join()
    assert total == 2
