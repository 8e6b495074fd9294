"""What a run is: a validated, frozen configuration whose digest names it. Everything that changes numbers is here."""

import difflib
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from .utils.files import canonical_json, text_digest

# Raise this whenever the same configuration would train to other numbers than before (loop, losses, quantizers,
# augmentation): old runs then keep their names and are not mistaken for new ones.
RECIPE = 1
# The same for the affinity losses alone: part of the objectives that have one, so that other runs keep their names.
AFFINITY_RECIPE = 3
QUANTIZER_RECIPE = 4  # and for the quantizers

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
WeightBits = Literal[1, 2, 3, 4, 5, 6, 7, 8, 32]
ActivationBits = Literal[1, 2, 3, 4, 5, 6, 7, 8, 32]
Precision = Literal["float32", "bf16"]


def omitted_at_default(default: Any) -> Any:
    """A setting that came later: at its default it is left out, so that older runs keep their digests."""
    return Field(default=default, exclude_if=lambda value: value == default)


class ConfigurationError(ValueError):
    """A setting is unknown, of the wrong type or out of range; the message has one line for each."""


class StrictModel(BaseModel):
    """Unknown keys, wrong types and later changes raise."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def parse(cls, values: dict, where: str) -> Self:
        """Validate a dictionary; ``where`` (a file, a notebook) starts every error message.

        Raises:
            ConfigurationError: one line for each bad key, with the value and what was expected.
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
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            lines.append(f"{where}: unknown setting {key!r}{hint}; known are: {', '.join(known)}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: {key} is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            value = f" = {problem['input']!r}" if problem["loc"] and not isinstance(problem["input"], dict) else ""
            lines.append(f"{where}: {key}{value}: {message}")
    return "\n".join(lines)


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names of the settings at a place inside a model, in alphabetical order."""
    for part in location:
        inner = getattr(model.model_fields.get(part), "annotation", None) if isinstance(part, str) else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    return sorted(model.model_fields)


class DataConfig(StrictModel):
    """Which images: a dataset by name and fingerprint, and the seeded, class-balanced subsets taken from it."""

    name: str
    fingerprint: str
    train_images: Count | None = None
    test_images: Count | None = None
    validation_images: Annotated[int, Field(ge=0)] = 0
    subset_seed: int = 0


class QuantizationConfig(StrictModel):
    """Bits of weights and activations, and how they are quantized; see :func:`faqd_lib.quantization.network.quantize`.

    ``blending`` is the ρ of blended coarse gradient descent (:func:`faqd_lib.quantization.network.blend`), 0 for none.
    """

    weight_bits: WeightBits = 32
    activation_bits: ActivationBits = 32
    first_layer: Literal["quantize", "float"] = "quantize"
    last_layer: Literal["quantize", "float"] = "float"
    shortcuts: Literal["quantize", "float"] = omitted_at_default("quantize")
    per_channel: bool = omitted_at_default(False)
    step_gradient: Literal["lsq", "coarse", "frozen"] = omitted_at_default("lsq")
    blending: Annotated[float, Field(ge=0, lt=1)] = omitted_at_default(0.0)
    quantizer_recipe: int | None = omitted_at_default(None)

    @model_validator(mode="before")
    @classmethod
    def _current_recipe(cls, values: Any, info: ValidationInfo) -> Any:
        # What is made now has the recipe of now; what is read from a record says which one it had.
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
        # Settings without effect would make other names for the same numbers.
        if self.weight_bits == 32 and (self.blending or self.per_channel or self.shortcuts != "quantize"):
            raise ValueError("blending, per_channel and shortcuts are of quantized weights: set weight_bits below 32")
        if self.activation_bits == 32 and self.step_gradient != "lsq":
            raise ValueError("step_gradient is of quantized activations: set activation_bits below 32")
        return self

    @property
    def variant(self) -> str:
        """What is not at its default beside the bits: ``"step_gradient=frozen"``; empty if nothing is."""
        other = self.model_dump(exclude_defaults=True, exclude={"weight_bits", "activation_bits", "quantizer_recipe"})
        return ", ".join(f"{name}={value}" for name, value in other.items())

    @property
    def quantize_arguments(self) -> dict[str, Any]:
        """The arguments of :func:`faqd_lib.quantization.network.quantize`."""
        return self.model_dump(exclude={"blending", "quantizer_recipe"})


class ObjectiveConfig(StrictModel):
    """Weights and kinds of the loss terms; see :class:`faqd_lib.training.objective.DistillationObjective`."""

    logit_loss: Literal["none", "mse", "kl"] = "none"
    logit_weight: Weight = 1.0
    temperature: Positive = 4.0
    affinity: Literal["none", "fa", "ffa"] = "none"
    affinity_weight: Weight = 0.0
    k: Count = 6
    distribution: Literal["gaussian", "rademacher"] = "gaussian"
    label_weight: Weight = 0.0
    adapters: bool = False
    affinity_recipe: int | None = omitted_at_default(None)

    @model_validator(mode="before")
    @classmethod
    def _current_recipe(cls, values: Any, info: ValidationInfo) -> Any:
        # What is made now has the recipe of now; what is read from a record says which one it had.
        if info.mode == "python" and isinstance(values, dict) and values.get("affinity", "none") != "none":
            return {"affinity_recipe": AFFINITY_RECIPE, **values}
        return values

    @property
    def uses_teacher(self) -> bool:
        return self.logit_loss != "none" or self.affinity != "none"

    @property
    def label_free(self) -> bool:
        return self.label_weight == 0

    @model_validator(mode="after")
    def _some_term(self) -> Self:
        if not self.uses_teacher and self.label_free:
            raise ValueError("the objective has no term: set logit_loss, affinity or label_weight")
        if (self.affinity == "none") != (self.affinity_weight == 0):
            raise ValueError("affinity and affinity_weight must be given together: 'none' with 0, a loss with more")
        if self.affinity_recipe != (None if self.affinity == "none" else AFFINITY_RECIPE):
            raise ValueError(f"affinity_recipe {self.affinity_recipe} is not that of this version ({AFFINITY_RECIPE})")
        if self.adapters and self.affinity == "none":
            raise ValueError("adapters need an affinity loss: they stand before its comparison")
        return self


class Schedule(StrictModel):
    """SGD with Nesterov momentum, linear warm-up, cosine to zero, gradient norm clipped."""

    epochs: Count
    batch_size: Annotated[int, Field(ge=2)] = 128  # batch normalisation needs at least two images
    learning_rate: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Weight = 5e-4
    warmup_epochs: Weight = 1.0
    clip_norm: Positive = 20.0

    @model_validator(mode="after")
    def _warmup_is_part(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} is more than epochs={self.epochs}")
        return self


class OptimizationConfig(Schedule):
    """A schedule, and in which precision its steps compute. No epochs at all: quantized after training, not trained."""

    epochs: Annotated[int, Field(ge=0)]
    precision: Precision = "float32"
    # Of a network that is not trained: unlabelled batches over which its batch normalisation is estimated anew.
    batch_norm_batches: Annotated[int, Field(ge=0)] = omitted_at_default(0)
    compiled: bool = omitted_at_default(False)  # passes through teacher and student by torch.compile: other last digits

    @model_validator(mode="after")
    def _estimates_or_trains(self) -> Self:
        if self.epochs and self.batch_norm_batches:
            raise ValueError("batch_norm_batches is for epochs = 0: training estimates batch normalisation by itself")
        if self.compiled and not self.epochs:
            raise ValueError("compiled is of training steps, and epochs = 0 has none")
        return self


class RunConfig(StrictModel):
    """One training run. ``teacher`` and ``initial`` (the float student that fine-tuning starts from) are runs, too."""

    data: DataConfig
    model: str
    optimization: OptimizationConfig
    objective: ObjectiveConfig
    quantization: QuantizationConfig = QuantizationConfig()
    seed: Annotated[int, Field(ge=0)] = 0
    teacher: "RunConfig | None" = None
    initial: "RunConfig | None" = None
    recipe: Literal[RECIPE] = RECIPE

    @model_validator(mode="after")
    def _needs(self) -> Self:
        if self.objective.uses_teacher != (self.teacher is not None):
            raise ValueError("a teacher is needed exactly where the objective has a logit or an affinity loss")
        if self.initial is not None and self.initial.model != self.model:
            raise ValueError(f"initial weights of {self.initial.model} do not fit {self.model}")
        if self.optimization.epochs == 0 and (self.initial is None or self.objective.uses_teacher):
            raise ValueError("epochs = 0 needs initial weights and no teacher: it is quantization after training")
        for other in (self.teacher, self.initial):
            if other is not None and other.data != self.data:
                raise ValueError("teacher, initial weights and student must be trained on the same data")
        return self

    @property
    def label_free(self) -> bool:
        """Whether this run's own training is given no labels."""
        return self.objective.label_free

    @property
    def regime(self) -> str:
        """``end-to-end``, ``fine-tuning`` or ``post-training``."""
        if self.optimization.epochs == 0:
            return "post-training"
        return "end-to-end" if self.initial is None else "fine-tuning"

    @property
    def method(self) -> str:
        """``labels``, ``KD``, ``FAQD``, ``FFAQD``: what the student learns from, labels aside; ``none``: nothing."""
        if self.optimization.epochs == 0:
            return "none"
        if not self.objective.uses_teacher:
            return "labels"
        return {"none": "KD", "fa": "FAQD", "ffa": "FFAQD"}[self.objective.affinity]

    @property
    def bits(self) -> str:
        """``1W4A`` and the like; 32 bits stand for float."""
        return f"{self.quantization.weight_bits}W{self.quantization.activation_bits}A"

    @property
    def digest(self) -> str:
        """SHA-256 of the whole configuration, nested runs and recipe version included."""
        return text_digest(canonical_json(self.model_dump(mode="json")))

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
        if self.initial is not None:
            parts.append("finetuned" if self.optimization.epochs else "posttraining")
        return "-".join([*parts, f"seed{self.seed}", self.digest[:12]])
