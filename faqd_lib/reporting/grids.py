"""The cells of every table, each with the runs behind it. Runs and tables are made from the same lists of cells.

A function ``<table>_cells`` lists the cells of a table; the function without ``_cells`` lists the runs to train.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import NamedTuple

from ..config import RunConfig
from ..data.elsewhere import HALVES, MADE_HERE, half
from ..models import PatchMixer, is_dense, stage_names
from ..quantization.relu import STEP_GRADIENTS
from ..quantization.weights import FLOAT_BITS
from ..runs.suite import Suite

Bits = tuple[int, int]  # of weights and of activations
REGIMES = ("end-to-end", "fine-tuning")
KD, FA = "KD", "FAQD"  # the methods of T6
# Rows that the paper has. The tables show them even where a profile does not train them.
PAPER_WEIGHT_BITS = (1, 2, 4)
PAPER_FULL_BITS = ((1, 4), (4, 4))
PAPER_PROJECTIONS = (1, 3, 6, 15)


class Column(NamedTuple):
    """A column of T1 and T2: what a student learns from."""

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
ROUNDED = "nothing: the float student, rounded"


@dataclass(frozen=True)
class Cell:
    """One accuracy of a table.

    Args:
        row: name and value of each heading on the left, such as ``{"regime": "end-to-end", "bits": "1W32A"}``.
        column: the value of the heading across.
        runs: the configurations that are averaged, one for each seed.
        planned: whether the profile trains the runs. Other cells are the paper's and usually read "not run".
    """

    row: dict[str, str]
    column: str
    runs: list[RunConfig]
    planned: bool = True


def planned_runs(cells: Iterable[Cell]) -> list[RunConfig]:
    """The runs of all planned cells, each once. Float networks rounded after training come last."""
    runs = dict.fromkeys(config for cell in cells if cell.planned for config in cell.runs)
    return sorted(runs, key=lambda config: config.regime == "post-training")


def seeds(suite: Suite) -> range:
    """The students' seeds, from 1 on."""
    return range(1, suite.profile.seeds + 1)


def _students(suite: Suite, row: dict[str, str], column: str, planned: bool = True, **settings: object) -> Cell:
    """A cell of students, one for each seed, in the row of their bits."""
    runs = [suite.student(seed=seed, **settings) for seed in seeds(suite)]
    return Cell({**row, "bits": runs[0].bits}, column, runs, planned)


def reference_cells(suite: Suite) -> list[Cell]:
    """The float networks: every teacher, and the student over all seeds."""
    row = {"teacher": "", "regime": "", "bits": "float"}
    teachers = [Cell(row, f"teacher {model}", [suite.teacher(model)]) for model in suite.profile.teachers]
    students = [suite.float_student(seed) for seed in seeds(suite)]
    return [*teachers, Cell(row, f"student {suite.profile.student}", students)]


def weight_cells(suite: Suite) -> list[Cell]:
    """T1: weights at each bit-width × regime × teacher × what is learned from; float activations."""
    grid = suite.profile.grid
    paper, planned = ([(bits, FLOAT_BITS) for bits in widths] for widths in (PAPER_WEIGHT_BITS, grid.weight_bits))
    teachers = grid.weight_teachers or suite.profile.teachers
    return _quantization_cells(suite, paper, planned, grid.weight_regimes, teachers)


def full_cells(suite: Suite) -> list[Cell]:
    """T2: weights and activations quantized × regime × what is learned from; students of the first teacher."""
    grid = suite.profile.grid
    return _quantization_cells(suite, PAPER_FULL_BITS, grid.full_bits, grid.full_regimes, suite.profile.teachers[:1])


