"""The paper's tables from run records: DataFrames with captions, written as CSV, Markdown and LaTeX.

The cells and their runs come from :mod:`faqd_lib.reporting.grids`. A cell whose runs do not exist reads "not run".
A profile whose numbers mean nothing (smoke) gets "not a result" instead of numbers. The paper's printed values come
from a file that the user fills.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import pandas as pd
import torch

from ..config import RunConfig
from ..data.sources import SOURCES
from ..models import is_dense
from ..quantization.weights import ACTIVATION_BITS, FLOAT_BITS, WEIGHT_BITS
from ..runs.profile import default_results, suite_folder
from ..runs.store import ResultsError, RunRecord
from ..runs.suite import Suite
from ..training.segmentation import class_iou
from ..utils.files import atomic_write_text
from ..utils.messages import check_choice
from . import grids
from .grids import Cell
from .segmentation import gains

NOT_RUN = "not run"
TIMES = "Times are of each run's own day and of what ran beside it: compare them only where benchmarks/ does."
NOT_A_RESULT = "not a result"
OURS = "ours, last epoch"
RUNS = "runs"  # the column of records behind a row, their names separated by spaces
PAPER_DATASETS = ("cifar10", "cifar100", "tiny-imagenet")
REFERENCE_COLUMNS = (
    "table", "dataset", "teacher", "student", "weight_bits", "activation_bits", "regime", "method", "labels",
    "logit_loss", "affinity", "k", "accuracy", "source",
)  # fmt: skip
# The values that the paper's file may have. Other values would match no run.
REFERENCE_VALUES = {
    "table": ("T1", "T2", "T3", "T4"),
    "weight_bits": tuple(map(str, (*WEIGHT_BITS, FLOAT_BITS))),
    "activation_bits": tuple(map(str, (*ACTIVATION_BITS, FLOAT_BITS))),
    "regime": ("end-to-end", "fine-tuning", "post-training"),
    "method": ("labels", "KD", "FAQD", "FFAQD", "none"),
    "labels": ("true", "false"),
    "logit_loss": ("none", "mse", "kl"),
    "affinity": ("none", "fa", "ffa"),
}


_LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "×": r"$\times$", "−": "$-$"} | {c: f"\\{c}" for c in "%_&#"}


@dataclass(frozen=True)
class Table:
    """A table with its caption.

    Args:
        name: of its files, without suffix.
        title, caption: in words.
        frame: one row a cell; its column ``runs`` names the records behind the row.
        overview: the last-epoch accuracies as a grid, or None.
    """

    name: str
    title: str
    caption: str
    frame: pd.DataFrame
    overview: pd.DataFrame | None = None

    @property
    def runs(self) -> list[str]:
        """The names of all run records behind the table."""
        return sorted({run for cell in self.frame.get(RUNS, ()) for run in cell.split()})

    @property
    def readable(self) -> pd.DataFrame:
        """All rows, without the long column ``runs``."""
        return self.frame.drop(columns=RUNS, errors="ignore")

    def markdown(self) -> str:
        """Title, caption, overview and all rows."""
        frames = [self.readable] if self.overview is None else [self.overview, self.readable]
        parts = [f"## {self.title}", self.caption]
        parts += [frame.to_markdown(index=False, disable_numparse=True) for frame in frames]
        if self.runs:
            parts.append(f"From {len(self.runs)} run records; `tables/{self.name}.csv` names those behind each row.")
        return "\n\n".join(parts) + "\n"

    def latex(self) -> str:
        """The overview, or all rows, as a LaTeX table with caption and label."""
        shown = self.readable if self.overview is None else self.overview
        safe = shown.map(_latex_text).astype(str).rename(columns=_latex_text)
        return safe.to_latex(index=False, escape=False, caption=_latex_text(self.caption), label=f"tab:{self.name}")

    def write(self, folder: Path) -> list[Path]:
        """Write ``<name>.csv`` (all rows), ``.md`` and ``.tex``; return their paths."""
        texts = {"csv": self.frame.to_csv(index=False), "md": self.markdown(), "tex": self.latex()}
        return [atomic_write_text(folder / f"{self.name}.{suffix}", text) for suffix, text in texts.items()]


def _latex_text(value: object) -> str:
    return str(value).translate(str.maketrans(_LATEX))


def runs_frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """One row a run: settings, accuracies (percent), final losses and cost. The input of charts and claims."""
    rows = []
    for record in records:
        config, cost, final = record.configuration, record.cost, record.history[-1]
        row = {
            "run": record.run_id,
            "dataset": config.data.name,
            "model": config.model,
            "teacher": config.teacher.model if config.teacher else "",
            "bits": config.bits,
            "weight_bits": config.quantization.weight_bits,
            "activation_bits": config.quantization.activation_bits,
            "variant": config.quantization.variant,
            "regime": config.regime,
            "method": config.method,
            "labels": not config.label_free,
            "logit_loss": config.objective.logit_loss,
            "k": config.objective.k if config.method == "FFAQD" else 0,
            "seed": config.seed,
            "epochs": config.optimization.epochs,
            "last": record.last_accuracy,
            "best": record.best_accuracy,
            "test_images": record.test_images,
            "final_loss": final.get("loss", float("nan")),
            "final_affinity": final.get("affinity", float("nan")),
            "parameters": record.parameters,
            "size_kB": record.weight_bytes / 1000,
            **{name: cost[name] for name in ("training_seconds", "step_milliseconds", "images_per_second")},
            "peak_step_MB": cost["peak_step_bytes"] / 1e6,
            "cohort": int(cost["cohort"]),
        }
        rows.append(row)
    return pd.DataFrame(rows)


MEASURES = {
    "loss": "training loss",
    "logit": "logit loss",
    "affinity": "affinity loss, sum over stages",
    "label": "cross-entropy",
    "test_accuracy": "test accuracy (%)",
    "test_mean_iou": "test mean IoU (%)",
}


def history_frame(records: Iterable[RunRecord], measures: Iterable[str]) -> pd.DataFrame:
    """Histories in long form, for charts: columns ``run``, ``epoch``, ``measure`` (its label) and ``value``.

    ``measures`` are keys of ``MEASURES``, whose values are the labels.
    """
    wanted = list(measures)
    rows = [
        {"run": record.run_id, "epoch": int(row["epoch"]), "measure": MEASURES[measure], "value": row[measure]}
        for record in records
        for row in record.history
        for measure in wanted
        if measure in row
    ]
    return pd.DataFrame(rows, columns=["run", "epoch", "measure", "value"])


def percent(values: list[float]) -> str:
    """``81.04``, or mean ± standard deviation over seeds where there are several."""
    series = pd.Series(values)
    return f"{series.mean():.2f}" + (f" ± {series.std():.2f}" if len(series) > 1 else "")


def finished(suite: Suite, runs: Iterable[RunConfig]) -> list[RunRecord]:
    """The records of those runs that are finished."""
    return list(filter(None, map(suite.store.record, runs)))


def _text(suite: Suite, values: list[float], show: Callable[[list[float]], str] = percent) -> str:
    """The text of a cell with these values of its runs: a number, "not run", or "not a result"."""
    if not values:
        return NOT_RUN
    return show(values) if suite.profile.shows_results else NOT_A_RESULT


def _printed(reference: pd.DataFrame, table: str, config: RunConfig) -> float | None:
    """The paper's accuracy of a run's cell."""
    if config.quantization.variant:  # the paper has its own quantizers only
        return None
    key = {
        "table": table,
        "dataset": config.data.name,
        "teacher": config.teacher.model if config.teacher else "",
        "student": config.model,
        "weight_bits": str(config.quantization.weight_bits),
        "activation_bits": str(config.quantization.activation_bits),
        "regime": config.regime,
        "method": config.method,
        "labels": "false" if config.label_free else "true",
        "logit_loss": config.objective.logit_loss,
        "affinity": config.objective.affinity,
        "k": str(config.objective.k) if config.objective.affinity == "ffa" else "",
    }
    found = reference.loc[(reference[list(key)] == pd.Series(key)).all(axis="columns"), "accuracy"]
    return float(found.iloc[0]) if len(found) else None


def _rows(suite: Suite, reference: pd.DataFrame, table: str, cells: list[Cell], across: str) -> list[dict[str, str]]:
    """One row a cell: its headings (the one across is called ``across``), the paper's accuracy, ours, and the runs."""
    rows = []
    for cell in cells:
        records, paper = finished(suite, cell.runs), _printed(reference, table, cell.runs[0])
        last = [record.last_accuracy for record in records]
        compared = last and paper is not None and suite.profile.shows_results
        row = {
            **cell.row,
            across: cell.column,
            "paper": "" if paper is None else f"{paper:.2f}",
            OURS: _text(suite, last),
            "ours, best epoch": _text(suite, [record.best_accuracy for record in records]),
            "difference": f"{sum(last) / len(last) - paper:+.2f}" if compared else "",
            "n": str(len(records)),
            RUNS: " ".join(record.run_id for record in records),
        }
        rows.append(row)
    return rows


