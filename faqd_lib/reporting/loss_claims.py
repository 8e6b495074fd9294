"""The paper's claims about its losses, judged on committed measurements: cost, and Proposition 4.2.

Cost. The notch of a median is median ± 1.57 · IQR / √n. Two medians of one benchmark run differ if their notches do
not overlap, a comparison at about the 5 % level (McGill, Tukey and Larsen 1978). Steps that the benchmark timed in
pairs differ if the 95 % interval of their ratio does not hold 1. Otherwise the row is inconclusive.

Proposition 4.2, rate. The mean squared error of FFA falls like 1/k if the slope of log error against log k is −1. The
slope is averaged over all maps. The claim is reproduced if the 95 % interval lies within −1 ± :data:`SLOPE_MARGIN`, and
contradicted if it lies outside. The half-width of the interval is the mean of the maps' half-widths, because maps may
share their projections, so that their errors do not average out.

Proposition 4.2, tail. On every map, the share of estimates that are off by more than half of the loss is at most
Chebyshev's bound.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from .verdicts import CONTRADICTED, INCONCLUSIVE, REPRODUCED

NOTCH = 1.57
SLOPE_MARGIN = 0.05
COSTS = (  # part of affinity.json, cheaper, dearer, claim
    ("targets", "FFA, k = 6", "direct", "FFA costs less than the N×N matrices"),
    ("targets", "exact (auto)", "direct", "The exact loss at linear cost costs less than the N×N matrices"),
    ("targets", "FFA, k = 6", "exact (auto)", "FFA costs less than the exact loss at linear cost"),
    ("step", "logits + FFA, k = 6", "logits + FA", "A training step with FFA costs less than one with exact FA"),
    ("step", "logits", "logits + FA", "A training step of plain distillation costs less than one with exact FA"),
)
PLACE = ("batch", "C", "H", "precision")


def loss_claims(
    affinity: Mapping[str, Sequence[Mapping]], proposition: Mapping[str, Sequence[Mapping]]
) -> pd.DataFrame:
    """One row a claim and measured case: columns ``claim``, ``case``, ``measured`` and ``verdict``.

    ``affinity`` and ``proposition`` are what the benchmarks of these names wrote as JSON.
    """
    rows = [*_proposition(proposition["rows"])]
    for part, cheaper, dearer, claim in COSTS:
        cases: dict[tuple, dict[str, Mapping]] = {}
        for row in affinity[part]:
            cases.setdefault(tuple((key, row[key]) for key in PLACE if key in row), {})[row["loss"]] = row
        for place, by_loss in cases.items():
            case = ", ".join(str(value) if key == "precision" else f"{key} {value}" for key, value in place)
            ratio, verdict = _compared(by_loss[cheaper], by_loss[dearer])
            rows.append({"claim": claim, "case": case, "measured": f"time × {ratio:.2g}", "verdict": verdict})
    return pd.DataFrame(rows)


def _compared(cheaper: Mapping, dearer: Mapping) -> tuple[float, str]:
    """The ratio of times, and the verdict on "cheaper": by pairs where the benchmark paired the two."""
    if "ratio low" not in dearer or cheaper.get("ratio low") != cheaper.get("ratio high"):  # no pairs with this one
        return cheaper["median_ms"] / dearer["median_ms"], _differ(cheaper, dearer)
    low, high = dearer["ratio low"], dearer["ratio high"]
    verdict = REPRODUCED if low > 1 else CONTRADICTED if high < 1 else INCONCLUSIVE
    return 1 / dearer["time / logits"], verdict


def _differ(cheaper: Mapping, dearer: Mapping) -> str:
    """The verdict on "cheaper": whether the notches of the two medians are apart, and on which side."""
    low, high = ((row["median_ms"], NOTCH * row["iqr_ms"] / row["n"] ** 0.5) for row in (cheaper, dearer))
    if low[0] + low[1] < high[0] - high[1]:
        return REPRODUCED
    return CONTRADICTED if low[0] - low[1] > high[0] + high[1] else INCONCLUSIVE


def _proposition(rows: Sequence[Mapping]) -> list[dict[str, str]]:
    slope = sum(row["slope"] for row in rows) / len(rows)
    half = sum(row["slope high"] - row["slope low"] for row in rows) / len(rows) / 2
    near = abs(slope + 1)  # to −1
    falls = REPRODUCED if near + half < SLOPE_MARGIN else CONTRADICTED if near - half > SLOPE_MARGIN else INCONCLUSIVE
    case = f"{len(rows)} stages of {len({row['network'] for row in rows})} students"
    below = sum(row["share off by half k=15"] <= row["Chebyshev"] for row in rows)
    return [
        {
            "claim": "FFA's mean squared error falls like 1/k (Proposition 4.2)",
            "case": case,
            "measured": f"slope {slope:.3f} ± {half:.3f}",
            "verdict": falls,
        },
        {
            "claim": "FFA's tail obeys Chebyshev's bound (Proposition 4.2)",
            "case": case,
            "measured": f"{below} of {len(rows)} at k = 15",
            "verdict": REPRODUCED if below == len(rows) else CONTRADICTED,
        },
    ]
