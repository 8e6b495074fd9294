"""How long a compression trains, and with which learning rate and affinity weight."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from ..config import ObjectiveConfig, OptimizationConfig, Precision, StrictModel, TrainingConfig

LEARNING_RATE, LEARNING_RATES = 0.005, (0.001, 0.005, 0.02, 0.08)  # the usual one, and those that a search tries
AFFINITY_WEIGHT, OTHER_AFFINITY_WEIGHTS = 30.0, (3.0, 300.0)
SEARCH_SHARE = 0.2  # updates of one student's candidates together, as a share of its training
FEWEST_UPDATES, MOST_UPDATES = 25, 500  # of a candidate; after fewer, a rate that is too low looks best
WARMUP_SHARE = 0.05  # of the updates
EPOCHS = 5  # where neither epochs nor hours are given


class CompressionConfig(TrainingConfig):
    """One student's training. Everything that changes its numbers is in it, hence in its digest."""

    teacher: str  # digest of the weights
    student: str  # digest of the network before it is quantized
    pictures: str  # fingerprint of the training pictures
    mean: tuple[float, ...]
    std: tuple[float, ...]
    taps: tuple[str, ...]  # of the teacher
    student_taps: tuple[str, ...]
    flip: bool
    recipe: Literal[1] = 1  # raise this number when the same configuration would train to other numbers


class Trial(StrictModel):
    """One candidate of the search, after its few updates."""

    bits: str
    learning_rate: float
    affinity_weight: float
    updates: int
    pictures: int  # number of pictures that judge it
    agreement: float | None  # percent, on pictures not trained on; None: the loss was not finite
    cross_entropy: float | None  # of the classes that the teacher names


class Chosen(StrictModel):
    """Learning rate and affinity weight of one student."""

    learning_rate: float
    affinity_weight: float


class Plan(StrictModel):
    """What is decided before the training; a resumed compression reads it instead of deciding again."""

    updates: int
    steps_per_epoch: int
    seconds: float  # of one update of all students; 0 if none was timed
    picture_seconds: float = 0.0  # of evaluating all students on one picture
    trials: list[Trial] = []
    chosen: dict[str, Chosen] = {}  # by bits; empty until the search is done
    failed: dict[str, str] = {}  # by bits: why the search found no learning rate

    @property
    def epochs(self) -> int:
        """Number of epochs, the last of which may end early."""
        return -(-self.updates // self.steps_per_epoch)


class Candidate(NamedTuple):
    """What the search trains: one student with one learning rate and affinity weight."""

    bits: str
    learning_rate: float
    affinity_weight: float


def optimization(
    updates: int, steps_per_epoch: int, batch_size: int, rate: float, precision: Precision
) -> OptimizationConfig:
    """The schedule of so many updates: a short warm-up, then half a cosine to 0."""
    epochs = -(-updates // steps_per_epoch)
    return OptimizationConfig(
        epochs=epochs,
        updates=None if updates == epochs * steps_per_epoch else updates,
        batch_size=batch_size,
        learning_rate=rate,
        warmup_epochs=WARMUP_SHARE * updates / steps_per_epoch,
        precision=precision,
    )


def objective(affinity_weight: float) -> ObjectiveConfig:
    """Squared error of logits and, unless its weight is 0, the exact affinity loss."""
    affinity = "fa" if affinity_weight > 0 else "none"
    return ObjectiveConfig(logit_loss="mse", affinity=affinity, affinity_weight=affinity_weight)


def evaluate_every(epochs: int) -> int:
    """Epochs from one evaluation on held-out pictures to the next: about ten evaluations in a long training."""
    return max(1, epochs // 10)


def updates_within(
    epochs: float | None, seconds_left: float | None, steps_per_epoch: int, seconds: float, trials: float
) -> int:
    """Updates of the training: those of ``epochs``, or as many as fit into ``seconds_left`` beside the search.

    If both are given, the smaller number is taken. There is at least one update.

    Args:
        seconds_left: for the updates of search and training; None without a limit.
        seconds: of one update of all students.
        trials: candidates that each student has in the search; 0 without a search.
    """
    limits = []
    if epochs is not None or seconds_left is None:
        limits.append(math.ceil((EPOCHS if epochs is None else epochs) * steps_per_epoch))
    if seconds_left is not None:
        whole = seconds_left / seconds
        limits.append(int(whole - trials * trial_updates(whole / (1 + SEARCH_SHARE), trials)))
    return max(1, min(limits))


def candidates(
    bits: Iterable[str], learning_rate: float | None, affinity_weight: float | None
) -> list[list[Candidate]]:
    """At most two rounds of the search: learning rates, then affinity weights.

    A learning rate of 0 in the second round stands for the best rate of the first.
    """
    bits = list(bits)
    rounds = []
    if learning_rate is None:
        weight = AFFINITY_WEIGHT if affinity_weight is None else affinity_weight
        rounds.append([Candidate(one, rate, weight) for one in bits for rate in LEARNING_RATES])
    if affinity_weight is None:
        weights = OTHER_AFFINITY_WEIGHTS if learning_rate is None else (AFFINITY_WEIGHT, *OTHER_AFFINITY_WEIGHTS)
        rounds.append([Candidate(one, learning_rate or 0.0, weight) for one in bits for weight in weights])
    return rounds


def best(trials: Sequence[Trial], bits: str) -> Trial | None:
    """The trial of ``bits`` with the highest agreement; among equals, the one with the lowest cross-entropy.

    A trial with another affinity weight than the first trial's must win by more than one standard error. None if every
    loss stopped being finite.
    """
    finite = [trial for trial in trials if trial.bits == bits and trial.agreement is not None]
    if not finite:
        return None
    usual = [trial for trial in finite if trial.affinity_weight == finite[0].affinity_weight]
    found, other = (max(some, key=lambda trial: (trial.agreement, -trial.cross_entropy)) for some in (usual, finite))
    error = math.sqrt(found.agreement * (100 - found.agreement) / found.pictures)
    return other if other.agreement > found.agreement + error else found


def trial_updates(updates: float, trials: float) -> int:
    """Updates of one candidate of a student that has ``trials`` of them, and trains for ``updates`` updates.

    0 means no search: there are no candidates, or each would have fewer than :data:`FEWEST_UPDATES`.
    """
    each = int(SEARCH_SHARE * updates / trials) if trials else 0
    return 0 if each < FEWEST_UPDATES else min(MOST_UPDATES, each)
