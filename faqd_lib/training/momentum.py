"""Stochastic gradient descent with Nesterov's momentum, by torch's own update.

``torch.optim.SGD`` calls the same update. It also imports ``torch._dynamo``, although nothing is compiled. This import
costs seconds in every process that trains.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd


class Group(NamedTuple):
    """Parameters that share a weight decay."""

    parameters: list[Tensor]
    weight_decay: float


class NesterovSGD:
    """Updates parameters with the bits of ``torch.optim.SGD(…, nesterov=True)``; without momentum, plain descent.

    Args:
        groups: every parameter once.
        rate: the learning rate; it may be set between steps. A recorded step needs a tensor on the parameters' device.
        momentum: in [0, 1).
        fused: whether one kernel updates all parameters. Of torch's updates only the fused one reads its rate from a
            tensor without waiting for the device.
    """

    def __init__(self, groups: Sequence[Group], rate: float | Tensor, momentum: float, fused: bool = False) -> None:
        self.groups, self.rate, self.momentum, self.fused = groups, rate, momentum, fused
        self.buffers: dict[Tensor, Tensor] = {}  # the momentum of each parameter that has been updated

    def zero_grad(self) -> None:
        """Remove the gradients of all parameters."""
        for group in self.groups:
            for parameter in group.parameters:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient."""
        for parameters, weight_decay in self.groups:
            moved = [parameter for parameter in parameters if parameter.grad is not None]
            if not moved:
                continue
            buffers = [self.buffers.get(parameter) for parameter in moved]
            sgd(
                moved, [parameter.grad for parameter in moved], buffers, foreach=False, fused=self.fused,
                weight_decay=weight_decay, momentum=self.momentum, lr=self.rate, dampening=0.0,
                nesterov=self.momentum > 0, maximize=False,
            )  # fmt: skip
            self.buffers |= {p: buffer for p, buffer in zip(moved, buffers, strict=True) if buffer is not None}