def read_paper_reference(path: Path | None = None) -> pd.DataFrame:
    """Read the paper's printed values that the user filled in; see results/README.md.

    ``path`` is a CSV file; None for ``results/paper_reference.csv``. The columns are ``REFERENCE_COLUMNS``. Without a
    file there are no rows.

    Raises:
        ResultsError: the file lacks a column, a value matches no run, an accuracy is not a percentage, or two lines
            are for the same cell.
    """
    path = path or default_results() / "paper_reference.csv"
    if not path.is_file():
        return pd.DataFrame(columns=list(REFERENCE_COLUMNS), dtype=str)
    frame = pd.read_csv(path, dtype=str, keep_default_na=False, comment="#")
    missing = [column for column in REFERENCE_COLUMNS if column not in frame.columns]
    if missing:
        raise ResultsError(f"{path} lacks the columns {missing}; its head must be {','.join(REFERENCE_COLUMNS)}")
    accuracies = pd.to_numeric(frame["accuracy"], errors="coerce")
    bad = frame.loc[~accuracies.between(0, 100), "accuracy"]
    if len(bad):
        raise ResultsError(f"{path}: accuracy {bad.iloc[0]!r} is not a percentage between 0 and 100")
    for column, allowed in REFERENCE_VALUES.items():
        for value in frame[column]:
            check_choice(f"{path}: {column}", value, allowed, ResultsError)
    keys = [column for column in REFERENCE_COLUMNS if column not in ("accuracy", "source")]
    twice = frame[frame.duplicated(keys)]
    if len(twice):
        raise ResultsError(f"{path} has two lines for {dict(twice[keys].iloc[0])}: keep one")
    return frame