def _quantization_cells(
    suite: Suite, paper: Sequence[Bits], planned: Sequence[Bits], regimes: Sequence[str], teachers: Sequence[str]
) -> list[Cell]:
    """Float networks, float students rounded after training, and trained students, planned in ``regimes`` only."""
    cells, bits = reference_cells(suite), sorted({*paper, *planned})
    for weights, activations in bits:
        row = {"teacher": "", "regime": "post-training", "bits": f"{weights}W{activations}A"}
        rounded = [suite.post_training(weights, activations, seed=seed) for seed in seeds(suite)]
        cells.append(Cell(row, ROUNDED, rounded, (weights, activations) in planned))
    for teacher, regime, (weights, activations), column in product(teachers, REGIMES, bits, COLUMNS):
        trained = regime in regimes and (weights, activations) in planned
        cells.append(
            _students(
                suite, {"teacher": teacher, "regime": regime}, column.title, trained, method=column.method,
                labels=column.labels, weight_bits=weights, activation_bits=activations, regime=regime,
                teacher=None if column.method == "labels" else teacher,
            )
        )  # fmt: skip
    return cells


def activation_step_cells(suite: Suite) -> list[Cell]:
    """What learning the activation steps buys: label-free FAQD by the gradient of the steps, at T2's first bits."""
    weights, activations = suite.profile.grid.full_bits[0]
    regime = suite.profile.grid.full_regimes[0]
    return [
        _students(
            suite, {"regime": regime}, kind, method="FAQD", weight_bits=weights, activation_bits=activations,
            regime=regime, quantization={"step_gradient": kind},
        )
        for kind in STEP_GRADIENTS
    ]  # fmt: skip


def logit_loss_cells(suite: Suite) -> list[Cell]:
    """T3: label-free FAQD with MSE and with KL × regime × bits."""
    planned = suite.profile.grid.logit_bits
    return [
        _students(
            suite, {"regime": regime}, loss.upper(), bits in planned, method="FAQD", weight_bits=bits, regime=regime,
            logit_loss=loss,
        )
        for regime, bits, loss in product(REGIMES, sorted({*PAPER_WEIGHT_BITS, *planned}), ("mse", "kl"))
    ]  # fmt: skip


def affinity_loss_cells(suite: Suite) -> list[Cell]:
    """T4: label-free students without affinity loss, with the exact one, and with k projections × bits.

    At more than the fewest bits, FFA has the profile's own k only.
    """
    grid, cells = suite.profile.grid, []
    for bits in grid.affinity_bits:
        fewest = bits == min(grid.affinity_bits)
        planned = grid.projections if fewest else [suite.profile.losses.k]
        cells.append(_students(suite, {}, "none", method="KD", weight_bits=bits))
        cells.append(_students(suite, {}, "FA (exact)", method="FAQD", weight_bits=bits))
        for k in sorted({*(PAPER_PROJECTIONS if fewest else ()), *planned}):
            cells.append(_students(suite, {}, f"FFA, k = {k}", k in planned, method="FFAQD", weight_bits=bits, k=k))
    return cells


# What students of dense prediction learn from, and the stages whose maps are compared; () for all.
DENSE_COLUMNS = (
    ("KD", "KD", ()),
    ("FA, encoder", "FAQD", (1, 2, 3)),
    ("FA, encoder and decoder", "FAQD", ()),
)


def segmentation_cells(suite: Suite) -> list[Cell]:
    """T8: the teachers, then what label-free students learn from × bits. A study has its own arms and seeds."""
    study, row = suite.profile.study, {"bits": "float"}
    title = f"teacher {suite.profile.teachers[0]}"
    if study is None:
        students = [
            _students(suite, {}, column, method=method, weight_bits=bits, stages=stages)
            for bits in suite.profile.grid.weight_bits
            for column, method, stages in DENSE_COLUMNS
        ]
        return [Cell(row, title, [suite.teacher()]), *students]
    found: dict[tuple, Cell] = {}
    for name, seed in product(study.cells, study.seeds):
        for (arm, _), run in suite.study_runs(name, seed).items():
            cell = Cell({"bits": run.bits}, arm, [])
            found.setdefault((arm, run.bits, run.data, run.optimization), cell).runs.append(run)
    teachers = dict.fromkeys(suite.teacher(student_seed=seed) for seed in study.seeds)
    return [Cell(row, title, list(teachers)), *found.values()]


def segmentation(suite: Suite) -> list[RunConfig]:
    """The runs of T8."""
    return planned_runs(segmentation_cells(suite))


