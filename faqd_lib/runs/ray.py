"""The engine ``ray``: runs trained by Ray (docs.ray.io), in worker processes on one machine or many.

A run's bits depend on its configuration, the machine and the number of threads, not on the engine.
"""

import os
import socket
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch

from ..config import RunConfig
from ..utils.messages import first_line
from ..utils.progress import ProgressReporter
from . import planning
from .local import train_here
from .store import RunStore
from .workshop import Workshop

_RETRIES = 3  # of a cohort whose worker died; it continues from its checkpoints
_POLL = 0.5  # seconds between two reads of the workers' reports
_STORE_BYTES = 100 * 2**20  # Ray's object store: holds configurations and lines of text only
_DATA_FOLDERS = ("FAQD_DATA", "FAQD_CACHE")  # environment variables that tell a worker where images are
_SHARED = "with Ray on several machines that folder must be on a file system that all of them share (--results)"


class EngineError(RuntimeError):
    """An engine cannot be used, or a worker died too often; the message says what to do."""


@dataclass(frozen=True)
class RayEngine:
    """Trains every cohort as a Ray task: one worker process a cohort, and one results folder for all.

    All machines must see the results folder under the same path, and have this project installed. Not tested on more
    than one physical machine.

    Args:
        address: of a running cluster (``"auto"``, ``"host:6379"``); None starts Ray here until the process ends.
        cpus: threads of a worker, at least 1.
        gpus: GPUs of a worker: a part (0.25 puts four cohorts on each) or several whole ones.

    Raises:
        EngineError: a number is out of range.
    """

    address: str | None = None
    cpus: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.cpus < 1:
            raise EngineError(f"a worker needs at least one thread, got {self.cpus}")
        if not (0 <= self.gpus <= 1 or self.gpus == int(self.gpus) > 1):
            raise EngineError(f"a worker has a part of a GPU (0 to 1) or several whole ones, got {self.gpus:g}")

    def connect(self) -> Any:
        """Ray's module, connected once a process; EngineError if it is not installed or no cluster answers."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to Ray's makers without consent
        try:
            import ray
        except ModuleNotFoundError as error:
            raise EngineError("the engine ray needs Ray: pip install 'faqd[ray]' in this environment") from error
        if ray.is_initialized():
            return ray
        own = {} if self.address else {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
        try:
            ray.init(self.address or "local", log_to_driver=False, logging_level="error", **own)
        except ConnectionError as error:
            raise EngineError(
                f"no Ray cluster answers at {self.address}: start one (ray start --head), or leave --address out"
            ) from error
        return ray

    def __call__(
        self, workshop: Workshop, wave: Sequence[RunConfig], progress: ProgressReporter, deadline: float | None = None
    ) -> None:
        """Train runs that do not need each other; ``deadline`` as in :func:`~faqd_lib.runs.local.train_here`.

        Raises:
            EngineError: there is no room for a worker, a worker cannot work, or one died too often.
            Exception: the first error that a worker raised. Its notes name other cohorts that failed; all others are
                finished and saved.
        """
        if (workshop.device.type == "cuda") != (self.gpus > 0):
            raise EngineError(
                f"this process computes on {workshop.device}, and workers with {self.gpus:g} GPUs would not: "
                "set FAQD_RAY_GPUS (--gpus-per-run), or run this on a machine with a GPU"
            )
        ray = self.connect()
        from ray.util.queue import Queue

        largest = planning.cohort_size(len(wave), self._workers(ray.nodes()), workshop.state.profile.cohort)
        work = ray.remote(_train_there).options(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=_RETRIES)
        folders = {
            name: str(Path(os.environ[name]).expanduser().resolve()) for name in _DATA_FOLDERS if os.environ.get(name)
        }
        queue = Queue(actor_options={"num_cpus": 0})
        tasks = {}
        try:
            for cohort in planning.cohorts(wave, largest):
                label = progress.number(len(cohort))
                # A worker may start late, and its monotonic clock is another one.
                ends = None if deadline is None else time.time() + deadline - time.monotonic()
                task = work.remote(workshop, cohort, QueueProgress(queue, label), self.cpus, folders, ends)
                tasks[label] = task, cohort
            failures = _follow(ray, tasks, queue, progress)
        finally:
            for task, _ in tasks.values():
                ray.cancel(task, force=True)  # without effect on finished tasks
            queue.shutdown(force=True)
        if failures:
            raise _joined(failures) from failures[0][1]
        _wait_for_records(workshop.store, wave)

    def _workers(self, nodes: list[dict[str, Any]]) -> int:
        """How many workers fit on all machines together; at least 1."""
        resources = [node["Resources"] for node in nodes if node["Alive"]]
        machines = [(machine.get("CPU", 0), machine.get("GPU", 0)) for machine in resources]
        slots = sum(self._slots(cpus, gpus) for cpus, gpus in machines)
        if slots < 1:
            there = ", ".join(f"{cpus:g} CPUs and {gpus:g} GPUs" for cpus, gpus in machines)
            wanted = f"{self.cpus} CPUs and {self.gpus:g} GPUs"
            raise EngineError(f"no room for a worker with {wanted}: machines have {there}")
        return slots

    def _slots(self, cpus: float, gpus: float) -> int:
        """How many workers fit on one machine."""
        slots = int(cpus // self.cpus)
        if self.gpus >= 1:
            return min(slots, int(gpus // self.gpus))
        if self.gpus > 0:
            return min(slots, int(gpus) * int(1 / self.gpus + 1e-9))  # no part spans two GPUs
        return slots


def _follow(
    ray: Any, tasks: dict[str, tuple[Any, list[RunConfig]]], queue: Any, progress: ProgressReporter
) -> list[tuple[list[RunConfig], Exception]]:
    """Wait for the tasks, which have a label and a cohort each, and show the workers' reports from ``queue``.

    Returns:
        Cohorts that failed, with their errors.
    """
    cohort_of = dict(tasks.values())
    pending, failures = list(cohort_of), []
    reported, begun = Counter(), Counter()  # units, and starts of a worker, by the label of a cohort
    while pending:
        done, pending = ray.wait(pending, timeout=_POLL)
        for label, method, *arguments in queue.get_nowait_batch(queue.size()):
            if method == "begin":  # the first time, or again after its worker died: no unit may count twice
                progress.skip(-reported.pop(label, 0))
                progress.within(label, 0.0)
                begun[label] += 1
                if begun[label] > 1 + _RETRIES:  # Ray retries without end what it stopped to free memory
                    ray.cancel(tasks[label][0], force=True)
                continue
            if method in ("advance", "skip"):
                reported[label] += arguments[0]
            getattr(progress, method)(*arguments)
        for task in done:
            try:
                ray.get(task)
            except ray.exceptions.RayError as error:
                failures.append((cohort_of[task], error))
    return failures


def _joined(failures: list[tuple[list[RunConfig], Exception]]) -> Exception:
    """The error of the first cohort that failed, with notes that name the others; at least one failure."""
    (cohort, error), *others = failures
    joined = getattr(error, "cause", None)
    if not isinstance(joined, Exception):  # Ray raised it, not the work
        joined = EngineError(
            f"the worker that trained {cohort[0].run_id} died, and so did {_RETRIES} after it, most likely out of "
            "memory. Finished runs are kept: call again to go on, with fewer workers at a time (--cpus-per-run) or a "
            f"smaller cohort. Ray says: {first_line(error)}"
        )
    for other, what in others:
        joined.add_note(f"{other[0].run_id} failed as well: {first_line(what)}")
    return joined


def _wait_for_records(store: RunStore, wave: Sequence[RunConfig], seconds: float = 60) -> None:
    """Wait until the records are visible here: network file systems show new files late."""
    deadline = time.monotonic() + seconds
    while missing := [config for config in wave if store.record(config) is None]:
        if time.monotonic() > deadline:
            record = f"a worker finished {missing[0].run_id}, but its record"
            raise EngineError(f"{record} does not appear in {store.folder}: {_SHARED}")
        time.sleep(_POLL)


# ---- in the worker


@dataclass(frozen=True)
class QueueProgress:
    """A worker's progress, sent to the process that shows it: the label of the runs, a method and its arguments."""

    queue: Any
    label: str

    def number(self, runs: int) -> str:
        return self.label

    def send(self, method: str, *arguments: object) -> None:
        self.queue.put((self.label, method, *arguments))

    advance = partialmethod(send, "advance")
    within = partialmethod(send, "within")
    skip = partialmethod(send, "skip")
    say = partialmethod(send, "say")


def _train_there(
    workshop: Workshop,
    cohort: list[RunConfig],
    progress: QueueProgress,
    cpus: int,
    folders: dict[str, str],
    ends: float | None,
) -> None:
    """The task of a worker: :func:`~faqd_lib.runs.local.train_here` with a number of threads, reporting to a queue.

    ``ends`` is a time of ``time.time``; None for no limit.
    """
    deadline = None if ends is None else time.monotonic() + ends - time.time()
    os.environ.update(folders)
    torch.set_num_threads(cpus)
    host, folder = socket.gethostname(), workshop.store.folder
    if not (folder / "suite.json").is_file():
        raise EngineError(f"the worker on {host} does not see {folder}: {_SHARED}")
    if workshop.device.type == "cuda":
        if not torch.cuda.is_available():
            raise EngineError(f"the worker on {host} has no CUDA device that torch can use")
        workshop = replace(workshop, device=torch.device("cuda"))  # a worker sees its own GPUs only, counted from 0
    progress.send("begin")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, *_, **__: progress.say(f"{category.__name__}: {message}")
        train_here(workshop, cohort, progress, deadline)
