"""The distillation objective: logits, feature affinity and, optionally, labels.

logit_weight · (MSE or T²·KL)  +  affinity_weight · Σ_stages (FA, FFA or a rival)  +  label_weight · cross-entropy
"""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..affinity.loss import FastFeatureAffinityLoss, FeatureAffinityLoss, pixel_count
from ..utils.messages import check_choice, kind_of
from .segmentation import dense_cross_entropy

LOGIT_LOSSES = ("none", "mse", "kl")
RIVALS = ("sp", "at", "hint", "cka", "channel", "squat")  # of faqd_lib.affinity.rivals
AFFINITY_LOSSES = ("none", "fa", "ffa", *RIVALS)


def logit_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over images, classes and pixels of the squared difference of logits, both (batch, classes, …)."""
    return F.mse_loss(student, teacher)


def logit_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T²·KL(softmax(teacher/T) ‖ softmax(student/T)), mean over images and pixels (Hinton et al. 2015).

    Both logits are (batch, classes) or, for one prediction a pixel, (batch, classes, height, width).
    """
    divergence = F.kl_div(
        F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1),
        reduction="sum", log_target=True,
    )  # fmt: skip
    return temperature**2 * (divergence / (student.numel() // student.shape[1]))


class Adapter(nn.Sequential):
    """1×1 convolution and ReLU between a student's map and the comparison, a variant of the released code.

    The convolution starts as the identity. Its parameters are trained and belong to the objective.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Conv2d(channels, channels, 1), nn.ReLU())
        nn.init.dirac_(self[0].weight)
        nn.init.zeros_(self[0].bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """A map (batch, channels, height, width), or tokens (batch, N, channels), of the same shape."""
        if features.ndim == 3:
            return super().forward(features.mT.unsqueeze(3)).squeeze(3).mT
        return super().forward(features)


class DistillationObjective(nn.Module):
    """The objective at the head of this module; a call returns its terms and their weighted total.

    Args:
        logit_loss: ``"mse"``, ``"kl"`` or ``"none"``.
        affinity: ``"fa"`` (exact), ``"ffa"`` (``k`` random projections, own generators) or ``"none"``; or the name of a
            rival in :data:`faqd_lib.affinity.rivals.RIVALS`.
        logit_weight, affinity_weight, label_weight: each at least 0. Without labels leave ``label_weight`` at 0.
        temperature: of KL, above 0.
        k, distribution: of the projections (FFA only).
        adapter_channels: channels of the student's maps, one entry a stage: a trained 1×1 adapter stands before each
            comparison. Empty for no adapters. Give ``objective.parameters()`` to the optimizer as well.
        lattices: for ``"squat"`` alone: the student's quantized ReLUs that end its stages, one a stage.
        seed: of the projections.
        class_weights: of the label loss of dense logits, (classes,); None for 1.

    Raises:
        ValueError: an unknown loss or distribution, a negative weight, a ``temperature`` that is not finite and above
            0, ``k`` below 1, an objective without any term, or lattices that are missing or superfluous.
        TypeError: ``k`` is no integer.
    """

    def __init__(
        self,
        logit_loss: str = "mse",
        affinity: str = "fa",
        *,
        logit_weight: float = 1.0,
        affinity_weight: float = 30.0,
        label_weight: float = 0.0,
        temperature: float = 4.0,
        k: int = 6,
        distribution: str = "gaussian",
        adapter_channels: Sequence[int] = (),
        lattices: Sequence[nn.Module] = (),
        seed: int = 0,
        class_weights: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        check_choice("logit_loss", logit_loss, LOGIT_LOSSES)
        check_choice("affinity", affinity, AFFINITY_LOSSES)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be finite and above 0, got {temperature!r}")
        weights = {"logit_weight": logit_weight, "affinity_weight": affinity_weight, "label_weight": label_weight}
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0, got {weight!r}")
        self.logit_loss, self.temperature = logit_loss, temperature
        self.logit_weight = logit_weight if logit_loss != "none" else 0.0
        self.affinity_weight = affinity_weight if affinity != "none" else 0.0
        self.label_weight = label_weight
        if not self.logit_weight + self.affinity_weight + self.label_weight > 0:
            raise ValueError("the objective has no term: give a logit loss, an affinity loss or a label weight")
        self.affinity_loss = None
        if affinity == "fa":
            self.affinity_loss = FeatureAffinityLoss()
        elif affinity == "ffa":
            self.affinity_loss = FastFeatureAffinityLoss(k, distribution, seed)
        elif affinity != "none":
            from ..affinity.rivals import rival  # runs of the paper's tables do not import rivals

            self.affinity_loss = rival(affinity)
        # Not in the state: they follow from the training images.
        self.register_buffer("class_weights", class_weights, persistent=False)
        if (affinity == "squat") != bool(lattices):
            raise ValueError(
                f"affinity {affinity!r} with {len(lattices)} lattices: 'squat' needs the student's quantized ReLU of "
                "each stage, and no other loss takes any"
            )
        self._lattices = tuple(lattices)  # modules of the student, not of the objective
        self.adapters = nn.ModuleList(Adapter(channels) for channels in adapter_channels)

    def predraw(self, pixels: Sequence[int], device: torch.device) -> None:
        """Draw the projections of the next call now; ``pixels`` has N of each student's map: pixels or tokens.

        See :meth:`faqd_lib.affinity.loss.FastFeatureAffinityLoss.predraw`. Other losses draw nothing.
        """
        if isinstance(self.affinity_loss, FastFeatureAffinityLoss):
            self.affinity_loss.predraw(pixels, device)

    def forward(
        self,
        student_logits: torch.Tensor,
        student_maps: Sequence[torch.Tensor] = (),
        teacher_logits: torch.Tensor | None = None,
        teacher_maps: Sequence[torch.Tensor] = (),
        labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Terms of the objective for one batch.

        Args:
            student_logits, teacher_logits: (batch, classes), or (batch, classes, height, width) for one prediction a
                pixel. Each loss is then a mean over images and pixels.
            student_maps, teacher_maps: (batch, channels, height, width), or tokens (batch, N, channels), one a stage.
            labels: int64 (batch), or (batch, height, width) beside dense logits, where
                :data:`~faqd_lib.data.images.IGNORED` marks pixels without a label; needed where ``label_weight`` is
                above 0, refused where it is 0.

        Returns:
            Scalars: ``"total"``, the weighted sum to minimise; and the unweighted terms of the objective, among
            ``"logit"``, ``"affinity"`` (sum over stages) and ``"label"``.

        Raises:
            TypeError: logits are no tensor.
            ValueError: labels, teacher's logits or maps are missing, superfluous or of other shapes.

        Warns:
            UserWarning: a map has one pixel: its affinity loss is 0 whatever the map holds.
        """
        if (labels is None) == (self.label_weight > 0):
            raise ValueError(
                "labels are needed because label_weight is above 0"
                if labels is None
                else "labels were given to a label-free objective: set label_weight above 0 or leave them out"
            )
        student_logits = _logits("student_logits", student_logits)
        terms: dict[str, torch.Tensor] = {}
        total = student_logits.new_zeros((), dtype=torch.float32)
        if self.logit_weight > 0:
            terms["logit"] = self._compare_logits(student_logits, teacher_logits)
            total = total + self.logit_weight * terms["logit"]
        if self.affinity_weight > 0:
            terms["affinity"] = self._compare_maps(student_maps, teacher_maps)
            total = total + self.affinity_weight * terms["affinity"]
        if self.label_weight > 0:
            terms["label"] = self._compare_labels(student_logits, labels)
            total = total + self.label_weight * terms["label"]
        return {"total": total, **terms}

    def _compare_labels(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if logits.ndim > 2:
            return dense_cross_entropy(logits, labels, self.class_weights)
        return F.cross_entropy(logits, labels)

    def _compare_logits(self, student: torch.Tensor, teacher: torch.Tensor | None) -> torch.Tensor:
        if teacher is None:
            raise ValueError("the logit loss needs teacher_logits")
        target = _logits("teacher_logits", teacher).detach()
        if target.shape != student.shape:
            raise ValueError(
                f"student and teacher must have the same images and classes; their logits are "
                f"{tuple(student.shape)} and {tuple(target.shape)}"
            )
        return logit_mse(student, target) if self.logit_loss == "mse" else logit_kl(student, target, self.temperature)

    def _compare_maps(self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
        if not student or len(student) != len(teacher):
            raise ValueError(
                f"the affinity loss needs as many student maps as teacher maps, at least one of each; got "
                f"{len(student)} and {len(teacher)}"
            )
        if self.adapters:
            student = [adapter(feature_map) for adapter, feature_map in zip(self.adapters, student, strict=True)]
        if any(pixel_count(feature_map) == 1 for feature_map in student):
            warnings.warn(
                "a map of one pixel has no affinities: its affinity loss is always 0; tap an earlier layer",
                stacklevel=3,
            )
        others = [(lattice,) for lattice in self._lattices] or [()] * len(student)
        return sum(
            self.affinity_loss(of_student, of_teacher, *other)
            for of_student, of_teacher, other in zip(student, teacher, others, strict=True)
        )


def _logits(name: str, logits: object) -> torch.Tensor:
    """The logits in float32; TypeError if they are no tensor."""
    if not isinstance(logits, torch.Tensor):
        raise TypeError(
            f"{name} must be a tensor (batch, classes), got {kind_of(logits)}: take the logits out of what the network "
            "returns"
        )
    return logits.float()
