"""The paper's claims, each compared on paired runs of a profile.

A profile with a study is judged by its design: see :mod:`faqd_lib.reporting.study_claims`. Without a design there is no
verdict, because which runs are averaged was not written down before. Such a comparison is exploratory:

The runs of both sides are paired: same bits, regime, teacher and seed, so the same batches. Pairs of one seed share
their batches, their teacher and the test images, so they are not independent. Their differences of last-epoch test
accuracy, in percentage points, are averaged, and each seed counts once. Estimate and interval are those of
:class:`faqd_lib.reporting.verdicts.Estimate`: for other seeds and other test images. With a single seed, the interval
is for other test images alone, says so, and is too narrow. Runs of a version that did not keep its predictions are
compared by seeds alone, and the caption says so.

How many of the pairs lie above −margin is shown beside it. Only the profile's own runs are looked at. A profile whose
numbers mean nothing (smoke) shows none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch

from ..models import is_dense
from ..quantization.weights import FLOAT_BITS
from ..runs.suite import Suite
from . import grids, study_claims
from .tables import NOT_A_RESULT, NOT_RUN, RUNS, Table, finished, runs_frame, with_origin
from .verdicts import Estimate

EXPLORATORY = "exploratory"
MARGIN_AS_GOOD = 0.5
MEASURED = ("difference", "95 % interval", "pairs above −margin", "verdict")
PAIRING = ("model", "weight_bits", "activation_bits", "regime", "seed")
WITHOUT_LOSS = (*PAIRING, "teacher")


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: some runs reach a higher accuracy than others, or one as high up to a margin.

    Args:
        statement, compared: the claim and the compared runs, in words.
        better, worse: select the rows of the runs on each side, as boolean Series.
        margin: percentage points by which ``better`` may fall short.
        pairing: columns in which both runs of a pair agree.
    """

    statement: str
    compared: str
    better: Callable[[pd.DataFrame], pd.Series]
    worse: Callable[[pd.DataFrame], pd.Series]
    margin: float = 0.0
    pairing: tuple[str, ...] = (*WITHOUT_LOSS, "logit_loss")


def _where(**values: object) -> Callable[[pd.DataFrame], pd.Series]:
    """Select the runs that have all these values."""
    return lambda frame: (frame[list(values)] == pd.Series(values, dtype=object)).all(axis="columns")


# Runs with the default logit loss of their regime. Only the claims on T3 look at the other loss.
_FAQD, _KD, _FFAQD = ({"method": method, "default_loss": True} for method in ("FAQD", "KD", "FFAQD"))
# Fine-tuning starts from weights trained on labels, so it does not test label-free learning.
_LABEL_FREE = _where(**_FAQD, labels=False, regime="end-to-end")
_T3 = {"method": "FAQD", "labels": False, "activation_bits": FLOAT_BITS}
CLAIMS = (
    Claim(
        "Feature affinity helps (label-free)", "FAQD − KD, both label-free",
        _where(**_FAQD, labels=False), _where(**_KD, labels=False),
    ),
    Claim(
        "Feature affinity helps (with labels)", "FAQD − KD, both with labels",
        _where(**_FAQD, labels=True), _where(**_KD, labels=True),
    ),
    Claim(
        "Label-free equals or beats training with labels only", "FAQD label-free − labels only, end to end",
        _LABEL_FREE, _where(method="labels", regime="end-to-end"), MARGIN_AS_GOOD, PAIRING,
    ),
    Claim(
        "Label-free equals or beats distillation with labels", "FAQD label-free − FAQD with labels, end to end",
        _LABEL_FREE, _where(**_FAQD, labels=True, regime="end-to-end"), MARGIN_AS_GOOD,
    ),
    Claim(
        "FFA with k = 6 is as good as exact FA", "FFAQD (k = 6) − FAQD, both label-free",
        _where(**_FFAQD, labels=False, k=6), _where(**_FAQD, labels=False), MARGIN_AS_GOOD,
    ),
    Claim(
        "MSE beats KL end to end", "MSE − KL, FAQD label-free, end to end",
        *(_where(**_T3, logit_loss=loss, regime="end-to-end") for loss in ("mse", "kl")), pairing=WITHOUT_LOSS,
    ),
    Claim(
        "KL beats MSE in fine-tuning", "KL − MSE, FAQD label-free, fine-tuning",
        *(_where(**_T3, logit_loss=loss, regime="fine-tuning") for loss in ("kl", "mse")), pairing=WITHOUT_LOSS,
    ),
)  # fmt: skip