# Other students at the profile's own scale: their pictures, networks and layers, for the second part of the series.
WHERE_NETWORKS = ("mixer", "mobilenet", "plain20")
WHERE_LAYERS = (
    {"stages": (1,)}, {"stages": (2,)}, {"stages": (3,)}, {"taps": "before ReLU"}, {"losses": {"adapters": True}},
)  # fmt: skip


def where_cells(suite: Suite) -> list[Cell]:
    """T6: KD and FA by the student's pictures, network and layers; of the study, if the profile has one.

    Without a study all students have the fewest bits of T4 and its number of updates. Pictures are two fifths as many
    as the profile's, or fewer if the smaller half has fewer, from the training split, halves of it, noise, and the
    datasets that the folder knows. A dataset that is not on disk any more is left out if it has no finished run.
    Networks are those of :func:`where_networks`. A profile that shows no results has a few of these cells.
    """
    study = suite.profile.study
    if study is not None:
        return [
            _where_cell(suite, runs)
            for name, cells in study.cells.items()
            for arm, bits in product(cells.arms, cells.weight_bits)
            if study.arms[arm].method != "labels"
            and (runs := [found[arm, bits] for seed in study.seeds if (found := suite.study_runs(name, seed))])
        ]
    schedule, count = suite.profile.student_schedule, suite.state.training_count
    common = {"weight_bits": min(suite.profile.grid.affinity_bits)}
    training, classes = suite.splits.training, len(suite.data.classes)
    images = min(2 * count // 5, *(len(half(training, classes, which)) for which in HALVES))
    few = {
        "images": images,
        "updates": schedule.epochs * (count // schedule.batch_size),
        "schedule": {"batch_size": min(schedule.batch_size, images // 2)},
    }
    sources, networks, layers = (None, *suite.state.sources, *MADE_HERE), where_networks(suite), WHERE_LAYERS
    if not suite.profile.shows_results:
        sources, networks, layers = (None, "first-half", "noise"), networks[:1], layers[-2:]
    chosen = [{"source": source, **few} for source in sources]
    chosen += [{}, *({"model": name} for name in networks)]
    kinds = [(method, settings) for settings in chosen for method in (KD, FA)] + [(FA, settings) for settings in layers]
    cells = [
        _where_cell(suite, [suite.student(method, seed=seed, **common, **settings) for seed in seeds(suite)])
        for method, settings in kinds
    ]
    there = {name for name in suite.state.sources if suite.has_images(name)}
    there |= {cell.row["pictures"] for cell in cells if any(map(suite.store.record, cell.runs))}
    return [cell for cell in cells if cell.row["pictures"] in {suite.dataset, *MADE_HERE, *there}]


def where_networks(suite: Suite) -> tuple[str, ...]:
    """The other networks of T6: those with as many stages as the teacher that fit the images.

    The mixer's patches fill only images whose height and width are multiples of 4 pixels.
    """
    stages, patches = len(stage_names(suite.profile.teachers[0])), suite.data.image_size % PatchMixer.patch == 0
    return tuple(name for name in WHERE_NETWORKS if len(stage_names(name)) == stages and (patches or name != "mixer"))


def _where_cell(suite: Suite, runs: list[RunConfig]) -> Cell:
    """The cell of runs, its row and column read from their configuration."""
    run, objective = runs[0], runs[0].objective
    images = run.training_images or suite.state.training_count
    row = {
        "pictures": suite.dataset if run.images is None else run.images.name,
        "images": f"{images:,}",
        "updates": f"{run.optimization.steps(images // run.optimization.batch_size):,}",
        "bits": run.bits,
        "student": run.model,
        "teacher": run.teacher.model,
    }
    if run.method == KD:
        return Cell(row, KD, runs)
    stages = f"stage {', '.join(map(str, objective.stages))}" if objective.stages else "all stages"
    return Cell(
        row,
        stages
        + (f", {objective.taps}" if objective.taps != "output" else "")
        + (", adapters" if objective.adapters else ""),
        runs,
    )


def where(suite: Suite) -> list[RunConfig]:
    """The runs of T6. They are no part of :func:`everything`: notebook 11 trains them."""
    return planned_runs(where_cells(suite))


# Weights of the rivals: at random weights their gradient is about as long as that of feature affinity with weight 30.
# They are where the study "rivals-tuning" starts; its outcome belongs to the study "rivals", not here.
RIVAL_WEIGHTS = {
    "KD+SP": 300.0, "KD+AT": 300.0, "KD+FitNet": 0.3, "KD+CKA": 1.0, "KD+CWD": 1.0, "KD+SQuaT": 0.3,
}  # fmt: skip
RIVAL_ACTIVATION_BITS = 4  # of the students beside SQuaT, which needs quantized activations


def rival_cells(suite: Suite) -> list[Cell]:
    """T7: each loss between maps beside logits, and logits alone; of the study, if the profile has one.

    Without a study, students have the fewest bits of T4. SQuaT needs quantized activations: it stands beside students
    that have them, too. A profile that shows no results has a few of these cells.
    """
    if suite.profile.study is not None:
        return [Cell({"bits": cell.row["bits"]}, rival_name(cell.runs[0]), cell.runs) for cell in where_cells(suite)]
    shows = suite.profile.shows_results
    chosen: list[dict] = [{"method": KD}, {"method": FA}]
    chosen += [{"method": KD, "logit_loss": "kl"}] * shows
    chosen += [{"method": "FFAQD", "k": k} for k in suite.profile.grid.projections] * shows
    chosen += [
        {"method": name, "affinity_weight": RIVAL_WEIGHTS[name]} for name in list(RIVAL_WEIGHTS)[: 5 if shows else 1]
    ]
    beside = {"activation_bits": RIVAL_ACTIVATION_BITS}
    chosen += [{"method": method, **beside} for method in (KD, FA)]
    chosen += [
        {"method": name, "affinity_weight": RIVAL_WEIGHTS[name], **beside}
        for name in ["KD+FitNet"] * shows + ["KD+SQuaT"]
    ]
    bits = min(suite.profile.grid.affinity_bits)
    found = [[suite.student(**settings, weight_bits=bits, seed=seed) for seed in seeds(suite)] for settings in chosen]
    return [Cell({"bits": runs[0].bits}, rival_name(runs[0]), runs) for runs in found]


def rival_name(run: RunConfig) -> str:
    """How T7 and the benchmark of costs call the loss between maps of a run: ``FA``, ``FFA, k = 6``, ``SP``, …"""
    if run.method == KD:
        return KD if run.objective.logit_loss == "mse" else "none, KL for MSE"
    if run.method == "FFAQD":
        return f"FFA, k = {run.objective.k}"
    return "FA" if run.method == FA else run.method.removeprefix("KD+")


def rivals(suite: Suite) -> list[RunConfig]:
    """The runs of T7. They are no part of :func:`everything`: notebook 12 trains them."""
    return planned_runs(rival_cells(suite))


def references(suite: Suite) -> list[RunConfig]:
    """The runs of the reference rows: float teachers and, for each seed, the float student."""
    return planned_runs(reference_cells(suite))


def weight_quantization(suite: Suite) -> list[RunConfig]:
    """The runs of T1."""
    return planned_runs(weight_cells(suite))


def full_quantization(suite: Suite) -> list[RunConfig]:
    """The runs of T2."""
    return planned_runs(full_cells(suite))


def activation_steps(suite: Suite) -> dict[str, list[RunConfig]]:
    """The runs of the table of activation steps, one for each seed, by the gradient of the steps."""
    return {cell.column: cell.runs for cell in activation_step_cells(suite)}


def logit_losses(suite: Suite) -> list[RunConfig]:
    """The runs of T3."""
    return planned_runs(logit_loss_cells(suite))


def affinity_losses(suite: Suite) -> list[RunConfig]:
    """The runs of T4."""
    return planned_runs(affinity_loss_cells(suite))


TABLES = (weight_cells, full_cells, logit_loss_cells, affinity_loss_cells, activation_step_cells)


def everything(suite: Suite) -> list[RunConfig]:
    """Every run of the series, each once; of dense prediction, those of T8."""
    if is_dense(suite.profile.student):
        return segmentation(suite)
    return list(dict.fromkeys(chain.from_iterable(planned_runs(cells(suite)) for cells in TABLES)))
