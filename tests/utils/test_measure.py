"""The environment of a record: versions of what is installed, and nothing of what is not."""

import torch

from faqd_lib.utils import measure


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr(measure, "PACKAGES", ("torch", "no-such-package"))
    found = measure.environment()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "no-such-package" not in found