def span(dates: Iterable[str]) -> str:
    """First and last of some dates: ``2026-01-01 to 2026-01-03``; empty without dates."""
    found = sorted(dates)
    return " to ".join(dict.fromkeys(found[:1] + found[-1:]))


def origin(records: Iterable[RunRecord]) -> str:
    """Number, seeds and dates of runs, for captions."""
    records = list(records)
    if not records:
        return "No runs yet: n = 0."
    seeds = sorted({record.configuration.seed for record in records} - {0})
    which = f", seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} (n = {len(seeds)})" if seeds else ""
    runs = f"{len(records)} run{'s' * (len(records) > 1)}"
    return f"From {runs}{which}, trained {span(record.finished[:10] for record in records)}."


def with_origin(suite: Suite, table: Table) -> Table:
    """The table with number, seeds and dates of its runs added to the caption."""
    behind = set(table.runs)
    records = [record for record in suite.store.records() if record.run_id in behind]
    return replace(table, caption=f"{table.caption} {origin(records)}")


def _table(suite: Suite, name: str, what: str, rows: list[dict], overview: pd.DataFrame | None = None) -> Table:
    """A table of the suite, such as ``T1_weight_quantization``, with its title and the whole caption."""
    number, _, words = name.partition("_")
    title = f"{number} {words.replace('_', ' ').capitalize()}, {suite.dataset}"
    study = suite.profile.study
    seeds = suite.profile.seeds if study is None else len(study.seeds)
    over = f"mean ± standard deviation over n of {seeds} seeds" if seeds > 1 else "one seed"
    caption = f"{what} {suite.caption}; {over}. Test {suite.metric} in percent, last epoch unless said."
    if not suite.profile.shows_results:
        caption += " This profile tests the machinery: no results."
    return with_origin(suite, Table(f"{name}_{suite.dataset}", title, caption, pd.DataFrame(rows), overview))


