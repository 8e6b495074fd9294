"""Verdicts on stated hypotheses from paired differences over seeds and images, with planned looks.

Estimate. d is the mean of n seeds' differences. Its variance is s²/n + v²/N: s² the variance of the seeds' differences,
v² the part of the variance between the N images that all seeds share. Critical values are Cochran's (Cochran and Cox,
Experimental Designs, 1957): those of Student's t with n − 1 and with N − 1 degrees of freedom, weighted by the two
parts of the variance. They err on the safe side, but for far out in the tail: with 5 seeds, and nearly all variance
between seeds, a nominal level of 0.0001 is one of 0.00014. Degrees of freedom by Welch and Satterthwaite err more
there: with s = 0.33 and v/√N = 0.05, seven claims without effect would give a false verdict in 8 % of studies. Each
bound is tested one-sided.

Looks. The numbers of seeds at which the data are judged are planned, for example 5 and 8. Each test's α is spent over
them by the function of Lan and DeMets (Biometrika 1983) of O'Brien-Fleming type. A hypothesis that one look settles
stays settled. Fewer seeds than the first look settle nothing.

Families. Two families of tests are corrected by Holm (Scand. J. Statist. 1979), each at a total of 5 %. Directions:
each hypothesis is tested on both sides of −margin, each side at half its share. Equivalences: two one-sided tests show
that the effect lies within ± a stated bound. One common family would let "no difference" raise the levels of
directions. At each look a p-value is compared with that look's nominal level of its Holm share (Maurer and Bretz,
Stat. Biopharm. Res. 2013).

Verdicts.

    reproduced                 effect > −margin shown
    contradicted               effect < −margin shown
    no difference beyond m     |effect| < m shown, and no direction at that look
    not testable here          assay sensitivity demanded and not shown
    inconclusive               otherwise

Assay sensitivity. "Cheap is as good as full" means nothing where full is no better than none of it. Such a hypothesis
is judged by ``midway(cheap, full, none)`` = cheap − (full + none)/2 and the assay full − none: both must be above 0.
With none in the place of cheap the first is −(full − none)/2.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..runs.study import FEWEST_SEEDS
from ..utils.lazy import LazyModule

optimize, special, stats = (LazyModule(f"scipy.{name}") for name in ("optimize", "special", "stats"))

REPRODUCED, CONTRADICTED = "reproduced", "contradicted"
NO_DIFFERENCE = "no difference beyond {:g}"
NOT_TESTABLE, INCONCLUSIVE = "not testable here", "inconclusive"
FAMILY_ERROR = 0.05
NOWHERE = float("nan"), float("nan")
_MANY = 10_000  # images; more change no critical value that is shown


def cochran_critical(tail: ArrayLike, seed_share: ArrayLike, seeds: int, images: int) -> np.ndarray:
    """Cochran's critical value of an estimate over its standard error, exceeded with probability ``tail`` at most.

    seed_share · t(seeds − 1) + (1 − seed_share) · t(images − 1); without images, the first alone. Arrays are broadcast.
    """
    upper = 1 - np.asarray(tail, dtype=float)
    of_seeds = special.stdtrit(seeds - 1, upper)
    of_images = special.stdtrit(images - 1, upper) if images > 1 else of_seeds
    return seed_share * of_seeds + (1 - np.asarray(seed_share)) * of_images


def cochran_tail(ratio: ArrayLike, seed_share: ArrayLike, seeds: int, images: int) -> np.ndarray:
    """The tail probability for which ``ratio`` is :func:`cochran_critical`: Student's, or else found by bisection."""
    ratio = np.asarray(ratio, dtype=float)
    if images <= 1:
        return special.stdtr(seeds - 1, -ratio)
    # Student's t with the fewer degrees of freedom, and the normal distribution, bound it on both sides.
    both = special.stdtr(seeds - 1, -ratio), special.ndtr(-ratio)
    low, high = np.minimum(*both), np.maximum(*both)
    for _ in range(36):
        middle = (low + high) / 2
        too_far = cochran_critical(middle, seed_share, seeds, images) > ratio
        low, high = np.where(too_far, middle, low), np.where(too_far, high, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Estimate:
    """A mean difference over n seeds and N images, and the two parts of its variance.

    Args:
        mean: d, in percentage points for accuracy.
        seeds: n.
        seed_variance: s², NaN with one seed.
        image_variance: v²/N, the variance that other images add; 0 if unknown. With one seed, it includes the
            interaction of seed and images.
        images: N; 0 if unknown.
    """

    mean: float
    seeds: int
    seed_variance: float
    image_variance: float = 0.0
    images: int = 0

    @classmethod
    def of(cls, by_seed: Sequence[float], by_image: ArrayLike | None = None, scale: float = 100) -> "Estimate":
        """Estimate an effect.

        v² is the mean square of images less that of the interaction of seeds and images, over n, and at least 0: a
        two-way analysis of variance. s² holds the interaction already.

        Args:
            by_seed: n differences, one a seed.
            by_image: (n, N) differences, one a seed and image, array or tensor; None if unknown.
            scale: units of ``by_seed`` in one unit of ``by_image``: 100 for accuracy, 1 for cross-entropy in nats.
        """
        values = np.asarray(by_seed, dtype=float)
        n, mean = len(values), float(values.mean())
        variance = float(values.var(ddof=1)) if n > 1 else float("nan")
        if by_image is None:
            return cls(mean, n, variance)
        cells = scale * np.asarray(by_image, dtype=float)
        count = cells.shape[1]
        if n == 1:
            return cls(mean, 1, variance, float(cells.var(ddof=1)) / count, count)
        of_images = cells.mean(0)
        rest = cells - cells.mean(1, keepdims=True) - of_images + cells.mean()
        interaction = (rest**2).sum() / ((n - 1) * (count - 1))
        shared = max(float(of_images.var(ddof=1) - interaction / n), 0.0)
        return cls(mean, n, variance, shared / count, count)

    @property
    def error(self) -> float:
        """Standard error √(s²/n + v²/N); NaN with one seed."""
        return (self.seed_variance / self.seeds + self.image_variance) ** 0.5

    @property
    def _seed_share(self) -> float:
        """Part of the variance that is due to seeds, 0 to 1."""
        return self.seed_variance / self.seeds / self.error**2 if self.error else 1.0

    def _tail(self, distance: float) -> float:
        """Probability of an estimate at least ``distance`` above the true effect. At least 2 seeds."""
        if not self.error:
            return float(distance <= 0)
        return float(cochran_tail(distance / self.error, self._seed_share, self.seeds, self.images))

    def p_above(self, bound: float) -> float:
        """p-value of "the effect is at most ``bound``": small where it lies above. NaN with one seed."""
        return self._tail(self.mean - bound) if self.seeds > 1 else float("nan")

    def p_below(self, bound: float) -> float:
        """p-value of "the effect is at least ``bound``": small where it lies below. NaN with one seed."""
        return self._tail(bound - self.mean) if self.seeds > 1 else float("nan")

    def p_beside(self, bound: float) -> float:
        """The smaller of ``p_above`` and ``p_below``: small where the effect is not ``bound``. NaN with one seed."""
        return self._tail(abs(self.mean - bound)) if self.seeds > 1 else float("nan")

    def p_within(self, margin: float) -> float:
        """p-value of "the effect is ``margin`` or more from 0": the larger of two one-sided tests (TOST)."""
        return max(self.p_above(-margin), self.p_below(margin))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Two-sided confidence interval (low, high) of that level, in units of ``mean``.

        With one seed it covers other images only, and is (NaN, NaN) if the images are unknown.
        """
        tail = (1 - level) / 2
        if self.seeds > 1:
            half = self.error * float(cochran_critical(tail, self._seed_share, self.seeds, self.images))
        elif self.images:
            half = self.image_variance**0.5 * float(cochran_critical(tail, 0.0, 2, self.images))
        else:
            return NOWHERE
        return self.mean - half, self.mean + half


def excluded(estimate: Estimate, level: float) -> tuple[float, float]:
    """(x, y): effects below x and effects above y are excluded, each by a one-sided test at ``level``."""
    return estimate.interval(1 - 2 * level)


def midway(cheap: Any, full: Any, none: Any) -> Any:
    """cheap − (full + none)/2 of three numbers, arrays or tensors: above 0 if most of the effect is kept."""
    return cheap - (full + none) / 2


@dataclass(frozen=True)
class Hypothesis:
    """A claim about one effect, stated before the numbers.

    Args:
        name: of its estimates.
        margin: by how much the effect may fall short of 0; 0 for "better".
        equivalence: m > 0 of "no difference beyond m"; None if that is not asked.
        assay: name of the estimates of full − none, with ``name`` those of :func:`midway`; None if not asked.

    Raises:
        ValueError: negative margin, m not above 0, or an assay beside either.
    """

    name: str
    margin: float = 0.0
    equivalence: float | None = None
    assay: str | None = None

    def __post_init__(self) -> None:
        if self.margin < 0 or (self.equivalence is not None and self.equivalence <= 0):
            raise ValueError(f"{self.name}: margin {self.margin} and equivalence {self.equivalence} must be positive")
        if self.assay is not None and (self.margin or self.equivalence is not None):
            raise ValueError(f"{self.name}: with an assay the margin is half its effect; state no other")


@dataclass(frozen=True)
class Ruling:
    """Verdict on one hypothesis.

    Args:
        verdict: one of the five at the head of this module.
        look: 1-based index of the look that settled it, else of its last look; 0 before the first.
        level: adjusted nominal level of one side, with which ``p`` was compared.
        p: the p-value that decided, else the smaller of both directions; 1 before the first look.
        planned: seeds at the last look.
        interval: confidence interval of level 1 − 2·``level``; (NaN, NaN) before the first look.
        interval95: 95 % confidence interval, not adjusted.
    """

    verdict: str
    look: int
    level: float
    p: float
    planned: int
    interval: tuple[float, float]
    interval95: tuple[float, float]


@lru_cache(maxsize=1024)
def nominal_levels(alpha: float, looks: tuple[int, ...]) -> tuple[float, ...]:
    """One-sided nominal level at each look, such that all of them together err with probability ``alpha``.

    Spent by the fraction t of seeds: α(t) = 2 − 2Φ(z_{1−α/2}/√t). The level of the second look solves
    P(Z₁ > c₁ or Z₂ > c₂) = α, with correlation √(n₁/n₂). For α = .025 and looks (5, 8): .00458 and .02357.

    Raises:
        ValueError: other than one or two looks, not increasing, or the first below 5 seeds.
    """
    if len(looks) not in (1, 2) or looks[0] < FEWEST_SEEDS or any(b <= a for a, b in pairwise(looks)):
        raise ValueError(f"looks {looks}: expected one or two increasing numbers of seeds from {FEWEST_SEEDS}")
    if len(looks) == 1:
        return (alpha,)
    root = (looks[0] / looks[1]) ** 0.5
    first = 2 * float(stats.norm.sf(stats.norm.isf(alpha / 2) / root))
    both = stats.multivariate_normal(cov=[[1, root], [root, 1]])
    c1, c = stats.norm.isf(first), stats.norm.isf(alpha)
    c2 = optimize.brentq(lambda c2: 1 - both.cdf([c1, c2]) - alpha, c - 0.1, c + 5)
    return first, float(stats.norm.sf(c2))


@dataclass(frozen=True)
class _Test:
    """Outcome of a test in its family: last look with data, level there, p there, whether it was shown."""

    look: int
    level: float
    p: float
    shown: bool


def _holm(
    names: Iterable[str], rows: Sequence[Mapping[str, float]], alpha: float, looks: tuple[int, ...]
) -> dict[str, _Test]:
    """Holm's procedure over looks.

    Args:
        names: of all tests of the family.
        rows: p-values by name, one mapping a look reached. A missing p counts as 1.
        alpha: of the family.
        looks: planned numbers of seeds.
    """
    still = set(names)
    found = {name: _Test(0, nominal_levels(alpha / len(still), looks)[0], 1.0, False) for name in still}
    for look, row in enumerate(rows, 1):
        level = 0.0
        for name in sorted(still & row.keys(), key=lambda name: (row[name], name)):
            level = nominal_levels(alpha / len(still), looks)[look - 1]
            if row[name] > level:
                break
            found[name] = _Test(look, level, row[name], True)
            still.remove(name)
        found |= {name: _Test(look, level, row[name], False) for name in still & row.keys()}
    return found


def judge(
    claims: Sequence[Hypothesis], estimates: Sequence[Mapping[str, Estimate]], looks: Sequence[int]
) -> dict[str, Ruling]:
    """Judge all hypotheses of a design by the rule at the head of this module.

    Args:
        claims: all of the design, those without data too: they count in the correction.
        estimates: by name, one mapping a look reached, each from exactly the first ``looks[i]`` planned seeds. A name
            may be missing where runs are.
        looks: planned numbers of seeds, one or two, the first at least 5.

    Returns:
        A ruling by name, in the order of ``claims``.

    Raises:
        ValueError: names twice, looks that are not allowed or more reached than planned, an estimate of other seeds.
    """
    looks = tuple(looks)
    if len({claim.name for claim in claims}) < len(claims) or len(estimates) > len(looks):
        raise ValueError(f"expected different names and at most {len(looks)} looks, got {len(estimates)}")
    for seeds, row in zip(looks, estimates, strict=False):
        if wrong := sorted(name for name, estimate in row.items() if estimate.seeds != seeds):
            raise ValueError(f"estimates at the look of {seeds} seeds have other numbers of seeds: {', '.join(wrong)}")
    # A claim is present at a look if all that it needs is: (effect, p of its assay).
    present = [
        {
            claim.name: (row[claim.name], row[claim.assay].p_above(0) if claim.assay else 0.0)
            for claim in claims
            if claim.name in row and (claim.assay is None or claim.assay in row)
        }
        for row in estimates
    ]
    margin = {claim.name: -claim.margin for claim in claims}
    bound = {claim.name: claim.equivalence for claim in claims if claim.equivalence is not None}
    sides = [{name: max(d.p_beside(margin[name]), assay) for name, (d, assay) in row.items()} for row in present]
    inside = [{name: d.p_within(bound[name]) for name, (d, _) in row.items() if name in bound} for row in present]
    directions = _holm(margin, sides, FAMILY_ERROR / 2, looks) if claims else {}
    equivalences = _holm(bound, inside, FAMILY_ERROR, looks) if bound else {}

    def ruling(name: str) -> Ruling:
        test, other = directions[name], equivalences.get(name)
        verdict = INCONCLUSIVE
        if other and other.shown and not (test.shown and test.look <= other.look):
            test, verdict = other, NO_DIFFERENCE.format(bound[name])
        if not test.look:
            return Ruling(verdict, 0, test.level, 1.0, looks[-1], NOWHERE, NOWHERE)
        d, assay = present[test.look - 1][name]
        if verdict == INCONCLUSIVE and test.shown:
            verdict = REPRODUCED if d.mean > margin[name] else CONTRADICTED
        elif assay > test.level:
            verdict = NOT_TESTABLE
        return Ruling(verdict, test.look, test.level, test.p, looks[-1], excluded(d, test.level), d.interval())

    return {claim.name: ruling(claim.name) for claim in claims}


def seeds_for(
    effect: float,
    seed_variance: float,
    image_variance: float,
    level: float,
    power: float = 0.8,
    most: int = 1000,
) -> int | None:
    """Seeds with which an effect that was stated beforehand is shown with probability ``power`` at a single look.

    By the noncentral t distribution with n − 1 degrees of freedom, against Cochran's critical value.

    Args:
        effect: distance from the bound, above 0, in units of the estimate's mean.
        seed_variance, image_variance: s² and v²/N as in :class:`Estimate`.
        level: one-sided.
        power: between 0 and 1.
        most: largest number that is tried.

    Returns:
        5 or more, or None if ``most`` do not suffice or the images alone leave it open.
    """
    for seeds in range(FEWEST_SEEDS, most + 1):
        error = (seed_variance / seeds + image_variance) ** 0.5
        if not error:
            return seeds
        critical = float(cochran_critical(level, seed_variance / seeds / error**2, seeds, _MANY))
        if stats.nct.sf(critical, seeds - 1, effect / error) >= power:
            return seeds
        if effect < (stats.norm.isf(level) + stats.norm.ppf(power)) * image_variance**0.5:
            return None
    return None
