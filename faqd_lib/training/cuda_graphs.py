"""CUDA graphs and streams: the kernels of a step launched together, and those of several students side by side.

The kernels of a small network take less time than the host needs to launch each of them. So work that is the same at
every step, and finds its input at the same place, is recorded once and replayed from then on. And they leave most of a
GPU idle: so each student of a cohort has a stream of its own. Either way they are the same kernels on the same numbers,
hence the same bits.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..data.batches import Batch

WARMUP_CALLS = 2  # calls before a recording: by then libraries, momentum and workspaces are what they will be


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A context in which work on CUDA is queued on a stream of its own: the default one cannot be recorded."""
    if device.type != "cuda":
        yield
        return
    around, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(around)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:  # also for who goes on after an interrupt
        around.wait_stream(stream)


class StudentStreams:
    """A stream for each of several workers who read what was made on the stream around them."""

    def __init__(self, device: torch.device, count: int) -> None:
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(count)] if device.type == "cuda" else []

    @contextmanager
    def lane(self, index: int) -> Iterator[None]:
        """A context for one of them: it begins when the work around, so far, is done."""
        if not self._streams:
            yield
            return
        self._streams[index].wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._streams[index]):
            yield

    def join(self) -> None:
        """The work around goes on when that in all lanes, so far, is done."""
        for stream in self._streams:
            torch.cuda.current_stream(self._device).wait_stream(stream)


class Recorder:
    """Makes recordings, for which batches always lie at the same place."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._batch: Batch | None = None

    def placed(self, batch: Batch) -> Batch:
        """The batch, copied to where all batches lie.

        Raises:
            ValueError: it is not of the first one's size.
        """
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

    def record(self, works: Sequence[Callable[[], None]]) -> list[torch.cuda.CUDAGraph]:
        """Graphs of what each of ``works`` launches, to be replayed in this order; nothing is computed yet.

        They share memory of their own: what one of them leaves behind, others of other workers may not overwrite.
        """
        graphs, pool = [], torch.cuda.graph_pool_handle()
        with _nothing_collected():
            for work in works:
                graphs.append(torch.cuda.CUDAGraph())
                with torch.cuda.graph(graphs[-1], pool=pool, stream=torch.cuda.current_stream(self.device)):
                    work()
        return graphs


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """A context in which Python frees no garbage: an old recording among it, freed now, would spoil the new one."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class RecordedStep:
    """Work in pieces that are always run in order, with room between them for what cannot be recorded (a clock).

    Without a recorder every piece is an ordinary call. With one, the first calls are, too; then all pieces are recorded
    one after the other, and replayed ever after. They must take what changes from call to call from the same memory
    (:meth:`Recorder.placed`) and may leave results in attributes: those stay the same tensors, with new numbers.
    """

    def __init__(self, *works: Callable[[], None], recorder: Recorder | None = None) -> None:
        self.works, self.recorder = works, recorder
        self._calls = 0
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._places: list[int] = []

    @property
    def are_recorded(self) -> bool:
        """Whether they are, or the next :meth:`begin` does it."""
        return self.recorder is not None and self._calls >= WARMUP_CALLS

    @property
    def are_replayed(self) -> bool:
        """Whether :meth:`run` replays."""
        return bool(self._graphs)

    @property
    def is_preparing(self) -> bool:
        """Whether the last :meth:`begin` was one of the first, which libraries, compilers and recordings make long."""
        return self._calls <= (WARMUP_CALLS + 1 if self.recorder is not None else 1)

    def begin(self, inputs: Sequence[torch.Tensor | None]) -> None:
        """To be called before the first piece, with everything that the pieces read and others have written.

        Raises:
            ValueError: recorded pieces are given inputs at another place than those that they were recorded with.
        """
        if self.are_recorded:
            places = [0 if tensor is None else tensor.data_ptr() for tensor in inputs]
            if not self._graphs:
                self._graphs = self.recorder.record(self.works)
                self._places = places
            elif places != self._places:
                raise ValueError("what was recorded reads its inputs where they were then: put them there (placed)")
        self._calls += 1

    def release(self) -> None:
        """Free the recordings and their memory; the work is done for good."""
        if self._graphs:
            torch.cuda.synchronize(self.recorder.device)
        self._graphs.clear()
        self.works, self.recorder = (), None

    def run(self, index: int) -> None:
        """One piece, in its turn."""
        if self._graphs:
            self._graphs[index].replay()
        else:
            self.works[index]()
