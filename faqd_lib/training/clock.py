"""What a run costs: the time of its steps, and its share of the time that its cohort spends for all."""

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
        self._settled = [0, 0]  # how many seconds of each are final

    def unsettled(self) -> float:
        """Seconds of the steps since the last :meth:`settle`; steps that do not count are left out."""
        return sum(counted(self.step.read()[self._settled[0] :]))

    def settle(self, share: float) -> None:
        """Count only a share of these seconds: during the rest other students computed."""
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
        """The entries of a run record's ``cost`` that are times; steps that do not count are taken as average ones.

        ``loss_seconds`` leaves out steps that are replayed as CUDA graphs: no clock runs within a graph.
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

    On CUDA students compute at the same time, and each takes longer than alone. Each is then charged its part, by the
    sum of all, of the time that they take together.
    """

    def __init__(self, device: torch.device) -> None:
        self.data, self.teacher, self.students = Stopwatch(device), Stopwatch(device), Stopwatch(device)
        self._sharers: list[Sequence[StepClock]] = []  # of each batch
        self._overlapping = device.type == "cuda"

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; the time to make each is taken."""
        self.data.start()
        for batch in batches:
            self.data.stop()
            yield batch
            self.data.start()

    def share(self, clocks: Sequence[StepClock]) -> None:
        """Charge the current batch to these students."""
        self._sharers.append(list(clocks))

    def settle(self) -> None:
        """Charge everything since the last call."""
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
