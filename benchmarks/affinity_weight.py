"""Choose the affinity weight on held-out images: label-free students at several weights on a validation split.

    python benchmarks/affinity_weight.py --profile cpu --weights 0 10 30 100 300

Teacher and students are trained without the validation images; the test images are not used for the choice. Prints a
table and writes ``results/<profile>-tuning-<dataset>/affinity_weight.json``. A second call finds finished runs again.
"""

import argparse
import json
from pathlib import Path

import pandas as pd

from faqd_lib.config import ConfigurationError
from faqd_lib.runs.profile import Profile
from faqd_lib.runs.suite import Suite
from faqd_lib.utils.files import atomic_write_text


def tuning_profile(profile: str, share: float, images: int) -> Profile:
    """The profile with a validation split of ``share`` of its training images, under a name of its own."""
    base = Profile.load(profile)
    held_out = round(share * (base.train_images or images))
    return base.model_copy(update={"name": f"{base.name}-tuning", "validation_images": held_out})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--dataset", default="")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--weights", type=float, nargs="+", default=[0, 10, 30, 100, 300])
    parser.add_argument("--weight-bits", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    if min(arguments.weights) < 0:
        raise ConfigurationError(f"--weights must be at least 0, got {min(arguments.weights)}")

    probe = Suite.open(arguments.profile, arguments.dataset, arguments.data_root, arguments.results)
    profile = tuning_profile(arguments.profile, 0.1, len(probe.data.train))
    suite = Suite.open(profile, probe.dataset, arguments.data_root, arguments.results, arguments.seeds)
    print(suite.caption, f"{suite.state.data.validation_images} validation images", sep="; ")

    runs = {
        (weight, seed): suite.student(
            "FAQD" if weight else "KD", weight_bits=arguments.weight_bits, affinity_weight=weight or None, seed=seed
        )
        for weight in arguments.weights
        for seed in range(1, arguments.seeds + 1)
    }
    records = suite.run(runs.values(), "affinity weight")
    rows = [
        {
            "affinity weight": weight,
            "seed": seed,
            "validation accuracy (%)": record.history[-1]["validation_accuracy"],
            "training logit loss": record.history[-1]["logit"],
        }
        for (weight, seed), record in zip(runs, records, strict=True)
    ]
    frame = pd.DataFrame(rows)
    print(frame.groupby("affinity weight").mean().drop(columns="seed").round(3).to_markdown())
    result = {"caption": suite.caption, "environment": records[0].environment, "rows": rows}
    print(atomic_write_text(suite.folder / "affinity_weight.json", json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
