"""The paper's claims, each compared on paired runs, with a verdict from a rule that was written down before.

Rule. The runs of both sides are paired: same bits, regime, teacher and seed (so the same batches). Pairs of one seed
share their batches, their teacher and the test images, so they are not independent: their differences of last-epoch
test accuracy (percentage points) are averaged, and each seed counts once. d is the mean over n seeds.

Its 95 % confidence interval is for other seeds and other test images of the same kind. The variance of d is
s²/n + v²/N: s² the variance of the seeds' differences, v² the part of the variance between images that all seeds share
(an image's difference: right on one side, wrong on the other, averaged over pairs; both sides saw the same N images).
v² is estimated as in a two-way analysis of variance, seeds × images, from the mean squares of images less that of the
interaction, which s² holds already; Student's t has the degrees of freedom of Welch and Satterthwaite. Runs of a
version that did not keep its predictions are compared without the second term, and the caption says so. With a single
seed there is nothing to estimate s² from: the interval is then for other test images alone, says so, and is too narrow
for a verdict. With the claim's margin m (0 for "better", 0.5 for "as good as"):

    reproduced       if the whole interval lies above −m
    not reproduced   if the whole interval lies below −m
    inconclusive     otherwise, and always with fewer than 3 seeds, or if a run behind it takes all test images for
                     one class: it has learned nothing, and two such runs agree whatever they were taught

"Seeds to settle" is asked of inconclusive claims: the fewest seeds with which, if d and the variances are as measured,
the interval would lie on one side of −m with a probability of 80 %; "never" if the test images alone leave it open.
It is itself an estimate from n seeds, and a rough one.

How many of the pairs lie above −m is shown beside it. Only the profile's own runs are looked at. A profile whose
numbers mean nothing (smoke) gets no verdict.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from scipy import stats

from ..quantization.weights import FLOAT_BITS
from ..runs.store import RunRecord
from ..runs.suite import Suite
from . import grids
from .tables import NOT_A_RESULT, NOT_RUN, RUNS, Table, runs_frame, with_origin

REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not reproduced", "inconclusive at this scale"
MARGIN_AS_GOOD = 0.5
FEWEST_SEEDS = 3
MEASURED = ("difference", "95 % interval", "pairs above −margin", "seeds to settle", "verdict")
PAIRING = ["model", "weight_bits", "activation_bits", "regime", "seed"]


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
    pairing: tuple[str, ...] = (*PAIRING, "teacher", "logit_loss")


def _main(frame: pd.DataFrame) -> pd.Series:
    """Runs with the default logit loss of their regime. Only the claims on T3 look at the other loss."""
    return frame["default_loss"]


def _is(frame: pd.DataFrame, method: str, labels: bool) -> pd.Series:
    return _main(frame) & (frame["method"] == method) & (frame["labels"] == labels)


def _end_to_end(frame: pd.DataFrame) -> pd.Series:
    """Runs end to end. Fine-tuning starts from weights trained on labels, so it does not test label-free learning."""
    return frame["regime"] == "end-to-end"


def _loss_in(loss: str, regime: str) -> Callable[[pd.DataFrame], pd.Series]:
    return lambda frame: (
        (frame["logit_loss"] == loss) & (frame["regime"] == regime) & (frame["method"] == "FAQD") & ~frame["labels"]
        & (frame["activation_bits"] == FLOAT_BITS)
    )  # fmt: skip


WITHOUT_LOSS = (*PAIRING, "teacher")
CLAIMS = (
    Claim(
        "Feature affinity helps (label-free)",
        "FAQD − KD, both label-free",
        lambda frame: _is(frame, "FAQD", False),
        lambda frame: _is(frame, "KD", False),
    ),
    Claim(
        "Feature affinity helps (with labels)",
        "FAQD − KD, both with labels",
        lambda frame: _is(frame, "FAQD", True),
        lambda frame: _is(frame, "KD", True),
    ),
    Claim(
        "Label-free equals or beats training with labels only",
        "FAQD label-free − labels only, end to end",
        lambda frame: _is(frame, "FAQD", False) & _end_to_end(frame),
        lambda frame: (frame["method"] == "labels") & _end_to_end(frame),
        MARGIN_AS_GOOD,
        tuple(PAIRING),
    ),
    Claim(
        "Label-free equals or beats distillation with labels",
        "FAQD label-free − FAQD with labels, end to end",
        lambda frame: _is(frame, "FAQD", False) & _end_to_end(frame),
        lambda frame: _is(frame, "FAQD", True) & _end_to_end(frame),
        MARGIN_AS_GOOD,
    ),
    Claim(
        "FFA with k = 6 is as good as exact FA",
        "FFAQD (k = 6) − FAQD, both label-free",
        lambda frame: _is(frame, "FFAQD", False) & (frame["k"] == 6),
        lambda frame: _is(frame, "FAQD", False),
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


@dataclass(frozen=True)
class Effect:
    """A mean difference in percentage points over n seeds and N images, and the two parts of its variance.

    Args:
        mean: d.
        seeds: n.
        seed_variance: s², NaN with one seed.
        image_variance: v²/N, the variance that other test images add; 0 if unknown. With one seed, it includes the
            interaction of seed and images.
        images: N; 0 if unknown.
    """

    mean: float
    seeds: int
    seed_variance: float
    image_variance: float = 0.0
    images: int = 0

    @classmethod
    def of(cls, by_seed: Sequence[float], by_image: torch.Tensor | None = None) -> "Effect":
        """Estimate an effect.

        Args:
            by_seed: n differences in percentage points, one a seed.
            by_image: (n, N) differences between −1 and 1, one a seed and image; None if unknown.
        """
        series = pd.Series(by_seed, dtype=float)
        mean, variance = float(series.mean()), float(series.var(ddof=1))
        if by_image is None:
            return cls(mean, len(series), variance)
        cells, (n, count) = 100 * by_image.double(), by_image.shape
        if n == 1:
            return cls(mean, 1, variance, float(cells.var()) / count, count)
        of_images = cells.mean(0)
        rest = cells - cells.mean(1, keepdim=True) - of_images + cells.mean()
        interaction = rest.square().sum() / ((n - 1) * (count - 1))
        shared = float((of_images.var() - interaction / n).clamp_min(0))
        return cls(mean, n, variance, shared / count, count)

    def _error(self, seeds: int) -> tuple[float, float]:
        """Standard error and degrees of freedom for that many seeds."""
        of_seeds = self.seed_variance / seeds
        total = of_seeds + self.image_variance
        parts = of_seeds**2 / (seeds - 1)
        if self.images > 1:
            parts += self.image_variance**2 / (self.images - 1)
        return total**0.5, total**2 / parts if parts else float(seeds - 1)

    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval (low, high) in percentage points.

        With one seed it covers other test images only, and is (NaN, NaN) if the images are unknown.
        """
        if self.seeds < 2 and not self.images:
            return float("nan"), float("nan")
        error, freedom = self._error(self.seeds) if self.seeds > 1 else (self.image_variance**0.5, self.images - 1)
        half = float(stats.t.ppf(0.975, freedom)) * error
        return self.mean - half, self.mean + half

    def verdict(self, margin: float = 0.0) -> str:
        """The verdict of the rule at the head of this module."""
        low, high = self.interval()
        if self.seeds >= FEWEST_SEEDS and low > -margin:
            return REPRODUCED
        if self.seeds >= FEWEST_SEEDS and high < -margin:
            return NOT_REPRODUCED
        return INCONCLUSIVE

    def seeds_to_settle(self, margin: float = 0.0, power: float = 0.8, most: int = 1000) -> str:
        """Number of seeds with which an inconclusive claim would be settled; empty with one seed.

        Args:
            margin: of the claim, in percentage points.
            power: probability with which the interval then lies on one side of −margin.
            most: largest number that is tried.
        """
        if self.seeds < 2:
            return ""
        distance = abs(self.mean + margin)
        for seeds in range(FEWEST_SEEDS, most + 1):
            error, freedom = self._error(seeds)
            if error == 0:
                return str(FEWEST_SEEDS) if distance else "never"
            reach = stats.nct.sf(stats.t.ppf(0.975, freedom), freedom, distance / error)
            if reach >= power:
                return str(seeds)
        return f"more than {most}" if distance > 2.8 * self.image_variance**0.5 else "never"


