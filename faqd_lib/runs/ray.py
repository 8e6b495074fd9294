"""Where runs are trained: in this process, or on Ray (docs.ray.io) on one machine or many.

``FAQD_ENGINE`` chooses: ``local`` (the default) or ``ray``, with ``FAQD_RAY_ADDRESS`` (a cluster that runs already;
empty: Ray is started on this machine), ``FAQD_RAY_CPUS`` (threads of a worker) and ``FAQD_RAY_GPUS`` (the part of a GPU
that it has). ``run_all.sh --engine ray`` sets them, and whoever works in JupyterLab can.

A run's bits depend on its configuration, the machine and the number of threads, not on the engine.
"""

import math
import os
import socket
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config import RunConfig
from ..utils.progress import ProgressReporter
from . import planning
from .local import Workplace, train_here

ENGINES = ("local", "ray")
Engine = Callable[[Workplace, Sequence[RunConfig], ProgressReporter], None]

_RETRIES = 3  # of a cohort whose worker died; it goes on from its checkpoints
_POLL = 0.5  # seconds between two looks at what the workers report
_STORE_BYTES = 100 * 2**20  # Ray's object store: only configurations and lines of text go through it
_PASSED_ON = ("FAQD_DATA", "FAQD_CACHE")  # of the environment: where a worker looks for images


class EngineError(RuntimeError):
    """An engine cannot be used, or lost a worker for good; the message says what to do."""


def chosen_engine() -> Engine:
    """The engine that ``FAQD_ENGINE`` names.

    Raises:
        EngineError: there is no such engine, or a setting is no number in its range.
    """
    name = os.environ.get("FAQD_ENGINE") or "local"
    if name not in ENGINES:
        raise EngineError(f"FAQD_ENGINE must be one of {', '.join(ENGINES)}, got {name!r}")
    if name == "local":
        return train_here
    gpus = _number("FAQD_RAY_GPUS", 0.25 if torch.cuda.is_available() else 0.0)
    cpus = _number("FAQD_RAY_CPUS", 1)
    if cpus != int(cpus):
        raise EngineError(f"FAQD_RAY_CPUS must be a whole number, got {cpus:g}")
    return RayEngine(os.environ.get("FAQD_RAY_ADDRESS") or None, int(cpus), gpus)


def _number(variable: str, default: float) -> float:
    text = os.environ.get(variable) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise EngineError(f"{variable} must be a number, got {text!r}")
    return value


