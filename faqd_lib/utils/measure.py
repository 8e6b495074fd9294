"""Time and peak memory of calls, and the machine and software they were measured on."""

import contextlib
import gc
import itertools
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from .files import project_root

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "safetensors", "scikit-learn", "papermill", "pandas")


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Peak tensor memory of ``call()`` in bytes, above the memory in use before the call.

    The figure comes from the allocator's statistics on CUDA, and from the profiler's allocation events on the CPU.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with _no_garbage_collected():
            call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _native_stderr_silenced(),  # some builds of the profiler log every start and stop
        # torch.profiler.profile starts this one, after an import of torch's compiler that takes seconds.
        torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile,
        _no_garbage_collected(),
    ):
        call()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


@contextlib.contextmanager
def _no_garbage_collected():
    """What an earlier call left in reference cycles must not be freed within this one: the peak would be too low."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _native_stderr_silenced():
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


class Stopwatch:
    """Durations of repeated pieces of work on a device, in seconds.

    On CUDA a duration is the time between two events in the stream, and only :meth:`read` makes the host wait.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._marks: list[tuple] = []
        self.seconds: list[float] = []

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Start timing a piece of work."""
        self._started = self._now()

    def stop(self, counts: bool = True) -> None:
        """Stop timing the piece of work; ``counts=False`` records NaN instead of its duration."""
        self._marks.append((self._started, self._now(), counts))

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def read(self) -> list[float]:
        """Wait for the device and return all durations so far."""
        if self._cuda and self._marks:
            torch.cuda.synchronize()
        for begin, end, counts in self._marks:
            elapsed = begin.elapsed_time(end) / 1000 if self._cuda else end - begin
            self.seconds.append(elapsed if counts else math.nan)
        self._marks.clear()
        return self.seconds


def take_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of ``rounds`` calls of each candidate, after one warm-up call of each.

    The candidates take turns. A machine that slows down for a while then slows all of them, and ratios of medians hold.
    """
    device = torch.device(device)
    watches = {name: Stopwatch(device) for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            with watches[name]:
                call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the next call's kernels must not queue behind this one's
    return {name: watch.read() for name, watch in watches.items()}


def copy_bandwidth(device: torch.device | str = "cpu", megabytes: int = 256) -> float:
    """Memory bandwidth in bytes a second: bytes read plus bytes written by a copy, the fastest of seven."""
    source = torch.ones(megabytes * 2**18, device=device)  # float32
    target = torch.empty_like(source)
    (seconds,) = take_turns({"copy": lambda: target.copy_(source)}, 7, device).values()
    return 2 * source.numel() * 4 / min(seconds)


def exact_kernels():
    """A context in which CUDA convolutions are deterministic and compute float32 without TF32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def commit() -> str:
    """Commit of the checkout, with ``+changes`` if ``faqd_lib`` has uncommitted ones; ``"unknown"`` elsewhere."""
    root = project_root()
    if not (root / ".git").exists():  # installed elsewhere: git would describe the user's repository
        return "unknown"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "faqd_lib") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """The processor's model name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@cache
def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of packages, without those that are not installed; do not change the dictionary."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def environment(device: torch.device | str = "cpu") -> dict[str, object]:
    """Machine, software versions and commit, for a run record or the head of a benchmark."""
    device = torch.device(device)
    return {
        "python": sys.version.split()[0],
        **_versions(PACKAGES),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "commit": commit(),
    }
