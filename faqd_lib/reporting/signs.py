"""Three signs that distillation has failed: the paper's own list of what can go wrong.

Plateau. The student stays behind its teacher and has stopped closing in. Its test accuracy ends at least :data:`GAP`
percentage points below the teacher's, and the last third of the epochs closed less than :data:`CLOSING` of the gap.
Runs with fewer than :data:`FEWEST_EVALUATIONS` evaluations are not judged.

FFA is not FA. A student of FFA and its partner of FA have the same settings but for the estimate. Their test accuracies
end more than :data:`APART` percentage points apart, or their exact affinity losses on test images differ by more than
the factor :data:`AFFINITY_RATIO`.

Instability. In an epoch after the first, the mean gradient norm is above the norm at which gradients are clipped, or
the training loss is above that of the first epoch. High affinity weights cause both. Runs of one epoch are not judged.

A sign is a warning about one run. A sign is no test, so it has no error rate.
"""

from collections.abc import Iterable

import pandas as pd

from ..config import RunConfig
from ..runs.store import RunRecord, score
from ..runs.suite import Suite
from .tables import NOT_A_RESULT, RUNS, Table, with_origin

GAP = 2.0  # percentage points
CLOSING = 0.05  # share of the gap
FEWEST_EVALUATIONS = 6
APART = 1.0  # percentage points
AFFINITY_RATIO = 1.25
NOT_JUDGED = "no run to judge"
SIGNS = {
    "plateau": f"ends {GAP:g} points or more below its teacher; under {CLOSING:.0%} of that closed in the last third",
    "FFA is not FA": f"more than {APART:g} point apart, or affinity losses on test images more than "
    f"{AFFINITY_RATIO:g} times apart",
    "instability": "after epoch 1: mean gradient norm above the clipping norm, or training loss above epoch 1",
}


def gap_frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """The gap of each student to its teacher, evaluation by evaluation.

    Returns:
        Columns ``run``, ``method``, ``progress``, the finished share of the epochs, and ``gap`` in percentage points.
        Students whose teacher is not among the records are left out.
    """
    by_digest = {record.digest: record for record in records}
    rows = []
    for record in by_digest.values():
        config = record.configuration
        teacher = config.teacher and by_digest.get(config.teacher.digest)
        if not teacher or not config.optimization.epochs:
            continue
        for row in record.history:
            if (found := score(row)) is not None:
                rows.append(
                    {
                        "run": record.run_id,
                        "method": config.method,
                        "progress": row["epoch"] / config.optimization.epochs,
                        "gap": teacher.last_accuracy - found,
                    }
                )
    return pd.DataFrame(rows, columns=["run", "method", "progress", "gap"])


def estimate_frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """Each student of FFA beside its partner of FA.

    Returns:
        Columns ``run``, ``partner`` and ``k``; ``apart``, the test accuracy FFA − FA in percentage points; ``ratio``,
        the exact affinity loss on test images FFA / FA, NaN where a record has none.
    """
    records = list(records)
    exact = {_but_for_the_estimate(record.configuration): record for record in records if _loss(record) == "fa"}
    rows = []
    for record in records:
        partner = exact.get(_but_for_the_estimate(record.configuration)) if _loss(record) == "ffa" else None
        if partner:
            known = record.test_affinity and partner.test_affinity
            rows.append(
                {
                    "run": record.run_id,
                    "partner": partner.run_id,
                    "k": record.configuration.objective.k,
                    "apart": record.last_accuracy - partner.last_accuracy,
                    "ratio": record.test_affinity / partner.test_affinity if known else float("nan"),
                }
            )
    return pd.DataFrame(rows, columns=["run", "partner", "k", "apart", "ratio"])


def stability_frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """Gradient norm and training loss of each student, epoch by epoch.

    Returns:
        Columns ``run``, ``affinity_weight`` and ``epoch``; ``norm``, the mean gradient norm / the clipping norm;
        ``loss``, the training loss / that of the first epoch. Records without gradient norms are left out.
    """
    rows = []
    for record in records:
        config = record.configuration
        if not config.objective.uses_teacher or "gradient_norm" not in record.history[0]:
            continue
        for row in record.history:
            rows.append(
                {
                    "run": record.run_id,
                    "affinity_weight": config.objective.affinity_weight,
                    "epoch": int(row["epoch"]),
                    "norm": row["gradient_norm"] / config.optimization.clip_norm,
                    "loss": row["loss"] / record.history[0]["loss"],
                }
            )
    return pd.DataFrame(rows, columns=["run", "affinity_weight", "epoch", "norm", "loss"])


def _loss(record: RunRecord) -> str:
    return record.configuration.objective.affinity


def _but_for_the_estimate(config: RunConfig) -> RunConfig:
    """The configuration as one of FA, with the settings that only FFA uses made equal."""
    same = config.objective.model_copy(update={"affinity": "fa", "k": 1, "distribution": "gaussian"})
    return config.model_copy(update={"objective": same})


def plateaus(gaps: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Runs of :func:`gap_frame` that are judged, and those of them with the sign."""
    judged, found = [], []
    for run, rows in gaps.groupby("run", sort=False):
        if len(rows) < FEWEST_EVALUATIONS:
            continue
        judged.append(run)
        last = rows["gap"].iloc[-1]
        before = rows.loc[rows["progress"] <= 2 / 3, "gap"].iloc[-1]
        if last >= GAP and before - last < CLOSING * before:
            found.append(run)
    return judged, found


def apart(pairs: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Runs of :func:`estimate_frame` that are judged, and those of them with the sign."""
    ratio = pairs["ratio"].fillna(1.0)
    far = (pairs["apart"].abs() > APART) | (ratio > AFFINITY_RATIO) | (ratio < 1 / AFFINITY_RATIO)
    return list(pairs["run"]), list(pairs.loc[far, "run"])


def unstable(steps: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Runs of :func:`stability_frame` that are judged, and those of them with the sign."""
    later = steps[steps["epoch"] > 1]
    bad = later[(later["norm"] > 1) | (later["loss"] > 1)]
    return list(later["run"].unique()), list(bad["run"].unique())


def table(suite: Suite) -> Table:
    """One row a sign: its threshold, the number of runs that were judged, and those that show it."""
    records = suite.store.records()
    found = {
        "plateau": plateaus(gap_frame(records)),
        "FFA is not FA": apart(estimate_frame(records)),
        "instability": unstable(stability_frame(records)),
    }
    shows = suite.profile.shows_results
    rows = [
        {
            "sign": sign,
            "shown by a run that": SIGNS[sign],
            "runs judged": str(len(judged)),
            "runs with the sign": (str(len(with_it)) if shows else NOT_A_RESULT) if judged else NOT_JUDGED,
            "which": ", ".join(with_it) if shows else "",
            RUNS: " ".join(judged),
        }
        for sign, (judged, with_it) in found.items()
    ]
    caption = (
        f"Signs that distillation has failed, {suite.caption}. A plateau needs {FEWEST_EVALUATIONS} evaluations of a "
        "run, instability a second epoch; others are not judged. A sign is a warning about one run, not a test."
    )
    return with_origin(suite, Table("signs", f"Failure signs, {suite.dataset}", caption, pd.DataFrame(rows)))