@dataclass(frozen=True)
class RayEngine:
    """Cohorts as Ray tasks: each in a worker process of its own, which writes into the one results folder.

    Args:
        address: of a running cluster (``"auto"``, ``"host:6379"``); None starts Ray on this machine, until the process
            ends.
        cpus: threads of a worker.
        gpus: the part of a GPU that a worker has; 0.25 puts four cohorts on each.

    All machines must see the results folder under the same path, and have this project installed.
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
        """The ``ray`` module, connected. Once in a process: later calls find the connection there.

        Raises:
            EngineError: Ray is not installed, or no cluster answers at the address.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody has been asked
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

    def __call__(self, suite: Workplace, wave: Sequence[RunConfig], progress: ProgressReporter) -> None:
        """Train runs none of which needs another one.

        Raises:
            EngineError: there is no room for a worker, a worker cannot work, or one died too often.
            Exception: what a worker raised; all other cohorts are finished and saved by then, but for those that a
                note of the exception names.
        """
        if (suite.device.type == "cuda") != (self.gpus > 0):
            raise EngineError(
                f"this process computes on {suite.device}, and workers with {self.gpus:g} GPUs would not: "
                "set FAQD_RAY_GPUS (--gpus-per-run), or run this where a GPU is, too"
            )
        ray = self.connect()
        from ray.util.queue import Queue

        cohorts = planning.cohorts(
            wave, planning.cohort_size(len(wave), self._workers(ray.nodes()), suite.profile.cohort)
        )
        work = ray.remote(_train_there).options(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=_RETRIES)
        passed_on = {n: str(Path(os.environ[n]).expanduser().resolve()) for n in _PASSED_ON if os.environ.get(n)}
        queue = Queue(actor_options={"num_cpus": 0})
        tasks = {}
        try:
            for cohort in cohorts:
                label = progress.number(len(cohort))
                tasks[label] = work.remote(suite, cohort, label, self.cpus, passed_on, queue), cohort
            failures = _follow(ray, tasks, queue, progress)
        finally:
            for task, _ in tasks.values():
                ray.cancel(task, force=True)  # no more than a word if it is done
            queue.shutdown(force=True)
        if failures:
            (cohort, error), *others = failures
            raised = self._what_to_raise(cohort, error)
            for other, what in others:
                raised.add_note(f"{other[0].run_id} failed, too: {_first_line(what)}")
            raise raised from error
        _wait_for_records(suite, wave)

    def _what_to_raise(self, cohort: Sequence[RunConfig], error: Exception) -> Exception:
        cause = getattr(error, "cause", None)
        if isinstance(cause, Exception):  # raised by the work itself
            return cause
        return EngineError(
            f"the worker that trained {cohort[0].run_id} died, and so did {_RETRIES} after it, most likely for want of "
            "memory. Finished runs are kept: call again to go on, with fewer workers at a time (--cpus-per-run) or a "
            f"smaller cohort. Ray says: {_first_line(error)}"
        )

    def _workers(self, nodes: list[dict[str, Any]]) -> int:
        """How many workers all machines have room for together; at least 1."""
        machines = [node["Resources"] for node in nodes if node["Alive"]]
        slots = sum(self._slots(machine.get("CPU", 0), machine.get("GPU", 0)) for machine in machines)
        if slots < 1:
            there = ", ".join(
                f"{machine.get('CPU', 0):g} CPUs and {machine.get('GPU', 0):g} GPUs" for machine in machines
            )
            raise EngineError(
                f"no room for a worker with {self.cpus} CPUs and {self.gpus:g} GPUs: machines have {there}"
            )
        return slots

    def _slots(self, cpus: float, gpus: float) -> int:
        """How many workers one machine has room for."""
        slots = int(cpus // self.cpus)
        if self.gpus >= 1:
            return min(slots, int(gpus // self.gpus))
        if self.gpus > 0:
            return min(slots, int(gpus) * int(1 / self.gpus + 1e-9))  # a part is a part of one GPU
        return slots


def _follow(
    ray: Any, tasks: dict[str, tuple[Any, list[RunConfig]]], queue: Any, progress: ProgressReporter
) -> list[tuple[list[RunConfig], Exception]]:
    """Wait for all tasks, given with their cohorts by label, and show what they report; return what failed."""
    cohort_of = dict(tasks.values())
    pending, failures = list(cohort_of), []
    reported: dict[str, float] = {}  # units, by the label of a cohort
    begun = Counter()
    while pending:
        done, pending = ray.wait(pending, timeout=_POLL)
        for label, method, *arguments in queue.get_nowait_batch(queue.size()):
            if method == "begin":  # its worker died before: what is skipped and advanced again must not count twice
                progress.skip(-reported.get(label, 0))
                progress.within(label, 0.0)
                reported[label] = 0
                begun[label] += 1
                if begun[label] > 1 + _RETRIES:  # Ray tries what it stopped for want of memory again without end
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


def _wait_for_records(suite: Workplace, wave: Sequence[RunConfig], seconds: float = 60) -> None:
    """File systems of networks show new files late."""
    deadline = time.monotonic() + seconds
    while missing := [config for config in wave if suite.store.record(config) is None]:
        if time.monotonic() > deadline:
            raise EngineError(
                f"a worker finished {missing[0].run_id}, but its record does not appear in {suite.folder}: with Ray on "
                "several machines that folder must be on a file system that all of them share (--results)"
            )
        time.sleep(_POLL)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


# ---- in the worker


@dataclass(frozen=True)
class QueueProgress:
    """A worker's progress, shown by the process that gave it its work."""

    queue: Any
    label: str

    def number(self, runs: int) -> str:
        return self.label

    def advance(self, units: float, text: str) -> None:
        self.queue.put((self.label, "advance", units, text))

    def within(self, label: str, units: float, text: str = "") -> None:
        self.queue.put((self.label, "within", label, units, text))

    def skip(self, units: float) -> None:
        self.queue.put((self.label, "skip", units))

    def say(self, text: str) -> None:
        self.queue.put((self.label, "say", text))


def _train_there(
    suite: Workplace, cohort: list[RunConfig], label: str, threads: int, environment: dict[str, str], queue: Any
) -> None:
    """A task: what :func:`~faqd_lib.runs.local.train_here` does, with the given threads, reporting to a queue."""
    os.environ.update(environment)
    torch.set_num_threads(threads)
    if not (Path(suite.folder) / "suite.json").is_file():
        raise EngineError(
            f"the worker on {socket.gethostname()} does not see {suite.folder}: with Ray on several machines the "
            "results folder must be on a file system that all of them share (--results)"
        )
    if suite.device.type == "cuda" and not torch.cuda.is_available():
        raise EngineError(f"the worker on {socket.gethostname()} has no CUDA device that torch can use")
    if suite.device.type == "cuda":
        suite = replace(suite, device=torch.device("cuda"))  # a worker sees its own GPUs only, counted from 0
    wire = QueueProgress(queue, label)
    queue.put((label, "begin"))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, *_, **__: wire.say(f"{category.__name__}: {message}")
        train_here(suite, cohort, wire)
