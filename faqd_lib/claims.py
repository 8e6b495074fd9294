"""The paper's claims, each compared on paired runs, with a verdict from a rule that was written down before.

Rule. The runs of both sides are paired: same bits, regime, teacher and seed (so the same batches); d is the mean
difference of last-epoch test accuracy in percentage points, and its 95 % confidence interval is Student's t over the
pairs. With the claim's margin m (0 for "better", 0.5 for "as good as"):

    reproduced       if the whole interval lies above −m
    not reproduced   if the whole interval lies below −m
    inconclusive     otherwise, and always with fewer than 3 pairs

A profile whose numbers mean nothing (smoke) gets no verdict.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
from scipy import stats

from .suite import Suite
from .tables import NOT_A_RESULT, NOT_RUN, Table, runs_frame

REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not reproduced", "inconclusive at this scale"
MARGIN_AS_GOOD = 0.5
FEWEST_PAIRS = 3
PAIRING = ["model", "weight_bits", "activation_bits", "regime", "seed"]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: runs for which ``better`` holds against runs for which ``worse`` holds."""

    statement: str
    compared: str
    better: Callable[[pd.DataFrame], pd.Series]
    worse: Callable[[pd.DataFrame], pd.Series]
    margin: float = 0.0
    pairing: tuple[str, ...] = (*PAIRING, "teacher", "logit_loss")


def _main(frame: pd.DataFrame) -> pd.Series:
    """Runs with the logit loss that the tables use in their regime; T3's other half is compared on its own."""
    return frame["default_loss"]


def _is(frame: pd.DataFrame, method: str, labels: bool) -> pd.Series:
    return _main(frame) & (frame["method"] == method) & (frame["labels"] == labels)


def _loss_in(loss: str, regime: str) -> Callable[[pd.DataFrame], pd.Series]:
    return lambda f: (
        (f["logit_loss"] == loss) & (f["regime"] == regime) & (f["method"] == "FAQD") & ~f["labels"]
        & (f["activation_bits"] == 32)
    )  # fmt: skip


WITHOUT_LOSS = (*PAIRING, "teacher")
CLAIMS = (
    Claim(
        "Feature affinity helps (label-free)",
        "FAQD − KD, both label-free",
        lambda f: _is(f, "FAQD", False),
        lambda f: _is(f, "KD", False),
    ),
    Claim(
        "Feature affinity helps (with labels)",
        "FAQD − KD, both with labels",
        lambda f: _is(f, "FAQD", True),
        lambda f: _is(f, "KD", True),
    ),
    Claim(
        "Label-free equals or beats training with labels only",
        "FAQD label-free − labels only",
        lambda f: _is(f, "FAQD", False),
        lambda f: f["method"] == "labels",
        MARGIN_AS_GOOD,
        tuple(PAIRING),
    ),
    Claim(
        "Label-free equals or beats distillation with labels",
        "FAQD label-free − FAQD with labels",
        lambda f: _is(f, "FAQD", False),
        lambda f: _is(f, "FAQD", True),
        MARGIN_AS_GOOD,
    ),
    Claim(
        "FFA with k = 6 is as good as exact FA",
        "FFAQD (k = 6) − FAQD, both label-free",
        lambda f: _is(f, "FFAQD", False) & (f["k"] == 6),
        lambda f: _is(f, "FAQD", False),
        MARGIN_AS_GOOD,
    ),
    Claim(
        "MSE beats KL end to end",
        "MSE − KL, FAQD label-free, end to end",
        _loss_in("mse", "end-to-end"),
        _loss_in("kl", "end-to-end"),
        0.0,
        WITHOUT_LOSS,
    ),
    Claim(
        "KL beats MSE in fine-tuning",
        "KL − MSE, FAQD label-free, fine-tuning",
        _loss_in("kl", "fine-tuning"),
        _loss_in("mse", "fine-tuning"),
        0.0,
        WITHOUT_LOSS,
    ),
)


def verdict(differences: list[float], margin: float = 0.0) -> tuple[str, float, float]:
    """(verdict, lower and upper end of the 95 % interval of the mean difference); see the rule at the module's head.

    The interval is (NaN, NaN) with fewer than two differences.
    """
    series = pd.Series(differences, dtype=float)
    if len(series) < 2:
        return INCONCLUSIVE, float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(series) - 1) * series.std(ddof=1) / len(series) ** 0.5
    low, high = series.mean() - half, series.mean() + half
    if len(series) >= FEWEST_PAIRS and low > -margin:
        return REPRODUCED, low, high
    if len(series) >= FEWEST_PAIRS and high < -margin:
        return NOT_REPRODUCED, low, high
    return INCONCLUSIVE, low, high


def paired_differences(frame: pd.DataFrame, claim: Claim) -> list[float]:
    """Differences of last-epoch accuracy, one a pair; runs without a partner are left out."""
    if frame.empty:
        return []
    keys = list(claim.pairing)
    better = frame[claim.better(frame) & (frame["weight_bits"] < 32)].set_index(keys)["last"]
    worse = frame[claim.worse(frame) & (frame["weight_bits"] < 32)].set_index(keys)["last"]
    # A plain label run has no teacher: several teachers' students meet the same one.
    joined = better.to_frame("better").join(worse.to_frame("worse"), how="inner")
    return (joined["better"] - joined["worse"]).tolist()


def table(suite: Suite) -> Table:
    """One row a claim: what was compared, measured difference, interval, n, verdict."""
    frame = runs_frame(suite.store.records())
    if len(frame):
        losses = suite.profile.losses
        default = {"end-to-end": losses.end_to_end_logit_loss, "fine-tuning": losses.fine_tuning_logit_loss}
        frame["default_loss"] = (frame["logit_loss"] == frame["regime"].map(default)) | (frame["method"] == "labels")
    rows = []
    for claim in CLAIMS:
        differences = paired_differences(frame, claim)
        word, low, high = verdict(differences, claim.margin)
        row = {"claim": claim.statement, "compared": claim.compared, "margin": f"{claim.margin:g}"}
        if not differences:
            row |= {"difference": NOT_RUN, "95 % interval": "", "verdict": NOT_RUN}
        elif not suite.profile.shows_results:
            row |= {"difference": NOT_A_RESULT, "95 % interval": "", "verdict": NOT_A_RESULT}
        else:
            interval = "" if len(differences) < 2 else f"{low:+.2f} to {high:+.2f}"
            mean = sum(differences) / len(differences)
            row |= {"difference": f"{mean:+.2f}", "95 % interval": interval, "verdict": word}
        rows.append({**row, "n": str(len(differences))})
    caption = (
        f"Claims of the paper on {suite.caption}; {suite.profile.seeds} seed(s). Difference of last-epoch test "
        "accuracy in percentage points, mean over n pairs of runs (same bits, regime, teacher, seed) with Student's "
        "95 % interval. Reproduced: interval above −margin; not reproduced: below; else, or with n < 3, inconclusive. "
        f"The pairs share {suite.state.test_count:,} test images and their teacher: the interval speaks of these."
    )
    return Table("claims", f"Claims, {suite.dataset}", caption, pd.DataFrame(rows))
