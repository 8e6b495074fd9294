"""The paper's claims, each compared on paired runs, with a verdict from a rule that was written down before.

Rule. The runs of both sides are paired: same bits, regime, teacher and seed (so the same batches). Pairs of one seed
share their batches, their teacher and the test images, so they are not independent: their differences of last-epoch
test accuracy (percentage points) are averaged, and each seed counts once. d is the mean over n seeds, with Student's
95 % confidence interval. With the claim's margin m (0 for "better", 0.5 for "as good as"):

    reproduced       if the whole interval lies above −m
    not reproduced   if the whole interval lies below −m
    inconclusive     otherwise, and always with fewer than 3 seeds

How many of the pairs lie above −m is shown beside it. Only the profile's own runs are looked at. A profile whose
numbers mean nothing (smoke) gets no verdict.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
from scipy import stats

from . import experiments
from .quantizers import FLOAT_BITS
from .suite import Suite
from .tables import NOT_A_RESULT, NOT_RUN, Table, runs_frame

REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not reproduced", "inconclusive at this scale"
MARGIN_AS_GOOD = 0.5
FEWEST_SEEDS = 3
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


def _end_to_end(frame: pd.DataFrame) -> pd.Series:
    """Fine-tuning starts from weights that have seen labels: no test of learning without them."""
    return frame["regime"] == "end-to-end"


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
        "FAQD label-free − labels only, end to end",
        lambda f: _is(f, "FAQD", False) & _end_to_end(f),
        lambda f: (f["method"] == "labels") & _end_to_end(f),
        MARGIN_AS_GOOD,
        tuple(PAIRING),
    ),
    Claim(
        "Label-free equals or beats distillation with labels",
        "FAQD label-free − FAQD with labels, end to end",
        lambda f: _is(f, "FAQD", False) & _end_to_end(f),
        lambda f: _is(f, "FAQD", True) & _end_to_end(f),
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
    """(verdict, lower and upper end of the 95 % interval of the mean), from one difference a seed; see the rule above.

    The interval is (NaN, NaN) with fewer than two differences.
    """
    series = pd.Series(differences, dtype=float)
    if len(series) < 2:
        return INCONCLUSIVE, float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(series) - 1) * series.std(ddof=1) / len(series) ** 0.5
    low, high = series.mean() - half, series.mean() + half
    if len(series) >= FEWEST_SEEDS and low > -margin:
        return REPRODUCED, low, high
    if len(series) >= FEWEST_SEEDS and high < -margin:
        return NOT_REPRODUCED, low, high
    return INCONCLUSIVE, low, high


def paired_differences(frame: pd.DataFrame, claim: Claim) -> pd.DataFrame:
    """One row a pair: seed and difference of last-epoch accuracy. Runs without a partner are left out."""
    if frame.empty:
        return pd.DataFrame({"seed": [], "difference": []})
    keys, quantized = list(claim.pairing), frame["weight_bits"] < FLOAT_BITS
    better = frame[claim.better(frame) & quantized]
    worse = frame[claim.worse(frame) & quantized]
    # A run on labels alone has no teacher: it meets the students of every teacher.
    joined = better.merge(worse, on=keys, suffixes=("", "_other"), validate="many_to_one")
    return pd.DataFrame({"seed": joined["seed"], "difference": joined["last"] - joined["last_other"]})


def table(suite: Suite) -> Table:
    """One row a claim: what was compared, measured difference, interval, pairs, seeds, verdict."""
    records = [record for record in map(suite.store.record, experiments.everything(suite)) if record is not None]
    frame = runs_frame(records)
    if len(frame):
        frame = frame[frame["variant"] == ""].copy()  # claims are about the paper's own quantizers
        losses = suite.profile.losses
        default = {"end-to-end": losses.end_to_end_logit_loss, "fine-tuning": losses.fine_tuning_logit_loss}
        frame["default_loss"] = (frame["logit_loss"] == frame["regime"].map(default)) | (frame["method"] == "labels")
    rows = []
    for claim in CLAIMS:
        pairs = paired_differences(frame, claim)
        by_seed = pairs.groupby("seed")["difference"].mean().tolist()
        word, low, high = verdict(by_seed, claim.margin)
        row = {"claim": claim.statement, "compared": claim.compared, "margin": f"{claim.margin:g}"}
        if not by_seed:
            row |= {"difference": NOT_RUN, "95 % interval": "", "pairs above −margin": "", "verdict": NOT_RUN}
        elif not suite.profile.shows_results:
            row |= dict.fromkeys(("difference", "95 % interval", "pairs above −margin", "verdict"), NOT_A_RESULT)
        else:
            above = int((pairs["difference"] > -claim.margin).sum())
            row |= {
                "difference": f"{sum(by_seed) / len(by_seed):+.2f}",
                "95 % interval": "" if len(by_seed) < 2 else f"{low:+.2f} to {high:+.2f}",
                "pairs above −margin": f"{above} of {len(pairs)}",
                "verdict": word,
            }
        rows.append({**row, "n (seeds)": str(len(by_seed))})
    caption = (
        f"Claims of the paper on {suite.caption}; {suite.profile.seeds} seed(s). Difference of last-epoch test "
        "accuracy in percentage points over pairs of runs (same bits, regime, teacher, seed), averaged within a seed; "
        "Student's 95 % interval over n seeds. Reproduced: interval above −margin; not reproduced: below; else, or "
        f"with n < {FEWEST_SEEDS}, inconclusive. All runs share one teacher of each kind and the same "
        f"{suite.state.test_count:,} test images: the interval speaks of these."
    )
    return Table("claims", f"Claims, {suite.dataset}", caption, pd.DataFrame(rows))
