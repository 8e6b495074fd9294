"""What a study shows beside its claims: accuracy of each arm, gain over updates, and updates to an accuracy."""

import math
from itertools import pairwise
from typing import NamedTuple

import pandas as pd

from ..runs.study import Cells, Study
from ..runs.suite import Suite
from .study_claims import contrast
from .tables import NOT_A_RESULT, RUNS, Table, with_origin
from .verdicts import Estimate

BASE, TAUGHT = "kd", "fa"  # arms that every comparison over updates needs


class StepRatio(NamedTuple):
    """Time of a training step with FA / time of one without, with its 95 % interval."""

    ratio: float
    low: float
    high: float


def arms_frame(suite: Suite) -> pd.DataFrame:
    """One row for each arm with a complete seed, in each group of cells.

    Returns:
        Columns ``cells``, ``weight_bits``, ``images``, ``updates``, ``arm``; ``n``, the number of complete seeds;
        ``accuracy``, last-epoch test accuracy in percent; ``low`` and ``high``, the 95 % interval for other seeds and
        other test images, NaN with one seed; ``affinity``, the geometric mean of the exact affinity loss on test
        images, NaN without a teacher; ``runs``, names of runs separated by spaces.
    """
    rows = []
    for name, cells in suite.profile.study.cells.items():
        for arm in cells.arms:
            found = contrast(suite, {arm: name}, {arm: 1.0})
            if found is None:
                continue
            affinity = [math.log(record.test_affinity) for record in found.records if record.test_affinity]
            rows.append(
                _place(suite, name, cells)
                | {"arm": arm, "n": len(found.values)}
                | _spread(found.estimate(), "accuracy")
                | {
                    "affinity": math.exp(sum(affinity) / len(affinity)) if affinity else float("nan"),
                    "runs": " ".join(found.runs),
                }
            )
    columns = ["cells", *_PLACE, "arm", "n", "accuracy", "low", "high", "affinity", "runs"]
    return pd.DataFrame(rows, columns=columns)


def gain_frame(suite: Suite) -> pd.DataFrame:
    """FAQD − KD over updates: one row for each group of cells with both arms and a complete seed.

    Returns:
        Columns ``cells``, ``weight_bits``, ``images``, ``updates``, ``n``; ``gain`` in percentage points, with ``low``
        and ``high``, the 95 % interval for other seeds and other test images.
    """
    rows = []
    for name, cells in _compared(suite).items():
        if found := contrast(suite, dict.fromkeys((TAUGHT, BASE), name), {TAUGHT: 1.0, BASE: -1.0}):
            spread = _spread(found.estimate(), "gain")
            rows.append(_place(suite, name, cells) | {"n": len(found.values)} | spread)
    return pd.DataFrame(rows, columns=["cells", *_PLACE, "n", "gain", "low", "high"])


def reach_frame(suite: Suite) -> pd.DataFrame:
    """How many updates FAQD needs for the accuracy that an arm of KD has after a budget.

    FAQD's accuracy is interpolated over the logarithm of updates, seed by seed. Only budgets with all images and
    complete seeds are used, and arms of KD with FAQD's regime, labels and activation bits.

    Returns:
        One row for each arm of KD, budget and bit-width: ``weight_bits``; ``arm`` and its ``updates``; ``n``, the
        number of seeds; ``share``, the geometric mean over seeds of FAQD's updates / the arm's; ``low`` and ``high``,
        the 95 % interval for other seeds, NaN with one seed; and ``bound``. ``bound`` is ``"below"`` where FAQD is
        ahead in its shortest budget already, in any seed, so that ``share`` is an upper bound. It is ``"above"`` where
        FAQD does not get there in its longest budget, so that ``share`` is a lower bound, and ``"open"`` where seeds
        differ in this. The interval is then NaN.
    """
    study = suite.profile.study
    curves: dict[str, list[tuple[int, list[float]]]] = {}  # of FAQD: updates and accuracies, by bits
    goals: list[tuple[str, int, str, list[float]]] = []  # bits, updates, arm and its accuracies
    for name, cells in study.cells.items():
        place = _place(suite, name, cells)
        if not cells.has_own(set()) or place["images"] != suite.state.training_count:
            continue
        for arm in cells.arms:
            if found := contrast(suite, {arm: name}, {arm: 1.0}):
                if arm == TAUGHT:
                    curves.setdefault(place["weight_bits"], []).append((place["updates"], found.values))
                elif TAUGHT in study.arms and _is_rival(study, arm):
                    goals.append((place["weight_bits"], place["updates"], arm, found.values))
    rows = []
    for bits, updates, arm, values in sorted(goals, key=lambda goal: goal[:2]):
        curve = sorted(curves.get(bits, ()))
        if len(curve) < 2:
            continue
        seeds = min(len(values), *(len(fa) for _, fa in curve))
        found = [_updates_to(values[seed], [(count, fa[seed]) for count, fa in curve]) for seed in range(seeds)]
        bounds = {bound for _, bound in found if bound}
        share = Estimate.of([math.log(count / updates) for count, _ in found])
        low, high = share.interval() if seeds > 1 and not bounds else (float("nan"),) * 2
        rows.append(
            {
                "weight_bits": bits, "arm": arm, "updates": updates, "n": seeds, "share": math.exp(share.mean),
                "low": math.exp(low), "high": math.exp(high),
                "bound": bounds.pop() if len(bounds) == 1 else "open" if bounds else "",
            }
        )  # fmt: skip
    return pd.DataFrame(rows, columns=["weight_bits", "arm", "updates", "n", "share", "low", "high", "bound"])


