"""Other losses between feature maps, to compare feature affinity with. Runs of the paper's tables do not import them.

Every loss is called as ``loss(student_map, teacher_map)``. Maps are floating-point, (batch, channels, height, width),
or tokens (batch, N, channels). The teacher's map is detached, and resized to the student's height and width if these
differ. The result is a scalar in float32, or in float64 for maps in float64. It is 0 if the maps agree. With F the
student's map and G the teacher's:

    ``sp``       ‖A_F − A_G‖²_F / b², A the b×b products of whole images, with rows of length 1
    ``at``       mean over images and pixels of (a_F − a_G)², a the mean of squares over channels, scaled to length 1
    ``hint``     mean of (F − G)²
    ``cka``      1 − ‖GᵀF‖²_F / (‖FᵀF‖_F ‖GᵀG‖_F) of centred images
    ``channel``  T²/(b·C) Σ over images and channels of KL(softmax(G/T) ‖ softmax(F/T)), the softmax over pixels
    ``squat``    mean of (F − Q(G))², Q the rounding to the student's own lattice
"""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.messages import check_choice
from .kernels import accumulation_dtype
from .loss import check_pair


class MapLoss(nn.Module, ABC):
    """Checks the maps and calls ``compare`` with both in full precision."""

    same_channels = False  # whether the loss is defined for equal numbers of channels only

    def forward(self, student: Tensor, teacher: Tensor, *others: object) -> Tensor:
        """The loss; ``others`` are what ``compare`` takes beside the maps."""
        student, teacher = check_pair(student, teacher)
        if self.same_channels and student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"{type(self).__name__} compares channel by channel, but the student's map has {student.shape[1]} "
                f"channels and the teacher's {teacher.shape[1]}: tap maps with as many, or put a 1×1 convolution before"
            )
        with torch.autocast(student.device.type, enabled=False):
            dtype = accumulation_dtype(student)
            return self.compare(student.to(dtype), teacher.to(dtype), *others)

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, *others: object) -> Tensor:
        """The loss of two maps of one dtype, height and width."""


class SimilarityPreservingLoss(MapLoss):
    """Similarity between the images of a batch (SP; Tung and Mori, ICCV 2019, equation 4)."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        similarities = (F.normalize(features @ features.T) for features in (student.flatten(1), teacher.flatten(1)))
        return torch.sub(*similarities).square().mean()


class AttentionTransferLoss(MapLoss):
    """Where the activations are large (AT; Zagoruyko and Komodakis, ICLR 2017).

    Squares are averaged over channels, as in the authors' code.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        attention = (F.normalize(features.square().mean(1).flatten(1)) for features in (student, teacher))
        return torch.sub(*attention).square().mean()


class HintLoss(MapLoss):
    """The maps themselves (FitNets; Romero et al., ICLR 2015). FitNets' regressor is the objective's adapter."""

    same_channels = True

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.mse_loss(student, teacher)


class CKALoss(MapLoss):
    """1 − linear centred kernel alignment of the images of a batch (CKA; Kornblith et al., ICML 2019).

    Computed from b×b Gram matrices. Where all images of the batch have the same map, there is nothing to align, and the
    loss is 1 without a gradient.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        centred = (features.flatten(1) - features.flatten(1).mean(0) for features in (student, teacher))
        first, second = (F.normalize((features @ features.T).flatten(), dim=0) for features in centred)
        return 1 - torch.dot(first, second)


class ChannelDistillationLoss(MapLoss):
    """Each channel as a distribution over pixels (channel-wise distillation; Shu et al., ICCV 2021, equation 5)."""

    same_channels = True

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature!r}")
        self.temperature = temperature

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        logs = (F.log_softmax(features.flatten(2) / self.temperature, 2) for features in (student, teacher))
        divergence = F.kl_div(*logs, reduction="sum", log_target=True)
        return self.temperature**2 * divergence / (student.shape[0] * student.shape[1])

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class Lattice(Protocol):
    """A quantizer with the levels {0..``highest``}·``step``: :class:`faqd_lib.quantization.relu.QuantizedReLU`."""

    step: Tensor
    highest: int


class LatticeHintLoss(MapLoss):
    """Hints that the student can reach: the teacher's map rounded to the student's lattice (after SQuaT, 2026).

    Called as ``loss(student_map, teacher_map, quantizer)`` with the quantized ReLU that ends the student's stage.
    Implemented is the comparison alone, from a description of the method: Q(G) = step·clip(round(G/step), 0, 2^b − 1),
    with the step of the moment, which gets no gradient through Q. The loss is 0 if the student says all it can of the
    teacher's map.
    """

    same_channels = True

    def compare(self, student: Tensor, teacher: Tensor, quantizer: Lattice) -> Tensor:
        step = quantizer.step.detach().to(teacher)
        return F.mse_loss(student, step * (teacher / step).round().clamp(0, quantizer.highest))


RIVALS: dict[str, type[MapLoss]] = {
    "sp": SimilarityPreservingLoss,
    "at": AttentionTransferLoss,
    "hint": HintLoss,
    "cka": CKALoss,
    "channel": ChannelDistillationLoss,
    "squat": LatticeHintLoss,
}


def rival(name: str) -> MapLoss:
    """The loss of a name in ``RIVALS``; ValueError for another name."""
    check_choice("name", name, RIVALS)
    return RIVALS[name]()
