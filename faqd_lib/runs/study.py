"""The design of a study: what is trained, which claims it tests and when it looks, written down before its runs.

A design is the table ``[study]`` of a profile. The profile's other settings (images, schedules, precision) belong to
the design as much as this table: :attr:`faqd_lib.runs.profile.Profile.design_digest` is of both.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..config import (
    ActivationBits,
    Count,
    LogitLoss,
    Method,
    Positive,
    Regime,
    StepGradient,
    StrictModel,
    Taps,
    Weight,
    WeightBits,
    omitted_at_default,
)
from ..data.elsewhere import MADE_HERE
from ..models import MODEL_NAMES
from ..quantization.weights import FLOAT_BITS

FIRST_SEED = 2  # seed 1 was looked at while the method was worked out
ModelName = Literal[MODEL_NAMES]
Finite = Annotated[float, Field(allow_inf_nan=False)]
FEWEST_SEEDS = 5  # with three seeds, a 5 % test errs in 7 to 8 % of studies


class Arm(StrictModel):
    """What one student learns from.

    Args:
        method: ``labels`` (cross-entropy only), ``KD``, ``FA``, ``FAQD``, ``FFAQD``, or ``KD+…`` with a rival of FA.
        labels: whether cross-entropy is added to a distillation loss.
        regime: ``fine-tuning`` starts from the float student of the same seed.
        logit_loss, k: None for the profile's own.
        stages: stages whose maps are compared, numbered from 1; empty for all.
        taps: whether these maps are taken after a stage's last ReLU (``output``) or before it.
        adapters: whether a trained 1×1 convolution and ReLU stand on the student's maps.
        activation_bits: 1 to 8, or 32 for float activations.
        step_gradient: how steps of activations learn; None for ``lsq``.
        losses: changes to the profile's losses, such as ``{temperature = 2.0}``.
        epochs: None for the schedule's own.
        learning_rate: None for the schedule's own.
    """

    method: Method
    labels: bool = False
    regime: Regime = "end-to-end"
    logit_loss: LogitLoss | None = None
    k: Count | None = None
    stages: list[Count] = omitted_at_default([])
    taps: Taps = omitted_at_default("output")
    adapters: bool = omitted_at_default(False)
    activation_bits: ActivationBits = omitted_at_default(32)
    step_gradient: StepGradient | None = omitted_at_default(None)
    losses: dict[str, Finite] = {}
    epochs: Count | None = None
    learning_rate: Positive | None = None

    @model_validator(mode="after")
    def _fits_its_method(self) -> Self:
        for setting in ("stages", "adapters", "taps"):
            value = getattr(self, setting)
            if self.method in ("labels", "KD") and value not in ([], False, "output"):
                raise ValueError(f"{setting} = {value!r}: the method {self.method} compares no maps")
        if self.stages != sorted(set(self.stages)):
            raise ValueError(f"stages = {self.stages} must rise")
        if self.logit_loss is not None and self.method in ("labels", "FA"):
            raise ValueError(f"logit_loss = {self.logit_loss!r}: the method {self.method} compares no logits")
        if self.step_gradient is not None and self.activation_bits == FLOAT_BITS:
            raise ValueError(f"step_gradient = {self.step_gradient!r} needs activation_bits below {FLOAT_BITS}")
        return self


class Cells(StrictModel):
    """Arms that are trained at the same bit-widths, on as many images and for as many updates.

    Args:
        arms: names of arms; those of cells with a ``source`` are label-free.
        weight_bits: each arm is trained at each of them.
        seeds: number of seeds, from the first on; None for all that are planned.
        images: number of training images; None for all.
        updates: number of steps; None for the epochs of the schedule. Warm-up keeps its share.
        student, teacher: networks; None for the profile's own.
        source: where the unlabelled images come from, see :mod:`faqd_lib.data.elsewhere`; None for the training split.
            ``images`` says how many there are.
    """

    arms: Annotated[list[str], Field(min_length=1)]
    weight_bits: Annotated[list[WeightBits], Field(min_length=1)]
    seeds: Count | None = None
    images: Count | None = None
    updates: Count | None = None
    student: ModelName | None = omitted_at_default(None)
    teacher: ModelName | None = omitted_at_default(None)
    source: str | None = omitted_at_default(None)

    def has_own(self, arms: set[str]) -> bool:
        """Whether these arms are here, with networks and images that are the profile's own."""
        return arms <= set(self.arms) and (self.student, self.teacher, self.source) == (None, None, None)

    @model_validator(mode="after")
    def _counts_its_source(self) -> Self:
        if self.source is not None and self.images is None:
            raise ValueError(f"source = {self.source!r}: set images to the number of images from there")
        return self


