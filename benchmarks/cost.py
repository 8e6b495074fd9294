"""Project the hours that each table takes on several workers, from steps measured on this machine.

    python benchmarks/cost.py cpu --images 50000                 # minutes; then hours for 1, 2, 8 and 32 workers
    python benchmarks/cost.py paper --images 50000 --device cuda

Measured, as medians of ``--rounds`` calls in turns with the threads of one worker: seconds to make a batch, of each
teacher's pass, and of each kind of student's step. Weights are random, images are enlarged digits.

The model of the projection:

- A cohort takes epochs × batches × (data + its teacher's pass + the steps of its students). Evaluation is left out.
- The notebooks ask for their runs one after the other. What they ask for is trained in waves: teachers, students,
  fine-tuned students. Each wave waits for the end of the wave before.
- The cohorts of a wave are as large as the engine makes them, and go to the next free worker, in order.
- Workers are as fast as this machine and do not slow each other. Shared files, start-up and failures cost nothing.
- The steps of a cohort are added up. A GPU, on which students compute side by side, takes less.

Prints tables; writes ``cost-PROFILE.json`` to ``--out``, by default ``results/benchmarks``.
"""

import heapq
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping

import pandas as pd
import torch
from reporting import announce, options, parse, show, write
from training import cohort_step, peaks

from faqd_lib.config import RunConfig
from faqd_lib.quantization.relu import STEP_GRADIENTS
from faqd_lib.quantization.weights import FLOAT_BITS
from faqd_lib.reporting import grids
from faqd_lib.runs import planning
from faqd_lib.runs.profile import Profile
from faqd_lib.runs.suite import Suite
from faqd_lib.training.cuda_graphs import own_stream
from faqd_lib.utils.measure import environment, exact_kernels, take_turns

# What the notebooks ask for, call by call. A table costs its own calls; the series all, but no run twice.
TABLES = {
    "references": [grids.references],
    "T1": [grids.weight_quantization],
    "T2": [
        grids.full_quantization,
        *(lambda suite, kind=kind: grids.activation_steps(suite)[kind] for kind in STEP_GRADIENTS),
    ],
    "T3": [grids.logit_losses],
    "T4": [grids.affinity_losses],
}
SERIES = [lambda suite: [suite.teacher(), suite.student("KD", weight_bits=1)], *itertools.chain(*TABLES.values())]
# The settings of a run on which the time of a step depends. Its seed and its labels do not matter.
Kind = tuple[str, int, bool, bool, str, int]


def kind_of(config: RunConfig) -> Kind:
    quantization, objective = config.quantization, config.objective
    return (
        config.model, config.optimization.batch_size, quantization.weight_bits < FLOAT_BITS,
        quantization.activation_bits < FLOAT_BITS,
        config.method, objective.k if config.method == "FFAQD" else 0,
    )  # fmt: skip


def alone(config: RunConfig) -> RunConfig:
    """The run from random weights: the time of a step does not depend on the run that it would start from."""
    return config.model_copy(update={"initial": None})


def measured(suite: Suite, runs: Iterable[RunConfig], rounds: int) -> tuple[dict[Kind, float], dict[tuple, float]]:
    """Seconds of a student's own step by kind, and of (data and teacher's pass) by (teacher, batch size)."""
    kinds = {kind_of(config): alone(config) for config in runs}
    whole: dict[object, Callable[[], None]] = {
        kind: cohort_step(suite, [config], _teacher(config)) for kind, config in kinds.items()
    }
    shared = {(_teacher(config), config.optimization.batch_size): config for config in kinds.values()}
    whole |= {key: cohort_step(suite, [], key[0], like=config) for key, config in shared.items()}
    peaks(whole, suite.device)  # warms up: the third call of a recorded step records it
    seconds = {name: statistics.median(times) for name, times in take_turns(whole, rounds, suite.device).items()}
    common = {key: seconds[key] for key in shared}
    own = {
        kind: seconds[kind] - common[_teacher(config), config.optimization.batch_size] for kind, config in kinds.items()
    }
    return own, common


