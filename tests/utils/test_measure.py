"""The environment of a record, and what a call needs, whatever ran before it."""

import gc

import torch

from faqd_lib.utils import measure


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr(measure, "PACKAGES", ("torch", "no-such-package"))
    found = measure.environment()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "no-such-package" not in found


class Cycle:
    """A tensor in a reference cycle: the garbage collector alone frees it."""

    def __init__(self) -> None:
        self.itself, self.tensor = self, torch.empty(2**20)


def test_garbage_of_earlier_calls_does_not_lower_the_peak():
    def call():
        gc.collect()  # may happen at any allocation
        torch.empty(2**18).add_(1)

    gc.disable()  # else any allocation before the call may collect
    try:
        measure.peak_bytes(Cycle)  # the profiler knows what was allocated while it ran
        peak = measure.peak_bytes(call)
    finally:
        gc.enable()
    assert 0 <= peak - 4 * 2**18 < 100  # the number that is added takes a few bytes
