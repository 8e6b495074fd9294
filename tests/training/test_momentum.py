"""The update of weights: the bits of ``torch.optim.SGD``."""

import pytest
import torch

from faqd_lib.training.momentum import Group, NesterovSGD


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_an_update_has_the_bits_of_torch(momentum):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator) for size in ((3, 4), (5,), (2,), (7,))]
    ours, theirs = ([value.clone().requires_grad_() for value in values] for _ in range(2))
    optimizer = NesterovSGD([Group(ours[:2], 0.1), Group(ours[2:], 0.0)], 0.1, momentum)
    groups = [{"params": theirs[:2], "weight_decay": 0.1}, {"params": theirs[2:], "weight_decay": 0.0}]
    reference = torch.optim.SGD(groups, lr=0.1, momentum=momentum, nesterov=momentum > 0)
    for step in range(4):
        optimizer.rate = rate = 0.1 / (1 + step)
        for group in reference.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        reference.zero_grad()
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(values[index].shape, generator=generator)
            for parameter in pair:
                if index + step != 2:  # each of the first three is left out once
                    parameter.grad = gradient.clone()
        optimizer.step()
        reference.step()
        for mine, other, begun in zip(ours, theirs, values, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)
            assert step == 0 or not torch.equal(mine, begun)
    assert len(optimizer.buffers) == (4 if momentum else 0)
