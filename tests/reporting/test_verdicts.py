"""Verdicts: values worked out by hand, error rates and power by simulation, and properties."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from faqd_lib.reporting import verdicts
from faqd_lib.reporting.verdicts import (
    CONTRADICTED,
    INCONCLUSIVE,
    NOT_TESTABLE,
    REPRODUCED,
    Estimate,
    Hypothesis,
    cochran_critical,
    excluded,
    judge,
    midway,
    nominal_levels,
    seeds_for,
)

CLAIMS = 7
IMAGES = 10_000
DESIGNS = [(5, 8), (5,), (8,)]
REPEATS = 2000


def normal(mean, seeds=5, sd=0.33, image_sd=0.0):
    return Estimate(mean, seeds, sd**2, image_sd**2, IMAGES if image_sd else 0)


class TestEstimate:
    def test_by_hand_without_images(self):
        found = Estimate.of([1.0, 2.0, 3.0])
        assert found == Estimate(2.0, 3, 1.0)
        # Standard error 1/√3, t = 2√3 with 2 degrees of freedom: P(T > t) = ½(1 − t/√(2 + t²)).
        t = 2 * 3**0.5
        assert found.p_above(0) == pytest.approx((1 - t / (2 + t * t) ** 0.5) / 2)
        assert found.p_below(0) == pytest.approx(1 - found.p_above(0))
        assert found.p_within(5) == pytest.approx(found.p_below(5))
        assert found.interval() == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))

    def test_parts_of_the_variance_by_hand(self):
        # Images 1 and 2 differ in both seeds: (1, 0) and (1, 0) share all of it, so the interaction is 0.
        found = Estimate.of([50.0, 50.0], torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        assert (found.mean, found.seed_variance, found.images) == (50, 0, 2)
        assert found.image_variance == pytest.approx(5000 / 2)  # var of (100, 0) over N
        # The other way round in the second seed: nothing shared.
        assert Estimate.of([50.0, 50.0], np.array([[1, 0], [0, 1]])).image_variance == 0

    def test_variance_of_images_that_was_put_in_is_found(self):
        draw = np.random.default_rng(0)
        cells = draw.normal(0, 0.1, IMAGES) + draw.normal(0, 0.2, (6, IMAGES))
        found = Estimate.of((100 * cells.mean(1)).tolist(), cells)
        assert found.image_variance == pytest.approx(10**2 / IMAGES, rel=0.1)

    def test_critical_values_of_cochran(self):
        found = Estimate(1.0, 5, 0.5, 0.1, 101)  # error² = .1 + .1: half from seeds, half from images
        critical = (2.131847 + 1.660234) / 2  # of 5 %, with 4 and with 100 degrees of freedom
        assert found.interval(0.9) == pytest.approx((1 - critical * 0.2**0.5, 1 + critical * 0.2**0.5))
        p = found.p_above(0)
        assert (stats.t.isf(p, 4) + stats.t.isf(p, 100)) / 2 == pytest.approx(1 / 0.2**0.5)
        assert found.p_below(0) == pytest.approx(1 - p)
        assert found.p_beside(0) == min(p, found.p_below(0))

    def test_second_endpoint_in_nats(self):
        cells = torch.tensor([[0.1, 0.3], [0.2, 0.6]])
        found = Estimate.of(cells.mean(1).tolist(), cells, scale=1)
        assert found.mean == pytest.approx(0.3)
        assert found.image_variance == pytest.approx((0.045 - 0.01 / 2) / 2)

    def test_one_seed_has_an_interval_for_other_images_alone(self):
        assert np.isnan(Estimate.of([1.0]).interval()).all()
        found = Estimate.of([25.0], torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        assert found.interval() == pytest.approx((25 - 3.182446 * 25, 25 + 3.182446 * 25))
        assert np.isnan(found.p_above(0))

    def test_without_any_variance_the_mean_decides(self):
        found = Estimate(0.0, 5, 0.0)
        assert (found.p_above(0), found.p_below(0), found.p_within(0.5)) == (1, 1, 0)

    def test_excluded_effects_are_those_that_a_one_sided_test_rejects(self):
        found = normal(0.2, 8)
        low, high = excluded(found, 0.01)
        assert found.p_above(low) == pytest.approx(0.01)
        assert found.p_below(high) == pytest.approx(0.01)


class TestLevels:
    def test_two_looks(self):
        assert nominal_levels(0.025, (5, 8)) == pytest.approx((0.00458006, 0.02356726), rel=1e-6)
        assert nominal_levels(0.05, (5, 8)) == pytest.approx((0.01316848, 0.04601879), rel=1e-6)

    def test_one_look_spends_all(self):
        assert nominal_levels(0.025, (8,)) == (0.025,)

    @pytest.mark.parametrize("looks", [(5, 8), (6, 12), (8, 9), (5, 200)])
    @pytest.mark.parametrize("alpha", [0.05, 0.025 / 7])
    def test_both_looks_together_err_with_alpha(self, alpha, looks):
        first, second = nominal_levels(alpha, looks)
        c1, c2, root = stats.norm.isf(first), stats.norm.isf(second), (looks[0] / looks[1]) ** 0.5
        grid = np.linspace(-9, c1, 20_001) if first > 1e-15 else np.linspace(-9, 9, 20_001)
        neither = stats.norm.pdf(grid) * special.ndtr((c2 - root * grid) / (1 - root**2) ** 0.5)
        assert 1 - np.trapezoid(neither, grid) == pytest.approx(alpha, rel=1e-4)

    @pytest.mark.parametrize("looks", [(), (3,), (4, 7), (8, 5), (5, 5), (5, 8, 11)])
    def test_other_looks_are_refused(self, looks):
        with pytest.raises(ValueError, match="one or two increasing numbers of seeds from 5"):
            nominal_levels(0.025, looks)


class TestJudge:
    def test_directions_at_one_look(self):
        claims = [
            Hypothesis("up"),
            Hypothesis("down"),
            Hypothesis("open"),
            Hypothesis("good", 0.5),
            Hypothesis("bad", 0.5),
        ]
        found = judge(
            claims,
            [{"up": normal(2), "down": normal(-2), "open": normal(0.1), "good": normal(0.4), "bad": normal(-2.4)}],
            (5,),
        )
        assert [found[claim.name].verdict for claim in claims] == [
            REPRODUCED,
            CONTRADICTED,
            INCONCLUSIVE,
            REPRODUCED,
            CONTRADICTED,
        ]

    def test_ruling_by_hand(self):
        found = judge([Hypothesis("a"), Hypothesis("b")], [{"a": normal(0.6, 8)}], (8,))["a"]
        assert found.level == 0.0125  # 5 % over two claims and two sides
        assert found.p == pytest.approx(stats.t.sf(0.6 / 0.33 * 8**0.5, 7))
        assert (found.verdict, found.look, found.planned) == (REPRODUCED, 1, 8)
        assert found.interval == pytest.approx(normal(0.6, 8).interval(0.975))
        assert found.interval95 == normal(0.6, 8).interval()

    def test_rejected_claims_leave_their_share_to_the_rest(self):
        weak = normal(0.3, 8)
        assert 0.0125 < (p := weak.p_above(0)) < 0.025
        alone = judge([Hypothesis("weak"), Hypothesis("void")], [{"weak": weak, "void": normal(0, 8)}], (8,))
        after = judge([Hypothesis("weak"), Hypothesis("strong")], [{"weak": weak, "strong": normal(3, 8)}], (8,))
        assert (alone["weak"].verdict, alone["weak"].level) == (INCONCLUSIVE, 0.0125)
        assert (after["weak"].verdict, after["weak"].level, after["weak"].p) == (REPRODUCED, 0.025, p)

    def test_no_difference(self):
        claims = [Hypothesis("same", equivalence=0.5), Hypothesis("other")]
        found = judge(claims, [{"same": normal(0.05, 8), "other": normal(0, 8)}], (8,))
        assert found["same"].verdict == "no difference beyond 0.5"
        assert found["same"].level == 0.05  # a family of its own: one claim, one test
        assert found["same"].p == normal(0.05, 8).p_within(0.5)
        assert found["other"].verdict == INCONCLUSIVE

    def test_a_direction_says_more_than_no_difference(self):
        claim = [Hypothesis("tiny", equivalence=0.5)]
        assert judge(claim, [{"tiny": normal(0.2, 8, 0.1)}], (8,))["tiny"].verdict == REPRODUCED

    def test_no_difference_leaves_the_levels_of_directions(self):
        pair = [Hypothesis("a", equivalence=0.5), Hypothesis("b")]
        found = judge(pair, [{"a": normal(0, 8), "b": normal(0.1, 8)}], (8,))
        assert found["a"].verdict == "no difference beyond 0.5"
        assert found["b"].level == 0.0125

    def test_a_settled_claim_stays_settled(self):
        looks = [{"a": normal(2)}, {"a": normal(-2, 8)}]
        found = judge([Hypothesis("a")], looks, (5, 8))["a"]
        assert (found.verdict, found.look, found.level) == (REPRODUCED, 1, nominal_levels(0.025, (5, 8))[0])
        assert found.interval95 == normal(2).interval()
        looks = [{"a": normal(0, 5, 0.05)}, {"a": normal(0.3, 8, 0.05)}]
        found = judge([Hypothesis("a", equivalence=0.5)], looks, (5, 8))["a"]
        assert (found.verdict, found.look) == ("no difference beyond 0.5", 1)

    def test_the_second_look_settles_what_the_first_left(self):
        found = judge([Hypothesis("a")], [{"a": normal(0.4)}, {"a": normal(0.4, 8)}], (5, 8))["a"]
        assert (found.verdict, found.look, found.level) == (REPRODUCED, 2, nominal_levels(0.025, (5, 8))[1])

    def test_missing_claims_count(self):
        claims = [Hypothesis("a"), Hypothesis("never"), Hypothesis("later")]
        found = judge(claims, [{"a": normal(0.2)}, {"a": normal(0.2, 8), "later": normal(9, 8)}], (5, 8))
        assert found["a"].level == nominal_levels(0.025 / 2, (5, 8))[1]  # "never" and itself are left
        assert (found["later"].verdict, found["later"].look) == (REPRODUCED, 2)
        assert (found["never"].verdict, found["never"].look, found["never"].p) == (INCONCLUSIVE, 0, 1)
        assert np.isnan([*found["never"].interval, *found["never"].interval95]).all()
        gone = judge(claims, [{"a": normal(0.2)}, {}], (5, 8))["a"]
        assert (gone.look, gone.level) == (1, nominal_levels(0.025 / 3, (5, 8))[0])

    def test_three_seeds_settle_nothing(self):
        claims = [Hypothesis("a"), Hypothesis("same", equivalence=5)]
        assert {ruling.verdict for ruling in judge(claims, [], (5, 8)).values()} == {INCONCLUSIVE}
        assert {ruling.verdict for ruling in judge(claims, [{}], (5, 8)).values()} == {INCONCLUSIVE}
        with pytest.raises(ValueError, match="the look of 5 seeds have other numbers of seeds: a"):
            judge(claims, [{"a": normal(9, 3)}], (5, 8))

    def test_input_that_is_refused(self):
        with pytest.raises(ValueError, match="different names"):
            judge([Hypothesis("a"), Hypothesis("a", 0.5)], [], (5, 8))
        with pytest.raises(ValueError, match="at most 1 looks"):
            judge([Hypothesis("a")], [{}, {}], (5,))
        for wrong in (
            {"margin": -1},
            {"equivalence": 0},
            {"assay": "x", "margin": 0.5},
            {"assay": "x", "equivalence": 1},
        ):
            with pytest.raises(ValueError, match="a: "):
                Hypothesis("a", **wrong)

    def test_no_claims(self):
        assert judge([], [], (5, 8)) == {}


def three_arms(draw, seeds, cheap, full, sd=0.33):
    """Estimates of "FFA" (midway) and "FA − KD" at each look. KD is at 0; ``cheap`` and ``full`` are above it."""
    f, a, k = draw.normal([[cheap], [full], [0]], sd / 2**0.5, (3, seeds[-1]))
    return [{"FFA": Estimate.of(midway(f, a, k)[:n]), "FA − KD": Estimate.of((a - k)[:n])} for n in seeds]


class TestAssay:
    CLAIM = (Hypothesis("FFA", assay="FA − KD"),)

    def test_midway(self):
        assert midway(1.0, 1.0, 0.0) == 0.5
        assert midway(0.0, 1.0, 0.0) == -0.5

    @pytest.mark.parametrize(
        ("contrast", "assay", "verdict"),
        [(1, 2, REPRODUCED), (-1, 2, CONTRADICTED), (0, 2, INCONCLUSIVE), (1, 0, NOT_TESTABLE), (-1, -2, NOT_TESTABLE)],
    )
    def test_both_are_needed(self, contrast, assay, verdict):
        found = judge(self.CLAIM, [{"FFA": normal(contrast), "FA − KD": normal(assay)}], (5,))["FFA"]
        assert found.verdict == verdict
        assert found.interval95 == normal(contrast).interval()

    def test_without_the_assay_the_claim_is_missing(self):
        assert judge(self.CLAIM, [{"FFA": normal(9)}], (5,))["FFA"].look == 0

    @pytest.mark.parametrize("full", [0.0, 0.3, 1.0])
    def test_kd_in_the_place_of_ffa_is_not_as_good(self, full):
        draw = np.random.default_rng(1)
        found = [judge(self.CLAIM, three_arms(draw, (5, 8), 0, full), (5, 8))["FFA"].verdict for _ in range(500)]
        assert found.count(REPRODUCED) <= 0.025 * 500

    def test_without_an_effect_of_fa_nothing_is_tested(self):
        draw = np.random.default_rng(2)
        found = [judge(self.CLAIM, three_arms(draw, (5, 8), 0, 0), (5, 8))["FFA"].verdict for _ in range(2000)]
        assert found.count(NOT_TESTABLE) >= 0.97 * 2000

    def test_ffa_like_fa_is_found(self):
        draw = np.random.default_rng(3)
        found = [judge(self.CLAIM, three_arms(draw, (5, 8), 1, 1), (5, 8))["FFA"].verdict for _ in range(200)]
        assert found.count(REPRODUCED) >= 0.85 * 200


# Simulation -----------------------------------------------------------------------------------------------------------


def simulate(repeats, looks, sd, image_sd, effect=0.0, seed=0):
    """Seeds' differences (repeats, claims, seeds) whose image part is the same for all seeds."""
    draw = np.random.default_rng(seed)
    shared = draw.normal(effect, image_sd, (repeats, CLAIMS, 1)) if image_sd else effect
    return draw.normal(0, sd, (repeats, CLAIMS, looks[-1])) + shared