def _overview(rows: Iterable[Mapping[str, str]], headings: Sequence[str], across: str) -> pd.DataFrame:
    """The rows as a grid: a line for each value of the headings, a column for each value of the heading ``across``."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        here = {heading: row[heading] for heading in headings}
        lines.setdefault(tuple(here.values()), here)[row[across]] = row[OURS]
    return pd.DataFrame(lines.values()).fillna("")


def _quantization_table(suite: Suite, reference: pd.DataFrame, cells: list[Cell], name: str, what: str) -> Table:
    rows = _rows(suite, reference, name.partition("_")[0], cells, "learns from")
    titles, placed = [column.title for column in grids.COLUMNS], []
    for row in rows:
        # Reference and rounded networks learned from labels only, and stand in that column.
        column = row["learns from"] if row["learns from"] in titles else "labels only"
        placed.append({**row, "regime": row["regime"] or row["learns from"], "learns from": column})
    return _table(suite, name, what, rows, _overview(placed, ("teacher", "regime", "bits"), "learns from"))


def weight_quantization(suite: Suite, reference: pd.DataFrame) -> Table:
    """T1 for the suite's dataset."""
    losses = suite.profile.losses
    what = (
        f"Students {suite.profile.student} with quantized weights and float activations; logit loss "
        f"{losses.end_to_end_logit_loss.upper()} end to end, {losses.fine_tuning_logit_loss.upper()} in fine-tuning; "
        "fine-tuning starts from the float student, which like the teacher was trained with labels; post-training: "
        "that student with its weights rounded and its batch normalisation estimated anew, not trained any further."
    )
    return _quantization_table(suite, reference, grids.weight_cells(suite), "T1_weight_quantization", what)


def full_quantization(suite: Suite, reference: pd.DataFrame) -> Table:
    """T2 for the suite's dataset."""
    what = (
        f"Students {suite.profile.student} with quantized weights and activations (learned step); post-training: the "
        "float student with its weights rounded, its steps calibrated and its batch normalisation estimated anew, not "
        "trained any further."
    )
    return _quantization_table(suite, reference, grids.full_cells(suite), "T2_full_quantization", what)


def activation_steps(suite: Suite, reference: pd.DataFrame) -> Table:
    """T2's students by the gradient of their activation steps: what learning the steps buys."""
    rows = _rows(suite, reference, "T2", grids.activation_step_cells(suite), "gradient of the steps")
    what = (
        f"Label-free FAQD, student {suite.profile.student}, teacher {suite.profile.teachers[0]}. Gradient of the "
        "activation steps: learned (lsq), coarse, or none, so that the steps stay as calibrated (frozen)."
    )
    return _table(suite, "T2_activation_steps", what, rows)


def logit_losses(suite: Suite, reference: pd.DataFrame) -> Table:
    """T3: MSE against KL."""
    rows = _rows(suite, reference, "T3", grids.logit_loss_cells(suite), "logit loss")
    what = f"Label-free FAQD, student {suite.profile.student}, teacher {suite.profile.teachers[0]}."
    return _table(suite, "T3_logit_loss", what, rows, _overview(rows, ("regime", "bits"), "logit loss"))


