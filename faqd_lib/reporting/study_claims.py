"""The claims of a study, judged on complete seeds by the rule of :mod:`faqd_lib.reporting.verdicts`.

What is compared, when, and with which margins is in the design (:mod:`faqd_lib.runs.study`); nothing else changes a
verdict. A seed counts for a claim if all its runs of the claim's arms are finished.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..config import RunConfig
from ..runs.store import RunRecord
from ..runs.study import PlannedClaim
from ..runs.suite import Suite
from . import verdicts
from .segmentation import answers, chance
from .tables import NOT_A_RESULT, NOT_RUN, RUNS, Table, with_origin
from .verdicts import Estimate, Hypothesis, Ruling

STATED_EFFECTS = (0.3, 0.5, 1.0)  # percentage points, for the number of seeds that would show them
NO_LOOK, LEARNED_NOTHING = "no look yet", "no verdict: a run learned nothing"
LOGARITHM = ", log of the affinity loss; interval for other seeds only"
ASSAY = "assay of {}"  # name of the estimates that a claim builds on


@dataclass(frozen=True)
class Measured:
    """A run of a study, with its answers on the N test images."""

    record: RunRecord
    right: np.ndarray  # (N,), shares of images in the accuracy or mean IoU; see segmentation.answers
    surprise: np.ndarray  # (N,), −log of the true class's probability, in nats; of pixels, their mean
    chance: float  # percent, without a look at the images; see segmentation.chance

    def endpoint(self, name: str) -> float:
        """``accuracy`` or mean IoU: percent after the last epoch. ``affinity``: natural log of the exact test loss."""
        return self.record.last_accuracy if name == "accuracy" else math.log(self.record.test_affinity)


@dataclass(frozen=True)
class Contrast:
    """A contrast over the complete seeds, in planned order.

    Args:
        values: one value a seed: accuracy or mean IoU in percentage points, or the logarithm of the affinity loss.
        right: (seeds, test images), the contrast of the images' shares in accuracy or mean IoU. None for the affinity
            loss.
        surprise: (seeds, test images), the contrast of cross-entropy in nats.
        records: the runs behind the contrast.
        dead: for each seed, the names of the runs that learned nothing.
    """

    values: list[float]
    right: np.ndarray | None
    surprise: np.ndarray
    records: list[RunRecord]
    dead: list[list[str]]

    @property
    def runs(self) -> list[str]:
        """Names of the runs behind the contrast."""
        return [record.run_id for record in self.records]

    def estimate(self, seeds: int | None = None) -> Estimate:
        """Estimate of the endpoint from the first ``seeds`` seeds; None for all."""
        return Estimate.of(self.values[:seeds], None if self.right is None else self.right[:seeds])

    def cross_entropy(self) -> Estimate:
        """Estimate of cross-entropy in nats, from all seeds; below 0 where the side of positive weights is better."""
        return Estimate.of(self.surprise.mean(1), self.surprise, scale=1)


def contrast(
    suite: Suite, cells: Mapping[str, str], weights: Mapping[str, float], endpoint: str = "accuracy"
) -> Contrast | None:
    """Measure a contrast on complete seeds; None if no seed is complete.

    Seeds are taken in planned order, up to the first that is not complete.

    Args:
        suite: of the study.
        cells: for each arm, the name of its cells.
        weights: of the arms.
        endpoint: see :meth:`Measured.endpoint`.
    """
    values, right, surprise, records, dead = [], [], [], [], []
    for seed in suite.profile.study.seeds:
        found = {arm: _arm(suite, cells[arm], arm, seed) for arm in weights}
        if any(measured is None for measured in found.values()):
            break
        everything = [run for measured in found.values() for run in measured]
        most = max(run.record.last_accuracy for run in everything)
        records += [run.record for run in everything]
        least = max(2 * everything[0].chance, most / 2)  # twice chance, half of the best partner
        dead.append([run.record.run_id for run in everything if run.record.last_accuracy < least])
        share = {arm: weight / len(found[arm]) for arm, weight in weights.items()}
        values.append(sum(share[arm] * run.endpoint(endpoint) for arm in weights for run in found[arm]))
        right.append(sum(share[arm] * run.right for arm in weights for run in found[arm]))
        surprise.append(sum(share[arm] * run.surprise for arm in weights for run in found[arm]))
    by_image = np.array(right) if endpoint == "accuracy" else None
    return Contrast(values, by_image, np.array(surprise), records, dead) if values else None


def _arm(suite: Suite, cells: str, arm: str, seed: int) -> list[Measured] | None:
    """The runs of an arm and seed, one a bit-width; None if one is missing."""
    runs = [_measured(suite, config) for (name, _), config in suite.study_runs(cells, seed).items() if name == arm]
    return runs if runs and all(runs) else None


def _measured(suite: Suite, config: RunConfig) -> Measured | None:
    record = suite.store.record(config)
    if record is None:
        return None
    kept = suite.store.predictions(record)
    return Measured(record, answers(kept), -kept["log_probability"].float().numpy(), chance(kept))


def all_contrasts(suite: Suite) -> dict[str, tuple[Contrast | None, Contrast | None]]:
    """The contrast of each claim and that of its assay, by the claim's name; None without a complete seed."""
    study, found = suite.profile.study, {}
    for name, claim in study.claims.items():
        cells = {arm: study.where(claim, arm) for arm in claim.contrast | claim.assay}
        assay = contrast(suite, cells, claim.assay) if claim.assay else None
        found[name] = contrast(suite, cells, claim.contrast, claim.endpoint), assay
    return found