def paired(frame: pd.DataFrame, claim: Claim) -> pd.DataFrame:
    """The pairs of a claim, one a row: columns ``seed``, ``difference`` (percentage points), ``run`` and ``other``.

    Runs without a partner are left out.
    """
    if frame.empty:
        return pd.DataFrame(columns=["seed", "difference", "run", "other"])
    frame = frame[frame["weight_bits"] < FLOAT_BITS]
    better, worse = frame[claim.better(frame)], frame[claim.worse(frame)]
    # A run on labels only has no teacher. It is paired with the students of every teacher.
    joined = better.merge(worse, on=list(claim.pairing), suffixes=("", "_other"), validate="many_to_one")
    joined["difference"] = joined["last"] - joined["last_other"]
    return joined.rename(columns={"run_other": "other"})[["seed", "difference", "run", "other"]]


def effect(pairs: pd.DataFrame, right: Mapping[str, torch.Tensor | None]) -> Estimate:
    """The effect over pairs, in percentage points.

    Args:
        pairs: of :func:`paired`.
        right: by run, which test images it classifies correctly, bool (N,); None for records without predictions.
    """
    by_seed = pairs.groupby("seed")["difference"].mean().tolist()
    if any(right[run] is None for run in {*pairs["run"], *pairs["other"]}):
        return Estimate.of(by_seed)
    of_seed = [
        torch.stack([right[row.run].double() - right[row.other].double() for row in group.itertuples()]).mean(0)
        for _, group in pairs.groupby("seed")
    ]
    return Estimate.of(by_seed, torch.stack(of_seed))


def table(suite: Suite) -> Table:
    """One row a claim: what was compared, measured difference, interval, pairs, seeds, verdict."""
    if suite.profile.study is not None:
        return study_claims.table(suite)
    # The paper's claims are about classifiers.
    records = [] if is_dense(suite.profile.student) else finished(suite, grids.everything(suite))
    frame = runs_frame(records)
    if len(frame):
        frame = frame[frame["variant"] == ""].copy()  # claims are about the paper's own quantizers
        losses = suite.profile.losses
        default = {"end-to-end": losses.end_to_end_logit_loss, "fine-tuning": losses.fine_tuning_logit_loss}
        frame["default_loss"] = (frame["logit_loss"] == frame["regime"].map(default)) | (frame["method"] == "labels")
    kept = {record.run_id: suite.store.predictions(record) for record in records}
    right = {run: None if found is None else found["predicted"] == found["label"] for run, found in kept.items()}
    dead = {run for run, found in kept.items() if found is not None and len(found["predicted"].unique()) == 1}
    rows, spoiled, compared, most_seeds = [], set(), set(), 0
    for claim in CLAIMS:
        pairs = paired(frame, claim)
        behind = {*pairs["run"], *pairs["other"]}
        compared, most_seeds = compared | behind, max(most_seeds, pairs["seed"].nunique())
        row = {"claim": claim.statement, "compared": claim.compared, "margin": f"{claim.margin:g}"}
        if pairs.empty:
            found = dict.fromkeys(MEASURED, "") | {"difference": NOT_RUN, "verdict": NOT_RUN}
        elif not suite.profile.shows_results:
            found = dict.fromkeys(MEASURED, NOT_A_RESULT)
        else:
            measured = effect(pairs, right)
            spoiled |= dead & behind
            found = {
                "difference": f"{measured.mean:+.2f}",
                "95 % interval": interval_text(measured),
                "pairs above −margin": f"{int((pairs['difference'] > -claim.margin).sum())} of {len(pairs)}",
                "verdict": EXPLORATORY,
            }
        rows.append({**row, **found, "n (seeds)": str(pairs["seed"].nunique()), RUNS: " ".join(sorted(behind))})
    unknown = sum(right[run] is None for run in compared)
    others = "other test images" if most_seeds == 1 else "other seeds and other test images"
    caption = (
        f"Claims of the paper on {suite.caption}; {suite.profile.seeds} seed(s). Difference of last-epoch test "
        "accuracy in percentage points over pairs of runs (same bits, regime, teacher, seed), averaged within a seed; "
        f"95 % interval for {others} (n seeds, {suite.state.test_count:,} images). "
        "Exploratory: no design was written before the runs, so there is no verdict. All runs share one teacher of "
        "each kind: the interval speaks of these."
        + (f" Learned nothing, one class for all test images: {_runs(len(spoiled))}." if spoiled else "")
        + (f" Kept no predictions: {_runs(unknown)}; such intervals are for other seeds only." if unknown else "")
    )
    return with_origin(suite, Table("claims", f"Claims, {suite.dataset}", caption, pd.DataFrame(rows)))


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def interval_text(measured: Estimate) -> str:
    """The 95 % interval in percentage points: ``+0.41 to +1.20``, and what it is for where there is one seed."""
    if measured.seeds < 2 and not measured.images:
        return "needs 2 seeds"
    low, high = measured.interval()
    return f"{low:+.2f} to {high:+.2f}" + (" (other images only: 1 seed)" if measured.seeds < 2 else "")