def affinity_losses(suite: Suite, reference: pd.DataFrame) -> Table:
    """T4: no affinity loss, exact, and k projections: accuracy, final affinity loss, time and memory of a step."""
    cells = grids.affinity_loss_cells(suite)
    rows = _rows(suite, reference, "T4", cells, "affinity loss")

    def number(values: list[float]) -> str:
        return f"{pd.Series(values).mean():.4g}"

    for cell, row in zip(cells, rows, strict=True):
        records = finished(suite, cell.runs)
        row["final affinity loss"] = ""
        if cell.runs[0].objective.affinity != "none":
            row["final affinity loss"] = _text(suite, [record.history[-1]["affinity"] for record in records], number)
        row["ms a step"] = _text(suite, [record.cost["step_milliseconds"] for record in records], number)
        row["peak MB a step"] = _text(suite, [record.cost["peak_step_bytes"] / 1e6 for record in records], number)
    what = (
        f"Label-free students {suite.profile.student} with quantized weights, end to end; the final affinity loss is "
        "the training loss's mean over the last epoch (FFA: an estimate of the same quantity); a step is the student's "
        f"own, without data and teacher. {TIMES}"
    )
    return _table(suite, "T4_affinity_loss", what, rows)


def segmentation(suite: Suite) -> Table:
    """T8: mean IoU of teachers and students, and what feature affinity adds to KD."""
    rows = []
    for cell in grids.segmentation_cells(suite):
        records = finished(suite, cell.runs)
        affinity = [record.test_affinity for record in records if record.test_affinity is not None]
        pairs = _pairs_with_kd(suite, records)
        gain = [gains(*pairs)[0]] if pairs[0] else []
        rows.append(
            {
                **cell.row,
                "arm": cell.column,
                "mean IoU (%), last epoch": _text(suite, [record.last_accuracy for record in records]),
                "n": str(len(records)),
                "gain over KD (95 % interval)": _text(suite, gain, lambda found: str(found[0])) if gain else "",
                "n of the gain": str(len(pairs[0])) if gain else "",
                "affinity loss": _text(suite, affinity, lambda found: f"{mean(found):.4g}") if affinity else "",
                RUNS: " ".join(record.run_id for record in records),
            }
        )
    what = (
        f"Networks {suite.profile.student} that name the class of each pixel. Gains are of pairs of runs with the same "
        "seed, in percentage points; their interval is for other test images (paired bootstrap), not for other seeds. "
        "Affinity loss: exact, on test images, sum over all stages."
    )
    return _table(suite, "T8_segmentation", what, rows)


def segmentation_classes(suite: Suite) -> Table:
    """T8 by class: IoU of each arm, and what feature affinity adds to KD."""
    columns, behind = {}, []
    for cell in grids.segmentation_cells(suite):
        records = finished(suite, cell.runs)
        if not records:
            continue
        behind += [record.run_id for record in records]
        name = f"{cell.row['bits']} {cell.column}"
        by_run = torch.stack([class_iou(counts.sum(0)) for counts in _pixel_counts(suite, records)])
        columns[name] = [_text(suite, [100 * value]) for value in by_run.nanmean(0).tolist()]
        pairs = _pairs_with_kd(suite, records)
        if pairs[0]:
            columns[f"{name} − KD"] = [_text(suite, [gain], lambda found: str(found[0])) for gain in gains(*pairs)[1]]
    names = SOURCES[suite.dataset].classes if suite.dataset in SOURCES else None
    count = len(next(iter(columns.values()), ()))
    rows = [
        {"class": names[index] if names else index, **{column: values[index] for column, values in columns.items()},
         RUNS: " ".join(behind)}
        for index in range(count)
    ]  # fmt: skip
    what = (
        "IoU of each class in percent, mean over finished seeds, and gains over KD in percentage points, with their "
        "95 % interval for other test images (paired bootstrap)."
    )
    return _table(suite, "T8_classes", what, rows)


