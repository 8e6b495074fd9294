"""The settings of the command line and JupyterLab that come from environment variables.

FAQD_RESULTS      where suite folders live (default: ``results/`` in the project)
FAQD_PROGRESS     ``text`` or ``bar``
FAQD_ENGINE       ``local`` (default) or ``ray``
FAQD_RAY_ADDRESS  a cluster that runs already (default: Ray is started on this machine)
FAQD_RAY_CPUS     threads of a worker (default: 1)
FAQD_RAY_GPUS     GPUs of a worker (default: 0.25 where there is one, else 0)

``run_all.sh`` sets them for its kernels. The library below takes arguments only, apart from the folders of images
(``FAQD_DATA``, ``FAQD_CACHE``).
"""

import math
import os
from pathlib import Path

import torch

from ..config import ConfigurationError
from ..runs.local import Engine, train_here
from ..runs.ray import EngineError, RayEngine
from ..utils.messages import check_choice

ENGINES = ("local", "ray")


def results() -> Path | None:
    """The folder that ``FAQD_RESULTS`` names, or None."""
    folder = os.environ.get("FAQD_RESULTS")
    return Path(folder) if folder else None


def progress_bar() -> bool | None:
    """Whether ``FAQD_PROGRESS`` is ``bar`` (not ``text``); None if not set, ConfigurationError for other values."""
    style = os.environ.get("FAQD_PROGRESS")
    if not style:
        return None
    check_choice("FAQD_PROGRESS", style, ("text", "bar"), ConfigurationError)
    return style == "bar"


def engine() -> Engine:
    """The engine that ``FAQD_ENGINE`` and ``FAQD_RAY_…`` describe; EngineError names a bad setting."""
    name = os.environ.get("FAQD_ENGINE") or "local"
    check_choice("FAQD_ENGINE", name, ENGINES, EngineError)
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