def mean_and_reach(values, n, image_sd, level):
    """The mean of n seeds, and how far it must be from 0 to be shown at a one-sided level, both (repeats, claims)."""
    of_seeds = values[..., :n].var(-1, ddof=1) / n
    total = of_seeds + image_sd**2
    critical = cochran_critical(level, of_seeds / total, n, IMAGES if image_sd else 0)
    return values[..., :n].mean(-1), critical * total**0.5


def estimates(values, looks, image_sd, absent=lambda look: ()):
    """One repeat (claims, seeds) as input of judge."""
    images = IMAGES if image_sd else 0
    return [
        {
            str(claim): Estimate(v[:n].mean(), n, v[:n].var(ddof=1), image_sd**2, images)
            for claim, v in enumerate(values)
            if claim not in absent(look)
        }
        for look, n in enumerate(looks)
    ]


def some_absent(look):
    """Claims 5 and 6 miss the first look, and claim 6 all."""
    return (5, 6) if look == 0 else (6,)


def errs(shown, values, looks, image_sd, alpha, missing):
    """Whether any claim of a repeat is shown, bool (repeats,): the first step of Holm.

    A level is compared in units of the effect, ``shown(mean, reach)``: faster than a p-value for each claim.
    """
    found = False
    for look, (n, level) in enumerate(zip(looks, nominal_levels(alpha / CLAIMS, looks), strict=True)):
        settled = shown(*mean_and_reach(values, n, image_sd, level))
        found = found | np.delete(settled, some_absent(look) if missing else (), axis=1).any(1)
    return found


