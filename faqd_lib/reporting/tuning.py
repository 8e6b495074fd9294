"""What the tuning runs of a study say: accuracy on validation images, setting by setting."""

import pandas as pd

from ..runs.store import score
from ..runs.suite import Suite
from .tables import NOT_A_RESULT, RUNS, Table, with_origin


def tuning_frame(suite: Suite) -> pd.DataFrame:
    """One row for each arm of each cells that has finished runs.

    Returns:
        Columns ``cells``; ``arm``; ``n``, the number of finished runs; ``validation``, their mean accuracy on
        validation images after the last epoch, in percent; ``runs``, their names, separated by spaces.
    """
    rows = []
    for cells in suite.profile.study.cells:
        by_arm: dict[str, list] = {}
        for seed in suite.profile.study.seeds:
            for (arm, _), config in suite.study_runs(cells, seed).items():
                if record := suite.store.record(config):
                    by_arm.setdefault(arm, []).append(record)
        for arm, records in by_arm.items():
            accuracy = sum(score(record.history[-1], "validation") for record in records) / len(records)
            names = " ".join(record.run_id for record in records)
            rows.append({"cells": cells, "arm": arm, "n": len(records), "validation": accuracy, "runs": names})
    return pd.DataFrame(rows, columns=["cells", "arm", "n", "validation", "runs"])


def tuning_table(suite: Suite) -> Table:
    """The table of :func:`tuning_frame`, in percent with two digits."""
    frame = tuning_frame(suite).rename(columns={"validation": "validation accuracy (%)", "runs": RUNS})
    shows = suite.profile.shows_results
    accuracy = "validation accuracy (%)"
    frame[accuracy] = [f"{value:.2f}" if shows else NOT_A_RESULT for value in frame[accuracy]]
    caption = (
        f"Tuning on {suite.profile.validation_images:,} validation images, {suite.caption}. Mean accuracy after the "
        "last epoch over n runs. Test images are not looked at."
    )
    return with_origin(suite, Table("tuning", f"Tuning, {suite.dataset}", caption, frame))