def paired(frame: pd.DataFrame, claim: Claim) -> pd.DataFrame:
    """The pairs of a claim. Runs without a partner are left out.

    Returns:
        One row a pair, with the columns ``seed``, ``difference`` (percentage points), ``run`` and ``other``.
    """
    if frame.empty:
        return pd.DataFrame({"seed": [], "difference": [], "run": [], "other": []})
    keys, quantized = list(claim.pairing), frame["weight_bits"] < FLOAT_BITS
    better = frame[claim.better(frame) & quantized]
    worse = frame[claim.worse(frame) & quantized]
    # A run on labels only has no teacher. It is paired with the students of every teacher.
    joined = better.merge(worse, on=keys, suffixes=("", "_other"), validate="many_to_one")
    return pd.DataFrame(
        {
            "seed": joined["seed"],
            "difference": joined["last"] - joined["last_other"],
            "run": joined["run"],
            "other": joined["run_other"],
        }
    )


def effect(pairs: pd.DataFrame, right: Mapping[str, torch.Tensor | None]) -> Effect:
    """The effect over pairs.

    Args:
        pairs: of :func:`paired`.
        right: by run, which test images it classifies correctly, bool (N,); None for records without predictions.
    """
    by_seed = pairs.groupby("seed")["difference"].mean().tolist()
    if any(right[run] is None for run in {*pairs["run"], *pairs["other"]}):
        return Effect.of(by_seed)
    of_seed = [
        torch.stack([right[row.run].double() - right[row.other].double() for row in group.itertuples()]).mean(0)
        for _, group in pairs.groupby("seed")
    ]
    return Effect.of(by_seed, torch.stack(of_seed))


