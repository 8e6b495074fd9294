"""The order of runs, and the runs that are trained side by side."""

import math
from collections.abc import Sequence

from ..config import RunConfig


def waves(configs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Sort runs, with the teachers and initial weights they need, into waves: each needs runs of earlier waves only."""
    levels: dict[RunConfig, int] = {}

    def level(config: RunConfig) -> int:
        needed = [level(other) for other in (config.teacher, config.initial) if other is not None]
        return levels.setdefault(config, 1 + max(needed, default=-1))

    for config in configs:
        level(config)
    numbers = range(1 + max(levels.values(), default=-1))
    return [[config for config, found in levels.items() if found == number] for number in numbers]


def cohorts(configs: Sequence[RunConfig], largest: int) -> list[list[RunConfig]]:
    """Split runs into groups that can share their batches and their teacher, none larger than ``largest``."""
    groups: dict[tuple, list[RunConfig]] = {}
    for config in sorted(configs, key=lambda config: config.teacher is None):  # runs without a teacher join last
        steps = config.optimization
        shared = (
            config.data, config.images, config.objective.taps, config.seed,
            steps.epochs, steps.updates, steps.batch_size, steps.precision, steps.compiled,
        )  # fmt: skip
        key = (*shared, config.teacher)
        if config.teacher is None:
            key = next((other for other in groups if other[:-1] == shared), key)
        groups.setdefault(key, []).append(config)
    return [group[i : i + largest] for group in groups.values() for i in range(0, len(group), largest)]


def cohort_size(runs: int, workers: int, largest: int) -> int:
    """Size of cohorts: at most ``largest``, and small enough that every worker gets one."""
    return max(1, min(largest, math.ceil(runs / workers)))
