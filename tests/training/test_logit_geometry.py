"""Gradients, Hessians and thresholds in logit space: by hand, and for logits that hypothesis draws."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from faqd_lib.training.logit_geometry import fisher, logit_geometry, quadratic_bounds, training_logits
from faqd_lib.training.objective import logit_kl, logit_mse


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_two_classes_by_hand():
    """t = (0, 0), z = (2 ln 3, 0), T = 2: p = (1/2, 1/2), q = (3/4, 1/4), and F(p) has the eigenvalues 0 and 1/2."""
    found = logit_geometry(rows([2 * math.log(3), 0.0]), rows([0.0, 0.0]), 2.0)
    d = 2 * math.log(3)
    expected = {
        "distance": d, "centred": d / math.sqrt(2), "spread": d, "margin": 0.0, "mse_gradient": d,
        "kl_gradient": 2 * math.sqrt(2) / 4, "kl_cosine": 1.0, "smallest": 0.5, "largest": 0.5, "rho": math.log(3),
        "fewest_kl_steps": d / math.sqrt(2) / (4 * math.sqrt(2)),
    }  # fmt: skip
    for name, value in expected.items():
        assert float(getattr(found, name)) == pytest.approx(value), name
    assert (found.near, found.may_flip) == (0.0, 1.0)  # ln 3 > 1; a margin of 0 flips at once
    assert found.matched_weight == pytest.approx(d / (2 * math.sqrt(2) / 4))


def test_three_classes_by_hand():
    """p = (1/2, 1/4, 1/4): F(p) has the eigenvalue 1/4 along (0, 1, −1) and 3/8 along (2, −1, −1)."""
    t = rows([math.log(2), 0.0, 0.0])
    torch.testing.assert_close(fisher(t, 1.0)[0], rows([4, -2, -2], [-2, 3, -1], [-2, -1, 3]) / 16)
    found = logit_geometry(t + rows([5.0, 5.0, 5.0]), t, 1.0)  # a common shift: KL sees nothing
    assert (float(found.smallest), float(found.largest)) == pytest.approx((0.25, 0.375))
    assert float(found.margin) == pytest.approx(math.log(2))
    assert float(found.kl_gradient) == pytest.approx(0, abs=1e-12)
    assert float(found.mse_gradient) == pytest.approx(2 * 5 * math.sqrt(3) / 3)
    assert (found.near, found.may_flip, bool(found.agrees)) == (1.0, 0.0, True)


def test_shares_of_missed_images_by_hand():
    """Two images with d = (3, 0) and (0, 1); only the first changes its top class."""
    mse, kl = logit_geometry(rows([3.0, 2.0], [5.0, 1.0]), rows([0.0, 2.0], [5.0, 0.0]), 1.0).missed_shares
    first = 1 / (1 + math.exp(-1)) - 1 / (1 + math.exp(2))
    second = 1 / (1 + math.exp(-5)) - 1 / (1 + math.exp(-4))
    assert mse == pytest.approx(0.9)
    assert kl == pytest.approx(first**2 / (first**2 + second**2))


def test_bounds_of_the_quadratic_by_hand():
    below, above = quadratic_bounds(rows([0.0, 1e-6, 1.0])[0])
    torch.testing.assert_close(below, rows([1.0, 1.0, 2 / math.e])[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(above, rows([1.0, 1.0, 2 * (math.e - 2)])[0], rtol=1e-4, atol=0)


logits = st.lists(st.floats(-20, 20, width=32), min_size=8, max_size=8)


@settings(max_examples=60, deadline=None)
@given(logits, logits, st.sampled_from([1.0, 4.0, 16.0]))
def test_what_the_head_of_the_module_says(student, teacher, temperature):
    z, t = rows(student, student[::-1]).requires_grad_(), rows(teacher, teacher)
    found, C, slack = logit_geometry(z, t, temperature), 8, 1e-9
    for name, loss in {"mse_gradient": logit_mse(z, t), "kl_gradient": logit_kl(z, t, temperature)}.items():
        (gradient,) = torch.autograd.grad(2 * loss, z)  # two images share a mean
        torch.testing.assert_close(getattr(found, name), gradient.norm(dim=1), rtol=1e-7, atol=1e-9)
    assert (found.kl_gradient <= torch.minimum(found.centred / 2, found.centred * 0 + math.sqrt(2) * temperature)
            + slack).all()  # fmt: skip
    assert (found.largest <= 0.5 + slack).all()
    p = (t / temperature).softmax(1)
    # Eigenvalues of F(p) and entries of p interlace.
    least = p.sort(1).values
    assert (found.smallest >= least[:, 0] - slack).all()
    assert (found.smallest <= least[:, 1] + slack).all()
    z = z.detach()
    each = torch.stack([logit_kl(z[[i]], t[[i]], temperature) for i in range(2)])
    d = z - t
    quadratic = torch.einsum("bi,bij,bj->b", d, fisher(t, temperature), d) / 2
    below, above = quadratic_bounds(found.rho)
    assert (each >= below * quadratic - slack).all()
    assert (each <= above * quadratic * (1 + 1e-9) + slack).all()
    hot = torch.stack([x.amax(1) - x.amin(1) for x in (z, t)]).amax(0) / temperature
    limit = found.centred**2 / (2 * C)
    assert (each >= torch.exp(-hot) * limit - slack).all()
    assert (each <= torch.exp(hot) * limit + slack).all()
    apart = found.centred > 1e-3  # rounding has no direction
    assert (found.kl_cosine >= 1 / torch.cosh(hot) - 1e-6)[apart].all()
    assert (found.agrees | (found.spread >= found.margin - slack)).all()
    regret = p.amax(1) - p.gather(1, z.argmax(1, keepdim=True))[:, 0]
    chain = [regret**2, 2 * each / temperature**2, found.centred**2 / (2 * temperature**2),
             found.distance**2 / (2 * temperature**2)]  # fmt: skip
    assert all((one <= other + slack).all() for one, other in itertools.pairwise(chain))


@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), 1.0, r"of one shape; got \(2, 3\) and \(2, 4\)"),
        (torch.zeros(2, 1), torch.zeros(2, 1), 1.0, "at least 2 classes"),
        (torch.zeros(2, 3), torch.zeros(2, 3), 0.0, "above 0, got 0.0"),
    ],
)
def test_other_logits_are_refused(student, teacher, temperature, message):
    with pytest.raises(ValueError, match=message):
        logit_geometry(student, teacher, temperature)


def test_training_logits_take_statistics_of_the_batch_and_leave_the_student_alone():
    student = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2, affine=False)).eval()
    teacher = nn.Flatten().train()
    batch = torch.tensor([[1.0, 0.0], [3.0, 4.0]]).view(2, 2, 1, 1)
    z, t = training_logits(student, teacher, [batch, 2 * batch])
    torch.testing.assert_close(z, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).repeat(2, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(t, torch.cat([batch, 2 * batch]).flatten(1))
    assert student[1].num_batches_tracked == 0
    assert not student.training
