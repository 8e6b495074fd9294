"""Which runs each table is made of. Tables and notebooks take the same lists, so that neither can miss a run."""

from collections.abc import Iterable
from typing import NamedTuple

from ..config import RunConfig
from ..quantization.weights import STEP_GRADIENTS
from ..runs.suite import Suite


class Column(NamedTuple):
    """A column of tables 1 and 2: what a student learns from."""

    title: str
    method: str
    labels: bool


COLUMNS = (
    Column("labels only", "labels", True),
    Column("KD, labels", "KD", True),
    Column("FAQD, labels", "FAQD", True),
    Column("KD, label-free", "KD", False),
    Column("FAQD, label-free", "FAQD", False),
)


def _unique(configs: Iterable[RunConfig]) -> list[RunConfig]:
    return list(dict.fromkeys(configs))


def seeds(suite: Suite) -> range:
    """The students' seeds, from 1 on."""
    return range(1, suite.profile.seeds + 1)


def weight_teachers(suite: Suite) -> list[str]:
    """The teachers of T1's students."""
    return suite.profile.grid.weight_teachers or suite.profile.teachers


def projections(suite: Suite, bits: int) -> list[int]:
    """The k of T4's FFA at so many bits."""
    grid = suite.profile.grid
    return grid.projections if bits == min(grid.affinity_bits) else [suite.profile.losses.k]


def references(suite: Suite) -> list[RunConfig]:
    """Reference rows: the float teachers and, for each seed, the float student."""
    teachers = [suite.teacher(model) for model in suite.profile.teachers]
    return _unique([*teachers, *(suite.float_student(seed) for seed in seeds(suite))])


def weight_quantization(suite: Suite) -> list[RunConfig]:
    """T1: weights at each bit-width × what is learned from × regime × teacher × seed; float activations.

    And for comparison the float student with its weights rounded after training.
    """
    grid = suite.profile.grid
    trained = (
        suite.student(
            column.method, labels=column.labels, weight_bits=bits, regime=regime, teacher=teacher, seed=seed
        )
        for teacher in weight_teachers(suite)
        for regime in grid.weight_regimes
        for bits in grid.weight_bits
        for column in COLUMNS
        for seed in seeds(suite)
    )  # fmt: skip
    rounded = (suite.post_training(bits, seed=seed) for bits in grid.weight_bits for seed in seeds(suite))
    return _unique([*trained, *rounded])


def full_quantization(suite: Suite) -> list[RunConfig]:
    """T2: weights and activations quantized × what is learned from × regime × seed; the first teacher.

    And for comparison the float student, quantized after training.
    """
    grid = suite.profile.grid
    trained = (
        suite.student(
            column.method, labels=column.labels, weight_bits=weights, activation_bits=activations, regime=regime,
            seed=seed,
        )
        for regime in grid.full_regimes
        for weights, activations in grid.full_bits
        for column in COLUMNS
        for seed in seeds(suite)
    )  # fmt: skip
    rounded = (suite.post_training(*bits, seed=seed) for bits in grid.full_bits for seed in seeds(suite))
    return _unique([*trained, *rounded])


def activation_steps(suite: Suite) -> dict[str, list[RunConfig]]:
    """What learning the activation steps buys: label-free FAQD by the gradient of its steps, at T2's first bits."""
    weights, activations = suite.profile.grid.full_bits[0]
    return {
        kind: [
            suite.student(
                "FAQD", weight_bits=weights, activation_bits=activations, regime=suite.profile.grid.full_regimes[0],
                quantization={"step_gradient": kind}, seed=seed,
            )
            for seed in seeds(suite)
        ]
        for kind in STEP_GRADIENTS
    }  # fmt: skip


def logit_losses(suite: Suite) -> list[RunConfig]:
    """T3: label-free FAQD with MSE and with KL × regime × bits × seed."""
    return _unique(
        suite.student("FAQD", weight_bits=bits, regime=regime, logit_loss=loss, seed=seed)
        for regime in ("end-to-end", "fine-tuning")
        for bits in suite.profile.grid.logit_bits
        for loss in ("mse", "kl")
        for seed in seeds(suite)
    )


def affinity_losses(suite: Suite) -> list[RunConfig]:
    """T4: label-free students without affinity loss, with the exact one, and with k projections × bits × seed."""
    return _unique(
        suite.student(method, weight_bits=bits, k=k, seed=seed)
        for bits in suite.profile.grid.affinity_bits
        for method, k in [("KD", None), ("FAQD", None), *(("FFAQD", k) for k in projections(suite, bits))]
        for seed in seeds(suite)
    )


def everything(suite: Suite) -> list[RunConfig]:
    """Every run of the series."""
    tables = (references, weight_quantization, full_quantization, logit_losses, affinity_losses)
    steps = (config for configs in activation_steps(suite).values() for config in configs)
    return _unique([*(config for table in tables for config in table(suite)), *steps])
