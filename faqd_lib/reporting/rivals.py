"""Table T7: feature affinity beside its rivals: accuracy from records, time and memory from one idle benchmark."""

import json
import math
from pathlib import Path

import pandas as pd

from ..runs.suite import Suite
from . import grids, where
from .tables import NOT_A_RESULT, NOT_RUN, RUNS, Table, with_origin

NOT_MEASURED = "not measured"


def read_costs(file: Path) -> dict[str, dict]:
    """Rows of the part ``rivals`` of ``benchmarks/affinity.py``, by the name of the loss; empty without such rows."""
    if not file.is_file():
        return {}
    return {row["loss"]: row for row in json.loads(file.read_text(encoding="utf-8")).get("rivals", ())}


def table(suite: Suite, costs: Path) -> Table:
    """T7 of a suite, or of a study of rivals.

    Args:
        suite: whose records are read.
        costs: the file ``affinity.json`` of an idle machine. Times of the runs themselves are not shown: they depend on
            what ran beside them.
    """
    shows, measured = suite.profile.shows_results, read_costs(costs)

    def number(value: float, text: str) -> str:
        return NOT_RUN if math.isnan(value) else text.format(value) if shows else NOT_A_RESULT

    def cost(loss: str, key: str, text: str) -> str:
        return text.format(measured[loss][key]) if loss in measured else NOT_MEASURED

    rows = [
        {
            "bits": row.bits, "loss": row.affinity, "weight": row.weight, "n (seeds)": row.n,
            "KD": number(row.KD, "{:.2f}"), "with the loss": number(row.with_fa, "{:.2f}"),
            "gain": number(row.gain, "{:+.2f}"), "95 % interval": row.interval if shows else "",
            "time / KD's": cost(row.affinity, "time / logits", "{:.2f}"),
            "extra MiB": cost(row.affinity, "extra_MiB", "{:.0f}"), RUNS: row.runs,
        }
        for row in gains(suite).rename(columns={"with FA": "with_fa"}).itertuples()
    ]  # fmt: skip
    caption = (
        f"Losses between maps, each added to KD (logits, MSE), label-free; {suite.caption}. Last-epoch test accuracy "
        "in percent; gain over KD in percentage points over pairs of runs with one seed, with the 95 % interval for "
        "other seeds and other test images. Time and extra memory of a training step beside KD's: from one run of "
        "benchmarks/affinity.py --parts rivals (1-bit weights, float activations)"
        f"{'' if measured else ', which is missing here'}."
        f"{'' if shows else ' This profile tests the machinery: no results.'}"
    )
    title = f"T7 Rivals, {suite.dataset}"
    return with_origin(suite, Table(f"T7_rivals_{suite.dataset}", title, caption, pd.DataFrame(rows)))


def gains(suite: Suite) -> pd.DataFrame:
    """The columns of :func:`faqd_lib.reporting.where.gain_frame`, and ``weight``, the weight of the map loss."""
    cells = grids.rival_cells(suite)
    weights = {(cell.row["bits"], cell.column): cell.runs[0].objective.affinity_weight for cell in cells}
    frame = where.gain_frame(suite, cells)
    return frame.assign(weight=[weights[key] for key in zip(frame["bits"], frame["affinity"], strict=True)])
