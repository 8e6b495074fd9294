"""Fixtures of all tests: no network, no user settings, one thread, tiny images."""

import ipaddress
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings

from faqd_lib.config import (
    AFFINITY_RECIPE,
    QUANTIZER_RECIPE,
    RECIPE,
    DataConfig,
    ObjectiveConfig,
    OptimizationConfig,
    RunConfig,
)
from faqd_lib.data.batches import stream
from faqd_lib.data.datasets import ImageData, Images
from faqd_lib.quantization import relu_kernels as activation_kernels
from faqd_lib.runs import local
from faqd_lib.runs.profile import Profile, SuiteState
from faqd_lib.runs.store import RunStore
from faqd_lib.runs.suite import Suite

# Hides rfc3987_syntax: nbformat imports jsonschema, which imports this package, which parses a grammar for seconds.
sys.modules.setdefault("rfc3987_syntax", None)

# The user's settings, before any test changes them.
USER_SETTINGS = {name: value for name, value in os.environ.items() if name.startswith("FAQD_")}

# Device of tiny suites: FAQD_TEST_DEVICE=cuda runs the tests of the training loop on a GPU.
DEVICE = torch.device(os.environ.get("FAQD_TEST_DEVICE", "cpu"))

# The same examples on every machine and in every run, and no database in the checkout.
settings.register_profile("faqd", max_examples=20, deadline=None, derandomize=True, database=None)
settings.load_profile("faqd")

torch.set_num_threads(1)  # test processes share few cores, and threads do not speed up tiny tensors


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the notebooks first: they take longest, and the other workers run the rest meanwhile."""
    items.sort(key=lambda item: "series" not in item.keywords)


class NetworkUsedError(AssertionError):
    """Not an OSError: the code under test cannot mistake it for a failed download."""


def _is_local(host: object) -> bool:
    if host in (None, "", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Fail a test that connects to another machine. The loopback stays open: notebook kernels use it."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def checked_connect(self, address):
        if self.family != socket.AF_UNIX and not _is_local(address[0]):
            raise NetworkUsedError(f"a test tried to reach {address}")
        return connect(self, address)

    def checked_look_up(host, *arguments, **options):
        if not _is_local(host):
            raise NetworkUsedError(f"a test tried to look up {host}")
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket.socket, "connect", checked_connect)
    monkeypatch.setattr(socket, "getaddrinfo", checked_look_up)


@pytest.fixture(autouse=True)
def isolated(request, monkeypatch, tmp_path):
    """Hide the user's FAQD_* settings and the checkout's datasets; set text progress and a temporary cache."""
    if request.node.get_closest_marker("series"):
        return  # notebooks run in other processes, with settings that the tests choose
    for name in [name for name in os.environ if name.startswith("FAQD_")]:  # run_all.main sets some for its kernels
        monkeypatch.delenv(name)
    monkeypatch.setattr("faqd_lib.utils.progress.headless", lambda: True)
    monkeypatch.setenv("FAQD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("faqd_lib.data.datasets.project_root", lambda: tmp_path / "project")


@pytest.fixture
def user_data() -> Path | None:
    """The user's folder of real data sets (``FAQD_DATA``), or None."""
    folder = USER_SETTINGS.get("FAQD_DATA")
    return Path(folder) if folder and Path(folder).is_dir() else None


def random_images(count: int, classes: int, size: int, purpose: str, labels: bool = True) -> Images:
    """Noise around one colour a class: images that a network can learn to classify."""
    generator = stream(0, purpose)
    label = torch.arange(count) % classes
    colours = torch.randint(40, 216, (classes, 3, 1, 1), generator=stream(0, "colours"))
    pixels = colours[label] + torch.randint(-40, 41, (count, 3, size, size), generator=generator)
    return Images(pixels.clamp(0, 255).to(torch.uint8), label if labels else None)


def make_tiny_data() -> ImageData:
    """48 + 24 images of 3 classes, 8×8 pixels."""
    train, test = random_images(48, 3, 8, "train"), random_images(24, 3, 8, "test")
    return ImageData("tiny", ("a", "b", "c"), train, test, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "0" * 64)


def make_tiny_suite(folder: Path, data: ImageData, **profile) -> Suite:
    """A suite of tiny runs with its images in memory."""
    schedule = {"epochs": 2, "batch_size": 16, "warmup_epochs": 0.5, "learning_rate": 0.05}
    values = {
        "name": "tiny",
        "shows_results": False,
        "teachers": ["resnet8"],
        "student": "resnet8",
        "teacher_schedule": {**schedule, "epochs": 1},
        "student_schedule": schedule,
        "fine_tuning_schedule": {**schedule, "epochs": 1},
        **profile,
    }
    parsed = Profile.parse(values, "tiny")
    held_back = {name: getattr(parsed, name) for name in ("validation_images", "held_out_images")}
    state = SuiteState(
        profile=parsed,
        dataset="tiny",
        reason="tiny: asked for",
        note=data.note,
        data=DataConfig(name="tiny", fingerprint=data.fingerprint, **held_back),
        training_count=len(data.train) - sum(held_back.values()),
        test_count=len(data.test) + parsed.held_out_images,
        precision="float32",
        recipe=RECIPE,
        affinity_recipe=AFFINITY_RECIPE,
        quantizer_recipe=QUANTIZER_RECIPE,
    )
    return Suite(state, RunStore(folder), DEVICE, images=data)


class Killed(BaseException):
    """Not an Exception: the code under test cannot mistake it for an ordinary error."""


@contextmanager
def killed_after(monkeypatch, module: ModuleType, checkpoints: int) -> Iterator[None]:
    """End what is called within after so many of the module's checkpoints, as a killed process ends."""
    original, left = module.save_checkpoint, [checkpoints]

    def checkpoint(*arguments):
        original(*arguments)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(module, "save_checkpoint", checkpoint)
    with pytest.raises(Killed):
        yield
    monkeypatch.setattr(module, "save_checkpoint", original)


def run_until_killed(monkeypatch, suite: Suite, configs: list[RunConfig], checkpoints: int) -> None:
    """Train until ``checkpoints`` checkpoints are written, and stop there as a killed process does."""
    with killed_after(monkeypatch, local, checkpoints):
        suite.run(configs)


@pytest.fixture
def tiny_data() -> ImageData:
    """See :func:`make_tiny_data`."""
    return make_tiny_data()


@pytest.fixture
def tiny_suite(tmp_path, tiny_data):
    """A function that makes a suite of tiny runs in memory: ``tiny_suite("name", data=…, **profile settings)``."""

    def make(name: str = "suite", data: ImageData = tiny_data, **profile) -> Suite:
        return make_tiny_suite(tmp_path / name, data, **profile)

    return make


@pytest.fixture
def run_config() -> RunConfig:
    """A run that trains on labels, without a teacher."""
    return RunConfig(
        data=DataConfig(name="tiny", fingerprint="0" * 64),
        model="resnet8",
        optimization=OptimizationConfig(epochs=2, batch_size=16),
        objective=ObjectiveConfig(label_weight=1.0),
    )


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skip without a C++ compiler; with one, the kernels must compile."""
    if os.environ.get("TORCH_COMPILE_DISABLE") or not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("needs a C++ compiler (g++ or clang), and TORCH_COMPILE_DISABLE unset")
    assert activation_kernels.kernels(torch.float32, False) is not None
