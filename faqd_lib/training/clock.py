"""Costs of a run: the time of its own steps, and its share of the time for batches and teacher."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

import torch

from ..data.batches import Batch
from ..utils.measure import Stopwatch


class StepClock:
    """Times of one student's steps, of the loss within them, and its share of batches and teacher."""

    def __init__(self, device: torch.device) -> None:
        self.step, self.loss = Stopwatch(device), Stopwatch(device)
        self.data_seconds = self.teacher_seconds = 0.0
        self._settled = [0, 0]  # number of final entries of each watch

    def unsettled(self) -> float:
        """Sum of the steps since the last :meth:`settle`, in seconds, without steps that do not count."""
        return sum(counted(self.step.read()[self._settled[0] :]))

    def settle(self, share: float) -> None:
        """Scale the unsettled seconds by ``share``: during the rest other students computed."""
        for index, watch in enumerate((self.step, self.loss)):
            settled = self._settled[index]
            watch.seconds[settled:] = [share * seconds for seconds in watch.read()[settled:]]
            self._settled[index] = len(watch.seconds)

    def load(self, step: Sequence[float], loss: Sequence[float], data: float, teacher: float) -> None:
        """Take over the seconds of a checkpoint, all of them settled."""
        self.step.seconds, self.loss.seconds = list(step), list(loss)
        self.data_seconds, self.teacher_seconds = data, teacher
        self._settled = [len(step), len(loss)]

    def cost(self, batch_size: int) -> dict[str, float]:
        """The times among the entries of ``cost`` in a run record. A step that does not count enters as an average one.

        ``loss_seconds`` leaves out steps replayed as CUDA graphs, because no clock runs within a graph.
        """
        all_steps = self.step.read()
        measured = counted(all_steps)
        own, shared = sum(measured), self.data_seconds + self.teacher_seconds
        return {
            "training_seconds": own / max(1, len(measured)) * len(all_steps) + shared,
            "shared_seconds": shared,
            "data_seconds": self.data_seconds,
            "teacher_seconds": self.teacher_seconds,
            "loss_seconds": sum(self.loss.read()),
            "step_milliseconds": 1000 * statistics.median(measured) if measured else 0.0,
            "images_per_second": batch_size * len(measured) / own if measured else 0.0,
        }


class CohortClock:
    """Times of batches and teacher, shared evenly by the students who use them.

    On CUDA students compute at the same time, and each takes longer than alone. The time that all take together is then
    divided among the students in proportion to their own times.
    """

    def __init__(self, device: torch.device) -> None:
        self.data, self.teacher, self.students = Stopwatch(device), Stopwatch(device), Stopwatch(device)
        self._sharers: list[Sequence[StepClock]] = []  # for each batch, the students who used it
        self._overlapping = device.type == "cuda"

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass the batches on, and time the making of each."""
        self.data.start()
        for batch in batches:
            self.data.stop()
            yield batch
            self.data.start()

    def share(self, clocks: Sequence[StepClock]) -> None:
        """Charge the current batch to these students."""
        self._sharers.append(list(clocks))

    def settle(self) -> None:
        """Charge the students for everything since the last call."""
        teacher = counted(self.teacher.read())
        usual = statistics.median(teacher) if teacher else 0.0  # charged for a pass that compiled
        for data, seconds, sharers in zip(self.data.read(), self.teacher.seconds, self._sharers, strict=True):
            for clock in sharers:
                clock.data_seconds += data / len(sharers)
                clock.teacher_seconds += (usual if math.isnan(seconds) else seconds) / len(sharers)
        together = sum(counted(self.students.read()))
        clocks = {id(clock): clock for sharers in self._sharers for clock in sharers}.values()
        if self._overlapping and (apart := sum(clock.unsettled() for clock in clocks)) > 0:
            for clock in clocks:
                clock.settle(min(1.0, together / apart))
        for watch in (self.data, self.teacher, self.students):
            watch.seconds.clear()
        self._sharers.clear()


def counted(seconds: Iterable[float]) -> list[float]:
    """The durations that count; see :meth:`faqd_lib.utils.measure.Stopwatch.stop`."""
    return [each for each in seconds if not math.isnan(each)]
