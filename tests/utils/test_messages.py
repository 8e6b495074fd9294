"""Parts of error messages."""

from enum import IntEnum, StrEnum

import pytest
import torch

from faqd_lib.utils.messages import check_choice, did_you_mean, first_line, kind_of


def test_a_choice_is_checked_and_the_nearest_named():
    check_choice("norm", "l2", ("l2", "l1"))
    with pytest.raises(ValueError, match=r"^norm must be one of l2, l1, got 'l22' \(did you mean 'l2'\?\)$"):
        check_choice("norm", "l22", ("l2", "l1"))
    with pytest.raises(KeyError, match="bits must be one of 1, 2, got True"):
        check_choice("bits", True, (1, 2), KeyError)
    with pytest.raises(ValueError, match=r"got 1\.0$"):
        check_choice("bits", 1.0, (1, 2))


def test_members_of_enumerations_are_the_values_that_they_equal():
    check_choice("bits", IntEnum("Bits", {"ONE": 1}).ONE, (1, 2))
    check_choice("norm", StrEnum("Norm", {"L2": "l2"}).L2, ("l2", "l1"))


def test_nothing_near_is_no_hint():
    assert did_you_mean("zebra", ("mse", "kl")) == ""


def test_first_line_and_kind():
    assert first_line(ValueError("too small\nby far")) == "ValueError: too small"
    assert kind_of(torch.zeros(2, 3)) == "torch.float32 (2, 3)"
    assert kind_of([1]) == "list"
