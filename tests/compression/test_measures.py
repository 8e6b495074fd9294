"""Intervals, calibration and agreement, worked out by hand; failure signs and reasons of what stays float."""

import math
from typing import NamedTuple

import pytest
import torch

from faqd_lib.compression.card import Kept, _cells, failure_signs, kept_float
from faqd_lib.compression.measures import Share, agreement, agreement_by_class, calibration, latencies
from faqd_lib.config import ObjectiveConfig, OptimizationConfig, QuantizationConfig, TrainingConfig
from faqd_lib.quantization.description import LayerBits


def test_wilsons_interval():
    # Newcombe (1998), table I: 81 of 263 and 15 of 148.
    assert Share(81, 263).interval == pytest.approx((25.53, 36.62), abs=0.005)
    assert Share(15, 148).interval == pytest.approx((6.24, 16.05), abs=0.005)
    assert Share(0, 20).interval[0] == 0
    assert Share(20, 20).interval[1] == 100
    assert Share(0, 0).interval == (0, 100)
    assert math.isnan(Share(0, 0).percent)
    assert str(Share(81, 263)) == "30.8 % (25.5 to 36.6 %) of 263"


def test_agreement_and_by_class():
    teacher = torch.eye(3)[[0, 0, 1, 2]]
    student = torch.eye(3)[[0, 1, 1, 0]]
    assert agreement(student, teacher) == (2, 4)
    assert agreement_by_class(student, teacher) == {0: (1, 2), 1: (1, 1), 2: (0, 1)}


def test_calibration():
    def logits(confidence: float) -> list[float]:
        return [math.log(confidence / (1 - confidence)), 0.0]

    student = torch.tensor([logits(0.95), logits(0.95), logits(0.65), logits(0.65)])
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    bins, error = calibration(student, teacher)
    assert [(one.low, one.agreement) for one in bins] == [(0.6, (1, 2)), (0.9, (2, 2))]
    assert error == pytest.approx(0.5 * abs(0.65 - 0.5) + 0.5 * abs(0.95 - 1))


def test_latencies():
    found = latencies({"a": lambda: None, "b": lambda: sum(range(20_000))}, 5, torch.device("cpu"))
    assert found["a"].median < found["b"].median
    assert found["b"].low <= found["b"].median <= found["b"].high
    assert found["b"].rounds == 5


def test_reasons_for_what_stays_float():
    rows = [
        LayerBits("a", "Conv2d", bits=1), LayerBits("b", "SiLU"), LayerBits("c", "SiLU"), LayerBits("d", "ReLU"),
        LayerBits("e", "Linear"), LayerBits("", "relu()"), LayerBits("f", "Conv1d"),
        LayerBits("g", "MyLinear"),
    ]  # fmt: skip
    policy = "kept by policy (the last layer by default)"
    assert kept_float(rows, QuantizationConfig(weight_bits=1), {"a", "e", "g"}) == [
        Kept("SiLU", 2, "b", "no quantizer for this kind"),
        Kept("ReLU", 1, "d", "32 bits asked for activations"),
        Kept("Linear", 1, "e", policy),
        Kept("relu()", 1, "the network itself", "called as a function: only modules are quantized"),
        Kept("Conv1d", 1, "f", "no quantizer for this kind"),
        Kept("MyLinear", 1, "g", policy),  # a class of the user's, derived from nn.Linear
    ]


def test_names_do_not_break_the_rows_of_a_table():
    assert _cells("a|b", "one\ntwo\r\nthree", 0.5, "") == "| a\\|b | one two three | 0.5 |  |"


class _Learner(NamedTuple):
    """The parts of a learner that the failure signs read."""

    config: TrainingConfig
    history: list[dict[str, float]]


def test_failure_signs():
    optimization = OptimizationConfig(epochs=6, clip_norm=20.0)
    config = TrainingConfig(optimization=optimization, objective=ObjectiveConfig(logit_loss="mse"))

    def found(agreements, losses, named):
        rows = [
            {"epoch": epoch, "test_accuracy": agrees, "loss": loss, "gradient_norm": 1.0}
            for epoch, (agrees, loss) in enumerate(zip(agreements, losses, strict=True), start=1)
        ]
        return {sign.name: sign.verdict for sign in failure_signs(_Learner(config, rows), named, 10)}

    good = found([50, 60, 70, 80, 95, 99], [6, 5, 4, 3, 2, 1], 10)
    assert good == {"plateau": "no", "instability": "no", "collapse": "no"}
    bad = found([50, 50, 50, 50, 50, 50], [1, 2, 3, 4, 5, 6], 4)
    assert bad == {"plateau": "yes", "instability": "yes", "collapse": "yes"}
    assert found([50, 60], [2, 1], 5)["plateau"] == "not judged: it needs 6 evaluations"
