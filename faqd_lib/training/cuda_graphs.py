"""CUDA graphs and streams: the kernels of a step launched together, and several students side by side.

A kernel of a small network runs in less time than the host needs to launch it. A step is therefore recorded once and
replayed from then on. Such kernels also leave most of a GPU idle. Each student of a cohort therefore has its own
stream. The kernels are the same in any case, and so are the bits of the results.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..data.batches import Batch

WARMUP_CALLS = 2  # ordinary calls before the recording, in which libraries, momentum and workspaces are set up


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Queue the work of a context on a stream other than the default one, which cannot be recorded."""
    streams = StudentStreams(device, 1)
    try:
        with streams.of(0):
            yield
    finally:  # also after an interrupt
        streams.join()


class StudentStreams:
    """One stream a student, for work that reads what the surrounding stream made."""

    def __init__(self, device: torch.device, count: int) -> None:
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(count)] if device.type == "cuda" else []

    @contextmanager
    def of(self, index: int) -> Iterator[None]:
        """Queue the work of a context on one student's stream, after all work queued so far on the surrounding one."""
        if not self._streams:
            yield
            return
        self._streams[index].wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._streams[index]):
            yield

    def join(self) -> None:
        """Let the surrounding stream wait for the students' work so far."""
        for stream in self._streams:
            torch.cuda.current_stream(self._device).wait_stream(stream)


class Recorder:
    """Records functions as CUDA graphs, and copies every batch to the one place that the graphs read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._batch: Batch | None = None

    def placed(self, batch: Batch) -> Batch:
        """The batch, copied to the place that the graphs read; ValueError if its size is not that of the first."""
        if self._batch is None:
            labels = None if batch.labels is None else torch.empty_like(batch.labels)
            self._batch = Batch(torch.empty_like(batch.images), labels)
        if batch.images.shape != self._batch.images.shape:
            found, first = tuple(batch.images.shape), tuple(self._batch.images.shape)
            raise ValueError(f"all batches must have the size of the first, {first}, got one of {found}")
        self._batch.images.copy_(batch.images)
        if batch.labels is not None:
            self._batch.labels.copy_(batch.labels)
        return self._batch

    def record(self, function: Callable[..., Any], *inputs: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
        """The graph of what ``function(*inputs)`` launches, and its result; nothing is computed before a replay."""
        graph, collects_garbage = torch.cuda.CUDAGraph(), gc.isenabled()
        stream = torch.cuda.current_stream(self.device)
        gc.collect()
        gc.disable()  # an old recording freed meanwhile would spoil the new one
        try:
            with torch.cuda.graph(graph, pool=torch.cuda.graph_pool_handle(), stream=stream):
                return graph, function(*inputs)
        finally:
            if collects_garbage:
                gc.enable()


class RecordedStep:
    """A function of tensors that is recorded after some calls and replayed from then on.

    ``function`` takes tensors, None, batches, and tuples or lists of these. Without a recorder every call is an
    ordinary one. A replay returns the same tensors each time, with new numbers.
    """

    def __init__(self, function: Callable[..., Any], recorder: Recorder | None = None) -> None:
        self._function, self.recorder = function, recorder
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Any) -> Any:
        """Call the function, or replay it; ValueError if inputs lie elsewhere in memory than those of the recording."""
        if not self.replays_next:
            result = self._function(*inputs)
        else:
            places = [tensor.data_ptr() for tensor in _tensors(inputs)]
            if self._graph is None:
                self._places = places
                self._graph, self._result = self.recorder.record(self._function, *inputs)
            elif places != self._places:
                raise ValueError("a recorded step reads its inputs where they were: copy them there (Recorder.placed)")
            self._graph.replay()
            result = self._result
        self._calls += 1
        return result

    @property
    def replays_next(self) -> bool:
        """Whether the next call is a replay, the first of them after recording."""
        return self.recorder is not None and self._calls >= WARMUP_CALLS

    @property
    def is_preparing(self) -> bool:
        """Whether the last call was one of the first, which take long because of compilation and recording."""
        return self._calls <= (WARMUP_CALLS + 1 if self.recorder is not None else 1)

    def release(self) -> None:
        """Free the recording and its memory. No call is possible afterwards."""
        if self._graph is not None:
            torch.cuda.synchronize(self.recorder.device)
        self._graph = self._result = self._function = self.recorder = None


def _tensors(inputs: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors within nested inputs, in order."""
    for value in inputs:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Batch):
            yield from _tensors((value.images, value.labels))
        elif value is not None:
            yield from _tensors(value)