def _teacher(config: RunConfig) -> str | None:
    return config.teacher.model if config.teacher else None


def needed(calls: Iterable[list[RunConfig]]) -> Iterator[list[RunConfig]]:
    """Waves of runs that a series of calls trains, each run once."""
    done: set[RunConfig] = set()
    for configs in calls:
        for wave in planning.waves(configs):
            left = [config for config in wave if config.optimization.epochs and config not in done]
            done.update(left)
            if left:
                yield left


def projected(
    waves: Iterable[list[RunConfig]],
    workers: int,
    largest: int,
    images: int,
    own: Mapping[Kind, float],
    common: Mapping[tuple, float],
) -> float:
    """Seconds until the last run is done; ``largest`` is the greatest size of a cohort."""
    total = 0.0
    for wave in waves:
        free = [0.0] * workers
        for cohort in planning.cohorts(wave, planning.cohort_size(len(wave), workers, largest)):
            teacher = next((name for name in map(_teacher, cohort) if name), None)
            schedule = cohort[0].optimization
            step = common[teacher, schedule.batch_size] + sum(own[kind_of(config)] for config in cohort)
            steps = schedule.epochs * (images // schedule.batch_size)
            heapq.heapreplace(free, free[0] + steps * step)
        total += max(free)
    return total


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("profile", help="a shipped profile, or the path of a .toml file")
    parser.add_argument("--images", type=int, required=True, help="training images (50000 for CIFAR)")
    parser.add_argument("--seeds", type=int, default=0, help="number of seeds (the profile's)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 8, 32], help="how many workers (1 2 8 32)")
    parser.add_argument("--threads", type=int, default=0, help="threads of a worker (torch's own choice)")
    arguments = parse(parser)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    machine = environment(arguments.device)
    announce(machine)
    shipped = Profile.load(arguments.profile)
    settings = {"train_images": None, "test_images": None, "image_size": 32, "dataset_settings": {}}
    profile = shipped.model_copy(update=settings)
    with tempfile.TemporaryDirectory() as scratch:
        suite = Suite.open(profile, "digits", results=scratch, device=arguments.device, seeds=arguments.seeds)
        series = [make(suite) for make in SERIES]
        with own_stream(suite.device), exact_kernels():
            own, common = measured(suite, itertools.chain(*needed(series)), arguments.rounds)
        rows = [
            {"what": "data" + (f" and a pass through {name}" if name else ""), "batch": batch, "ms": 1e3 * seconds}
            for (name, batch), seconds in common.items()
        ]
        names = ("network", "batch", "weights quantized", "activations quantized", "method", "k")
        rows += [
            {"what": "step of " + ", ".join(f"{n} {v}" for n, v in zip(names, kind, strict=True) if n != "batch")}
            | {"batch": kind[1], "ms": 1e3 * seconds}
            for kind, seconds in own.items()
        ]
        result = {"environment": machine, "precision": suite.precision, "profile": profile.name}
        result |= {"images": arguments.images, "measured": show("measured", pd.DataFrame(rows))}
        lines = []
        for name, calls in {**{n: [make(suite) for make in t] for n, t in TABLES.items()}, "series": series}.items():
            waves = list(needed(calls))
            runs = list(itertools.chain(*waves))
            line = {"table": name, "runs": len(runs), "epochs": sum(config.optimization.epochs for config in runs)}
            for workers in arguments.workers:
                seconds = projected(waves, workers, profile.cohort, arguments.images, own, common)
                line[f"hours, {workers} worker{'s' * (workers > 1)}"] = seconds / 3600
            lines.append(line)
        what = f"profile {profile.name}, {suite.profile.seeds} seed(s), {arguments.images:,} images: hours, projected"
        result["projected"] = show(what, pd.DataFrame(lines))
        write(arguments.out, f"cost-{profile.name}", result)


if __name__ == "__main__":
    main()
