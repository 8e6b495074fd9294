"""Write the generated tables of README and docs: ``python -m faqd_lib.cli.pages``.

A page holds pairs of lines ``<!-- generated: NAME -->`` and ``<!-- end -->``. What stands between them comes from the
committed run records and benchmarks of ``results/reference`` and is never typed.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from ..reporting import claims, loss_claims, study_claims, study_curves, tables, where
from ..runs.store import ResultsError
from ..runs.suite import Suite
from ..utils.files import atomic_write_text, project_root

SUITE = Path("results/reference/cpu-cifar10-jpeg")
STUDY = Path("results/reference/short-cifar10-jpeg")
LOSSES = Path("results/reference/losses-cifar10-jpeg")
SEGMENTATION = Path("results/reference/segmentation-camvid")
WHERE = Path("results/reference/where-cifar10-jpeg")
BENCHMARKS = Path("results/reference/benchmarks")
STEPS = "step|how|teacher|batch|n|median_ms|iqr_ms|time / float"
COHORTS = "teacher|students|batch|n|median_ms|iqr_ms|time / separate runs"
PLAIN = "implementation|teacher|n|median_ms|iqr_ms|peak_MiB|times the plain images/s"
FILES = "run|float32_bytes|packed_bytes|onnx_bytes|packed: same bits|same class %"
SLOPES = "network|stage|slope|slope low|slope high|RMS error k=6|formula|share off by half k=15|Chebyshev"
LOGITS = (
    "student|T|n (seeds)|agreement %|rho|near %|fewest KL steps|cosine"
    "|MSE gradient² on missed %|KL gradient² on missed %"
)
RIVALS = (
    "student|bits|seeds|CPU minutes|updates|learning rates|bytes of the file|agreement (%)|test accuracy (%)|note"
    "|commit"
)
# By name of a table: file, part of it, columns.
MEASURED = {
    "affinity_targets": ("affinity", "targets", "batch|C|H|loss|n|median_ms|iqr_ms|peak_MiB|times faster than direct"),
    "affinity_ffa": ("affinity", "ffa", "batch|C|H|loss|n|median_ms|iqr_ms|times faster than plain"),
    "affinity_step": ("affinity", "step", "batch|precision|loss|n|median_ms|iqr_ms|time / logits|ratio low|ratio high"),
    "affinity_sweep": ("affinity-sweep", "sweep", "batch|C|H|loss|n|median_ms|iqr_ms|times faster than direct"),
    "affinity_memory": ("affinity", "memory", "batch|C|H|loss|peak_MiB|peak / inputs|one N×N matrix (GiB)"),
    "affinity_rivals": ("affinity", "rivals", "loss|n|median_ms|iqr_ms|time / logits|ratio low|ratio high|extra_MiB"),
    "affinity_weight": ("affinity_weight", "rows", "affinity weight|seed|validation accuracy (%)"),
    "logit_geometry": ("logit_geometry", "means", LOGITS),
    "proposition": ("proposition", "rows", SLOPES),
    "quantization": ("quantization", "steps", "precision|batch|network|n|median_ms|iqr_ms|time / float|times ours"),
    "training_steps": ("training", "steps", STEPS),
    "training_cohorts": ("training", "cohorts", COHORTS),
    "training_plain": ("training", "plain", PLAIN),
    "training_quiet": ("training-quiet", "plain", PLAIN),
    "h200_steps": ("training-h200", "steps", STEPS),
    "h200_cohorts": ("training-h200", "cohorts", COHORTS),
    "h200_plain": ("training-h200", "plain", PLAIN),
    "export": ("export-cpu", "export", FILES),
    "export_activations": ("export-five-epochs", "export", FILES),
    "pictures": ("pictures", "rows", "what|pixels|pictures|CPU seconds|CPU ms a picture|peak_MiB"),
    "rivals_of_compress": ("rivals_of_compress", "rows", RIVALS),
    "rivals_differences": (
        "rivals_of_compress",
        "differences",
        "compared|bits|seeds|agreement (%)|test accuracy (%)",
    ),
    "cost": ("cost-cpu", "projected", "table|runs|epochs|hours, 1 worker"),
}
MARKED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def generated(root: Path) -> dict[str, str]:
    """Each generated table as Markdown, by name.

    ``claims``: one row a claim. ``loss_claims``: claims about the losses. ``accuracies``: table T1, without rows that
    were not run. ``study``, ``study_arms`` and ``study_reach``: claims of the study with a complete seed, accuracies
    behind them, and the updates and time that FAQD needs for the accuracy of each arm of KD. ``losses``,
    ``losses_arms``, ``segmentation`` and ``segmentation_arms``: the first two of other studies. ``where``: rows of
    table T6 with a pair of runs. Tables of ``MEASURED``: a part of a benchmark's JSON, in four significant digits,
    under a line with machine and versions.
    """
    suite = Suite.read(root / SUITE)
    verdicts = claims.table(suite).readable.rename(columns={"n (seeds)": "seeds"})
    verdicts["95 % interval"] = verdicts["95 % interval"].str.replace(r" \(.*", "", regex=True)
    accuracies = tables.weight_quantization(suite, tables.read_paper_reference()).overview
    was_run = ~accuracies.isin([tables.NOT_RUN]).any(axis=1)
    columns = ["claim", "compared", "difference", "95 % interval", "seeds", "verdict"]
    parts = {"claims": _markdown(verdicts[columns]), "accuracies": _markdown(accuracies[was_run])}
    affinity, proposition = (
        json.loads((root / BENCHMARKS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("affinity", "proposition")
    )
    parts["loss_claims"] = _markdown(loss_claims.loss_claims(affinity, proposition))
    study, losses, dense = (Suite.read(root / folder) for folder in (STUDY, LOSSES, SEGMENTATION))
    for name, of, hidden in (
        ("study", study, ["cells"]),
        ("losses", losses, ["weight bits", "images"]),
        ("segmentation", dense, ["cells", "images", "updates"]),
    ):
        judged = study_claims.table(of).frame.rename(columns={"contrast": "compared", "n (seeds)": "seeds"})
        parts[name] = _markdown(judged.loc[judged["difference"] != tables.NOT_RUN, columns])
        arms = study_curves.arms_table(of).frame
        parts[f"{name}_arms"] = _markdown(arms.drop(columns=[tables.RUNS, *hidden]))
    gains = where.table(Suite.read(root / WHERE)).frame
    parts["where"] = _markdown(gains.loc[gains["n (seeds)"] > 0].drop(columns=tables.RUNS))
    (step,) = (row for row in affinity["step"] if (row["precision"], row["loss"]) == ("float32", "logits + FA"))
    ratio = study_curves.StepRatio(step["time / logits"], step["ratio low"], step["ratio high"])
    parts["study_reach"] = _markdown(study_curves.reach_table(study, ratio).frame)
    return parts | {
        name: _benchmark(root / BENCHMARKS / f"{file}.json", part, columns.split("|"))
        for name, (file, part, columns) in MEASURED.items()
    }


def _benchmark(path: Path, part: str, columns: list[str]) -> str:
    measured = json.loads(path.read_text(encoding="utf-8"))
    commit, *changes = measured["environment"].pop("commit").split("+")
    line = "{device}, {processor}, {threads} threads, torch {torch}, commit `{commit}`; `{file}`.".format(
        **measured["environment"], commit="+".join([commit[:8], *changes]), file=path.name
    )
    return f"{line}\n\n{_markdown(pd.DataFrame(measured[part])[columns].map(_shown))}"


def _shown(value: object) -> str:
    """A number in four significant digits, whole numbers as they are; nothing for what was not measured."""
    if pd.isna(value):
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value.is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def _markdown(frame: pd.DataFrame) -> str:
    return frame.to_markdown(index=False, disable_numparse=True) + "\n"


def pages(root: Path) -> list[Path]:
    """README and the pages of ``docs/``."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def filled(text: str, parts: Mapping[str, str], page: str) -> str:
    """The text of a page with every generated part in its place; ResultsError if a part is unknown."""

    def fill(match: re.Match) -> str:
        if match[2] not in parts:
            raise ResultsError(f"{page} asks for {match[2]!r}; generated are: {', '.join(parts)}")
        return f"{match[1]}\n{parts[match[2]]}\n{match[3]}"

    return MARKED.sub(fill, text)


def main() -> None:
    """Rewrite the pages that differ, and name them."""
    root = project_root()
    parts = generated(root)
    for page in pages(root):
        before = page.read_text(encoding="utf-8")
        if (after := filled(before, parts, page.name)) != before:
            atomic_write_text(page, after)
            print(f"rewrote {page}")


if __name__ == "__main__":
    main()
