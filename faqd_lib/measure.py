"""Peak memory of one call, and what machine and software a number was measured with."""

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version

import torch

from .files import project_root

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "safetensors", "scikit-learn", "papermill", "pandas")


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most tensor memory (bytes) that ``call()`` held at one time beyond what was held before it.

    On CUDA from the allocator's statistics; on the CPU from the profiler's allocation events, so that only tensors
    count and the figure does not depend on what the process did before.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _native_stderr_silenced(),  # some builds of the profiler announce every start and stop there
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


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


def commit() -> str:
    """Commit of the checkout, with ``+changes`` if the library differs from it; ``"unknown"`` outside a checkout."""
    root = project_root()
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--", "faqd_lib"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changes else "")


def processor() -> str:
    """The processor's model name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.processor() or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def environment(device: torch.device | str = "cpu") -> dict[str, object]:
    """Machine and software, for a record or the head of a benchmark."""
    device = torch.device(device)
    return {
        "python": sys.version.split()[0],
        **{package: version(package) for package in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "commit": commit(),
    }