def table(suite: Suite) -> Table:
    """One row a claim: what was compared, measured difference, interval, pairs, seeds, verdict."""
    records = [record for record in map(suite.store.record, grids.everything(suite)) if record is not None]
    frame = runs_frame(records)
    if len(frame):
        frame = frame[frame["variant"] == ""].copy()  # claims are about the paper's own quantizers
        losses = suite.profile.losses
        default = {"end-to-end": losses.end_to_end_logit_loss, "fine-tuning": losses.fine_tuning_logit_loss}
        frame["default_loss"] = (frame["logit_loss"] == frame["regime"].map(default)) | (frame["method"] == "labels")
    right, dead = _right(suite, records)
    rows, spoiled = [], set()
    for claim in CLAIMS:
        pairs = paired(frame, claim)
        row = {"claim": claim.statement, "compared": claim.compared, "margin": f"{claim.margin:g}"}
        if pairs.empty:
            found = dict.fromkeys(MEASURED, "") | {"difference": NOT_RUN, "verdict": NOT_RUN}
        elif not suite.profile.shows_results:
            found = dict.fromkeys(MEASURED, NOT_A_RESULT)
        else:
            measured = effect(pairs, right)
            untaught = dead & {*pairs["run"], *pairs["other"]}
            spoiled |= untaught
            word = INCONCLUSIVE if untaught else measured.verdict(claim.margin)
            found = {
                "difference": f"{measured.mean:+.2f}",
                "95 % interval": _interval(measured),
                "pairs above −margin": f"{int((pairs['difference'] > -claim.margin).sum())} of {len(pairs)}",
                "seeds to settle": _seeds_to_settle(measured, claim.margin, word, bool(untaught)),
                "verdict": word,
            }
        behind = " ".join(sorted({*pairs["run"], *pairs["other"]}))
        rows.append({**row, **found, "n (seeds)": str(pairs["seed"].nunique()), RUNS: behind})
    unknown = sum(value is None for value in right.values())
    caption = (
        f"Claims of the paper on {suite.caption}; {suite.profile.seeds} seed(s). Difference of last-epoch test "
        "accuracy in percentage points over pairs of runs (same bits, regime, teacher, seed), averaged within a seed; "
        f"95 % interval for other seeds and other test images (n seeds, {suite.state.test_count:,} images). "
        "Reproduced: interval above −margin; not reproduced: below; else, or with n < "
        f"{FEWEST_SEEDS}, inconclusive. All runs share one teacher of each kind: the interval speaks of these."
        + (f" Learned nothing, one class for all test images: {_runs(len(spoiled))}; no verdict." if spoiled else "")
        + (f" Kept no predictions: {_runs(unknown)}; such intervals are for other seeds only." if unknown else "")
    )
    return with_origin(suite, Table("claims", f"Claims, {suite.dataset}", caption, pd.DataFrame(rows)))


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def _seeds_to_settle(measured: Effect, margin: float, verdict: str, untaught: bool) -> str:
    if verdict != INCONCLUSIVE:
        return ""
    if untaught:  # more seeds do not help students that learn nothing
        return "longer training first"
    return measured.seeds_to_settle(margin) or "unknown with 1 seed"


def _interval(measured: Effect) -> str:
    if measured.seeds < 2 and not measured.images:
        return "needs 2 seeds"
    low, high = measured.interval()
    return f"{low:+.2f} to {high:+.2f}" + (" (other images only: 1 seed)" if measured.seeds < 2 else "")


def _right(suite: Suite, records: Iterable[RunRecord]) -> tuple[dict[str, torch.Tensor | None], set[str]]:
    """Correctly classified test images, bool (N,), by run; and the runs that give all images one class."""
    found: dict[str, torch.Tensor | None] = {}
    dead = set()
    for record in records:
        kept = suite.store.predictions(record)
        found[record.run_id] = None if kept is None else kept["predicted"] == kept["label"]
        if kept is not None and len(kept["predicted"].unique()) == 1:
            dead.add(record.run_id)
    return found, dead
