"""Runs a study: trains what its design wants next, within a time, and says what is settled and what is left.

    ./run_all.sh claims --hours 2

The seeds of the first look are trained first, one group of cells after another in the order of the design. The first
groups therefore have their verdicts first. The seeds of the second look follow when the first look is complete, only in
groups where it left a claim open. Several calls at once, also on several machines with a common folder, take different
seeds. A call goes on where an earlier one stopped.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping

import filelock

from ..config import RunConfig
from ..models import is_dense
from ..reporting import charts, signs, study_charts, study_claims, study_curves, where
from ..reporting.report import write_report
from ..reporting.tables import NOT_RUN, Table, segmentation, segmentation_classes
from ..reporting.tuning import tuning_table
from ..runs.suite import Suite
from ..training.loop import OutOfTimeError
from ..training.loss_log import NonFiniteLossError
from ..utils.files import require_writable
from ..utils.measure import environment
from ..utils.progress import clock


def run_study(suite: Suite, hours: float | None = None) -> bool:
    """Train the runs of a suite's study, in the order described at the head of this module.

    Args:
        suite: of a profile with a study.
        hours: stop after so much time, with checkpoints; None to train all planned seeds.

    Returns:
        False if time was up; True if nothing is left but what other processes train.

    Raises:
        NonFiniteLossError: that of the first run that diverged; its notes name the others. All other groups of cells
            that the time sufficed for are finished.
    """
    deadline = None if hours is None else time.monotonic() + 3600 * hours
    started, trained, in_time = time.monotonic(), True, True
    diverged: dict[tuple[str, int], NonFiniteLossError] = {}
    while trained and in_time:  # again, for seeds that another process had and has left
        trained, elsewhere = False, set()
        for cells, seed in wanted(suite):
            try:
                lock = suite.store.group_lock(f"seed{seed}").acquire(timeout=0)
            except filelock.Timeout:
                if seed not in elsewhere:
                    print(f"seed {seed}: another process trains it", flush=True)
                elsewhere.add(seed)
                continue
            with lock:
                runs = list(suite.study_runs(cells, seed).values())
                # Another process may have been here meanwhile.
                if (cells, seed) in diverged or all(suite.store.record(run) for run in runs):
                    continue
                try:
                    suite.run(runs, f"{cells}, seed {seed}", deadline)
                except OutOfTimeError:
                    print(f"time is up after {clock(time.monotonic() - started)}: call again to go on", flush=True)
                    in_time = False
                    break
                except NonFiniteLossError as error:
                    print(f"{cells}, seed {seed}: {error}", flush=True)
                    diverged[cells, seed] = error
                trained = True
    if diverged:
        first, *others = diverged.values()
        for other in others:
            first.add_note(str(other))
        raise first
    return in_time


def wanted(suite: Suite) -> list[tuple[str, int]]:
    """What the design wants next: (group of cells, seed) in order, for all groups whose runs are not finished.

    Only when the first look is complete, the seeds of the second look follow, in the groups that it left open.
    """
    study = suite.profile.study

    def missing(groups: Iterable[str], seeds: Iterable[int]) -> list[tuple[str, int]]:
        return [
            (cells, seed)
            for cells in groups
            for seed in seeds
            if not all(map(suite.store.record, suite.study_runs(cells, seed).values()))
        ]

    first, last = study.looks[0], study.looks[-1]
    if left := missing(study.cells, study.seeds[:first]):
        return left
    if last == first:
        return []
    still_open = study_claims.open_cells(suite)
    return missing([cells for cells in study.cells if cells in still_open], study.seeds[first:])


def seed_runs(suite: Suite, seed: int) -> list[RunConfig]:
    """All runs of one seed, in the order of the design."""
    return [run for cells in suite.profile.study.cells for run in suite.study_runs(cells, seed).values()]


def hours_left(suite: Suite) -> float | None:
    """About how many hours of training the design still wants, with teachers; None before this machine's first run.

    From the seconds that finished runs of this machine took for an epoch of all images: those of the same network, with
    a teacher or without one, or all runs where none of these is finished. Until the first look is complete, all groups
    of cells are counted with the second look's seeds.
    """
    here, study = environment(suite.device), suite.profile.study
    first = study.seeds[: study.looks[0]]
    left = {(cells, seed) for cells, seed in wanted(suite)}
    if any(seed in first for _, seed in left):
        left |= {(cells, seed) for cells in study.cells for seed in study.seeds}
    asked = {run for cells, seed in left for run in suite.study_runs(cells, seed).values()}
    needed = {each for run in asked for each in (run, run.teacher, run.initial) if each is not None}
    finished = [record for record in suite.store.records() if _is_of(record.environment, here)]
    done, seconds = Counter(), Counter()  # by kind of run, and of all runs
    for record in finished:
        for kind in (_kind(record.configuration), "all"):
            done[kind] += _epochs(suite, record.configuration)
            seconds[kind] += record.cost["training_seconds"]
    if not done["all"]:
        return None
    total = 0.0
    for run in needed:
        if suite.store.record(run) is None:
            kind = _kind(run) if done[_kind(run)] else "all"
            total += _epochs(suite, run) * seconds[kind] / done[kind]
    return total / 3600


def _kind(run: RunConfig) -> tuple[str, bool]:
    """What the time of an epoch depends on most: the network, and whether it has a teacher."""
    return run.model, run.teacher is not None


def _is_of(one: Mapping[str, str | int], other: Mapping[str, str | int]) -> bool:
    """Whether two environments have the same device and processor."""
    return all(one[key] == other[key] for key in ("device", "processor"))


def _epochs(suite: Suite, run: RunConfig) -> float:
    """Epochs of all training images that a run takes."""
    images = run.training_images or suite.state.training_count
    steps = run.optimization.steps(images // run.optimization.batch_size)
    return steps * run.optimization.batch_size / suite.state.training_count


def study_tables(suite: Suite) -> list[Table]:
    """The tables of a study that have rows.

    A study with claims has their verdicts and accuracies, and the updates to an accuracy where budgets differ. Tuning
    has validation accuracies. All have the failure signs.
    """
    made = [tuning_table(suite)] if suite.profile.validation_images else []
    if suite.profile.study.claims:
        made += [study_claims.table(suite), study_curves.arms_table(suite), study_curves.reach_table(suite)]
        if not all(cells.has_own(set()) for cells in suite.profile.study.cells.values()):
            made.append(where.table(suite))
    if is_dense(suite.profile.student):
        made += [segmentation(suite), segmentation_classes(suite)]
    return [table for table in [*made, signs.table(suite)] if len(table.frame)]


def report_study(suite: Suite) -> list[Table]:
    """Write the tables, figures and report of a study; print the verdicts and the hours that are left."""
    made, records = study_tables(suite), suite.store.records()
    figures = {}
    if len(gain := study_curves.gain_frame(suite)) and suite.profile.study.claims:
        arms = study_curves.arms_frame(suite)
        own = [name for name, cells in suite.profile.study.cells.items() if cells.has_own(set())]
        figures["over_updates"] = study_charts.over_updates(arms[arms["cells"].isin(own)], gain, suite.metric)
    frames = [make(records) for make in (signs.gap_frame, signs.estimate_frame, signs.stability_frame)]
    if len(frames[0]):
        figures["failure_signs"] = study_charts.failure_signs(*frames)
    for name, figure in figures.items():
        charts.save(figure, require_writable(suite.folder / "figures"), name)
    for table in made:
        table.write(require_writable(suite.folder / "tables"))
        if table.name == "claims":
            _print_verdicts(table)
    report = write_report(suite, [table for table in made if table.name != "claims"])
    left = hours_left(suite)
    rest = "unknown before the first finished run" if left is None else f"about {clock(3600 * left)} on this machine"
    print(f"training left: {rest}; results are in {suite.folder}, the report in {report}", flush=True)
    return made


def _print_verdicts(judged: Table) -> None:
    begun = judged.frame[judged.frame["difference"] != NOT_RUN]
    for row in begun.to_dict("records"):
        print(f"  {row['claim']}: {row['difference']} ({row['n (seeds)']} seeds): {row['verdict']}")
    if len(begun) < len(judged.frame):
        print(f"  {len(judged.frame) - len(begun)} of {len(judged.frame)} claims have no complete seed yet")
