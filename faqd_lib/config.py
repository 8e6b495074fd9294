"""Configurations of runs: validated, frozen, and named by a digest of every setting that changes numbers."""

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from .utils.files import canonical_json, text_digest
from .utils.messages import did_you_mean

# Recipe numbers are part of a run's digest. Raise one when the same configuration would train to other numbers than
# before: new runs then get new names, and old records are not mistaken for them.
RECIPE = 1  # of the training loop and augmentation: part of every run
AFFINITY_RECIPE = 3  # of the affinity losses: part of runs with an affinity loss
QUANTIZER_RECIPE = 4  # of the quantizers: part of quantized runs

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Stages = Annotated[tuple[Count, ...], Field(strict=False)]  # a list in records
WeightBits = Literal[1, 2, 3, 4, 5, 6, 7, 8, 32]
ActivationBits = Literal[1, 2, 3, 4, 5, 6, 7, 8, 32]
Precision = Literal["float32", "bf16"]
LogitLoss = Literal["mse", "kl"]
Regime = Literal["end-to-end", "fine-tuning"]
Taps = Literal["output", "before ReLU"]  # maps of a stage: those after its last ReLU, or the sums that this ReLU gets
StepGradient = Literal["lsq", "coarse", "frozen"]  # see faqd_lib.quantization.relu
ClassWeights = Literal["equal", "root median frequency"]  # of dense label losses, see faqd_lib.training.segmentation
Affinity = Literal["none", "fa", "ffa", "sp", "at", "hint", "cka", "channel", "squat"]
Method = Literal[
    "labels", "KD", "FA", "FAQD", "FFAQD", "KD+SP", "KD+AT", "KD+FitNet", "KD+CKA", "KD+CWD", "KD+SQuaT"
]  # fmt: skip
# How a student with a logit loss is called, by its loss between maps.
METHOD_OF_AFFINITY: dict[Affinity, Method] = {
    "none": "KD", "fa": "FAQD", "ffa": "FFAQD",
    "sp": "KD+SP", "at": "KD+AT", "hint": "KD+FitNet", "cka": "KD+CKA", "channel": "KD+CWD",
    "squat": "KD+SQuaT",
}  # fmt: skip


def omitted_at_default(default: Any) -> Any:
    """A setting added after the first records: omitted from the digest at its default, so that old digests stay."""
    return Field(default=default, exclude_if=lambda value: value == default)


class ConfigurationError(ValueError):
    """A setting is unknown, of the wrong type or out of range; the message has one line a setting."""


class StrictModel(BaseModel):
    """A frozen model that accepts no unknown keys and converts no types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def parse(cls, values: dict, where: str) -> Self:
        """Validate a dictionary; ``where`` (a file, a notebook) starts every line of an error message.

        Raises:
            ConfigurationError: one line for each bad key, with its value and the expected ones.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigurationError(_explain(cls, error, where)) from None