def _is_rival(study: Study, arm: str) -> bool:
    """Whether an arm is KD that differs from FAQD in nothing but its losses and learning rate."""
    settings, taught = study.arms[arm], study.arms[TAUGHT]
    same = ("labels", "regime", "activation_bits", "step_gradient", "epochs")
    return settings.method == "KD" and all(getattr(settings, name) == getattr(taught, name) for name in same)


def _updates_to(accuracy: float, curve: list[tuple[int, float]]) -> tuple[float, str]:
    """Updates at which a curve of (updates, accuracy) first reaches an accuracy.

    Returns:
        The number of updates and ``""``; or the curve's first budget and ``"below"``, or its last one and ``"above"``.
    """
    if curve[0][1] >= accuracy:
        return curve[0][0], "below"
    for (before, low), (after, high) in pairwise(curve):
        if low < accuracy <= high:
            share = (accuracy - low) / (high - low)
            return before * (after / before) ** share, ""
    return curve[-1][0], "above"


_PLACE = ("weight_bits", "images", "updates")


def _place(suite: Suite, name: str, cells: Cells) -> dict[str, object]:
    """What tells cells from others: bits, images and updates of their runs."""
    run = next(iter(suite.study_runs(name, suite.profile.study.first_seed).values()))
    images = run.training_images or suite.state.training_count
    return {
        "cells": name,
        "weight_bits": "/".join(map(str, cells.weight_bits)),
        "images": images,
        "updates": run.optimization.steps(images // run.optimization.batch_size),
    }


def _compared(suite: Suite) -> dict[str, Cells]:
    """The groups of the profile's own networks and images that have both arms."""
    return {name: cells for name, cells in suite.profile.study.cells.items() if cells.has_own({BASE, TAUGHT})}


def _spread(estimate: Estimate, name: str) -> dict[str, float]:
    low, high = estimate.interval() if estimate.seeds > 1 else (float("nan"),) * 2
    return {name: estimate.mean, "low": low, "high": high}


def arms_table(suite: Suite) -> Table:
    """The table of :func:`arms_frame`."""
    frame = arms_frame(suite)
    shows = suite.profile.shows_results

    def shown(row) -> dict[str, object]:
        interval = "needs 2 seeds" if math.isnan(row.low) else f"{row.low:.2f} to {row.high:.2f}"
        return {
            "cells": row.cells, "weight bits": row.weight_bits, "images": f"{row.images:,}",
            "updates": f"{row.updates:,}", "arm": row.arm, "n (seeds)": row.n,
            f"{suite.metric} (%)": f"{row.accuracy:.2f}" if shows else NOT_A_RESULT,
            "95 % interval": interval if shows else "",
            "affinity loss": "" if math.isnan(row.affinity) or not shows else f"{row.affinity:.4g}",
            RUNS: row.runs,
        }  # fmt: skip

    caption = (
        f"Arms of the study {suite.profile.name} (design {suite.profile.design_digest}) on {suite.caption}. Last-epoch "
        f"test {suite.metric}, mean over complete seeds, with the 95 % interval for other seeds and other test images. "
        "Affinity loss: exact, on test images, geometric mean."
    )
    rows = pd.DataFrame([shown(row) for row in frame.itertuples()])
    return with_origin(suite, Table("arms", f"Arms, {suite.dataset}", caption, rows))


def reach_table(suite: Suite, step: StepRatio | None = None) -> Table:
    """The table of :func:`reach_frame`.

    Args:
        suite: of a study.
        step: measured elsewhere. With it, the table has the share of time, which is the share of updates times the
            ratio; both intervals are joined as those of independent factors. Times of the study's own runs are not
            used: their machine may have been busy.
    """
    shows = suite.profile.shows_results

    def shown(row) -> dict[str, object]:
        share = row.bound if row.bound == "open" else f"{row.bound} {row.share:.2f}".strip()
        interval = "" if math.isnan(row.low) else f"{row.low:.2f} to {row.high:.2f}"
        found = {
            "weight bits": row.weight_bits, "arm": row.arm, "its updates": f"{row.updates:,}", "n (seeds)": row.n,
            "FAQD's updates / its": share if shows else NOT_A_RESULT, "95 % interval": interval if shows else "",
        }  # fmt: skip
        if step is not None and shows:
            time = row.share * step.ratio
            found["FAQD's time / its"] = row.bound if row.bound == "open" else f"{row.bound} {time:.2f}".strip()
            # Half-widths on the logarithmic axis; NaN where the updates have no interval.
            below = math.hypot(math.log(row.share / row.low), math.log(step.ratio / step.low))
            above = math.hypot(math.log(row.high / row.share), math.log(step.high / step.ratio))
            found["95 % interval of time"] = (
                "" if math.isnan(below) else f"{time * math.exp(-below):.2f} to {time * math.exp(above):.2f}"
            )
        return found

    caption = (
        f"Updates that FAQD needs for the accuracy of an arm of KD, study {suite.profile.name} on {suite.caption}. "
        "Interpolated over the logarithm of updates, seed by seed; geometric mean, 95 % interval for other seeds."
    )
    if step is not None:
        caption += (
            f" A step with FA takes {step.ratio:.2f} times as long as one without. The interval of time takes updates "
            "and steps as independent."
        )
    rows = pd.DataFrame([shown(row) for row in reach_frame(suite).itertuples()])
    return Table("updates_to_accuracy", f"Updates to an accuracy, {suite.dataset}", caption, rows)