def _pairs_with_kd(suite: Suite, records: Iterable[RunRecord]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Pixel counts of students with an affinity loss, and of those of KD that differ in nothing else."""
    pairs = []
    for record in records:
        config = record.configuration
        if config.objective.affinity != "none" and config.objective.logit_loss != "none":
            plain = {
                "affinity": "none", "affinity_weight": 0.0, "stages": (), "taps": "output", "adapters": False,
                "affinity_recipe": None,
            }  # fmt: skip
            objective = config.objective.model_copy(update=plain)
            if partner := suite.store.record(config.model_copy(update={"objective": objective})):
                pairs.append(_pixel_counts(suite, (record, partner)))
    return [ours for ours, _ in pairs], [others for _, others in pairs]


def _pixel_counts(suite: Suite, records: Iterable[RunRecord]) -> list[torch.Tensor]:
    return [suite.store.predictions(record)["pixel_counts"] for record in records]


def cost(suite: Suite) -> Table:
    """T5: time, memory and size of every run."""
    frame = runs_frame(suite.store.records())
    columns = {
        "run": "run", "epochs": "epochs", "training_seconds": "training s", "step_milliseconds": "ms a step",
        "images_per_second": "images/s", "peak_step_MB": "peak MB a step", "cohort": "cohort",
        "parameters": "parameters", "size_kB": "weights kB",
    }  # fmt: skip
    shown = frame.reindex(columns=list(columns)).rename(columns=columns)
    total = shown["training s"].sum()
    digits = {"training s": 1, "ms a step": 1, "images/s": 0, "peak MB a step": 1, "weights kB": 1}
    for column, places in digits.items():
        shown[column] = shown[column].map(f"{{:.{places}f}}".format)
    if len(frame):
        shown[RUNS] = shown["run"]
    what = f"{len(frame)} runs, {total:.0f} s of training in all; a cohort's data and teacher time is shared evenly."
    caption = f"{what} {TIMES} {suite.caption}; {suite.profile.seeds} seed(s)."
    return with_origin(suite, Table(f"T5_cost_{suite.dataset}", f"T5 Cost, {suite.dataset}", caption, shown))


def not_run(dataset: str, profile: str) -> Table:
    """T1 of a dataset of the paper on which this profile has no runs."""
    rows = [
        {"regime": regime, "bits": f"{bits}W32A", **dict.fromkeys((column.title for column in grids.COLUMNS), NOT_RUN)}
        for regime in grids.REGIMES
        for bits in grids.PAPER_WEIGHT_BITS
    ]
    caption = f"Not run: profile {profile} has no runs on {dataset}; n = 0."
    return Table(f"T1_weight_quantization_{dataset}", f"T1 Weight quantization, {dataset}", caption, pd.DataFrame(rows))


def all_tables(suite: Suite, reference: pd.DataFrame | None = None) -> list[Table]:
    """T1 for the suite's dataset and for other datasets, then T2 to T5 for the suite's dataset. Of a class for each
    pixel: T8 and T5.

    Other datasets are those of the paper that the profile's series has, or that have a results folder. ``reference``
    has the paper's values; None for those of :func:`read_paper_reference`.
    """
    if is_dense(suite.profile.student):
        return [segmentation(suite), segmentation_classes(suite), cost(suite)]
    reference = read_paper_reference() if reference is None else reference
    tables = [weight_quantization(suite, reference)]
    for dataset in PAPER_DATASETS:
        if dataset == suite.dataset:
            continue
        folder = suite_folder(suite.profile, dataset, suite.folder.parent)
        if (folder / "suite.json").is_file():
            tables.append(weight_quantization(Suite.read(folder), reference))
        elif dataset in suite.profile.series_datasets:
            tables.append(not_run(dataset, suite.profile.name))
    others = (full_quantization, activation_steps, logit_losses, affinity_losses)
    return [*tables, *(make(suite, reference) for make in others), cost(suite)]


def write_all(suite: Suite, tables: Iterable[Table]) -> list[Path]:
    """Write every table to ``tables/``, and all tables and figures to ``summary.md``; return the paths."""
    tables = list(tables)
    paths = [path for table in tables for path in table.write(suite.folder / "tables")]
    figures = sorted((suite.folder / "figures").glob("*.png"))
    parts = [f"# {suite.profile.name}, {suite.dataset}", suite.caption, *(table.markdown() for table in tables)]
    parts += [f"![{figure.stem}](figures/{figure.name})" for figure in figures]
    return [*paths, atomic_write_text(suite.folder / "summary.md", "\n\n".join(parts) + "\n")]
