"""Shared by the benchmarks: options, the spread of times, tables on the terminal and as JSON."""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from scipy.stats import binom

from faqd_lib.runs.profile import default_results
from faqd_lib.utils.files import atomic_write_text


def options(description: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with ``--device``, ``--rounds`` and ``--out``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"calls of each candidate, in turns ({rounds})")
    parser.add_argument(
        "--out", type=Path, default=default_results() / "benchmarks", help="folder to write to (results/benchmarks)"
    )
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments. Rounds and batches must be at least 2, for a spread and for batch statistics."""
    arguments = parser.parse_args()
    for name in ("rounds", "batch"):
        if getattr(arguments, name, 2) < 2:
            parser.error(f"--{name} must be at least 2, got {getattr(arguments, name)}")
    return arguments


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Number of times, and their median and interquartile range in milliseconds."""
    low, _, high = statistics.quantiles(seconds, n=4)
    return {"n": len(seconds), "median_ms": 1e3 * statistics.median(seconds), "iqr_ms": 1e3 * (high - low)}


def paired_ratio(seconds: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Median over turns of own time divided by reference time, and its 95 % interval.

    The bounds are two of the sorted ratios, chosen by the binomial distribution. Below six turns the interval is the
    range of all ratios, which holds less than 95 %.
    """
    ratios = sorted(own / other for own, other in zip(seconds, reference, strict=True))
    outside = max(0, int(binom.ppf(0.025, len(ratios), 0.5)) - 1)
    return statistics.median(ratios), ratios[outside], ratios[-1 - outside]


def announce(machine: dict[str, str | int]) -> None:
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)


def show(title: str, frame: pd.DataFrame) -> list[dict]:
    """Print a table; return its rows as they go into the JSON file."""
    print(f"\n{title}\n{frame.round(3).to_markdown(index=False)}\n", flush=True)
    return json.loads(frame.to_json(orient="records"))


def write(out: Path, name: str, result: dict) -> None:
    print(atomic_write_text(out / f"{name}.json", json.dumps(result, indent=1) + "\n"), flush=True)
