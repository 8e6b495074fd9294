"""Runs a study: trains what its design wants next, within a time, and says what is settled and what is left.

    ./run_all.sh claims --hours 2

The seeds of the first look are trained first, one group of cells after another in the order of the design. The first
groups therefore have their verdicts first. The seeds of the second look follow, only in groups where the first look
left a claim open. Several calls at once, also on several machines with a common folder, take different seeds. A call
goes on where an earlier one stopped.
"""

import itertools
import time

import filelock

from ..config import RunConfig
from ..reporting import charts, signs, study_charts, study_claims, study_curves
from ..reporting.tables import Table
from ..reporting.tuning import tuning_table
from ..runs.suite import Suite
from ..training.loop import OutOfTimeError
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
    """
    deadline = None if hours is None else time.monotonic() + 3600 * hours
    study, started = suite.profile.study, time.monotonic()
    for look, cells in itertools.product(study.looks, study.cells):
        if look > study.looks[0] and not study_claims.is_open(suite, cells):
            continue
        for seed in study.seeds[:look]:
            runs = list(suite.study_runs(cells, seed).values())
            if all(suite.store.record(run) for run in runs):
                continue
            try:
                with suite.store.group_lock(f"{cells}-seed{seed}").acquire(timeout=0):
                    suite.run(runs, f"{cells}, seed {seed}", deadline)
            except filelock.Timeout:
                print(f"{cells}, seed {seed}: another process trains it", flush=True)
            except OutOfTimeError:
                print(f"time is up after {clock(time.monotonic() - started)}: call again to go on", flush=True)
                return False
    return True


def seed_runs(suite: Suite, seed: int) -> list[RunConfig]:
    """All runs of one seed, in the order of the design."""
    return [run for cells in suite.profile.study.cells for run in suite.study_runs(cells, seed).values()]


def hours_left(suite: Suite) -> float | None:
    """Hours of training that the planned seeds still need, teachers included; None before this machine's first run.

    From the seconds that the finished runs of this machine took for an epoch of all images.
    """
    here = environment(suite.device)
    runs = [run for seed in suite.profile.study.seeds for run in seed_runs(suite, seed)]
    needed = dict.fromkeys(each for run in runs for each in (run, run.teacher, run.initial) if each is not None)
    done, seconds, left = 0.0, 0.0, 0.0
    for run in needed:
        record = suite.store.record(run)
        if record is None:
            left += _epochs(suite, run)
        elif all(record.environment[key] == here[key] for key in ("device", "processor")):
            done, seconds = done + _epochs(suite, run), seconds + record.cost["training_seconds"]
    return left * seconds / done / 3600 if done else None


def _epochs(suite: Suite, run: RunConfig) -> float:
    """Epochs of all training images that a run takes."""
    images = run.data.train_images or suite.state.training_count
    steps = run.optimization.steps(images // run.optimization.batch_size)
    return steps * run.optimization.batch_size / suite.state.training_count


def report_study(suite: Suite) -> list[Table]:
    """Write the tables and figures of a study; print the verdicts and the hours that are left.

    A study with claims has the claims table, accuracies, and gains over updates. Tuning has a table of validation
    accuracies. Both have the failure signs.
    """
    made = [tuning_table(suite)] if suite.profile.validation_images else []
    figures = {}
    if suite.profile.study.claims:
        judged, gain = study_claims.table(suite), study_curves.gain_frame(suite)
        made += [judged, study_curves.arms_table(suite), study_curves.reach_table(suite)]
        if len(forest := study_claims.forest_frame(judged)):
            figures["claims"] = charts.forest(forest)
        if len(gain):
            figures["over_updates"] = study_charts.over_updates(study_curves.arms_frame(suite), gain)
        for row in judged.frame.to_dict("records"):
            print(f"  {row['claim']}: {row['difference']} ({row['n (seeds)']} seeds): {row['verdict']}")
    records = suite.store.records()
    made.append(signs.table(suite))
    frames = [make(records) for make in (signs.gap_frame, signs.estimate_frame, signs.stability_frame)]
    if len(frames[0]):
        figures["failure_signs"] = study_charts.failure_signs(*frames)
    for name, figure in figures.items():
        charts.save(figure, require_writable(suite.folder / "figures"), name)
    for table in made:
        table.write(require_writable(suite.folder / "tables"))
    left = hours_left(suite)
    rest = "unknown before the first finished run" if left is None else f"about {left:.1f} on this machine"
    print(f"hours of training left: {rest}; results are in {suite.folder}", flush=True)
    return made