def direction(mean, reach):
    return np.abs(mean) >= reach


def within_half_a_point(mean, reach):
    return np.abs(mean) <= 0.5 - reach


ALLOWED = 0.05 + 2.6 * (0.05 * 0.95 / REPEATS) ** 0.5


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("image_sd", [0, 0.2])
@pytest.mark.parametrize("sd", [0.33, 0.1])
@pytest.mark.parametrize("looks", DESIGNS)
class TestFamilyError:
    def test_directions(self, looks, sd, image_sd, missing):
        values = simulate(REPEATS, looks, sd, image_sd)
        wrong = errs(direction, values, looks, image_sd, 0.025, missing)
        assert wrong.mean() <= ALLOWED
        claims = [Hypothesis(str(claim)) for claim in range(CLAIMS)]
        for repeat in {*np.flatnonzero(wrong)[:5], *range(5)}:  # judge says the same
            rows = estimates(values[repeat], looks, image_sd, some_absent if missing else lambda look: ())
            shown = {ruling.verdict for ruling in judge(claims, rows, looks).values()} - {INCONCLUSIVE}
            assert bool(shown) == wrong[repeat]

    def test_equivalences_at_the_edge(self, looks, sd, image_sd, missing):
        values = simulate(REPEATS, looks, sd, image_sd, effect=0.5)
        wrong = errs(within_half_a_point, values, looks, image_sd, 0.05, missing)
        assert wrong.mean() <= ALLOWED
        claims = [Hypothesis(str(claim), equivalence=0.5) for claim in range(CLAIMS)]
        for repeat in np.flatnonzero(wrong)[:5]:
            rows = estimates(values[repeat], looks, image_sd, some_absent if missing else lambda look: ())
            # A direction at the same look goes first, so the family is asked itself.
            inside = [{name: found.p_within(0.5) for name, found in row.items()} for row in rows]
            found = verdicts._holm([claim.name for claim in claims], inside, 0.05, looks)
            assert any(test.shown for test in found.values())


