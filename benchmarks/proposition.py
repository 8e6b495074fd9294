"""Test Proposition 4.2 on the maps of a trained student and its teacher: how the error of FFA falls with k.

    python benchmarks/proposition.py results/reference/cpu-cifar10-jpeg '*-1w32a-faqd-*labelfree*'

For each stage and each of ``--images`` test images, draws Gaussian projections and estimates the affinity loss of that
image from the first k of them, ``--repeats`` times. Measures

- the slope of the logarithm of the relative mean squared error against log k; the proposition says −1,
- the root-mean-square error at k = 6 beside the formula of :mod:`faqd_lib.affinity.statistics`,
- the share of estimates that are off by more than half of the loss at k = 15 beside Chebyshev's bound.

The interval of the slope is from 400 bootstrap samples of the repeats, with the images fixed. Nothing is timed. Prints
a table, and writes ``proposition.json`` to ``--out``, by default ``results/benchmarks``.
"""

import argparse
import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from reporting import announce, show, write

from faqd_lib import affinity_matrix, affinity_statistics
from faqd_lib.models import FeatureTap
from faqd_lib.runs.profile import default_results
from faqd_lib.runs.suite import Suite
from faqd_lib.utils.measure import environment

KS = np.array([1, 2, 3, 6, 10, 15, 30, 60])
RESAMPLES = 400
OFF = 0.5  # of the loss


def estimates(student: torch.Tensor, teacher: torch.Tensor, repeats: int, seed: int) -> np.ndarray:
    """Estimates of one image's loss, divided by this loss: (len(KS), repeats); maps (1, channels, height, width)."""
    difference = (affinity_matrix(student) - affinity_matrix(teacher))[0].double()
    pixels = len(difference)
    generator = torch.Generator().manual_seed(seed)
    energies = torch.cat(
        [
            (difference @ torch.randn(pixels, 1000, generator=generator, dtype=torch.float64)).square().sum(0)
            for _ in range(-(-KS[-1] * repeats // 1000))
        ]
    )
    by_repeat = energies[: KS[-1] * repeats].reshape(repeats, KS[-1]).cumsum(1) / difference.square().sum()
    return np.stack([(by_repeat[:, k - 1] / k).numpy() for k in KS])


def row(network: str, stage: str, maps: tuple[torch.Tensor, torch.Tensor], repeats: int) -> dict:
    """One line of the table: a stage of a network, over all images."""
    found = np.stack(
        [estimates(s[None], t[None], repeats, seed) for seed, (s, t) in enumerate(zip(*maps, strict=True))]
    )  # images × k × repeats
    errors = ((found - 1) ** 2).mean(0)
    draws = np.random.default_rng(0).integers(0, repeats, (RESAMPLES, repeats))
    slopes = [np.polyfit(np.log(KS), np.log(errors[:, draw].mean(1)), 1)[0] for draw in draws]
    statistics = affinity_statistics(*maps)
    relative = {k: statistics.variance_of_images(k) / statistics.loss_of_images**2 for k in (6, 15)}
    low, high = np.quantile(slopes, [0.025, 0.975])
    return {
        "network": network,
        "stage": stage,
        "images": len(found),
        "repeats": repeats,
        "slope": np.polyfit(np.log(KS), np.log(errors.mean(1)), 1)[0],
        "slope low": low,
        "slope high": high,
        "RMS error k=6": errors[list(KS).index(6)].mean() ** 0.5,
        "formula": float(relative[6].mean().sqrt()),
        "share off by half k=15": float((np.abs(found[:, list(KS).index(15)] - 1) > OFF).mean()),
        "Chebyshev": float((relative[15] / OFF**2).clamp(max=1).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a suite's results folder, with weights")
    parser.add_argument("pattern", help="of names of label-free students")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--out", type=Path, default=default_results() / "benchmarks", help="folder to write to")
    arguments = parser.parse_args()
    machine = environment(torch.device("cpu"))
    announce(machine)
    suite = Suite.read(arguments.folder)
    rows = []
    for record in suite.store.records():
        config = record.configuration
        if config.teacher is None or not fnmatch.fnmatch(record.run_id, arguments.pattern):
            continue
        student, teacher = suite.model(config), suite.model(config.teacher)
        images = suite.normalizer(suite.splits.test.pixels[: arguments.images])
        names = student.feature_names
        with torch.no_grad(), FeatureTap(student, names) as of_student, FeatureTap(teacher, names) as of_teacher:
            student(images), teacher(images)
        for stage, *maps in zip(names, of_student.features, of_teacher.features, strict=True):
            rows.append(row(f"{config.bits} {config.method}", stage, tuple(maps), arguments.repeats))
    if not rows:
        parser.error(f"{arguments.folder} has no student whose name matches {arguments.pattern!r}")
    shown = show("Proposition 4.2", pd.DataFrame(rows))
    write(arguments.out, "proposition", {"environment": machine, "rows": shown})


if __name__ == "__main__":
    main()
