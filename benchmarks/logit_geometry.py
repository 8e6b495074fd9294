"""Far or near? The logits of students and teachers of a study, as the first training step and the last one see them.

    python benchmarks/logit_geometry.py results/reference/short-cifar10-jpeg

For each seed of the study whose teacher is finished and kept its weights, in rows of these students:

- ``random``: 1-bit student with random initial weights, where end-to-end training starts.
- ``rounded``: a float network rounded to 1 bit, where fine-tuning starts. No float student is trained in that study, so
  the network is the teacher of the next seed; its teacher is the seed's own.
- each arm of the cells ``updates-400`` with one weight bit whose weights are there, after training.

The images are training batches, cropped and mirrored. Students take the statistics of the batch, as in training. No
test image is used. Columns are those of :class:`faqd_lib.training.logit_geometry.LogitGeometry`, means over images
unless named otherwise. Nothing is timed. Prints the means over seeds, and writes ``logit_geometry.json`` and
``logit_geometry.png`` to ``--out``, by default ``results/benchmarks``.
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from reporting import announce, show, write
from torch import Tensor, nn

from faqd_lib.quantization.network import quantize
from faqd_lib.reporting import charts
from faqd_lib.runs.profile import default_results
from faqd_lib.runs.suite import Suite
from faqd_lib.training.logit_geometry import LogitGeometry, fisher, logit_geometry, training_logits
from faqd_lib.training.objective import logit_kl
from faqd_lib.utils.measure import environment

TEMPERATURES = (1.0, 4.0, 16.0)
CELLS = "updates-400"


def students(suite: Suite, seed: int, seeds: list[int]) -> Iterator[tuple[str, nn.Module]]:
    """The students of a seed, by name; see the head of this module."""
    runs = {arm: run for (arm, bits), run in suite.study_runs(CELLS, seed).items() if bits == 1}
    config = next(iter(runs.values()))
    yield "random", suite.build(config)
    if len(seeds) > 1:
        another = seeds[(seeds.index(seed) + 1) % len(seeds)]
        network = suite.model(suite.teacher(student_seed=another))
        yield "rounded", quantize(network, **config.quantization.quantize_arguments)
    for arm, run in runs.items():
        if (suite.store.run_folder(run) / "weights.safetensors").is_file():
            yield arm, suite.model(run)


def row(z: Tensor, t: Tensor, found: LogitGeometry) -> dict[str, float]:
    """The measured columns of one student at one temperature."""
    T, d = found.temperature, (z - t).double()
    quadratic = torch.einsum("bi,bij,bj->b", d, fisher(t.double(), T), d).mean() / 2
    of_mse, of_kl = found.missed_shares
    return {
        "images": len(z),
        "agreement %": 100 * float(found.agrees.double().mean()),
        "|d|": float(found.distance.mean()),
        "|d centred|": float(found.centred.mean()),
        "spread": float(found.spread.mean()),
        "margin": float(found.margin.mean()),
        "rho": float(found.rho.mean()),
        "near %": 100 * found.near,
        "may flip %": 100 * found.may_flip,
        "KL / quadratic": float(logit_kl(z.double(), t.double(), T) / quadratic),
        "MSE gradient": float(found.mse_gradient.mean()),
        "KL gradient": float(found.kl_gradient.mean()),
        "matched weight": found.matched_weight,
        "fewest KL steps": float(found.fewest_kl_steps.mean()),
        "cosine": float(found.kl_cosine.mean()),
        "median smallest eigenvalue": float(found.smallest.median()),
        "median largest eigenvalue": float(found.largest.median()),
        "MSE gradient² on missed %": 100 * of_mse,
        "KL gradient² on missed %": 100 * of_kl,
    }


def figure_of(means: pd.DataFrame) -> Figure:
    """Distance from the teacher, and how much more of its gradient KL has on missed images than MSE; against T."""
    ratio = means["KL gradient² on missed %"] / means["MSE gradient² on missed %"]
    panels = {"far or near": (means["rho"], "ρ = (max d − min d) / T; near below 1"),
              "which images": (ratio, "share on missed images, KL's / MSE's")}  # fmt: skip
    frame = pd.DataFrame({"x": means["T"], "series": means["student"], "kind": "measured"})
    parts = [frame.assign(panel=name, y=y, y_label=label) for name, (y, label) in panels.items()]
    return charts.scaling(pd.concat(parts), "temperature T", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=f"results folder of a study with the cells {CELLS}, with weights")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--data-root", type=Path, help="where the images are; FAQD_DATA, then data/")
    parser.add_argument("--out", type=Path, default=default_results() / "benchmarks", help="folder to write to")
    arguments = parser.parse_args()
    machine = environment(torch.device("cpu"))
    announce(machine)
    suite = Suite.read(arguments.folder)
    if suite.profile.study is None or CELLS not in suite.profile.study.cells:
        parser.error(f"{arguments.folder} holds no study with the cells {CELLS}")
    seeds = [seed for seed in suite.profile.study.seeds if suite.store.record(suite.teacher(student_seed=seed))]
    rows = []
    for seed in seeds:
        batches = suite.batches(list(suite.study_runs(CELLS, seed).values()))
        images = [batch.images for batch in islice(batches.epoch(0), arguments.batches)]
        teacher = suite.model(suite.teacher(student_seed=seed))
        for name, student in students(suite, seed, seeds):
            z, t = training_logits(student, teacher, images)
            for T in TEMPERATURES:
                rows.append({"student": name, "seed": seed, "T": T} | row(z, t, logit_geometry(z, t, T)))
    if not rows:
        parser.error(f"{arguments.folder} has no finished teacher of a seed of its study")
    frame = pd.DataFrame(rows)
    means = frame.groupby(["student", "T"], sort=False).mean().drop(columns="seed")
    means.insert(0, "n (seeds)", frame.groupby(["student", "T"], sort=False)["seed"].nunique())
    shown = show("Far or near: means over seeds", means.reset_index())
    print(*charts.save(figure_of(means.reset_index()), arguments.out, "logit_geometry"))
    write(arguments.out, "logit_geometry", {"environment": machine, "rows": rows, "means": shown})


if __name__ == "__main__":
    main()