def open_cells(suite: Suite) -> set[str]:
    """Names of the groups of cells with a claim that the looks so far leave open and that later seeds can settle.

    A claim with a run that learned nothing among the first look's seeds is left out: no look can give it a verdict.
    """
    study, found = suite.profile.study, all_contrasts(suite)
    rulings = judge(suite, found)
    return {
        cells
        for name, claim in study.claims.items()
        if rulings[name].verdict in (verdicts.INCONCLUSIVE, verdicts.NOT_TESTABLE)
        and not any(each is not None and any(each.dead[: study.looks[0]]) for each in found[name])
        for cells in (claim.cells, claim.reference)
        if cells is not None
    }


def judge(suite: Suite, found: Mapping[str, tuple[Contrast | None, Contrast | None]]) -> dict[str, Ruling]:
    """Judge all claims of the design, family by family.

    Args:
        suite: of the study.
        found: by claim, its contrast and that of its assay.
    """
    study, rulings = suite.profile.study, {}
    for family in dict.fromkeys(claim.family for claim in study.claims.values()):
        claims = {name: claim for name, claim in study.claims.items() if claim.family == family}
        hypotheses = [
            Hypothesis(name, assay=ASSAY.format(name))
            if claim.assay
            else Hypothesis(name, claim.margin, claim.equivalence if claim.endpoint == "accuracy" else None)
            for name, claim in claims.items()
        ]
        looks = [_at_look(claims, found, seeds) for seeds in study.looks]
        while looks and not looks[-1]:
            looks.pop()
        rulings |= verdicts.judge(hypotheses, looks, study.looks)
    return rulings


def _at_look(claims: Mapping[str, PlannedClaim], found: Mapping, seeds: int) -> dict[str, Estimate]:
    """Estimates of the claims that have so many complete seeds, none of them with a run that learned nothing."""
    estimates = {}
    for name in claims:
        for key, measured in zip((name, ASSAY.format(name)), found[name], strict=True):
            if measured is not None and len(measured.values) >= seeds and not any(measured.dead[:seeds]):
                estimates[key] = measured.estimate(seeds)
    return estimates


def table(suite: Suite) -> Table:
    """One row a claim of the study: contrast, estimate, interval, look, level, verdict and second endpoint."""
    study = suite.profile.study
    found = all_contrasts(suite)
    rulings = judge(suite, found)
    rows, dead = [], set()
    for name, claim in study.claims.items():
        measured, assay = found[name]
        row = {
            "claim": claim.statement,
            "contrast": _words(claim.contrast) + (LOGARITHM if claim.endpoint == "affinity" else ""),
            "margin": "half of FA's effect" if claim.assay else f"{claim.margin:g}",
            "n (seeds)": f"{len(measured.values) if measured else 0} of {study.looks[-1]}",
        }
        if measured is None:
            rows.append({**row, "difference": NOT_RUN, "verdict": NOT_RUN, "family": claim.family, RUNS: ""})
            continue
        dead |= {run for each in (measured, assay) if each is not None for seed in each.dead for run in seed}
        shown = suite.profile.shows_results
        numbers = dict.fromkeys(_NUMBERS, NOT_A_RESULT)
        if shown:
            numbers = _numbers(measured, assay, rulings[name]) | _verdict(
                measured, assay, rulings[name], study.looks[0]
            )
        behind = dict.fromkeys([*measured.runs, *(assay.runs if assay else ())])
        rows.append({**row, **numbers, "family": claim.family, RUNS: " ".join(behind)})
    looks = " and ".join(map(str, study.looks))
    own = suite.profile.teacher_per_seed
    teachers = (
        "each with its own teacher" if own else "all with one teacher, so that intervals are not for other teachers"
    )
    caption = (
        f"Claims of the study {suite.profile.name} (design {suite.profile.design_digest}) on {suite.caption}. "
        f"Contrasts of last-epoch test {suite.metric} in percentage points, on complete seeds, {teachers}; "
        "where the contrast says so, of the natural logarithm of the exact affinity loss on test images. "
        f"95 % interval for other seeds and, of {suite.metric}, other test images. Looks at {looks} seeds, Holm's "
        "procedure over each family. The level is that of one side."
        + (f" Learned nothing: {', '.join(sorted(dead))}. A look with such runs gives no verdict." if dead else "")
    )
    return with_origin(suite, Table("claims", f"Claims, {suite.dataset}", caption, pd.DataFrame(rows).fillna("")))


