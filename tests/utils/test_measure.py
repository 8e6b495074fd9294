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
    """The profiler counts memory that is freed, if it saw the allocation in an earlier call."""

    def call():
        if gc.isenabled():  # then it may collect at any allocation
            gc.collect()
        torch.empty(2**18).add_(1)

    gc.disable()  # from here to the call
    try:
        measure.peak_bytes(Cycle)
    finally:
        gc.enable()
    assert 0 <= measure.peak_bytes(call) - 4 * 2**18 < 100  # the number that is added takes a few bytes
    assert gc.isenabled()
