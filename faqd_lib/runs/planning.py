"""In which order runs are trained, and which of them side by side."""

import math
from collections.abc import Sequence

from ..config import RunConfig


def waves(configs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Runs in an order in which nothing comes before what it needs: each wave needs only earlier ones."""

    def depth(config: RunConfig) -> int:
        return max((1 + depth(other) for other in (config.teacher, config.initial) if other is not None), default=0)

    everything: dict[RunConfig, int] = {}

    def add(config: RunConfig) -> None:
        for other in (config.teacher, config.initial):
            if other is not None:
                add(other)
        everything.setdefault(config, depth(config))

    for config in configs:
        add(config)
    deepest = max(everything.values(), default=-1)
    return [[c for c, level in everything.items() if level == wave] for wave in range(deepest + 1)]


def cohorts(configs: Sequence[RunConfig], largest: int) -> list[list[RunConfig]]:
    """Split runs into groups that can share their batches and their teacher, none larger than ``largest``."""
    groups: dict[tuple, list[RunConfig]] = {}
    for config in sorted(configs, key=lambda config: config.teacher is None):  # runs without a teacher join last
        o = config.optimization
        shared = (config.data, config.seed, o.epochs, o.batch_size, o.precision, o.compiled, config.label_free)
        key = (*shared, config.teacher)
        if config.teacher is None:
            key = next((other for other in groups if other[:-1] == shared), key)
        groups.setdefault(key, []).append(config)
    return [group[i : i + largest] for group in groups.values() for i in range(0, len(group), largest)]


def cohort_size(runs: int, workers: int, largest: int) -> int:
    """As large as is allowed, but so that every worker has something to do."""
    return max(1, min(largest, math.ceil(runs / workers)))