class PlannedClaim(StrictModel):
    """A claim about a contrast: Σ weight · endpoint over arms, averaged over bit-widths.

    Args:
        statement: the claim in words.
        contrast: weight of each arm; they sum to 0.
        endpoint: ``accuracy`` on test images, or mean IoU of one prediction a pixel, in percentage points; or
            ``affinity``, the natural logarithm of the exact affinity loss on test images.
        cells: name of the cells.
        reference: names of the cells of arms that ``cells`` does not have.
        margin: the claim is that the contrast lies above −margin. 0 for "better".
        equivalence: the claim reads "no difference beyond …" if the contrast is shown to lie within ±equivalence. It
            is used for accuracy only.
        assay: a contrast that must be shown to lie above 0 first; without it the claim is not testable here.
        family: claims of one family share an error rate of 5 %.
    """

    statement: str
    contrast: dict[str, Finite]
    endpoint: Literal["accuracy", "affinity"] = omitted_at_default("accuracy")
    cells: str
    reference: str | None = None
    margin: Weight = 0.0
    equivalence: Positive = 0.5
    assay: dict[str, Finite] = {}
    family: str = "paper"


class Study(StrictModel):
    """A design.

    Args:
        looks: numbers of complete seeds at which claims are judged, in rising order; the last is the planned n.
        first_seed: the seeds are those from here on.
        arms, cells, claims: by name. Cells that come first are trained first.
    """

    looks: Annotated[list[Count], Field(min_length=1, max_length=2)]
    first_seed: Count = FIRST_SEED
    arms: dict[str, Arm]
    cells: dict[str, Cells]
    claims: dict[str, PlannedClaim] = {}

    @property
    def sources(self) -> list[str]:
        """The other datasets whose images are trained on."""
        named = dict.fromkeys(cells.source for cells in self.cells.values())
        return [name for name in named if name is not None and name not in MADE_HERE]

    @property
    def seeds(self) -> range:
        """All planned seeds."""
        return range(self.first_seed, self.first_seed + self.looks[-1])

    def where(self, claim: PlannedClaim, arm: str) -> str | None:
        """The name of the cells that an arm of a claim is in; None where the claim has no ``reference``."""
        return claim.cells if arm in self.cells[claim.cells].arms else claim.reference

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if sorted(set(self.looks)) != self.looks:
            raise ValueError(f"looks = {self.looks} must rise")
        if self.claims and self.looks[0] < FEWEST_SEEDS:
            raise ValueError(f"looks = {self.looks}: the first must have at least {FEWEST_SEEDS} seeds")
        for name, cells in self.cells.items():
            for arm in cells.arms:
                if arm not in self.arms:
                    raise ValueError(f"cells.{name} has the arm {arm!r}; the arms are {', '.join(self.arms)}")
                if cells.source is not None and (self.arms[arm].labels or self.arms[arm].method == "labels"):
                    raise ValueError(f"cells.{name}: images from {cells.source} have no labels for the arm {arm!r}")
        for name, claim in self.claims.items():
            self._check(f"claims.{name}", claim)
        return self

    def _check(self, where: str, claim: PlannedClaim) -> None:
        for cells in filter(None, (claim.cells, claim.reference)):
            if cells not in self.cells:
                raise ValueError(f"{where} is about the cells {cells!r}; the cells are {', '.join(self.cells)}")
        for contrast in filter(None, (claim.contrast, claim.assay)):
            if abs(sum(contrast.values())) > 1e-9:
                raise ValueError(f"{where}: the weights {contrast} must sum to 0")
            for arm in contrast:
                cells = self.where(claim, arm)
                if cells is None or arm not in self.cells[cells].arms:
                    raise ValueError(f"{where}: the arm {arm!r} is not in its cells")
        if claim.endpoint == "affinity" and (claim.margin or claim.assay):
            raise ValueError(f"{where}: margin and assay are for accuracy")
        if claim.endpoint == "affinity":
            for arm in claim.contrast:
                if self.arms[arm].method == "labels":
                    raise ValueError(f"{where}: the arm {arm!r} has no teacher, so no affinity loss")
        if not any(claim.contrast.values()):
            raise ValueError(f"{where}: the contrast {claim.contrast} compares nothing")
        widths = {tuple(self.cells[self.where(claim, arm)].weight_bits) for arm in claim.contrast | claim.assay}
        if len(widths) > 1:
            raise ValueError(f"{where}: its arms have different bit-widths, {sorted(widths)}")