_NUMBERS = (
    "difference", "95 % interval", "FA − KD", "cross-entropy (nats)", "look", "level", "p", "seeds for 0.3, 0.5, 1",
    "verdict",
)  # fmt: skip


def _numbers(measured: Contrast, assay: Contrast | None, ruling: Ruling) -> dict[str, str]:
    estimate, entropy = measured.estimate(), measured.cross_entropy()
    stated = STATED_EFFECTS if estimate.seeds > 1 and measured.right is not None else ()  # they are points of accuracy
    needed = [
        verdicts.seeds_for(effect, estimate.seed_variance, estimate.image_variance, ruling.level) for effect in stated
    ]
    return {
        "difference": f"{estimate.mean:+.2f}",
        "95 % interval": _interval(estimate, 2),
        "FA − KD": "" if assay is None else f"{assay.estimate().mean:+.2f} ({_interval(assay.estimate(), 2)})",
        "cross-entropy (nats)": f"{entropy.mean:+.4f} ({_interval(entropy, 4)})",
        "look": str(ruling.look) if ruling.look else "none",
        "level": f"{ruling.level:.2g}",
        "p": f"{ruling.p:.2g}" if ruling.look else "",
        "seeds for 0.3, 0.5, 1": ", ".join("–" if n is None else str(n) for n in needed),
    }


def _verdict(measured: Contrast, assay: Contrast | None, ruling: Ruling, first: int) -> dict[str, str]:
    """The verdict, or why there is none. The first look has ``first`` seeds."""
    if ruling.look:
        return {"verdict": ruling.verdict}
    dead = any(any(each.dead[:first]) for each in (measured, assay) if each is not None)
    return {"verdict": LEARNED_NOTHING if dead and len(measured.values) >= first else NO_LOOK}


def _interval(estimate: Estimate, digits: int) -> str:
    if estimate.seeds < 2:
        return "needs 2 seeds"
    low, high = estimate.interval()
    return f"{low:+.{digits}f} to {high:+.{digits}f}"


def _words(weights: Mapping[str, float]) -> str:
    """``fa − kd``, ``ffa − 0.5 fa − 0.5 kd``."""
    parts = [
        f"{'−' if weight < 0 else '+'} {'' if abs(weight) == 1 else f'{abs(weight):g} '}{arm}"
        for arm, weight in weights.items()
    ]
    return " ".join(parts).removeprefix("+ ")


def forest_frame(made: Table) -> pd.DataFrame:
    """What :func:`faqd_lib.reporting.charts.forest` draws: the claims on accuracy that have an interval.

    Args:
        made: claims, of a study or of a profile without one (:func:`faqd_lib.reporting.claims.table`).

    Returns:
        Columns ``claim``, ``mean``, ``low``, ``high``, ``margin`` and ``verdict``. A margin of half an effect is NaN.
    """
    frame = made.frame.reindex(columns=_DRAWN).astype(object).fillna("").astype(str)
    frame[["low", "high"]] = frame["95 % interval"].str.extract(r"^([+-][\d.]+) to ([+-][\d.]+)")
    frame = frame[frame["low"].notna() & ~frame["contrast"].str.endswith(LOGARITHM)]
    numbers = frame[["difference", "low", "high"]].astype(float).rename(columns={"difference": "mean"})
    margin = pd.to_numeric(frame["margin"], errors="coerce")
    return pd.concat([frame["claim"], numbers, margin, frame["verdict"]], axis="columns")


_DRAWN = ["claim", "contrast", "difference", "95 % interval", "margin", "verdict"]
