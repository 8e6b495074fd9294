"""Variances from small products against the N×N definition and against draws; the other estimators of the loss."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fresh_process import run_fresh
from hypothesis import given
from hypothesis import strategies as st

from faqd_lib import affinity_statistics, feature_affinity_loss
from faqd_lib.affinity.estimators import average_pooling, hutch_plus_plus, orthogonal_probes, pixel_subset
from faqd_lib.affinity.statistics import PROBES


def maps(seed: int = 0, student=(2, 3, 4, 4), teacher=None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (student, teacher or student)
    )


def differences(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """(batch, N, N): D of every image, from the definition."""
    x, y = (F.normalize(m.flatten(2).mT, dim=2, eps=1e-6) for m in (student, teacher))
    return x @ x.mT - y @ y.mT


def traces(a: torch.Tensor) -> tuple[float, float, float]:
    return float(a.trace()), float((a @ a).trace()), float(a.diagonal().square().sum())


shape = st.tuples(*(st.integers(1, most) for most in (3, 4, 4, 5)))


@given(shape, st.integers(1, 6), st.integers(0, 2**31))
def test_traces_equal_those_of_the_matrix(shape, teacher_channels, seed):
    student, teacher = maps(seed, shape, (shape[0], teacher_channels, *shape[2:]))
    statistics = affinity_statistics(student, teacher)
    d = differences(student, teacher)
    squares = d @ d
    for image, square in enumerate(squares):
        found = [
            float(t[image]) for t in (statistics.images.trace, statistics.images.square, statistics.images.diagonal)
        ]
        assert found == pytest.approx(traces(square), rel=1e-9, abs=1e-12)
    batch = [float(t) for t in (statistics.batch.trace, statistics.batch.square, statistics.batch.diagonal)]
    assert batch == pytest.approx(traces(squares.mean(0)), rel=1e-9, abs=1e-12)
    assert statistics.loss == pytest.approx(float(feature_affinity_loss(student, teacher)), rel=1e-9, abs=1e-14)
    assert statistics.pixels == shape[2] * shape[3]
    assert statistics.variance(1, "rademacher") <= statistics.variance(1, "gaussian")


def test_the_batch_through_either_gram_matrix():
    # Two images of 40 pixels with 3 + 3 channels: 12 columns < 40 pixels; forty images: 240 columns > 40 pixels.
    for images in (2, 40):
        student, teacher = maps(1, (images, 3, 8, 5))
        d = differences(student, teacher)
        expected = float((d @ d).mean(0).square().sum())
        assert float(affinity_statistics(student, teacher).batch.square) == pytest.approx(expected, rel=1e-10)


def draw(estimator, student, teacher, budget, count) -> np.ndarray:
    generator = torch.Generator().manual_seed(budget)
    return np.array([float(estimator(student, teacher, budget, generator)) for _ in range(count)])


def projected(distribution):
    def estimator(student, teacher, k, generator):
        return feature_affinity_loss(
            student, teacher, "projection", k=k, distribution=distribution, generator=generator
        )

    return estimator


PROBE_ESTIMATORS = {
    "gaussian": projected("gaussian"), "rademacher": projected("rademacher"), "orthogonal": orthogonal_probes
}  # fmt: skip


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("probes", PROBES)
def test_variance_is_that_of_draws_for_a_batch(probes, k):
    student, teacher = maps(2, (3, 3, 3, 4))
    statistics = affinity_statistics(student, teacher)
    # 1500 draws: the variance of a sample variance is about 2/1500 of its square, or more for heavy tails: 5 % to 8 %.
    values = draw(PROBE_ESTIMATORS[probes], student, teacher, k, 1500)
    variance = statistics.variance(k, probes)
    assert abs(values.mean() - statistics.loss) < 4 * math.sqrt(variance / len(values))
    assert values.var() == pytest.approx(variance, rel=0.3)


def test_images_that_share_projections_vary_together():
    student, teacher = (m.repeat(5, 1, 1, 1) for m in maps(3, (1, 3, 4, 4)))
    statistics = affinity_statistics(student, teacher)
    # Five times the same image: sharing the projections, five are no better than one.
    assert statistics.variance(6) == pytest.approx(float(statistics.variance_of_images(6)[0]), rel=1e-9)


def test_relative_variance_is_two_over_the_directions():
    student, teacher = maps(4)
    statistics = affinity_statistics(student, teacher)
    assert statistics.relative_error(1) ** 2 == pytest.approx(2 / statistics.directions, rel=1e-9)
    assert 1 <= statistics.directions <= statistics.pixels


@pytest.mark.parametrize("probes", PROBES)
@given(st.floats(0.05, 1), st.floats(0.5, 0.99))
def test_projections_needed_are_the_fewest(probes, error, confidence):
    statistics = affinity_statistics(*maps(5, (2, 3, 6, 6)))
    k = statistics.projections_needed(error, confidence, probes)
    assert 1 - statistics.chebyshev_bound(error, k, probes) >= confidence - 1e-9
    if k > 1:
        assert 1 - statistics.chebyshev_bound(error, k - 1, probes) < confidence


def test_chebyshevs_bound_holds_for_draws():
    student, teacher = maps(6, (2, 3, 4, 4))
    statistics = affinity_statistics(student, teacher)
    for k in (2, 8):
        values = draw(PROBE_ESTIMATORS["gaussian"], student, teacher, k, 400)
        for error in (0.3, 0.6):
            missed = (np.abs(values - statistics.loss) > error * statistics.loss).mean()
            assert missed <= statistics.chebyshev_bound(error, k)


def test_orthogonal_probes_are_exact_when_complete():
    student, teacher = maps(7, (2, 3, 3, 3))
    exact = float(feature_affinity_loss(student, teacher))
    assert float(orthogonal_probes(student, teacher, 9)) == pytest.approx(exact, rel=1e-10)
    assert affinity_statistics(student, teacher).variance(9, "orthogonal") == 0


def test_equal_maps_have_no_error():
    student, _ = maps(8)
    statistics = affinity_statistics(student, student)
    assert statistics.relative_error(1) == 0
    assert statistics.projections_needed(0.1, 0.9) == 1


def test_one_pixel():
    statistics = affinity_statistics(*maps(9, (2, 3, 1, 1)))
    for probes in PROBES:
        assert statistics.projections_needed(0.1, 0.9, probes) == 1


@pytest.mark.parametrize("call", ["variance", "relative_error"])
def test_bad_probes_are_named(call):
    statistics = affinity_statistics(*maps(10))
    with pytest.raises(ValueError, match="'cauchy'"):
        getattr(statistics, call)(1, "cauchy")
    with pytest.raises(ValueError, match="0"):
        getattr(statistics, call)(0)
    with pytest.raises(ValueError, match="16"):
        getattr(statistics, call)(17, "orthogonal")
    with pytest.raises(ValueError, match=r"1\.5"):
        statistics.projections_needed(0.1, 1.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_maps_that_are_not_finite_are_refused(bad):
    student, teacher = maps(16)
    student[1, 2, 3, 3] = bad
    with pytest.raises(ValueError, match="NaN or an infinity"):
        affinity_statistics(student, teacher)


@pytest.mark.parametrize("k", [1.5, True])
def test_k_is_a_whole_number(k):
    with pytest.raises(TypeError, match=str(k)):
        affinity_statistics(*maps(10)).variance(k)


# ---- other estimators


@pytest.mark.parametrize(
    ("estimator", "budget"), [(orthogonal_probes, 3), (hutch_plus_plus, 8), (pixel_subset, 5), (pixel_subset, 2)]
)
@pytest.mark.parametrize("dead", [False, True])
def test_estimators_are_unbiased(estimator, budget, dead):
    student, teacher = maps(11, (2, 3, 4, 3))
    if dead:  # pixels without direction: the only ones with a diagonal
        student[:, :, 0, :2] = 0
    values = draw(estimator, student, teacher, budget, 1500)
    exact = float(feature_affinity_loss(student, teacher))
    assert abs(values.mean() - exact) < 4.5 * values.std() / math.sqrt(len(values))


@pytest.mark.parametrize(
    ("estimator", "budget"), [(orthogonal_probes, 3), (hutch_plus_plus, 8), (pixel_subset, 5), (average_pooling, 2)]
)
def test_gradients_of_estimators(estimator, budget):
    student, teacher = maps(12, (2, 3, 4, 3))
    student.requires_grad_()

    def loss(x):
        return estimator(x, teacher, budget, torch.Generator().manual_seed(1))

    if estimator is hutch_plus_plus:  # the basis counts as constant: its gradient is right on average only
        total = sum(
            torch.autograd.grad(estimator(student, teacher, budget, torch.Generator().manual_seed(s)), student)[0]
            for s in range(800)
        )
        (exact,) = torch.autograd.grad(feature_affinity_loss(student, teacher), student)
        assert ((total / 800 - exact).norm() / exact.norm()) < 0.1
    else:
        assert torch.autograd.gradcheck(loss, (student,))


def test_hutch_plus_plus_is_exact_where_the_sketch_holds_everything():
    student, teacher = maps(13, (2, 2, 5, 5))  # rank of D at most 4
    for _ in range(3):
        assert float(hutch_plus_plus(student, teacher, 16)) == pytest.approx(
            float(feature_affinity_loss(student, teacher)), rel=1e-8
        )


def test_estimators_compute_in_float32_inside_autocast():
    student, teacher = (m.float() for m in maps(17))
    for estimator, budget in ((orthogonal_probes, 3), (hutch_plus_plus, 8), (pixel_subset, 5), (average_pooling, 2)):
        values = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                values.append(estimator(student, teacher, budget, torch.Generator().manual_seed(1)))
        assert values[1].dtype == torch.float32
        assert values[0].item() == pytest.approx(values[1].item(), rel=1e-5), estimator.__name__


def test_whole_subset_and_no_pooling_are_exact():
    student, teacher = maps(14)
    student[0, :, 1, 1] = 0
    exact = float(feature_affinity_loss(student, teacher))
    assert float(pixel_subset(student, teacher, 16)) == pytest.approx(exact, rel=1e-9)
    assert float(average_pooling(student, teacher, 4)) == pytest.approx(exact, rel=1e-9)
    assert float(average_pooling(student, teacher, 2)) != pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(
    ("estimator", "budget"),
    [(orthogonal_probes, 17), (orthogonal_probes, 0), (hutch_plus_plus, 3), (pixel_subset, 1), (pixel_subset, 17),
     (average_pooling, 0)],
)  # fmt: skip
def test_bad_budgets_are_named(estimator, budget):
    with pytest.raises(ValueError, match=str(budget)):
        estimator(*maps(15), budget)


def test_training_does_not_import_the_estimators():
    done = run_fresh("import sys, faqd_lib.runs.suite; sys.exit('faqd_lib.affinity.estimators' in sys.modules)")
    assert done.returncode == 0, done.stderr
