"""Table T6: what feature affinity gains over KD, by pictures, network and layers; from records only.

The cells are those of :func:`faqd_lib.reporting.grids.where_cells`. In each row of cells, every student with an
affinity loss is paired with the KD student of its seed. Seeds without both records are left out.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..runs.store import RunRecord
from ..runs.suite import Suite
from . import grids
from .claims import interval_text
from .grids import Cell
from .segmentation import answers
from .tables import NOT_A_RESULT, NOT_RUN, RUNS, Table, with_origin
from .verdicts import Estimate

BASE = "KD"
HEADINGS = ("pictures", "images", "updates", "bits", "student", "teacher")


def gain_frame(suite: Suite, cells: Sequence[Cell] | None = None) -> pd.DataFrame:
    """One row for each row of cells and each affinity loss; ``cells`` None for those of T6.

    Returns:
        The headings of the cells (``HEADINGS`` of T6) and ``affinity`` (which maps, compared how); ``n``, seeds with
        both runs; ``KD`` and ``with FA``, mean last-epoch test accuracy in percent; ``gain`` in percentage points with
        ``low`` and ``high``, its 95 % interval (one seed: other test images only); ``interval`` in words;
        ``maps``, geometric mean over seeds of a ratio: the exact affinity loss on test images, with FA over with KD;
        ``runs``. NaN and empty without a pair.
    """
    cells = grids.where_cells(suite) if cells is None else cells
    base = {tuple(cell.row.values()): cell.runs for cell in cells if cell.column == BASE}
    rows = []
    for cell in cells:
        if cell.column == BASE or tuple(cell.row.values()) not in base:
            continue
        partners = {run.seed: run for run in base[tuple(cell.row.values())]}
        both = [[*map(suite.store.record, (partners[run.seed], run))] for run in cell.runs if run.seed in partners]
        pairs = [(kd, fa) for kd, fa in both if kd is not None and fa is not None]
        rows.append(cell.row | {"affinity": cell.column} | _measured(suite, pairs))
    columns = [*cells[0].row, "affinity", "n", BASE, "with FA", "gain", "low", "high", "interval", "maps", RUNS]
    return pd.DataFrame(rows, columns=columns)


def _measured(suite: Suite, pairs: list[tuple[RunRecord, RunRecord]]) -> dict[str, object]:
    if not pairs:
        unknown = dict.fromkeys((BASE, "with FA", "gain", "low", "high", "maps"), float("nan"))
        return {"n": 0, **unknown, "interval": "", RUNS: ""}
    kd, fa = ([record.last_accuracy for record in side] for side in zip(*pairs, strict=True))
    by_image = [_right(suite, taught) - _right(suite, plain) for plain, taught in pairs]
    estimate = Estimate.of([two - one for one, two in zip(kd, fa, strict=True)], np.stack(by_image))
    low, high = estimate.interval()
    nearer = [taught.test_affinity / plain.test_affinity for plain, taught in pairs if plain.test_affinity]
    return {
        "n": len(pairs), BASE: sum(kd) / len(kd), "with FA": sum(fa) / len(fa), "gain": estimate.mean,
        "low": low, "high": high, "interval": interval_text(estimate),
        "maps": math.prod(nearer) ** (1 / len(nearer)) if nearer else float("nan"),
        RUNS: " ".join(sorted({record.run_id for pair in pairs for record in pair})),
    }  # fmt: skip


def _right(suite: Suite, record: RunRecord) -> np.ndarray:
    """The share of each test image in a run's accuracy or mean IoU: (N,), float64."""
    return answers(suite.store.predictions(record)).astype(float)


def forest_frame(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """The gains of a :func:`gain_frame` for :func:`faqd_lib.reporting.charts.forest`, named by the column ``name``."""
    shown = frame[frame["n"] > 0]
    return pd.DataFrame(
        {
            "claim": shown[name], "mean": shown["gain"], "low": shown["low"], "high": shown["high"], "margin": 0.0,
            "verdict": [f"{gain:+.2f} points, n = {n}" for gain, n in zip(shown["gain"], shown["n"], strict=True)],
        }
    )  # fmt: skip


def table(suite: Suite) -> Table:
    """T6 of a suite, or of a study that varies pictures, networks or layers."""
    shows = suite.profile.shows_results

    def number(value: float, text: str) -> str:
        return NOT_RUN if math.isnan(value) else text.format(value) if shows else NOT_A_RESULT

    rows = [
        {name: getattr(row, name) for name in (*HEADINGS, "affinity")}
        | {
            "n (seeds)": row.n, BASE: number(row.KD, "{:.2f}"), "with FA": number(row.with_fa, "{:.2f}"),
            "gain": number(row.gain, "{:+.2f}"), "95 % interval": row.interval if shows else "",
            "affinity loss, with FA / KD": number(row.maps, "{:.2f}"), RUNS: row.runs,
        }
        for row in gain_frame(suite).rename(columns={"with FA": "with_fa"}).itertuples()
    ]  # fmt: skip
    caption = (
        "What feature affinity gains over KD, by the student's unlabelled pictures, its network, and the maps that are "
        f"compared; teacher and test images are those of {suite.caption}. Last-epoch test {suite.metric} in percent; "
        "gain in percentage points over pairs of runs with one seed, with the 95 % interval for other seeds and other "
        "test images. Affinity loss: exact, on test images, of the student with FA over that of its KD partner. "
        f"{'' if shows else 'This profile tests the machinery: no results.'}"
    ).rstrip()
    title = f"T6 Where it helps, {suite.dataset}"
    return with_origin(suite, Table(f"T6_where_{suite.dataset}", title, caption, pd.DataFrame(rows)))