@pytest.mark.parametrize("image_sd", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("looks", DESIGNS)
def test_family_error_where_both_parts_of_the_variance_count(looks, image_sd):
    values = simulate(4000, looks, 0.33, image_sd, seed=5)
    wrong = errs(direction, values, looks, image_sd, 0.025, False).mean()
    assert wrong <= 0.05 + 2.6 * (0.05 * 0.95 / 4000) ** 0.5


def test_true_effects_beside_claims_without_one():
    claims, looks, wrong = [Hypothesis(str(claim)) for claim in range(CLAIMS)], (5, 8), 0
    values = simulate(600, looks, 0.33, 0)
    values[:, :4] += 2
    for repeat in values:
        found = judge(claims, estimates(repeat, looks, 0), looks)
        wrong += any(found[str(claim)].verdict != INCONCLUSIVE for claim in range(4, CLAIMS))
    assert wrong / 600 <= 0.05 + 2.6 * (0.05 * 0.95 / 600) ** 0.5


@pytest.mark.parametrize(("image_sd", "low", "high"), [(0, 0.85, 0.95), (0.2, 0.24, 0.42)])
def test_power_at_half_a_point(image_sd, low, high):
    claims, looks, shown = [Hypothesis(str(claim)) for claim in range(CLAIMS)], (5, 8), 0
    for repeat in simulate(300, looks, 0.33, image_sd, effect=0.5):
        found = judge(claims, estimates(repeat, looks, image_sd), looks)
        shown += sum(ruling.verdict == REPRODUCED for ruling in found.values())
    assert low <= shown / (300 * CLAIMS) <= high


class TestSeedsFor:
    def test_power_is_reached_and_not_before(self):
        n = seeds_for(0.3, 0.33**2, 0.0, 0.025)
        reach = [stats.nct.sf(stats.t.isf(0.025, k - 1), k - 1, 0.3 / 0.33 * k**0.5) for k in (n - 1, n)]
        assert n == 12
        assert reach[0] < 0.8 <= reach[1]

    def test_large_effects_need_the_fewest(self):
        assert seeds_for(1.0, 0.33**2, 0.0, 0.025) == 5
        assert seeds_for(1.0, 0.0, 0.0, 0.025) == 5

    def test_images_alone_may_leave_it_open(self):
        assert seeds_for(0.3, 0.33**2, 0.12**2, 0.025) is None
        assert seeds_for(0.5, 0.33**2, 0.12**2, 0.025) < 15
        assert seeds_for(0.1, 0.33**2, 0.0, 0.025, most=20) is None


# Properties -----------------------------------------------------------------------------------------------------------

EFFECTS = st.floats(-2, 2).map(lambda mean: round(mean, 3))
ROWS = st.lists(st.tuples(EFFECTS, EFFECTS, st.sampled_from([0.05, 0.33])), min_size=1, max_size=6)


def judged(rows, looks=(5, 8), order=None, sign=1, equivalence=None):
    names = [str(claim) for claim in range(len(rows))]
    data = [
        {name: normal(sign * row[look], n, row[2]) for name, row in zip(names, rows, strict=True)}
        for look, n in enumerate(looks)
    ]
    claims = [Hypothesis(names[claim], equivalence=equivalence) for claim in order or range(len(rows))]
    return judge(claims, data, looks)


@given(ROWS, st.randoms())
def test_the_order_of_claims_does_not_matter(rows, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    assert judged(rows, order=order, equivalence=0.5) == judged(rows, equivalence=0.5)


@given(ROWS, st.tuples(EFFECTS, EFFECTS, st.just(0.33)))
def test_a_further_claim_never_helps_the_others(rows, further):
    before, after = judged(rows, (8,)), judged([*rows, further], (8,))
    assert all(after[name].level <= ruling.level for name, ruling in before.items())
    before, after = judged(rows), judged([*rows, further])
    for name, ruling in before.items():
        if after[name].verdict != INCONCLUSIVE:
            assert ruling.verdict != INCONCLUSIVE
            assert ruling.look <= after[name].look


@given(ROWS)
def test_swapped_sides_swap_the_verdict(rows):
    other = {REPRODUCED: CONTRADICTED, CONTRADICTED: REPRODUCED}
    one, two = judged(rows, equivalence=0.5), judged(rows, sign=-1, equivalence=0.5)
    for name, ruling in one.items():
        assert two[name].verdict == other.get(ruling.verdict, ruling.verdict)
        assert (two[name].p, two[name].level) == (ruling.p, ruling.level)
        assert two[name].interval == pytest.approx([-end for end in reversed(ruling.interval)])