def _explain(model: type[BaseModel], error: ValidationError, where: str) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "the whole"
        if problem["type"] == "extra_forbidden":
            known = _fields_at(model, problem["loc"][:-1])
            hint = did_you_mean(problem["loc"][-1], known)
            lines.append(f"{where}: unknown setting {key!r}{hint}; known settings are {', '.join(known)}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: {key} is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            value = f" = {problem['input']!r}" if problem["loc"] and not isinstance(problem["input"], dict) else ""
            lines.append(f"{where}: {key}{value}: {message}")
    return "\n".join(lines)


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names of the settings of the model at ``location``, in alphabetical order."""
    at: Any = model
    for part in location:
        fields = at.model_fields if isinstance(at, type) and issubclass(at, BaseModel) else None
        if fields is None and get_origin(at) is dict:  # the location goes on with a key of the user's own
            at = get_args(at)[1]
        else:
            at = fields[part].annotation if fields and part in fields else None
        if get_origin(at) is UnionType:  # a table that may be absent
            at = next(inner for inner in get_args(at) if inner is not NoneType)
    return sorted(at.model_fields if isinstance(at, type) and issubclass(at, BaseModel) else model.model_fields)


class DataConfig(StrictModel):
    """The images of a run: a dataset by name and fingerprint, and the sizes and seed of its class-balanced subsets."""

    name: str
    fingerprint: str
    train_images: Count | None = None
    test_images: Count | None = None
    validation_images: Annotated[int, Field(ge=0)] = 0
    # Training images that are never trained on: more test images.
    held_out_images: Annotated[int, Field(ge=0)] = omitted_at_default(0)
    subset_seed: int = 0

    def has_images_of(self, other: "DataConfig") -> bool:
        """Whether both have the same images, but for the number of training images."""
        return self.model_copy(update={"train_images": other.train_images}) == other


class ImageSource(StrictModel):
    """Where a student's unlabelled training images come from, instead of the training split of its ``data``.

    Args:
        name: a name in :data:`faqd_lib.data.elsewhere.MADE_HERE`, or that of another dataset.
        fingerprint: of another dataset; empty for images that are made here.
        train_images: number of images, drawn with the subset seed of ``data``.
    """

    name: str
    fingerprint: str = ""
    train_images: Count


class QuantizationConfig(StrictModel):
    """Bits of weights and activations, and how they are quantized; see :func:`faqd_lib.quantization.network.quantize`.

    ``blending`` is the ρ of blended coarse gradient descent, 0 to switch it off; see
    :func:`faqd_lib.quantization.network.blend`. 32 bits stand for float.
    """

    weight_bits: WeightBits = 32
    activation_bits: ActivationBits = 32
    first_layer: Literal["quantize", "float"] = "quantize"
    last_layer: Literal["quantize", "float"] = "float"
    shortcuts: Literal["quantize", "float"] = omitted_at_default("quantize")
    per_channel: bool = omitted_at_default(False)
    step_gradient: StepGradient = omitted_at_default("lsq")
    blending: Annotated[float, Field(ge=0, lt=1)] = omitted_at_default(0.0)
    quantizer_recipe: int | None = omitted_at_default(None)

    @model_validator(mode="before")
    @classmethod
    def _current_recipe(cls, values: Any, info: ValidationInfo) -> Any:
        # A new configuration gets the current recipe; one read from a record (JSON) keeps the recipe it names.
        if info.mode == "python" and isinstance(values, dict):
            quantized = (values.get("weight_bits", 32), values.get("activation_bits", 32)) != (32, 32)
            return {"quantizer_recipe": QUANTIZER_RECIPE, **values} if quantized else values
        return values

    @model_validator(mode="after")
    def _fits(self) -> Self:
        quantized = (self.weight_bits, self.activation_bits) != (32, 32)
        if self.quantizer_recipe != (QUANTIZER_RECIPE if quantized else None):
            raise ValueError(
                f"quantizer_recipe {self.quantizer_recipe} is not that of this version ({QUANTIZER_RECIPE})"
            )
        # A setting without effect would give the same numbers a second name.
        if self.weight_bits == 32 and (self.blending or self.per_channel or self.shortcuts != "quantize"):
            raise ValueError("blending, per_channel and shortcuts need quantized weights: set weight_bits below 32")
        if self.activation_bits == 32 and self.step_gradient != "lsq":
            raise ValueError("step_gradient needs quantized activations: set activation_bits below 32")
        return self

    @property
    def variant(self) -> str:
        """Settings that differ from their defaults, bits aside: ``"step_gradient=frozen"``; empty if none differ."""
        other = self.model_dump(exclude_defaults=True, exclude={"weight_bits", "activation_bits", "quantizer_recipe"})
        return ", ".join(f"{name}={value}" for name, value in other.items())

    @property
    def quantize_arguments(self) -> dict[str, Any]:
        """The arguments of :func:`faqd_lib.quantization.network.quantize`."""
        return self.model_dump(exclude={"blending", "quantizer_recipe"})


class ObjectiveConfig(StrictModel):
    """Weights and kinds of the loss terms; see :class:`faqd_lib.training.objective.DistillationObjective`."""

    logit_loss: Literal["none", LogitLoss] = "none"
    logit_weight: Weight = 1.0
    temperature: Positive = 4.0
    affinity: Affinity = "none"  # the loss between maps; all but "fa" and "ffa" are of faqd_lib.affinity.rivals
    affinity_weight: Weight = 0.0
    k: Count = 6
    distribution: Literal["gaussian", "rademacher"] = "gaussian"
    label_weight: Weight = 0.0
    adapters: bool = False
    stages: Stages = omitted_at_default(())  # whose maps are compared, numbered from 1; () for all
    taps: Taps = omitted_at_default("output")
    class_weights: ClassWeights = omitted_at_default("equal")
    affinity_recipe: int | None = omitted_at_default(None)

    @model_validator(mode="before")
    @classmethod
    def _current_recipe(cls, values: Any, info: ValidationInfo) -> Any:
        # A new configuration gets the current recipe; one read from a record (JSON) keeps the recipe it names.
        if info.mode == "python" and isinstance(values, dict) and values.get("affinity", "none") != "none":
            return {"affinity_recipe": AFFINITY_RECIPE, **values}
        return values

    @property
    def uses_teacher(self) -> bool:
        """Whether the objective has a logit loss or an affinity loss."""
        return self.logit_loss != "none" or self.affinity != "none"

    @property
    def label_free(self) -> bool:
        """Whether the objective has no label loss."""
        return self.label_weight == 0

    @model_validator(mode="after")
    def _some_term(self) -> Self:
        if not self.uses_teacher and self.label_free:
            raise ValueError("the objective has no term: set logit_loss, affinity or label_weight")
        if (self.affinity == "none") != (self.affinity_weight == 0):
            raise ValueError("affinity_weight must be 0 with affinity='none', and above 0 with 'fa', 'ffa' or a rival")
        if self.affinity_recipe != (None if self.affinity == "none" else AFFINITY_RECIPE):
            raise ValueError(f"affinity_recipe {self.affinity_recipe} is not that of this version ({AFFINITY_RECIPE})")
        if (self.adapters or self.stages or self.taps != "output") and self.affinity == "none":
            raise ValueError("adapters, stages and taps need an affinity loss: set affinity to 'fa', 'ffa' or a rival")
        if self.class_weights != "equal" and self.label_free:
            raise ValueError(f"class_weights = {self.class_weights!r} is for a label loss: set label_weight above 0")
        if self.stages != tuple(sorted(set(self.stages))):
            raise ValueError(f"stages {list(self.stages)} must rise")
        if self.adapters and self.stages:
            raise ValueError("adapters stand at all stages: leave out stages")
        return self


class Schedule(StrictModel):
    """SGD with Nesterov momentum, linear warm-up, cosine decay to zero, and clipped gradient norm."""

    epochs: Count
    batch_size: Annotated[int, Field(ge=2)] = 128  # batch normalisation needs at least two images
    learning_rate: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Weight = 5e-4
    warmup_epochs: Weight = 1.0
    clip_norm: Positive = 20.0
    # Training ends after so many steps, within the last epoch. None: after the last epoch.
    updates: Count | None = omitted_at_default(None)

    def steps(self, steps_per_epoch: int) -> int:
        """Number of steps of the whole schedule.

        Raises:
            ConfigurationError: ``updates`` does not lie within the last epoch.
        """
        whole = self.epochs * steps_per_epoch
        if self.updates is None:
            return whole
        if not whole - steps_per_epoch < self.updates <= whole:
            raise ConfigurationError(
                f"updates={self.updates} does not end within epoch {self.epochs} of {steps_per_epoch} steps each: "
                f"set epochs={-(-self.updates // steps_per_epoch)}"
            )
        return self.updates

    @model_validator(mode="after")
    def _warmup_is_part(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} is more than epochs={self.epochs}")
        return self


class OptimizationConfig(Schedule):
    """A schedule and the precision of its steps; ``epochs=0`` quantizes after training, without training steps."""

    epochs: Annotated[int, Field(ge=0)]
    precision: Precision = "float32"
    # For epochs=0: unlabelled batches that re-estimate the statistics of batch normalisation.
    batch_norm_batches: Annotated[int, Field(ge=0)] = omitted_at_default(0)
    # Whether torch.compile runs the passes through teacher and student; the last digits differ then.
    compiled: bool = omitted_at_default(False)

    @model_validator(mode="after")
    def _estimates_or_trains(self) -> Self:
        if self.epochs and self.batch_norm_batches:
            raise ValueError("batch_norm_batches is for epochs = 0: training estimates the statistics itself")
        if self.compiled and not self.epochs:
            raise ValueError("compiled is for training steps, and epochs = 0 has none")
        return self


class TrainingConfig(StrictModel):
    """What a learner is told of its training. Subclasses add the network, the teacher and the images."""

    optimization: OptimizationConfig
    objective: ObjectiveConfig
    quantization: QuantizationConfig = QuantizationConfig()
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def label_free(self) -> bool:
        """Whether this run trains without labels; its teacher may have used them."""
        return self.objective.label_free

    @property
    def bits(self) -> str:
        """Bits of weights and activations, such as ``1W4A``; 32 bits stand for float."""
        return f"{self.quantization.weight_bits}W{self.quantization.activation_bits}A"

    @property
    def digest(self) -> str:
        """SHA-256 of the whole configuration, nested runs and recipe version included."""
        return text_digest(canonical_json(self.model_dump(mode="json")))

    @property
    def run_id(self) -> str:
        """Bits and the first 12 digits of the digest; the name of the run's folder."""
        return f"{self.bits.lower()}-{self.digest[:12]}"


class RunConfig(TrainingConfig):
    """One training run. ``teacher`` and ``initial``, the float student to fine-tune, are runs as well.

    With ``images`` a label-free student trains on images from elsewhere. Normalisation, test images and teacher are
    those of ``data``.
    """

    data: DataConfig
    model: str
    images: ImageSource | None = omitted_at_default(None)
    teacher: "RunConfig | None" = None
    initial: "RunConfig | None" = None
    recipe: Literal[RECIPE] = RECIPE

    @model_validator(mode="after")
    def _needs(self) -> Self:
        if self.objective.uses_teacher != (self.teacher is not None):
            raise ValueError("a teacher is needed if and only if the objective has a logit loss or an affinity loss")
        if self.initial is not None and self.initial.model != self.model:
            raise ValueError(f"initial weights of {self.initial.model} do not fit {self.model}")
        if self.optimization.epochs == 0 and (self.initial is None or self.objective.uses_teacher):
            raise ValueError("epochs = 0 is quantization after training: it needs initial weights and no teacher")
        if self.objective.affinity == "squat" and self.quantization.activation_bits == 32:
            raise ValueError("squat compares on the lattice of quantized activations: set activation_bits below 32")
        if self.images is not None and not (self.objective.uses_teacher and self.label_free):
            raise ValueError(
                f"images from {self.images.name!r} have no labels of these classes: use a label-free objective with a "
                "teacher, or leave out images"
            )
        for other in (self.teacher, self.initial):
            if other is not None and not other.data.has_images_of(self.data):
                raise ValueError("teacher, initial weights and student must have the same images")
        return self

    @property
    def training_images(self) -> int | None:
        """Number of images that are trained on; None for the whole training split."""
        return self.data.train_images if self.images is None else self.images.train_images

    @property
    def regime(self) -> str:
        """``end-to-end``, ``fine-tuning`` or ``post-training``."""
        if self.optimization.epochs == 0:
            return "post-training"
        return "end-to-end" if self.initial is None else "fine-tuning"

    @property
    def method(self) -> str:
        """``KD``, ``FAQD`` or ``FFAQD``; ``KD+SP``, ``KD+AT``, … with a rival.

        ``FA``, ``FFA``, ``SP``, … without a logit loss, ``labels`` without a teacher, ``none`` without training.
        """
        if self.optimization.epochs == 0:
            return "none"
        if not self.objective.uses_teacher:
            return "labels"
        name = METHOD_OF_AFFINITY[self.objective.affinity]
        return name if self.objective.logit_loss != "none" else name.removesuffix("QD").removeprefix("KD+")

    @property
    def run_id(self) -> str:
        """Readable name and the first 12 digits of the digest; the name of the run's folder."""
        parts = [self.model, self.bits.lower(), self.method.lower()]
        if self.method == "FFAQD":
            parts.append(f"k{self.objective.k}")
        if self.objective.logit_loss != "none":
            parts.append(self.objective.logit_loss)
        if self.teacher is not None:
            parts.append("labelfree" if self.label_free else "labelled")
            parts.append(f"from-{self.teacher.model}")
        if self.images is not None:
            parts.append(f"on-{self.images.name}")
        if self.initial is not None:
            parts.append("finetuned" if self.optimization.epochs else "posttraining")
        return "-".join([*parts, f"seed{self.seed}", self.digest[:12]])
