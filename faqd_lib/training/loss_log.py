"""The loss terms of an epoch, step by step, and the check that each is finite."""

import math
from collections.abc import Mapping

import torch


class NonFiniteLossError(ArithmeticError):
    """A loss became NaN or infinite; the message gives epoch, step and every term of the loss."""


class LossLog:
    """Loss terms of the current epoch: one row a term, one column a step.

    One tensor holds all terms, because many small tensors, kept for an epoch, would fragment the heap.
    """

    def __init__(self, steps_per_epoch: int, device: torch.device) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.names: list[str] = []
        self.steps = 0  # columns in use
        self.checked = 0  # columns known to be finite
        self._values = torch.empty(0, steps_per_epoch, device=device)

    def append(self, terms: Mapping[str, torch.Tensor]) -> None:
        """Add one step's scalars, the same terms at every step."""
        self.names = self.names or [*terms]
        values = torch.stack([terms[name] for name in self.names])
        if not self._values.numel():
            self._values = values.new_empty(len(values), self.steps_per_epoch)
        self._values[:, self.steps] = values
        self.steps += 1

    def check(self, run: str, epoch: int) -> None:
        """Check the steps since the last check; on a GPU the host waits for these steps.

        The error message names ``run`` and ``epoch``, which counts from 0.

        Raises:
            NonFiniteLossError: a term is NaN or infinite.
        """
        unchecked = self._values[:, self.checked : self.steps].T.tolist()
        for step, values in enumerate(unchecked, start=self.checked + 1):
            if not all(map(math.isfinite, values)):
                listed = ", ".join(f"{name} {value:.6g}" for name, value in zip(self.names, values, strict=True))
                raise NonFiniteLossError(
                    f"{run}: the loss is not finite in epoch {epoch + 1}, step {step} of {self.steps_per_epoch} "
                    f"({listed}). Lower the learning rate or the weight of the largest term."
                )
        self.checked = self.steps

    def means(self) -> dict[str, float]:
        """Mean of each term over the steps of this epoch."""
        return {name: float(values.mean()) for name, values in self.rows().items()}

    def rows(self) -> dict[str, torch.Tensor]:
        """The steps (steps,) of each term so far; empty before the first step."""
        return dict(zip(self.names, self._values[:, : self.steps].unbind(), strict=True)) if self.steps else {}

    def load(self, rows: Mapping[str, torch.Tensor], checked: int) -> None:
        """Take over what :meth:`rows` returned, with the number of steps that were checked."""
        self.clear()
        for values in zip(*rows.values(), strict=True):
            self.append(dict(zip(rows, values, strict=True)))
        self.checked = checked

    def clear(self) -> None:
        """Begin a new epoch."""
        self.steps = self.checked = 0
