"""Profiles, validated, and what a results folder was begun with: all that a suite is, short of its data and runs."""

import difflib
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..config import (
    ActivationBits,
    ConfigurationError,
    Count,
    DataConfig,
    Positive,
    Precision,
    Schedule,
    StrictModel,
    WeightBits,
)
from ..data import datasets
from ..models import MODEL_NAMES
from ..quantization.weights import FLOAT_BITS
from ..utils.files import atomic_write_text, project_root
from .store import ResultsError

ModelName = Literal[MODEL_NAMES]
PROFILES = ("smoke", "quick", "cpu", "paper")


class Losses(StrictModel):
    """Weights of the objective's terms, and the logit loss of each regime outside the table that compares them."""

    end_to_end_logit_loss: Literal["mse", "kl"] = "mse"
    fine_tuning_logit_loss: Literal["mse", "kl"] = "kl"
    logit_weight: Positive = 1.0
    temperature: Positive = 4.0
    affinity_weight: Positive = 30.0
    label_weight: Positive = 0.3
    k: Count = 6
    adapters: bool = False


class Grid(StrictModel):
    """Which cells of the tables are trained; a cell that is left out reads "not run".

    ``weight_teachers``: teachers of T1's students, the profile's first among them; empty for all. The other tables take
    the first. ``projections``: the k of T4's FFA at the fewest of ``affinity_bits``; at more bits only ``losses.k``.
    """

    weight_teachers: list[ModelName] = []
    weight_bits: Annotated[list[WeightBits], Field(min_length=1)] = [1, 2, 4]
    weight_regimes: Annotated[list[Literal["end-to-end", "fine-tuning"]], Field(min_length=1)] = [
        "end-to-end",
        "fine-tuning",
    ]
    full_bits: Annotated[list[tuple[WeightBits, ActivationBits]], Field(min_length=1)] = [(1, 4), (2, 4), (4, 4)]
    full_regimes: Annotated[list[Literal["end-to-end", "fine-tuning"]], Field(min_length=1)] = [
        "end-to-end",
        "fine-tuning",
    ]
    logit_bits: list[WeightBits] = [1, 2, 4]
    affinity_bits: Annotated[list[WeightBits], Field(min_length=1)] = [1]
    projections: list[Count] = [1, 3, 6, 15]

    @model_validator(mode="after")
    def _something_is_quantized(self) -> Self:
        if all(bits == FLOAT_BITS for bits in self.weight_bits):
            raise ValueError(f"grid.weight_bits = {self.weight_bits} has no bits below {FLOAT_BITS}: T1 needs some")
        for pair in self.full_bits:
            if pair[1] == FLOAT_BITS:
                raise ValueError(
                    f"grid.full_bits has {list(pair)}, whose activations are float: such students belong to "
                    "grid.weight_bits"
                )
        return self


