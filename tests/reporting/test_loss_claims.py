"""Claims about the losses, from measurements that are written here by hand."""

import pytest

from faqd_lib.reporting.loss_claims import COSTS, loss_claims


def timed(loss: str, median: float, iqr: float = 1.0) -> dict:
    return {"batch": 2, "C": 4, "H": 8, "loss": loss, "n": 16, "median_ms": median, "iqr_ms": iqr}


def measured(ffa: float = 9.0, iqr: float = 1.0) -> dict:
    """Times of FFA against an exact loss of 10 ms; notches are 0.39 wide on each side for an IQR of 1."""
    steps = [timed(loss, 100) for loss in ("logits", "logits + FA", "logits + FFA, k = 6")]
    return {"targets": [timed("direct", 1000), timed("exact (auto)", 10, iqr), timed("FFA, k = 6", ffa)], "step": steps}


def slopes(slope: float = -1.0, half: float = 0.03, share: float = 0.1) -> dict:
    row = {"network": "1W32A FAQD", "slope": slope, "slope low": slope - half, "slope high": slope + half}
    return {"rows": [row | {"share off by half k=15": share, "Chebyshev": 0.2}] * 3}


def verdicts(affinity: dict, proposition: dict) -> dict[str, str]:
    return loss_claims(affinity, proposition).set_index("claim")["verdict"].to_dict()


@pytest.mark.parametrize(
    ("ffa", "iqr", "verdict"),
    [
        (9.0, 1.0, "reproduced"),
        (9.3, 1.0, "inconclusive"),  # 9.69 and 9.61
        (9.0, 3.0, "inconclusive"),
        (11.0, 1.0, "contradicted"),
    ],
)
def test_times_differ_where_their_notches_are_apart(ffa, iqr, verdict):
    found = verdicts(measured(ffa, iqr), slopes())
    assert found["FFA costs less than the exact loss at linear cost"] == verdict
    assert found["FFA costs less than the N×N matrices"] == "reproduced"
    assert found["A training step with FFA costs less than one with exact FA"] == "inconclusive"


@pytest.mark.parametrize(
    ("slope", "half", "verdict"),
    [
        (-1.01, 0.03, "reproduced"),
        (-0.97, 0.03, "inconclusive"),
        (-1.0, 0.06, "inconclusive"),
        (-0.5, 0.03, "contradicted"),
    ],
)
def test_the_slope_must_be_shown_to_be_near_minus_one(slope, half, verdict):
    assert (
        verdicts(measured(), slopes(slope, half))["FFA's mean squared error falls like 1/k (Proposition 4.2)"]
        == verdict
    )


@pytest.mark.parametrize(("share", "verdict"), [(0.2, "reproduced"), (0.21, "contradicted")])
def test_the_tail_must_obey_its_bound(share, verdict):
    assert verdicts(measured(), slopes(share=share))["FFA's tail obeys Chebyshev's bound (Proposition 4.2)"] == verdict


def test_every_case_of_a_claim_has_its_row():
    frame = loss_claims(measured(), slopes())
    assert list(frame["claim"])[2:] == [claim for *_, claim in COSTS]
    assert set(frame["case"][2:]) == {"batch 2, C 4, H 8"}
    assert frame["measured"][2] == "time × 0.009"
