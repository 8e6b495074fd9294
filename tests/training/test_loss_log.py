import pytest
import torch

from faqd_lib.training.clock import StepClock
from faqd_lib.training.loss_log import LossLog, NonFiniteLossError


def terms(total: float, logit: float) -> dict[str, torch.Tensor]:
    return {"total": torch.tensor(total), "logit": torch.tensor(logit)}


def test_means_are_of_the_steps_of_this_epoch():
    log = LossLog(3, torch.device("cpu"))
    assert log.means() == {}
    log.append(terms(1.0, 3.0))
    log.append(terms(2.0, 5.0))
    assert log.means() == {"total": 1.5, "logit": 4.0}
    log.clear()
    log.append(terms(7.0, 8.0))
    assert log.means() == {"total": 7.0, "logit": 8.0}


def test_a_log_goes_on_whatever_the_order_in_which_its_rows_were_kept():
    log, other = LossLog(3, torch.device("cpu")), LossLog(3, torch.device("cpu"))
    log.append(terms(1.0, 3.0))
    other.load(dict(sorted(log.rows().items())), checked=1)
    other.append(terms(2.0, 5.0))
    assert other.means() == {"logit": 4.0, "total": 1.5}
    assert (other.steps, other.checked) == (2, 1)


def test_what_is_not_finite_is_named_with_its_step():
    log = LossLog(3, torch.device("cpu"))
    log.append(terms(1.0, 3.0))
    log.check("run", 0)
    log.append(terms(float("nan"), 5.0))
    with pytest.raises(NonFiniteLossError, match=r"^run: .* epoch 2, step 2 of 3 \(total nan, logit 5\)"):
        log.check("run", 1)


def test_settled_seconds_are_scaled_once():
    clock = StepClock("cpu")
    clock.step.seconds, clock.loss.seconds = [1.0, float("nan")], [0.5]
    assert clock.unsettled() == 1.0
    clock.settle(0.5)
    clock.step.seconds.append(3.0)
    clock.settle(0.5)
    cost = clock.cost(batch_size=2)
    assert cost["training_seconds"] == 2.0 / 2 * 3  # the step that does not count is taken as an average one
    assert cost["loss_seconds"] == 0.25
    assert cost["images_per_second"] == 2 * 2 / 2.0