class Profile(StrictModel):
    """A profile file (``faqd_lib/profiles/*.toml``, or one of the user's own)."""

    name: str
    shows_results: bool  # False: its numbers are for tests and never shown as a result
    dataset: str = "auto"
    download: bool = False
    train_images: Count | None = None
    test_images: Count | None = None
    validation_images: Annotated[int, Field(ge=0)] = 0
    image_size: Count | None = None
    teachers: Annotated[list[ModelName], Field(min_length=1)]
    student: ModelName
    seeds: Count = 1
    checkpoint_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 120.0  # of training between checkpoints
    cohort: Count = 8
    compile: bool = False  # passes by torch.compile: other last digits, so other runs
    cuda_graphs: bool = True  # on CUDA: steps recorded and replayed; the same bits
    teacher_schedule: Schedule
    student_schedule: Schedule
    fine_tuning_schedule: Schedule
    losses: Losses = Losses()
    grid: Grid = Grid()
    series_datasets: list[str] = ["auto"]
    dataset_settings: dict[str, dict] = {}

    @model_validator(mode="before")
    @classmethod
    def _lists_to_tuples(cls, values: dict) -> dict:
        # TOML has no tuples; the pairs of bits are lists there.
        grid = values.get("grid") if isinstance(values, dict) else None
        if isinstance(grid, dict) and isinstance(grid.get("full_bits"), list):
            pairs = [tuple(pair) if isinstance(pair, list) else pair for pair in grid["full_bits"]]
            values = {**values, "grid": {**grid, "full_bits": pairs}}
        return values

    @model_validator(mode="after")
    def _teachers_are_there(self) -> Self:
        chosen = self.grid.weight_teachers
        for teacher in chosen:
            if teacher not in self.teachers:
                raise ValueError(f"grid.weight_teachers has {teacher!r}, which is none of the teachers {self.teachers}")
        if chosen and self.teachers[0] not in chosen:
            raise ValueError(
                f"grid.weight_teachers = {chosen} lacks {self.teachers[0]!r}, the first of the teachers, whose "
                "students the notebooks look at: add it, or put another teacher first"
            )
        return self

    @model_validator(mode="after")
    def _datasets_are_valid(self) -> Self:
        for dataset in self.dataset_settings:  # now, not when their turn comes after days
            self.for_dataset(dataset)
        return self

    @classmethod
    def load(cls, profile: str | Path) -> Self:
        """A shipped profile by name, or a TOML file by path.

        Raises:
            ConfigurationError: no such profile, no valid TOML, unknown keys, wrong types, values out of range.
        """
        path = Path(profile)
        if str(profile) in PROFILES:
            text = (resources.files(__package__) / "profiles" / f"{profile}.toml").read_text(encoding="utf-8")
        elif path.suffix == ".toml" and path.is_file():
            text = path.read_text(encoding="utf-8")
        else:
            near = difflib.get_close_matches(str(profile), PROFILES, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            missing = "; there is no such file" if path.suffix == ".toml" else ""
            raise ConfigurationError(
                f"unknown profile {str(profile)!r}{missing}{hint}: choose {', '.join(PROFILES)}, "
                "or the path of a .toml file"
            )
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigurationError(f"{profile}: not valid TOML: {error}") from error
        return cls.parse({"name": path.stem, **values}, where=str(profile))

    def resolve_dataset(self, dataset: str, data_root: str | Path | None) -> tuple[str, str]:
        """The dataset that is used and the reason, from a name, ``"auto"`` or nothing (the profile's own choice)."""
        return datasets.resolve(
            dataset or self.dataset, data_root or None, allow_digits=not self.download, allow_download=self.download
        )

    def for_dataset(self, dataset: str) -> Self:
        """This profile with the settings that it has for one dataset: only what is named there changes."""
        settings = _merged(self.model_dump(), self.dataset_settings.get(dataset, {})) | {"dataset_settings": {}}
        return type(self).parse(settings, where=f"profile {self.name}, dataset_settings.{dataset}")


def _merged(settings: dict, changes: dict) -> dict:
    """``settings`` with ``changes``, table by table."""
    inside = {
        key: _merged(settings[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(settings.get(key), dict)
    }
    return settings | changes | inside


class SuiteState(StrictModel):
    """What a results folder was begun with (``suite.json``): enough to name its runs and to caption its tables."""

    profile: Profile
    dataset: str
    reason: str
    note: str
    data: DataConfig
    training_count: int
    test_count: int
    precision: Precision
    recipe: int
    affinity_recipe: int
    quantizer_recipe: int

    @property
    def caption(self) -> str:
        """What every table and figure says of its origin."""
        note = f" ({self.note})" if self.note else ""
        text = (
            f"{self.dataset}{note}, {self.training_count:,} training and {self.test_count:,} test images"
            f"{' (class-balanced subsets)' if self.data.train_images or self.data.test_images else ''}, "
            f"profile {self.profile.name}{', compiled' if self.profile.compile else ''}"
        )
        return text if ": found on disk" in self.reason or ": asked for" in self.reason else f"{text}; {self.reason}"


# Settings under which the same runs are the same runs: they may differ from what the folder was begun with, as may
# the grid, which only says which runs there are.
FREE_SETTINGS = {"reason"} | {
    f"profile.{name}"
    for name in ("seeds", "cohort", "compile", "cuda_graphs", "series_datasets", "dataset", "checkpoint_seconds")
}


def default_results() -> Path:
    """``results/`` in the project."""
    return project_root() / "results"


def suite_folder(profile: Profile, dataset: str, results: str | Path | None = None) -> Path:
    """Where the suite of a profile on a dataset lives."""
    return Path(results or default_results()) / f"{profile.name}-{dataset}"


def read_state(folder: Path) -> SuiteState:
    """What a results folder was begun with.

    Raises:
        ResultsError: nothing was begun there, or ``suite.json`` is damaged.
    """
    path = folder / "suite.json"
    if not path.is_file():
        raise ResultsError(f"no suite was begun in {folder}: there is no suite.json")
    try:
        return SuiteState.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(
            f"{path} is damaged or of another version of the suite: give another folder with --results, or begin "
            "again with --fresh (the old folder is moved aside)"
        ) from error


def claim(folder: Path, state: SuiteState, asked_seeds: int) -> SuiteState:
    """Begin the folder, or make sure that it was begun with the same configuration; return the state to work with.

    ``asked_seeds`` 0 keeps the number of seeds that the folder has, if that is more than the profile's.
    """
    path = folder / "suite.json"
    if path.exists():
        begun = read_state(folder)
        # What the folder was begun with stays, though another precision might pay on this machine.
        state = state.model_copy(update={"precision": begun.precision})
        differences = [
            "other images" if key == "data.fingerprint" else f"{key}: {was!r} there, {now!r} now"
            for key, was, now in _differences(begun.model_dump(mode="json"), state.model_dump(mode="json"))
            if key not in FREE_SETTINGS and not key.startswith("profile.grid.")
        ]
        if differences:
            raise ResultsError(
                f"{folder} was begun with another configuration ({'; '.join(differences[:4])}): give another folder "
                "with --results, or begin again with --fresh (the old folder is moved aside)"
            )
        seeds = asked_seeds or max(begun.profile.seeds, state.profile.seeds)
        state = state.model_copy(update={"profile": state.profile.model_copy(update={"seeds": seeds})})
        if state == begun:
            return state
    atomic_write_text(path, state.model_dump_json(indent=1) + "\n")
    return state


def _differences(was: dict, now: dict, prefix: str = "") -> list[tuple[str, object, object]]:
    found = []
    for key in {**was, **now}:
        before, after = was.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append((prefix + key, before, after))
    return found
